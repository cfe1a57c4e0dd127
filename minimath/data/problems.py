r"""Make seeded arithmetic word problems of one to three steps, with solutions.

They are the data of `minimath demo`, for a 135M model: operands mostly 2 to 20, results 1 to 199, exact division. A
problem is a scene (a story whose running total goes through events, or a formula with its own steps); its solution is
written in one of three registers, because a policy fitted to one wording has nothing left for RL to choose:

    terse    5*3=15. 15-4=11. \boxed{11}
    plain    one sentence with its equation for each step
    verbose  restates the question, explains each step, mostly checks the last one

Every step is an equation `a op b = c` in all three. README.md says what scenes.json holds.
Train and test never overlap: sha256 of the text without names and pronouns decides the side (see `split_of`)."""
import hashlib
import json
import random
import re
from pathlib import Path
from typing import NamedTuple

from minimath.core.errors import UserError
from minimath.data.examples import Example

SCENES = json.loads(Path(__file__).with_name("scenes.json").read_text(encoding="utf-8"))
EVENTS, STORIES, FORMULAS, WORDING = (SCENES[key] for key in ("events", "stories", "formulas", "solutions"))
NAMES = [(name, sex) for sex in "mf" for name in SCENES["names"][sex]]
STYLE_WEIGHTS = {"terse": 0.25, "plain": 0.35, "verbose": 0.40}
TEST_SHARE_PERCENT = 20  # share of all possible problem texts that is reserved for split="test"
PEOPLE = {name.lower() for name, _ in NAMES} | {"he", "she", "his", "her", "him"}
VERBS = {"+": "add {b} to {a}", "-": "subtract {b} from {a}", "*": "multiply {a} by {b}", "/": "divide {a} by {b}"}
INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}


class Step(NamedTuple):
    """One step a op b = value, and a phrase with a slot {eq} for it."""
    a: int
    op: str
    b: int
    value: int
    phrase: str

    def equation(self, gap: str = " ") -> str:
        return gap.join((str(self.a), self.op, str(self.b), "=", str(self.value)))


Problem = tuple[list[str], list[Step]]  # its sentences, the last of which asks, and the steps that solve it


def make_problems(n: int, *, seed: int, steps: tuple[int, ...] = (1, 2, 3), split: str = "train",
                  style_weights: dict[str, float] = STYLE_WEIGHTS, largest: int = 199) -> list[Example]:
    """Make n distinct problems: same arguments, same problems, everywhere.

    split: "train" or "test". steps: step counts to draw from, each 1, 2 or 3; repeat one to draw it more often.
    style_weights: register -> weight. largest: no step has a greater number. Example.id is
    "<split>-<seed>-<index>-<register>-<steps>". Raises UserError where there are too few problems."""
    if n > 200_000 or largest < 20:
        raise UserError(f"make_problems: n={n}, largest={largest}: there are too few problems; give n up to 200000 and "
                        "largest from 20 on")
    rng = random.Random(f"minimath problems {split} {seed}")
    examples: dict[str, Example] = {}  # by text
    while len(examples) < n:
        sentences, solved = _draw(rng, rng.choice(steps))
        if any(max(step.a, step.b, step.value) > largest for step in solved):
            continue
        text = " ".join(sentences)
        [register] = rng.choices(list(style_weights), list(style_weights.values()))
        if text not in examples and split_of(text) == split:
            name = f"{split}-{seed}-{len(examples)}-{register}-{len(solved)}"
            examples[text] = Example(text, write_solution(sentences, solved, register, rng), str(solved[-1].value),
                                     name, where=f"generated:{name}")
    return list(examples.values())


def canonical(text: str) -> str:
    """Reduce a problem to lower-case words and numbers, without names and pronouns."""
    words = re.findall(r"[a-z]+|\d+", text.lower())
    return " ".join("_" if word in PEOPLE else word for word in words)


def split_of(text: str) -> str:
    """Tell from a problem's text alone its side, "train" or "test"."""
    bucket = int.from_bytes(hashlib.sha256(canonical(text).encode()).digest()[:8], "big") % 100
    return "test" if bucket < TEST_SHARE_PERCENT else "train"


# ---- from a scene to numbers

def apply(a: int, op: str, b: int) -> int | None:
    """Compute a op b; None when it is too hard for a small model."""
    if op == "*" and (min(a, b) not in range(2, 10) or max(a, b) > 20):
        return None
    if op == "/" and (b not in range(2, 11) or a % b or a // b > 30):
        return None
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[op]
    return value if 1 <= value <= 199 else None


def _draw(rng: random.Random, steps: int) -> Problem:
    """Draw scenes and numbers until they fit; about one draw in three fails."""
    formulas, problem = [f for f in FORMULAS if len(f["steps"]) == steps], None
    while problem is None:
        use_formula = rng.random() < len(formulas) / (len(formulas) + len(STORIES))
        problem = _draw_formula(rng, rng.choice(formulas)) if use_formula else _draw_story(rng, steps)
    return problem


def _words(rng: random.Random, scene: dict) -> dict[str, str]:
    """Draw two people, and the words that a scene leaves open."""
    (first, sex), (second, _) = rng.sample(NAMES, 2)
    he, his = ("he", "his") if sex == "m" else ("she", "her")
    return {"A": first, "B": second, "he": he, "his": his,
            **{key: rng.choice(options) for key, options in scene["words"].items()}}


def _draw_formula(rng: random.Random, formula: dict) -> Problem | None:
    """Draw numbers for a formula's variables; None when a step leaves the range."""
    values = {name: rng.randint(low, high) for name, (low, high) in formula["ranges"].items()}
    words, known, results = _words(rng, formula) | values, dict(values), []
    for expression, phrase in formula["steps"]:
        left, op, right = expression.split()
        a, b = (int(x) if x.isdigit() else known[x] for x in (left, right))
        value = known[f"r{len(results) + 1}"] = apply(a, op, b)
        if value is None:
            return None
        results.append(Step(a, op, b, value, phrase.format(**words, eq="{eq}")))
    texts = rng.choice(formula["texts"]), rng.choice(formula["asks"])
    return [_sentence(text.format(**words)) for text in texts], results


def _draw_story(rng: random.Random, steps: int) -> Problem | None:
    """Draw a start, then events; None when the numbers fail."""
    scene = rng.choice(STORIES)
    words = _words(rng, scene)
    question, previous, results = rng.choice(scene["asks"]).format(**words), None, []
    if scene["packs"] and rng.random() < 0.4:
        k, m = rng.randint(2, 9), rng.randint(2, 9)
        text, phrase = (each.format(**words, k=k, m=m, eq="{eq}") for each in rng.choice(scene["packs"]))
        sentences, value = [text], k * m
        question = scene["asks"][0].format(**words) if steps == 1 else question
        results.append(Step(k, "*", m, value, phrase))
    else:
        value = rng.randint(5, 20) if rng.random() < 0.7 else rng.randint(21, 60)
        sentences = [rng.choice(scene["starts"]).format(**words, n=value)]
    while len(results) < steps:
        use_final = len(results) == steps - 1 and scene["finals"] and rng.random() < 0.5
        previous = rng.choice([name for name in scene["finals" if use_final else "events"] if name != previous])
        event, op = EVENTS[previous], EVENTS[previous]["op"]
        fitting = {"+": range(2, 21), "-": range(2, min(20, value - 1) + 1), "*": range(2, 6),
                   "/": [n for n in range(2, 11) if value % n == 0 and value > n]}[op]
        n = rng.choice(fitting) if fitting else 0
        result = n and apply(value, op, n)
        if not result:
            return None
        text = rng.choice(event["texts"]).format(**words, n=n)
        phrase = event["phrase"].format(**words, n=n, state=scene["state"].format(**words, eq="{eq}"), eq="{eq}")
        results.append(Step(value, op, n, result, phrase))
        joiner = rng.choice(("", "", "then ", "later, ", "after that, "))
        sentences.append(("" if "ask" in event else joiner) + text)
        question = event["ask"].format(**words, n=n) if "ask" in event else question
        value = result
    return list(map(_sentence, (*sentences, question))), results


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def write_solution(sentences: list[str], steps: list[Step], register: str, rng: random.Random) -> str:
    """Write a worked solution in a register; it ends with \\boxed{answer}."""
    wording, last = WORDING[register], steps[-1]
    boxed = f"\\boxed{{{last.value}}}"
    if register == "terse":
        gap, between, end = rng.choice(wording["forms"])
        return between.join(step.equation(gap) for step in steps) + end + boxed
    if register == "plain":
        lines = [_sentence(opener + step.phrase.format(eq=step.equation())) + "."
                 for opener, step in zip(rng.choice(wording["openers"]), steps)]
    else:
        *others, number = re.findall(r"\d+", " ".join(sentences))
        known = " and ".join(filter(None, (", ".join(others), number)))
        lines = [rng.choice(wording["openings"]).format(q=sentences[-1], known=known)]
        heads, body = rng.choice(wording["heads"]), rng.choice(wording["bodies"])
        for head, step in zip(heads, steps):
            text = body.format(verb=VERBS[step.op].format(a=step.a, b=step.b), eq=step.equation(),
                               so=step.phrase.format(eq=step.value))
            lines.append(head + (text if head.endswith(", ") else _sentence(text)))
        check = rng.choice(wording["checks"][len(steps) - 1:])  # fewer checks with two steps, none with three
        lines.append(check.format(back=f"{last.value} {INVERSE[last.op]} {last.b} = {last.a}"))
    lines.append(rng.choice(wording["ends"]).format(boxed))
    return rng.choice((" ", "\n")).join(filter(None, lines))
