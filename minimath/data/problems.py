r"""Make seeded arithmetic word problems of one to three steps, with solutions.

They are the data of `minimath demo`, for a 135M model that learns them in minutes on a CPU: operands mostly 2 to 20,
results 1 to 199, exact division. A problem is a scene (a story whose running total goes through events, or a formula
with its own steps); its solution is written in one of three registers, because a policy fitted to one wording has
nothing left for RL to choose:

    terse    5*3=15. 15-4=11. \boxed{11}
    plain    one sentence with its equation for each step
    verbose  restates the question, explains each step, mostly checks the last one

Every step is an equation `a op b = c` in all three. scenes.json has names, events of the stories (total op n; one with
`ask` ends the story), stories (a start, or `packs`: a start k * m; texts and phrases go in pairs), and formulas (ranges
of variables, steps "a op b"; r1, r2 are earlier results). Slots: {A}, {B} names; {he}, {his} for A; {n}, {k}, {m} or a
variable for numbers; {eq} the equation or its result. A phrase starts in lower case and has no full stop, so that it
fits after "First, ".
Train and test never overlap: sha256 of the text without names and pronouns decides the side (see `split_of`).
"""
import hashlib
import json
import random
import re
from pathlib import Path
from typing import NamedTuple

from minimath.core.errors import UserError
from minimath.data.examples import Example

SCENES = json.loads(Path(__file__).with_name("scenes.json").read_text(encoding="utf-8"))
EVENTS, STORIES, FORMULAS = SCENES["events"], SCENES["stories"], SCENES["formulas"]
NAMES = [(name, sex) for sex in "mf" for name in SCENES["names"][sex]]
REGISTERS = ("terse", "plain", "verbose")
STYLE_WEIGHTS = {"terse": 0.25, "plain": 0.35, "verbose": 0.40}
TEST_SHARE_PERCENT = 20  # share of all possible problem texts that is reserved for split="test"
PRONOUNS = {"he", "she", "his", "her", "him"}
VERBS = {"+": "add {b} to {a}", "-": "subtract {b} from {a}", "*": "multiply {a} by {b}",
         "/": "divide {a} by {b}"}
INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}


class Step(NamedTuple):
    """One step a op b = value, and a phrase with a slot {eq} for it."""
    a: int
    op: str
    b: int
    value: int
    phrase: str


class Problem(NamedTuple):
    """Problem text without its question, the question, and the steps that solve it."""
    story: str
    question: str
    steps: list[Step]


def make_problems(n: int, *, seed: int, steps: tuple[int, ...] = (1, 2, 3), split: str = "train",
                  style_weights: dict[str, float] | None = None, largest: int = 199) -> list[Example]:
    """Make n distinct problems: same arguments, same problems, everywhere.

    split: "train" or "test". steps: step counts to draw from, each 1, 2 or 3; repeat one to draw it more often.
    style_weights: register -> weight, default STYLE_WEIGHTS. largest: no step has a greater number, at least 20.
    Example.id is "<split>-<seed>-<index>-<register>-<steps>". Raises UserError on a bad argument.
    """
    weights = STYLE_WEIGHTS if style_weights is None else style_weights
    _check_arguments(n, steps, split, weights, largest)
    rng = random.Random(f"minimath problems {split} {seed}")
    seen: set[str] = set()
    examples: list[Example] = []
    while len(examples) < n:
        problem = _draw(rng, rng.choice(steps))
        if any(max(step.a, step.b, step.value) > largest for step in problem.steps):
            continue
        text = f"{problem.story} {problem.question}"
        register = rng.choices(list(weights), list(weights.values()))[0]
        if text in seen or split_of(text) != split:
            continue
        seen.add(text)
        ident = f"{split}-{seed}-{len(examples)}-{register}-{len(problem.steps)}"
        examples.append(Example(problem=text, solution=write_solution(problem, register, rng),
                                answer=str(problem.steps[-1].value), id=ident, where=f"generated:{ident}"))
    return examples


def _check_arguments(n: int, steps: tuple[int, ...], split: str, weights: dict[str, float],
                     largest: int) -> None:
    if n < 0 or n > 200_000:
        raise UserError(f"make_problems: n={n} is outside 0..200000; give a number of problems in this range")
    if not steps or any(s not in (1, 2, 3) for s in steps):
        raise UserError(f"make_problems: steps={steps!r}; give one or more of 1, 2, 3")
    if split not in ("train", "test"):
        raise UserError(f"make_problems: split={split!r}; give 'train' or 'test'")
    if largest < 20:
        raise UserError(f"make_problems: largest={largest} leaves too few problems; give 20 or more")
    unknown = set(weights) - set(REGISTERS)
    if unknown or not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise UserError(f"make_problems: style_weights={weights!r}; give {REGISTERS} weights >= 0, not all 0")


def canonical(text: str) -> str:
    """Reduce a problem to lower-case words and numbers, without names and pronouns."""
    names = {name.lower() for name, _ in NAMES}
    words = re.findall(r"[a-z]+|\d+", text.lower())
    return " ".join("_" if w in names or w in PRONOUNS else w for w in words)


def split_of(text: str) -> str:
    """Tell from a problem's text alone its side, "train" or "test"."""
    bucket = int.from_bytes(hashlib.sha256(canonical(text).encode()).digest()[:8], "big") % 100
    return "test" if bucket < TEST_SHARE_PERCENT else "train"


def assert_disjoint(train: list[Example], test: list[Example]) -> None:
    """Raise UserError when a test problem, apart from names, is also a train problem."""
    known = {canonical(e.problem): e for e in train}
    for example in test:
        if (other := known.get(canonical(example.problem))) is not None:
            raise UserError(f"held-out problem {example.id or example.where} is the same as training problem "
                            f"{other.id or other.where} ({example.problem[:80]!r}); remove it from one set")


# ---- from a scene to numbers

def apply(a: int, op: str, b: int) -> int | None:
    """Compute a op b; None when it is too hard for a small model."""
    if op == "*" and (min(a, b) > 9 or max(a, b) > 20 or min(a, b) < 2):
        return None
    if op == "/" and (b < 2 or a % b or b > 10 or a // b > 30):
        return None
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[op]
    return value if 1 <= value <= 199 else None


def _draw(rng: random.Random, steps: int) -> Problem:
    """Draw scenes and numbers until they fit; about one draw in three fails."""
    while True:
        formulas = [f for f in FORMULAS if len(f["steps"]) == steps]
        use_formula = rng.random() < len(formulas) / (len(formulas) + len(STORIES))
        problem = _draw_formula(rng, rng.choice(formulas)) if use_formula else _draw_story(rng, steps)
        if problem is not None:
            return problem


def _people(rng: random.Random) -> dict[str, str]:
    (first, sex), (second, _) = rng.sample(NAMES, 2)
    he, his = ("he", "his") if sex == "m" else ("she", "her")
    return {"A": first, "B": second, "he": he, "his": his}


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _draw_formula(rng: random.Random, formula: dict) -> Problem | None:
    """Draw numbers for a formula's variables; None when a step leaves the range."""
    values = {name: rng.randint(low, high) for name, (low, high) in formula["ranges"].items()}
    words = {**_people(rng), **{key: rng.choice(options) for key, options in formula["words"].items()}}
    results: list[Step] = []
    for expression, phrase in formula["steps"]:
        left, op, right = expression.split()
        known = {**values, **{f"r{i + 1}": s.value for i, s in enumerate(results)}}
        a, b = (int(x) if x.isdigit() else known[x] for x in (left, right))
        value = apply(a, op, b)
        if value is None:
            return None
        results.append(Step(a, op, b, value, phrase.format(**words, **values, eq="{eq}")))
    story = rng.choice(formula["texts"]).format(**words, **values)
    return Problem(_sentence(story), _sentence(rng.choice(formula["asks"]).format(**words, **values)), results)


def _draw_story(rng: random.Random, steps: int) -> Problem | None:
    """Draw a start, then events; None when the numbers fail."""
    scene = rng.choice(STORIES)
    words = {**_people(rng), **{key: rng.choice(options) for key, options in scene["words"].items()}}
    question, previous = rng.choice(scene["asks"]).format(**words), None
    results: list[Step] = []
    if scene["packs"] and rng.random() < 0.4:
        k, m = rng.randint(2, 9), rng.randint(2, 9)
        text, phrase = rng.choice(scene["packs"])
        sentences = [text.format(**words, k=k, m=m)]
        question = scene["asks"][0].format(**words) if steps == 1 else question
        value = k * m
        results.append(Step(k, "*", m, value, phrase.format(**words, k=k, m=m, eq="{eq}")))
    else:
        value = rng.randint(5, 20) if rng.random() < 0.7 else rng.randint(21, 60)
        sentences = [rng.choice(scene["starts"]).format(**words, n=value)]
    while len(results) < steps:
        last = len(results) == steps - 1
        use_final = last and scene["finals"] and rng.random() < 0.5
        previous = rng.choice([name for name in scene["finals" if use_final else "events"] if name != previous])
        event = EVENTS[previous]
        n = _operand(rng, value, event["op"])
        result = n and apply(value, event["op"], n)
        if not result:
            return None
        text = rng.choice(event["texts"]).format(**words, n=n)
        phrase = event["phrase"].format(**words, n=n, state=scene["state"].format(**words, eq="{eq}"), eq="{eq}")
        results.append(Step(value, event["op"], n, result, phrase))
        joiner = rng.choice(("", "", "then ", "later, ", "after that, "))
        sentences.append(("" if "ask" in event else joiner) + text)
        question = event["ask"].format(**words, n=n) if "ask" in event else question
        value = result
    return Problem(" ".join(map(_sentence, sentences)), _sentence(question), results)


def _operand(rng: random.Random, value: int, op: str) -> int | None:
    """Draw the n of `value op n`; None when there is none."""
    if op == "-":
        return rng.randint(2, min(20, value - 1)) if value > 2 else None
    if op == "/":
        divisors = [d for d in range(2, 11) if value % d == 0 and value > d]
        return rng.choice(divisors) if divisors else None
    return rng.randint(2, 5) if op == "*" else rng.randint(2, 20)


# ---- from numbers to a worked solution

def write_solution(problem: Problem, register: str, rng: random.Random) -> str:
    """Write a worked solution in a register; it ends with \\boxed{answer}."""
    return {"terse": _terse, "plain": _plain, "verbose": _verbose}[register](problem, rng)


def _equation(step: Step, gap: str = " ") -> str:
    return gap.join((str(step.a), step.op, str(step.b), "=", str(step.value)))


def _boxed(problem: Problem) -> str:
    return f"\\boxed{{{problem.steps[-1].value}}}"


def _terse(problem: Problem, rng: random.Random) -> str:
    gap, between, end = rng.choice((("", ". ", ". "), ("", "; ", ". "), (" ", "\n", "\n"), ("", "\n", "\n"),
                                    (" ", ". ", ". "), ("", ". ", ". So "), ("", "; ", ". Answer: ")))
    return between.join(_equation(s, gap) for s in problem.steps) + end + _boxed(problem)


def _plain(problem: Problem, rng: random.Random) -> str:
    openers = rng.choice((("", "", ""), ("First, ", "Then, ", "Finally, "), ("", "Next, ", "Then "),
                          ("To start, ", "Next, ", "Then, "), ("We see that ", "So ", "Now ")))
    lines = [_sentence(opener + step.phrase.format(eq=_equation(step))) + "."
             for opener, step in zip(openers, problem.steps)]
    end = rng.choice(("The answer is {}.", "So the answer is {}.", "The final answer is {}.",
                      "This gives {}.", "The result is {}.", "Final answer: {}"))
    return rng.choice((" ", "\n")).join([*lines, end.format(_boxed(problem))])


def _verbose(problem: Problem, rng: random.Random) -> str:
    known = _known_numbers(problem)
    opening = rng.choice((
        "Let us solve this problem step by step. The question is: {q}",
        "To solve this, we go through the story one event at a time. {q}",
        "Let's break the problem down into small parts. We have to find out: {q}",
        "First we read the problem carefully. The numbers that matter are {known}. {q}",
        "The problem gives us the numbers {known}, and it asks: {q}",
    )).format(q=problem.question, known=known)
    heads = rng.choice((("Step 1: ", "Step 2: ", "Step 3: "), ("First, ", "Second, ", "Third, "),
                        ("To begin, ", "Next, ", "After that, "), ("1. ", "2. ", "3. ")))
    body = rng.choice(("we {verb}: {eq}. This means {so}.", "we need to {verb}. We get {eq}, so {so}.",
                       "we {verb}, which gives {eq}. Now we know that {so}."))
    lines = [head + _sentence_after(head, body.format(verb=VERBS[s.op].format(a=s.a, b=s.b), eq=_equation(s),
                                                      so=s.phrase.format(eq=s.value)))
             for head, s in zip(heads, problem.steps)]
    last = problem.steps[-1]
    back = f"{last.value} {INVERSE[last.op]} {last.b} = {last.a}"
    check = rng.choice((f"Let us check the last step: {back}, which is correct.",
                        f"We can check this: {back}. That matches.", "")[len(lines) - 1:])
    end = rng.choice(("Therefore, the final answer is {}.", "So the answer to the question is {}.",
                      "That is everything we need, and the final answer is {}.")).format(_boxed(problem))
    return rng.choice((" ", "\n")).join(part for part in (opening, *lines, check, end) if part)


def _sentence_after(head: str, text: str) -> str:
    return text if head.rstrip().endswith(",") else _sentence(text)


def _known_numbers(problem: Problem) -> str:
    """List the numbers of the problem text in order, as "5, 3 and 4"."""
    numbers = re.findall(r"\d+", f"{problem.story} {problem.question}")
    return ", ".join(numbers[:-1]) + " and " + numbers[-1] if len(numbers) > 1 else numbers[0]
