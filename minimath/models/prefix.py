"""Completions of one prompt behind a single copy of it: an update computes a group's prompt once.

A sequence is prompt, completion 1, completion 2, ...; every completion's positions go on from the prompt's end, and its
tokens see the prompt and themselves: loss and gradient are those of the rows computed apart."""
from collections.abc import Iterator

import torch

from minimath.core import dist
from minimath.core.run_folder import say_once
from minimath.data.batch import micro_batches, tail_length
from minimath.data.chat import IGNORE, Encoded
from minimath.models.attention import Segment
from minimath.models.forward import base_causal_lm, takes_rows
from minimath.models.memory import keeps_state
from minimath.models.policy import Policy

LEAST_SAVED = 0.15  # share of the tokens; below, the longer attention of shared sequences outweighs it
EAGER_TOKENS = 1024  # of a shared sequence under eager attention, which keeps (heads, T, T) scores of every layer


def prompt_length(row: Encoded) -> int:
    return row.loss_mask.index(True)


def own_rows(groups: list[int]) -> list[int]:
    """Find the indices of the rows that this process computes: every world-th group's."""
    return [i for i, group in enumerate(groups) if group % dist.world() == dist.rank()]


def rows_apart(model) -> bool:
    """Tell whether rows of an update must not share a sequence; says so once."""
    if apart := keeps_state(model):
        say_once(f"{type(base_causal_lm(model)).__name__} keeps state from token to token: updates neither pack rows "
                 "nor share prompts, which takes longer")
    return apart


def shared_packs(rows: list[Encoded], groups: list[int], micro_batch_tokens: int) -> list[list[int]]:
    """Cut rows into packs of one group, each with one copy of the prompt.

    rows: prompt + trained completion, those of a group next to each other; groups: the number of each row's group.
    Returns indices; a pack has at most micro_batch_tokens tokens, and a longer row goes alone."""
    packs, last, length = [], None, 0
    for index, (row, group) in enumerate(zip(rows, groups, strict=True)):
        more = len(row.ids) - prompt_length(row)
        if group == last and length + more <= micro_batch_tokens:
            packs[-1].append(index)
            length += more
        else:
            packs.append([index])
            last, length = group, len(row.ids)
    return packs


def share_saved(rows: list[Encoded], packs: list[list[int]]) -> float:
    """Find the share of the rows' tokens that one prompt for each pack saves."""
    saved = sum((len(pack) - 1) * prompt_length(rows[pack[0]]) for pack in packs)
    return saved / max(1, sum(len(row.ids) for row in rows))


def shared_batch(rows: list[Encoded], most: int = 0) -> dict:
    """Lay rows with a common prompt out as one sequence, for hidden_states.

    input_ids, position_ids (1, T), rows as hidden_states takes them, source (N,): the places whose hidden states
    predict the N trained tokens or verdicts, target (N,): those, in the order of the argument. T is rounded up, to at
    most `most`."""
    start = prompt_length(rows[0])
    ids, position, segments = list(rows[0].ids[:start]), list(range(start)), [Segment(0, start)]
    source, target = [], []
    for row in rows:
        targets = row.targets()
        end = len(row.ids) - (targets[-1] == IGNORE)  # where nothing is predicted from the last token
        places = [place for place in range(start - 1, end) if targets[place] != IGNORE]
        source += [place if place < start else len(ids) + place - start for place in places]
        target += [targets[place] for place in places]
        if end > start:
            segments.append(Segment(len(ids), end - start, range(start)))
        ids += row.ids[start:end]
        position += range(start, end)
    if tail := tail_length(len(ids), most):
        segments.append(Segment(len(ids), tail))
    ids, position = ids + tail * [0], position + list(range(tail))
    return {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([position]), "rows": segments,
            "source": torch.tensor(source), "target": torch.tensor(target)}


def forward_batches(policy: Policy, rows: list[Encoded], groups: list[int],
                    micro_batch_tokens: int) -> Iterator[tuple[list[int], dict]]:
    """Yield indices into rows and their batch, on the CPU, behind shared prompts where that saves.

    Else rows behind one another, or of like length and padded. groups: as in shared_packs. Every batch has input_ids,
    position_ids and target, and attention_mask or rows where needed; for `trained_states`."""
    attn, most, by_rows = policy.options.attn, micro_batch_tokens, takes_rows(policy.model)
    if attn == "eager":
        most = min(most, EAGER_TOKENS)
    # else flash_attention_2 takes no mask of ours
    may = (by_rows or attn != "flash_attention_2") and not rows_apart(policy.model)
    packs = shared_packs(rows, groups, most) if may else []
    if packs and share_saved(rows, packs) >= LEAST_SAVED:
        for pack in packs:
            yield pack, shared_batch([rows[i] for i in pack], most)
    else:
        yield from micro_batches(rows, packing=by_rows, micro_batch_tokens=micro_batch_tokens,
                                 pad_id=policy.tokenizer.pad_token_id)


def trained_states(hidden: torch.Tensor, batch: dict) -> torch.Tensor:
    """Pick the states [N, D] of batch["target"] out of hidden [B, T, D]."""
    hidden = hidden.flatten(0, 1)
    return hidden.index_select(0, batch["source"]) if "source" in batch else hidden
