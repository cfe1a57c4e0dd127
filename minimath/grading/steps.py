"""Read arithmetic in worked solutions exactly, and count the steps that hold.

The share of correct steps `a op b = c` is a tripwire, not a quality score: most wrong solutions have correct
arithmetic. Text of a model is hostile input: every function runs in time linear in its length, numbers and powers are
bounded, and nothing is eval'd. Exact throughout (fractions.Fraction).
"""
import ast
import operator
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

MAX_TEXT_CHARS = 1 << 20      # of a completion; the end is kept, where the answer is
MAX_DIGITS = 40               # of one number; with MAX_SIDE_TOKENS this bounds every Fraction
MAX_SIDE_TOKENS = 64          # of one side of an equation, so that the parser's depth is bounded too
MAX_POWER_BITS = 4096         # of any power computed


class StepCount(NamedTuple):
    """Equations of a solution: those that hold, and all that could be read."""
    right: int
    total: int

    @property
    def sound(self) -> bool:
        """Whether every equation holds, or there is none."""
        return self.right == self.total


class Token(NamedTuple):
    kind: str      # "num", "op", "eq", "open", "close", "word", "break"
    text: str
    start: int     # character offsets in the normalised text; in an Equation, in the text itself
    end: int


class Equation(NamedTuple):
    """Two neighbouring sides of a chain, and whether they agree."""
    left: list[Token]
    right: list[Token]
    holds: bool


_SIGNS = str.maketrans({
    "\u00d7": "*", "\u22c5": "*", "\u00b7": "*", "\u2217": "*", "\u00f7": "/", "\u2044": "/", "\u2215": "/",
    "\u2212": "-", "\u2013": "-", "\u2248": "~", "\u20ac": "$", "\u00a3": "$", "\u00a5": "$", "\u00a0": " ",
    "\u202f": " ", "\u00b2": "^2", "\u00b3": "^3", "\u00bd": "(1/2)", "\u00bc": "(1/4)", "\u00be": "(3/4)",
    "\u00b0": ""})
_LATEX = [
    # a mixed number, 1\frac{1}{2}
    (re.compile(r"(?<![\d.])(\d{1,6}) ?\\[dt]?frac\s*\{(\d{1,6})\}\s*\{(\d{1,6})\}"), r"(\1+(\2)/(\3))"),
    (re.compile(r"(?<![\d.])(\d{1,6})\\[dt]?frac\s*(\d)\s*(\d)"), r"(\1+(\2)/(\3))"),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]{1,60})\}\s*\{([^{}]{1,60})\}"), r"((\1)/(\2))"),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r"((\1)/(\2))"),
    (re.compile(r"\\(?:times|cdot|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\approx(?![A-Za-z])"), "~"),
    (re.compile(r"\\(?:left|right|quad|qquad|displaystyle)(?![A-Za-z])|\\[,;:! ]|\^\{?\\circ\}?|&"), ""),
    (re.compile(r"\\(?:text|mathrm|textbf|mbox|mathbf)\s*\{([^{}]{0,80})\}"), r" \1 "),
    (re.compile(r"([=~]\s{0,3})\\boxed\s*\{([^{}]{1,80})\}"), r"\1\2;"),
    (re.compile(r"\^\{(-?\d{1,6})\}"), r"^(\1)"),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"(\d)\{,\}(\d)"), r"\1,\2"),
    (re.compile(r"\\[\[\]()]"), " "),
]
_TOKEN = re.compile(r"(?P<num>(?:\d+(?:,\d{3})*(?!\d)(?:\.\d+)?|\.\d+)(?: ?%(?! ?\d))?)|(?P<op>\*\*|[-+*/^])"
                    r"|(?P<eq>\n?[ \t]*[=~])|(?P<open>\()|(?P<close>\))|(?P<word>[A-Za-z]+)"
                    r"|(?P<skip>[ \t$]+)|(?P<break>.)", re.S)
# what may stand before a negative number that opens a side; elsewhere "-5" subtracts from something unread
_LEAD_IN = {"so", "then", "thus", "is", "hence", "therefore", "and", "get", "have", "gives", ":", ",", "."}
_ROOTS = ("\u221a", "\u221b")
# what of a last side makes no mistake: 17 / 5 = 3 remainder 2, 4 / 3 = 1 and 1/3, = 5 - 2\alpha
_GOES_ON = re.compile(r"(?:(?:[A-Za-z]+|,) ){0,3}(?:remainder|rem|r) |and (?:\( )?\d+ / \d|"
                      r"\\ (?:alpha|beta|theta|pi|sqrt|sin|cos|tan|log|ln|[lc]?dots|overline|[dtc]?frac) ", re.I)
_SCALES = {"half", "twice", "double", "triple", "thrice", "quarter", "third", "tenth", "mod", "sqrt", "log"}


def _normal(text: str, spans: list[tuple[int, int]] | None = None) -> str:
    """Write signs and LaTeX as plain arithmetic; `spans` becomes where each character of it stands in `text`."""
    if spans is not None:
        spans[:] = [(i, i + 1) for i, char in enumerate(text) for _ in char.translate(_SIGNS)]
    text = text.translate(_SIGNS)
    for pattern, replacement in _LATEX if re.search(r"[\\{&]", text) else ():
        if spans:
            parts, places, end = re.split(r"\\(\d)", replacement), [], 0     # literal, group, literal, ...
            for match in pattern.finditer(text):
                places += spans[end:match.start()]
                end = match.end()
                for i, part in enumerate(parts):
                    places += (spans[slice(*match.span(int(part)))] if i % 2
                               else [(spans[match.start()][0], spans[end - 1][1])] * len(part))
            spans[:] = places + spans[end:]
        text = pattern.sub(replacement, text)
    return text


def _tokens(text: str) -> list[Token]:
    """Cut normal text into tokens; "x" and "of" between two numbers are products."""
    out = []
    for match in _TOKEN.finditer(text):
        kind, value = match.lastgroup, match[0].strip(" \t\n").replace(" %", "%") or match[0]
        if kind != "skip":
            out.append(Token("break" if kind == "num" and len(value) > MAX_DIGITS else kind, value, *match.span()))
    for i in range(1, len(out) - 1):
        between = out[i - 1].kind in ("num", "close") and out[i + 1].kind in ("num", "open")
        if between and out[i].text in ("x", "X", "of"):
            out[i] = out[i]._replace(kind="op", text="*")
    return out


_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def _value(tokens: list[Token]) -> Fraction | None:
    """Return the value of + - * / ^ **, signs, brackets and "2(3)"; None for anything else."""
    if len(tokens) > MAX_SIDE_TOKENS or not {token.kind for token in tokens} <= {"num", "op", "open", "close"}:
        return None
    words = []
    for before, token in zip([None, *tokens], tokens):
        if token.kind == "num":
            value = Fraction(token.text.rstrip("%").replace(",", ""))
            words.append(f"({value / 100 if token.text.endswith('%') else value})")
        else:
            product = token.kind == "open" and before is not None and before.kind in ("num", "close")
            words.append("*(" if product else "**" if token.text == "^" else token.text)
    try:
        return _evaluate(ast.parse(" ".join(words), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError):
        return None


def _evaluate(node: ast.expr) -> Fraction:
    """Compute a tree of integers exactly. Raises ValueError for what is not arithmetic."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp):
        value = _evaluate(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if not isinstance(node, ast.BinOp):
        raise ValueError("not arithmetic")
    a, b = _evaluate(node.left), _evaluate(node.right)
    if not isinstance(node.op, ast.Pow):
        return _OPERATORS[type(node.op)](a, b)
    if b.denominator != 1 or abs(b) * (a.numerator.bit_length() + a.denominator.bit_length()) > MAX_POWER_BITS:
        raise ValueError("power out of bounds")
    return a ** int(b)


# of the kinds of tokens: words between a number and "=", a number and an operator, a rate as in $3/cup, 4 eggs/hen
_UNITS, _RATE = re.compile("(?<=[nc])w{1,3}(?=e)"), re.compile("(?<=n)w{0,3}(o)w{1,3}(?=[oev])")
_INSIDE = re.compile("(?<=n)(w{1,4})(?=([ov])[no](w{0,4}))")
_NO_UNITS = {"and", "or", "more", "fewer", "percent", "dozen", "hundred", "thousand", "million", "billion"} | _SCALES


def _without_units(tokens: list[Token]) -> tuple[list[Token], set[Token]]:
    """Drop the units that change no equation; return also the numbers that one follows.

    A policy that is rewarded for right steps else writes wrong ones with units, which nobody reads."""
    kinds = "".join("v" if token.kind == "word" and len(token.text) == 1 else token.kind[0] for token in tokens)
    found = [match.span() for match in _UNITS.finditer(kinds)]  # 5 + 3 red apples = 8
    rates = [match for match in _RATE.finditer(kinds) if tokens[match.start(1)].text == "/"
             and not _NO_UNITS & {token.text.lower() for token in tokens[match.start():match.start(1)]}]
    found += [match.span() for match in rates]
    named = {tokens[start - 1] for start, _ in found}
    signs = {m.end(): tokens[m.end()]._replace(kind="op", text="*") for m in rates if tokens[m.end()].text in "xX"}
    for match in _INSIDE.finditer(kinds):  # 4 pens * $3/pen = $12; 5 red apples + 3 red apples
        words, others = ([t.text.lower().rstrip("s") for t in tokens[slice(*match.span(g))]] for g in (1, 3))
        at = match.start(2)
        sign = "*" if tokens[at].text in "xX" else tokens[at].text
        twice = sign == "/" and [t.text for t in tokens[at + 2:at + 3]] == ["/"]  # 2 miles / 1/6 hour
        if words == others if sign in "+-" else (
                sign in "*/" and not twice and words[0] != "of" and not _NO_UNITS & {*words}):
            found.append(match.span(1))
            signs[at] = tokens[at]._replace(kind="op", text=sign)
    dropped = {i for span in found for i in range(*span)}
    return [signs.get(i, token) for i, token in enumerate(tokens) if i not in dropped], named


def _equations(tokens: list[Token]) -> Iterator[Equation]:
    """Yield the neighbours in each chain "a = b = ..." that can be read.

    A side that touches a variable can't, nor a sum of unlike units.
    """
    tokens, named = _without_units(tokens)
    for start, stop in _between(tokens, "word", "break"):
        chain = tokens[start:stop]
        sides = [chain[i:j] for i, j in _between(chain, "eq")]
        if len(sides) == 1:
            continue
        variable = stop < len(tokens) and len(tokens[stop].text) == 1 and tokens[stop].kind == "word"
        if variable and chain[-1].end == tokens[stop].start:
            sides[-1] = []                 # 7x is not 7
        sides[0] = _without_lead(sides[0], tokens[max(0, start - 2):start])
        sides = [_trim(side, first=i == 0, last=i == len(sides) - 1) for i, side in enumerate(sides)]
        parts = _GOES_ON.match("".join(token.text + " " for token in tokens[stop:stop + 6]))
        parts = parts or any(t.text == "*" and t.end - t.start == 2 for t in sides[-1])  # 1/3 of 150
        word = "".join(token.text for token in tokens[max(0, start - 1):start])
        label = len(sides[0]) == 1 and (  # 2 hours = 2 * 60, Day 2 = 3 * 5
            sides[0][0] in named or word[:1].isupper() and word.lower() not in _LEAD_IN)
        for a, b, sign in zip(sides, sides[1:], (token.text for token in chain if token.kind == "eq")):
            if (holds := _agree(a, b, sign)) or holds is False and not (
                    parts and b is sides[-1] or label and a is sides[0]):
                yield Equation(a, b, holds)


def _between(tokens: list[Token], *kinds: str) -> Iterator[tuple[int, int]]:
    """Yield the start and end of what stands between tokens of some kinds."""
    start = 0
    for i, token in enumerate(tokens):
        if token.kind in kinds:
            yield start, i
            start = i + 1
    yield start, len(tokens)


def _without_lead(side: list[Token], before: list[Token]) -> list[Token]:
    """Drop a bullet or bold type; [] where words before change the value, as "half of"."""
    line_start = not before or before[-1].text == "\n"
    for i, token in enumerate(side):
        attached = side[i + 1:i + 2] and side[i + 1].kind == "num" and side[i + 1].start == token.end
        if token.text == "**" or (token.text in "-*" and line_start and not attached):
            continue
        if token.kind == "op":
            signed = token.text == "-" and attached and (line_start or before[-1].text.lower() in _LEAD_IN)
            return side[i:] if signed else []
        if before and before[-1].kind == "word":
            word, scale = before[-1], before[0 if before[-1].text == "of" else -1].text.lower()
            short = len(before) > 1 and before[-2].text in "'\u2019" and before[-2].end == word.start  # that's 3 * 5
            variable = len(word.text) == 1 and word.text not in "aAI" and not short
            if variable or word.end == token.start or (i == 0 and scale in _SCALES):
                return []
        clock = (len(before) > 1 and before[-1].text == ":" and before[-2].kind == "num" and len(token.text) == 2
                 and before[-2].end == before[-1].start == token.start - 1)  # 9:30 + 15
        if len(before) > 1 and before[-1].text == "and" and before[-2].kind == "num" and side[i + 1:i + 2] and (
                side[i + 1].text == "/"):
            return []                   # 1 and 1/4
        inside = before and before[-1].end == token.start and before[-1].text in "_}]@"  # x_1 = 5, f^{-1}(6) = 3
        return [] if clock or inside or before and before[-1].text in _ROOTS else side[i:]
    return []


def _trim(side: list[Token], *, first: bool, last: bool) -> list[Token]:
    """Cut what is outside of unmatched brackets, as in "2) (5 * 3 = 15)"."""
    inside = [i for i, token in enumerate(side) if token.text != "**"] or [len(side)]
    side, opened, closed = side[inside[0]:inside[-1] + 1], [], []          # without bold type
    for i, token in enumerate(side):
        if token.kind == "open":
            opened.append(i)
        elif token.kind == "close" and opened:
            opened.pop()
        elif token.kind == "close":
            closed.append(i)
    if first:
        return side[max([-1, *closed, *opened]) + 1:]
    if last and closed:
        return side[:closed[0]]
    return [] if opened or closed else side


def _agree(a: list[Token], b: list[Token], sign: str) -> bool | None:
    """Tell whether two neighbouring sides are equal; None without an operation."""
    if not any(token.kind == "op" for side in (a, b) for token in side[1:]):
        return None
    left, right = _value(a), _value(b)
    if left is None or right is None:
        return None
    for plain, value, other in ((b, right, left), (a, left, right)):
        if len(plain) == 1:
            digits, percent, _ = plain[0].text.partition("%")
            decimals = len(digits.partition(".")[2])
            slack = Fraction(1, 2 * 10 ** decimals * (100 if percent else 1)) if decimals or sign == "~" else 0
            if abs(value - other) <= slack or percent and abs(value * 100 - other) <= slack * 100:  # 5 / 20 * 100 = 25%
                return True
    return left == right


def check_steps(text: str) -> StepCount:
    """Count the arithmetic equations of a solution and how many hold.

    `a + b = c = d` is one equation per "=" with an operator on a side of it. Decimals may be rounded to the digits
    shown. Sides with variables, sums of unlike units, or anything else that is not arithmetic are left out.
    """
    verdicts = [equation.holds for equation in _equations(_tokens(_normal(text[-MAX_TEXT_CHARS:])))]
    return StepCount(sum(verdicts), len(verdicts))


def equations(text: str) -> list[Equation]:
    """List what check_steps counts; the tokens have offsets in the text, of at most MAX_TEXT_CHARS."""
    normal = _normal(text[:MAX_TEXT_CHARS], spans := [])
    return [Equation(*([t._replace(start=spans[t.start][0], end=spans[t.end - 1][1]) for t in side]
                       for side in equation[:2]), equation.holds) for equation in _equations(_tokens(normal))]


def arithmetic(text: str) -> Fraction | None:
    """Return the value of a text of digits, signs and brackets; None for anything else."""
    return _value(_tokens(_normal(text)))
