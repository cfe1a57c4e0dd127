"""Reads what the compiler made: machine code of NVIDIA (SASS, through the nvdisasm of Triton's wheel) and AMD
(the assembly text that Triton keeps), as instructions, loops and counts of tensor and memory instructions.

A loop is a branch to an earlier label; its body is all that lies between. Out-of-line slow paths also jump
back, so only loops with work in them count: with tensor instructions where the kernel has them in a loop,
else with global loads; and of nested ones the innermost.
"""
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    name: str  # opcode with its modifiers: "LDG.E.128", "global_load_b128"
    target: int | None = None  # index of the instruction that a branch goes to


class Counts(NamedTuple):
    """Instructions of one stretch of code.

    loads and stores: "LDG.128" -> how many; the number is bits a lane.
    """
    tensor: int
    loads: dict
    stores: dict


SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\S+\s+)?([A-Z][A-Z0-9_.a-z]*)(.*)$")
SASS_LABEL = re.compile(r"^(\.L_\w+):")
SASS_TARGET = re.compile(r"`\((\.L_\w+)\)")
GCN_LINE = re.compile(r"^\s+([sv]_\w+|global_\w+|buffer_\w+|flat_\w+|scratch_\w+|ds_\w+)\b(.*)$")
GCN_LABEL = re.compile(r"^(\.LBB\w+):")
GCN_TARGET = re.compile(r"(\.LBB\w+)")

SASS_TENSOR = re.compile(r"^(H|I|D|B|Q|O)(G?)MMA\b|^UTC\w*MMA\b")
GCN_TENSOR = re.compile(r"^v_(wmma|swmmac|mfma|smfmac)_")
SASS_MEMORY = re.compile(r"^(LDG|LDGSTS|STG|LD|ST)\.(.*)$")
SASS_BULK = re.compile(r"^(UBLKCP|UTMALDG|UTMASTG)\b")
GCN_MEMORY = re.compile(r"^(global|buffer|flat)_(load|store)_(lds_)?(\w+)$")
GCN_BITS = {"byte": 8, "ubyte": 8, "sbyte": 8, "short": 16, "ushort": 16, "sshort": 16, "dword": 32}


def read_code(text: str, line: re.Pattern, label: re.Pattern, target: re.Pattern, branch: str) -> list[Instruction]:
    labels, found = {}, []
    for each in text.splitlines():
        if place := label.match(each):
            labels[place.group(1)] = len(found)
        elif code := line.match(each):
            name, rest = code.groups()
            goal = target.search(rest) if name.startswith(branch) else None
            found.append((name, goal.group(1) if goal else None))
    return [Instruction(name, labels.get(goal)) for name, goal in found]


def read_sass(text: str) -> list[Instruction]:
    """Read instructions from the output of `nvdisasm -c`."""
    return read_code(text, SASS_LINE, SASS_LABEL, SASS_TARGET, "BRA")


def read_gcn(text: str) -> list[Instruction]:
    """Read instructions from AMD assembly: the first function of it."""
    return read_code(text.split(".Lfunc_end0:")[0], GCN_LINE, GCN_LABEL, GCN_TARGET, ("s_branch", "s_cbranch"))


def is_tensor(name: str) -> bool:
    return bool(SASS_TENSOR.match(name) or GCN_TENSOR.match(name))


def memory_access(name: str) -> tuple[str, str, int] | None:
    """Tell how an instruction moves global memory; None if it does not.

    ("load" or "store", kind, bits a lane). Bulk copies (TMA) count as 128 bits: the hardware moves whole lines.
    """
    if found := SASS_MEMORY.match(name):
        kind, modifiers = found.groups()
        parts = modifiers.split(".")
        wide = [int(each) for each in parts if each in ("64", "128", "256")]
        narrow = [int(each[1:]) for each in parts if re.fullmatch(r"[US](8|16)", each)]
        bits = (wide or narrow or [32])[-1]
        return ("store" if kind in ("STG", "ST") else "load"), kind, bits
    if found := SASS_BULK.match(name):
        return ("store" if found.group(1) == "UTMASTG" else "load"), found.group(1), 128
    if found := GCN_MEMORY.match(name):
        space, way, to_lds, width = found.groups()
        if size := re.fullmatch(r"(?:d16_)?(?:hi_)?[buif](\d+)", width):
            bits = int(size.group(1))
        elif size := re.fullmatch(r"dwordx(\d)", width):
            bits = 32 * int(size.group(1))
        else:
            bits = GCN_BITS.get(width.split("_")[0], 32)
        return way, ("buffer_" if space == "buffer" else "") + way + ("_lds" if to_lds else ""), bits
    return None


def count(code: list[Instruction]) -> Counts:
    tensor, loads, stores = 0, Counter(), Counter()
    for name, _ in code:
        if is_tensor(name):
            tensor += 1
        elif access := memory_access(name):
            way, kind, bits = access
            (loads if way == "load" else stores)[f"{kind}.{bits}"] += 1
    return Counts(tensor, dict(loads), dict(stores))


def inner_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Find the innermost loops that do the work, in the order of the code."""
    ends: dict[int, int] = {}
    for index, (_, target) in enumerate(code):
        if target is not None and target <= index:
            ends[target] = max(index, ends.get(target, 0))  # jumps to one label are one loop
    counted = {(first, last): count(code[first : last + 1]) for first, last in ends.items()}
    working = ([span for span, found in counted.items() if found.tensor]
               or [span for span, found in counted.items() if found.loads])
    inner: list[tuple[int, int]] = []
    for first, last in sorted(working):
        if any(a >= first and b <= last and (a, b) != (first, last) for a, b in working):
            continue
        if inner and first <= inner[-1][1]:  # one loop that is entered in two places
            first, last = inner.pop()[0], last
        inner.append((first, last))
    return [code[first : last + 1] for first, last in inner]


def hot_code(code: list[Instruction]) -> list[Counts]:
    """Count each innermost working loop; the whole kernel where there is none."""
    return [count(body) for body in inner_loops(code)] or [count(code)]


def moved_wide(counts: dict, threads: int) -> int:
    """Add up the bytes that a block moves in pieces of 16 bytes a lane or more."""
    return sum(int(key.split(".")[1]) // 8 * number for key, number in counts.items() if wide(key)) * threads


def wide(key: str) -> bool:
    return int(key.split(".")[1]) >= 128


def sass_spills(code: list[Instruction]) -> int:
    """Add up the bytes a thread moves to and from local memory, as `ptxas -v` does.

    Triton has no local arrays, so all of it is spilled registers.
    """
    total = 0
    for name, _ in code:
        if re.match(r"(STL|LDL)\b", name):
            size = [int(each) for each in re.findall(r"\.[US]?(8|16|64|128)\b", name)]
            total += (size or [32])[0] // 8
    return total


def run_tool(tool: str, *arguments: str) -> str:
    """Run one of the tools in Triton's wheel. Raises CalledProcessError."""
    import triton
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return subprocess.run([str(folder / tool), *arguments], capture_output=True, text=True, check=True).stdout


def nvidia_resources(cubin: bytes) -> tuple[dict, list[Instruction]]:
    """Read a cubin: registers, spills and stack, and the instructions."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "kernel.cubin"
        place.write_bytes(cubin)
        usage = run_tool("cuobjdump", "--dump-resource-usage", str(place))
        code = read_sass(run_tool("nvdisasm", "-c", str(place)))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {"registers": registers, "spills": sass_spills(code), "stack": stack}, code


def amd_resources(text: str) -> tuple[dict, list[Instruction]]:
    """Read the same from AMD assembly.

    Spilled scalar registers are not counted: they go to lanes of vector registers, not to memory.
    """
    keys = {"registers": "vgpr_count", "spills": "vgpr_spill_count", "stack": "private_segment_fixed_size"}
    found = {name: int(re.search(rf"\.{key}:\s*(\d+)", text).group(1)) for name, key in keys.items()}
    return found, read_gcn(text)
