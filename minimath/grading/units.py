"""Read the words around a number: units, currencies, what is counted.

Two different units are two answers, and so are two different things that are counted; one side may leave them out.
Nothing is converted but cents.
"""
import re
from typing import NamedTuple

_TABLE = """mm millimeter millimetre|cm centimeter centimetre|m meter metre|km kilometer kilometre|in inch inche
ft foot feet|yd yard|mi mile|nm nanometer|g gram gm|kg kilogram kilo kg|mg milligram|t ton tonne|lb pound|oz ounce
s sec second|min minute|h hr hour|ms millisecond|day|week wk|month|year yr|USD dollar $ buck|cent cent penny pennie
EUR euro|GBP quid|INR rupee r rs|JPY yen|L l liter litre|mL ml milliliter millilitre|gal gallon|qt quart|pt pint
tbsp tablespoon|tsp teaspoon|deg degree|rad radian|N newton|J joule|kJ kilojoule|W watt|kW kilowatt|V volt|Hz hertz
Pa pascal|K kelvin|C celsius|F fahrenheit|A amp ampere|acre|ha hectare|mol mole|kcal|cal calorie|bit|byte|dozen"""
_CANONICAL = {alias: words.split()[0] for words in re.split(r"[|\n]", _TABLE) for alias in words.split()}
_COMPOUND = {"mph": "mi/h", "kph": "km/h", "kmph": "km/h", "kmh": "km/h", "mps": "m/s", "fps": "ft/s", "cc": "cm^3",
             "sqft": "ft^2", "sqm": "m^2", "bps": "bit/s", "rpm": "rev/min"}
_CURRENCIES = {"USD", "EUR", "GBP", "JPY", "INR"}
_FILLERS = set("of the a an in total all altogether about unit per each every every and is exactly same over".split())
_BEFORE = re.compile(r"([-+]?)\s*(?:US ?\$|(\$|USD|EUR|GBP|JPY|INR|R[sS]\.?))\s*([-+]?)\s*(?=[\d.(\\])")
_WORD = r"(?:[A-Za-z\u00b5$]+\.?|'s)(?:\s?\^\{?-?\d\}?)?"
_AFTER = re.compile(rf"(.*?(?:[\d)}}%!]|\\pi))((?:\s*/\s*(?=day|min|sec|[A-Za-z]{{4}}))?\s*{_WORD}"      # $8/hour
                    rf"(?:(?:\s*[/\-]\s*|\s*\\cdot\s*|\s+|,\s)(?:{_WORD})){{0,7}})")
_ASIDE = re.compile(r"(?<=[\dA-Za-z}%.])\s+\((?:[A-Za-z][A-Za-z\- ]{2,60}|=[^()]{1,40})\)(?=\s[A-Za-z]|$)")
# 3 times as many, 5 more apples; not 5 more than, 3 times half
_COUNT = re.compile(r"(?<=\d) (?:times(?: (?:as|a|per|each|every) [a-z]+| more)?$|more(?= [a-z]+$|$))", re.I)
# "The answer is 27", "approximately 5"
_LEAD = re.compile(
    r"(?:(?:[A-Za-z,']+ ){0,8}(?:is|are|was|were|equals|gives|costs|has|have|had|makes|gets|needs)\b\s*:?|"
    r"(?:the )?(?:final )?(?:answer|result)\s*:|\\approx|(?:approximately|about|exactly|"
    r"roughly|around|therefore|thus|then|hence|simply|just))\s*(?=\S)",
    re.I)
NOT_UNITS = set("pi sqrt sin cos tan log ln exp mod and or to if times plus minus not no none never remainder base "
                "more less than infty pm out except else when only least most maybe rem r either neither but "
                "without half twice squared false wrong below under negative too short".split())


class Unit(NamedTuple):
    """What stands around a number: a unit of the table ("" for none), and nouns that are counted."""
    known: str = ""
    nouns: frozenset[str] = frozenset()


def split_unit(text: str) -> tuple[str, Unit] | None:
    """Return a text without its unit, and the unit; None where other words are."""
    lead, money = _LEAD.match(text), ""
    if lead and not NOT_UNITS - {"and", "of"} & {*re.findall("[a-z]+", lead[0].lower())}:   # no word changes the value
        text = text[lead.end():]
    text = _COUNT.sub("", _ASIDE.sub("", text))
    if before := _BEFORE.match(text):
        sign = (before[2] or "$").rstrip(".")
        money = _CANONICAL.get(sign.lower(), sign)
        text = before[1] + before[3] + text[before.end():]
    after = _AFTER.fullmatch(text)
    if not after:
        return text, Unit(money)
    if (unit := _unit(after[2])) is None:
        return None
    return after[1], Unit(money + unit.known if unit.known.startswith("/") else unit.known or money, unit.nouns)


def _unit(tail: str) -> Unit | None:
    """Read a phrase as "square inches", "km/h", "miles per hour", "red apples"."""
    words = re.findall(rf"{_WORD}|/", tail)
    if len(words) == 1 and len(tail) == 1 and tail != "$":
        return None                                 # 5m is a product
    parts, nouns, power, below = [], set(), "", False
    for word in words:
        name, _, raised = word.partition("^")
        name = name.strip().rstrip(".")
        lower = name.lower()
        single = lower.removesuffix("s") if len(lower) > 2 else lower
        if lower in NOT_UNITS and lower != "squared":
            return None
        if lower in ("per", "/", "every", "each"):
            below = True
        elif lower in ("square", "sq", "cubic", "cu"):
            power = "^2" if lower[0] == "s" else "^3"
        elif lower == "squared" and parts:
            parts[-1] += "^2"
        elif lower in _COMPOUND:
            parts.append(_COMPOUND[lower])
        elif found := _CANONICAL.get(name) or len(name) > 1 and _CANONICAL.get(single):
            parts.append(("/" if below else "*" if parts else "") + found + (
                f"^{raised.strip('{} ')}" if raised else power))
            power, below = "", False
        elif len(name) == 1 or raised or name.startswith("'"):
            return None
        elif lower not in _FILLERS:
            nouns.add(single)
    return Unit("".join(parts), frozenset(nouns))


def agree(a: Unit, b: Unit) -> bool:
    """Tell whether two units can be of one answer."""
    if a.known and b.known:
        both = {a.known, b.known}
        return len(both) == 1 or both == {"lb", "GBP"} or ("cent" in both and bool(both & _CURRENCIES))
    return not (a.known or a.nouns) or not (b.known or b.nouns) or bool(a.nouns & b.nouns)
