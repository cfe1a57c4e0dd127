"""Verdicts of the model in training about pairs or lists of solutions: probabilities of one forward, nothing generated.

The prompts of a group differ in little: all start with the rubric and the problem, and those with the same candidate A
go on alike. They are laid out as a tree, every common beginning once, in one sequence under a block mask (each token
sees the tokens before it in its own prompt). The verdicts are those of the prompts computed apart.
"""
import torch

from minimath.core.errors import UserError
from minimath.kernels import linear_logp
from minimath.models.load import adapter_off, base_causal_lm, head, hidden_states, inference
from minimath.models.prefix import EAGER_TOKENS, LEAST_SAVED
from minimath.judges.rubrics import LETTERS, Listing, Pair, judge_prompt, list_prompt

# Of one tree: its attention scores are T^2 numbers, most of them between tokens that do not see each other.
TREE_TOKENS = 2048


def self_compare(model, tokenizer, *, rubric: str, max_chars: int, micro_batch_tokens: int, prompt=judge_prompt):
    """(compare, choose, counts). compare(pairs) -> P(A) + P(TIE) / 2 among the three verdicts, of the first token of
    the reply, adapter off, in eval mode; choose(lists) -> P(letter) + P(TIE) / k of each of the k letters, among these
    and TIE. None for prompts longer than the model's context.

    micro_batch_tokens bounds the tokens of one forward; prompt(rubric, pair, max_chars, specials) is what is asked of a pair.
    counts: prompts, prompt_tokens, computed_tokens (fewer, by what is shared), too_long, verdict_mass (mean
    probability that the reply starts with a verdict at all: near 0, the model does not understand the question).
    """
    specials = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    config = base_causal_lm(model).config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or 1 << 30
    counts = {"prompts": 0, "prompt_tokens": 0, "computed_tokens": 0, "too_long": 0, "verdict_mass": 0.0}
    pair_verdicts = verdict_ids(tokenizer)

    def ask(texts: list[str], sizes: list[int], verdicts: list[int]) -> list[list[float] | None]:
        """Of each text the shares of its first sizes[i] letters; verdicts: the tokens of all letters and of TIE."""
        prompts = [chat_ids(tokenizer, text) for text in texts]
        votes: list[list[float] | None] = [None] * len(prompts)
        fitting = [i for i, ids in enumerate(prompts) if len(ids) <= limit]
        with inference(model), adapter_off(model):
            logp, computed = verdict_logps(model, [prompts[i] for i in fitting], verdicts, micro_batch_tokens)
        mass = 0.0
        for i, of_all in zip(fitting, logp, strict=True):
            own = torch.cat((of_all[:sizes[i]], of_all[-1:]))  # (k + 1,)
            mass += own.exp().sum().nan_to_num().item()
            chances = own.softmax(0)
            shares = (chances[:-1] + chances[-1] / sizes[i]).tolist()
            votes[i] = shares if all(share == share for share in shares) else None
        asked = counts["prompts"] - counts["too_long"]
        counts["verdict_mass"] = (counts["verdict_mass"] * asked + mass) / max(1, asked + len(fitting))
        counts["prompts"] += len(prompts)
        counts["prompt_tokens"] += sum(map(len, prompts))
        counts["computed_tokens"] += computed
        counts["too_long"] += len(prompts) - len(fitting)
        return votes

    def compare(pairs: list[Pair]) -> list[float | None]:
        texts = [prompt(rubric, pair, max_chars, specials) for pair in pairs]
        return [vote and vote[0] for vote in ask(texts, [2] * len(pairs), pair_verdicts)]

    def choose(lists: list[Listing]) -> list[list[float] | None]:
        texts = [list_prompt(rubric, listing, max_chars, specials) for listing in lists]
        return ask(texts, [len(listing.candidates) for listing in lists], verdict_ids(tokenizer, LETTERS))

    return compare, choose, counts


def verdict_ids(tokenizer, letters: str = "AB") -> list[int]:
    """The first tokens of the letters and of "TIE", or of " A", ... and " TIE" where the bare letters are no tokens."""
    for form in ("{}", " {}"):
        ids = [tokenizer.encode(form.format(verdict), add_special_tokens=False) for verdict in [*letters, "TIE"]]
        first = [one[0] for one in ids if one]
        if all(len(one) == 1 for one in ids[:-1]) and len(set(first)) == len(ids):
            return first
    raise UserError(f"judge=self: the tokenizer has no single tokens for the letters {letters[0]} to {letters[-1]}; "
                    "use judge=openai or judge=heuristic" + (" or judge_plan=round_robin" if len(letters) > 2 else ""))


def chat_ids(tokenizer, prompt: str) -> list[int]:
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                             add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.encode(prompt + "\nVerdict:")


def verdict_logps(model, prompts: list[list[int]], verdicts: list[int],
                  micro_batch_tokens: int) -> tuple[torch.Tensor, int]:
    """(log-probs (B, len(verdicts)) float64 on the CPU of each verdict token after each prompt, tokens computed)."""
    out = torch.zeros(len(prompts), len(verdicts), dtype=torch.float64)
    if not prompts:
        return out, 0
    eager = base_causal_lm(model).config.get_text_config()._attn_implementation == "eager"
    packs = tree_packs(prompts, min(micro_batch_tokens, EAGER_TOKENS if eager else TREE_TOKENS))
    computed, whole = sum(size for _, size in packs), sum(map(len, prompts))
    if computed <= (1 - LEAST_SAVED) * whole and takes_block_mask(model, max(map(len, prompts))):
        for rows, _ in packs:
            out[rows] = read_verdicts(model, tree_states(model, [prompts[i] for i in rows]), verdicts)
        return out, computed
    for rows in row_batches(prompts, micro_batch_tokens):
        out[rows] = read_verdicts(model, last_states(model, [prompts[i] for i in rows]), verdicts)
    return out, whole


def read_verdicts(model, states: torch.Tensor, verdicts: list[int]) -> torch.Tensor:
    """states (B, D) -> log-probs (B, len(verdicts)) of the verdict tokens, float64 on the CPU."""
    lm_head = head(model)
    targets = torch.tensor(verdicts, device=states.device).repeat(len(states))  # (B * 3,)
    logp = linear_logp(states.repeat_interleave(len(verdicts), 0), lm_head.weight, targets, **lm_head.kernel_args())
    return logp.view(len(states), -1).double().cpu()


# ---- every prompt in a row of its own

def row_batches(prompts: list[list[int]], micro_batch_tokens: int):
    """Yields indices of prompts, shortest first, in batches of at most micro_batch_tokens padded tokens (at least one)."""
    batch: list[int] = []
    for row in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        if batch and len(prompts[row]) * (len(batch) + 1) > micro_batch_tokens:
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
