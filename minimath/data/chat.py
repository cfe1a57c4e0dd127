"""Turn examples into token ids and a loss mask, by the model's chat template.

Trained are the tokens of the assistant and the token that ends its turn, not what the template puts into the prompt
(template.py). Prompt and solution are tokenised together when the prompt's ids are a prefix of the whole; when a merge
crosses the border, or the template changes the solution (some cut the thoughts out), apart, as generation sees them.
Without a template: "problem\\n\\nsolution<eos>"."""
import itertools
import re
from functools import lru_cache
from typing import NamedTuple

from minimath.core.errors import UserError
from minimath.core.run_folder import say_once
from minimath.data import template
from minimath.data.rows import Example, split_hashes
from minimath.data.template import CLOSE, OPEN, is_open, render, template_of

IGNORE = -100
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|end_of_text|>", "<|endoftext|>",
             "<turn|>")
MARK = "MINIMATH-MARK"  # stands for a text, to find what a template writes after it
SHOWN_CHARS = 1600
EMPTY = re.compile(rf"({OPEN})?\s*{CLOSE}")


class Encoded(NamedTuple):
    """An example as tokens: those with a true loss_mask are trained. truncated: cut.

    verdicts: what is predicted at each place, IGNORE for nothing, in place of the tokens that follow; the loss_mask
    then tells the solution from its prompt."""
    ids: list[int]
    loss_mask: list[bool]
    truncated: bool
    verdicts: list[int] | None = None

    def targets(self) -> list[int]:
        """The token that follows each one, or its verdict; IGNORE where none is trained."""
        if self.verdicts is not None:
            return self.verdicts
        return [i if trained else IGNORE for i, trained in zip(self.ids[1:], self.loss_mask[1:])] + [IGNORE]


def prompt_ids(tokenizer, problem: str | Example, *, system: str = "", prompt_template: str, thinking: str = "auto",
               template_args: str = "") -> list[int]:
    """Return the ids of the prompt, up to where the assistant begins; one BOS at most.

    Of an example with messages those are the prompt, all turns up to the last answer, without the prompt_template.
    thinking, template_args: as the options (PromptOptions). UserError: the template has no such switch."""
    messages = _talk(tokenizer, problem, system, prompt_template)
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    args = template.chat_args(tokenizer, thinking, template_args)
    return _tokens(tokenizer, render(tokenizer, asked, args, generate=True))


def _talk(tokenizer, problem: str | Example, system: str, prompt_template: str) -> list[dict]:
    """Return the messages of a chat row, or the question of any other."""
    if isinstance(problem, Example) and problem.messages:
        talk = [{**m, **{key: neutral(tokenizer, m[key], trained=m["role"] == "assistant")
                         for key in ("content", "reasoning_content") if key in m}} for m in problem.messages]
        system = "" if talk[0]["role"] == "system" else system
    else:
        text = problem.problem if isinstance(problem, Example) else problem
        talk = [{"role": "user", "content": neutral(tokenizer, prompt_template.format(problem=text))}]
    talk = [{"role": "system", "content": system}, *talk] if system else talk
    if talk[0]["role"] == "system" and template.drops_system(tokenizer):
        say_once("warning: the model's chat template leaves system messages out: system= and those of the data have no "
                 "effect; say it in prompt_template=")
    return talk


def _tokens(tokenizer, text: str) -> list[int]:
    """Return the ids of a text, with the BOS that the tokenizer adds by itself, once."""
    ids, bos = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.bos_token_id
    return [bos, *ids] if bos not in (None, *ids[:1]) and tokenizer("a")["input_ids"][0] == bos else ids


def neutral(tokenizer, text: str, *, trained: bool = False) -> str:
    """Break up control tokens: "<|im_end|>" inside a problem must not end the turn.

    trained: of an assistant's text tokens such as </think> stay, which models write themselves."""
    ends = eos_ids(tokenizer) if trained else ()
    for token, (number, special) in control_tokens(tokenizer).items():
        if (special and token not in (OPEN, CLOSE)) or not trained or number in ends:
            text = text.replace(token, token[:1] + " " + token[1:])
    return text


@lru_cache(maxsize=4)
def control_tokens(tokenizer) -> dict[str, tuple[int, bool]]:
    """Map the text of added tokens, but for words and space, to id and whether special."""
    # not all that end a turn are called special; transformers builds its table anew on each access: cached
    return {token.content: (i, token.special) for i, token in tokenizer.added_tokens_decoder.items()
            if token.special or len(token.content.strip()) > 1 and not token.content.strip().isalnum()}


@template.per_template
def turn_end(tokenizer) -> int:
    """Return the token that ends the assistant's turn: the template's, else EOS."""
    if template_of(tokenizer):
        talk = [*template.QUESTION, {"role": "assistant", "content": MARK}]
        after = tokenizer(render(tokenizer, talk).rpartition(MARK)[2], add_special_tokens=False)["input_ids"]
        known = dict(control_tokens(tokenizer).values())
        if ends := sorted((i for i in after if i in known), key=lambda i: not known[i]):  # special ones first
            return ends[0]
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token and its template ends no turn: no model learns to "
                        "stop; set eos_token in tokenizer_config.json")
    return tokenizer.eos_token_id


def eos_ids(tokenizer, model=None) -> list[int]:
    """Return all ids that end a turn, the trained one first, then well-known ones too."""
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    known = {text: number for text, (number, _) in control_tokens(tokenizer).items()}
    found = [turn_end(tokenizer), tokenizer.eos_token_id, *(listed if isinstance(listed, (list, tuple)) else [listed]),
             *(known.get(name) for name in TURN_ENDS)]
    return list(dict.fromkeys(i for i in found if i is not None))


def final_text(solution: str, answer: str) -> str:
    """Put the final answer in \\boxed{}: rewrite "#### x", append a missing answer."""
    if "\\boxed" in solution.rpartition(CLOSE)[2]:  # one in a thought is none
        return solution
    body, final = split_hashes(solution)
    return f"{body}\n\\boxed{{{answer or final}}}".lstrip() if answer or final else solution


def encode(tokenizer, example: Example, *, system: str = "", prompt_template: str, thinking: str = "auto",
           template_args: str = "", max_len: int) -> Encoded:
    """Encode prompt, solution and turn end, cut at max_len from the right.

    Rows with messages train every assistant turn; where the template rewrites earlier turns as the talk goes on, only
    the last. Raises UserError without a solution, and for one that thinks behind a prompt that ends the thoughts."""
    args, where = template.chat_args(tokenizer, thinking, template_args), example.where or example.id or "example"
    messages = _talk(tokenizer, example, system, prompt_template)
    if not example.messages:
        solution = neutral(tokenizer, final_text(example.solution, example.answer), trained=True)
        messages.append({"role": "assistant", "content": solution})
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise UserError(f"{where}: no solution to train on; add one")
    prompt, last = render(tokenizer, messages[:-1], args, generate=True), messages[-1]
    thought, plain = template.thought_of(last)[0], last["content"]
    if template_of(tokenizer) and prompt.rstrip().endswith(CLOSE) and thought:
        advice = "set thinking=on, or take" if thinking != "on" else "take"
        raise UserError(f"{where}: the solution thinks, but under thinking={thinking} the chat template ends the "
                        f"thoughts before it begins: {advice} the thoughts out of the data")
    if "reasoning_content" in last:
        plain = template.with_thought(last["reasoning_content"], plain)
    forms = [[*messages[:-1], message] for message in template.ways_to_write(last)]
    if not template_of(tokenizer) or is_open(prompt) and CLOSE in plain and not plain.lstrip().startswith(OPEN):
        forms = []  # text, or a completion of this prompt: the ids that were sampled
    row = next(filter(None, (_whole(tokenizer, form, args) for form in forms)), None)
    if row is None:
        written = next(filter(None, (_behind(tokenizer, prompt, form, args) for form in forms)), None)
        if written is None and is_open(prompt):
            written = plain.removeprefix(OPEN).lstrip() if CLOSE in plain else f"\n{CLOSE}\n\n{plain}"
        begun = _tokens(tokenizer, prompt)
        done = [*tokenizer(written or plain, add_special_tokens=False)["input_ids"], turn_end(tokenizer)]
        row = begun + done, [False] * len(begun) + [True] * len(done)
    return Encoded(row[0][:max_len], row[1][:max_len], len(row[0]) > max_len)


def _whole(tokenizer, messages: list[dict], args: dict) -> tuple[list[int], list[bool]] | None:
    """Tokenise the whole talk once; None when an assistant turn is changed in it."""
    end, ids, mask = turn_end(tokenizer), _tokens(tokenizer, render(tokenizer, messages, args)), []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _tokens(tokenizer, render(tokenizer, messages[:turn], args, generate=True))
        if ids[:len(prompt)] != prompt or end not in ids[len(prompt):]:
            return None
        stop = ids.index(end, len(prompt)) + 1
        if not _holds(tokenizer.decode(ids[len(prompt):stop - 1]), message):
            return None
        mask += [False] * (len(prompt) - len(mask)) + [True] * (stop - len(prompt))
    return ids[:len(mask)], mask  # what the template writes after the last turn end is never generated


def _behind(tokenizer, prompt: str, messages: list[dict], args: dict) -> str | None:
    """Find how the template writes the last turn, where that has thoughts and follows the prompt."""
    text, end = render(tokenizer, messages, args), tokenizer.convert_ids_to_tokens(turn_end(tokenizer))
    written, ended, _ = text[len(prompt):].partition(end)
    thinks = prompt.rstrip().endswith((OPEN, CLOSE)) or CLOSE in written
    return written if thinks and ended and text.startswith(prompt) and _holds(written, messages[-1]) else None


def _holds(written: str, message: dict) -> bool:
    """Tell whether what stands in a turn are a message's thought and answer."""
    (thought, answer), (thought_there, answer_there) = template.thought_of(message), template.split_thought(written)
    return thought_there == thought and answer_there.endswith(answer)


def preflight(tokenizer, rows: list[Encoded], *, eos: list[int]) -> str:
    """Show one example, [[trained text]] marked, and the counts.

    Raises UserError for what would waste a run: no trained tokens, more than one BOS, an example that trains no EOS."""
    trained, tokens = sum(sum(row.loss_mask) for row in rows), sum(len(row.ids) for row in rows)
    cut, longest = sum(row.truncated for row in rows), max((len(row.ids) for row in rows), default=0)
    if not trained:
        raise UserError(f"no trained tokens in {len(rows)} rows ({cut} truncated, longest {longest} tokens); "
                        "raise max_len if the prompts fill it, or check that the rows have solutions")
    bos, talk = tokenizer.bos_token_id, [*template.QUESTION, {"role": "assistant", "content": "b"}] * 2
    opens_turns = bos is not None and template_of(tokenizer) \
        and render(tokenizer, talk).count(tokenizer.bos_token) > 1  # as in SmolLM2 and Llama 2
    for number, row in enumerate(rows, 1):
        if bos is not None and (row.ids[:2] == [bos, bos] or row.ids.count(bos) > 1 and not opens_turns):
            raise UserError(f"example {number} has more than one BOS ({tokenizer.bos_token}): "
                            f"{tokenizer.decode(row.ids[:12])!r}; take it out of data or chat template")
        if not row.truncated and not (row.loss_mask[-1] and row.ids[-1] in eos):
            raise UserError(f"example {number} trains no EOS at its end, {tokenizer.decode(row.ids[-8:])!r}: "
                            "the model would not learn to stop; check what the template writes after a turn")
    shown = min((row for row in rows if any(row.loss_mask)), key=lambda row: row.truncated)  # the first whole one
    lines = ["an example, trained text in [[ ]]:", marked(tokenizer, shown), "",
             f"{len(rows)} rows, {tokens} tokens, {trained} trained ({100 * trained / tokens:.0f}%), longest {longest}"]
    if cut:
        lost = sum(not any(row.loss_mask) for row in rows)
        lines.append(f"{cut} rows truncated at max_len, {lost} of them to nothing trained; raise max_len to keep them "
                     "whole")
    if EMPTY.match(tokenizer.decode([i for i, trained in zip(shown.ids, shown.loss_mask) if trained])):
        lines.append("the chat template writes an empty thought before this solution, and the model learns to skip it: "
                     "thinking=off puts that into the prompt, if the template has such a switch")
    if not template_of(tokenizer):
        lines.append("the tokenizer has no chat template: plain text, problem, blank line, solution, EOS")
    return "\n".join(lines)


def marked(tokenizer, row: Encoded) -> str:
    """Decode an example, trained spans in [[ ]]; the middle of a long one is left out."""
    parts = []
    for trained, span in itertools.groupby(zip(row.loss_mask, row.ids), key=lambda pair: pair[0]):
        text, half = tokenizer.decode([i for _, i in span]), SHOWN_CHARS // 2
        if len(text) > SHOWN_CHARS:
            text = f"{text[:half]} ...({len(text) - 2 * half} characters)... {text[-half:]}"
        parts.append(f"[[{text}]]" if trained else text)
    return "".join(parts)
