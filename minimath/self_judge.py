"""Verdicts of the model in training about pairs of solutions: a probability from one forward, nothing generated.

The prompts of a group differ in little: all start with the rubric and the problem, and those with the same candidate A
go on alike. They are laid out as a tree, every common beginning once, in one sequence under a block mask (each token
sees the tokens before it in its own prompt). The verdicts are those of the prompts computed apart.
"""
import torch

from minimath.config import UserError
from minimath.kernels import linear_logp
from minimath.model import adapter_off, base_causal_lm, head, hidden_states, inference
from minimath.prefix import EAGER_TOKENS, LEAST_SAVED
from minimath.rubrics import Pair, judge_prompt

VERDICTS = ("A", "B", "TIE")
# Of one tree: its attention scores are T^2 numbers, most of them between tokens that do not see each other.
TREE_TOKENS = 2048


def self_compare(model, tokenizer, *, rubric: str, max_chars: int, micro_tokens: int):
    """(compare, counts). compare(pairs) -> P(A) + P(TIE) / 2 among the three verdicts, of the first token of the
    reply, adapter off, in eval mode; None for prompts longer than the model's context.

    micro_tokens bounds the tokens of one forward. counts: prompts, prompt_tokens, computed_tokens (fewer, by what is
    shared), too_long, verdict_mass (mean probability that the reply starts with a verdict at all: near 0, the
    model does not understand the question).
    """
    verdicts = verdict_ids(tokenizer)
    specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    config = base_causal_lm(model).config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or 1 << 30
    counts = {"prompts": 0, "prompt_tokens": 0, "computed_tokens": 0, "too_long": 0, "verdict_mass": 0.0}

    def compare(pairs: list[Pair]) -> list[float | None]:
        prompts = [chat_ids(tokenizer, judge_prompt(rubric, pair, max_chars, specials)) for pair in pairs]
        votes: list[float | None] = [None] * len(pairs)
        fitting = [i for i, ids in enumerate(prompts) if len(ids) <= limit]
        with inference(model), adapter_off(model):
            logp, computed = verdict_logps(model, [prompts[i] for i in fitting], verdicts, micro_tokens)
        mass = logp.exp().sum(1)  # (B,)
        chances = (logp.softmax(1) @ torch.tensor([1.0, 0.0, 0.5], dtype=logp.dtype)).tolist()
        for i, chance in zip(fitting, chances, strict=True):
            votes[i] = chance if chance == chance else None
        asked = counts["prompts"] - counts["too_long"]
        counts["verdict_mass"] = ((counts["verdict_mass"] * asked + mass.nan_to_num().sum().item())
                                  / max(1, asked + len(fitting)))
        counts["prompts"] += len(pairs)
        counts["prompt_tokens"] += sum(map(len, prompts))
        counts["computed_tokens"] += computed
        counts["too_long"] += len(pairs) - len(fitting)
        return votes

    return compare, counts


def verdict_ids(tokenizer) -> list[int]:
    """The first tokens of "A", "B" and "TIE", or of " A", " B" and " TIE" where the bare letters are no tokens."""
    for form in ("{}", " {}"):
        ids = [tokenizer.encode(form.format(verdict), add_special_tokens=False) for verdict in VERDICTS]
        first = [one[0] for one in ids if one]
        if len(ids[0]) == len(ids[1]) == 1 and len(set(first)) == 3:
            return first
    raise UserError("judge=self: the tokenizer has no single tokens for the letters A and B; "
                    "use judge=openai or judge=rules")


def chat_ids(tokenizer, prompt: str) -> list[int]:
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                             add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.encode(prompt + "\nVerdict:")


def verdict_logps(model, prompts: list[list[int]], verdicts: list[int],
                  micro_tokens: int) -> tuple[torch.Tensor, int]:
    """(log-probs (B, len(verdicts)) float64 on the CPU of each verdict token after each prompt, tokens computed)."""
    out = torch.zeros(len(prompts), len(verdicts), dtype=torch.float64)
    if not prompts:
        return out, 0
    eager = base_causal_lm(model).config.get_text_config()._attn_implementation == "eager"
    packs = tree_packs(prompts, min(micro_tokens, EAGER_TOKENS if eager else TREE_TOKENS))
    computed, whole = sum(size for _, size in packs), sum(map(len, prompts))
    if computed <= (1 - LEAST_SAVED) * whole and takes_block_mask(model, max(map(len, prompts))):
        for rows, _ in packs:
            out[rows] = read_verdicts(model, tree_states(model, [prompts[i] for i in rows]), verdicts)
        return out, computed
    for rows in row_batches(prompts, micro_tokens):
        out[rows] = read_verdicts(model, last_states(model, [prompts[i] for i in rows]), verdicts)
    return out, whole


def read_verdicts(model, states: torch.Tensor, verdicts: list[int]) -> torch.Tensor:
    """states (B, D) -> log-probs (B, len(verdicts)) of the verdict tokens, float64 on the CPU."""
    lm_head = head(model)
    targets = torch.tensor(verdicts, device=states.device).repeat(len(states))  # (B * 3,)
    logp = linear_logp(states.repeat_interleave(len(verdicts), 0), lm_head.weight, targets, **lm_head.kernel_args())
    return logp.view(len(states), -1).double().cpu()


# ---- every prompt in a row of its own

def row_batches(prompts: list[list[int]], micro_tokens: int):
    """Yields indices of prompts, shortest first, in batches of at most micro_tokens padded tokens (at least one)."""
    batch: list[int] = []
    for row in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        if batch and len(prompts[row]) * (len(batch) + 1) > micro_tokens:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def last_states(model, prompts: list[list[int]]) -> torch.Tensor:
    """Final hidden states (B, D) of the prompts' last tokens. Right-padded: with a causal model, padding after the last
    token changes nothing before it."""
    lengths = torch.tensor([len(ids) for ids in prompts])
    width = int(lengths.max())
    input_ids = torch.zeros(len(prompts), width, dtype=torch.long)  # (B, T)
    for row, ids in enumerate(prompts):
        input_ids[row, :len(ids)] = torch.tensor(ids)
    mask = (torch.arange(width)[None] < lengths[:, None]).long()  # (B, T)
    device = base_causal_lm(model).device
    hidden = hidden_states(model, input_ids.to(device), attention_mask=mask.to(device))  # (B, T, D)
    return hidden[torch.arange(len(prompts), device=device), lengths.to(device) - 1]


# ---- the prompts as a tree

def takes_block_mask(model, longest: int) -> bool:
    """Whether a mask over tokens says all about what a token sees: no recurrent layers, no window shorter than the
    longest prompt, no attention that takes no mask."""
    config = base_causal_lm(model).config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    windowed = window and getattr(config, "use_sliding_window", True) is not False and kinds != {"full_attention"}
    return (config._attn_implementation in ("sdpa", "eager") and not kinds - {"full_attention", "sliding_attention"}
            and not getattr(base_causal_lm(model), "_is_stateful", False) and not (windowed and window < longest))


def common_length(a: list[int], b: list[int]) -> int:
    return next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def tree_packs(prompts: list[list[int]], limit: int) -> list[tuple[list[int], int]]:
    """(indices of prompts in the order of their tokens, tokens of their tree) of trees of at most `limit` tokens (a
    longer prompt goes alone)."""
    packs: list[tuple[list[int], int]] = []
    last: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda i: prompts[i]):
        more = len(prompts[index]) - common_length(last, prompts[index])
        if packs and packs[-1][1] + more <= limit:
            packs[-1] = ([*packs[-1][0], index], packs[-1][1] + more)
        else:
            packs.append(([index], len(prompts[index])))
        last = prompts[index]
    return packs


def tree_states(model, prompts: list[list[int]]) -> torch.Tensor:
    """Final hidden states (B, D) of the last tokens of prompts, which are in the order of their tokens."""
    ids, position, ends, path, spans = [], [], [], [], []
    for last, prompt in zip([[], *prompts], prompts):
        common = common_length(last, prompt)
        spans.append((len(ids), path[:common]))
        path = path[:common] + list(range(len(ids), len(ids) + len(prompt) - common))
        ids += prompt[common:]
        position += range(common, len(prompt))
        ends.append(path[-1])
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()  # (T, T)
    for (start, before), (end, _) in zip(spans, [*spans[1:], (len(ids), [])]):
        seen[start:end, :start] = False
        seen[start:end, torch.tensor(before, dtype=torch.long)] = True
    base = base_causal_lm(model)
    mask = torch.zeros(seen.shape, dtype=base.dtype).masked_fill_(~seen, torch.finfo(base.dtype).min)
    tensors = [torch.tensor(values, device=base.device) for values in (ids, position, ends)]
    hidden = hidden_states(model, tensors[0][None], position_ids=tensors[1][None],
                           attention_mask=mask[None, None].to(base.device))  # (1, T, D)
    return hidden[0, tensors[2]]
