"""Make faults in worked solutions, with equations and without: what a judge is trained on.

A fault is a generator: it reads a right solution and yields drafts, likely ones first, and the first that holds what
it must is the copy. What follows from a fault is computed again (Reading.carry), so that a copy differs from the right
text in its fault and not in how it sounds. Texts are hostile input: at most MAX_CHARS, TRIES attempts of linear time.
"""
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from minimath.data.problems import INVERSE, VERBS
from minimath.grading.answer import extract_answer
from minimath.grading.numbers import plain_number, same_number
from minimath.grading.steps import Token, check_steps
from minimath.judges.base import split_steps
from minimath.judges.rewrite import ENDING, LABEL, SEQUEL, Edits, Line, Reading, number_of, numbers_in, put, read, shown

MAX_CHARS, TRIES = 1 << 14, 12
SIZES = (-10, -5, -3, -2, -1, 1, 2, 3, 5, 10)  # of a mistake
PHRASES = json.loads((Path(__file__).parent / "phrases.json").read_text(encoding="utf-8"))
_TWO = [two.split("/") for two in PHRASES["two ways"]]
_SWAPS = {"larger": "smaller", **dict(_TWO), **{b: a for a, b in _TWO}}
_SWAP = re.compile(rf"\b(?:{'|'.join(sorted(_SWAPS, key=len, reverse=True))})\b")


class Faulty(NamedTuple):
    """A copy with a fault; first_wrong: offset of what is wrong first, None where all is right, if not good."""
    kind: str
    text: str
    first_wrong: int | None


class Draft(NamedTuple):
    """A copy to be made: so many equations must fail in it, and its answer be the same, another, or (None) either."""
    edits: Edits | None
    failing: int = 0
    same: bool | None = True


def make_faults(problem: str, text: str, answer: str, rng: random.Random, kinds: Iterable[str] = ()) -> list[Faulty]:
    """Make a copy with each kind of fault that can be made of a right solution; kinds: () for all.

    None of a text with faults of its own: an equation that fails, or another answer than `answer`, if that is a number.
    """
    right, total = check_steps(text[:MAX_CHARS])
    if right < total or (plain_number(answer) and not same(extract_answer(text), answer)):
        return []
    return [made for kind in kinds or FAULTS if (made := make_fault(kind, problem, text, rng))]


def make_fault(kind: str, problem: str, text: str, rng: random.Random) -> Faulty | None:
    """Make the first draft of a kind that holds what it must; None without any."""
    if not text.strip() or len(text) > MAX_CHARS:
        return None
    for edits, failing, same_answer in FAULTS[kind](read(problem, text), rng):
        if edits and (copy := put(text, edits)) != text:
            right, total = check_steps(copy)
            if total - right == failing and same_answer in (None, same(extract_answer(copy), extract_answer(text))):
                return Faulty(kind, copy, None if kind in ("needless", "repeated", "padding") else min(edits))
    return None


def same(a: str | None, b: str | None) -> bool:
    """Tell whether two answers are the same text or number."""
    x, y = plain_number(a or ""), plain_number(b or "")
    return a == b or bool(x and y and same_number(x, y))


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


# ---- the kinds

def wrong(reading: Reading, rng: random.Random) -> Iterator[Draft]:
    """Turn a + b = c into a + b = c', carried on to the answer; else change the answer wherever it stands."""
    for k, word in drawn(reading, rng, mistakes):
        yield Draft(reading.carry(k, word, {}), failing=1, same=False)
    text, answer, edits = reading.text, extract_answer(reading.text) or "", {}
    opposite = swapped(reading, len(reading.pieces) - 1, rng)
    if "=" not in text and not ENDING.search(text) and opposite:
        yield Draft(opposite, same=None)
        return
    for number in numbers_in(answer)[:1]:
        word = shown(answer[number.start:number.end], number.value + rng.choice(SIZES[5:])) or ""
        spots = [m.start() for m in re.finditer(rf"(?<![\w.]){re.escape(answer)}(?!\w|\.\d)", text)]
        spots = [at for at in spots if at > text.rfind("=") and number.value not in reading.given] or spots[-1:]
        edits = {at + number.start: (at + number.end, word) for at in spots}
    yield from (Draft(some, failing, same=False) for some in (edits, opposite) for failing in (1, 0))


def operation(reading: Reading, rng: random.Random) -> Iterator[Draft]:
    """Turn a - b = c into a + b = c', rightly computed and carried on to a wrong answer."""
    text = reading.text

    def choices(line: Line) -> list[tuple[bool, Token, str, str]]:
        old, tokens = line.value, line.expression
        made = [(t, op, line.computed({t.start: (t.end, op)})) for before, t in zip(tokens, tokens[1:])
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
        yield Draft(reading.carry(k, word, edits), same=False)


def unsound(reading: Reading, rng: random.Random) -> Iterator[Draft]:
    """Turn a + b = c into a + b = c' in one sentence alone, the answer stays right; else swap a word."""
    inside = {t.start for line in reading.lines for t in (*line.expression, line.result)}
    pieces = rng.sample(range(len(reading.pieces) - 1), max(0, len(reading.pieces) - 1))
    for k, word in drawn(reading, rng, mistakes):
        line, old = reading.lines[k], reading.lines[k].value
        end = line.end + 4 if old in reading.given else reading.starts[step(reading, line)[1]]
        again = {n.start: reading.written(n, word) for n in reading.numbers
                 if n.value == old and line.end <= n.start < end and n.start not in inside}
        yield Draft(line.with_result(word) | again, failing=1)
    yield from (Draft(swapped(reading, piece, rng)) for piece in pieces[:TRIES])


def missing(reading: Reading, rng: random.Random) -> Iterator[Draft]:
    """Leave a step out, and compute what follows from its first operand instead, where that is possible."""
    crowd = [line.piece for line in reading.lines]
    steps = [(k, piece) for k, piece in enumerate(crowd) if crowd.count(piece) == 1 and piece < crowd[-1]]
    if not crowd:
        steps = [(-1, piece) for piece in range(1, len(reading.pieces) - 1)]
    for k, piece in rng.sample(steps, min(TRIES, len(steps))):
        begin, after = step(reading, reading.lines[k]) if k >= 0 else (piece, piece + 1)
        edits = reading.without(begin, after)
        if label := LABEL.match(reading.pieces[begin]):        # the labels of later steps count on from it
            for at, words in zip(reading.starts[after:], reading.pieces[after:]):
                if (m := LABEL.match(words)) and int(m[m.lastindex]) > int(label[label.lastindex]):
                    edits[at + m.start(m.lastindex)] = at + m.end(m.lastindex), str(int(m[m.lastindex]) - 1)
        expression = reading.lines[k].expression if k >= 0 else []
        if len(expression) == 3:
            yield Draft(reading.carry(k, expression[0].text, edits), same=None)
        yield Draft(edits, same=None)


def needless(reading: Reading, rng: random.Random) -> Iterator[Draft]:
    """Insert a true equation of numbers that are there, or a remark, that nobody needs."""
    places = reading.gaps()
    for at in rng.sample(places, min(TRIES, len(places))):
        known = reading.given | {n.value for n in reading.numbers if n.start < reading.starts[at]}
        values = sorted(int(value) for value in known if value == int(value) < 1000)
        y, x = sorted(rng.sample(values, 2)) if len(values) > 1 else (2, 3)
        op, terse = rng.choice("+-*"), at and not re.search("[A-Za-z]{2}", reading.pieces[at - 1])
        words = f"{x} {op} {y} = {dict(zip('+-*', (x + y, x - y, x * y)))[op]}"
        if " = " not in reading.text and "=" in reading.text:
            words = words.replace(" ", "")
        if len(values) < 2 and reading.problem.strip():
            words = f"We recall what is given: {split_steps(reading.problem)[0].strip()}"
        elif terse:
            words += re.search(r"[.;,]?\Z", reading.pieces[at - 1].rstrip())[0]
        else:
            words = rng.choice(PHRASES["remarks"]).format(x=x, parity=("even", "odd")[x % 2], eq=words)
        yield Draft(reading.inserted(at, words))


def repeated(reading: Reading, rng: random.Random) -> Iterator[Draft]:
    """Say a step again, in the same words or as c = a + b for a + b = c."""
    pieces, places = reading.pieces, [*reading.gaps(), len(reading.pieces)]
    steps = {line.piece: line for line in reading.lines} or dict.fromkeys(range(len(pieces)))
    for i in rng.sample(sorted(steps), min(TRIES, len(steps))):
        own = pieces[i][label.end():] if (label := LABEL.match(pieces[i])) else pieces[i].strip()
        if re.search("[A-Za-z]{2}", own):
            own = rng.choice(PHRASES["again"]).format(own)
            if (line := steps[i]) and rng.random() < 0.3:
                sides = line.expression[0].start, line.expression[-1].end
                own = f"We have {line.result.text} = {reading.text[slice(*sides)]}."
        later = [at for at in places if i < at and (at < len(pieces) or i == len(pieces) - 1)][:3]
        if later and not ENDING.search(own):
            yield Draft(reading.inserted(rng.choice(later), own))


def padding(reading: Reading, rng: random.Random) -> Iterator[Draft]:
    """Pad to 2 to 4 times the length: the problem again, and talk between the steps."""
    places, length = reading.gaps(), (rng.choice((2, 3, 4)) - 1) * len(reading.text)
    for again in (f"We read the problem carefully once more: {reading.problem[:MAX_CHARS].strip()}", ""):
        talk, edits = [], {}
        while sum(map(len, (again, *talk))) < length:
            talk += rng.sample(PHRASES["talk"], 5)
        for n, at in enumerate(places):
            words = [again] * (n == 0 and bool(again)) + talk[n::len(places)]
            edits |= reading.inserted(at, " ".join(words)) if words else {}
        yield Draft(edits)


def circular(reading: Reading, rng: random.Random) -> Iterator[Draft]:
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
        for assumed in rng.sample(PHRASES["assumed"], len(PHRASES["assumed"])) if answer else PHRASES["claimed"]:
            yield Draft({start: (reading.starts[piece + 1], assumed.format(answer) + words + ".")})


FAULTS = {make.__name__: make for make in (wrong, operation, unsound, missing, needless, repeated, padding, circular)}
