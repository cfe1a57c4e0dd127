"""A linear head and the softmax over its logits: arguments, scaling, statistics, gradients.

With s = hidden @ weight.T + bias (the raw logits), the distribution of a row is softmax(z) with
z = cap(logit_scale * s) / temperature, cap(u) = softcap * tanh(u / softcap), or u where softcap is 0.

The four statistics of a row and their gradients in z, with p = softmax(z) and t the target:
    logp      = z_t - lse               1[j = t] - p_j
    entropy   = lse - sum_j p_j z_j     -p_j (log p_j + entropy)
    lse       = log sum_j exp z_j       p_j
    mean_logp = mean_j z_j - lse        1/V - p_j
so any loss of them is known to the kernels by four numbers a row, its derivatives in the four ("coefs").
"""
from typing import NamedTuple

import torch

from .common import wide

GATHER_BYTES = 4 << 20  # of the rows of the weight that are picked for the targets at a time


class TokenStats(NamedTuple):
    """Per-token numbers of softmax(logits), each (C,) fp32 (fp64 for fp64 input).

    Or the derivatives of a loss in them, None where it does not use one."""
    logp: torch.Tensor  # log-probability of the target
    entropy: torch.Tensor  # in nats
    lse: torch.Tensor  # log-sum-exp of the logits (z-loss is its square)
    mean_logp: torch.Tensor  # mean over the vocabulary of the log-softmax (label smoothing)


class Scaling(NamedTuple):
    """How raw logits become logits: z = cap(logit_scale * s) / temperature."""
    temperature: float = 1.0
    softcap: float = 0.0
    logit_scale: float = 1.0

    @property
    def chain(self) -> float:
        """dz / ds where nothing is capped."""
        return self.logit_scale / self.temperature

    @property
    def factors(self) -> tuple[float, float]:
        """(inner, outer) such that z = outer * tanh(inner * s) with a softcap, and z = inner * s without."""
        return (self.logit_scale / self.softcap, self.softcap / self.temperature) if self.softcap else (self.chain, 1.0)

    def of(self, raw: torch.Tensor) -> torch.Tensor:
        """z of raw logits s, elementwise; new tensor unless nothing is to do."""
        inner, outer = self.factors
        if self.softcap:
            return (raw * inner).tanh_().mul_(outer)
        return raw if inner == 1.0 else raw * inner


class Chunk(NamedTuple):
    """The rows of one walk over the vocabulary, and where it works."""
    x: torch.Tensor  # (C, D)
    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None  # (V,)
    target: torch.Tensor | None  # (C,) int64, where the sums are about one
    raw_target: torch.Tensor | None  # (C,) raw logit of the target, in the wide dtype
    scaling: Scaling
    workspace: torch.Tensor  # (at least C * columns,) of x's dtype, overwritten
    columns: int  # K of every tile but the last
    scratch: torch.Tensor | None = None  # of tile_torch


class Gradients(NamedTuple):
    """Buffers that the sweep fills; None where no gradient is asked for."""
    hidden: torch.Tensor | None  # (N, D), fp32 for fp16 operands: a loss scaler multiplies only later
    weight: torch.Tensor | None  # (V, D), fp32 sums over chunks
    bias: torch.Tensor | None  # (V,)

    @staticmethod
    def zeros(tensors, needs) -> "Gradients":
        """Zeroed buffers for (hidden, weight, bias), each only if needed."""
        sums = wide(tensors[0].dtype)
        dtypes = (sums if tensors[0].dtype == torch.float16 else tensors[0].dtype, sums, sums)
        return Gradients(*(torch.zeros(each.shape, dtype=dtype, device=each.device) if needed else None
                           for each, dtype, needed in zip(tensors, dtypes, needs)))


def check_arguments(hidden, weight, target, bias, scaling: Scaling) -> None:
    """Raise ValueError naming the argument that does not fit: shapes, dtypes, devices, ranges. target may be None."""
    shapes = ", ".join(f"{name} {tuple(each.shape)}" for name, each in
                       (("hidden", hidden), ("weight", weight), ("target", target)) if each is not None)
    if hidden.dim() != 2 or weight.dim() != 2 or target is not None and target.dim() != 1:
        raise ValueError(f"expected hidden (N, D), weight (V, D), target (N,), got {shapes}")
    if hidden.shape[1] != weight.shape[1] or target is not None and hidden.shape[0] != target.shape[0]:
        raise ValueError(f"sizes differ: {shapes}")
    if not hidden.dtype.is_floating_point or not weight.dtype.is_floating_point:
        raise ValueError(f"hidden and weight must be floating point, got {hidden.dtype} and {weight.dtype}")
    if target is not None and target.dtype != torch.int64:
        raise ValueError(f"target must be int64, got {target.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if len({each.device for each in (hidden, weight, target, bias) if each is not None}) > 1:
        raise ValueError("hidden, weight, target and bias must be on one device")
    if scaling.temperature <= 0 or scaling.softcap < 0:
        raise ValueError(f"temperature must be above 0 and softcap not below 0, got {scaling}")


def cast_operands(hidden, weight, bias):
    """Bring the three to one dtype: autocast's where it is on, else the weight's. Casts are differentiable."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    if hidden.dtype == torch.float64:  # as F.linear under autocast does
        dtype = torch.promote_types(torch.float64, weight.dtype)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def kept_rows(target: torch.Tensor, ignore_index: int, vocab: int, rows: torch.Tensor | None) -> torch.Tensor:
    """Rows whose target counts, (M,) int64: those known, else found by two read-backs of the device.

    ValueError for a target outside the vocabulary, which would otherwise read someone else's memory."""
    if rows is not None:
        if rows.dim() != 1 or rows.dtype != torch.int64 or rows.device != target.device:
            got = f"{tuple(rows.shape)} {rows.dtype} on {rows.device}"
            raise ValueError(f"rows must be (M,) int64 on {target.device}, got {got}")
        return rows
    rows = (target != ignore_index).nonzero().squeeze(1)
    if len(rows):
        low, high = torch.stack(target.index_select(0, rows).aminmax()).tolist()
        if low < 0 or high >= vocab:
            wanted = f"ignore_index={ignore_index} or in [0, {vocab})"
            raise ValueError(f"targets must be {wanted}, got values from {low} to {high}")
    return rows


def row_spans(rows: int, width: int) -> list[slice]:
    """Slices of rows whose (rows, width) fp32 copy fits GATHER_BYTES."""
    step = max(1, GATHER_BYTES // (4 * width))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def raw_target_logit(x, weight, bias, target) -> torch.Tensor:
    """s_t of each row, (C,) in the wide dtype.

    16-bit logits are rounded to 2^-9 of their size, which is much for the one number that the loss is about; a dot
    product of D gives it without that rounding."""
    dtype = wide(x.dtype)
    raw = torch.empty(len(x), dtype=dtype, device=x.device)
    for span in row_spans(*x.shape):
        picked = weight.index_select(0, target[span]).to(dtype)
        torch.sum(picked.mul_(x[span]), -1, out=raw[span])
    return raw if bias is None else raw + bias.index_select(0, target).to(dtype)


def slack_and_lift(dtype: torch.dtype) -> tuple[float, float]:
    """(how far a logit may exceed the shift before the shift follows, how far the shift then goes above it).

    16 nats cost fp32 and bf16 nothing, as their precision is relative. fp16 ends at 65,504: there every stored number
    stays below 1/64, so that a product with a tile of 8,192 columns stays finite for weights up to 500."""
    return (0.0, 4.16) if dtype == torch.float16 else (16.0, 0.0)
