"""Length control: how short each correct sample is for its problem, and how much that counts.

Wrong samples have no length: penalising theirs ends in collapse (ACOER, arXiv 2606.22716).
"""
import math
import statistics
from functools import reduce

import numpy as np

from minimath.config.rl_options import BrevityOptions
from minimath.core.state import Kept
from minimath.data.sample import Group, Sample
from minimath.train.best import standard_error

CONCAVE = 5.0  # of `log`, as ACOER's code has it
DEAD_ZONE = 0.05  # of the yardstick, by which a length differs without being another: 40 against 41 tokens is nothing
LEAST_CORRECT = 0.25  # share of a group, below which a controlled weight is 0: first let it be solved
RISE, MARGIN = 0.1, 0.02  # of a controlled weight in a step, of brevity_weight; drop of accuracy that makes it fall
RUNNING, LONG = 0.7, 0.95  # what a step leaves of the means before it: over about the last 6 and 40 steps
SIGMAS = 1.5  # standard errors of a drop that is none
FIRST_STEPS = 3  # in which the weight does not rise


def cosine(n: np.ndarray, longest: int) -> np.ndarray:
    """Take half a wave over max_new_tokens: cos(pi min(1, n / L)); arXiv 2502.03373."""
    return np.cos(np.pi * np.minimum(1, n / longest))


def minmax(n: np.ndarray) -> np.ndarray:
    """Score the shortest +1, the longest -1: 1 - 2 (n - min) / (max - min), 0 if all are equally long."""
    low, high = n.min(), n.max()
    return np.zeros(len(n)) if low == high else 1.0 - 2.0 * (n - low) / (high - low)


def term(n: np.ndarray, options: BrevityOptions, longest: int, solved: float) -> np.ndarray:
    """Score the lengths of a group's correct samples, in tokens, by the term that the options name.

    n (C,) -> (C,) in [-1, 1]; L = longest: max_new_tokens; y: the yardstick, mean n or min n.
      ratio: sign(e) max(0, |e| - DEAD_ZONE), e = clip(1 - n / y, -1, 1), the share saved of the group's mean length as
        in GR3 (arXiv 2603.10535, whose form is the factor 1 / (1 + a n / y))
      log: log(1 + 5 e) / log 6, e = max(0, 1 - n / y - DEAD_ZONE), ever less for a further token: ACOER's concave form
        (arXiv 2606.22716), with the group's yardstick in place of a running budget; 0 from the yardstick on
      cosine, minmax: the functions above
      alp: -solved min(1, n / L), solved the share of the group that is correct (ALP, arXiv 2506.05256)"""
    if options.name == "cosine":
        return cosine(n, longest)
    if options.name == "minmax":
        return minmax(n)
    if options.name == "alp":
        return -solved * np.minimum(1, n / longest)
    yardstick = n.mean() if options.yardstick == "mean" else n.min()
    saved = 1 - n / yardstick if yardstick else -n  # the shortest has no thought: any is longer
    if options.name == "log":
        return np.log1p(CONCAVE * np.maximum(0, saved - DEAD_ZONE)) / math.log1p(CONCAVE)
    saved = np.clip(saved, -1, 1)
    return np.sign(saved) * np.maximum(0, np.abs(saved) - DEAD_ZONE)


def brevity(samples: list[Sample], options: BrevityOptions, longest: int) -> list[float]:
    """Score a group's samples by `term`; 0.0 for wrong ones.

    Their lengths are with brevity_counts=thought those of their thoughts alone. All 0.0 for truncate, where
    max_new_tokens falls instead (DLER, arXiv 2510.15110), and under control where few are correct (as GRPO-lambda,
    arXiv 2505.18086, does). longest: max_new_tokens."""
    n = np.array([s.thought if options.counts == "thought" else s.tokens for s in samples if s.correct], dtype=float)
    solved = len(n) / len(samples)
    few = options.control != "none" and solved < LEAST_CORRECT
    if not n.any() or few or options.name == "truncate":  # nor is there a thought to shorten
        return [0.0] * len(samples)
    scores = iter(term(n, options, longest, solved).tolist())
    return [next(scores) if s.correct else 0.0 for s in samples]


class BrevityControl(Kept):
    """Weighs brevity: constant, or rising while the accuracy of the rollouts holds.

    control=accuracy, after A-DLP (arXiv 2505.18298) and ACOER: the weight begins at RISE x brevity_weight. The mean
    solve rate of the last steps is held against that of many: while it is less than half a margin below, a step adds
    RISE x brevity_weight, up to that; while it is more than a margin below, a step takes half. So does an evaluation
    within training that is more than a margin below the highest one, and until one is not, nothing is added. The margin
    is MARGIN, but at least SIGMAS standard errors of the difference, or one of the evaluation: no lucky step moves the
    weight far."""
    kept = ("weight", "solved", "variances", "evaluated", "held")

    def __init__(self, options: BrevityOptions):
        self.options = options
        self.controlled = options.control != "none" and options.name != "truncate"
        self.weight = options.weight * (RISE if self.controlled else 1.0)
        self.solved, self.variances = [], []  # mean solve rate of each step, and its variance
        self.evaluated, self.held = -1, False  # step of the newest evaluation; whether it was too low

    def limit(self, progress: float, longest: int) -> int:
        """Give max_new_tokens of a step; progress: 0 in the first step, 1 in the last."""
        end = self.options.limit if self.options.name == "truncate" else longest
        return round(longest + (end - longest) * min(1.0, progress))

    @property
    def advantage_weight(self) -> float:
        """The weight of brevity that is added to advantages; 0.0 where it is in the reward."""
        return self.weight if self.options.scale == "apart" else 0.0

    def follow(self, groups: list[Group], evaluation: dict | None) -> dict:
        """Move the weight by a step's groups and the newest evaluation; return metrics.

        evaluation: step, accuracy, problems, and the highest accuracy so far."""
        if not self.controlled:
            return {}
        used, rates = self.weight, [statistics.fmean(s.correct for s in g.samples) for g in groups if g.decided]
        if rates:
            self.solved.append(statistics.fmean(rates))
            self.variances.append(statistics.pvariance(rates) / len(rates))
        running, long = recent(self.solved, RUNNING), recent(self.solved, LONG)
        if rates:
            steps = len(self.solved)
            apart = ((shares(steps, RUNNING) - shares(steps, LONG)) ** 2).sum()  # variance of running - long, of 1 each
            drop, margin = long - running, max(MARGIN, SIGMAS * (recent(self.variances, LONG) * apart) ** 0.5)
            if drop > margin:
                self.weight /= 2
            elif drop <= margin / 2 and steps > FIRST_STEPS and not self.held:
                self.weight = min(self.options.weight, self.weight + RISE * self.options.weight)
        if evaluation and evaluation["step"] > self.evaluated:
            self.evaluated, highest = evaluation["step"], evaluation["highest"]
            self.held = evaluation["accuracy"] < highest - max(MARGIN, standard_error(highest, evaluation["problems"]))
            self.weight /= 1 + self.held
        return {"brevity/weight": used, "brevity/accuracy": running, "brevity/reference": long}

    def load_state_dict(self, state: dict) -> None:
        """Go on with the weight of before, if it was controlled; of a constant one the option speaks."""
        if self.controlled and state.get("solved"):
            super().load_state_dict(state)
            self.weight = min(self.weight, self.options.weight)


def recent(values: list[float], memory: float) -> float | None:
    """Average values of which each leaves a share `memory` of those before it; None without any."""
    total = reduce(lambda before, value: memory * before + value, values, 0.0)
    return total * (1 - memory) / (1 - memory ** len(values)) if values else None


def shares(count: int, memory: float) -> np.ndarray:
    """Give the share (count,) of each value in `recent`, the oldest first."""
    shares = memory ** np.arange(count - 1, -1, -1.0)
    return shares / shares.sum()
