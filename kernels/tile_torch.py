"""The passes over one tile of logits (C rows, K columns of the vocabulary) in torch: the path of the CPU and of devices
without Triton. `tiles` says what they compute."""
import math

import torch

from .common import BLOCK_BYTES, wide
from .head import Chunk, slack_and_lift

LOG_TINY = -80.0  # exp of it is nothing in fp32; keeps 0 * log 0 finite
MASKED = -1000.0  # a shift below it is of columns that a bias masks: less it, the others would lose their digits


def new_scratch(like: torch.Tensor, rows: int, columns: int, count: int) -> torch.Tensor:
    """(count, R * K) for blocks of R of the rows of a tile that stay in the cache."""
    dtype = wide(like.dtype)
    rows = min(rows, max(1, BLOCK_BYTES // (columns * dtype.itemsize)))
    return torch.empty((count, rows * columns), dtype=dtype, device=like.device)


def blocks_of(logits, scratch):
    """Yield (slice of rows, scratch (count, R, K)) for blocks of rows of a tile (C, K)."""
    columns = logits.shape[1]
    step = scratch.shape[1] // columns
    for start in range(0, len(logits), step):
        block = slice(start, min(start + step, len(logits)))
        count = block.stop - start
        yield block, scratch[:, : count * columns].view(-1, count, columns)


def hits_of(target, first: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns within the tile) of the targets that lie in it."""
    rows = ((target >= first) & (target < first + columns)).nonzero().squeeze(1)
    return rows, target.index_select(0, rows) - first


def tile(chunk: Chunk, logits, first: int, sums, factor, *, keep: bool, all_four: bool) -> None:
    """Do what tile_kernel does, but look for the shift in the first tile that is not masked only.

    And then where a sum shows that a logit has outgrown it. Without all_four, weighted and plain are left at 0, which
    saves two passes of five."""
    scaling = chunk.scaling
    wide_raw, (slack, lift), (inner, outer) = logits.dtype == sums.dtype, slack_and_lift(logits.dtype), scaling.factors
    for block, (z, e, slope) in blocks_of(logits, chunk.scratch):
        raw, (shift, rest, weighted, plain) = logits[block], sums[:, block]
        hit = hits_of(chunk.target[block], first, logits.shape[1])
        source = raw if wide_raw and inner == 1.0 and not scaling.softcap else z.copy_(raw)
        if inner != 1.0:
            z.mul_(inner)
        if scaling.softcap:
            z.tanh_()
            if keep:
                torch.mul(z, z, out=slope).neg_().add_(1.0)
            z.mul_(outer)
        new = shift
        if first == 0 or slack == 0.0 or (shift < MASKED).any():
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
            z[hit] = scaling.of(chunk.raw_target[block][hit[0]]) - new[hit[0]]
            plain.add_(z.sum(-1)).add_(new, alpha=logits.shape[1])
            added = z.mul_(e).sum(-1)
            if added.isnan().any():  # 0 times -inf, where a bias masks; any other NaN is in total, too
                added = z.nan_to_num_(0.0).sum(-1)
            weighted.add_(rest * (shift - new)).mul_(rescale).add_(added)
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


def pull(pulled, logits, part, factor) -> None:
    """pulled (C, D) <- factor (C,) * pulled + logits (C, K) @ part (K, D)."""
    if (factor != 1.0).any():
        pulled.mul_(factor[:, None])
    if logits.dtype == pulled.dtype:
        torch.addmm(pulled, logits, part, out=pulled)
    else:
        pulled.add_(logits @ part)


def gradient(chunk: Chunk, logits, first: int, numbers, coefs) -> None:
    """Do what gradient_kernel does: logits (C, K) raw become their gradient; numbers (3, C), coefs (4, C)."""
    inner, outer = chunk.scaling.factors
    miss, entropy, lse = numbers
    a, b, c, d = coefs * chunk.scaling.chain
    for block, (logp, p, slope) in blocks_of(logits, chunk.scratch):
        hit = hits_of(chunk.target[block], first, logits.shape[1])
        logp.copy_(logits[block])
        logp[hit] = chunk.raw_target[block][hit[0]]
        logp.mul_(inner)
        if chunk.scaling.softcap:
            logp.tanh_()
            torch.mul(logp, logp, out=slope).neg_().add_(1.0)
            logp.mul_(outer)
        logp.sub_(lse[block, None])
        torch.exp(logp, out=p)
        logp.clamp_(min=LOG_TINY).mul_(-b[block, None]).add_((c - a - d - b * entropy)[block, None])
        logp[hit] += a[block][hit[0]]  # a (1 - p_t) is added whole: in parts it would lose its digits at p_t near 1
        p.mul_(logp).add_((d / chunk.weight.shape[0])[block, None])
        p[hit] += (a * miss)[block][hit[0]]
        logits[block].copy_(p.mul_(slope) if chunk.scaling.softcap else p)
