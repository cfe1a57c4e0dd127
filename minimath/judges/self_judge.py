"""The model in training as a judge of its own solutions, adapter off.

Verdicts are probabilities of one forward; nothing is generated. The prompts of a group differ in little: they are laid
out as a tree, every common beginning once, in one sequence under a block mask (each token sees the tokens before it in
its own prompt). The verdicts are those of the prompts computed apart.
"""
from collections.abc import Callable

import torch

from minimath.config.schema import JudgeOptions
from minimath.core import interrupt
from minimath.core.errors import UserError
from minimath.data.batch import like_lengths, tail_length
from minimath.judges.base import Judge, Pair
from minimath.judges.rubrics import judge_prompt, load_rubric
from minimath.kernels import linear_logp
from minimath.models.block_attention import Branch, on_device
from minimath.models.forward import (
    adapter_off,
    base_causal_lm,
    head,
    hidden_states,
    inference,
    sliding_window,
    takes_mask,
)
from minimath.models.memory import give_back, is_out_of_memory
from minimath.models.policy import Policy
from minimath.models.prefix import EAGER_TOKENS, LEAST_SAVED

# Of one tree: its attention scores are T^2 numbers, most of them between tokens that do not see each other.
TREE_TOKENS = 2048


class SelfJudge(Judge):
    """The judge that is the policy's model.

    A vote is P(A) + P(TIE) / 2 among the three verdicts, of the first token of the reply. counts: prompts,
    prompt_tokens, computed_tokens (fewer, by what is shared), too_long (for the model; no vote)."""
    name, soft = "self", True

    def __init__(self, options: JudgeOptions, policy: Policy, *, micro_batch_tokens: int = 4096,
                 say: Callable[[str], None] = print):
        """Find the verdict tokens. Raises UserError."""
        super().__init__(options, say=say)
        self.model, self.tokenizer, self.micro_batch_tokens = policy.model, policy.tokenizer, micro_batch_tokens
        self.prompt, self.rubric = judge_prompt, load_rubric(options.rubric)
        self.verdicts = verdict_ids(self.tokenizer)
        self.specials = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        config = base_causal_lm(self.model).config.get_text_config()
        self.context = getattr(config, "max_position_embeddings", None) or 1 << 30

    def compare(self, pairs: list[Pair]) -> list[float | None]:
        """Return a probability for each pair; None for a prompt beyond the context."""
        prompts = [chat_ids(self.tokenizer, self.prompt(self.rubric, pair, self.specials)) for pair in pairs]
        votes: list[float | None] = [None] * len(prompts)
        fitting = [i for i, ids in enumerate(prompts) if len(ids) <= self.context]
        logp, computed = self._in_memory([prompts[i] for i in fitting])
        for i, (a, _, tie) in zip(fitting, logp.softmax(1).tolist(), strict=True):
            vote = a + tie / 2
            votes[i] = vote if vote == vote else None  # NaN
        self.counts.update(prompts=len(prompts), prompt_tokens=sum(map(len, prompts)), computed_tokens=computed,
                           too_long=len(prompts) - len(fitting))
        return votes

    def _in_memory(self, prompts: list[list[int]]) -> tuple[torch.Tensor, int]:
        """Compute log-probs and count tokens, in smaller passes when memory runs out."""
        passes, tree, computed = plan_passes(self.model, prompts, self.micro_batch_tokens)
        try:
            with inference(self.model), adapter_off(self.model):
                return verdict_logps(self.model, prompts, self.verdicts, passes, tree), computed
        except (RuntimeError, MemoryError) as error:
            shared = [size for rows, size in passes if len(rows) > 1]
            if not shared or not is_out_of_memory(error):
                raise
        # only here, where the exception no longer holds the activations of the failed pass
        self.micro_batch_tokens = max(shared) // 2
        give_back()
        self.say_once("memory", "the judge self ran out of memory: from now on its passes are smaller, which gives the "
                      "same votes")
        return self._in_memory(prompts)


def verdict_ids(tokenizer) -> list[int]:
    """Find the first tokens of A, B and TIE, bare or after a space. Raises UserError."""
    for space in ("", " "):
        ids = [tokenizer.encode(space + verdict, add_special_tokens=False) for verdict in ("A", "B", "TIE")]
        first = [one[0] for one in ids if one]
        if len(ids[0]) == len(ids[1]) == 1 and len(set(first)) == 3:
            return first
    raise UserError("judge=self: the tokenizer has no single tokens for the letters A and B; use judge=openai or "
                    "judge=heuristic")


def chat_ids(tokenizer, prompt: str) -> list[int]:
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                             add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.encode(prompt + "\nVerdict:")


def plan_passes(model, prompts: list[list[int]], micro_batch_tokens: int) -> tuple[list, bool, int]:
    """Choose trees where they save enough and the model takes their mask, else rows.

    Returns the passes, each (indices of prompts, tokens with padding), whether they are trees, and all tokens without
    padding. micro_batch_tokens bounds a pass; a longer prompt goes alone."""
    whole = sum(map(len, prompts))
    eager = base_causal_lm(model).config.get_text_config()._attn_implementation == "eager"
    packs = tree_packs(prompts, min(micro_batch_tokens, EAGER_TOKENS if eager else TREE_TOKENS))
    computed = sum(size for _, size in packs)
    if computed <= (1 - LEAST_SAVED) * whole and takes_trees(model, max(map(len, prompts), default=0)):
        return packs, True, computed
    rows = like_lengths([len(ids) for ids in prompts], micro_batch_tokens)
    return [(batch, len(batch) * len(prompts[batch[0]])) for batch in rows], False, whole


def takes_trees(model, longest: int) -> bool:
    """Tell whether attention takes what a tree's tokens see: no short window, either."""
    window = sliding_window(model)
    return takes_mask(model) and not (window and window < longest)


def tree_packs(prompts: list[list[int]], limit: int) -> list[tuple[list[int], int]]:
    """Pack prompts, sorted, into trees of at most `limit` tokens; with those tokens."""
    packs, last = [], []
    for index in sorted(range(len(prompts)), key=lambda i: prompts[i]):
        more = len(prompts[index]) - common_length(last, prompts[index])
        if packs and packs[-1][1] + more <= limit:
            packs[-1] = ([*packs[-1][0], index], packs[-1][1] + more)
        else:
            packs.append(([index], len(prompts[index])))
        last = prompts[index]
    return packs


def common_length(a: list[int], b: list[int]) -> int:
    return next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def verdict_logps(model, prompts: list[list[int]], verdicts: list[int], passes: list, tree: bool) -> torch.Tensor:
    """Compute the log-prob of each verdict after each prompt, float64 on the CPU."""
    lm_head, out = head(model), torch.zeros(len(prompts), len(verdicts), dtype=torch.float64)
    logps, places = [], [i for rows, _ in passes for i in rows]
    for rows, _ in passes:
        interrupt.check()
        states = (tree_states if tree else last_states)(model, [prompts[i] for i in rows])  # (b, D)
        targets = on_device(torch.tensor(verdicts).repeat(len(states)), states.device)  # (b * len(verdicts),)
        logps.append(linear_logp(states.repeat_interleave(len(verdicts), 0), lm_head.weight, targets,
                                 rows=torch.arange(len(targets), device=states.device), **lm_head.kernel_args()))
    if logps:  # one read
        out[places] = torch.cat(logps).view(len(places), -1).cpu().double()
    return out


def last_states(model, prompts: list[list[int]]) -> torch.Tensor:
    """Compute the final hidden states of the last tokens, rows right-padded: B, D."""
    lengths, device = torch.tensor([len(ids) for ids in prompts]), base_causal_lm(model).device
    first = torch.arange(len(prompts)) * (width := int(lengths.max()))
    input_ids = torch.zeros(len(prompts), width, dtype=torch.long)  # (B, T)
    for row, ids in enumerate(prompts):
        input_ids[row, :len(ids)] = torch.tensor(ids)
    mask = (torch.arange(width)[None] < lengths[:, None]).long()  # (B, T)
    input_ids, mask, last = (on_device(each, device) for each in (input_ids, mask, first + lengths - 1))
    rows = list(zip(first.tolist(), lengths.tolist()))
    return hidden_states(model, input_ids, attention_mask=mask, rows=rows).flatten(0, 1).index_select(0, last)


def tree_states(model, prompts: list[list[int]]) -> torch.Tensor:
    """Compute the final hidden states of the prompts' last tokens in one tree.

    prompts: sorted by their tokens. Returns (B, D)."""
    ids, position, ends, path, branches = [], [], [], [], []
    for last, prompt in zip([[], *prompts], prompts):
        common = common_length(last, prompt)
        branches.append(Branch(len(ids), len(prompt) - common, path[:common]))
        path = path[:common] + list(range(len(ids), len(ids) + len(prompt) - common))
        ids += prompt[common:]
        position += range(common, len(prompt))
        ends.append(path[-1])
    device = base_causal_lm(model).device
    tail = tail_length(len(ids), TREE_TOKENS) if device.type == "cuda" else 0
    ids, position = ids + [0] * tail, position + list(range(tail))
    ids, position, ends = (on_device(torch.tensor(values), device) for values in (ids, position, ends))
    return hidden_states(model, ids[None], position_ids=position[None], rows=branches)[0].index_select(0, ends)
