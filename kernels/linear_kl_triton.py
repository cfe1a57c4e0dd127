"""Triton kernels of linear_kl over a tile of pairs of rows, and their launchers; torch_kl there does the same."""

from __future__ import annotations

from .common import Scaling, architecture, jit, kernel_factors, on_device, slack_and_lift, tl, triton
from .tile_triton import pull_config, row_config, touchable


@jit()
def tanh(x):
    """By its series below 0.2, which keeps the digits of a small x."""
    square = x * x
    series = x * (1.0 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    return tl.where(square < 0.04, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@jit()
def phi(x):
    """exp(-x) - 1 + x; by its series below 1/2."""
    series = x * x * (0.5 - x * (1 / 6 - x * (1 / 24 - x * (1 / 120 - x * (1 / 720 - x * (1 / 5040 - x / 40320))))))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(-x) - 1.0 + x)


@jit("sums_stride", "columns")
def kl_kernel(logits, bias, sums, row_stride, sums_stride, columns, whole, inner, outer, slack, lift,
              HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    """One program per pair of rows: a tile of raw logits (2 C, K) into the running numbers `sums` (9, C) fp32.

    Rows C and up hold the products of hidden - teacher_hidden, without the bias (K,). With KEEP the pair becomes e s
    and e x s / its unit. columns, whole, slack and lift as in tile_kernel; the numbers' order is in linear_kl.SUMS.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < columns
    place = logits + row * row_stride + lanes
    apart = place + tl.num_programs(0).to(tl.int64) * row_stride
    old_other = tl.load(sums + 4 * sums_stride + row)  # both shifts before a reduction: each warp has read them then,
    old = tl.load(sums + row)  # and one of them may write
    z = tl.load(place, mask=lanes < whole, other=0.0).to(tl.float32)
    x = tl.load(apart, mask=lanes < whole, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + lanes, mask=inside, other=0.0).to(tl.float32)
    z = tl.where(inside, z, 0.0) * inner
    x = tl.where(inside, x, 0.0) * inner
    slope = 1.0
    if HAS_CAP:
        other = tanh(z - x)
        z = tanh(z)
        x = tanh(x) * (1.0 - z * other) * outer
        slope = 1.0 - z * z
        z = z * outer
    u = z - x
    top = tl.max(tl.where(inside, u, -1e30), 0)
    new = tl.where(top > old_other + slack, top, old_other)
    e = tl.where(inside, tl.exp(u - new), 0.0)
    tl.store(sums + 4 * sums_stride + row, new)
    place_total = sums + 5 * sums_stride + row
    tl.store(place_total, tl.load(place_total) * tl.exp(old_other - new) + tl.sum(e, 0))

    top = tl.max(tl.where(inside, z, -1e30), 0)
    new = tl.where(top > old + slack, top + lift, old)
    e = tl.where(inside, tl.exp(z - new), 0.0)
    before = tl.load(sums + sums_stride + row) * tl.exp(old - new)
    total = before + tl.sum(e, 0)
    mean = tl.load(sums + 2 * sums_stride + row)
    x = x - mean
    step = tl.sum(e * x, 0) / total
    x = x - step
    bent = tl.load(sums + 3 * sums_stride + row) * tl.exp(old - new + step)
    bent += tl.where(before > 0.0, before * phi(-step), 0.0) + tl.sum(tl.where(inside, e * phi(x), 0.0), 0)
    tl.store(sums + row, new)
    tl.store(sums + sums_stride + row, total)
    tl.store(sums + 2 * sums_stride + row, mean + step)
    tl.store(sums + 3 * sums_stride + row, bent)
    if KEEP:
        e = e * slope
        x = tl.where(inside, e * x, 0.0)
        unit = tl.maximum(64.0 * tl.max(tl.abs(x), 0), 1e-30)
        tl.store(sums + 6 * sums_stride + row, tl.exp(old - new))
        tl.store(sums + 7 * sums_stride + row, -step)
        tl.store(sums + 8 * sums_stride + row, unit)
        tl.store(place, e.to(logits.dtype.element_ty), mask=lanes < whole)
        tl.store(apart, (x / unit).to(logits.dtype.element_ty), mask=lanes < whole)


@jit("sums_stride")
def kl_pull_kernel(pulled, part, sums, pulled_stride, part_stride, sums_stride, width, blocks, BLOCK: tl.constexpr):
    """One program per (pair of rows, block of D): pulled (2 C, D) fp32 moves to the new shift and mean, + part."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    apart = (tl.num_programs(0) // blocks).to(tl.int64)
    lane = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < width
    rescale = tl.load(sums + 6 * sums_stride + row)
    moved = tl.load(sums + 7 * sums_stride + row)
    unit = tl.load(sums + 8 * sums_stride + row)
    place, crossed = pulled + row * pulled_stride + lane, pulled + (row + apart) * pulled_stride + lane
    place_part = part + row * part_stride + lane
    old = tl.load(place, mask=inside, other=0.0)
    new = tl.load(place_part, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, old * rescale + new, mask=inside)
    new = tl.load(place_part + apart * part_stride, mask=inside, other=0.0).to(tl.float32) * unit
    tl.store(crossed, (tl.load(crossed, mask=inside, other=0.0) + moved * old) * rescale + new, mask=inside)


def triton_kl(logits, bias, sums, columns: int, scaling: Scaling, *, keep: bool) -> None:
    """kl_kernel on a tile of pairs (2 C, K) raw, bias (K,) or None, sums (9, C) fp32; columns: K of a whole tile."""
    assert logits.stride(1) == 1 and sums.stride(1) == 1 and (bias is None or bias.stride(0) == 1)
    inner, outer = kernel_factors(scaling)
    with on_device(logits):
        kl_kernel[(len(logits) // 2,)](
            logits, logits if bias is None else bias, sums, logits.stride(0), sums.stride(0), logits.shape[1],
            touchable(logits), inner, outer, *slack_and_lift(logits.dtype), HAS_BIAS=bias is not None,
            HAS_CAP=scaling.softcap > 0, KEEP=keep, **row_config(columns, architecture(logits.device)),
        )  # fmt: skip


def triton_kl_pull(pulled, part, sums) -> None:
    """kl_pull_kernel: pulled (2 C, D) fp32, part (2 C, D), sums (9, C) fp32."""
    assert pulled.stride(1) == part.stride(1) == sums.stride(1) == 1
    config = pull_config(pulled.shape[1])
    blocks = triton.cdiv(pulled.shape[1], config["BLOCK"])
    with on_device(pulled):
        kl_pull_kernel[(len(pulled) // 2 * blocks,)](
            pulled, part, sums, pulled.stride(0), part.stride(0), sums.stride(0), pulled.shape[1], blocks, **config
        )
