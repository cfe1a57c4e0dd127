"""Make faults in worked solutions, with equations and without: what a judge is trained on.

What follows from a fault is computed again (rewrite.carry), so that a copy differs from the right text in its fault and
not in how it sounds. Texts are hostile input: at most MAX_CHARS, and TRIES attempts of linear time.
"""
import functools
import random
import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import NamedTuple

from minimath.data.problems import INVERSE, VERBS
from minimath.grading.answer import extract_answer
from minimath.grading.numbers import plain_number, same_number
from minimath.grading.steps import Token, check_steps
from minimath.judges.base import split_steps
from minimath.judges.rewrite import (
    ENDING,
    LABEL,
    SEQUEL,
    Edits,
    Line,
    Reading,
    carry,
    computed,
    gaps,
    inserted,
    number_of,
    numbers_in,
    put,
    read,
    result_edit,
    shown,
    without,
    written,
)

MAX_CHARS, TRIES = 1 << 14, 12
SIZES = (-10, -5, -3, -2, -1, 1, 2, 3, 5, 10)  # of a mistake
_TWO_WAYS = ("more/less", "greater/smaller", "even/odd", "positive/negative", "increases/decreases", "above/below",
             "increasing/decreasing", "always/never", "maximum/minimum", "rational/irrational", "convex/concave",
             "converges/diverges", "is/is not", "are/are not", "does/does not", "can/cannot")
_SWAPS = {"larger": "smaller"} | {a: b for two in _TWO_WAYS for a, b in (two.split("/"), two.split("/")[::-1])}
_SWAP = re.compile(rf"\b(?:{'|'.join(sorted(_SWAPS, key=len, reverse=True))})\b")
_TALK = ("Let us keep going carefully.", "This is an important part of the solution.", "We take our time here.",
         "Now we can go on to what comes next.", "It is good to write every part down.", "So far, so good.",
         "Let us think about what this means.", "We want to be sure that nothing is missed.",
         "With this in mind, we go on.", "We do one thing after the other.", "That is what the problem tells us to do.")
_REMARKS = ("Note that {x} is an {parity} number.", "Note that {eq}.", "By the way, {eq}.", "For comparison, {eq}.",
            "We could also see that {eq}.", "The order of the numbers in a sum does not matter.")
_AGAIN = ("{}", "To say it again: {}", "Once more: {}")
_ASSUMED = ("Since the answer is {}, ", "The result has to be {}, and so ", "We know that it comes to {}, so ")
_CLAIMED = ("Since what we want to show is true, ",)


class Faulty(NamedTuple):
    """A copy with a fault; first_wrong: offset of what is wrong first, None where all is right, if not good."""
    kind: str
    text: str
    first_wrong: int | None


def make_faults(problem: str, text: str, answer: str, rng: random.Random, kinds: Iterable[str] = ()) -> list[Faulty]:
    """Make a copy with each kind of fault that can be made of a right solution; kinds: () for all.

    None of a text with faults of its own: an equation that fails, or another answer than `answer`, if that is a number.
    """
    right, total = check_steps(text[:MAX_CHARS])
    if right < total or (plain_number(answer) and not same(extract_answer(text), answer)):
        return []
    return [made for kind in kinds or FAULTS if (made := FAULTS[kind](problem, text, rng))]


def same(a: str | None, b: str | None) -> bool:
    """Tell whether two answers are the same text or number."""
    x, y = plain_number(a or ""), plain_number(b or "")
    return a == b or bool(x and y and same_number(x, y))


def copy(reading: Reading, edits: Edits | None, *, failing: int = 0, answer: bool | None = True) -> Faulty | None:
    """Make the copy; None unless so many equations fail, and it has the same answer, or (False) another."""
    if not edits or (text := put(reading.text, edits)) == reading.text:
        return None
    right, total = check_steps(text)
    if total - right != failing or answer not in (None, same(extract_answer(text), extract_answer(reading.text))):
        return None
    return Faulty("", text, min(edits))


def first(copies: Iterable[Faulty | None]) -> Faulty | None:
    return next(filter(None, copies), None)


def drawn(reading: Reading, rng: random.Random, choices: Callable[[Line], list]) -> list[tuple]:
    """Draw at most TRIES pairs: the number of a line, and a choice for it."""
    pairs = [(k, choice) for k in rng.sample(range(len(reading.lines)), min(TRIES, len(reading.lines)))
             for choice in choices(reading.lines[k])]
    return rng.sample(pairs, min(TRIES, len(pairs)))


def mistakes(line: Line) -> list[str]:
    """Write wrong results of a line, SIZES off in the last digit that is not 0."""
    digits = line.result.text.rstrip("%").replace(",", "")
    zeros = max(0, len(digits) - len(digits.rstrip("0")) - 1) if "." not in digits else -len(digits.partition(".")[2])
    words = [shown(line.result.text, number_of(digits) + size * Fraction(10) ** zeros) for size in SIZES]
    return [word for word in words if word]


def announced(line: Line, op: str) -> str:
    """Say in words what a line does; "" for more than one operation."""
    parts = [token.text for token in line.expression]
    return VERBS[op].format(a=parts[0], b=parts[2]) if len(parts) == 3 and op in VERBS else ""


def step(reading: Reading, line: Line) -> tuple[int, int]:
    """Find the first sentence of a line's step, which may announce it, and the end of those that say it again."""
    begin, end = line.piece, line.piece + 1
    said = announced(line, line.expression[1].text) if len(line.expression) > 1 else ""
    if said and begin and said in reading.pieces[begin - 1] and "=" not in reading.pieces[begin - 1]:
        begin -= 1
    while end < len(reading.pieces) - 1 and SEQUEL.match(reading.pieces[end]) and "=" not in reading.pieces[end]:
        end += 1
    return begin, end


def swapped(reading: Reading, piece: int, rng: random.Random) -> Edits:
    """Say the opposite, or another number than the problem's or than an unread equation's."""
    words, start, end = reading.pieces[piece], *reading.starts[piece:piece + 2]
    if "?" in words or words.strip() in reading.problem or any(line.piece == piece for line in reading.lines):
        return {}
    edits = [{start + m.start(): (start + m.end(), _SWAPS[m[0]])} for m in _SWAP.finditer(words) if "=" not in words]
    edits += [{n.start: (n.end, word)} for n in reading.numbers if start <= n.start < end
              and (reading.text[max(0, n.start - 3):n.start].rstrip(" $")[-1:] == "=" if "=" in words
                   else n.value in reading.given)
              and (word := shown(reading.text[n.start:n.end], n.value + rng.choice(SIZES[5:])))]
    return rng.choice(edits) if edits else {}


def wrong(reading: Reading, rng: random.Random) -> Faulty | None:
    """Turn a + b = c into a + b = c', carried on to the answer; else change the answer wherever it stands."""
    if made := first(copy(reading, carry(reading, k, word, {}), failing=1, answer=False)
                     for k, word in drawn(reading, rng, mistakes)):
        return made
    text, answer, edits = reading.text, extract_answer(reading.text) or "", {}
    opposite = swapped(reading, len(reading.pieces) - 1, rng)
    if "=" not in text and not ENDING.search(text) and opposite:
        return copy(reading, opposite, answer=None)
    for number in numbers_in(answer)[:1]:
        word = shown(answer[number.start:number.end], number.value + rng.choice(SIZES[5:])) or ""
        spots = [m.start() for m in re.finditer(rf"(?<![\w.]){re.escape(answer)}(?!\w|\.\d)", text)]
        spots = [at for at in spots if at > text.rfind("=") and number.value not in reading.given] or spots[-1:]
        edits = {at + number.start: (at + number.end, word) for at in spots}
    return first(copy(reading, some, failing=n, answer=False) for some in (edits, opposite) for n in (1, 0))


def operation(reading: Reading, rng: random.Random) -> Faulty | None:
    """Turn a - b = c into a + b = c', rightly computed and carried on to a wrong answer."""
    text = reading.text

    def choices(line: Line) -> list[tuple[bool, Token, str, str]]:
        old, tokens = number_of(line.result.text), line.expression
        made = [(t, op, computed(line, {t.start: (t.end, op)})) for before, t in zip(tokens, tokens[1:])
                if before.kind in ("num", "close") and re.fullmatch(r"\\?[a-z]+|\W", text[t.start:t.end])
                for op in INVERSE if t.text in INVERSE and op != t.text]
        return [(not old / 8 < number_of(word) < old * 8, t, op, word) for t, op, word in made
                if word and number_of(word) != old]

    for k, (_, old, op, word) in sorted(drawn(reading, rng, choices), key=lambda one: one[1][0]):  # no giants first
        line = reading.lines[k]
        sign = r"\times" if op == "*" and r"\times" in text else op
        edits = {old.start: (old.end, sign)}
        if text[:line.start].endswith("<<"):      # GSM8K: 48/2 = $<<48/2=24>>24
            parts = ["[*x\u00d7]" if t.text == "*" else re.escape(t.text) for t in line.expression]
            parts[line.expression.index(old)] = f"({parts[line.expression.index(old)]})"
            begin = max(reading.starts[line.piece], line.start - 200)
            for twin in re.finditer(r"[ $]{0,3}".join(parts), text[begin:line.start]):
                edits[begin + twin.start(1)] = begin + twin.end(1), sign
        said, instead = announced(line, old.text), announced(line, op)
        if said and (at := text.find(said, reading.starts[step(reading, line)[0]], line.start)) >= 0:
            edits[at] = at + len(said), instead
        if made := copy(reading, carry(reading, k, word, edits), answer=False):
            return made
    return None


def unsound(reading: Reading, rng: random.Random) -> Faulty | None:
    """Turn a + b = c into a + b = c' in one sentence alone, the answer stays right; else swap a word."""
    inside = {t.start for line in reading.lines for t in (*line.expression, line.result)}

    def alone(k: int, word: str) -> Edits:
        line, old = reading.lines[k], number_of(reading.lines[k].result.text)
        end = line.end + 4 if old in reading.given else reading.starts[step(reading, line)[1]]
        return result_edit(line, word) | {n.start: written(reading, n, word) for n in reading.numbers if n.value == old
                                          and line.end <= n.start < end and n.start not in inside}

    pieces = rng.sample(range(len(reading.pieces) - 1), max(0, len(reading.pieces) - 1))
    return first(copy(reading, alone(k, word), failing=1) for k, word in drawn(reading, rng, mistakes)) or first(
        copy(reading, swapped(reading, piece, rng)) for piece in pieces[:TRIES])


def missing(reading: Reading, rng: random.Random) -> Faulty | None:
    """Leave a step out, and compute what follows from its first operand instead, where that is possible."""
    crowd = [line.piece for line in reading.lines]
    steps = [(k, piece) for k, piece in enumerate(crowd) if crowd.count(piece) == 1 and piece < crowd[-1]]
    if not crowd:
        steps = [(-1, piece) for piece in range(1, len(reading.pieces) - 1)]
    for k, piece in rng.sample(steps, min(TRIES, len(steps))):
        begin, after = step(reading, reading.lines[k]) if k >= 0 else (piece, piece + 1)
        edits = without(reading, begin, after)
        if label := LABEL.match(reading.pieces[begin]):        # the labels of later steps count on from it
            for at, words in zip(reading.starts[after:], reading.pieces[after:]):
                if (m := LABEL.match(words)) and int(m[m.lastindex]) > int(label[label.lastindex]):
                    edits[at + m.start(m.lastindex)] = at + m.end(m.lastindex), str(int(m[m.lastindex]) - 1)
        expression = reading.lines[k].expression if k >= 0 else []
        carried = carry(reading, k, expression[0].text, edits) if len(expression) == 3 else None
        if made := first(copy(reading, some, answer=None) for some in (carried, edits)):
            return made
    return None


def needless(reading: Reading, rng: random.Random) -> Faulty | None:
    """Insert a true equation of numbers that are there, or a remark, that nobody needs."""
    places = gaps(reading)
    for at in rng.sample(places, min(TRIES, len(places))):
        known = reading.given | {n.value for n in reading.numbers if n.start < reading.starts[at]}
        values = sorted(int(value) for value in known if value == int(value) < 1000)
        y, x = sorted(rng.sample(values, 2)) if len(values) > 1 else (2, 3)
        op, terse = rng.choice("+-*"), at and not re.search("[A-Za-z]{2}", reading.pieces[at - 1])
        told = f"We recall what is given: {split_steps(reading.problem)[0].strip()}" if reading.problem.strip() else ""
        words = f"{x} {op} {y} = {dict(zip('+-*', (x + y, x - y, x * y)))[op]}"
        if " = " not in reading.text and "=" in reading.text:
            words = words.replace(" ", "")
        if len(values) < 2 and told:
            words = told
        elif terse:
            words += re.search(r"[.;,]?\Z", reading.pieces[at - 1].rstrip())[0]
        else:
            words = rng.choice(_REMARKS).format(x=x, parity=("even", "odd")[x % 2], eq=words)
        if made := copy(reading, inserted(reading, at, words)):
            return made
    return None


def repeated(reading: Reading, rng: random.Random) -> Faulty | None:
    """Say a step again, in the same words or as c = a + b for a + b = c."""
    pieces, places = reading.pieces, [*gaps(reading), len(reading.pieces)]
    steps = {line.piece: line for line in reading.lines} or dict.fromkeys(range(len(pieces)))
    for i in rng.sample(sorted(steps), min(TRIES, len(steps))):
        own = pieces[i][label.end():] if (label := LABEL.match(pieces[i])) else pieces[i].strip()
        if re.search("[A-Za-z]{2}", own):
            own = rng.choice(_AGAIN).format(own)
            if (line := steps[i]) and rng.random() < 0.3:
                sides = line.expression[0].start, line.expression[-1].end
                own = f"We have {line.result.text} = {reading.text[slice(*sides)]}."
        later = [at for at in places if i < at and (at < len(pieces) or i == len(pieces) - 1)][:3]
        if made := later and not ENDING.search(own) and copy(reading, inserted(reading, rng.choice(later), own)):
            return made
    return None


def padding(reading: Reading, rng: random.Random) -> Faulty | None:
    """Pad to 2 to 4 times the length: the problem again, and talk between the steps."""
    places, length = gaps(reading), (rng.choice((2, 3, 4)) - 1) * len(reading.text)
    for again in (f"We read the problem carefully once more: {reading.problem[:MAX_CHARS].strip()}", ""):
        talk, edits = [], {}
        while sum(map(len, (again, *talk))) < length:
            talk += rng.sample(_TALK, 5)
        for n, at in enumerate(places):
            words = [again] * (n == 0 and bool(again)) + talk[n::len(places)]
            edits |= inserted(reading, at, " ".join(words)) if words else {}
        if made := copy(reading, edits):
            return made
    return None


def circular(reading: Reading, rng: random.Random) -> Faulty | None:
    """Turn "a = ..., a + b = c" into "since the answer is c, c - b = a": a step takes the answer as known."""
    answer, steps, pieces = extract_answer(reading.text), [], reading.pieces
    for line in reading.lines[-1:] if reading.lines and same(reading.lines[-1].result.text, answer) else []:
        numbers, signs = line.expression[::2], {t.text for t in line.expression[1::2]}
        if len(signs) == 1 and signs <= INVERSE.keys() and {t.kind for t in numbers} == {"num"}:
            earlier = {other.result.text: other.piece for other in reading.lines if other.piece < line.piece}
            op, c, parts = *signs, line.result.text, [t.text for t in numbers]
            for i, part in enumerate(parts):
                rest, turned = parts[:i] + parts[i + 1:], i == 0 or op in "+*"
                back = f" {INVERSE[op]} ".join([c, *rest]) if turned else f" {op} ".join([*rest, c])
                if part in earlier:
                    steps.append((earlier[part], f"{back} = {part}"))
                elif not earlier:
                    steps.append((line.piece, f"{back} = {part}, and so {reading.text[line.start:line.end]}"))
    if not steps and len(answer or "") < 80 and "=" not in (answer or "") and len(pieces) > 1:
        steps = [(rng.randrange(len(pieces) - 1), "this is what we must have here")]
    for piece, words in rng.sample(steps, len(steps)):
        start = reading.starts[piece] + (LABEL.match(pieces[piece]) or re.match(r"\s*", pieces[piece])).end()
        for assumed in rng.sample(_ASSUMED, len(_ASSUMED)) if answer else _CLAIMED:
            edits = {start: (reading.starts[piece + 1], assumed.format(answer) + words + ".")}
            if made := copy(reading, edits):
                return made
    return None


def _of(make: Callable, sound: bool, problem: str, text: str, rng: random.Random) -> Faulty | None:
    made = make(read(problem, text), rng) if text.strip() and len(text) <= MAX_CHARS else None
    return made and made._replace(kind=make.__name__, first_wrong=None if sound else made.first_wrong)


FAULTS: dict[str, Callable[[str, str, random.Random], Faulty | None]] = {
    make.__name__: functools.partial(_of, make, make in (needless, repeated, padding))
    for make in (wrong, operation, unsound, missing, needless, repeated, padding, circular)}
