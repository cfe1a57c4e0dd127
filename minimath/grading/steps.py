"""Read arithmetic in worked solutions exactly, and count the steps that hold.

The share of correct steps `a op b = c` is a tripwire, not a quality score: most wrong solutions have correct
arithmetic. Text of a model is hostile input: every function runs in time linear in its length, numbers and powers are
bounded, and nothing is eval'd. Exact throughout (fractions.Fraction).
"""
from __future__ import annotations

import ast
import operator
import re
from fractions import Fraction
from typing import NamedTuple

MAX_TEXT_CHARS = 1 << 20      # of a completion; the end is kept, where the answer is
MAX_DIGITS = 40               # of one number; with MAX_SIDE_TOKENS this bounds every Fraction
MAX_SIDE_TOKENS = 64          # of one side of an equation, so that the parser's depth is bounded too
MAX_POWER_BITS = 4096         # size of any power computed


class StepCount(NamedTuple):
    """Equations of a solution: those that hold, and all that could be read."""
    right: int
    total: int


class Token(NamedTuple):
    kind: str      # "num", "op", "eq", "open", "close", "word", "break"
    text: str
    start: int     # character offsets in the normalised text
    end: int


_SIGNS = {"\u00d7": "*", "\u22c5": "*", "\u00b7": "*", "\u2217": "*", "\u00f7": "/", "\u2044": "/",
          "\u2215": "/", "\u2212": "-", "\u2013": "-", "\u2248": "~", "\u20ac": "$", "\u00a3": "$",
          "\u00a5": "$", "\u00a0": " ", "\u202f": " ", "\u00bd": "(1/2)", "\u00bc": "(1/4)",
          "\u00be": "(3/4)", "\u00b0": ""}
_SIGN_TABLE = str.maketrans(_SIGNS)
_LATEX = [
    # a mixed number, 1\frac{1}{2}
    (re.compile(r"(?<![\d.])(\d{1,6})\\[dt]?frac\s*\{(\d{1,6})\}\s*\{(\d{1,6})\}"), r"(\1+(\2)/(\3))"),
    (re.compile(r"(?<![\d.])(\d{1,6})\\[dt]?frac\s*(\d)\s*(\d)"), r"(\1+(\2)/(\3))"),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]{1,60})\}\s*\{([^{}]{1,60})\}"), r"((\1)/(\2))"),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r"((\1)/(\2))"),
    (re.compile(r"\\(?:times|cdot|ast)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\approx(?![A-Za-z])"), "~"),
    (re.compile(r"\\(?:left|right|quad|qquad|displaystyle)(?![A-Za-z])|\\[,;:! ]|\^\{?\\circ\}?|&"), ""),
    (re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]{0,80})\}"), r" \1 "),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"(\d)\{,\}(\d)"), r"\1,\2"),
    (re.compile(r"\\[\[\]()]"), " "),
]
_TOKEN = re.compile(r"(?P<num>(?:\d+(?:,\d{3})*(?!\d)(?:\.\d+)?|\.\d+)%?)|(?P<op>\*\*|[-+*/^])"
                    r"|(?P<eq>\n?[ \t]*[=~])|(?P<open>\()|(?P<close>\))|(?P<word>[A-Za-z]+)"
                    r"|(?P<skip>[ \t$]+)|(?P<break>.)", re.S)
# what may stand before a negative number that opens a side; elsewhere "-5" subtracts from something unread
_LEAD_IN = {"so", "then", "thus", "is", "hence", "therefore", "and", "get", "have", "gives", ":", ",", "."}
_SCALES = {"half", "twice", "double", "triple", "thrice", "quarter", "third", "tenth", "mod", "sqrt", "log"}


def _tokens(text: str) -> list[Token]:
    """Cut arithmetic text into tokens; "x" and "of" between two numbers are products."""
    text = text.translate(_SIGN_TABLE)
    if "\\" in text or "{" in text or "&" in text:
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
    out: list[Token] = []
    for match in _TOKEN.finditer(text):
        if match.lastgroup != "skip":
            kind, value = match.lastgroup, match.group().strip(" \t\n") or match.group()
            if kind == "num" and len(value) > MAX_DIGITS:
                kind = "break"
            out.append(Token(kind, value, match.start(), match.end()))
    for i in range(1, len(out) - 1):
        between = out[i - 1].kind in ("num", "close") and out[i + 1].kind in ("num", "open")
        if between and out[i].text in ("x", "X", "of"):
            out[i] = out[i]._replace(kind="op", text="*")
    return out


def _number(text: str) -> Fraction:
    value = Fraction(text.rstrip("%").replace(",", ""))
    return value / 100 if text.endswith("%") else value


_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def _value(tokens: list[Token]) -> Fraction | None:
    """Return the value of one side of an equation; None when it is not arithmetic.

    Read are + - * / ^ **, signs, brackets, and "2(3)" as a product. Python's own parser gives the tree.
    """
    if len(tokens) > MAX_SIDE_TOKENS or not {token.kind for token in tokens} <= {"num", "op", "open", "close"}:
        return None
    numbers, words = [], []
    for before, token in zip([None, *tokens], tokens):
        if token.kind == "num":
            words.append(str(len(numbers)))        # its place in numbers
            numbers.append(_number(token.text))
        else:
            product = token.kind == "open" and before is not None and before.kind in ("num", "close")
            words.append("*(" if product else "**" if token.text == "^" else token.text)
    try:
        return _evaluate(ast.parse(" ".join(words), mode="eval").body, numbers)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError):
        return None


def _evaluate(node: ast.expr, numbers: list[Fraction]) -> Fraction:
    """Compute a tree whose constants are places in `numbers`.

    Raises ValueError for what is not arithmetic.
    """
    if isinstance(node, ast.Constant):
        return numbers[node.value]
    if isinstance(node, ast.UnaryOp):
        value = _evaluate(node.operand, numbers)
        return -value if isinstance(node.op, ast.USub) else value
    if not isinstance(node, ast.BinOp):
        raise ValueError("not arithmetic")
    a, b = _evaluate(node.left, numbers), _evaluate(node.right, numbers)
    if not isinstance(node.op, ast.Pow):
        return _OPERATORS[type(node.op)](a, b)
    if b.denominator != 1 or abs(b) * (a.numerator.bit_length() + a.denominator.bit_length()) > MAX_POWER_BITS:
        raise ValueError("power out of bounds")
    return a ** int(b)


def _trim(side: list[Token], *, left: bool, right: bool) -> list[Token]:
    """Cut what is outside brackets that open or close around the whole equation.

    It precedes an unmatched "(" of the first side or follows an unmatched ")" of the last: "(5 * 3 = 15)".
    """
    while side and side[0].text == "**":       # bold type
        side = side[1:]
    while side and side[-1].text == "**":
        side = side[:-1]
    opened, start = [], 0
    for i, token in enumerate(side):
        if token.kind == "open":
            opened.append(i)
        elif token.kind == "close" and opened:
            opened.pop()
        elif token.kind == "close":
            if right:
                return side[:i]
            if not left:
                return []
            start = i + 1                      # "2) 4 + 4 = 8": a list number
    side = side[start:]
    opened = [i - start for i in opened]
    if opened:
        return side[opened[-1] + 1:] if left else []
    return side


def _scales(tokens: list[Token], i: int) -> bool:
    """Tell whether words before token i change its value, as in "half of 10 + 2"."""
    j = i - 2 if tokens[i - 1].text == "of" else i - 1
    return j >= 0 and tokens[j].text.lower() in _SCALES


def _chains(tokens: list[Token]):
    """Yield the sides of each chain "a = b = ..." and the signs between.

    A side that touches anything not understood (a variable, a unit inside) becomes an empty list.
    """
    sides, signs, side = [], [], []
    spoiled, before, i = False, None, 0

    def flush():
        return sides + [[] if spoiled else side], signs

    while i < len(tokens):
        token = tokens[i]
        after = tokens[i + 1] if i + 1 < len(tokens) else None
        if token.kind == "word" and side and side[-1].kind in ("num", "close") and len(token.text) > 1:
            j = i                      # "5 + 3 red apples = 8": the words are a unit when "=" follows them
            while j < len(tokens) and tokens[j].kind == "word" and j - i < 3 and len(tokens[j].text) > 1:
                j += 1
            if j < len(tokens) and tokens[j].kind == "eq":
                i = j
                continue
        if token.kind == "eq":
            sides.append([] if spoiled else side)
            signs.append(token.text)
            side, spoiled = [], False
        elif token.kind in ("word", "break"):
            if token.kind == "word" and len(token.text) == 1 and side and side[-1].end == token.start:
                spoiled = True         # 7x is not 7
            if sides:
                yield flush()
            sides, signs, side, spoiled, before = [], [], [], False, token
        else:
            starts = not side and not sides
            if starts and token.kind == "op":
                attached = after is not None and after.kind == "num" and after.start == token.end
                line_start = before is None or before.text == "\n"
                if token.text == "**" or (token.text in "-*" and not attached and line_start):
                    i += 1             # a bullet, or bold type
                    continue
                negative = token.text == "-" and attached
                spoiled = not (negative and (line_start or before.text.lower() in _LEAD_IN))
            elif starts and before is not None and before.kind == "word":
                lone = len(before.text) == 1 and before.text not in "aAI"
                spoiled = lone or before.end == token.start or _scales(tokens, i)
            side.append(token)
        i += 1
    if sides:
        yield flush()


def _agree(a: list[Token], b: list[Token], sign: str) -> bool | None:
    """Tell whether two neighbouring sides are equal; None without an operation."""
    if not (a and b) or not any(token.kind == "op" for side in (a, b) for token in side[1:]):
        return None
    left, right = _value(a), _value(b)
    if left is None or right is None:
        return None
    for value, plain, other in ((right, b, left), (left, a, right)):
        if len(plain) == 1 and plain[0].text.endswith("%") and value * 100 == other:
            return True                # "5 / 20 * 100 = 25%"
        text = plain[0].text.rstrip("%") if len(plain) == 1 else ""
        decimals = len(text.partition(".")[2])
        if text and (decimals or sign == "~"):
            unit = Fraction(1, 10 ** decimals) / (100 if plain[0].text.endswith("%") else 1)
            if abs(value - other) * 2 <= unit:
                return True
    return left == right


def check_steps(text: str) -> StepCount:
    """Count the arithmetic equations of a solution and how many hold.

    `a + b = c = d` is one equation per "=" with an operator on a side of it. Decimals may be rounded to the digits
    shown. Sides with variables, units in the middle, or anything else that is not arithmetic are left out.
    """
    right = total = 0
    for sides, signs in _chains(_tokens(text[-MAX_TEXT_CHARS:])):
        last = len(sides) - 1
        sides = [_trim(side, left=i == 0, right=i == last) for i, side in enumerate(sides)]
        for a, b, sign in zip(sides, sides[1:], signs, strict=False):
            verdict = _agree(a, b, sign)
            if verdict is not None:
                right, total = right + verdict, total + 1
    return StepCount(right, total)


class Plain(NamedTuple):
    """The exact value of a text that is one number, and how it was written."""
    value: Fraction
    percent: bool
    decimal: bool


_WORD_SCALE = {"hundred": 100, "thousand": 1000, "million": 10 ** 6, "billion": 10 ** 9, "dozen": 12}
_NOT_UNITS = {"pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "mod", "and", "or", "to", "over", "in",
              "if", "times", "plus", "minus", "not", "remainder", "base", "more", "less", "than", "infty",
              "cup", "cap", "pm"}


def plain_number(text: str) -> Plain | None:
    """Read a text that is one number; None for any other, as tuples, roots, prose.

    Read are "18", "-1,200", "$18.00", "18 dollars", "3/4", "\\frac{3}{4}", "x = 5", "50%", "2 * 9 = 18".
    """
    if len(text) > 400 or (text.lstrip(" $\\").startswith("(") and "," in text):
        return None
    text = re.sub(r"^\s*\$?\s*[A-Za-z]\w{0,15}\s*=(?!=)", "", text.strip().rstrip("."))
    tokens = [token for token in _tokens(text) if token.text != "\n"]
    scale, words, percent = 1, 0, False
    while len(tokens) > 1 and tokens[-1].kind == "word" and words < 4:
        word = tokens.pop().text.lower()
        attached = tokens[-1].kind == "num" and len(word) == 1
        if word in _NOT_UNITS or attached or len(word) == 1:
            return None
        scale, words, percent = scale * _WORD_SCALE.get(word, 1), words + 1, percent or word == "percent"
    sides = [[]]
    for token in tokens:
        if token.kind == "eq":
            sides.append([])
        else:
            sides[-1].append(token)
    values = [_value(side) for side in sides]
    if None in values or len(sides) > 8:
        return None                # every side of "2 * 9 = 18" must be arithmetic; the last one is the answer
    last = sides[-1]
    decimal = any("." in token.text for token in last)
    if len(last) == 1 and last[0].text.endswith("%"):
        return Plain(values[-1] * 100, True, decimal)
    return Plain(values[-1] * scale, percent, decimal)


def same_number(a: Plain, b: Plain) -> bool:
    """Compare exactly, or to 6 decimals when only one was written as a decimal.

    "50%" equals "50" and "0.5".
    """
    scaled = [b.value] if a.percent == b.percent else [b.value, b.value / 100 if b.percent else b.value * 100]
    tolerance = Fraction(1, 2 * 10 ** 6) if a.decimal != b.decimal else 0
    return any(abs(a.value - value) <= tolerance for value in scaled)
