"""Examples to token ids: chat template, exactly one BOS, a trained EOS, the loss mask, packing, preflight.

Trained are the tokens of the assistant and the token that ends its turn, nothing else. Prompt and solution
are tokenised together as the template writes them, when the prompt's ids are a prefix of the whole; when a
merge crosses the border, or the template changes the solution (some cut the thinking out), they are tokenised
apart, which is what generation sees too. A tokenizer without a chat template (base models) gets plain text:
"problem\\n\\nsolution<eos>".
"""
from functools import lru_cache
from typing import NamedTuple

import torch

from minimath.core.errors import UserError
from minimath.data.examples import Example, hashes_answer

IGNORE = -100
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|end_of_text|>",
             "<|endoftext|>")
MARK = "MINIMATH-MARK"  # stands for a text, to find what a template writes after it
SHOWN_CHARS = 1600


class Encoded(NamedTuple):
    """ids and mask have the same length; tokens with a true mask are trained. truncated: cut at max_len."""
    ids: list[int]
    mask: list[bool]
    truncated: bool


# ---- text and tokens of a prompt

def has_template(tokenizer) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def user_text(problem: str, prompt_template: str) -> str:
    """The user message of a problem. Raises UserError for unknown slots or none for the problem."""
    try:
        text = prompt_template.format(problem=problem)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"prompt_template={prompt_template!r}: {error!r}; only {{problem}} is a slot, "
                        "write other braces twice, {{ and }}") from error
    if "{problem}" not in prompt_template:
        raise UserError(f"prompt_template={prompt_template!r} has no {{problem}}: add it")
    return text


def prompt_ids(tokenizer, problem: str, *, system: str = "", prompt_template: str) -> list[int]:
    """Ids of the prompt that asks for a solution, up to where the assistant begins; one BOS at most."""
    return _prompt(tokenizer, _question(tokenizer, problem, system, prompt_template))


def _question(tokenizer, problem: str, system: str, prompt_template: str) -> list[dict]:
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": neutral(tokenizer, user_text(problem, prompt_template))}]


def _prompt(tokenizer, messages: list[dict]) -> list[int]:
    return _tokens(tokenizer, _render(tokenizer, messages, generate=True))


def _render(tokenizer, messages: list[dict], *, generate: bool = False) -> str:
    if not has_template(tokenizer):
        return "\n\n".join(m["content"] for m in messages) + ("\n\n" if generate else "")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    except Exception as error:  # a template is a program of the model's
        roles = ", ".join(m["role"] for m in messages)
        raise UserError(f"the model's chat template refuses messages from {roles}: {error}; "
                        "try without a system message (system=)") from error


def _tokens(tokenizer, text: str) -> list[int]:
    """Ids of a text from its beginning: the BOS that the tokenizer adds by itself, unless the text has it."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    adds = bos is not None and tokenizer("a")["input_ids"][0] == bos
    return [bos, *ids] if adds and ids[:1] != [bos] else ids


def neutral(tokenizer, text: str) -> str:
    """Text in which no special token is left: "<|im_end|>" inside a problem must not end the turn."""
    for token in special_tokens(tokenizer):
        if token in text:
            text = text.replace(token, token[:1] + " " + token[1:])
    return text


@lru_cache(maxsize=4)
def special_tokens(tokenizer) -> dict[str, int]:
    """Text -> id of the special tokens (transformers builds its table anew on each access: cached)."""
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


# ---- the end of a turn

def turn_end(tokenizer) -> int:
    """The token that ends the assistant's turn: what the template writes there, else EOS."""
    return _turn_end(tokenizer, str(getattr(tokenizer, "chat_template", None)))


@lru_cache(maxsize=4)
def _turn_end(tokenizer, template: str) -> int:  # the template is part of the key: users may set another one
    if has_template(tokenizer):
        talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
        after = _render(tokenizer, talk).rpartition(MARK)[2]
        special = set(special_tokens(tokenizer).values())
        ids = tokenizer(after, add_special_tokens=False)["input_ids"]
        found = next((i for i in ids if i in special), None)
        if found is not None:
            return found
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token and its template ends no turn: no model learns to "
                        "stop; set eos_token in tokenizer_config.json")
    return tokenizer.eos_token_id


def eos_ids(tokenizer, model=None) -> list[int]:
    """All ids that end a turn, the trained one first: of the template, the tokenizer, the generation config,
    and the well-known ones that are special tokens of this tokenizer."""
    found = [turn_end(tokenizer), tokenizer.eos_token_id]
    config = getattr(model, "generation_config", None)
    listed = getattr(config, "eos_token_id", None)
    found += listed if isinstance(listed, (list, tuple)) else [listed]
    names = special_tokens(tokenizer)
    found += [names[name] for name in TURN_ENDS if name in names]
    return list(dict.fromkeys(i for i in found if i is not None))


# ---- an example to ids and mask

def final_text(solution: str, answer: str) -> str:
    """The solution with its final answer in \\boxed{}: "#### x" is rewritten, a missing answer appended."""
    if "\\boxed" in solution:
        return solution
    if final := hashes_answer(solution):
        body = solution.rsplit("####", 1)[0]
        return f"{body.rstrip()}\n\\boxed{{{answer or final}}}".lstrip()
    return f"{solution}\n\\boxed{{{answer}}}" if answer else solution


def encode(tokenizer, example: Example, *, system: str = "", prompt_template: str, max_len: int) -> Encoded:
    """Prompt, solution and turn end as ids, cut at max_len from the right (the mask may then be all false).

    Rows with messages keep them as they are (system is put first when they bring none) and train every
    assistant turn; where the template rewrites earlier turns as the talk goes on, only the last is trained.
    """
    if example.messages:
        messages = [{**m, "content": neutral(tokenizer, m["content"])} for m in example.messages]
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
    else:
        solution = neutral(tokenizer, final_text(example.solution, example.answer))
        messages = [*_question(tokenizer, example.problem, system, prompt_template),
                    {"role": "assistant", "content": solution}]
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise UserError(f"{example.where or example.id or 'example'}: no solution to train on; add one")
    ids, mask = _whole(tokenizer, messages) or _apart(tokenizer, messages)
    return Encoded(ids[:max_len], mask[:max_len], len(ids) > max_len)


def _whole(tokenizer, messages: list[dict]) -> tuple[list[int], list[bool]] | None:
    """Tokenise the whole talk once; None when an assistant turn is not found in it as written."""
    if not has_template(tokenizer):
        return None
    end, ids, mask = turn_end(tokenizer), _tokens(tokenizer, _render(tokenizer, messages)), []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _prompt(tokenizer, messages[:turn])
        if ids[:len(prompt)] != prompt or end not in ids[len(prompt):]:
            return None
        stop = ids.index(end, len(prompt)) + 1
        if message["content"].strip() not in tokenizer.decode(ids[len(prompt):stop]):
            return None
        mask += [False] * (len(prompt) - len(mask)) + [True] * (stop - len(prompt))
    return ids[:len(mask)], mask  # what the template writes after the last turn end is never generated


def _apart(tokenizer, messages: list[dict]) -> tuple[list[int], list[bool]]:
    """Tokenise the prompt and the last assistant turn on their own."""
    text = _render(tokenizer, messages[:-1], generate=True)
    solution = messages[-1]["content"]
    if text.rstrip().endswith("<think>"):  # reasoning templates open the thinking in the prompt
        solution = solution.removeprefix("<think>").lstrip()
    prompt = _tokens(tokenizer, text)
    done = [*tokenizer(solution, add_special_tokens=False)["input_ids"], turn_end(tokenizer)]
    return prompt + done, [False] * len(prompt) + [True] * len(done)


# ---- batches

def pack(lengths: list[int], budget: int) -> list[list[int]]:
    """First-fit decreasing bins of indices with at most `budget` tokens each; deterministic.

    A length over the budget gets a bin of its own. Indices are ascending within a bin.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((b for b, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
            bins.append([])
            room.append(budget)
            place = len(bins) - 1
        bins[place].append(index)
        room[place] -= lengths[index]
    return [sorted(indices) for indices in bins]


def _targets(row: Encoded) -> list[int]:
    """target[t] is the next token where that is trained, else IGNORE; the last one has no next token."""
    return [i if trained else IGNORE for i, trained in zip(row.ids[1:], row.mask[1:])] + [IGNORE]


def collate_packed(rows: list[Encoded]) -> dict[str, torch.Tensor]:
    """One row of all examples, one after the other, int64: input_ids (1, T); position_ids (1, T), from 0 for
    each example; target (T,), the next token or -100; segment (1, T), the number of the example."""
    return {
        "input_ids": torch.tensor([[i for row in rows for i in row.ids]]),
        "position_ids": torch.tensor([[p for row in rows for p in range(len(row.ids))]]),
        "target": torch.tensor([t for row in rows for t in _targets(row)]),
        "segment": torch.tensor([[n for n, row in enumerate(rows) for _ in row.ids]]),
    }


def collate_padded(rows: list[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """Examples padded at the right, int64: input_ids, attention_mask, position_ids (B, T), target (B*T,)."""
    width = max(len(row.ids) for row in rows)
    gaps = [width - len(row.ids) for row in rows]
    return {
        "input_ids": torch.tensor([row.ids + [pad_id] * gap for row, gap in zip(rows, gaps)]),
        "attention_mask": torch.tensor([[1] * len(row.ids) + [0] * gap for row, gap in zip(rows, gaps)]),
        "position_ids": torch.arange(width).repeat(len(rows), 1),
        "target": torch.tensor([t for row, gap in zip(rows, gaps) for t in _targets(row) + [IGNORE] * gap]),
    }


def packed_attention_mask(segment: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Causal within an example, nothing across: segment (1, T) -> bool (1, 1, T, T), true where allowed.

    With a float dtype: 0 where allowed, the lowest number elsewhere. Eager attention adds its mask, so it
    takes only that form (a bool mask there is silently wrong); sdpa takes both. Without a mask, with
    restarting position_ids and use_cache=False, transformers finds the borders itself (seen in 5.23); with
    its default use_cache=True, or a mask of ones, examples silently attend to each other.
    """
    same = segment[:, None, :, None] == segment[:, None, None, :]  # (1, 1, T, T)
    allowed = same & torch.ones_like(same).tril()
    if dtype is None:
        return allowed
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=segment.device)
    return zeros.masked_fill(~allowed, torch.finfo(dtype).min)


# ---- preflight

def preflight(tokenizer, rows: list[Encoded], *, eos: list[int]) -> str:
    """One example, [[trained text]] marked, and the counts. Raises UserError for what would waste a run:
    no trained tokens, more than one BOS, an example that trains no EOS."""
    trained = sum(map(sum, (row.mask for row in rows)))
    cut, tokens = sum(row.truncated for row in rows), sum(len(row.ids) for row in rows)
    longest = max((len(row.ids) for row in rows), default=0)
    if not trained:
        raise UserError(f"no trained tokens in {len(rows)} rows ({cut} truncated, longest {longest} tokens); "
                        "raise max_len if the prompts fill it, or check that the rows have solutions")
    bos, opens_turns = tokenizer.bos_token_id, _bos_opens_turns(tokenizer)
    for number, row in enumerate(rows, 1):
        if bos is not None and (row.ids[:2] == [bos, bos] or row.ids.count(bos) > 1 and not opens_turns):
            raise UserError(f"example {number} has more than one BOS ({tokenizer.bos_token}): "
                            f"{tokenizer.decode(row.ids[:12])!r}; take it out of data or chat template")
        if not row.truncated and not (row.mask[-1] and row.ids[-1] in eos):
            raise UserError(f"example {number} trains no EOS at its end, {tokenizer.decode(row.ids[-8:])!r}: "
                            "the model would not learn to stop; check what the template writes after a turn")
    shown = next((row for row in rows if any(row.mask) and not row.truncated), None)
    shown = shown or next(row for row in rows if any(row.mask))
    share = f"{trained} trained ({100 * trained / tokens:.0f}%)"
    lines = ["an example, trained text in [[ ]]:", marked(tokenizer, shown), "",
             f"{len(rows)} rows, {tokens} tokens, {share}, longest {longest}"]
    if cut:
        lost = sum(not any(row.mask) for row in rows)
        lines.append(f"{cut} rows truncated at max_len, {lost} of them to nothing trained; raise "
                     "max_len to keep them whole")
    if not has_template(tokenizer):
        lines.append("the tokenizer has no chat template: plain text, problem, blank line, solution, EOS")
    return "\n".join(lines)


def _bos_opens_turns(tokenizer) -> bool:
    """Whether the template opens turns with BOS (SmolLM2, Llama 2): then only a doubled first is wrong."""
    if tokenizer.bos_token is None or not has_template(tokenizer):
        return False
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    return _render(tokenizer, talk).count(tokenizer.bos_token) > 1


def marked(tokenizer, row: Encoded) -> str:
    """The decoded text of an example, trained spans in [[ ]]; the middle of a long one is left out."""
    parts, start = [], 0
    for stop in range(1, len(row.ids) + 1):
        if stop == len(row.ids) or row.mask[stop] != row.mask[start]:
            text = tokenizer.decode(row.ids[start:stop])
            if len(text) > SHOWN_CHARS:
                half = SHOWN_CHARS // 2
                text = f"{text[:half]} ...({len(text) - 2 * half} characters)... {text[-half:]}"
            parts.append(f"[[{text}]]" if row.mask[start] else text)
            start = stop
    return "".join(parts)
