"""Which problems a step of RL draws: in the order of the data, or where there is something to learn.

A group teaches only when it holds correct and wrong samples. With curriculum=learnable a running solve rate per problem
decides: draws are without replacement in a step, in proportion to the chance that the next group holds both
(`chance_of_both`). Solve rates are kept in both cases: a resume may switch it on.
"""
from typing import NamedTuple

import numpy as np

from minimath.data.batch import stream_indices
from minimath.data.examples import Example
from minimath.data.sample import Group

MEMORY = 0.8  # what a visit leaves of the counts before it: an exponential mean over about the last five groups


class Problem(NamedTuple):
    """A drawn problem; key: the draw's place in the run, which seeds its samples."""
    index: int
    key: int
    example: Example
    prompt: list[int]


class ProblemSampler:
    """Draws problems; remembers the number of draws and decayed counts."""

    def __init__(self, curriculum: str, problems: list[tuple[Example, list[int]]], group_size: int, seed: int):
        self.curriculum, self.problems, self.group_size, self.seed = curriculum, problems, group_size, seed
        self.cursor = 0
        self.counts: dict[int, tuple[float, float]] = {}  # index -> (correct, samples), both decayed

    def draw(self, count: int, taken: list[int]) -> list[Problem]:
        """Draw the next `count` problems, of those in `taken` only if no others are left."""
        size = len(self.problems)
        if self.curriculum == "none":
            chosen = stream_indices(self.cursor, count, size, self.seed)
        else:
            ready = sorted({*range(size)} - {*taken})
            ready += list(dict.fromkeys(taken))[:max(0, count - len(ready))]  # drawn longest ago first
            # the smallest -log u / w: Efraimidis and Spirakis 2006
            weights = np.array([chance_of_both(*self.counts.get(i, (0.0, 0.0)), self.group_size) for i in ready])
            u = np.random.default_rng([self.seed, self.cursor]).random(len(ready))
            order = np.argsort(-np.log1p(-u) / weights, kind="stable")  # 1 - u is in (0, 1]
            chosen = [ready[i] for i in order[:count]]
        drawn = [Problem(i, self.cursor + n, *self.problems[i]) for n, i in enumerate(chosen)]
        self.cursor += len(drawn)
        return drawn

    def record(self, drawn: list[Problem], groups: list[Group]) -> None:
        """Take in how many samples of each problem were correct."""
        for problem, group in zip(drawn, groups, strict=True):
            correct, seen = self.counts.get(problem.index, (0.0, 0.0))
            right = sum(sample.correct for sample in group.samples)
            self.counts[problem.index] = (MEMORY * correct + right, MEMORY * seen + len(group.samples))

    def metrics(self) -> dict:
        """Count the problems seen, and their mean running solve rate."""
        if self.curriculum == "none":
            return {}
        rates = [correct / seen for correct, seen in self.counts.values()]
        return {"curriculum/seen": len(rates), "curriculum/solve_rate": sum(rates) / max(1, len(rates))}

    def state_dict(self) -> dict:
        return {"cursor": self.cursor, "counts": [[i, *counts] for i, counts in self.counts.items()]}

    def load_state_dict(self, state: dict) -> None:
        self.cursor = state["cursor"]
        self.counts = {index: (correct, seen) for index, correct, seen in state["counts"]}


def chance_of_both(correct: float, seen: float, group: int) -> float:
    """Return the chance that a group holds correct and wrong samples.

    The solve rate is Beta(1 + correct, 1 + wrong), so that of all correct is the beta-binomial prod_k (1 + correct + k)
    / (2 + seen + k), k = 0 .. group - 1, that of all wrong likewise."""
    k = np.arange(group)
    every, none = ((1 + n + k) / (2 + seen + k) for n in (correct, seen - correct))
    return float(1 - every.prod() - none.prod())
