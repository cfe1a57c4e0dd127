"""Read answers that are made of parts: lists, tuples, sets, intervals, inequalities, matrices, systems.

The parts stay texts, to be compared as answers. What can be read in two ways, as (1,2), is read in both.
"""
import itertools
import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from minimath.grading.numbers import LABEL, read_number, same_number
from minimath.grading.typeset import key

MAX_PARTS = 64
INFINITE = {r"\infty": 1, r"+\infty": 1, r"-\infty": -1}


class Parts(NamedTuple):
    """A list, tuple, set or matrix. kind: list, tuple, set, column, row, matrix; labels: of x = 1, else ""."""
    kind: str
    items: tuple[str, ...]
    labels: tuple[str, ...] = ()


class Interval(NamedTuple):
    low: str
    high: str
    low_closed: bool
    high_closed: bool


class RealSet(NamedTuple):
    """A union of intervals, in order where all ends are numbers; variable: of an inequality, else ""."""
    intervals: tuple[Interval, ...]
    variable: str = ""


_OPEN, _CLOSE = "([{", ")]}"
_AND = re.compile(r",?\s+(?:and|or)\s+")
_VARIABLE = r"(?:[A-Za-z]|\\(?:theta|alpha|beta|lambda|phi|omega|gamma))(?:_\{?\w+\}?)?"
_MEMBER = re.compile(rf"({_VARIABLE})\s*\\in(?![A-Za-z])\s*(?=[(\[\]\\])")
_RELATION = re.compile(r"(<|>|\\[lg]eq(?![A-Za-z]))")
_INTERVAL = re.compile(r"([(\[\]])(.*)([)\]\[])")
_BUILDER = re.compile(rf"\\\{{\s*({_VARIABLE})(?:\s*\\in\s*\\mathbb\{{R\}})?\s*[|:]\s*(.*)\\\}}")
_REALS = re.compile(r"\\mathbb\{R\}|(?:the set of )?(?:all )?real numbers|all reals", re.I)
_WITHOUT = re.compile(rf"(?:{_REALS.pattern})\s*(?:\\setminus|-|except(?: for)?)\s*(?:\\\{{(.*)\\\}}|([^{{}}]+))", re.I)
_MATRIX = re.compile(r"[\[(]?\s*\\begin\{(?:[pbB]?matrix|array|smallmatrix)\}(?:\{[clr|]+\})?(.*)\\end\{\w+\}\s*[\])]?")
_SYSTEM = re.compile(r"\\begin\{(?:cases|aligned|align\*?|array)\}(?:\{[clr|]+\})?(.*)\\end\{\w+\*?\}")
_DIFFERENT = re.compile(rf"({_VARIABLE})\s*\\neq(?![A-Za-z])\s*")


def split(text: str, marks: str = ",;") -> list[str] | None:
    """Cut at marks outside of brackets; None for an empty part or a lone bracket."""
    parts, depth, start = [], 0, 0
    for i, sign in enumerate(text):
        depth += (sign in _OPEN) - (sign in _CLOSE)
        if depth < 0:
            return None
        if depth == 0 and sign in marks:
            parts.append(text[start:i].strip())
            start = i + 1
    parts.append(text[start:].strip())
    return parts if depth == 0 and all(parts) and len(parts) <= MAX_PARTS else None


def read_objects(text: str) -> list[Parts | RealSet]:
    """Return what a text can be; nothing for a number, an expression, prose."""
    found = [_real_set(text), _matrix(text), _basis(text), _enclosed(text), _list(text)]
    return [each for each in found if each is not None]


# ---- sets of real numbers

def _real_set(text: str) -> RealSet | None:
    variable = ""
    if builder := _BUILDER.fullmatch(text):
        return found._replace(variable="") if (found := _real_set(builder[2].strip())) else None
    if member := _MEMBER.match(text):
        variable, text = member[1], text[member.end():].strip()
    if _REALS.fullmatch(text):
        return _punctured([], variable)
    if match := _WITHOUT.fullmatch(text):
        return _punctured(split(match[1] or match[2]), variable)
    if differ := _DIFFERENT.match(text):            # x != 2 and x != 3; x != 2, 3
        points = split(re.sub(rf"(?<=[ ,]){re.escape(differ[1])}\s*\\neq", "", _AND.sub(", ", text[differ.end():])))
        return None if re.search(r"[<>=]|\\[lgn]eq", "".join(points or "")) else _punctured(points, differ[1])
    parts = [_one_set(part.strip()) for part in re.split(r"\\cup(?![A-Za-z])|,?\s*\bor\b", text)]
    if parts == [None] and (both := split(_AND.sub(", ", text))) and len(both) == 2:
        return _intersection(*map(_one_set, both))
    names = {part and part.variable for part in parts} - {""}
    if None in names or len(names) > 1:
        return None
    return _ordered([interval for part in parts for interval in part.intervals], variable or "".join(names))


def _one_set(text: str) -> RealSet | None:
    """Read an interval, also ]a,b[, or an inequality that is solved for its variable."""
    if match := _INTERVAL.fullmatch(text):
        ends, a_pair = split(match[2]) or [], match[1] + match[3] == "()" and r"\infty" not in text
        if len(ends) == 2 and not (a_pair and _RELATION.search(text)):
            return RealSet((Interval(*ends, match[1] == "[", match[3] == "]"),))
        if not a_pair:
            return None
    sides = [side.strip() for side in _RELATION.split(text)]
    if len(sides) not in (3, 5) or not all(sides):
        return None
    at = 0 if len(sides) == 3 and re.fullmatch(_VARIABLE, sides[0]) else 2
    variable, others = sides[at], sides[:at:2] + sides[at + 2::2]
    if not re.fullmatch(_VARIABLE, variable) or any(
            re.search(rf"(?<![\\A-Za-z]){re.escape(variable)}(?![A-Za-z])", side) for side in others):
        return None
    if sides[1] in (">", r"\geq"):
        sides = [{">": "<", r"\geq": r"\leq", "<": ">", r"\leq": r"\geq"}.get(side, side) for side in reversed(sides)]
    if not {*sides[1::2]} <= {"<", r"\leq"}:
        return None
    if len(sides) == 3:
        sides = [r"-\infty", "<", *sides] if sides[0] == variable else [*sides, "<", r"\infty"]
    return RealSet((Interval(sides[0], sides[4], "eq" in sides[1], "eq" in sides[3]),), variable)


def _place(end: str) -> tuple[int, Fraction] | None:
    """Return where an end lies among all numbers; None where it is not read."""
    end = end.replace(" ", "")
    if end in INFINITE:
        return (INFINITE[end], Fraction(0))
    number = read_number(end)
    return (0, number.value) if number else None


def _cuts(each: Interval) -> list[tuple] | None:
    """Return where an interval begins and ends, before or behind a number; None where an end is not read."""
    places = [_place(each.low), _place(each.high)]
    return None if None in places else [(places[0], not each.low_closed), (places[1], each.high_closed)]


def _ordered(intervals: list[Interval], variable: str) -> RealSet | None:
    """Sort intervals and join those that touch, where their ends are numbers."""
    intervals = [Interval(*(end.replace(" ", "").lstrip("+") if "infty" in end else end for end in each[:2]),
                          *(closed and "infty" not in end for end, closed in zip(each[:2], each[2:])))
                 for each in intervals]
    if None in map(_cuts, intervals):
        return RealSet(tuple(intervals), variable)
    first, *others = sorted(intervals, key=lambda each: _cuts(each)[0])
    joined = [first]
    for each in others:
        (begin, end), (_, last) = _cuts(each), _cuts(joined[-1])
        if begin > last:
            joined.append(each)
        elif end > last:
            joined[-1] = joined[-1]._replace(high=each.high, high_closed=each.high_closed)
    return RealSet(tuple(joined), variable)


def _punctured(points: list[str] | None, variable: str) -> RealSet | None:
    """Return all numbers but some; None for points that were not read."""
    if points is None:
        return None
    points = [signed for point in points for signed in _signs(point)]
    if all(map(_place, points)):
        points = sorted(points, key=_place)
    ends = [r"-\infty", *points, r"\infty"]
    return _ordered([Interval(low, high, False, False) for low, high in itertools.pairwise(ends)], variable)


def _intersection(a: RealSet | None, b: RealSet | None) -> RealSet | None:
    """Return x > 1 and x < 3 as one interval, where the ends are numbers."""
    if not a or not b or a.variable != b.variable or not a.variable:
        return None
    both = [a.intervals[0], b.intervals[0]]
    if None in map(_cuts, both):
        return None
    low, high = max(both, key=lambda each: _cuts(each)[0]), min(both, key=lambda each: _cuts(each)[1])
    if _place(low.low) > _place(high.high):
        return None
    return RealSet((Interval(low.low, high.high, low.low_closed, high.high_closed),), a.variable)


# ---- lists, tuples, sets, matrices

def _list(text: str, kind: str = "list") -> Parts | None:
    """Read "1, 2 and 3", "x = 1 or x = 2", a system, +-3."""
    if system := _SYSTEM.fullmatch(text):
        text = re.sub(r"\\\\\s*$", "", system[1].strip()).replace("\\\\", ";").replace("&", "")
    items = split(_AND.sub(", ", re.sub(r"^(?:and|or) ", "", text)))
    if items is None:
        return None
    items = [signed for item in items for signed in _signs(item)]
    if len(items) < 2 and kind == "list":
        return None
    matches = [LABEL.match(item) for item in items]
    labels = [match[1].replace(" ", "") if match else "" for match in matches]
    items = [item[match.end():].strip() if match else item for item, match in zip(items, matches)]
    if labels[0] and not any(labels[1:]):           # m = 5, 6, 7
        labels = [""] * len(items)
    if any(labels) and not all(labels) or not all(items):
        return None
    if len(set(labels)) == 1:
        labels = []                                 # x = 1 or x = 2
    if kind in ("list", "set") and not labels:
        items = _different(list({key(item): item for item in items}.values()))
    return Parts(kind, tuple(items), tuple(labels))


def _different(items: list[str]) -> list[str]:
    """Leave out what repeats a number that stands before it: 3/4 or 0.75."""
    kept = []
    for item in items:
        number = read_number(item)
        if not (number and any(other and same_number(number, other) for other in map(read_number, kept))):
            kept.append(item)
    return kept


def _signs(item: str) -> list[str]:
    before, *after = re.split(r"\s*\\pm(?![A-Za-z])\s*", item)
    if len(after) != 1 or r"\mp" in item:
        return [item]
    return [f"{before}{'+' if before and not before.endswith('=') else ''}{after[0]}", f"{before}-{after[0]}"]


def _enclosed(text: str) -> Parts | None:
    r"""Read (1,2), \{1,2\}, \langle 1,2\rangle, [1,2], (a,b) = (1,2)."""
    names = re.match(r"\(\s*[A-Za-z](?:\s*,\s*[A-Za-z]){1,5}\s*\)\s*=\s*|[A-Za-z]\w?\s*=\s*"
                     rf"|{_VARIABLE}\s*\\in(?![A-Za-z])\s*(?=\\\{{)", text)
    text = text[names.end():] if names else text
    if text == r"\emptyset":
        return Parts("set", ())
    for pattern, kind in ((r"\\\{(.*)\\\}", "set"), (r"\\langle(.*)\\rangle", "tuple"), (r"\((.*)\)", "tuple"),
                          (r"\[(.*)\]", "bracket")):
        found = _list(match[1].strip(), kind) if (match := re.fullmatch(pattern, text)) else None
        if found and (len(found.items) > 1 or kind == "set"):
            return found
    return None


def _matrix(text: str) -> Parts | None:
    if match := _MATRIX.fullmatch(text):
        rows = [split(row.strip(), "&") for row in re.split(r"\\\\", re.sub(r"\\\\\s*$", "", match[1].strip()))]
    elif (match := re.fullmatch(r"\[\s*(\[.*\])\s*\]", text)) and (lists := split(match[1])):
        rows = [split(row[1:-1]) if row.startswith("[") and row.endswith("]") else None for row in lists]
    else:
        return None
    if None in rows or len({len(row) for row in rows}) != 1 or not rows:
        return None
    kind = "column" if len(rows[0]) == 1 and len(rows) > 1 else "row" if len(rows) == 1 else f"matrix {len(rows)}"
    return Parts(kind, tuple(cell for row in rows for cell in row))


def _basis(text: str) -> Parts | None:
    r"""Read 2\hat{i} - \hat{j} as a tuple."""
    terms = re.findall(r"([-+]?)([^-+]*?)\\hat\{([ijk])\}", text := text.replace(" ", ""))
    if "".join(rf"{sign}{factor}\hat{{{name}}}" for sign, factor, name in terms) != text or not terms:
        return None
    found = {name: sign.strip("+") + (factor.strip("()") or "1") for sign, factor, name in terms}
    size = 3 if "k" in found else 2
    return Parts("tuple", tuple(found.get(name, "0") for name in "ijk"[:size])) if len(found) == len(terms) else None


def as_latex(found: RealSet) -> str:
    """Write a set as a union of intervals."""
    return r" \cup ".join(f"{'(['[each.low_closed]}{each.low},{each.high}{')]'[each.high_closed]}"
                          for each in found.intervals)


# ---- comparison

_ALIKE = [{"list", "tuple"}, {"tuple", "column"}, {"tuple", "row"}, {"bracket", "row"}, {"bracket", "column"},
          {"bracket", "list"}]


def same_objects(a: Parts | RealSet, b: Parts | RealSet, same: Callable[[str, str], bool]) -> bool:
    """Tell whether two objects are one; `same` compares two parts."""
    if isinstance(a, RealSet) or isinstance(b, RealSet):
        if type(a) is not type(b) or a.variable and b.variable and a.variable != b.variable:
            return False
        return len(a.intervals) == len(b.intervals) and _matched(
            a.intervals, b.intervals, lambda one, two: one[2:] == two[2:] and all(
                x.replace(" ", "") == y.replace(" ", "") or (x not in INFINITE and y not in INFINITE and same(x, y))
                for x, y in zip(one[:2], two[:2])))
    if a.labels and b.labels:
        items = dict(zip(b.labels, b.items))
        return sorted(a.labels) == sorted(b.labels) and all(
            same(item, items[label]) for label, item in zip(a.labels, a.items))
    kinds = {a.kind, b.kind}
    if kinds <= {"list", "set"} and not a.labels and not b.labels:
        return _matched(a.items, b.items, same)
    if len(kinds) > 1 and kinds not in _ALIKE and not (kinds == {"bracket", "tuple"} and len(a.items) > 2):
        return False
    return len(a.items) == len(b.items) and all(map(same, a.items, b.items))


def _matched(a: tuple, b: tuple, same: Callable) -> bool:
    """Tell whether each part of one has its own part in the other, in any order."""
    left = list(b)
    for part in a:
        if (found := next((i for i, other in enumerate(left) if same(part, other)), None)) is None:
            return False
        del left[found]
    return not left
