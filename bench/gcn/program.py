"""Reads the assembly of a gfx942 kernel, and runs its blocks, wave by wave between barriers."""
import re
import struct

import numpy as np

from ..ptx.formats import Fault
from ..ptx.memory import GlobalMemory, SharedMemory
from ..ptx.program import split_operands
from . import access, matrix, scalar, vector
from .wave import Operand, Wave

IGNORED = ("s_nop", "s_setprio", "s_sleep", "s_inst_prefetch")
BUILDERS = {"buffer_": access.build_buffer, "global_": access.build_global, "s_load_": access.build_scalar,
            "ds_": access.build_shared, "v_mfma_": matrix.build, "v_": vector.build}


def split_line(line: str) -> tuple[str, list[str], str]:
    """Split into (name, operands, modifiers); modifiers follow the last operand, behind a space."""
    name, _, rest = line.partition(" ")
    *operands, last = split_operands(rest, "[(", "])") or [""]
    last, _, modifiers = last.partition(" ")
    return name, operands + [last] * bool(last), modifiers


class Program:
    """A kernel's instructions: actions of a wave, or where a wave goes on."""

    def __init__(self, text: str):
        self.name = re.search(r"\.amdhsa_kernel (\w+)", text).group(1)
        fields = {name: int(value) for name, value in re.findall(r"\.amdhsa_(\w+) (\d+)", text)}
        self.user_registers, self.vectors = fields["user_sgpr_count"], fields["next_free_vgpr"]
        self.axes = [axis for axis, name in enumerate("xyz") if fields[f"system_sgpr_workgroup_id_{name}"]]
        if fields["private_segment_fixed_size"] or not fields["user_sgpr_kernarg_segment_ptr"]:
            raise NotImplementedError("a kernel with a stack, or without arguments")
        described = re.search(r"\.args:(.*?)\n\s+\.group_segment_fixed_size", text, re.S).group(1)
        self.arguments = [(int(offset), int(size), kind) for offset, size, kind in
                          re.findall(r"\.offset:\s*(\d+)\s+\.size:\s*(\d+)\s+\.value_kind:\s*(\w+)", described)]
        self.code, self.labels = [], {}
        body = text[text.index(f"\n{self.name}:"):text.index("\n.Lfunc_end0")]
        for line in body.split("\n")[2:]:
            line = " ".join(line.split(";")[0].split())
            if match := re.fullmatch(r"(\.L\w+):", line):
                self.labels[match.group(1)] = len(self.code)
            elif line and not line.startswith("."):
                self.code.append((line, self.build(line)))

    def build(self, line: str):
        name, operands, modifiers = split_line(line)
        if name in IGNORED:
            return lambda w: None
        if name == "s_waitcnt":
            return access.build_wait(line)
        if name in ("s_barrier", "s_endpgm") or name in scalar.TAKEN:
            return None
        try:
            operands = [Operand(each) for each in operands]
            for prefix, build in BUILDERS.items():
                if name.startswith(prefix):
                    return build(name, operands, modifiers)
            return scalar.build(name, operands)
        except (NotImplementedError, KeyError, ValueError) as error:
            message = f"{line}: {error}"

        def unknown(w):
            raise NotImplementedError(message)

        return unknown

    def packed_arguments(self, launch):
        """The bytes of the argument segment: the launcher's numbers, the grid, and 0 for Triton's own scratch."""
        data = np.zeros(self.arguments[-1][0] + 256, np.uint8)
        given = [each for each in self.arguments if not each[2].startswith("hidden")]
        pairs = [*zip(given, launch.values), *((each, launch.grid["xyz".index(each[2][-1])]) for each in self.arguments
                                               if each[2].startswith("hidden_block_count"))]
        for (offset, size, _), value in pairs:
            packed = struct.pack("<f", value) if isinstance(value, float) else struct.pack("<q", value)
            data[offset:offset + size] = np.frombuffer(packed[:size], np.uint8)
        return data

    def run(self, launch, counts=None) -> int:
        """Run every block of the grid; returns how many instructions its waves executed. Raises as PTX does."""
        data = self.packed_arguments(launch)
        spans = [(base, end - base) for base, end, _ in launch.memory.parts] + [(data.ctypes.data, data.nbytes)]
        self.memory, self.noise, executed = GlobalMemory(spans), launch.noise, 0
        wide, high, deep = map(range, launch.grid)
        with np.errstate(all="ignore"):
            for place in ((x, y, z) for z in deep for y in high for x in wide):
                self.shared = SharedMemory(1, launch.shared, launch.races)
                waves = [Wave(number, self.block_registers(place), self.vectors, data.ctypes.data, self)
                         for number in range(launch.threads // 64)]
                while waves:
                    executed += sum(self.to_barrier(w) for w in waves)
                    ended = [w for w in waves if w.place < 0]
                    if ended and len(ended) < len(waves):
                        raise Fault("a barrier that not all waves reach")
                    waves = [w for w in waves if w.place >= 0]
                    self.shared.epoch += 1
        return executed

    def block_registers(self, place) -> dict:
        return {self.user_registers + index: place[axis] for index, axis in enumerate(self.axes)}

    def to_barrier(self, w: Wave) -> int:
        """Run a wave to its next barrier, or to its end, then its place is -1."""
        executed = 0
        while True:
            line, action = self.code[w.place]
            w.place += 1
            executed += 1
            if action is not None:
                try:
                    action(w)
                except Fault as fault:
                    raise Fault(f"{fault}: {line}") from None
                continue
            name, _, target = line.partition(" ")
            if name == "s_barrier":
                return executed
            if name == "s_endpgm":
                w.wait(w.loads, 0)
                w.wait(w.others, 0)
                w.place = -1
                return executed
            if scalar.TAKEN[name](w):
                w.place = self.labels[target]
