"""Counted work of our way and others' to a linear head's loss, and gradient in hidden, with a frozen weight.

N tokens, D hidden size, V vocabulary, C rows of a chunk, K columns of a tile of the vocabulary; hidden (N, D) and
weight (V, D) are 16-bit. Each method is a list of `Pass`es; a pass is bound by the slowest of arithmetic, memory and
L2, passes follow one another. That is a lower bound on time, not a forecast: no method reaches it, and all miss it
by the same things (clocks under load, pipeline bubbles), except where noted. Rules of the count:

- A matrix product takes the tile, and the cut of its inner dimension ("split-K"), that make it fastest. Its L2 traffic
  is m n k (1 / BLOCK_M + 1 / BLOCK_N) elements. Tiles run in waves of one per processor, so a last wave that is nearly
  empty is paid in full (`fill`). Sums of a cut inner dimension go through L2 in fp32.
- The weight comes from memory once per group of row tiles that march over it together; the other operand comes from
  memory again where the group's rows do not fit half of the L2.
- Reused buffers that fit RESIDENT of the L2 together are charged to the L2 alone, others to memory as well. Of a tile's
  buffers the logits have the first claim, then the product's 16-bit part, the fp32 sum, and the tile's slice of the
  weight, which the second product reads again.
- Exponentials inside a matrix-product kernel are not hidden behind its tensor cores (`epilogue` passes).
"""
from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np

from .cards import REGISTER_BYTES, Card, Head

ITEM = 2  # bytes of an operand
ITEMS = {"fp32": 4, "bf16": 2, "fp16": 2}
# Share of L2 that a reused buffer can count on while weights stream by: measured on an A100, 28 of 40 MB.
RESIDENT = 0.7
LAUNCH_SECONDS = 2e-6  # device side of one small kernel
TILES = ((256, 128), (128, 256), (192, 128), (128, 192), (128, 128), (256, 64), (64, 256), (128, 64), (64, 128),
         (64, 64))
FORWARD_TILES = ((64, 64), (128, 64), (128, 128), (128, 256), (256, 128))  # rows x vocabulary, small to large
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# fp32 flops per logit, an exponential counted as 16 (one per lane of 16 special-function units against 256
# flops per clock and multiprocessor): online statistics; gradient; each with a softcap's tanh.
STATS_FLOPS, GRADIENT_FLOPS, CAP_FLOPS = 28, 24, 24
KL_FLOPS, KL_CAP_FLOPS = 56, 48  # of kl_kernel, per logit of either: half of three exponentials and 64; of three tanh
# Small kernels of one chunk beside the caller's loss (gathers, exact target logits, the statistics from the running
# sums, the scaled sum) and of the dapo loss of one chunk, forward and backward; the tests count both with a profiler.
SWEEP_LAUNCHES, POLICY_LAUNCHES = 64, 39
# Bytes that those move per number of (C, D). Rows gathered 4, exact target logits 32 (two casts 12, a gather
# 4, product 12, sum 4), zeros of the running sum 4, that sum times a scale 8, plus the targets' rows 22
# (gather 4, cast 6, addition 12), cast 6, put in place 4.
END_BYTES = 80
OUTER_BYTES = 8  # of them that memory must move: x, the targets' rows twice, the gradient
# Held per number of (C, D) while exact target logits are made: two operands in both widths, their product, x.
END_HELD = 14
ADD_FLOPS = 2  # per number: scale, add
# Share of tiles that cut-cross-entropy's gradient filter keeps, as its own cost model assumes.
FILTER_KEPT = 0.2


class Pass(NamedTuple):
    """Work of one kernel, or of `launches` equal ones."""
    name: str
    flops: float
    tensor: bool  # on the tensor cores
    hbm: float  # bytes from and to memory
    l2: float  # bytes from and to L2
    launches: int = 1
    fill: float = 1.0  # share of the processors busy, for the arithmetic

    def seconds(self, card: Card) -> float:
        rate = card.tensor_flops if self.tensor else card.fp32_flops
        bound = max(self.flops / (rate * self.fill), self.hbm / card.bandwidth, self.l2 / card.l2_bandwidth)
        return bound + self.launches * LAUNCH_SECONDS

    def times(self, count: float) -> Pass:
        return self._replace(flops=self.flops * count, hbm=self.hbm * count, l2=self.l2 * count,
                             launches=round(self.launches * count))


class Method(NamedTuple):
    """Passes, and the most bytes held beyond hidden, weight and the gradient."""
    name: str
    passes: list[Pass]
    extra_bytes: float

    def seconds(self, card: Card) -> float:
        return sum(each.seconds(card) for each in self.passes)

    def tensor_flops(self) -> float:
        return sum(each.flops for each in self.passes if each.tensor)


def floor_seconds(card: Card, head: Head, tokens: int, gemms: int) -> float:
    """Compute the time of `gemms` products of N V D at the full tensor rate."""
    return gemms * 2 * tokens * head.v * head.d / card.tensor_flops


def resident(card: Card, size: float) -> bool:
    return size <= RESIDENT * card.l2_bytes


def held(card: Card, sizes: list[float]) -> list[bool]:
    """Tell which buffers stay in L2, the first having the first claim."""
    used, kept = 0.0, []
    for size in sizes:
        kept.append(resident(card, used + size))
        used += size * kept[-1]
    return kept


def product(card, name, m, n, k, *, cached: str = "", tiles=TILES, split_k=True) -> Pass:
    """Count A @ B with the fastest of tiles and splits, B being the weight.

    cached: which of "a", "b", "c" lie in L2 and cost no memory traffic. split_k: may cut k. Hopper's blocks come in
    clusters of two that share what they read of B.
    """
    rows, columns, split = grid(tiles, split_k)
    keep = (split == 1) | (k / split >= 1024)
    rows, columns, split = rows[keep], columns[keep], split[keep]
    down, across = np.ceil(m / rows), np.ceil(n / columns)
    slots = np.maximum(1, card.processors // split)  # tiles of one slice of k that run together
    waves = np.ceil(down * across * split / card.processors)
    fill = m * n * split / (waves * card.processors * rows * columns)
    hbm = np.full(rows.shape, np.inf)
    held = card.l2_bytes / 2 // (rows * k * ITEM)  # row tiles whose A stays in half of the L2
    for group in (np.sqrt(slots) // 1, slots, held):  # row tiles that march over B together
        group = np.clip(group, 1, down)
        fits = group * rows * k * ITEM <= RESIDENT * card.l2_bytes
        again = 0 if "a" in cached else np.where(fits, 1, np.ceil(across / np.maximum(1, slots // group)))
        again_b = 0 if "b" in cached else np.ceil(down / group)
        hbm = np.minimum(hbm, n * k * again_b + m * k * again)
    hbm += 0 if "c" in cached else m * n
    multicast = 2 if card.arch == "sm_90" else 1
    partial = np.where(split > 1, 8 * split * m * n, 0)
    l2 = (k * (n * np.maximum(1, down / multicast) + m * across) + m * n) * ITEM + partial
    flops = 2 * m * n * k
    time = np.maximum(flops / (card.tensor_flops * fill), hbm * ITEM / card.bandwidth)
    best = int(np.argmin(np.maximum(time, l2 / card.l2_bandwidth) + (split > 1) * LAUNCH_SECONDS))
    moved = float(hbm[best]) * ITEM, float(l2[best])
    return Pass(name, flops, True, *moved, 1 + int(split[best] > 1), float(fill[best]))


@functools.cache
def grid(tiles, split_k: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """List rows, columns and split of every candidate, as three equal columns."""
    cells = [(*tile, split) for split in (SPLITS if split_k else (1,)) for tile in tiles]
    return tuple(np.array(cells, dtype=np.float64).T)


def rowwise(name: str, logits: float, bytes_each: float, flops_each: float, cached: bool, fill=1.0, launches=1) -> Pass:
    """Count a pass over `logits` numbers that moves bytes_each of each."""
    moved = logits * bytes_each
    return Pass(name, logits * flops_each, False, 0.0 if cached else moved, moved, launches, fill)


def epilogue(logits: float, flops_each: float) -> Pass:
    return Pass("epilogue", logits * flops_each, False, 0.0, 0.0, 0)


def cap(head: Head) -> int:
    return CAP_FLOPS if head.softcap else 0


def eager(card: Card, head: Head, tokens: int, gradient: bool) -> Method:
    """Count transformers' ForCausalLMLoss.

    16-bit logits, cast to fp32, log_softmax (its kernel reads its input three times), nll_loss; backward: a zeroed
    (N, V), log_softmax's backward (two reads of the incoming gradient, one of the output, one write), the cast back.
    The 16-bit logits stay alive as the model's output.
    """
    logits = tokens * head.v
    capped = 12 if head.softcap else 0  # divide, tanh, multiply: 2 B in and 2 B out each
    passes = [product(card, "logits", tokens, head.v, head.d),
              rowwise("cast, softcap", logits, 6 + capped, cap(head), False),
              rowwise("log_softmax", logits, 16, STATS_FLOPS, False)]
    if gradient:
        passes += [rowwise("nll backward", logits, 4, 0, False),
                   rowwise("log_softmax backward", logits, 16, GRADIENT_FLOPS, False),
                   rowwise("cast back, softcap", logits, 6 + 1.5 * capped, 0, False),
                   product(card, "dX", tokens, head.d, head.v)]
    return Method("eager", passes, logits * (14 if gradient else 10))


def liger_rows(head: Head, tokens: int) -> int:
    """Compute Liger's chunk: logits of about the size of hidden.

    Source: liger-kernel 0.8.5, ops/fused_linear_cross_entropy.py.
    """
    most = math.ceil(tokens / math.ceil(head.v / head.d))
    return min(tokens, 1 << (most - 1).bit_length())


def liger(card: Card, head: Head, tokens: int, gradient: bool) -> Method:
    """Count Liger's chunks: a product, one kernel over the logits, a product.

    The kernel reads the logits twice and overwrites them. With weight.requires_grad False it computes no dW (0.8.5; a
    trainable head adds a third product).
    """
    rows = liger_rows(head, tokens)
    logits, count = rows * head.v, tokens / rows
    cached = resident(card, 2 * logits)
    fill = min(1.0, rows / card.processors)  # one block of 1024 threads a row
    flops = STATS_FLOPS + cap(head) + (GRADIENT_FLOPS + cap(head) if gradient else 0)
    passes = [product(card, "logits", rows, head.v, head.d, cached="c" * cached),
              rowwise("cross entropy", logits, 6 if gradient else 2, flops, cached, fill)]
    if gradient:
        passes.append(product(card, "dX", rows, head.d, head.v, cached="a" * cached))
    return Method("Liger", [each.times(count) for each in passes], 2 * logits)


def cut_cross_entropy(card: Card, head: Head, tokens: int, gradient: bool, kept: float = 1.0) -> Method:
    """Count cut-cross-entropy 25.1.1: three products.

    Forward tiles are 256 x 128; backward recomputes 128 x 128 tiles of logits and adds each tile's share of dX into
    memory under a lock, in 16 bit. kept: share of tiles that its filter (on by default: a tile is dropped where all of
    |softmax - onehot| are below eps/32, 2^-12 in bf16) lets through to the third product. A frozen head costs no dW.
    Not charged: waiting for the locks, the sort of the vocabulary.
    """
    logits = tokens * head.v
    passes = [product(card, "logits", tokens, head.v, head.d, cached="c", tiles=((256, 128),), split_k=False),
              epilogue(logits, STATS_FLOPS + cap(head))]
    if gradient:
        again = product(card, "logits again", tokens, head.v, head.d, cached="c", tiles=((128, 128),), split_k=False)
        # per tile the weight's rows once more, and a read and a write of its rows of dX
        moved = kept * 3 * 2 * logits * head.d / 128
        passes += [again, epilogue(logits, GRADIENT_FLOPS + cap(head)),
                   Pass("dX", kept * 2 * logits * head.d, True, 0.0, moved, 0, again.fill)]
    return Method("CCE" if kept == 1.0 else "CCE filtered", passes, tokens * 8)


def ends(card: Card, numbers: float, bytes_each: float, launches: int) -> Pass:
    """Count the small kernels around a chunk's passes."""
    moved = bytes_each * numbers
    memory = OUTER_BYTES * numbers if resident(card, END_HELD * numbers) else moved
    return Pass("ends and loss function", 0, False, memory, moved, launches)


def tile_passes(card: Card, head: Head, rows: int, columns: int, flops: float = 0) -> list[Pass]:
    """Count one tile of kernels.tiles.

    Logits (C, K), probabilities in their place, their product with the weight's rows, and its addition to a (C, D) fp32
    sum. flops: per logit, of another pass than tile_kernel's.
    """
    logits, numbers = rows * columns, rows * head.d
    tile, part, total, weight = held(card, [2 * logits, 2 * numbers, 4 * numbers, 2 * columns * head.d])
    added = (0 if part else 2) + (0 if total else 8)
    return [product(card, "logits", rows, columns, head.d, cached="c" * tile),
            rowwise("tile", logits, 4, flops or STATS_FLOPS + cap(head), tile),
            product(card, "pull", rows, head.d, columns, cached="a" * tile + "b" * weight + "c" * part),
            Pass("sum", ADD_FLOPS * numbers, False, added * numbers, 10 * numbers)]


def chunk_passes(card: Card, head: Head, rows: int, columns: int, loss_launches: int) -> list[Pass]:
    """Count one chunk of C rows of kernels.linear_token_loss, a frozen head."""
    columns = min(columns, head.v)
    passes = [each.times(head.v // columns) for each in tile_passes(card, head, rows, columns)]
    if head.v % columns:
        passes += tile_passes(card, head, rows, head.v % columns)
    return [*passes, ends(card, rows * head.d, END_BYTES, SWEEP_LAUNCHES + loss_launches)]


def equal_rows(tokens: int, rows: int) -> int:
    """Compute the rows of equal chunks, as kernels.common.equal_parts makes them."""
    return min(tokens, math.ceil(tokens / math.ceil(tokens / rows) / 16) * 16)


@functools.cache
def ours(card: Card, head: Head, tokens: int, rows: int, columns: int, loss_launches: int) -> Method:
    """Count loss and gradient in tiles of the vocabulary.

    The weight is read twice per C rows (once where its tile stays in L2), the loss function runs once per C rows.
    """
    rows = equal_rows(tokens, rows)
    passes = [each.times(tokens / rows) for each in chunk_passes(card, head, rows, columns, loss_launches)]
    return Method("ours", passes, 2 * rows * min(columns, head.v) + END_HELD * rows * head.d)


def divergence(card: Card, head: Head, tokens: int, rows: int, columns: int) -> Method:
    """Count kernels.linear_kl with its gradient, `rows` rows of a chunk being half as many pairs."""
    rows, flops = equal_rows(2 * tokens, rows), KL_FLOPS + (KL_CAP_FLOPS if head.softcap else 0)
    passes = [each.times(head.v / columns) for each in tile_passes(card, head, rows, columns, flops)]
    # rows, their difference and the pair; the scaled sum
    passes = [each.times(2 * tokens / rows) for each in (*passes, ends(card, rows * head.d, 24, 16))]
    return Method("KL", passes, 2 * rows * columns + END_HELD * rows * head.d)


def choose_tile(card: Card, dtype: str) -> tuple[int, int]:
    """Choose BLOCK_N and BLOCK_V of the forward kernel for bf16, fp16 or fp32.

    The smallest tile that reads operands from L2 at no more than 80% of its rate while the product runs at its peak
    (fp32: outside the tensor cores), else the largest that fits: accumulators within half the register file, two stages
    of 64 columns (fp32: 16) within a block's shared memory.
    """
    itemsize, depth = (4, 16) if dtype == "fp32" else (2, 64)
    peak = card.fp32_flops if dtype == "fp32" else card.tensor_flops
    fitting = [(rows, columns) for rows, columns in FORWARD_TILES if 4 * rows * columns <= REGISTER_BYTES / 2
               and 2 * (rows + columns) * depth * itemsize <= card.block_shared_bytes]
    for rows, columns in fitting:
        flops_per_byte = 2 * rows * columns / ((rows + columns) * itemsize)
        if flops_per_byte * 0.8 * card.l2_bandwidth >= peak:
            return rows, columns
    return fitting[-1]


def ours_forward(card: Card, head: Head, tokens: int, tile: tuple[int, int]) -> Method:
    """Count kernels.linear_logp: five numbers per row and part of the vocabulary."""
    splits = max(1, math.ceil(2 * card.processors / math.ceil(tokens / tile[0])))
    passes = [product(card, "logits", tokens, head.v, head.d, cached="c", tiles=(tile,), split_k=False),
              epilogue(tokens * head.v, STATS_FLOPS + cap(head)),
              Pass("merge", 0, False, 0, 40 * splits * tokens, 12)]
    return Method("ours", passes, 20 * splits * tokens)


def share_of_roofline(card: Card, shape: tuple[int, int, int], dtype: str, gradient: bool, seconds: float) -> float:
    """Divide the time that no exact method can beat by the time measured.

    shape: (N, D, V). The roof is one product of 2 N V D flops (two with the gradient) at the peak of dtype ("fp32"
    outside the tensor cores, "bf16", "fp16"), or weight and hidden read once and the gradient written once, whichever
    takes longer.
    """
    tokens, d, v = shape
    peak = card.fp32_flops if dtype == "fp32" else card.tensor_flops
    products = 2 if gradient else 1
    moved = ITEMS[dtype] * (v * d + products * tokens * d)
    return max(products * 2 * tokens * v * d / peak, moved / card.bandwidth) / seconds
