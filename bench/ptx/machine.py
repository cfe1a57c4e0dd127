"""Some blocks of a kernel in flight: registers as arrays over their threads, and the order in which threads go on."""
import re
import struct
from typing import NamedTuple

import numpy as np

from .formats import Fault, S, U, bits_of
from .instructions import action_of
from .memory import GlobalMemory, SharedMemory

REGISTERS = {"p": (np.bool_, True), "rs": (np.uint16, 0x7FFF), "r": (np.uint32, 0x7FFFFFFF),
             "rd": (np.uint64, 0x7FFFFFFFFFFFFFFF)}  # type, and what is in one before it is written: NaN


class Launch(NamedTuple):
    """What a kernel is started with."""
    values: list  # one number for each parameter, a float for an .f32
    grid: tuple[int, int, int]
    threads: int  # of a block
    shared: int  # bytes of a block
    memory: GlobalMemory
    races: bool = True  # raise on races in shared memory
    noise: float = 0.0  # relative error of ex2, lg2, rsqrt.approx and div.full


class Machine:
    """An action takes `active`: the threads (n,) bool that execute it, None for all."""

    def __init__(self, program, launch: Launch, blocks: list[tuple[int, int, int]]):
        self.program, self.memory, self.noise = program, launch.memory, launch.noise
        self.threads = threads = launch.threads
        self.n = threads * len(blocks)
        self.lane = np.arange(self.n)
        self.warp, self.block = self.lane // 32, self.lane // threads
        self.shared = SharedMemory(len(blocks), launch.shared, launch.races)
        self.registers = {f"%{prefix}{index}": np.full(self.n, REGISTERS[prefix][1], REGISTERS[prefix][0])
                          for prefix, count in program.registers.items() for index in range(count)}
        places = np.array(blocks, np.uint32)[self.block]
        for axis, name in enumerate("xyz"):
            self.registers[f"%ctaid.{name}"] = places[:, axis].copy()
            self.registers[f"%nctaid.{name}"] = np.full(self.n, launch.grid[axis], np.uint32)
            self.registers[f"%tid.{name}"] = (0 * self.lane if axis else self.lane % threads).astype(np.uint32)
            self.registers[f"%ntid.{name}"] = np.full(self.n, 1 if axis else threads, np.uint32)
        self.registers["%laneid"] = (self.lane % 32).astype(np.uint32)
        self.parameters = {name: bytes(8) for name, _ in program.parameters}  # Triton's own scratch comes last: none
        for (name, bits), value in zip(program.parameters, launch.values):
            packed = struct.pack("<f", value) if isinstance(value, float) else struct.pack("<q", value)
            self.parameters[name] = packed[:bits // 8].ljust(8, b"\0")
        self.copies, self.products = [[]], [[]]  # groups of cp.async and of wgmma, the last one open
        self.actions = [action_of(self, each) for each in program.code]

    # the order of things

    def execute(self, counts) -> int:
        """Run to the end; threads at the lowest place go first, so that they meet again behind a branch."""
        self.groups, self.waiting, self.alive = {0: np.ones(self.n, bool)}, {}, np.ones(self.n, bool)
        self.executed = 0
        with np.errstate(all="ignore"):
            while self.groups or self.waiting:
                if not self.groups:
                    self.pass_barrier()
                place = min(self.groups)
                self.advance(place, self.groups.pop(place), counts)
        if any(self.copies) or any(self.products):
            raise Fault("asynchronous work left at the end")
        return self.executed

    def pass_barrier(self) -> None:
        (place, mask), *others = self.waiting.items()
        if others or (mask != self.alive).any():
            raise Fault("a barrier that not all threads reach")
        self.shared.epoch += 1
        self.groups, self.waiting = {place + 1: mask}, {}

    def advance(self, place: int, mask, counts) -> None:
        """Take the threads `mask` from `place` to where they part, wait, meet others or end."""
        code = self.program.code
        while place < len(code):
            if place in self.groups:
                return self.join(self.groups, place, mask)
            each, action = code[place], self.actions[place]
            warps = self.n // 32 if mask.all() else len(np.unique(self.warp[mask]))
            counts[each.opcode] += warps
            self.executed += warps
            chosen = mask if each.guard is None else mask & (self.registers[each.guard[1]] ^ each.guard[0])
            if action is not None:
                try:
                    action(None if chosen.all() else chosen)
                except Fault as fault:
                    raise Fault(f"{fault}: {each.text}") from None
            elif each.opcode.startswith("bra"):
                self.join(self.groups, self.program.labels[each.operands[0]], chosen)
                return self.join(self.groups, place + 1, mask & ~chosen)
            elif each.opcode == "bar.sync":
                if each.guard is not None:
                    raise Fault("a barrier under a guard")
                return self.join(self.waiting, place, mask)
            else:  # ret
                self.alive, mask = self.alive & ~chosen, mask & ~chosen
                if not mask.any():
                    return
            place += 1
        self.alive = self.alive & ~mask

    @staticmethod
    def join(groups: dict, place: int, mask) -> None:
        if mask.any():
            groups[place] = groups[place] | mask if place in groups else mask

    def lanes(self, active):
        return self.lane if active is None else np.flatnonzero(active)

    def whole_warps(self, active):
        """Find the warps (W,) that take part in a warp-wide instruction."""
        if active is None:
            return np.arange(self.n // 32)
        warps = active.reshape(-1, 32)
        if (warps.any(1) != warps.all(1)).any():
            raise Fault("a lane is missing")
        return np.flatnonzero(warps.all(1))

    # operands

    def source(self, text: str, dtype):
        """Make a reader of an operand as `dtype`: a function of nothing -> (n,)."""
        if text in self.registers:
            register = self.registers[text]
            if (dtype is np.bool_) != (register.dtype == np.bool_) or register.itemsize < np.dtype(dtype).itemsize:
                raise NotImplementedError(f"{text} as {np.dtype(dtype)}")
            if register.itemsize == np.dtype(dtype).itemsize:
                view = register.view(dtype)
                return lambda: view
            return lambda: register.astype(U[bits_of(dtype)]).view(dtype)
        value = np.full(self.n, constant(text, dtype), dtype)
        return lambda: value

    def sink(self, text: str):
        """Make a writer (value (n,), active) of a register; a narrower value is extended by its own sign."""
        if text == "_":
            return lambda value, active: None
        register = self.registers[text]

        def put(value, active):
            if value.dtype != register.dtype and value.itemsize == register.itemsize:
                value = value.view(register.dtype)
            elif value.dtype.kind == "i":
                value = value.astype(S[8 * register.itemsize]).view(register.dtype)
            elif value.dtype != register.dtype:
                value = value.view(U[8 * value.itemsize]).astype(register.dtype)
            if active is None:
                register[:] = value
            else:
                np.copyto(register, value, where=active)

        return put

    def address(self, text: str):
        """Make a reader of "[%rd1 + 16]" or "[global_smem + 8]": uint64 in global, int64 in shared memory."""
        base, offset = re.fullmatch(r"\[\s*(%?\w+)\s*(?:\+\s*(-?\w+))?\s*\]", text).groups()
        offset = int(offset or "0", 0)
        if base == "global_smem":
            place = np.full(self.n, offset, np.int64)
            return lambda: place
        register = self.registers[base]
        if register.itemsize == 8:
            return lambda: register + np.uint64(offset & 0xFFFFFFFFFFFFFFFF)
        return lambda: register.astype(np.int64) + offset


def constant(text: str, dtype):
    """Read an immediate: 0f3F800000 is a number of fp32, an integer where a real is wanted its bits."""
    if dtype is np.bool_:
        return int(text, 0) != 0
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        value = np.frombuffer(bytes.fromhex(match.group(1))[::-1], np.float32)[0]
        return value.view(np.uint32) if dtype in (np.uint32, np.int32) else dtype(value)
    if text == "global_smem":
        return dtype(0)
    bits = U[bits_of(dtype)]
    return bits(int(text, 0) & int(np.iinfo(bits).max)).view(dtype)
