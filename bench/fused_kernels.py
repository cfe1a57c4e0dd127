"""Kernels and launchers of the two fully fused forms of loss + gradient under a frozen head.

bench/fused_forms.py says what they are and what the compiler made of them. Evidence only: never run on
a GPU; fp32 under the interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=("rows",))
def recompute_kernel(
    hidden,
    weight,
    target,
    lse,
    coef,
    partial,
    rows,
    vocab,
    width,
    vocab_per_split,
    hidden_stride,
    weight_stride,
    scale,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per (BLOCK_N rows, part of the vocabulary), the only one to touch its rows of `partial`.

    hidden (N, D), weight (V, D), target (N,), lse and coef (N,) fp32 -> partial (splits, N, D) fp32, zero on
    entry. z = scale * hidden @ weight.T. EVEN_D: D is a multiple of BLOCK_D.
    """
    row_blocks = tl.cdiv(rows, BLOCK_N)
    row = (tl.program_id(0) % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(0) // row_blocks
    here = row < rows
    wanted = tl.load(target + row, mask=here, other=-1)
    shift = tl.load(lse + row, mask=here, other=0.0)
    a = tl.load(coef + row, mask=here, other=0.0) * scale
    lanes = tl.arange(0, BLOCK_D)
    # rows and columns past the end read the last one: no mask in the inner loops, a = 0 and g = 0 drop them
    hidden_rows = hidden + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * hidden_stride
    partial_rows = partial + (split.to(tl.int64) * rows + row)[:, None] * width
    first = split * vocab_per_split
    last = tl.minimum(first + vocab_per_split, vocab)
    for start in range(first, last, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        weight_rows = weight + tl.minimum(column, vocab - 1).to(tl.int64) * weight_stride
        z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for depth in range(0, width, BLOCK_D):
            k = depth + lanes
            if EVEN_D:
                x = tl.load(hidden_rows + k[None, :])
                w = tl.load(weight_rows[None, :] + k[:, None])
            else:
                x = tl.load(hidden_rows + k[None, :], mask=(k < width)[None, :], other=0.0)
                w = tl.load(weight_rows[None, :] + k[:, None], mask=(k < width)[:, None], other=0.0)
            z = tl.dot(x, w, z, input_precision=PRECISION)
        hit = tl.where(column[None, :] == wanted[:, None], 1.0, 0.0)
        g = tl.where((column < last)[None, :], hit - tl.exp(z * scale - shift[:, None]), 0.0) * a[:, None]
        g = g.to(weight.dtype.element_ty)
        for depth in range(0, width, BLOCK_D):
            k = depth + lanes
            if EVEN_D:
                w = tl.load(weight_rows[:, None] + k[None, :])
            else:
                w = tl.load(weight_rows[:, None] + k[None, :], mask=(k < width)[None, :], other=0.0)
            place = partial_rows + k[None, :]
            mask = here[:, None] & (k < width)[None, :]
            sums = tl.load(place, mask=mask, other=0.0)
            tl.store(place, sums + tl.dot(g, w, input_precision=PRECISION), mask=mask)
        tl.debug_barrier()  # another thread of the program may read these sums in the next round


@triton.jit(do_not_specialize=("rows",))
def online_kernel(
    hidden,
    weight,
    target,
    stats,
    expected,
    rows,
    vocab,
    vocab_per_split,
    hidden_stride,
    weight_stride,
    scale,
    WIDTH: tl.constexpr,
    HOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per (BLOCK_N rows, part of the vocabulary), with E (BLOCK_N, D) in registers.

    hidden (N, D), weight (V, D), target (N,) -> stats (splits, 3, N) fp32: maximum, sum, target logit, and
    expected (splits, N, D) fp32: sum_j exp(z_j - maximum) w_j. D = WIDTH is cut into parts of BLOCK_D. HOLD:
    a row block of hidden and a whole (BLOCK_V, D) tile of the weight stay on chip for both products; else
    hidden is read once a tile and the weight twice.
    """
    row_blocks = tl.cdiv(rows, BLOCK_N)
    row = (tl.program_id(0) % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(0) // row_blocks
    here = row < rows
    wanted = tl.load(target + row, mask=here, other=-1)
    lanes = tl.arange(0, BLOCK_D)
    hidden_rows = hidden + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * hidden_stride
    top = tl.full([BLOCK_N], -1e30, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    target_z = tl.zeros([BLOCK_N], tl.float32)
    PARTS: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    sums, held = (), ()
    for part in tl.static_range(PARTS):
        sums = sums + (tl.zeros([BLOCK_N, BLOCK_D], tl.float32),)
        if HOLD:
            held = held + (load_part(hidden_rows, part * BLOCK_D + lanes, WIDTH, BLOCK_D),)
    first = split * vocab_per_split
    last = tl.minimum(first + vocab_per_split, vocab)
    for start in range(first, last, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        weight_rows = weight + tl.minimum(column, vocab - 1).to(tl.int64)[:, None] * weight_stride
        z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        tiles = ()
        if HOLD:
            for part in tl.static_range(PARTS):
                tiles = tiles + (load_part(weight_rows, part * BLOCK_D + lanes, WIDTH, BLOCK_D),)
                z = tl.dot(held[part], tl.trans(tiles[part]), z, input_precision=PRECISION)
        else:
            for depth in range(0, WIDTH, BLOCK_D):
                x = load_part(hidden_rows, depth + lanes, WIDTH, BLOCK_D)
                w = load_part(weight_rows, depth + lanes, WIDTH, BLOCK_D)
                z = tl.dot(x, tl.trans(w), z, input_precision=PRECISION)
        z = z * scale
        target_z += tl.sum(tl.where(column[None, :] == wanted[:, None], z, 0.0), 1)
        z = tl.where((column < last)[None, :], z, -1e30)
        new = tl.maximum(top, tl.max(z, 1))
        rescale = tl.exp(top - new)
        e = tl.exp(z - new[:, None])
        total = total * rescale + tl.sum(e, 1)
        top = new
        e = e.to(weight.dtype.element_ty)
        grown = ()
        for part in tl.static_range(PARTS):
            w = tiles[part] if HOLD else load_part(weight_rows, part * BLOCK_D + lanes, WIDTH, BLOCK_D)
            grown = grown + (tl.dot(e, w, sums[part] * rescale[:, None], input_precision=PRECISION),)
        sums = grown
    place = stats + split * 3 * rows + row
    tl.store(place, top, mask=here)
    tl.store(place + rows, total, mask=here)
    tl.store(place + 2 * rows, target_z, mask=here)
    expected_rows = expected + (split.to(tl.int64) * rows + row)[:, None] * WIDTH
    for part in tl.static_range(PARTS):
        k = part * BLOCK_D + lanes
        tl.store(expected_rows + k[None, :], sums[part], mask=here[:, None] & (k < WIDTH)[None, :])


@triton.jit
def load_part(row_pointers, k, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns k (BLOCK_D,) of the rows at row_pointers (R, 1), 0 past WIDTH; no mask where none is needed."""
    if WIDTH % BLOCK_D == 0:
        return tl.load(row_pointers + k[None, :])
    return tl.load(row_pointers + k[None, :], mask=(k < WIDTH)[None, :], other=0.0)


def split_vocab(vocab: int, block: int, splits: int) -> tuple[int, int]:
    """(columns of each part, parts): whole blocks of `block`, none of the parts empty."""
    per_split = triton.cdiv(triton.cdiv(vocab, block), splits) * block
    return per_split, triton.cdiv(vocab, per_split)


def recompute_gradient(hidden, weight, target, lse, coef, *, scale=1.0, splits=1, config) -> torch.Tensor:
    """Gradient in hidden, (N, D) fp32, of sum(coef * logp) with coef held fixed.

    hidden (N, D) and weight (V, D) with contiguous rows, target (N,) int64, lse and coef (N,) fp32; `config`
    one of RECOMPUTE.
    """
    assert hidden.stride(1) == weight.stride(1) == 1 and target.is_contiguous()
    (rows, width), vocab = hidden.shape, weight.shape[0]
    per_split, splits = split_vocab(vocab, config["BLOCK_V"], splits)
    partial = torch.zeros((splits, rows, width), dtype=torch.float32, device=hidden.device)
    recompute_kernel[(triton.cdiv(rows, config["BLOCK_N"]) * splits,)](
        hidden,
        weight,
        target,
        lse.contiguous(),
        coef.contiguous(),
        partial,
        rows,
        vocab,
        width,
        per_split,
        hidden.stride(0),
        weight.stride(0),
        scale,
        EVEN_D=width % config["BLOCK_D"] == 0,
        PRECISION="ieee",
        **config,
    )
    return partial.sum(0)


def online_sweep(hidden, weight, target, *, scale=1.0, splits=1, config):
    """(lse (N,), target logit (N,), E_p[w] (N, D)), all fp32, in one sweep; arguments as recompute_gradient,
    `config` one of ONLINE."""
    assert hidden.stride(1) == weight.stride(1) == 1 and target.is_contiguous()
    (rows, width), vocab = hidden.shape, weight.shape[0]
    per_split, splits = split_vocab(vocab, config["BLOCK_V"], splits)
    stats = torch.empty((splits, 3, rows), dtype=torch.float32, device=hidden.device)
    expected = torch.empty((splits, rows, width), dtype=torch.float32, device=hidden.device)
    online_kernel[(triton.cdiv(rows, config["BLOCK_N"]) * splits,)](
        hidden,
        weight,
        target,
        stats,
        expected,
        rows,
        vocab,
        per_split,
        hidden.stride(0),
        weight.stride(0),
        scale,
        WIDTH=width,
        PRECISION="ieee",
        **config,
    )
    top, total, target_z = stats.unbind(1)  # each (splits, N)
    highest = top.amax(0)
    rescale = (top - highest).exp()
    mass = (total * rescale).sum(0)
    mean = (expected * rescale[:, :, None]).sum(0) / mass[:, None]
    return highest + mass.log(), target_z.sum(0), mean


def online_gradient(weight, target, coef, mean, *, scale=1.0) -> torch.Tensor:
    """Gradient in hidden, (N, D) fp32, of a loss with d loss / d logp = coef (N,); mean from online_sweep."""
    return (coef * scale)[:, None] * (weight.index_select(0, target).float() - mean)
