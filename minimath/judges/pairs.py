"""Pairs of solutions of which one is better by construction.

A plain correct solution of a made problem stands against one with a fault, its kind:

    wrong       one intermediate result is wrong and carried on to a wrong answer; same words, same length
    wrong_long  the same fault in a padded solution: a judge that likes length falls for it
    unsound     one step is wrong, the final answer is correct
    long        correct and sound, padded to several times the length
"""
import random
import re
from collections.abc import Callable
from typing import NamedTuple

from minimath.data.examples import Example
from minimath.data.problems import INVERSE, VERBS, make_problems
from minimath.data.sample import Sample
from minimath.grading.answer import extract_answer
from minimath.judges.base import Judge, Pair, Solution
from minimath.judges.poll import ask, in_both_orders, tally

KINDS = ("wrong", "wrong_long", "unsound", "long")
BEHIND_THE_VERIFIER = ("unsound", "long")  # both solutions correct: what a judge decides in training
_EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
_SIZES = (-10, -5, -3, -2, -1, 1, 2, 3, 5, 10)  # of a mistake


class KnownPair(NamedTuple):
    """Two solutions of which one is better; kind: the fault of the worse one."""
    kind: str
    problem: str
    better: Sample | Solution
    worse: Sample | Solution


class Step(NamedTuple):
    """One equation a op b = value of a solution, true or not."""
    a: int
    op: str
    b: int
    value: int


def compute(a: int, op: str, b: int) -> int | None:
    """Compute a op b; None unless it is a whole number above 0."""
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else 0}[op]
    return int(value) if value > 0 and value == int(value) else None


def make_pairs(problems: int, seed: int, kinds: tuple[str, ...] = KINDS) -> list[KnownPair]:
    """Make a pair of each kind for each of some problems, problem by problem."""
    return [KnownPair(kind, example.problem, *(solution(texts[name], example.answer) for name in ("right", kind)))
            for example, texts in faulty_solutions(problems, seed) for kind in kinds]


def solution(text: str, answer: str) -> Solution:
    """Make a text what a judge gets; its length is in words and signs."""
    return Solution(text, extract_answer(text) == answer, len(re.findall(r"\w+|[^\w\s]", text)))


def judge_known(judge: Judge, pairs: list[KnownPair],
                advance: Callable[[int], None] = lambda n: None) -> dict[str, dict]:
    """Ask whether the better ones win: poll.tally by kind, and of "all" with `error`."""
    votes, error = ask(judge, in_both_orders([Pair(p.problem, p.better, p.worse) for p in pairs]), advance, chunk=32)
    by_kind: dict[str, list] = {}
    for pair, forward, backward in zip(pairs, votes[::2], votes[1::2], strict=True):
        by_kind.setdefault(pair.kind, []).extend((forward, backward))
    return {kind: tally(own, judge.soft) for kind, own in by_kind.items()} | {
        "all": tally(votes, judge.soft) | {"error": error}}


def faulty_solutions(count: int, seed: int) -> list[tuple[Example, dict[str, str]]]:
    """Make problems, each with its solutions by kind of fault; "right" has none."""
    drawn, found = 2 * count, []
    while len(found) < count:  # about every second problem has numbers that allow an unambiguous fault
        rng = random.Random(f"minimath judge pairs {seed}")
        examples = make_problems(drawn, seed=seed, steps=(2, 2, 3), split="test", style_weights={"plain": 1.0})
        found = [(e, texts) for e in examples if (texts := solutions_of(e, rng)) is not None][:count]
        drawn *= 2
    return found


def solutions_of(example: Example, rng: random.Random) -> dict[str, str] | None:
    """Make the solutions by kind of fault; None where no fault is unambiguous."""
    steps = [Step(int(a), op, int(b), int(c)) for a, op, b, c in _EQUATION.findall(example.solution)]
    faults = [(k, size) for k in range(len(steps) - 1) for size in _SIZES]
    rng.shuffle(faults)
    for k, size in faults:
        if wrong := carried_on(example.problem, steps, k, size):
            unsound = [*steps[:k], wrong[k], *steps[k + 1:]]
            return {"right": example.solution, "wrong": with_steps(example.solution, wrong),
                    "unsound": with_steps(example.solution, unsound), "long": padded(example, steps),
                    "wrong_long": padded(example, wrong)}
    return None


def carried_on(problem: str, steps: list[Step], k: int, size: int) -> list[Step] | None:
    """Set the result of step k off by `size`, and compute every later one from it.

    None without whole numbers above 0 and a wrong answer, or when it is not plain which later number is the result."""
    given = set(map(int, re.findall(r"\d+", problem)))
    results = [step.value for step in steps]
    if any(r in given or results.count(r) > 1 for r in results[k:-1]) or steps[k].value + size <= 0:
        return None
    changed, out = {steps[k].value: steps[k].value + size}, [*steps[:k], steps[k]._replace(value=steps[k].value + size)]
    for step in steps[k + 1:]:
        a, b = changed.get(step.a, step.a), changed.get(step.b, step.b)
        value = compute(a, step.op, b)
        if value is None:
            return None
        if value != step.value:
            changed[step.value] = value
        out.append(Step(a, step.op, b, value))
    return out if out[-1].value != steps[-1].value else None


def with_steps(solution: str, steps: list[Step]) -> str:
    """Replace the equations and the final answer of a solution."""
    equations = iter(steps)
    text = _EQUATION.sub(lambda _: "{} {} {} = {}".format(*next(equations)), solution)
    return re.sub(r"\\boxed\{\d+\}", lambda _: f"\\boxed{{{steps[-1].value}}}", text)


def padded(example: Example, steps: list[Step]) -> str:
    """Pad a solution: repeat the problem, announce every step, check each that holds."""
    *lines, last = re.split(r"(?<=\.)\s+", with_steps(example.solution, steps))
    text = [f"Let us solve this problem step by step. We read it carefully once more: {example.problem} We have to "
            "find the number that the question asks for."]
    for number, (line, step) in enumerate(zip(lines, steps, strict=True), 1):
        text.append(f"Step {number}: In this step we need to {VERBS[step.op].format(a=step.a, b=step.b)}. {line}")
        if compute(*step[:3]) == step.value:
            text.append(f"Let us check this step: {step.value} {INVERSE[step.op]} {step.b} = {step.a}, which matches.")
    return " ".join([*text, "We have now done all the steps that the problem needs.", last])
