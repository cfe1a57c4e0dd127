"""One walk over the logits of C rows, K columns at a time, for both operations.

`forward_tiles` keeps running sums relative to a shift m of each row, raised as larger logits appear:
    rest = sum_{j != t} exp(z_j - m),  weighted = sum_{j != t} exp(z_j - m) (z_j - m),  plain = sum_j z_j
and, if asked for, the vector sum that a loss of the log-prob needs, whatever that loss is:
    pulled = sum_{j != t} exp(z_j - m) cap'(z_j) w_j    (C, D)
With the four coefficients (a, b, c, d) of a row known afterwards, and b = 0, the gradient in hidden is
    chain * (a s_t w_t + (c - a - d) E_p[s w] + d mean_j w_j),   s = cap'(z), chain = logit_scale / temperature
with E_p[s w] = (pulled + exp(z_t - m) s_t w_t) / total: no tile is made twice, both products use the same rows of the
weight while a large cache still has them, and the loss sees its C numbers all at once. It is attention with one head of
size D whose keys and values are both the weight (Milakov and Gimelshein, arXiv 1805.02867, for the running sums). The
target is left out of the sums: 1 - p_t = rest / total keeps its relative accuracy where p_t is nearly 1.

`gradient_tiles` makes the logits again, for what that does not cover: the entropy, a trainable head, backward of
linear_logp.
"""
from typing import NamedTuple

import torch

from .common import runs_triton, tile_shape, wide
from .head import Chunk, Gradients, Scaling, TokenStats, raw_target_logit, row_spans
from .tile_torch import gradient as torch_gradient
from .tile_torch import new_scratch
from .tile_torch import pull as torch_pull
from .tile_torch import tile as torch_tile
from .tile_triton import gradient as triton_gradient
from .tile_triton import pull as triton_pull
from .tile_triton import tile as triton_tile

LOWEST = -1e30  # shift of a row before its first tile: finite, so that 0 * (LOWEST - m) is 0


class RowEnd(NamedTuple):
    """What is left of the running sums after the last tile, relative to max(m, z_t); each (C,)."""
    total: torch.Tensor  # sum_j exp(z_j - max)
    target_exp: torch.Tensor  # exp(z_t - max)
    rest: torch.Tensor  # total - target_exp, summed without the target
    lift: torch.Tensor  # exp(m - max): puts `pulled` on the same scale


def room(hidden, weight, rows: int, workspace_bytes: int | None, *, logits: int = 1, scratch: int = 3):
    """(rows of each chunk, (workspace, columns, scratch) of a Chunk) for so many `logits` a row and column."""
    itemsize, kind = logits * hidden.element_size(), hidden.device.type
    sizes, columns = tile_shape(rows, len(weight), itemsize, workspace_bytes, kind)
    most = max(sizes, default=0)
    workspace = torch.empty(logits * most * columns, dtype=hidden.dtype, device=hidden.device)
    blocks = None if runs_triton(hidden) else new_scratch(hidden, most, min(columns, len(weight)), scratch)
    return sizes, (workspace, columns, blocks)


def chunks(hidden, weight, bias, target, rows, scaling: Scaling, workspace_bytes: int | None):
    """Yield (rows of the chunk (C,) int64, Chunk) for the given rows of hidden (N, D) and target (N,)."""
    sizes, place = room(hidden, weight, len(rows), workspace_bytes)
    for index in rows.split(sizes):
        x, wanted = hidden.index_select(0, index), target.index_select(0, index)
        yield index, Chunk(x, weight, bias, wanted, raw_target_logit(x, weight, bias, wanted), scaling, *place)


def tiles(chunk: Chunk):
    """Yield (first, weight[first : first + K] (K, D), logits (C, K) raw) for each tile of the vocabulary."""
    rows, vocab = len(chunk.x), len(chunk.weight)
    for first in range(0, vocab, chunk.columns):
        columns = min(chunk.columns, vocab - first)
        stride = chunk.columns if runs_triton(chunk.x) else columns  # see PAD
        logits = chunk.workspace[: rows * stride].view(rows, stride)[:, :columns]
        part = chunk.weight[first:first + columns]
        if chunk.bias is None:
            torch.mm(chunk.x, part.t(), out=logits)
        else:
            torch.addmm(chunk.bias[first:first + columns], chunk.x, part.t(), out=logits)
        yield first, part, logits


def finish(chunk: Chunk, sums, *, all_four: bool) -> tuple[TokenStats, RowEnd]:
    """The statistics of each row from its running sums (4, C)."""
    shift, rest, weighted, plain = sums
    target_z = chunk.scaling.of(chunk.raw_target)
    top = torch.maximum(shift, target_z)
    gap = shift - top
    lift = gap.exp()
    weighted, rest = (weighted + rest * gap) * lift, rest * lift
    offset = target_z - top
    target_exp = offset.exp()
    total = rest + target_exp
    log_total = total.log()
    # where the target is most of the mass, 1 - p_t keeps its digits in the log-prob too
    logp = torch.where(rest < target_exp, -torch.log1p(rest / target_exp), offset - log_total)
    entropy, mean_logp = torch.zeros_like(rest), torch.zeros_like(rest)
    if all_four:
        entropy = log_total - (weighted + target_exp * offset) / total
        mean_logp = plain / len(chunk.weight) - (top + log_total)
    return TokenStats(logp, entropy, top + log_total, mean_logp), RowEnd(total, target_exp, rest, lift)


def forward_tiles(chunk: Chunk, *, pull: bool, all_four: bool = True):
    """(TokenStats, RowEnd, pulled (C, D) or None without `pull`) of a chunk.

    Without all_four, entropy and mean_logp may come back as 0."""
    x, dtype, on_triton = chunk.x, wide(chunk.x.dtype), runs_triton(chunk.x)
    tile, pull_tile = (triton_tile, triton_pull) if on_triton else (torch_tile, torch_pull)
    sums = torch.zeros((4, len(x)), dtype=dtype, device=x.device)
    sums[0] = LOWEST
    factor = torch.ones(len(x), dtype=dtype, device=x.device)
    pulled = torch.zeros_like(x, dtype=dtype) if pull else None
    for first, part, logits in tiles(chunk):
        tile(chunk, logits, first, sums, factor, keep=pull, all_four=all_four)
        if pull:
            pull_tile(pulled, logits, part, factor)
    return *finish(chunk, sums, all_four=all_four or on_triton), pulled


def pulled_gradient(chunk: Chunk, pulled, end: RowEnd, coefs: TokenStats) -> torch.Tensor:
    """Gradient in x (C, D), wide, from what forward_tiles returned; overwrites `pulled`.

    Not of the entropy, nor of mean_logp under a softcap."""
    zero = torch.zeros_like(end.total)
    a, _, c, d = (zero if each is None else each * chunk.scaling.chain for each in coefs)
    at_target = (a * end.rest + (c - d) * end.target_exp) / end.total
    if chunk.scaling.softcap:
        capped = torch.tanh(chunk.raw_target * chunk.scaling.factors[0])
        at_target = at_target * (1.0 - capped * capped)
    grad = pulled.mul_(((c - a - d) * end.lift / end.total)[:, None])
    for span in row_spans(*grad.shape):
        picked = chunk.weight.index_select(0, chunk.target[span]).to(grad.dtype)
        grad[span].addcmul_(picked, at_target[span, None])
    if coefs.mean_logp is not None:
        grad.addcmul_(chunk.weight.sum(0, dtype=grad.dtype)[None, :], (d / len(chunk.weight))[:, None])
    return grad


def gradient_tiles(chunk: Chunk, rows, stats: TokenStats, coefs: TokenStats, grads: Gradients) -> None:
    """Add a chunk's share to the gradient buffers, making its logits again.

    rows (C,) int64: their places in grads.hidden; stats, coefs (C,) each."""
    x, gradient_tile = chunk.x, triton_gradient if runs_triton(chunk.x) else torch_gradient
    coefs = torch.stack([torch.zeros_like(stats.logp) if each is None else each for each in coefs])
    unit = None
    if x.dtype == torch.float16:  # in range by a power of two near the largest coefficient, which changes no digit
        largest = coefs.abs().max()
        unit = torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest))), torch.ones_like(largest))
        coefs = coefs / unit
    numbers = torch.stack((-torch.expm1(stats.logp), stats.entropy, stats.lse))
    total = None if grads.hidden is None else torch.zeros_like(x, dtype=wide(x.dtype))
    for first, part, logits in tiles(chunk):
        gradient_tile(chunk, logits, first, numbers, coefs)
        span = slice(first, first + len(part))
        if total is not None:
            total.add_(logits @ part)
        if grads.weight is not None:
            update = (logits.t() @ x).to(grads.weight.dtype)  # (K, D)
            grads.weight[span].add_(update if unit is None else update.mul_(unit))
        if grads.bias is not None:
            update = logits.sum(0, dtype=grads.bias.dtype)
            grads.bias[span].add_(update if unit is None else update * unit)
    if total is not None:
        grads.hidden.index_copy_(0, rows, (total if unit is None else total * unit).to(grads.hidden.dtype))
