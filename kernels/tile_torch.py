"""The elementwise passes over one tile of logits (C rows, K columns of the vocabulary) in torch: the path of the CPU
and of devices without Triton. `tiles` says what they compute."""

from __future__ import annotations

import math

import torch

from .common import BLOCK_BYTES, Chunk, Scaling, kernel_factors, scaled, slack_and_lift, wide

LOG_TINY = -80.0  # exp of it is nothing in fp32; keeps 0 * log 0 finite


def block_rows(columns: int, dtype: torch.dtype) -> int:
    """Rows of a tile whose wide copy fits BLOCK_BYTES."""
    return max(1, BLOCK_BYTES // (columns * wide(dtype).itemsize))


def torch_scratch(chunk: Chunk, count: int = 3) -> torch.Tensor:
    """(count, R, K), flat, for the elementwise passes in torch; the system gives memory only to what is written."""
    rows, columns = len(chunk.x), min(chunk.columns, chunk.weight.shape[0])
    shape = count, min(rows, block_rows(columns, chunk.x.dtype)) * columns
    return torch.empty(shape, dtype=wide(chunk.x.dtype), device=chunk.x.device)


def blocks_of(logits, scratch):
    """Yield (slice of rows, scratch (3 or so, R, K)) for blocks of rows of a tile (C, K) that stay in the cache."""
    columns = logits.shape[1]
    step = min(block_rows(columns, logits.dtype), scratch.shape[1] // columns)
    for start in range(0, len(logits), step):
        block = slice(start, min(start + step, len(logits)))
        count = block.stop - start
        yield block, scratch[:, : count * columns].view(-1, count, columns)


def hits_of(target, first: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns within the tile) of the targets that lie in it."""
    rows = ((target >= first) & (target < first + columns)).nonzero().squeeze(1)
    return rows, target.index_select(0, rows) - first


def torch_tile(chunk: Chunk, logits, first, sums, factor, scratch, scaling: Scaling, *, keep, all_four) -> None:
    """What tile_kernel does, in torch, block by block of rows in the cache; but the shift is looked for in the first
    tile only, and then where a sum shows that a logit has outgrown it. Without all_four, weighted and plain are left
    at 0, which saves two passes of five."""
    wide_raw, (slack, lift) = logits.dtype == wide(logits.dtype), slack_and_lift(logits.dtype)
    inner, outer = kernel_factors(scaling)
    rows, places = hits_of(chunk.target, first, logits.shape[1])
    for block, (z, e, slope) in blocks_of(logits, scratch):
        raw, (shift, rest, weighted, plain) = logits[block], sums[:, block]
        here = (rows >= block.start) & (rows < block.stop)
        hit = rows[here] - block.start, places[here]
        if scaling.softcap:
            z.copy_(raw).mul_(inner).tanh_()
            if keep:
                torch.mul(z, z, out=slope).neg_().add_(1.0)
            z.mul_(outer)
        elif inner != 1.0 or not wide_raw:
            z.copy_(raw).mul_(inner) if inner != 1.0 else z.copy_(raw)
        source = raw if wide_raw and inner == 1.0 and not scaling.softcap else z
        new = shift
        if first == 0 or slack == 0.0:
            top = source.amax(-1)
            new = torch.where(top > shift + slack, top + lift, shift)
        torch.sub(source, new[:, None], out=z)
        e = raw if wide_raw else e
        total = exp_without(hit, z, e)
        high = total > math.exp(16.0)
        if slack and high.any():
            rise = torch.where(high, z.amax(-1), 0.0)
            new = new + rise
            total = exp_without(hit, z.sub_(rise[:, None]), e)
        rescale = torch.exp(shift - new, out=factor[block])
        if all_four:
            z[hit] = scaled(chunk.raw_target[block][hit[0]], scaling) - new[hit[0]]
            plain.add_(z.sum(-1)).add_(new, alpha=logits.shape[1])
            weighted.add_(rest * (shift - new)).mul_(rescale).add_(z.mul_(e).sum(-1))
        rest.mul_(rescale).add_(total)
        shift.copy_(new)
        if keep and scaling.softcap:
            e.mul_(slope)
        if keep and not wide_raw:
            raw.copy_(e)


def exp_without(hit, z, e) -> torch.Tensor:
    """e <- exp(z), 0 at the places `hit` of the targets; returns its sum over each row."""
    torch.exp(z, out=e)
    e[hit] = 0.0
    return e.sum(-1)


def torch_gradient(chunk: Chunk, logits, first: int, numbers, coefs, scratch, scaling: Scaling) -> None:
    """What gradient_kernel does, in torch: logits (C, K) raw become their gradient; numbers (3, C), coefs (4, C)."""
    chain, (inner, outer) = scaling.logit_scale / scaling.temperature, kernel_factors(scaling)
    rows, places = hits_of(chunk.target, first, logits.shape[1])
    miss, entropy, lse = numbers
    a, b, c, d = (each * chain for each in coefs)
    for block, (logp, p, slope) in blocks_of(logits, scratch):
        here = (rows >= block.start) & (rows < block.stop)
        hit = rows[here] - block.start, places[here]
        logp.copy_(logits[block])
        logp[hit] = chunk.raw_target[block][hit[0]]
        logp.mul_(inner)
        if scaling.softcap:
            logp.tanh_()
            torch.mul(logp, logp, out=slope).neg_().add_(1.0)
            logp.mul_(outer)
        logp.sub_(lse[block, None])
        torch.exp(logp, out=p)
        logp.clamp_(min=LOG_TINY).mul_(-b[block, None]).add_((c - a - d - b * entropy)[block, None])
        logp[hit] += a[block][hit[0]]  # a (1 - p_t) is added whole: in parts it would lose its digits at p_t near 1
        p.mul_(logp).add_((d / chunk.weight.shape[0])[block, None])
        p[hit] += (a * miss)[block][hit[0]]
        logits[block].copy_(p.mul_(slope) if scaling.softcap else p)
