"""Number types of PTX in numpy, and what the interpreter raises."""
import numpy as np

U = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
S = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
F = {16: np.float16, 32: np.float32, 64: np.float64}


class Fault(Exception):
    """What a card would answer with an error, or with results that are not defined."""


def numpy_type(name: str):
    """Find the type of "f32", "b16", "pred"."""
    if name == "pred":
        return np.bool_
    if not name[1:].isdigit() or name[0] not in "busf":
        raise NotImplementedError(name)
    return {"b": U, "u": U, "s": S, "f": F}[name[0]][int(name[1:])]


def is_real(dtype) -> bool:
    return np.issubdtype(dtype, np.floating)


def bits_of(dtype) -> int:
    return 8 * np.dtype(dtype).itemsize


def to_bf16(x):
    """Round fp32 to the bits of bf16, to nearest even."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_bf16(bits):
    """Widen bits of bf16 to fp32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def flushed(x):
    """Replace subnormal fp32 numbers by 0 of their sign, as .ftz does."""
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def elements(words, kind: str):
    """Unpack registers (...,) uint32 as (..., numbers) float64; kind: tf32, f16 or bf16."""
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)[..., None].astype(np.float64)
    halves = np.stack((words & np.uint32(0xFFFF), words >> np.uint32(16)), -1).astype(np.uint16)
    return (from_bf16(halves) if kind == "bf16" else halves.view(np.float16)).astype(np.float64)
