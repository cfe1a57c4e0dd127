"""Memory that answers a wrong access with a Fault: the arguments' storages, and the shared memory of some blocks."""
import ctypes

import numpy as np

from .formats import Fault


class GlobalMemory:
    """The parts of this process's memory that a kernel may touch, as (first byte, number of bytes)."""

    def __init__(self, spans):
        self.parts = [(base, base + size, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base)))
                      for base, size in sorted(set(spans)) if size]
        self.loaded = self.stored = 0

    def place(self, address, width: int):
        """Yield (lanes, bytes of a part, offsets) for addresses (n,) that cover `width` bytes each."""
        if (address % np.uint64(width)).any():
            raise Fault(f"misaligned global access of {width} bytes")
        left = np.ones(len(address), bool)
        for base, end, data in self.parts:
            here = left & (address >= np.uint64(base)) & (address + np.uint64(width) <= np.uint64(end))
            if here.any():
                yield here, data, (address[here] - np.uint64(base)).astype(np.int64)
                left &= ~here
        if left.any():
            raise Fault(f"global access outside the arguments: {width} bytes at {hex(int(address[left][0]))}")

    def read(self, address, width: int):
        """Read bytes (n, width) at addresses (n,)."""
        out = np.empty((len(address), width), np.uint8)
        for here, data, offset in self.place(address, width):
            out[here] = data[offset[:, None] + np.arange(width)]
        self.loaded += out.size
        return out

    def write(self, address, raw) -> None:
        """Write bytes raw (n, width) at addresses (n,)."""
        self.stored += raw.size
        for here, data, offset in self.place(address, raw.shape[1]):
            data[offset[:, None] + np.arange(raw.shape[1])] = raw[here]


class SharedMemory:
    """Shared memory of some blocks, `span` bytes each, that remembers which warp touched a byte since the last barrier.

    With races: two warps at one byte, one of them writing something new, raise Fault. Copies of one number that several
    warps write are allowed: that is how Triton stores what they all hold.
    """

    def __init__(self, blocks: int, span: int, races: bool):
        size = max(1, blocks * span)
        self.span, self.races, self.epoch = span, races, 0
        self.data = np.full(size, 0x7F, np.uint8)
        self.writer, self.write_epoch = np.full(size, -1, np.int32), np.full(size, -1, np.int32)
        self.reader, self.read_epoch = np.full(size, -1, np.int32), np.full(size, -1, np.int32)

    def place(self, address, width: int, block):
        """Find the offsets (n, width) in `data` of addresses (n,) within the blocks (n,)."""
        if ((address < 0) | (address + width > self.span)).any():
            raise Fault(f"shared access outside {self.span} bytes: {int(address.max())}")
        if (address % width).any():
            raise Fault(f"misaligned shared access of {width} bytes")
        return (address + block * self.span)[:, None] + np.arange(width)

    def read(self, where, warp):
        """Read bytes at offsets (n, width) for warps (n,)."""
        if self.races:
            at, warp = where.ravel(), np.repeat(warp, where.shape[1]).astype(np.int32)
            self.check((self.write_epoch[at] == self.epoch) & (self.writer[at] != warp))
            fresh = self.read_epoch[at] != self.epoch
            self.reader[at] = np.where(fresh | (self.reader[at] == warp), warp, -2)  # -2: several warps
            self.reader[at] = np.where(self.reader[at] == warp, warp, -2)  # several of them in this very read
            self.read_epoch[at] = self.epoch
        return self.data[where]

    def claim(self, where, warp, raw=None) -> None:
        """Note that warps (n,) write at offsets (n, width), the bytes `raw`, or at some later moment."""
        if not self.races:
            return
        at, warp = where.ravel(), np.repeat(warp, where.shape[1]).astype(np.int32)
        clash = (self.write_epoch[at] == self.epoch) & (self.writer[at] != warp)
        clash |= (self.read_epoch[at] == self.epoch) & (self.reader[at] != warp)
        self.check(clash if raw is None else clash & (self.data[at] != raw.ravel()))
        self.writer[at], self.write_epoch[at] = warp, self.epoch

    def write(self, where, warp, raw) -> None:
        """Write bytes raw (n, width) at offsets (n, width) for warps (n,)."""
        self.claim(where, warp, raw)
        self.data[where] = raw
        if self.races and (self.data[where] != raw).any():
            raise Fault("different numbers for one shared byte")

    def read_group(self, where, group: int):
        """Read bytes at offsets for a group of four warps, as wgmma does."""
        if self.races:
            self.check((self.write_epoch[where] == self.epoch) & (self.writer[where] // 4 != group))
        return np.ascontiguousarray(self.data[where])

    def check(self, clash) -> None:
        if clash.any():
            raise Fault("race in shared memory")
