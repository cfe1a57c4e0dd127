"""What both operations share: argument checks, chunk sizes, and one chunk of rows in plain torch, which is
the path of the CPU and of devices without Triton.

Notation: N tokens, D hidden size, V vocabulary, C rows of one chunk, R rows of one cache-sized block.
With s = hidden @ weight.T + bias (the raw logits), the distribution of a row is softmax(z) with
z = cap(logit_scale * s) / temperature, cap(u) = softcap * tanh(u / softcap), or u where softcap is 0.

The four statistics of a row and their gradients in z, with p = softmax(z) and t the target:
    logp      = z_t - lse               1[j = t] - p_j
    entropy   = lse - sum_j p_j z_j     -p_j (log p_j + entropy)
    lse       = log sum_j exp z_j       p_j
    mean_logp = mean_j z_j - lse        1/V - p_j
so any loss of them is known to the kernel by four numbers a row (`Coefficients`).
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the torch path does everything
    triton = tl = None


def jit(*changing: str):
    """Decorator: a Triton function, not compiled anew for values of the arguments named in `changing`.

    Triton compiles a variant for each integer argument that is 1 or a multiple of 16. What follows the number of
    tokens changes with every batch and gains nothing from that.
    """
    return triton.jit(do_not_specialize=changing) if triton else lambda function: function


INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # read at import, as triton itself does
# Scratch of the elementwise passes in torch: small enough to stay in the second-level cache, where a pass
# over fp32 costs a fifth of what it costs in memory. Of 0.5 to 4 MiB the fastest on two cores with 2 MiB of
# L2 each.
BLOCK_BYTES = 2 << 20
WORKSPACE_BYTES = 32 << 20  # of the logits of a chunk on a CPU
GPU_CHUNK_ROWS = 1024
PAD = 16  # elements; a row that starts at a multiple of it is read in 16-byte pieces
LOG_TINY = -80.0  # exp of it is nothing in fp32; keeps 0 * log 0 finite


class TokenStats(NamedTuple):
    """Per-token numbers of softmax(logits), each (C,) fp32 (fp64 for fp64 input)."""

    logp: torch.Tensor  # log-probability of the target
    entropy: torch.Tensor  # in nats
    lse: torch.Tensor  # log-sum-exp of the logits (z-loss is its square)
    mean_logp: torch.Tensor  # mean over the vocabulary of the log-softmax (label smoothing)


class Coefficients(NamedTuple):
    """d loss / d statistic, each (C,), or None where the loss does not use that statistic."""

    logp: torch.Tensor | None
    entropy: torch.Tensor | None
    lse: torch.Tensor | None
    mean_logp: torch.Tensor | None


class Scaling(NamedTuple):
    """How raw logits become logits: cap(logit_scale * s) / temperature."""

    temperature: float = 1.0
    softcap: float = 0.0
    logit_scale: float = 1.0


class RowState(NamedTuple):
    """What torch_gradient needs from the statistics pass; each (C,)."""

    total: torch.Tensor  # sum_j exp(z_j - shift)
    target_exp: torch.Tensor  # exp(z_t - shift)
    rest: torch.Tensor  # total - target_exp, summed without the target: 1 - p_t keeps its relative accuracy


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels take this tensor: CUDA and ROCm, or any device under Triton's
    interpreter."""
    return triton is not None and (tensor.is_cuda or INTERPRET) and tensor.dtype != torch.float64


def architecture(device: torch.device) -> str:
    """Name of the chip that a kernel would be compiled for: "sm_86", "gfx1100"; "interpreter" without one."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_%d%d" % torch.cuda.get_device_capability(device)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and statistics use: fp32, or fp64 for fp64 input."""
    return torch.promote_types(dtype, torch.float32)


def check_arguments(hidden, weight, target, bias, scaling: Scaling) -> None:
    """Raise ValueError naming the argument that does not fit: shapes, dtypes, devices, ranges."""
    if hidden.dim() != 2 or weight.dim() != 2 or target.dim() != 1:
        raise ValueError(
            "expected hidden (N, D), weight (V, D), target (N,), got "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(target.shape)}"
        )
    if hidden.shape[1] != weight.shape[1] or hidden.shape[0] != target.shape[0]:
        raise ValueError(
            f"sizes differ: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, "
            f"target {tuple(target.shape)}"
        )
    if not hidden.dtype.is_floating_point or not weight.dtype.is_floating_point:
        raise ValueError(f"hidden and weight must be floating point, got {hidden.dtype} and {weight.dtype}")
    if target.dtype != torch.int64:
        raise ValueError(f"target must be int64, got {target.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if len({each.device for each in (hidden, weight, target, bias) if each is not None}) > 1:
        raise ValueError("hidden, weight, target and bias must be on one device")
    if scaling.temperature <= 0 or scaling.softcap < 0:
        raise ValueError(f"temperature must be above 0 and softcap not below 0, got {scaling}")


def cast_operands(hidden, weight, bias):
    """Bring the three to one dtype: autocast's where it is on, else the weight's. Casts are
    differentiable."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    if hidden.dtype == torch.float64:  # as F.linear under autocast does
        dtype = torch.promote_types(torch.float64, weight.dtype)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def kept_rows(target: torch.Tensor, ignore_index: int, vocab: int) -> torch.Tensor:
    """Rows whose target counts, (M,) int64. One read-back of the device. ValueError for a target outside the
    vocabulary, which would otherwise read someone else's memory."""
    rows = (target != ignore_index).nonzero().squeeze(1)
    if len(rows):
        low, high = torch.stack(target.index_select(0, rows).aminmax()).tolist()
        if low < 0 or high >= vocab:
            raise ValueError(
                f"targets must be ignore_index={ignore_index} or in [0, {vocab}), "
                f"got values from {low} to {high}"
            )
    return rows


def chunk_sizes(rows: int, vocab: int, itemsize: int, workspace_bytes: int) -> list[int]:
    """Rows of each chunk, so that its (C, V) logits fit the byte budget (one row at least): sizes as equal as
    multiples of 16 allow, because a short last chunk costs a matrix product at its worst shape."""
    most = max(1, workspace_bytes // (vocab * itemsize))
    if rows <= most:
        return [rows] if rows else []
    unit = 16 if most >= 16 else 1
    units, most = -(-rows // unit), most // unit
    chunks = -(-units // most)
    sizes = [(units // chunks + (index < units % chunks)) * unit for index in range(chunks)]
    sizes[-1] -= sum(sizes) - rows
    return sizes


def runs_as_it_is(function):
    """Decorator: a torch.compile around a call steps over it. The sweep reads sizes back from the device and launches
    its own kernels; traced, it would only break into pieces. (torch.compiler.disable imports Dynamo, about a second,
    so it waits until somebody compiles.)"""

    @functools.wraps(function)
    def call(*arguments, **options):
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*arguments, **options)
        return function(*arguments, **options)

    return call


def padded(vocab: int) -> int:
    """vocab rounded up to PAD."""
    return -(-vocab // PAD) * PAD


def default_workspace_bytes(device: torch.device, row_bytes: int) -> int:
    """Bytes of logits at a time where the caller names no budget; row_bytes: of the logits of one token."""
    if device.type == "cpu":
        return WORKSPACE_BYTES
    return GPU_CHUNK_ROWS * row_bytes


def empty_workspace(hidden, vocab: int, workspace_bytes: int | None) -> tuple[list[int], torch.Tensor]:
    """(rows of each chunk, uninitialised logits (C, V) for the largest) for hidden (M, D), all rows of which count.

    On the Triton path a row's stride is padded(V), so that any vocabulary (50,257 too) is read in whole 16-byte
    pieces and the matrix products see aligned rows.
    """
    stride = padded(vocab) if runs_triton(hidden) else vocab
    if workspace_bytes is None:
        workspace_bytes = default_workspace_bytes(hidden.device, stride * hidden.element_size())
    sizes = chunk_sizes(len(hidden), stride, hidden.element_size(), workspace_bytes)
    whole = torch.empty((max(sizes, default=0), stride), dtype=hidden.dtype, device=hidden.device)
    return sizes, whole[:, :vocab]


def raw_logits(x, weight, bias, out) -> None:
    """out (C, V) = x (C, D) @ weight.T (+ bias), in place."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def raw_target_logit(x, weight, bias, target) -> torch.Tensor:
    """s_t of each row, (C,) in the wide dtype. 16-bit logits are rounded to 2^-9 of their size, which is much
    for the one number that the loss is about; a dot product of D gives it without that rounding."""
    dtype = wide(x.dtype)
    raw = (x.to(dtype) * weight.index_select(0, target).to(dtype)).sum(-1)
    return raw if bias is None else raw + bias.index_select(0, target).to(dtype)


def kernel_factors(scaling: Scaling) -> tuple[float, float]:
    """(inner, outer) such that z = outer * tanh(inner * s) with a softcap, and z = inner * s without."""
    if scaling.softcap:
        return scaling.logit_scale / scaling.softcap, scaling.softcap / scaling.temperature
    return scaling.logit_scale / scaling.temperature, 1.0


def scaled(raw: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """z of raw logits s, elementwise; new tensor unless nothing is to do."""
    inner, outer = kernel_factors(scaling)
    if scaling.softcap:
        return (raw * inner).tanh_().mul_(outer)
    return raw if inner == 1.0 else raw * inner


def row_blocks(rows: int, vocab: int, dtype: torch.dtype) -> list[slice]:
    """Slices of R rows whose wide copy fits BLOCK_BYTES."""
    step = max(1, BLOCK_BYTES // (vocab * wide(dtype).itemsize))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def torch_stats(
    logits, target, raw_target, scaling: Scaling, *, keep_exp: bool, all_four: bool = True
) -> tuple[TokenStats, RowState]:
    """Statistics of one chunk: logits (C, V) raw, target (C,), raw_target (C,) the exact s_t.

    With keep_exp (and no softcap) the logits are overwritten by exp(z - row maximum) with 0 at the target:
    the gradient's matrix product can use that as it stands, so that exp is taken once. Without all_four,
    entropy and mean_logp are not computed and come back as 0, which saves three passes of eight.
    """
    rows, vocab = logits.shape
    dtype = wide(logits.dtype)
    store = keep_exp and not scaling.softcap
    shift, rest, weighted, total_z = torch.zeros((4, rows), dtype=dtype, device=logits.device)
    shrink = torch.ones_like(shift)
    target_z = scaled(raw_target, scaling)
    blocks = row_blocks(rows, vocab, logits.dtype)
    scratch = torch.empty((2, blocks[0].stop, vocab), dtype=dtype, device=logits.device)
    inner, outer = kernel_factors(scaling)
    for block in blocks:
        z, e = scratch[:, : block.stop - block.start]
        column, top = target[block, None], shift[block]
        if inner == 1.0 and not scaling.softcap and logits.dtype == dtype:
            torch.amax(logits[block], -1, out=top)
            torch.sub(logits[block], top[:, None], out=z)
        else:
            z.copy_(logits[block])
            if scaling.softcap:
                z.mul_(inner).tanh_().mul_(outer)
            elif inner != 1.0:
                z.mul_(inner)
            torch.amax(z, -1, out=top)
            z.sub_(top[:, None])
        z.scatter_(1, column, (target_z[block] - top)[:, None])
        if all_four:
            torch.sum(z, -1, out=total_z[block])
        if store and logits.dtype == dtype:
            e = logits[block]
        torch.exp(z, out=e).scatter_(1, column, 0.0)
        torch.sum(e, -1, out=rest[block])
        if all_four:
            torch.sum(z.mul_(e), -1, out=weighted[block])
        if store and logits.dtype == torch.float16:  # keeps the product's sum over V below fp16's 65504
            torch.div(1024.0, rest[block] + 1024.0, out=shrink[block])
            e.mul_(shrink[block, None])
        if store and logits.dtype != dtype:
            logits[block].copy_(e)
    offset = target_z - shift
    target_exp = offset.exp()
    total = rest + target_exp
    log_total = total.log()
    entropy, mean_logp = log_total - (weighted + target_exp * offset) / total, total_z / vocab - log_total
    if not all_four:
        entropy, mean_logp = torch.zeros_like(rest), torch.zeros_like(rest)
    stats = TokenStats(offset - log_total, entropy, shift + log_total, mean_logp)
    return stats, RowState(total * shrink, target_exp * shrink, rest * shrink)


def torch_gradient(
    logits, target, raw_target, stats: TokenStats, state: RowState, coefs: Coefficients, scaling: Scaling
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Turn what torch_stats(keep_exp=True) left in `logits` into the gradient in the raw logits, in place.

    Returns (row_scale, target_coef), each (C,) or None: the gradient is row_scale * logits, plus target_coef
    in the target's column. With neither softcap, entropy nor mean_logp in the loss it costs no pass at all,
    since the scale of a row commutes with the product that follows.
    """
    chain = scaling.logit_scale / scaling.temperature
    zero = torch.zeros_like(stats.logp)
    a, b, c, d = (zero if each is None else each * chain for each in coefs)
    if not scaling.softcap and coefs.entropy is None and coefs.mean_logp is None:
        return (c - a) / state.total, (a * state.rest + c * state.target_exp) / state.total
    vocab = logits.shape[1]
    inner, outer = kernel_factors(scaling)
    blocks = row_blocks(len(target), vocab, logits.dtype)
    scratch = torch.empty((3, blocks[0].stop, vocab), dtype=wide(logits.dtype), device=logits.device)
    constant = c - a - d - b * stats.entropy
    for block in blocks:
        logp, p, slope = scratch[:, : block.stop - block.start]
        column = target[block, None]
        if scaling.softcap:
            slope.copy_(logits[block]).scatter_(1, column, raw_target[block, None])
            slope.mul_(inner).tanh_()
            torch.mul(slope, outer, out=logp).sub_(stats.lse[block, None])
            torch.exp(logp, out=p)
            slope.square_().neg_().add_(1.0)  # 1 - tanh^2
        else:
            p.copy_(logits[block]).div_(state.total[block, None])
            torch.log(p, out=logp).clamp_(min=LOG_TINY).scatter_(1, column, stats.logp[block, None])
            p.scatter_(1, column, stats.logp[block, None].exp())
        logp.mul_(-b[block, None]).add_(constant[block, None])
        p.mul_(logp).add_(d[block, None] / vocab)
        p.scatter_add_(1, column, a[block, None])
        logits[block].copy_(p.mul_(slope) if scaling.softcap else p)
    return None, None


class Gradients(NamedTuple):
    """Buffers that the sweep fills; None where no gradient is asked for."""

    hidden: torch.Tensor | None  # (N, D), fp32 for fp16 operands: a loss scaler multiplies only later
    weight: torch.Tensor | None  # (V, D), fp32 sums over chunks
    bias: torch.Tensor | None  # (V,)


def empty_gradients(hidden, weight, bias, needs: tuple[bool, bool, bool]) -> Gradients:
    """Zeroed buffers for (hidden, weight, bias), each only if needed."""
    dtype = wide(hidden.dtype)
    hidden_dtype = dtype if hidden.dtype == torch.float16 else hidden.dtype
    return Gradients(
        torch.zeros(hidden.shape, dtype=hidden_dtype, device=hidden.device) if needs[0] else None,
        torch.zeros(weight.shape, dtype=dtype, device=weight.device) if needs[1] else None,
        torch.zeros(bias.shape, dtype=dtype, device=bias.device) if needs[2] else None,
    )


def power_of_two(coefs: Coefficients) -> torch.Tensor:
    """Scalar 2^k near the largest coefficient, 1 if all are zero: fp16 gradients are kept in range by
    dividing by it, and being a power of two it changes no digit."""
    largest = torch.stack([each.abs().max() for each in coefs if each is not None]).max()
    return torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest))), torch.ones_like(largest))
