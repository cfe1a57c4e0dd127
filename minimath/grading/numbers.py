"""Read an answer that is one number, whole or not at all, and compare such numbers. Exact (fractions.Fraction)."""
import functools
import math
import re
from fractions import Fraction
from typing import NamedTuple

from minimath.grading.steps import arithmetic
from minimath.grading.typeset import typeset
from minimath.grading.units import Unit, agree, split_unit

MAX_CHARS = 400
MIN_DIGITS = 6                # that a decimal must show to stand for a number that is none
FLOAT_DIGITS = 12             # a decimal with as many was printed by a program: it is rounded itself


class Number(NamedTuple):
    """The value of a text that is one number, and how it was written.

    step: of a decimal the value of its last digit, None for what is exact; digits: those that are shown; scale: the
    million or dozen that is in the value, and that the other side may leave out, as a unit.
    """
    value: Fraction
    percent: bool = False
    step: Fraction | None = None
    digits: int = 0
    unit: Unit = Unit()
    scale: int = 1


SCALES = {"hundred": 100, "thousand": 1000, "million": 10 ** 6, "billion": 10 ** 9, "trillion": 10 ** 12}
_SCALE = re.compile(rf"(?<=[\d)}}])\s*({'|'.join(SCALES)})(?![A-Za-z])", re.I)
_PERCENT = re.compile(r"\s*(?:%|percent\b(?:age)?(?: points?)?|pct\b|per cent\b)", re.I)
NAME = (r"(?:\\?[A-Za-z]+(?:_\{?\w+\}?|')?(?:\([A-Za-z](?:,\s*[A-Za-z])*\))?"                 # x, a_n, f(x)
        r"|\\(?:angle|triangle|overline|vec|hat|bar)\s*\{?[A-Za-z ]+\}?|\|[A-Z]{1,3}\|"
        r"|[A-Za-z]\^\{-1\}\([a-z]\)|\\frac\s*\{d ?\w+\}\{d ?\w\}|[A-Za-z]+(?: [A-Za-z]+){1,4})")
LABEL = re.compile(rf"\s*({NAME})\s*(?<![<>!=\\])=(?!=)\s*")
_SUM_LABEL = re.compile(r"\s*[A-Za-z](?:\s*[-+/]?\s*[A-Za-z]){1,6}\s*=\s*")
_ARITHMETIC = re.compile(r"[-+*/^().\d\s]{1,400}")
_DECIMAL = re.compile(r"[-+]?\s*(\d*)\.(\d+)(?:\s*\*\s*10\^\(?([-+]?\d{1,4})\)?)?")
_DATE = re.compile(r"\d{1,4}([-/])\d{1,2}\1\d{1,4}")


def _repeating(match: re.Match) -> str:
    whole, first, *repeated = match.groups()
    again = repeated[0] or repeated[1] or "".join(part or "" for part in repeated[2:])
    top = int(whole + first + again or 0) - int(whole + first or 0)
    return f"({top}/{(10 ** len(again) - 1) * 10 ** len(first)})"


def _mixed(match: re.Match) -> str:
    whole, *parts = match.groups()
    top, bottom = (part for part in parts if part)
    return f"({whole}+{top}/{bottom})" if int(top) < int(bottom) else "?"


# 1,234,567, 12,34,567 and 1 234; 0,5; 1.5e-7; 0.\overline{3}; 3 1/2; LaTeX, twice for what is nested
_RULES = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"(?<![\d.,])(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d?(?:,\d{2})+,\d{3}|[1-9]\d{0,2}(?: \d{3})+(?!\s?/)"
     r"|[1-9]\d{0,2}(?:, ?0\d{2})+)(?![\d,]|\s\d)", lambda match: re.sub("[, ]", "", match[0])),
    (r"(?<![\d.,])(?:(?:(?<=^)|(?<=^[-+]))0,|([\d,]+)\{,\})(\d+)(?![\d,.]|\s\d)",
     lambda match: f"{match[1] or 0}.{match[2]}"),
    (r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d{1,4})(?![\w.])", r"\1*10^(\2)"),
    (r"(?<![\d.])(\d*)\.(\d*)(?:\\overline\s*\{(\d{1,20})\}|\((\d{1,20})\)|"
     r"\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?)(?!\d)", _repeating),
    (r"(?<![\d.,^_}/\\])(\d{1,12})\s*(?:(?:and )?\\frac\s*\{(\d{1,12})\}\s*\{(\d{1,12})\}|"
     r"(?:(?<=\d) and | )(\d{1,12})\s*/\s*(\d{1,12}))(?![\d/.^])", _mixed),
    *((r"\\frac\s*\{([^{}]{1,80})\}\s*\{([^{}]{1,80})\}", r"((\1)/(\2))"), (r"\^\s*\{([^{}]{1,40})\}", r"^(\1)"),
      (r"\\cdot(?![A-Za-z])", "*"), (r"(?<=\d) [xX] (?=\d)", " * ")) * 2)]


def plain_number(text: str) -> Number | None:
    r"""Read a text that is one number; None for any other, as tuples, roots, prose.

    Read are "18", "-1,200", "$18.00", "18 dollars", "3/4", "2\frac{3}{4}", "x = 5", "50%", "2 * 9 = 18".
    """
    return read_number(typeset(text)) if len(text) <= MAX_CHARS else None


@functools.lru_cache(maxsize=1024)
def read_number(text: str) -> Number | None:
    """Read a typeset text."""
    text = LABEL.sub("", text, count=1) if LABEL.match(text) else _SUM_LABEL.sub("", text, count=1)
    sides = re.split(r"(?<![<>!=])=(?!=)", text)
    if len(sides) > 8:
        return None
    numbers = [_one(side.strip()) for side in sides]
    if None in numbers:
        return None             # every side of "2 * 9 = 18" must be a number; the last one is the answer
    last = numbers[-1]
    units = [number.unit for number in numbers if number.unit != Unit()]
    rounded = last.step / 2 if last.step else 0
    if any(abs(number.value - last.value) > rounded for number in numbers if number.percent == last.percent):
        return None             # 5 = 11/2 is no answer
    return last if last.unit != Unit() or not units else last._replace(unit=units[-1])


def _one(text: str) -> Number | None:
    marks, scales = _PERCENT.findall(text), _SCALE.findall(text)
    text = _SCALE.sub("", text)
    found = split_unit(_PERCENT.sub(" ", text).strip() if marks else text)       # 20% decrease
    if found is None or len(marks) > 1 or _DATE.fullmatch(found[0].strip()):
        return None
    number, unit = _value(found[0]), found[1]
    scale = math.prod(SCALES[word.lower()] for word in scales)
    if unit.known == "dozen":
        scale, unit = 12 * scale, Unit("", unit.nouns)
    return number and _scaled(number, scale)._replace(percent=bool(marks), unit=unit, scale=scale)


def _value(text: str) -> Number | None:
    if text.startswith("(") and "," in text:
        return None                                 # a pair
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    value = arithmetic(re.sub(r"^\s*\+", "", text)) if _ARITHMETIC.fullmatch(text) else None
    match = _DECIMAL.fullmatch(text.strip())
    if value is None or not match:
        return None if value is None else Number(value)
    power = int(match[3] or 0) - len(match[2])
    return Number(value, step=Fraction(10) ** power, digits=len((match[1] + match[2]).lstrip("0")))


def rounds_to(exact: Fraction, decimal: Number) -> bool:
    """Tell whether a decimal is a value, or it rounded to the six or more digits shown."""
    if exact == decimal.value:
        return True
    return bool(decimal.step and decimal.digits >= MIN_DIGITS and decimal.value and exact.denominator != 1
                and 2 * abs(exact - decimal.value) <= decimal.step)


def same_number(a: Number, b: Number) -> bool:
    """Compare exactly, or to the digits of a decimal; 50% equals 50 and 0.5."""
    share = 1 if a.percent == b.percent else Fraction(1, 100) if b.percent else 100
    return agree(a.unit, b.unit) and any(
        _near(first, other) for first in _readings(a, b) for second in _readings(b, a)
        for other in (second, _scaled(second, share)))


def _readings(number: Number, other: Number) -> list[Number]:
    """Return a number, of 4 million also 4, of cents also or only its hundredth."""
    if number.scale != 1 and other.scale == 1:
        return [number, _scaled(number, Fraction(1, number.scale))]
    if number.unit.known != "cent" or other.unit.known == "cent":
        return [number]
    return [_scaled(number, Fraction(1, 100))] + [number] * (not other.unit.known)


def _scaled(number: Number, factor: Fraction) -> Number:
    return number._replace(value=number.value * factor, step=number.step and number.step * factor)


def _near(a: Number, b: Number) -> bool:
    if a.step and b.step:
        fine, coarse = (a, b) if a.step <= b.step else (b, a)
        return a.value == b.value or (fine.digits >= FLOAT_DIGITS and rounds_to(fine.value, coarse))
    return rounds_to(a.value, b) if b.step else rounds_to(b.value, a)
