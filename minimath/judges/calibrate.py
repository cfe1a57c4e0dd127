"""How well probabilities fit what is true: calibration, Brier score, reliability, AUC."""
import math
from typing import NamedTuple

import numpy as np

from minimath.judges.compare import fit_logistic

LIKE_LENGTHS = 0.2  # two solutions are as long if their lengths differ by at most this share of the longer one
LEAST_SLOPE = 0.01  # of the score: no calibration turns it round
PRIOR = 1e-2  # precision of the normal prior of slope and bias, around 1 and 0
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
        return z / self.temperature + self.likelihood * (self.unwritten if logp != logp else logp) + self.bias

    def probability(self, z: float, logp: float) -> float:
        return sigmoid(self.score(z, logp))


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
    slope, bias = fit_platt(z @ mix, y)
    wrong = z[~y, 1] if (~y).any() else z[:, 1] if len(z) else np.zeros(1)
    return Calibration(float(1 / max(slope * mix[0], 1e-6)), float(bias), float(slope * mix[1]), float(wrong.mean()))


def fit_platt(score: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Fit slope and bias of P(y) = sigmoid(slope score + bias) by maximum posterior; at least LEAST_SLOPE."""
    ones = np.ones((len(score), 1))
    slope, bias = fit_logistic(np.column_stack([score, ones]), y, PRIOR, mean=np.array([1.0, 0.0]), leap=1.0)
    if slope < LEAST_SLOPE:
        slope, [bias] = LEAST_SLOPE, fit_logistic(ones, y, PRIOR, offset=LEAST_SLOPE * score, leap=1.0)
    return slope, bias


def brier(p: list[float], right: list[bool]) -> float:
    """Mean squared distance of probability and truth: 0 is perfect, always saying 1/2 is 0.25; NaN of nothing."""
    return math.nan if not len(p) else float(np.mean((np.array(p, dtype=float) - np.array(right, dtype=float)) ** 2))


def reliability(p: list[float], right: list[bool], bins: int = 10) -> list[tuple[float, float, int]]:
    """Give (mean probability, share that is right, count) of each bin that holds any."""
    p, right = np.array(p, dtype=float), np.array(right, dtype=float)
    place = np.minimum((p * bins).astype(int), bins - 1)
    return [(float(p[place == k].mean()), float(right[place == k].mean()), int((place == k).sum()))
            for k in range(bins) if (place == k).any()]


def auc_within(number: np.ndarray, right: np.ndarray, score: np.ndarray, tokens: np.ndarray | None = None) -> float:
    """Chance that of a right and a wrong solution of one problem the right one scores higher, ties one half.

    All (N,); number: of the problem; tokens: take only pairs that are as long. NaN without a pair."""
    wins = [np.empty(0)]
    for each in np.unique(number):
        good, bad = (np.flatnonzero((number == each) & side) for side in (right, ~right))
        more = score[good][:, None] - score[bad][None]
        if tokens is not None:
            more = more[like_lengths(tokens[good][:, None], tokens[bad][None])]
        wins.append(((more > 0) + 0.5 * (more == 0)).ravel())
    wins = np.concatenate(wins)
    return float(wins.mean()) if len(wins) else math.nan


def like_lengths(a, b):
    """Tell which lengths, numbers or arrays, differ so little that a judge of length has no say."""
    return np.abs(a - b) <= LIKE_LENGTHS * np.maximum(a, b)
