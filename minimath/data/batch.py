"""Which examples a step trains on, and how they are cut into forward passes.

The order of the data is a function of (seed, step), so a resumed run needs no cursor but its step. Cutting a step
into micro-batches is a decision about memory alone: losses are divided by the trained tokens of the whole step.
"""
from collections.abc import Iterator

import torch

from minimath.data.chat import IGNORE, Encoded, collate_packed, collate_padded, pack


def step_indices(step: int, size: int, batch_size: int, seed: int) -> list[int]:
    """Indices (batch_size,) of step 0, 1, ... in an endless stream of permutations of range(size), one per epoch.

    No index appears twice before all have appeared once; a batch may reach into the next epoch.
    """
    return stream_indices(step * batch_size, batch_size, size, seed)


def stream_indices(start: int, count: int, size: int, seed: int) -> list[int]:
    """Places start .. start + count - 1 of the stream that step_indices cuts into batches."""
    order, epoch = [], start // size
    while len(order) < start % size + count:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order += torch.randperm(size, generator=generator).tolist()
        epoch += 1
    return order[start % size:start % size + count]


def micro_batches(rows: list[Encoded], *, packing: bool, micro_batch_tokens: int, pad_id: int,
                  device) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Yield (indices into rows, batch) with at most micro_batch_tokens tokens each (a longer row goes alone).

    packing: several rows behind one another in one sequence, without attention between them. Otherwise rows of like
    length are padded to the longest. The batch has input_ids (B, T), position_ids (B, T), target (B*T,) and, when
    padded, attention_mask (B, T).
    """
    lengths = [len(row.ids) for row in rows]
    for indices in (pack(lengths, micro_batch_tokens) if packing else like_lengths(lengths, micro_batch_tokens)):
        chosen = [rows[i] for i in indices]
        batch = collate_packed(chosen) if packing else collate_padded(chosen, pad_id)
        yield indices, {name: tensor.to(device) for name, tensor in batch.items()}


def like_lengths(lengths: list[int], budget: int) -> list[list[int]]:
    """Groups of indices by descending length, each padded to its longest within `budget` tokens; deterministic."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def forward_args(batch: dict[str, torch.Tensor]) -> dict:
    """The arguments of model.hidden_states for a batch of micro_batches."""
    return {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"],
            "attention_mask": batch.get("attention_mask")}


def at_targets(values: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """Lay per-token values of the trained tokens out over the rows of the kernel.

    values: one (n_i,) tensor per example, in the order of the batch; target (N,) with IGNORE at untrained rows;
    sum of n_i = number of trained rows. Returns (N,) fp32, 0 at untrained rows.
    """
    out = torch.zeros(target.shape, dtype=torch.float32, device=target.device)
    if values:
        out[target != IGNORE] = torch.cat(values).to(out)
    return out
