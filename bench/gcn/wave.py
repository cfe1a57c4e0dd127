"""One wave of 64 lanes: its registers, operands and the accesses that it has not waited for."""
import re
import struct

import numpy as np

LANES = np.arange(64)
NAMED = {"vcc": 106, "vcc_lo": 106, "vcc_hi": 107, "m0": 124, "exec": 126, "exec_lo": 126, "exec_hi": 127}
FULL = (1 << 64) - 1
NAN = np.uint32(0x7FFFFFFF)  # what a register holds before it is written


def lanes_of(bits: int):
    return np.unpackbits(np.frombuffer(bits.to_bytes(8, "little"), np.uint8), bitorder="little").astype(bool)


def bits_of_lanes(mask) -> int:
    return int.from_bytes(np.packbits(mask, bitorder="little").tobytes(), "little")


class Wave:
    def __init__(self, number: int, block: dict, vectors: int, arguments: int, machine):
        self.number, self.machine = number, machine
        self.v = np.full((vectors, 64), NAN, np.uint32)
        self.v[0] = number * 64 + LANES
        self.s = [int(NAN)] * 128
        self.s[0:2] = arguments & 0xFFFFFFFF, arguments >> 32
        self.scc, self.place = False, 0
        self.loads, self.others = [], []  # accesses that vmcnt and lgkmcnt count, oldest first
        self.set_scalar(126, FULL, 2)
        for index, value in block.items():
            self.s[index] = value

    def scalar(self, index: int, words: int = 1) -> int:
        return sum(self.s[index + word] << 32 * word for word in range(words))

    def set_scalar(self, index: int, value: int, words: int = 1) -> None:
        for word in range(words):
            self.s[index + word] = value >> 32 * word & 0xFFFFFFFF
        if index >= 126:
            self.mask = lanes_of(self.scalar(126, 2))

    def put(self, index: int, value) -> None:
        """Write a vector register where lanes are active."""
        np.copyto(self.v[index], value, where=self.mask, casting="unsafe")

    def wait(self, queue: list, keep: int) -> None:
        while len(queue) > keep:
            queue.pop(0)(self)


class Operand:
    """A register, or several in a row, or a constant, with its signs."""

    def __init__(self, text: str):
        self.text, inner = text, text
        self.negative = inner.startswith("-") and not inner[1:2].isdigit()
        inner = inner[1:] if self.negative else inner
        self.absolute = inner.startswith("|")
        inner = inner.strip("|")
        self.vector, self.index, self.words, self.value = False, None, 1, None
        if match := re.fullmatch(r"([vsa])(?:(\d+)|\[(\d+):(\d+)\])", inner):
            kind, one, low, high = match.groups()
            if kind == "a":
                raise NotImplementedError(text)
            self.vector, self.index = kind == "v", int(one or low)
            self.words = 1 if one else int(high) - int(low) + 1
        elif inner in NAMED:
            self.index, self.words = NAMED[inner], 2 if inner in ("vcc", "exec") else 1
        elif re.fullmatch(r"-?\d+\.\d+(e[+-]?\d+)?", inner):
            self.value, self.real = struct.unpack("<I", struct.pack("<f", float(inner)))[0], float(inner)
        elif re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", inner):
            self.value, self.real = int(inner, 0), None
        elif inner not in ("off", "null"):
            raise NotImplementedError(f"operand {text}")

    def scalar(self, w: Wave, words: int = 1) -> int:
        """The operand of a scalar instruction, unsigned."""
        if self.value is not None:
            return self.value & ((1 << 32 * words) - 1)
        assert not self.vector, self.text
        return w.scalar(self.index, words)

    def word(self, w: Wave, at: int = 0):
        """One of its 32-bit words: (64,) uint32, or a number for all lanes."""
        if self.value is not None:  # a negative constant fills all words with its sign
            return np.uint32((self.value >> 32 * at) & 0xFFFFFFFF)
        return w.v[self.index + at] if self.vector else np.uint32(w.s[self.index + at])

    def bits(self, w: Wave):
        """A 32-bit source with its signs applied."""
        value = self.word(w)
        if self.absolute:
            value = value & np.uint32(0x7FFFFFFF)
        return value ^ np.uint32(0x80000000) if self.negative else value

    def f32(self, w: Wave):
        return self.bits(w).view(np.float32)

    def f16(self, w: Wave, high: bool = False):
        """One half as a number with its signs applied."""
        if self.value is not None:
            half = np.float16(self.real) if self.real is not None else np.uint16(self.value & 0xFFFF).view(np.float16)
        else:
            half = (self.word(w) >> np.uint32(16 * high)).astype(np.uint16).view(np.float16)
        half = np.abs(half) if self.absolute else half
        return -half if self.negative else half

    def wide(self, w: Wave):
        """A 64-bit source: uint64."""
        if self.value is not None:
            return np.uint64(self.value & FULL)
        return self.word(w).astype(np.uint64) | self.word(w, 1).astype(np.uint64) << np.uint64(32)
