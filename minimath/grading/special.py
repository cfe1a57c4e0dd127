"""Read answers that look like arithmetic and are none: times, dates, number bases, choice letters."""
from __future__ import annotations

import re

_CLOCK = re.compile(r"(?:(\d{1,2}):(\d\d)(?::(\d\d))?|(\d{1,2})(?= ?[ap]))\s*(a\.?\s?m|p\.?\s?m|noon|midnight)?\.?(?:"
                    r"\s+(?:o'clock|hours?))?", re.I)
_MONTHS = {name: number for number, name in enumerate(
    "jan feb mar apr may jun jul aug sep oct nov dec".split(), start=1)}
_MONTH = r"(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6}\.?"
_DAY = r"(\d{1,2})(?:st|nd|rd|th)?"
_DATES = [(re.compile(pattern, re.I), order) for pattern, order in (
    (r"(\d{4})[-/](\d{1,2})[-/](\d{1,2})", "ymd"), (rf"{_MONTH} {_DAY}(?:,? (\d{{4}}))?", "mdy"),
    (rf"{_DAY}(?: of)? {_MONTH}(?:,? (\d{{4}}))?", "dmy"), (r"(\d{1,2})[-/.](\d{1,2})[-/.](\d{4})", "123"))]
_BASE = re.compile(r"(-?)\(?\s*([0-9A-Za-z.]{1,40})\s*\)?\s*"
                   r"(?:_\s*\{?\s*(\d{1,2}|[A-Za-z]{3,8})\s*\}?|\(?base (\w{1,8})\)?)", re.I)
_BASES = {name: number for number, name in enumerate("two three four five six seven eight nine ten".split(), start=2)}
_CHOICE = re.compile(r"(?:(?:option|choice|answer) )?(?:\(\s*([A-J])\s*\)|([A-J])(?=$|\s*[).:]))\s*[).:]?\s*(.*)",
                     re.I | re.S)
CHOICE_GOLD = re.compile(r"(?:option |choice )?\(?([A-J])[).:]?\)?", re.I)


def clock(text: str) -> tuple | None:
    """Return hour, minute, second and half of the day of "10:05 a.m.", "15:30"."""
    match = _CLOCK.fullmatch(text)
    if not match:
        return None
    hour, minute, second = int(match[1] or match[4]), int(match[2] or 0), int(match[3] or 0)
    half = (match[5] or "").replace(".", "").replace(" ", "").lower()
    half = {"noon": "pm", "midnight": "am"}.get(half, half)
    if hour > 24 or minute > 59 or second > 59:
        return None
    if not half and (hour > 12 or (match[1] or "").startswith("0")):
        half, hour = "pm" if 12 <= hour < 24 else "am", (hour - 1) % 12 + 1
    return (hour, minute, second, half)


def same_clock(a: tuple, b: tuple) -> bool:
    return a[:3] == b[:3] and (a[3] == b[3] or not a[3] or not b[3])


def date(text: str) -> tuple | None:
    """Return year, month and day of a date; of 5/1/2023 what is written."""
    for pattern, order in _DATES:
        if match := pattern.fullmatch(text):
            values = [_MONTHS.get(part[:3].lower()) or int(part) if part else 0 for part in match.groups()]
            if order == "123":
                return ("order unknown", *values)
            return tuple(dict(zip(order, values))[part] for part in "ymd")
    return None


def in_base(text: str) -> tuple[str, str] | None:
    """Return digits and base of 64_7, 2A_{16}."""
    match = _BASE.fullmatch(text)
    if not match:
        return None
    base, digits = match[3] or match[4], match[2].upper()
    base = str(_BASES.get(base.lower(), base))
    if not base.isdigit() or not 2 <= int(base) <= 36 or not any(sign.isdigit() for sign in digits) and int(base) < 11:
        return None
    if any(sign != "." and int(sign, 36) >= int(base) for sign in digits):
        return None
    return match[1] + (digits.lstrip("0") or "0"), base


def choice(text: str) -> tuple[str, str] | None:
    """Return letter and text behind it of "B", "E: the second law", "B) 12"."""
    match = _CHOICE.fullmatch(text)
    return ((match[1] or match[2]).upper(), match[3].strip()) if match else None
