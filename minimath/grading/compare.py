"""Decide whether two answers are one: by their text, as numbers, as objects of parts, last by math-verify.

What one reader has read is never handed on in the hope of another verdict.
"""
import re
from collections.abc import Callable

from minimath.grading.numbers import LABEL, read_number, same_number
from minimath.grading.objects import Parts, RealSet, as_latex, read_objects, same_objects
from minimath.grading.special import SPECIAL_FORMS
from minimath.grading.typeset import key
from minimath.grading.units import Unit, agree, split_unit

MAX_ASKED = 60                # questions to math-verify of one comparison: lists of lists ask many
MAX_CHARS = 2000              # of two typeset answers: unicode fractions grow
MAX_DEPTH = 4                 # of parts of parts
_CONDITION = re.compile(r",?\s+(?:for|where|with) (?:any|all|every|each|some|real|arbitrary|constant)\b.*", re.I)
_PARAMETER = re.compile(r"(?<![\\A-Za-z])([klmn])(?![A-Za-z])")
_INTEGER = re.compile(r"[,;]?\s*(?:(?:where|for|with) )?\(?\s*([klmn])\s*"
                      r"(?:\\in\s*\\mathbb\{Z\}|is an(?:y)? integer)\s*\)?")
_PROSE = re.compile(r"(?<![\\A-Za-z])(?:[A-Za-z]{4,}|[A-Za-z]{2,} [A-Za-z]{2,})")
_LETTERS = re.compile(r"(?=.*[A-Za-z])"             # brackets alone are no words
                      r"(?:\\(?:angle|triangle|overline|vec|widehat|overrightarrow|parallel|perp)|[A-Za-z{}\s'])+")
_PRODUCT = re.compile(r"[abcdfghj-npq-z]{2}")       # xy is yx; no is not on
_THOUSANDS = re.compile(r"(?<=\d)k(?= [a-z]|\Z)")    # K may be kelvin
_INEQUALITY = re.compile(r"[<>]|\\[lg]eq(?![A-Za-z])")
_LEFT_SIDE = re.compile(r"([^=<>]*[A-Za-z][^=<>]*)=")
_EQUATION = re.compile(r"(?<![<>!=\\])=(?!=)")


class Comparison:
    """One comparison of two typeset answers. ask(gold, answer) -> right, wrong, bad gold, late."""

    def __init__(self, ask: Callable[[str, str], str]):
        self.ask, self.asked, self.bad_gold, self.late = ask, 0, False, False

    def same(self, answer: str, gold: str, depth: int = 0) -> bool:
        """Tell whether two texts are the same mathematical object."""
        if depth > MAX_DEPTH or self.late or not answer or not gold or len(answer) + len(gold) > MAX_CHARS:
            return False
        if key(answer) == key(gold):
            return True
        if "..." in answer or "..." in gold:
            return False
        for same_form in SPECIAL_FORMS:
            if (verdict := same_form(answer, gold)) is not None:
                return verdict
        exact, _, rounded = answer.partition("\\approx")
        if exact.strip() and rounded:
            return self._rounded(exact.strip(), rounded.strip(), gold, depth)
        number, gold_number = read_number(answer), read_number(gold)
        number = number or gold_number and read_number(_THOUSANDS.sub("*10^3", answer))  # in a gold 20k, k is a name
        if number and gold_number and not _other_names(answer, gold):
            return same_number(number, gold_number)
        answer, gold = _canonical(answer, gold)
        if key(answer) == key(gold):
            return True
        found, meant = _objects(answer), _objects(gold)
        for one, others, text in ((found, meant, gold), (meant, found, answer)):
            single = next((each.items[0] for each in one if isinstance(each, Parts) and len(each.items) == 1
                           and each.kind in ("set", "list")), None)
            if single and not others and not any(isinstance(each, RealSet) for each in one):
                return self.same(*((single, text) if one is found else (text, single)), depth + 1)
        if found and meant:
            return any(same_objects(a, b, lambda x, y: self.same(x, y, depth + 1)) for a in found for b in meant)
        if (found and gold_number) or (meant and number):
            return False
        for real_set, text in ((found[:1], gold), (meant[:1], answer)):
            if real_set and isinstance(real_set[0], RealSet) and _INEQUALITY.search(text):
                return self._asked(text, as_latex(real_set[0]))     # x^2 < 4 and (-2,2): verify wants it first
        return self._expressions(answer, gold, depth)

    def _rounded(self, exact: str, rounded: str, gold: str, depth: int) -> bool:
        r"""Read 1/3 \approx 0.33, which gives one answer twice."""
        a, b = read_number(exact), read_number(rounded)
        near = a and b and 100 * abs(a.value - b.value) <= abs(a.value)
        if b and (near or not a):
            return self.same(exact, gold, depth + 1) or bool(near) and self.same(rounded, gold, depth + 1)
        return False

    def _expressions(self, answer: str, gold: str, depth: int) -> bool:
        """Compare without units and names; by math-verify unless one is words."""
        (answer, unit), (gold, gold_unit) = _without_unit(answer), _without_unit(gold)
        if not agree(unit, gold_unit):
            return False
        bare, gold_bare = (LABEL.sub("", text, count=1) if LABEL.match(text) else text for text in (answer, gold))
        named = (bare != answer) + (gold_bare != gold)
        if named == 2 and not _other_names(answer, gold) or (
                named == 1 and not _EQUATION.search(bare) and not _EQUATION.search(gold_bare)):
            return self.same(bare, gold_bare, depth + 1)
        if _is_words(answer) or _is_words(gold):
            return False
        return self._asked(gold, answer)

    def _asked(self, gold: str, answer: str) -> bool:
        self.asked += 1
        if self.asked > MAX_ASKED:
            return False
        reply = self.ask(gold, answer)
        self.bad_gold |= reply == "bad gold"
        self.late |= reply == "late"
        return reply == "right"


def _other_names(answer: str, gold: str) -> bool:
    """Tell of equations whether their left sides differ: xy = 1, x + y = 1.

    x = 5 may stand for n = 5.
    """
    sides = [match and key(match[1]) for match in map(_LEFT_SIDE.match, (answer, gold))]
    return bool(all(sides) and sides[0] != sides[1] and (len(sides[0]) > 1 or len(sides[1]) > 1) and not any(
        re.search(r"[A-Za-z]{4,}|\([a-z]\)", side) for side in sides))


def _is_words(text: str) -> bool:
    """Tell whether a text is prose, numbers apart, or letters: CAB is not ABC."""
    text = re.sub(r"\\(?:begin|end)\{\w+\}", "", text).strip()
    if re.search(r"(?<![_^\d.])\d[\d.]* \d", text):
        return True
    return bool(_PROSE.search(text) or _LETTERS.fullmatch(text) and len(text) > 1
                and not _PRODUCT.fullmatch(text.replace(" ", "")) and not re.fullmatch(r"\\[A-Za-z]+", text))


def _objects(text: str) -> list:
    return [] if read_number(text) and not re.match(r"0,", text) else read_objects(text)


def _without_unit(text: str):
    """Return an expression without a unit of the table, and the unit."""
    found = split_unit(text)
    return found if found and found[1].known and not found[1].nouns else (text, Unit())


def _canonical(answer: str, gold: str) -> tuple[str, str]:
    """Drop "for any a" that one side lacks; give a free integer one name on both."""
    conditions = [_CONDITION.search(text) for text in (answer, gold)]
    if any(conditions) and not all(conditions):
        answer, gold = (_CONDITION.sub("", text) for text in (answer, gold))
    letters, texts = [], []
    for text in (answer, gold):
        stated = _INTEGER.search(text)
        texts.append(_INTEGER.sub("", text).strip() if stated else text)
        used = set(_PARAMETER.findall(texts[-1]))
        free = stated or re.search(r"(?<![\\A-Za-z])[klmn]\s*\\pi(?![A-Za-z])|\\pi\s+[klmn](?![A-Za-z])", text)
        letters.append(used.pop() if free and len(used) == 1 else "")
    if all(letters):
        return tuple(_PARAMETER.sub("k", text) for text in texts)
    return answer, gold
