"""How well probabilities fit what is true: calibration, Brier score, reliability, AUC."""
import math
from typing import NamedTuple

import numpy as np

LIKE_LENGTHS = 0.2  # two solutions are as long if their lengths differ by at most this share of the longer one
LEAST_SLOPE = 0.01  # of the score: no calibration turns it round
MIXES = [(1.0, 0.0), *((weight, 1.0) for weight in (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0))]  # of verdict and numbers


class Calibration(NamedTuple):
    """Turn signs into P = sigmoid(z / temperature + likelihood l + bias); J. Platt 1999.

    z: log-odds of the verdict; l: log-prob of the solution's numbers as the judge would write them, in nats; NaN for a
    solution without any, which gets unwritten, the mean l of wrong ones: to write nothing must not pay."""
    temperature: float = 1.0
    bias: float = 0.0
    likelihood: float = 0.0
    unwritten: float = 0.0

    def score(self, z: float, logp: float) -> float:
        logp = np.where(np.isnan(logp), self.unwritten, logp)
        return z / self.temperature + self.likelihood * logp + self.bias

    def probability(self, z: float, logp: float) -> float:
        return sigmoid(float(self.score(z, logp)))


def sigmoid(x: float) -> float:
    return 0.0 if x < -700 else 1.0 / (1.0 + math.exp(-x))  # NaN stays NaN


def fit_calibration(signs: list[tuple[float, float]], right: list[bool], problem: list[int]) -> Calibration:
    """Fit a calibration to held-out solutions: signs, whether it is right, the number of its problem, of each.

    How much the verdict counts beside the numbers is that of MIXES which best tells right from wrong solutions of one
    problem (AUC; by likelihood the long tail of l would give nearly all to the verdict), neither where none beats a
    guess; temperature and bias then follow from all solutions (Platt)."""
    z, y, problem = np.array(signs, dtype=float).reshape(-1, 2), np.array(right, dtype=bool), np.array(problem)
    mix, found = np.array(MIXES[0]), [auc_within(problem, y, z @ mix) for mix in np.array(MIXES)]
    if np.isfinite(found[0]):
        mix = np.array(MIXES[int(np.argmax(found))]) * (max(found) > 0.5)
    slope, bias = fit_logistic(np.column_stack([z @ mix, np.ones(len(z))]), y, mean=[1.0, 0.0],
                               least=[LEAST_SLOPE, -np.inf])
    wrong = z[~y, 1] if (~y).any() else z[:, 1] if len(z) else np.zeros(1)
    return Calibration(float(1 / max(slope * mix[0], 1e-6)), float(bias), float(slope * mix[1]), float(wrong.mean()))


def fit_logistic(inputs: np.ndarray, y: np.ndarray, mean: list[float], least: list[float],
                 prior: float = 1e-2) -> np.ndarray:
    """Fit weights (K,) of P(y) = sigmoid(inputs @ w) by maximum a posteriori, by Newton's method.

    inputs (N, K), y (N,). prior: precision of a normal prior around `mean`, which keeps them finite where y is
    separable. A weight that comes out below `least` is that."""
    w, free, least = np.array(mean), np.ones(len(mean), dtype=bool), np.array(least)
    while True:
        for _ in range(200):
            p = 1 / (1 + np.exp(-np.clip(inputs @ w, -500, 500)))
            gradient = inputs.T @ (y - p) - prior * (w - mean)
            hessian = (inputs * (p * (1 - p))[:, None]).T @ inputs + prior * np.eye(len(w))
            step = np.zeros(len(w))
            step[free] = np.linalg.solve(hessian[np.ix_(free, free)], gradient[free])
            w = w + step * min(1.0, 1.0 / max(np.abs(step).max(), 1e-12))
            if np.abs(step).max() < 1e-10:
                break
        if not (below := free & (w < least)).any():
            return w
        w, free = np.maximum(w, least), free & ~below


def brier(p: list[float], right: list[bool]) -> float:
    """Mean squared distance of probability and truth: 0 is perfect, always saying 1/2 is 0.25; NaN of nothing."""
    return math.nan if not len(p) else float(np.mean((np.array(p, dtype=float) - np.array(right, dtype=float)) ** 2))


def reliability(p: list[float], right: list[bool], bins: int = 10) -> list[tuple[float, float, int]]:
    """Give (mean probability, share that is right, count) of each bin that holds any."""
    p, right = np.array(p, dtype=float), np.array(right, dtype=float)
    place = np.minimum((p * bins).astype(int), bins - 1)
    return [(float(p[place == k].mean()), float(right[place == k].mean()), int((place == k).sum()))
            for k in range(bins) if (place == k).any()]


def auc(positive: list[float], negative: list[float]) -> float:
    """Chance that a positive one has the higher score, ties one half; NaN without both."""
    if not len(positive) or not len(negative):
        return math.nan
    a, b = np.array(positive, dtype=float)[:, None], np.array(negative, dtype=float)[None]
    return float(((a > b) + 0.5 * (a == b)).mean())


def auc_within(number: np.ndarray, right: np.ndarray, score: np.ndarray, tokens: np.ndarray | None = None) -> float:
    """Chance that of a right and a wrong solution of one problem the right one scores higher.

    All (N,); tokens: take only pairs that are as long. NaN without a pair."""
    wins = []
    for each in np.unique(number):
        good, bad = (np.flatnonzero((number == each) & side) for side in (right, ~right))
        more = score[good][:, None] - score[bad][None]
        if tokens is not None:
            a, b = tokens[good][:, None], tokens[bad][None]
            more = more[np.abs(a - b) <= LIKE_LENGTHS * np.maximum(a, b)]
        wins.append(((more > 0) + 0.5 * (more == 0)).ravel())
    wins = np.concatenate([np.empty(0), *wins])
    return float(wins.mean()) if len(wins) else float("nan")
