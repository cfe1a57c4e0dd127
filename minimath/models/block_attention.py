"""Attention of rows behind one another on a card: torch's flash attention for rows of several lengths, and no mask.

The queries of a row are its own tokens; its keys are the tokens before it that it sees (a common prompt, the path to a
branch of a tree), then its own. Causal from the end of both, and within a window, is then what the row is to see. There
is no work between rows that do not see each other, and nothing depends on a shape: no kernel is compiled or planned for
a new one. Keys that several rows see are copied for each of them, and their gradients added up in fp32."""
import functools

import torch
from torch.autograd.function import once_differentiable
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from minimath.core.run_folder import say_once
from minimath.models.attention import Heads, Segment


def on_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy from the CPU; to a card without waiting for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def with_gaps(rows: list[Segment], tokens: int) -> list[Segment]:
    """Sort rows by their start, and make rows of the tokens in none."""
    every, at = [], 0
    for row in sorted((row for row in rows if row.length), key=lambda row: row.start):
        every += [Segment(at, row.start - at)] if row.start > at else []
        every.append(row)
        at = row.start + row.length
    return every + ([Segment(at, tokens - at)] if tokens > at else [])


class PackedRows:
    """The rows of a pass of N tokens as flash attention takes them, made of host numbers by one copy.

    from_q, from_k (rows + 1,): where the queries and the keys of each row begin; places (K,): the token that each key
    is of, None where the keys are the tokens themselves. All int32."""

    def __init__(self, rows: list[Segment], tokens: int, device: torch.device):
        rows = with_gaps(rows, tokens)
        queries = torch.tensor([0] + [row.length for row in rows])
        keys = queries + torch.tensor([0] + [len(row.before) for row in rows])
        self.max_q, self.max_k = int(queries.max()), int(keys.max())
        parts = [queries.cumsum(0), keys.cumsum(0)]
        if any(row.before for row in rows):
            parts += [torch.tensor(places, dtype=torch.long) for row in rows
                      for places in (row.before, range(row.start, row.start + row.length))]
        moved = on_device(torch.cat(parts).int(), device)
        self.from_q, self.from_k, places = moved.tensor_split((len(queries), 2 * len(queries)))
        self.places = places if len(parts) > 2 else None

    def operands(self, qkv: torch.Tensor, heads: Heads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give q (N, queries, Dh), k and v (K, keys, Dh) of qkv (N, width)."""
        q, k, v = heads.split(qkv)
        if self.places is not None:
            kv = qkv[:, heads.queries * heads.dim:].index_select(0, self.places)
            k, v = kv.unflatten(-1, (2, heads.keys, heads.dim)).unbind(1)
        return q.flatten(1, 2), k, v

    def window(self, window: int | None) -> tuple[int, int]:
        """Say how many keys to the left and right of its own a query sees; -1: all."""
        return (window - 1 if window and window < self.max_k else -1), 0


def flash(q, k, v, rows: PackedRows, scale: float, window: int | None) -> tuple[torch.Tensor, ...]:
    """Attend: (out as q, log of the sums (queries, N) fp32, two tensors of random numbers that none needs)."""
    left, right = rows.window(window)
    return torch.ops.aten._flash_attention_forward(
        q, k, v, rows.from_q, rows.from_k, rows.max_q, rows.max_k, 0.0, left < 0, False, scale=scale,
        window_size_left=left, window_size_right=right)[:4]


def flash_backward(grad, q, k, v, kept: tuple, rows: PackedRows, scale: float, window: int | None):
    """Compute the gradients of q, k and v; kept: what flash returned."""
    (out, sums, *random), (left, right) = kept, rows.window(window)
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, sums, rows.from_q, rows.from_k, rows.max_q, rows.max_k, 0.0, left < 0, *random,
        scale=scale, window_size_left=left, window_size_right=right)


class RowAttention(torch.autograd.Function):
    """qkv (N, width) -> (N, queries dim), as attention.SegmentAttention; keeps no copies of keys."""

    @staticmethod
    def forward(ctx, qkv, heads: Heads, rows: PackedRows, window: int | None):
        kept = flash(*rows.operands(qkv, heads), rows, heads.scale, window)
        ctx.save_for_backward(qkv, *kept)
        ctx.how = heads, rows, window
        return kept[0].flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (qkv, *kept), (heads, rows, window) = ctx.saved_tensors, ctx.how
        grads = flash_backward(grad.view_as(kept[0]), *rows.operands(qkv, heads), kept, rows, heads.scale, window)
        dq, *dkv = (each.flatten(1) for each in grads)
        if rows.places is not None:
            sums = torch.zeros(len(qkv), 2 * heads.keys * heads.dim, device=qkv.device)
            dkv = [sums.index_add_(0, rows.places, torch.cat(dkv, 1).float()).to(qkv.dtype)]
        return torch.cat([dq, *dkv], 1), None, None, None


@functools.cache
def takes_flash(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Tell whether torch's flash attention computes heads of `dim` on a card, with gradients.

    Not so: fp32, cards before sm_80, dim above 256. ROCm's, which may count causal from the start, is not asked."""
    if device.type != "cuda" or torch.version.hip or dim % 8:
        return False
    with torch.enable_grad():
        probe = torch.empty(1, 1, 8, dim, dtype=dtype, device=device, requires_grad=True)
        return can_use_flash_attention(SDPAParams(probe, probe, probe, None, 0.0, True, False))


def without_cudnn(device: torch.device) -> None:
    """Turn cuDNN's attention off in this process, on a card; say so once."""
    if device.type == "cuda" and not torch.version.hip and torch.backends.cuda.cudnn_sdp_enabled():
        torch.backends.cuda.enable_cudnn_sdp(False)
        say_once("attention by cuDNN is off: it plans anew for every shape, and ours change with every pass")
