"""Triton kernels over one tile of logits (C rows, K columns of the vocabulary), and their launchers. `tiles` says what
they compute, `tile_torch` does the same on a CPU."""
from __future__ import annotations

from .common import PAD, architecture, jit, on_device, padded, tl, triton
from .head import Chunk, slack_and_lift


@jit("sums_stride", "first", "columns")
def tile_kernel(logits, target, raw_target, sums, factor, row_stride, sums_stride, first, columns, whole, inner, outer,
                slack, lift, HAS_CAP: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row: one tile of raw logits (C, K), read once, into the running sums; with KEEP the tile becomes
    exp(z - m) cap'(z), 0 at the target.

    sums (4, C) fp32: m, rest, weighted, plain; factor (C,) fp32 <- exp(old m - new m). m rises only where a logit is
    more than `slack` above it, then to that logit + `lift`. first: vocabulary index of column 0. whole: columns that
    may be touched, K or padded(K); those past K hold anything before and 0 after.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < columns
    hit = first + lanes == tl.load(target + row)
    place = logits + row * row_stride + lanes
    z = tl.load(place, mask=lanes < whole, other=0.0).to(tl.float32)
    z = tl.where(hit, tl.load(raw_target + row), tl.where(inside, z, 0.0)) * inner
    slope = 1.0
    if HAS_CAP:
        capped = 2.0 * tl.sigmoid(2.0 * z) - 1.0
        slope = 1.0 - capped * capped
        z = outer * capped
    counted = inside & (hit == 0)
    top = tl.max(tl.where(counted, z, -1e30), 0)
    old = tl.load(sums + row)
    new = tl.where(top > old + slack, top + lift, old)
    z_rest = tl.where(counted, z - new, 0.0)
    e = tl.where(counted, tl.exp(z_rest), 0.0)
    rescale = tl.exp(old - new)
    added = tl.sum(tl.where(e > 0.0, e * z_rest, 0.0), 0)  # a bias may mask columns by -inf
    rest = tl.load(sums + sums_stride + row)
    weighted = tl.load(sums + 2 * sums_stride + row)
    plain = tl.load(sums + 3 * sums_stride + row)
    tl.store(sums + row, new)
    tl.store(sums + sums_stride + row, rest * rescale + tl.sum(e, 0))
    tl.store(sums + 2 * sums_stride + row, (weighted + rest * (old - new)) * rescale + added)
    tl.store(sums + 3 * sums_stride + row, plain + tl.sum(tl.where(inside, z, 0.0), 0))
    tl.store(factor + row, rescale)
    if KEEP:
        tl.store(place, (e * slope).to(logits.dtype.element_ty), mask=lanes < whole)


@jit()
def pull_kernel(pulled, part, factor, pulled_stride, part_stride, width, blocks, BLOCK: tl.constexpr):
    """One program per (row, block of D): pulled (C, D) fp32 <- factor (C,) * pulled + part (C, D)."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    lane = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < width
    place = pulled + row * pulled_stride + lane
    new = tl.load(part + row * part_stride + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, tl.load(place, mask=inside, other=0.0) * tl.load(factor + row) + new, mask=inside)


@jit("numbers_stride", "first", "columns")
def gradient_kernel(logits, target, raw_target, numbers, coefs, row_stride, numbers_stride, first, columns, whole,
                    vocab, inner, outer, chain, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row: a tile of raw logits (C, K) becomes the gradient in the raw logits, in place.

    numbers (3, C) fp32: 1 - p_t, entropy, lse; coefs (4, C) fp32 in the order of TokenStats; first, columns and whole
    as in tile_kernel; chain = logit_scale / temperature.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < columns
    entropy = tl.load(numbers + numbers_stride + row)
    lse = tl.load(numbers + 2 * numbers_stride + row)
    a = tl.load(coefs + row) * chain
    b = tl.load(coefs + numbers_stride + row) * chain
    c = tl.load(coefs + 2 * numbers_stride + row) * chain
    d = tl.load(coefs + 3 * numbers_stride + row) * chain
    place = logits + row * row_stride + lanes
    z = tl.load(place, mask=lanes < whole, other=0.0).to(tl.float32)
    hit = first + lanes == tl.load(target + row)
    z = tl.where(hit, tl.load(raw_target + row), tl.where(inside, z, 0.0)) * inner
    slope = 1.0
    if HAS_CAP:
        capped = 2.0 * tl.sigmoid(2.0 * z) - 1.0
        slope = 1.0 - capped * capped
        z = outer * capped
    logp = z - lse
    p = tl.exp(logp)
    # 1 - p_t comes from outside: here it would lose its digits where p_t is nearly 1
    bent = b * tl.where(p > 0.0, entropy + logp, 0.0)
    grad = p * (c - d - bent) + d / vocab + a * tl.where(hit, tl.load(numbers + row), -p)
    grad = grad * slope
    grad = tl.where(inside, grad, 0.0)  # a matrix product may read past a row's end, times nothing
    tl.store(place, grad.to(logits.dtype.element_ty), mask=lanes < whole)


def row_config(columns: int, arch: str) -> dict:
    """Block and warps of the kernels that keep a row of a tile in registers.

    8 elements a thread: loads are 16 bytes wide, and the few arrays of that length fit the registers of every chip."""
    block = triton.next_power_of_2(columns)
    return {"BLOCK": block, "num_warps": max(1, block // (512 if arch.startswith("gfx9") else 256))}


def pull_config(width: int) -> dict:
    """Block and warps of pull_kernel: 8 elements a thread or more, also where a warp has 64."""
    block = min(1024, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": 2 if block == 1024 else 1}


def touchable(logits) -> int:
    """Columns of a tile (C, K) that the kernels may read and write: padded(K) where the stride leaves room."""
    columns, stride = logits.shape[1], logits.stride(0)
    return padded(columns) if stride % PAD == 0 and stride >= columns else columns


def tile(chunk: Chunk, logits, first: int, sums, factor, *, keep: bool, all_four: bool = True) -> None:
    """tile_kernel on a tile (C, K) raw; sums (4, C), factor (C,) fp32."""
    target, raw_target = chunk.target, chunk.raw_target
    assert logits.stride(1) == 1 and target.is_contiguous() and raw_target.is_contiguous() and sums.stride(1) == 1
    with on_device(logits):
        tile_kernel[(len(logits),)](
            logits, target, raw_target, sums, factor, logits.stride(0), sums.stride(0), first, logits.shape[1],
            touchable(logits), *chunk.scaling.factors, *slack_and_lift(logits.dtype),
            HAS_CAP=chunk.scaling.softcap > 0, KEEP=keep, **row_config(chunk.columns, architecture(logits.device)))


def launch_pull(kernel, rows: int, pulled, part, numbers, *strides: int) -> None:
    """Run pull_kernel, or one like it, for `rows` rows and all blocks of D; strides: of numbers."""
    assert pulled.stride(1) == part.stride(1) == numbers.stride(-1) == 1
    width, config = pulled.shape[1], pull_config(pulled.shape[1])
    blocks = triton.cdiv(width, config["BLOCK"])
    with on_device(pulled):
        kernel[(rows * blocks,)](pulled, part, numbers, pulled.stride(0), part.stride(0), *strides, width, blocks,
                                 **config)


def pull(pulled, logits, part, factor) -> None:
    """pulled (C, D) fp32 <- factor (C,) * pulled + logits (C, K) @ part (K, D), by pull_kernel."""
    launch_pull(pull_kernel, len(pulled), pulled, logits @ part, factor)


def gradient(chunk: Chunk, logits, first: int, numbers, coefs) -> None:
    """gradient_kernel in place on a tile (C, K) raw; numbers (3, C) and coefs (4, C) fp32."""
    target, raw_target, scaling = chunk.target, chunk.raw_target, chunk.scaling
    assert all(each.is_contiguous() for each in (target, raw_target, numbers, coefs)) and logits.stride(1) == 1
    with on_device(logits):
        gradient_kernel[(len(logits),)](
            logits, target, raw_target, numbers, coefs, logits.stride(0), numbers.stride(0), first, logits.shape[1],
            touchable(logits), chunk.weight.shape[0], *scaling.factors, scaling.chain, HAS_CAP=scaling.softcap > 0,
            **row_config(chunk.columns, architecture(logits.device)))
