"""Length control: how short each correct sample is for its problem, and how much that counts.

Wrong samples have no length: penalising theirs ends in collapse (ACOER, arXiv 2606.22716). n are the lengths of a
group's correct samples, in tokens, with brevity_counts=thought of their thoughts alone; L is max_new_tokens; y is the
yardstick, mean n (or min n).
"""
from __future__ import annotations

import math
import statistics

import numpy as np

from minimath.config.rl_options import BrevityOptions
from minimath.data.sample import Group, Sample
from minimath.train.best import standard_error

CONCAVE = 5.0  # of `log`, as ACOER's code has it
DEAD_ZONE = 0.05  # of the yardstick, by which a length differs without being another: 40 against 41 tokens is nothing
LEAST_CORRECT = 0.25  # share of a group, below which a controlled weight is 0: first let it be solved
RISE, MARGIN = 0.1, 0.02  # of a controlled weight in a step, of brevity_weight; drop of accuracy that makes it fall
RUNNING, LONG = 0.7, 0.95  # what a step leaves of the means before it: over about the last 6 and 40 steps
SIGMAS = 1.5  # standard errors of a drop that is none
FIRST_STEPS = 3  # in which the weight does not rise


# ---- the terms: lengths of the correct samples (C,) -> scores (C,) in [-1, 1]

def ratio(n: np.ndarray, options: BrevityOptions) -> np.ndarray:
    """Score the share saved of the yardstick.

    l = sign(e) max(0, |e| - DEAD_ZONE), e = clip(1 - n / y, -1, 1). Relative to the group's
    mean length as in GR3 (arXiv 2603.10535, whose form is the factor 1 / (1 + a n / y))."""
    saved = np.clip(1 - n / yardstick(n, options), -1, 1)
    return np.sign(saved) * np.maximum(0, np.abs(saved) - DEAD_ZONE)


def log(n: np.ndarray, options: BrevityOptions) -> np.ndarray:
    """Score the share saved, ever less for a further token.

    l = log(1 + 5 e) / log 6, e = max(0, 1 - n / y - DEAD_ZONE): ACOER's concave form (arXiv 2606.22716), with the
    group's yardstick in place of a running budget. 0 from the yardstick on."""
    return np.log1p(CONCAVE * np.maximum(0, 1 - n / yardstick(n, options) - DEAD_ZONE)) / math.log1p(CONCAVE)


def cosine(n: np.ndarray, longest: int) -> np.ndarray:
    """Score by half a wave over max_new_tokens: l = cos(pi min(1, n / L)); arXiv 2502.03373, as the paper's reward."""
    return np.cos(np.pi * np.minimum(1, n / longest))


def minmax(n: np.ndarray) -> np.ndarray:
    """Score the shortest +1, the longest -1: l = 1 - 2 (n - min) / (max - min), 0 if all are equally long."""
    low, high = n.min(), n.max()
    return np.zeros(len(n)) if low == high else 1.0 - 2.0 * (n - low) / (high - low)


def alp(n: np.ndarray, longest: int, solved: float) -> np.ndarray:
    """Punish length by how easy the problem is: l = -solved min(1, n / L), solved the share of the group that is
    correct; ALP, arXiv 2506.05256."""
    return -solved * np.minimum(1, n / longest)


def yardstick(n: np.ndarray, options: BrevityOptions) -> float:
    return n.mean() if options.yardstick == "mean" else n.min()


def brevity(samples: list[Sample], options: BrevityOptions, longest: int) -> list[float]:
    """Score a group's samples by the term that the options name; 0.0 for wrong ones.

    All 0.0 for truncate, where max_new_tokens falls instead (DLER, arXiv 2510.15110), and under control where few are
    correct (as GRPO-lambda, arXiv 2505.18086, does). longest: max_new_tokens."""
    n = np.array([s.thought if options.counts == "thought" else s.tokens for s in samples if s.correct], dtype=float)
    solved = len(n) / len(samples)
    few = options.control != "none" and solved < LEAST_CORRECT
    if not n.any() or few or options.name == "truncate":  # nor is there a thought to shorten
        return [0.0] * len(samples)
    terms = {"ratio": lambda: ratio(n, options), "log": lambda: log(n, options), "cosine": lambda: cosine(n, longest),
             "minmax": lambda: minmax(n), "alp": lambda: alp(n, longest, solved)}
    scores = iter(terms[options.name]().tolist())
    return [next(scores) if s.correct else 0.0 for s in samples]


# ---- how much it counts

class BrevityControl:
    """Weighs brevity: constant, or rising while the accuracy of the rollouts holds.

    control=accuracy, after A-DLP (arXiv 2505.18298) and ACOER: the weight begins at RISE x brevity_weight. The mean
    solve rate of the last steps is held against that of many: while it is less than half a margin below, a step adds
    RISE x brevity_weight, up to that; while it is more than a margin below, a step takes half. So does an evaluation
    within training that is more than a margin below the highest one, and until one is not, nothing is added. The margin
    is MARGIN, but at least SIGMAS standard errors of the difference, or one of the evaluation: no lucky step moves the
    weight far."""

    def __init__(self, options: BrevityOptions):
        self.options = options
        self.controlled = options.control != "none" and options.name != "truncate"
        self.weight = options.weight * (RISE if self.controlled else 1.0)
        self.steps, self.running, self.long = 0, Mean(RUNNING), Mean(LONG)
        self.variance = Mean(LONG)  # of a step's solve rate
        self.evaluated, self.held = -1, False  # step of the newest evaluation; whether it was too low

    def limit(self, progress: float, longest: int) -> int:
        """Give max_new_tokens of a step; progress: 0 in the first step, 1 in the last."""
        end = self.options.limit if self.options.name == "truncate" else longest
        return round(longest + (end - longest) * min(1.0, progress))

    def in_advantage(self) -> float:
        """Give the weight of brevity that is added to advantages; 0.0 where it is in the reward."""
        return self.weight if self.options.scale == "apart" else 0.0

    def metrics(self, groups: list[Group], evaluation: dict | None) -> dict:
        """Take in a step's groups, and the newest evaluation; move the weight; return metrics.

        evaluation: step, accuracy, problems, and the highest accuracy so far."""
        if not self.controlled:
            return {}
        used, solved = self.weight, [statistics.fmean(s.correct for s in g.samples) for g in groups if g.decided]
        if solved:
            self.follow(solved)
        if evaluation and evaluation["step"] > self.evaluated:
            self.heed(evaluation)
        return {"brevity/weight": used, "brevity/accuracy": self.running.value, "brevity/reference": self.long.value}

    def follow(self, solved: list[float]) -> None:
        """Move the weight by the solve rates of a step's problems."""
        self.steps += 1
        self.variance.add(statistics.pvariance(solved) / len(solved))
        self.running.add(statistics.fmean(solved))
        self.long.add(statistics.fmean(solved))
        apart = ((self.running.weights() - self.long.weights()) ** 2).sum()  # variance of the difference, of 1 each
        drop, margin = self.long.value - self.running.value, max(MARGIN, SIGMAS * (self.variance.value * apart) ** 0.5)
        if drop > margin:
            self.weight /= 2
        elif drop <= margin / 2 and self.steps > FIRST_STEPS and not self.held:
            self.weight = min(self.options.weight, self.weight + RISE * self.options.weight)

    def heed(self, evaluation: dict) -> None:
        """Halve the weight after an evaluation that is a margin below the highest, and hold it there."""
        self.evaluated, highest = evaluation["step"], evaluation["highest"]
        margin = max(MARGIN, standard_error(highest, evaluation["problems"]))
        self.held = evaluation["accuracy"] < highest - margin
        self.weight /= 1 + self.held

    def state_dict(self) -> dict:
        own = {name: value for name, value in vars(self).items() if name not in ("options", "controlled")}
        return {name: dict(vars(value)) if isinstance(value, Mean) else value for name, value in own.items()}

    def load_state_dict(self, state: dict) -> None:
        """Go on with the weight of before, if it was controlled; of a constant one the option speaks."""
        if self.controlled and state["steps"]:
            for name, value in state.items():
                setattr(self, name, Mean(**value) if isinstance(value, dict) else value)
            self.weight = min(self.weight, self.options.weight)


class Mean:
    """A mean of which a new value leaves a share `memory`, however few there were."""

    def __init__(self, memory: float, total: float = 0.0, count: int = 0):
        self.memory, self.total, self.count = memory, total, count

    def add(self, value: float) -> None:
        self.total, self.count = self.memory * self.total + value, self.count + 1

    @property
    def value(self) -> float | None:
        return self.total * (1 - self.memory) / (1 - self.memory ** self.count) if self.count else None

    def weights(self) -> np.ndarray:
        """Give the weight of each value, the oldest first."""
        weights = self.memory ** np.arange(self.count - 1, -1, -1.0)
        return weights / weights.sum()
