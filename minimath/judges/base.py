"""What a judge is, what it is asked, and the judge without a model.

A judge is asked "is the first one better?" and answers with a probability, or with None for no vote. Whoever asks puts
both orders of a pair (compare.both_orders), so that a judge that likes what stands first is worth nothing.
"""
import functools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from minimath.config.schema import JudgeOptions
from minimath.data.sample import Sample
from minimath.grading.steps import StepCount, check_steps

MOST_STEPS = 64
MOST_LONGER = 4.0
_ENDS = re.compile(r"(?<=[.;!?])(?=\s)|(?=\n)")


@dataclass(frozen=True)
class Solution:
    """What a judge reads: of a Sample the text behind its thought; tokens: of both."""
    text: str
    correct: bool
    tokens: int

    @classmethod
    def of(cls, sample: Sample) -> "Solution":
        return cls(sample.solution, sample.correct, sample.tokens)

    @functools.cached_property
    def steps(self) -> StepCount:
        """The arithmetic steps of the text."""
        return check_steps(self.text)


class Pair(NamedTuple):
    """Is `first` the better solution? nonce: the mark of its group, "": its own.

    kind: the fault of the second one, where it is known to be worse."""
    problem: str
    first: Solution
    second: Solution
    nonce: str = ""
    kind: str = ""

    def both(self) -> tuple["Pair", "Pair"]:
        """The two orders in which it is asked about."""
        return self, self._replace(first=self.second, second=self.first)


class Asked(NamedTuple):
    """Is this solution right and sound? "".join(steps) is its text."""
    problem: str
    steps: tuple[str, ...]


def asked(problem: str, text: str) -> Asked:
    """Ask about a text, cut into steps."""
    return Asked(problem, split_steps(text))


def split_steps(text: str) -> tuple[str, ...]:
    """Cut a text at the ends of sentences and lines, at most MOST_STEPS pieces.

    Nothing is lost: joined, they are the text. A piece without two letters or digits, and the number of a list, belong
    to the piece that follows."""
    steps, held, signs = [], "", 0
    for piece in _ENDS.split(text):
        held += piece  # alone on its line: so Python appends in place
        signs += sum(c.isalnum() for c in piece)
        if len(steps) < MOST_STEPS - 1 and signs > 1 and not (len(held) < 16 and re.fullmatch(r"\s*\d+[.)]", held)):
            steps.append(held)
            held, signs = "", 0
    if held.strip() or held and not steps:
        steps.append(held)
    elif steps:
        steps[-1] += held
    return tuple(steps)


class Judge:
    """Compares pairs of solutions, or grades single ones.

    soft: votes are probabilities of a model, not verdicts. form: pair, single or steps; of the last two, `grade_all`
    works too. pairs, fallback: as the options say. counts: what it did so far, by name. when: a kept reply counts only
    where it was given then: the canary asks the same again, to see whether the judge is another one now. by_rubric:
    judge_rubric decides what it is asked."""
    name, soft, form, when, by_rubric = "", False, "pair", "", False

    def __init__(self, options: JudgeOptions | None = None, *, say: Callable[[str], None] = print):
        options = options or JudgeOptions()
        self.pairs, self.fallback, self.say = options.pairs, options.fallback, say
        self.counts, self._said = Counter(), set()

    def compare(self, pairs: list[Pair]) -> list[float | None]:
        """Return the probability that `first` is better, or None, for each pair."""
        raise NotImplementedError

    def grade_all(self, questions: list[Asked]) -> list[tuple[float | None, list[float] | None]]:
        """Return P(right and sound) of each solution, and of what ends with each step."""
        raise NotImplementedError

    def grade(self, questions: list[Asked]) -> list[float | None]:
        return [grade for grade, _ in self.grade_all(questions)]

    def ping(self) -> None:
        """Raise UserError when the judge can't be used; called before any long work."""

    def say_once(self, kind: str, text: str) -> None:
        """Say a text on the terminal, unless one of its kind was said before."""
        if kind not in self._said:
            self._said.add(kind)
            self.say(text)


def better(a: float | None, b: float | None, tokens_a: int, tokens_b: int) -> float | None:
    """Weigh two grades: P(first is the better solution); None without both.

    Bradley-Terry of strengths odds / length, odds = p / (1 - p) of being right: twice the length costs as much as half
    the odds, but never more than MOST_LONGER: a text of one word is not worth fifty times a solution."""
    if a is None or b is None:
        return None
    a, b = (min(max(p, 1e-6), 1 - 1e-6) for p in (a, b))  # of two that are certain the shorter wins, too
    longer = min(MOST_LONGER, max(1 / MOST_LONGER, max(1, tokens_b) / max(1, tokens_a)))
    one, other = a * (1 - b) * longer, b * (1 - a)
    return one / (one + other)


class HeuristicJudge(Judge):
    """Correct beats wrong; then the higher share of right steps; then fewer tokens."""
    name = "heuristic"

    def compare(self, pairs: list[Pair]) -> list[float | None]:
        def merit(solution: Solution) -> tuple[bool, float, int]:
            right, total = solution.steps
            return solution.correct, right / total if total else 0.0, -solution.tokens

        merits = [(merit(pair.first), merit(pair.second)) for pair in pairs]
        return [0.5 if a == b else float(a > b) for a, b in merits]
