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
from minimath.grading.steps import check_steps
from minimath.judges.base import Judge, Pair, Solution
from minimath.judges.faults import SIZES
from minimath.judges.poll import ask, in_both_orders, tally
from minimath.judges.rewrite import carry, number_of, put, read, result_edit, shown

KINDS = ("wrong", "wrong_long", "unsound", "long")
BEHIND_THE_VERIFIER = ("unsound", "long")  # both solutions correct: what a judge decides in training
_EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


class KnownPair(NamedTuple):
    """Two solutions of which one is better; kind: the fault of the worse one."""
    kind: str
    problem: str
    better: Sample | Solution
    worse: Sample | Solution


def make_pairs(problems: int, seed: int, kinds: tuple[str, ...] = KINDS) -> list[KnownPair]:
    """Make a pair of each kind for each of some problems, problem by problem."""
    return [KnownPair(kind, example.problem, *(solution(texts[name], example.answer) for name in ("right", kind)))
            for example, texts in faulty_solutions(problems, seed) for kind in kinds]


def solution(text: str, answer: str) -> Solution:
    """Make a text what a judge gets; its length is in words and signs."""
    return Solution(text, extract_answer(text) == answer, length(text))


def length(text: str) -> int:
    """Count words and signs."""
    return len(re.findall(r"\w+|[^\w\s]", text))


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
    reading = read(example.problem, example.solution)
    results = [number_of(line.result.text) for line in reading.lines]
    faults = [(k, size) for k in range(len(results) - 1) for size in SIZES]
    rng.shuffle(faults)
    for k, size in faults:
        line = reading.lines[k]
        word = shown(line.result.text, results[k] + size)
        plain = all(r not in reading.given and results.count(r) == 1 for r in results[k:-1])
        later = reading._replace(numbers=[n for n in reading.numbers if n.start >= line.start])
        wrong = carry(later, k, word, {}) if word and plain else None
        if wrong and reading.lines[-1].result.start in wrong:
            texts = {"right": example.solution, "wrong": put(reading.text, wrong),
                     "unsound": put(reading.text, result_edit(line, word))}
            return texts | {"long": padded(example, texts["right"]), "wrong_long": padded(example, texts["wrong"])}
    return None


def padded(example: Example, solution: str) -> str:
    """Pad a solution: repeat the problem, announce every step, check each that holds."""
    *lines, last = re.split(r"(?<=\.)\s+", solution)
    text = [f"Let us solve this problem step by step. We read it carefully once more: {example.problem} We have to "
            "find the number that the question asks for."]
    for number, line in enumerate(lines, 1):
        a, op, b, value = _EQUATION.search(line).groups()
        text.append(f"Step {number}: In this step we need to {VERBS[op].format(a=a, b=b)}. {line}")
        if check_steps(line).right:
            text.append(f"Let us check this step: {value} {INVERSE[op]} {b} = {a}, which matches.")
    return " ".join([*text, "We have now done all the steps that the problem needs.", last])
