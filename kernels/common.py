"""What all kernels share: Triton or its absence, the chip, fp32 products, sizes of tiles.

Notation of the linear head (`head`): N tokens, D hidden size, V vocabulary; a tile of logits has C rows and K columns.
"""
import contextlib
import functools
import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform: the torch path does everything
    triton = tl = None

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # read at import, as triton itself does
# Scratch of the elementwise passes in torch: small enough to stay in the second-level cache, where a pass over fp32
# costs a fifth of what it costs in memory. Of 0.5 to 4 MiB the fastest on two cores with 2 MiB of L2 each.
BLOCK_BYTES = 2 << 20
# Of a tile of logits: on a GPU what the second-level cache of a card of 40 MB and more holds; on a CPU 16 and 32 MiB
# are as fast, and 24 cuts 2,048 and 4,096 rows into equal chunks.
WORKSPACE_BYTES = {"cpu": 24 << 20, "cuda": 32 << 20}
# Columns of a tile. The more, the fewer times the (C, D) sum is read and written, and the fewer rows fit. On a GPU
# 8,192 is also what one block of threads can hold of a row; bench.roofline compares it with other tiles.
VOCAB_TILE = {"cpu": 4096, "cuda": 8192}
FEWEST_ROWS = 64  # below it a matrix product is all reading of the weight: rather take fewer columns
PAD = 16  # elements; a row that starts at a multiple of it is read in 16-byte pieces


def jit(*changing: str):
    """Decorate a Triton function, not compiled anew for values of the arguments named in `changing`.

    Triton compiles a variant for each integer argument that is 1 or a multiple of 16. What follows the number of
    tokens changes with every batch and gains nothing from that."""
    return triton.jit(do_not_specialize=changing) if triton else lambda function: function


def runs_as_it_is(function):
    """Decorate a function that a torch.compile around its call steps over.

    The sweep reads sizes back from the device and launches its own kernels; traced, it would only break into pieces.
    torch.compiler.disable imports Dynamo, about a second, so it waits until somebody compiles."""
    @functools.wraps(function)
    def call(*arguments, **options):
        run = torch.compiler.disable(function) if torch.compiler.is_compiling() else function
        return run(*arguments, **options)

    return call


def differentiable(*tensors) -> bool:
    """Whether autograd would follow one of the tensors, some of which may be None."""
    return torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether Triton takes it: on CUDA and ROCm, or on any device under Triton's interpreter."""
    return triton is not None and (tensor.is_cuda or INTERPRET) and tensor.dtype != torch.float64


def on_device(tensor: torch.Tensor):
    """Enter the tensor's device for a launch, as Triton takes the current one; a no-op off CUDA and ROCm."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


@functools.lru_cache
def architecture(device: torch.device) -> str:
    """Name the chip of a tensor's device: "sm_86", "gfx1100"; "interpreter" without one.

    From sm_100 on the first of a generation stands for all: sm_103 has the tiles of sm_100, and spills with others."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor if major < 10 else 0}"


@functools.lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a tensor's device; 2 without a card."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def dot_precision(dtype: torch.dtype, arch: str) -> str:
    """input_precision of tl.dot: "tf32" for fp32 where torch may use it and the chip has it, else "ieee".

    By the new name of the switch first (torch 2.9): once a trainer has set that, reading the old one raises."""
    if dtype != torch.float32 or arch.startswith("gfx") and arch != "gfx942":
        return "ieee"
    new = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    tf32 = torch.backends.cuda.matmul.allow_tf32 if new is None else new == "tf32"
    return "tf32" if tf32 else "ieee"


@functools.lru_cache
def multiplies_into_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch.mm(out_dtype=torch.float32) works for 16-bit operands on a card.

    On CUDA it does; on ROCm it raises or rounds in some versions (pytorch pull 162600), so it is tried once, which
    waits for the device."""
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


def padded(vocab: int) -> int:
    """vocab rounded up to PAD."""
    return -(-vocab // PAD) * PAD


def equal_parts(count: int, most: int) -> list[int]:
    """Cut count into parts of at most `most`, as equal as multiples of 16 allow.

    A short last part costs a matrix product at its worst shape."""
    if count <= most:
        return [count] if count else []
    unit = 16 if most >= 16 else 1
    units, most = -(-count // unit), most // unit
    parts = -(-units // most)
    sizes = [(units // parts + (index < units % parts)) * unit for index in range(parts)]
    sizes[-1] -= sum(sizes) - count
    return sizes


def tile_shape(rows: int, vocab: int, itemsize: int, workspace_bytes=None, device="cpu") -> tuple[list[int], int]:
    """(rows of each chunk, K columns of a tile) whose logits fit the budget, None: WORKSPACE_BYTES of the device.

    At least one row of PAD columns."""
    if workspace_bytes is None:
        workspace_bytes = WORKSPACE_BYTES.get(device, WORKSPACE_BYTES["cuda"])
    elements = max(1, workspace_bytes // itemsize)
    columns = min(VOCAB_TILE.get(device, VOCAB_TILE["cuda"]), padded(vocab))
    few = max(1, min(rows, FEWEST_ROWS))
    if columns * few > elements:
        columns = max(PAD, elements // few // PAD * PAD)
    return equal_parts(rows, max(1, elements // columns)), columns
