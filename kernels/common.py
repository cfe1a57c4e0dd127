"""What the operations share: argument checks, scalings, tile sizes, buffers.

Notation: N tokens, D hidden size, V vocabulary; a tile of logits has C rows and K columns of the vocabulary.
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

import contextlib
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
# Of a tile of logits: on a GPU what the second-level cache of a card of 40 MB and more holds; on a CPU 16 and 32 MiB
# are as fast, and 24 cuts 2,048 and 4,096 rows into equal chunks.
WORKSPACE_BYTES = {"cpu": 24 << 20, "cuda": 32 << 20}
# Columns of a tile. The more, the fewer times the (C, D) sum is read and written, and the fewer rows fit. On a GPU
# 8,192 is also what one block of threads can hold of a row; bench.roofline compares it with other tiles.
VOCAB_TILE = {"cpu": 4096, "cuda": 8192}
GATHER_BYTES = 4 << 20  # of the rows of the weight that are picked for the targets at a time
FEWEST_ROWS = 64  # below it a matrix product is all reading of the weight: rather take fewer columns
PAD = 16  # elements; a row that starts at a multiple of it is read in 16-byte pieces


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


class Chunk(NamedTuple):
    """The rows of one walk over the vocabulary, and where it works."""

    x: torch.Tensor  # (C, D)
    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None  # (V,)
    target: torch.Tensor | None  # (C,) int64, where the sums are about one
    raw_target: torch.Tensor | None  # (C,) raw logit of the target, in the wide dtype
    workspace: torch.Tensor  # (at least C * columns,) of x's dtype, overwritten
    columns: int  # K of every tile but the last


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels take this tensor: CUDA and ROCm, or any device under Triton's
    interpreter."""
    return triton is not None and (tensor.is_cuda or INTERPRET) and tensor.dtype != torch.float64


def on_device(tensor: torch.Tensor):
    """Context manager for launches: Triton takes the current device, not the tensor's. No-op off CUDA and ROCm."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


@functools.lru_cache
def architecture(device: torch.device) -> str:
    """Name of the chip that a kernel would be compiled for: "sm_86", "gfx1100"; "interpreter" without one. device: of
    a tensor, so with its index."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a tensor's device; 2 without a card."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def dot_precision(dtype: torch.dtype, arch: str) -> str:
    """input_precision of tl.dot: "tf32" for fp32 operands where torch's own products may use it and the chip has it,
    else "ieee".

    By the new name of the switch first (torch 2.9): once a trainer has set that, reading the old one raises.
    """
    if dtype != torch.float32 or arch.startswith("gfx") and arch != "gfx942":
        return "ieee"
    new = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    tf32 = torch.backends.cuda.matmul.allow_tf32 if new is None else new == "tf32"
    return "tf32" if tf32 else "ieee"


@functools.lru_cache
def multiplies_into_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch.mm(out_dtype=torch.float32) works for 16-bit operands on a card: on CUDA it does; on ROCm it
    raises or rounds in some versions (pytorch pull 162600), so it is tried once, which waits for the device."""
    if torch.version.hip is None:
        return True
    ones = torch.ones(16, 2049, dtype=dtype, device=device)  # neither 16-bit type holds 2,049
    try:
        return bool((torch.mm(ones, ones.t(), out_dtype=torch.float32) == 2049).all())
    except RuntimeError:
        return False


def mm_fp32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (N, D) @ b (D, V) in fp32; on a GPU 16-bit operands are summed in fp32 and not rounded after it."""
    if not a.is_cuda or a.dtype.itemsize != 2:
        return (a @ b).float()
    if multiplies_into_fp32(a.device, a.dtype):
        return torch.mm(a, b, out_dtype=torch.float32)
    return mm_widened(a, b)


def mm_widened(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (N, D) @ b (D, V) of fp32 copies, of b so many columns at a time as fit WORKSPACE_BYTES."""
    out, wide_a = torch.empty((len(a), b.shape[1]), dtype=torch.float32, device=a.device), a.float()
    step = max(1, WORKSPACE_BYTES["cuda"] // (4 * len(b)))
    for some, part in zip(out.split(step, 1), b.split(step, 1)):
        torch.mm(wide_a, part.float(), out=some)
    return out


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and statistics use: fp32, or fp64 for fp64 input."""
    return torch.promote_types(dtype, torch.float32)


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
    """Bring the three to one dtype: autocast's where it is on, else the weight's. Casts are
    differentiable."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    if hidden.dtype == torch.float64:  # as F.linear under autocast does
        dtype = torch.promote_types(torch.float64, weight.dtype)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def kept_rows(target: torch.Tensor, ignore_index: int, vocab: int, rows: torch.Tensor | None) -> torch.Tensor:
    """Rows whose target counts, (M,) int64: `rows` where the caller knows them, else found by two read-backs of the
    device. ValueError for a target outside the vocabulary, which would otherwise read someone else's memory."""
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


def equal_parts(count: int, most: int) -> list[int]:
    """count cut into parts of at most `most`, as equal as multiples of 16 allow: a short last part costs a matrix
    product at its worst shape."""
    if count <= most:
        return [count] if count else []
    unit = 16 if most >= 16 else 1
    units, most = -(-count // unit), most // unit
    parts = -(-units // most)
    sizes = [(units // parts + (index < units % parts)) * unit for index in range(parts)]
    sizes[-1] -= sum(sizes) - count
    return sizes


def tile_shape(rows: int, vocab: int, itemsize: int, workspace_bytes=None, device="cpu") -> tuple[list[int], int]:
    """(rows of each chunk, K columns of a tile) whose logits fit the budget (None: WORKSPACE_BYTES of the device); at
    least one row of PAD columns."""
    if workspace_bytes is None:
        workspace_bytes = WORKSPACE_BYTES.get(device, WORKSPACE_BYTES["cuda"])
    elements = max(1, workspace_bytes // itemsize)
    columns = min(VOCAB_TILE.get(device, VOCAB_TILE["cuda"]), padded(vocab))
    few = max(1, min(rows, FEWEST_ROWS))
    if columns * few > elements:
        columns = max(PAD, elements // few // PAD * PAD)
    return equal_parts(rows, max(1, elements // columns)), columns


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


def raw_logits(x, weight, bias, out) -> None:
    """out (C, V) = x (C, D) @ weight.T (+ bias), in place."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def row_spans(rows: int, width: int) -> list[slice]:
    """Slices of rows whose (rows, width) fp32 copy fits GATHER_BYTES."""
    step = max(1, GATHER_BYTES // (4 * width))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def raw_target_logit(x, weight, bias, target) -> torch.Tensor:
    """s_t of each row, (C,) in the wide dtype. 16-bit logits are rounded to 2^-9 of their size, which is much
    for the one number that the loss is about; a dot product of D gives it without that rounding."""
    dtype = wide(x.dtype)
    raw = torch.empty(len(x), dtype=dtype, device=x.device)
    for span in row_spans(*x.shape):
        picked = weight.index_select(0, target[span]).to(dtype)
        torch.sum(picked.mul_(x[span]), -1, out=raw[span])
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


def slack_and_lift(dtype: torch.dtype) -> tuple[float, float]:
    """(how far a logit may exceed the shift before the shift follows, how far the shift then goes above it).

    16 nats cost fp32 and bf16 nothing, as their precision is relative. fp16 ends at 65,504: there every stored number
    stays below 1/64, so that a product with a tile of 8,192 columns stays finite for weights up to 500.
    """
    return (0.0, 4.16) if dtype == torch.float16 else (16.0, 0.0)


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


def empty_sum(x: torch.Tensor) -> torch.Tensor:
    """Zeros like x (C, D) in the wide dtype."""
    return torch.zeros(x.shape, dtype=wide(x.dtype), device=x.device)


def power_of_two(coefs: Coefficients) -> torch.Tensor:
    """Scalar 2^k near the largest coefficient, 1 if all are zero: fp16 gradients are kept in range by
    dividing by it, and being a power of two it changes no digit."""
    largest = torch.stack([each.abs().max() for each in coefs if each is not None]).max()
    return torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest))), torch.ones_like(largest))
