"""Reads the text of a PTX kernel, and runs it block by block."""
import re
from collections import Counter
from typing import NamedTuple

from .machine import Launch, Machine


class Instruction(NamedTuple):
    """One statement, its operands still text."""
    opcode: str
    guard: tuple[bool, str] | None  # (negated, predicate register)
    operands: list[str]
    text: str


def split_operands(text: str, opening: str = "{[", closing: str = "}]") -> list[str]:
    """Split at the commas that are in no bracket."""
    found, depth = [""], 0
    for c in text:
        depth += (c in opening) - (c in closing)
        if c == "," and not depth:
            found.append("")
        else:
            found[-1] += c
    return [each.strip() for each in found if each.strip()]


def read_instruction(text: str) -> Instruction:
    guard, rest = None, text
    if match := re.match(r"@(!?)(%p\d+)\s+", text):
        guard, rest = (bool(match.group(1)), match.group(2)), text[match.end():]
    opcode, _, operands = rest.partition(" ")
    return Instruction(opcode, guard, split_operands(operands), text)


class Program:
    """A PTX module with one kernel, read once.

    parameters: (name, bits) in order; registers: how many of each prefix; code, labels: place of each label in it.
    """

    def __init__(self, ptx: str):
        text = re.sub(r"//[^\n]*", "", ptx)
        self.name, head, body = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*)", text, re.S).groups()
        parameters = re.finditer(r"\.param\s+\.[a-z](\d+)[^,]*?(\w+)\s*(?:,|$)", head.strip() + ",")
        self.parameters = [(match.group(2), int(match.group(1))) for match in parameters]
        body = body[body.index("{") + 1:body.rindex("\n}")]
        declared = re.findall(r"\.reg\s+\.\w+\s+%([a-z]+)<(\d+)>", body)
        self.registers = {prefix: int(count) for prefix, count in declared}
        body = re.sub(r"^\s*\.(loc|pragma|reg|file|section)\b[^\n]*$", "", body, flags=re.M)
        self.code, self.labels = [], {}
        for statement in re.split(r";|(?<=:)\s*\n", body):
            self.add(" ".join(statement.split()))
        # blocks of a loop may part ways; those of a program without one mostly go together
        self.loops = any(each.opcode.startswith("bra") and self.labels[each.operands[0]] <= place
                         for place, each in enumerate(self.code))

    def add(self, statement: str) -> None:
        while match := re.match(r"(\$?\w+):\s*", statement):
            self.labels[match.group(1)] = len(self.code)
            statement = statement[match.end():]
        if statement.startswith("{ ") and not re.match(r"\{ [%_]", statement):
            raise NotImplementedError("a block with a scope: " + statement)
        if statement:
            self.code.append(read_instruction(statement))

    def run(self, launch: Launch, *, counts: Counter | None = None, together: int = 8) -> int:
        """Run every block of the grid; returns how many instructions its warps executed.

        counts: receives the instructions by opcode; together: blocks in flight where the program has no loop. Raises
        Fault, and NotImplementedError for what our kernels do not contain.
        """
        wide, high, deep = map(range, launch.grid)
        blocks = [(x, y, z) for z in deep for y in high for x in wide]
        step, executed, counts = 1 if self.loops else together, 0, Counter() if counts is None else counts
        for start in range(0, len(blocks), step):
            executed += Machine(self, launch, blocks[start:start + step]).execute(counts)
        return executed
