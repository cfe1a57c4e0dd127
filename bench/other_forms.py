"""Counted work, by the rules of bench/work.py, of the forms that the loss+gradient kernel does not have: the
one before it, the present one with products of our own, and the two without a workspace. Kept as the reason
why."""

from __future__ import annotations

import math

from .cards import REGISTER_BYTES, Card, Head
from .work import (
    END_HELD,
    GRADIENT_FLOPS,
    ITEM,
    STATS_FLOPS,
    Method,
    Pass,
    cap,
    ends,
    epilogue,
    equal_rows,
    ours,
    product,
    resident,
    rowwise,
)

ROW_WORKSPACE_CAP = 512 << 20
# As SWEEP_LAUNCHES and END_BYTES: rows gathered 4, exact target logits 32, gradient put in place 4.
ROW_LAUNCHES, ROW_END_BYTES = 18, 40


def row_workspace(
    card: Card, head: Head, tokens: int, rows: int, loss_launches: int, split_k: bool = True
) -> Method:
    """The design that was replaced: a workspace of whole rows (C, V), read by a pass for the statistics, then
    turned into the gradient by a pass that reads and writes it."""
    rows = equal_rows(tokens, rows)
    logits = rows * head.v
    cached = resident(card, 2 * logits)
    passes = [
        product(card, "logits", rows, head.v, head.d, c_cached=cached),
        rowwise("statistics", logits, 2, STATS_FLOPS + cap(head), cached),
        rowwise("gradient", logits, 4, GRADIENT_FLOPS + cap(head), cached),
        product(card, "dX", rows, head.d, head.v, a_cached=cached, split_k=split_k),
        ends(card, rows * head.d, ROW_END_BYTES, ROW_LAUNCHES + loss_launches),
    ]
    held = 2 * logits + END_HELD * rows * head.d
    return Method("rows workspace", [each.times(tokens / rows) for each in passes], held)


def rule_rows(processors: int, vocab: int, cap_bytes: int = ROW_WORKSPACE_CAP) -> int:
    """Rows of a chunk with which row_workspace is within 6% of its best on every card and head here: ten
    times the multiprocessors, rounded up to 256, within cap_bytes of 16-bit logits."""
    return min(math.ceil(10 * processors / 256) * 256, max(256, cap_bytes // (vocab * ITEM) // 256 * 256))


def inlined(card: Card, head: Head, tokens: int, rows: int, columns: int, loss_launches: int) -> Method:
    """Not built: ours with products of our own, whose epilogues do what the passes between them do. The first
    writes probabilities, its exponentials not hidden; the second adds to the fp32 sum itself (8 bytes a
    number, 2 of which it wrote before)."""
    method = ours(card, head, tokens, rows, columns, loss_launches)
    passes = [epilogue(tokens * head.v, STATS_FLOPS + cap(head))]
    for each in method.passes:
        if each.name == "sum":
            # of 10 bytes (2 for the part, 8 for the sum), those that went through memory
            memory = {10: 6, 8: 8, 2: 0, 0: 0}[round(10 * each.hbm / each.l2)] / 10 * each.l2
            each = each._replace(hbm=memory, l2=each.l2 * 0.6, launches=0)
        if each.name != "tile":
            passes.append(each)
    return Method("inlined", passes, method.extra_bytes)


def fused_rows(head: Head) -> int:
    """Rows whose (rows, D) fp32 accumulator of dX fits three quarters of a register file, in steps of the 16
    rows of one tensor-core instruction; 0 where not even 16 fit."""
    return int(0.75 * REGISTER_BYTES / (4 * head.d)) // 16 * 16


def fused(card: Card, head: Head, tokens: int, *, online: bool) -> Method | None:
    """Not used: no workspace; each block owns some rows and sweeps a part of the vocabulary, dX in
    registers. None where the accumulator does not fit.

    online: dX = E_p[w] rescaled as the running maximum grows, as flash attention does with K = V = weight:
    two products; losses of logp and lse only (entropy needs a second accumulator). Else a sweep for lse
    first, then logits again: three products, any loss. Every block reads its part of the weight through L2,
    twice where a tile of 16 vocabulary rows, double-buffered, does not fit shared memory. Parts are added up
    in a fixed order.
    """
    if not fused_rows(head):
        return None
    logits, weight = tokens * head.v, 2 * head.v * head.d
    reads = (1 if 2 * 16 * head.d * 2 <= card.block_shared_bytes else 2) / (2 if card.arch == "sm_90" else 1)
    sweeps = []
    for rows in range(16, fused_rows(head) + 1, 16):
        blocks = math.ceil(tokens / rows)
        for splits in range(1, 9):
            waves = math.ceil(blocks * splits / card.processors)
            fill = tokens / rows * splits / (waves * card.processors)
            partial = 8 * splits * tokens * head.d if splits > 1 else 0
            moved = blocks * weight * reads + partial
            launches = 1 + (splits > 1)
            sweeps.append(
                Pass("logits and dX", 4 * logits * head.d, True, weight * waves, moved, launches, fill)
            )
    passes = [min(sweeps, key=lambda each: each.seconds(card)), epilogue(logits, STATS_FLOPS + cap(head))]
    if not online:
        first = product(
            card, "lse", tokens, head.v, head.d, c_cached=True, tiles=((128, 128),), split_k=False
        )
        passes += [first, epilogue(logits, GRADIENT_FLOPS + cap(head))]
    return Method("fused online" if online else "fused recompute", passes, 4 * tokens * head.d)
