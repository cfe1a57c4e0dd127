"""Compare answers that look like arithmetic and are none: choice letters, number bases, dates, times, ratios.

Each function returns a verdict, or None where none of the two typeset answers has its form.
"""
import math
import re
from fractions import Fraction

from minimath.grading.numbers import plain_number, read_number
from minimath.grading.objects import split
from minimath.grading.typeset import key

_LETTER_LIST = re.compile(r"[A-J](?:(?:\s*[,;&]\s*|\s+|,?\s+and\s+)?[A-J]){1,9}")
_CHOICE = re.compile(r"(?:(?:option|choice|answer) )?(?:\(\s*([A-J])\s*\)|([A-J])(?=$|\s*[).:]))\s*[).:]?\s*(.*)",
                     re.I | re.S)
_LETTER = re.compile(r"(?:option |choice )?\(?([A-J])[).:]?\)?", re.I)
_BASE = re.compile(r"(-?)\(?\s*([0-9A-Za-z.]{1,40})\s*\)?\s*"
                   r"(?:_\s*\{?\s*(\d{1,2}|[A-Za-z]{3,8})\s*\}?|\(?base (\w{1,8})\)?)", re.I)
_BASES = "zero one two three four five six seven eight nine ten".split()
_MONTHS = "none jan feb mar apr may jun jul aug sep oct nov dec".split()
_MONTH = rf"({'|'.join(_MONTHS[1:])})[a-z]{{0,6}}\.?"
_DAY = r"(\d{1,2})(?:st|nd|rd|th)?"
_DATES = [(re.compile(pattern, re.I), order) for pattern, order in (
    (r"(\d{4})[-/](\d{1,2})[-/](\d{1,2})", "ymd"), (rf"{_MONTH} {_DAY}(?:,? (\d{{4}}))?", "mdy"),
    (rf"{_DAY}(?: of)? {_MONTH}(?:,? (\d{{4}}))?", "dmy"), (r"(\d{1,2})[-/.](\d{1,2})[-/.](\d{4})", "123"))]
_CLOCK = re.compile(r"(?:(\d{1,2}):(\d\d)(?::(\d\d))?|(\d{1,2})(?= ?[ap]))\s*(a\.?\s?m|p\.?\s?m|noon|midnight)?\.?(?:"
                    r"\s+(?:o'clock|hours?))?", re.I)


def same_choice(answer: str, gold: str) -> bool | None:
    """Compare choices: "B", "E: the second law", "B) 12", "A, C" and AC."""
    if _LETTER_LIST.fullmatch(gold) and _LETTER_LIST.fullmatch(answer) and not gold.isalpha():
        return sorted(re.findall("[A-J]", gold)) == sorted(re.findall("[A-J]", answer))
    choices = [_CHOICE.fullmatch(text) for text in (answer, gold)]
    if not all(choices):
        return None
    (found, words), (meant, gold_words) = (((each[1] or each[2]).upper(), each[3].strip()) for each in choices)
    if gold_words and not gold.lstrip("(").startswith(meant):
        return None
    return found == meant and (not words or bool(_LETTER.fullmatch(gold)) or key(words) == key(gold_words))


def same_base(answer: str, gold: str) -> bool | None:
    """Compare 64_7 and 2A_{16}; the base may be left out by one."""
    found, meant = _in_base(answer), _in_base(gold)
    if not found and not meant:
        return None
    if found and meant:
        return found == meant
    return key(gold if found else answer).upper().lstrip("0") == (found or meant)[0]


def _in_base(text: str) -> tuple[str, int] | None:
    match = _BASE.fullmatch(text)
    if not match:
        return None
    base, digits = (match[3] or match[4]).lower(), match[2].upper()
    base = _BASES.index(base) if base in _BASES else int(base) if base.isdigit() else 0
    if not 2 <= base <= 36 or base < 11 and not any(sign.isdigit() for sign in digits) or any(
            sign != "." and int(sign, 36) >= base for sign in digits):
        return None
    return match[1] + (digits.lstrip("0") or "0"), base


def same_date(answer: str, gold: str) -> bool | None:
    """Compare dates; 5/1/2023 is what is written."""
    found, meant = _date(answer), _date(gold)
    return found == meant if found or meant else None


def _date(text: str) -> list | None:
    for pattern, order in _DATES:
        if match := pattern.fullmatch(text):
            parts = [(part or "0").lower() for part in match.groups()]
            numbers = [_MONTHS.index(part[:3]) if part[:3] in _MONTHS else int(part) for part in parts]
            return [dict(zip(order, numbers)).get(part) for part in "ymd123"]
    return None


def same_time(answer: str, gold: str) -> bool | None:
    """Compare times and ratios: 7:10 is both, 10:05 and 12:30 are times."""
    found, meant = _clock(answer), _clock(gold)
    if found and meant:
        return found[:3] == meant[:3] and (found[3] == meant[3] or not found[3] or not meant[3])
    for time, text, other in ((found, answer, gold), (meant, gold, answer)):
        if time and not any(time[1:3]) and (number := plain_number(other)):  # 5:00 pm and 5
            return number.value == time[0]
        if time and (time[3] or math.gcd(*time[:2]) != 1 or re.search(r":0\d", text)):
            return False
    a, b = _ratio(answer), _ratio(gold)
    if a and b:
        return len(a) == len(b) and all(x * b[0] == y * a[0] for x, y in zip(a, b))
    if not a and not b:
        return None
    ratio, number = a or b, plain_number(gold if a else answer)
    return bool(number and len(ratio) == 2 and ratio[1] and number.value * ratio[1] == ratio[0])


def _clock(text: str) -> tuple[int, int, int, str] | None:
    """Return hour, minute, second and half of the day of "10:05 a.m.", "15:30"."""
    match = _CLOCK.fullmatch(text)
    if not match:
        return None
    hour, minute, second = int(match[1] or match[4]), int(match[2] or 0), int(match[3] or 0)
    half = re.sub(r"[. ]", "", match[5] or "").lower()
    half = {"noon": "pm", "midnight": "am"}.get(half, half)
    if hour > 24 or minute > 59 or second > 59:
        return None
    if not half and (hour > 12 or (match[1] or "").startswith("0")):
        half, hour = "pm" if 12 <= hour < 24 else "am", (hour - 1) % 12 + 1
    return hour, minute, second, half


def _ratio(text: str) -> list[Fraction] | None:
    numbers = [read_number(part) for part in split(re.sub(r"(?<=\d) to (?=\d)", ":", text), ":") or []]
    return [number.value for number in numbers] if len(numbers) > 1 and None not in numbers else None


SPECIAL_FORMS = (same_choice, same_base, same_date, same_time)
