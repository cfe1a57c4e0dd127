"""Change a step of a worked solution, and compute all that follows from it, in time linear in the text's length.

Equations are read exactly (grading/steps.py); a change is a set of replacements: the rest of the text stays as it was.
"""
import functools
import re
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

from minimath.grading.steps import Token, arithmetic, equations
from minimath.judges.base import split_steps

_NUMBER = re.compile(r"(?<![\w.\\^])(?:\d+(?:,\d{3})*(?!\d)(?:\.\d+)?|\.\d+)(?!(?:st|nd|rd|th)\b)")
LABEL = re.compile(r"\s*\**(?:Step (\d{1,3})\b[.:)*]*\s*|(\d{1,3})[.)]\s+(?=\D))")  # of a step in a list
ENDING = re.compile(r"\\boxed|\\fbox|####|\banswers?\b", re.I)
SEQUEL = re.compile(r"\s*(?:This means|Now we know|That matches|We get)\b")      # more of the step before
_CHECK = re.compile(r"\b(?:we (?:can )?check|let us check|that matches|double-check|verify)\b", re.I)
MAX_UNITS = 10 ** 15          # of a number that is written: its digits without the point

Edits = dict[int, tuple[int, str]]      # by start: the end of what goes, and what stands there instead


class Line(NamedTuple):
    """An equation that holds, with a plain number on one side; offsets are those of the text."""
    expression: list[Token]
    result: Token
    piece: int
    start: int
    end: int

    @property
    def value(self) -> Fraction:
        return number_of(self.result.text)

    def with_result(self, word: str) -> Edits:
        return {self.result.start: (self.result.start + len(self.result.text.rstrip("%")), word)}

    def computed(self, edits: Edits) -> str | None:
        """Write the result as it is after the replacements in the expression."""
        old = [token.text for token in self.expression]
        new = [edits[t.start][1] + "%" * t.text.endswith("%") if t.start in edits else t.text for t in self.expression]
        before, after = arithmetic(" ".join(old)), arithmetic(" ".join(new))
        if before is None or after is None:
            return None
        scale = 100 if self.result.text.endswith("%") and before < self.value else 1
        return shown(self.result.text, after * scale, exact=before * scale == self.value)


class Number(NamedTuple):
    start: int
    end: int
    value: Fraction


class Reading(NamedTuple):
    """A text: its sentences and their starts, equations, numbers; given: the values in the problem."""
    problem: str
    text: str
    pieces: tuple[str, ...]
    starts: list[int]
    lines: list[Line]
    numbers: list[Number]
    given: frozenset[Fraction]

    def written(self, number: Number, word: str) -> tuple[int, str]:
        """Put the value of a word in place of a number, as that is written where it can."""
        return number.end, shown(self.text[number.start:number.end], number_of(word)) or word

    def carry(self, k: int, word: str, edits: Edits) -> Edits | None:
        """Let the result of line k be `word`, and compute what follows; sentences that check it go.

        None where that can't be written in the digits shown, or where it is not plain which later numbers stand for a
        result: it is one of the problem's own numbers, or was there before."""
        lines, edits, moved = self.lines, dict(edits), {}
        seen = self.given | {n.value for n in self.numbers if n.start < lines[k].start}
        numbers = [n for n in self.numbers if n.start >= lines[k].end][::-1]
        for j, line in enumerate([*lines[k:], None], k):
            while numbers and (line is None or numbers[-1].start < line.end):
                n = numbers.pop()
                if n.value in moved and n.start not in edits and not (line and n.start == line.result.start):
                    edits[n.start] = self.written(n, moved[n.value])
            if line is None:
                break
            new, old = word if j == k else line.computed(edits), line.value
            if new is None or (number_of(new) == old and old in moved):
                return None
            if number_of(new) == old:
                seen |= {old}
            elif (old in seen and j < len(lines) - 1) or moved.get(old, new) != new:
                return None
            else:
                moved[old] = new
                edits |= line.with_result(new)
        for piece in range(lines[k].piece + 1, len(self.pieces)):
            if _CHECK.search(self.pieces[piece]) and not ENDING.search(self.pieces[piece]):
                edits |= self.without(piece, piece + 1)
        return edits

    def without(self, begin: int, end: int) -> Edits:
        """Take sentences out; with the first one the space behind them too."""
        behind = "".join(self.pieces[end:end + 1]) if begin == 0 else ""
        return {self.starts[begin]: (self.starts[end] + len(behind) - len(behind.lstrip()), "")}

    def inserted(self, at: int, words: str) -> Edits:
        """Put words before a sentence, apart from it as two sentences are."""
        where = self.pieces[max(1, at)] if max(1, at) < len(self.pieces) else ""
        space = where[:len(where) - len(where.lstrip())] or " "
        return {self.starts[at]: (self.starts[at], words + space if at == 0 else space + words)}

    def gaps(self) -> list[int]:
        """List the sentences before which another may stand: not within a step or a displayed formula."""
        texts = (self.text[:start] for start in self.starts[:-1])
        return [i for i, text in enumerate(texts) if text.count(r"\[") == text.count(r"\]")
                and text.count("$$") % 2 == 0 and text.count(r"\begin{") == text.count(r"\end{")
                and not SEQUEL.match(self.pieces[i])] or [0]


def number_of(word: str) -> Fraction:
    return Fraction(word.rstrip("%").replace(",", "")[:40])


def numbers_in(text: str) -> list[Number]:
    return [Number(*match.span(), number_of(match[0])) for match in _NUMBER.finditer(text)]


@functools.lru_cache(maxsize=16)
def read(problem: str, text: str) -> Reading:
    """Read a text; equations of sentences that only check are left out."""
    pieces = split_steps(text)
    starts = [0, *accumulate(map(len, pieces))]
    labels = {at + m.start(m.lastindex) for at, piece in zip(starts, pieces) if (m := LABEL.match(piece))}
    numbers, lines, piece = {n.start: n for n in numbers_in(text) if n.start not in labels}, [], 0
    for left, right, holds in equations(text):
        result, expression = (right, left) if len(right) == 1 else (left, right)
        digits = [t for t in (*result, *expression) if t.kind == "num"]
        while starts[piece + 1] <= result[0].start:
            piece += 1
        if (holds and len(result) == 1 and all(text[t.start:t.end] == t.text for t in digits)
                and not _CHECK.search(pieces[piece])):
            start, end = min(left[0].start, right[0].start), max(left[-1].end, right[-1].end)
            lines.append(Line(expression, result[0], piece, start, end))
            numbers |= {t.start: Number(t.start, t.start + len(t.text.rstrip("%")), number_of(t.text)) for t in digits}
    given = frozenset(number.value for number in numbers_in(problem[:1 << 14]))
    return Reading(problem, text, pieces, starts, lines, [numbers[start] for start in sorted(numbers)], given)


def put(text: str, edits: Edits) -> str:
    """Make the replacements; those within a longer one are dropped."""
    out, at = [], 0
    for start, (end, word) in sorted(edits.items()):
        if start >= at:
            out += [text[at:start], word]
            at = end
    return "".join([*out, text[at:]])


def shown(old: str, value: Fraction, exact: bool = True) -> str | None:
    """Write a value above 0 as the number `old` is written; None where that can't be."""
    digits = old.rstrip("%").replace(",", "")
    places = len(digits.partition(".")[2])
    units = round(value * 10 ** places)
    if not 0 < units < MAX_UNITS or (exact and units != value * 10 ** places):
        return None
    whole, part = divmod(units, 10 ** places)
    return (f"{whole:,}" if "," in old else str(whole)) + (f".{part:0{places}}" if places else "")
