"""Triton kernels of `decode_attention` (the formulas are there) and their launcher.

A row's places are cut every SPLIT, and a part into tiles, each of which lies in one block of the pool. One program
reads one part p of one key head for all of its query heads and leaves the weighted mean of the values and the base-2
logarithm of the sum of the weights; a second kernel adds the parts up:

    l_p = log2 sum_{t in p} e^(s_rt),  o_p = 2^(-l_p) sum_{t in p} e^(s_rt) v_t
    o   = sum_p 2^(l_p - L) o_p,       L = log2 sum_p 2^(l_p)

A program whose part holds no place of its row returns at once, before it reads a key, and nothing reads what it would
have written. A single query row takes the same products as many, 15 of their 16 rows empty: sums by lanes, which need
none, compile to more instructions.
"""
from __future__ import annotations

import torch

from .common import INTERPRET, architecture, jit, on_device, tl, triton
from .linear_logp import keeps_registers

PAGE = 64  # places of a block of the pool: whole tiles, so that a tile is found by one number
SPLIT = 256  # places of a part: what it leaves, written and read once, is r / 128 of the 16-bit bytes that it reads
LOG2_E = 1.4426950408889634


@jit("query_stride", "table_stride", "heads", "group", "places", "window")
def attend_kernel(query, keys, values, length, table, means, lse, query_stride, table_stride, heads, group, places,
                  window, inner, outer, HAS_CAP: tl.constexpr, UPCAST: tl.constexpr, SPLIT: tl.constexpr,
                  PAGE: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_T: tl.constexpr,
                  BLOCK_D: tl.constexpr):
    """Attend with ROWS query rows of one key head to a part of its places -> means (n H, splits, r, Dh), lse.

    Programs: (row of the batch, key head and ROWS query rows; split), the first fastest: neighbours read the same keys,
    and what returns at once comes last. Scores are in units of ln 2: inner, or outer with a softcap, holds log2 e.
    """
    blocks, split = tl.cdiv(group, ROWS), tl.program_id(1)
    pair = tl.program_id(0) // blocks
    end = tl.minimum(tl.load(length + pair // heads).to(tl.int32), places)
    first = tl.maximum(split * SPLIT, end - window)
    last = tl.minimum(split * SPLIT + SPLIT, end)
    if first >= last:
        return
    lane = tl.arange(0, BLOCK_D)[None, :]
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    inside = (row < group)[:, None] & (lane < DIM)
    at = (pair // heads).to(tl.int64) * query_stride + pair % heads * group * DIM
    q = tl.load(query + at + row[:, None] * DIM + lane, mask=inside, other=0.0)
    table += (pair // heads).to(tl.int64) * table_stride
    top, total = tl.full([ROWS], -1e30, tl.float32), tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if UPCAST:  # the interpreter's bf16 product is wrong
        q = q.to(tl.float32)
    for begin in range(first // BLOCK_T * BLOCK_T, last, BLOCK_T):
        start = (tl.load(table + begin // PAGE) * heads + pair % heads) * PAGE * DIM
        place = begin + tl.arange(0, BLOCK_T)
        seen = (place >= first) & (place < last)
        here = seen[:, None] & (lane < DIM)
        inside_block = (begin % PAGE + tl.arange(0, BLOCK_T))[:, None] * DIM + lane
        k = tl.load(keys + start + inside_block, mask=here, other=0.0)
        v = tl.load(values + start + inside_block, mask=here, other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * inner
        if HAS_CAP:
            s = outer * (2.0 * tl.sigmoid(2.0 * s) - 1.0)
        s = tl.where(seen[None, :], s, -1e30)
        new = tl.maximum(top, tl.max(s, 1))
        p, rescale = tl.exp2(s - new[:, None]), tl.exp2(top - new)
        total = total * rescale + tl.sum(p, 1)
        sums = tl.dot(p.to(v.dtype), v, sums * rescale[:, None], input_precision="ieee")
        top = new
    to = (pair.to(tl.int64) * tl.num_programs(1) + split) * group + row
    tl.store(lse + to, top + tl.log2(total), mask=row < group)
    tl.store(means + to[:, None] * DIM + lane, sums / total[:, None], mask=inside)


@jit("heads", "group", "places", "window", "splits")
def merge_kernel(means, lse, length, result, heads, group, places, window, splits, SPLIT: tl.constexpr,
                 DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr):
    """Add up the parts of one query row, BLOCK_S at a time and in order -> result (n H, r, Dh); of none: zeros."""
    row = tl.program_id(0)
    pair = row // group
    end = tl.minimum(tl.load(length + pair // heads).to(tl.int32), places)
    first, last = tl.maximum(end - window, 0) // SPLIT, tl.cdiv(end, SPLIT)
    base = pair.to(tl.int64) * splits * group + row % group
    lane = tl.arange(0, BLOCK_D)[None, :]
    top, total = tl.full([BLOCK_S], -1e30, tl.float32), tl.zeros([BLOCK_S], tl.float32)
    sums = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for begin in range(first, last, BLOCK_S):
        split = begin + tl.arange(0, BLOCK_S)
        at = base + split * group
        log_weight = tl.load(lse + at, mask=split < last, other=-1e30)
        o = tl.load(means + at[:, None] * DIM + lane, mask=(split < last)[:, None] & (lane < DIM), other=0.0)
        new = tl.maximum(top, log_weight)
        weight, rescale = tl.exp2(log_weight - new), tl.exp2(top - new)
        total = total * rescale + weight
        sums = sums * rescale[:, None] + weight[:, None] * o
        top = new
    weight = tl.exp2(top - tl.max(top, 0))  # 0 of a lane that has seen no part
    total = tl.where(last > first, tl.sum(total * weight, 0), 1.0)
    mean = tl.sum(sums * weight[:, None], 0)[None, :] / total
    tl.store(result + row.to(tl.int64) * DIM + lane, mean.to(result.dtype.element_ty), mask=lane < DIM)


def attend_config(arch: str, dtype: torch.dtype, group: int, size: int) -> dict:
    """Tile of attend_kernel for r = group query rows of `size` numbers.

    Matrix units take 16 rows. Where Triton makes plain products (Turing, fp32 without xf32's units) each row costs
    arithmetic: no more of them than there are, 8 at a time. On AMD the next tile stays in memory while one is in use:
    it would wait in registers.
    """
    block, amd = max(16, triton.next_power_of_2(size)), arch.startswith("gfx")
    plain = not keeps_registers(arch) or dtype == torch.float32 and not arch.startswith("gfx9")
    most, numbers = (32, 4096) if plain or dtype == torch.float32 else \
        (32, 2048) if arch.startswith("gfx1") else (64, 8192)
    return {"ROWS": min(triton.next_power_of_2(group), 8) if plain else 16,
            "BLOCK_T": max(16, min(most, numbers // block)), "BLOCK_D": block,
            "num_warps": 8 if amd and plain else 4, "num_stages": 1 if amd else 2}


def merge_config(arch: str, size: int) -> dict:
    return {"BLOCK_S": 16, "BLOCK_D": max(16, triton.next_power_of_2(size)),
            "num_warps": 2 if arch.startswith("gfx9") else 4}


def takes(arch: str, dtype: torch.dtype, size: int, large: bool) -> bool:
    """Whether a tile of heads of `size` numbers stays in registers; large: the keys are a buffer of 2 GiB or more.

    Heads above 128 spill on RDNA in fp32, and from such a buffer; above 256 they do anywhere.
    """
    return size <= 128 or size <= 256 and not (arch.startswith("gfx1") and (large or dtype == torch.float32))


def decode_attention(query, keys, values, length, table, scale: float, window: int, softcap: float) -> torch.Tensor:
    """Two launches; the buffer between them is as long as the table, whatever length says."""
    (n, heads, group, size), page, arch = query.shape, keys.shape[2], architecture(query.device)
    if query.stride()[1:] != (group * size, size, 1):
        query = query.contiguous()
    assert keys.is_contiguous() and values.is_contiguous() and page % PAGE == 0 and table.stride(1) == 1
    places = table.shape[1] * page
    length, window, splits = length.contiguous(), window or places, triton.cdiv(places, SPLIT)
    means, lse = (torch.empty((n * heads, splits, group, last), dtype=torch.float32, device=query.device)
                 for last in (size, 1))
    result = torch.empty((n, heads, group, size), dtype=query.dtype, device=query.device)
    inner, outer = (scale / softcap, softcap * LOG2_E) if softcap else (scale * LOG2_E, 1.0)
    config = attend_config(arch, query.dtype, group, size)
    grid = n * heads * triton.cdiv(group, config["ROWS"]), splits
    with on_device(query):
        attend_kernel[grid](query, keys, values, length, table, means, lse, query.stride(0), table.stride(0), heads,
                            group, places, window, inner, outer, HAS_CAP=softcap > 0, UPCAST=INTERPRET,
                            SPLIT=SPLIT, PAGE=page, DIM=size, **config)
        merge_kernel[(n * heads * group,)](means, lse, length, result, heads, group, places, window, splits,
                                           SPLIT=SPLIT, DIM=size, **merge_config(arch, size))
    return result
