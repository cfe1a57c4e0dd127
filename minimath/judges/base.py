"""What a judge is, what it is asked, and the judge without a model.

A judge is asked "is the first one better?" and answers with a probability, or with None for no vote. Whoever asks puts
both orders of a pair (compare.both_orders), so that a judge that likes what stands first is worth nothing.
"""
import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from minimath.config.schema import JudgeOptions
from minimath.data.sample import Sample
from minimath.grading.steps import StepCount, check_steps


@dataclass(frozen=True)
class Solution:
    """A text that no policy sampled here, as a judge reads a Sample."""
    text: str
    correct: bool
    tokens: int

    @functools.cached_property
    def steps(self) -> StepCount:
        """Count the arithmetic steps of the text."""
        return check_steps(self.text)


class Pair(NamedTuple):
    """Is `first` the better solution? nonce: the mark of its group, "": its own."""
    problem: str
    first: Sample | Solution
    second: Sample | Solution
    nonce: str = ""


class Judge:
    """Compares pairs of solutions.

    soft: votes are probabilities of a model, not verdicts. pairs, fallback: as the options say. counts: what it did so
    far, by name."""
    name, soft = "", False

    def __init__(self, options: JudgeOptions | None = None, *, say: Callable[[str], None] = print):
        options = options or JudgeOptions()
        self.pairs, self.fallback, self.say = options.pairs, options.fallback, say
        self.counts, self._said = Counter(), set()

    def compare(self, pairs: list[Pair]) -> list[float | None]:
        """Return the probability that `first` is better, or None, for each pair."""
        raise NotImplementedError

    def ping(self) -> None:
        """Raise UserError when the judge can't be used; called before any long work."""

    def say_once(self, kind: str, text: str) -> None:
        """Say a text on the terminal, unless one of its kind was said before."""
        if kind not in self._said:
            self._said.add(kind)
            self.say(text)


class HeuristicJudge(Judge):
    """Correct beats wrong; then the higher share of right steps; then fewer tokens."""
    name = "heuristic"

    def compare(self, pairs: list[Pair]) -> list[float | None]:
        def merit(solution: Sample | Solution) -> tuple[bool, float, int]:
            right, total = solution.steps
            return solution.correct, right / total if total else 0.0, -solution.tokens

        return [0.5 if merit(a) == merit(b) else float(merit(a) > merit(b)) for _, a, b, _ in pairs]
