"""Choose the examples that a step trains on, and cut them into forward passes.

The order of the data is a function of (seed, step), so a resumed run needs no cursor but its step. Cutting a step
into micro-batches is a decision about memory alone: losses are divided by the trained tokens of the whole step."""
import itertools
from collections.abc import Iterator

import torch

from minimath.data.chat import IGNORE, Encoded


def step_indices(step: int, size: int, batch_size: int, seed: int) -> list[int]:
    """Return the batch_size indices of step 0, 1, ... into data of `size` rows."""
    return stream_indices(step * batch_size, batch_size, size, seed)


def stream_indices(start: int, count: int, size: int, seed: int) -> list[int]:
    """Return `count` places from `start` on, of one permutation of rows after another."""
    order: list[int] = []
    for epoch in range(start // size, (start + count - 1) // size + 1):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order += torch.randperm(size, generator=generator).tolist()
    return order[start % size:start % size + count]


def micro_batches(rows: list[Encoded], *, packing: bool, micro_batch_tokens: int,
                  pad_id: int) -> Iterator[tuple[list[int], dict]]:
    """Yield batches of at most micro_batch_tokens, on the CPU, each after its indices into rows.

    A longer row goes alone. packing: several rows behind one another in one sequence, without attention between them.
    Otherwise rows of like length are padded to the longest. The batch has input_ids (B, T), position_ids (B, T), target
    (B*T,) and, when padded, attention_mask (B, T), all int64, and rows: (start, length) of each among the B*T tokens.
    """
    lengths = [len(row.ids) for row in rows]
    for indices in (pack if packing else like_lengths)(lengths, micro_batch_tokens):
        chosen = [rows[i] for i in indices]
        yield indices, collate_packed(chosen, micro_batch_tokens) if packing else collate_padded(chosen, pad_id)


def like_lengths(lengths: list[int], budget: int) -> list[list[int]]:
    """Group indices by descending length; a group padded to its longest fits `budget`."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or lengths[groups[-1][0]] * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(index)
    return groups


def pack(lengths: list[int], budget: int) -> list[list[int]]:
    """Pack indices into bins of at most `budget` tokens by first fit, longest first.

    A length over the budget gets a bin of its own. Indices are ascending within a bin."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((b for b, left in enumerate(room) if left >= lengths[index]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(budget)
        bins[place].append(index)
        room[place] -= lengths[index]
    return list(map(sorted, bins))


def collate_packed(rows: list[Encoded], most: int = 0) -> dict:
    """Put all examples one after the other in one row, with position_ids from 0 for each.

    Without a mask and with use_cache=False, transformers (5.23) finds the borders by position_ids; with its default
    use_cache=True, or a mask of ones, examples silently attend to each other. A last example of zeros, of which nothing
    is trained, rounds the length up, to at most `most`."""
    tail = tail_length(sum(len(row.ids) for row in rows), most)
    rows = [*rows, Encoded([0] * tail, [False] * tail, False)] if tail else rows
    ends = itertools.accumulate(len(row.ids) for row in rows)
    return {"input_ids": torch.tensor([[i for row in rows for i in row.ids]]),
            "position_ids": torch.tensor([[p for row in rows for p in range(len(row.ids))]]),
            "target": torch.tensor([t for row in rows for t in row.targets()]),
            "rows": [(end - len(row.ids), len(row.ids)) for end, row in zip(ends, rows)]}


def tail_length(tokens: int, most: int) -> int:
    """Count the tokens that round a pass up, within `most`, to a multiple of 64, of 128 above 1,024, and so on.

    Every new size costs: oneDNN compiles and keeps its products, cuDNN plans its attention."""
    step = 64 << max(0, (tokens - 1).bit_length() - 10)
    return max(0, min(-(-tokens // step) * step, most) - tokens)


def collate_padded(rows: list[Encoded], pad_id: int) -> dict:
    """Pad examples at the right."""
    width = max(len(row.ids) for row in rows)
    gaps = [width - len(row.ids) for row in rows]
    return {"input_ids": torch.tensor([row.ids + [pad_id] * gap for row, gap in zip(rows, gaps)]),
            "attention_mask": torch.tensor([[1] * len(row.ids) + [0] * gap for row, gap in zip(rows, gaps)]),
            "position_ids": torch.arange(width).repeat(len(rows), 1),
            "target": torch.tensor([t for row, gap in zip(rows, gaps) for t in row.targets() + [IGNORE] * gap]),
            "rows": [(number * width, len(row.ids)) for number, row in enumerate(rows)]}


def forward_args(batch: dict) -> dict:
    """Return the arguments of model.hidden_states for a batch of micro_batches."""
    return {name: batch.get(name) for name in ("input_ids", "position_ids", "attention_mask", "rows")}
