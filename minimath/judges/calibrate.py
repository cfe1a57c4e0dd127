"""How well probabilities fit what is true: calibration by two numbers, Brier score, reliability, AUC."""
import math
from typing import NamedTuple

import numpy as np

LEAST_SLOPE = 0.01


class Calibration(NamedTuple):
    """Turn signs into P = sigmoid(z / temperature + likelihood l + bias); J. Platt 1999.

    z: log-odds of the verdict; l: log-prob of the solution's numbers as the judge would write them, in nats."""
    temperature: float = 1.0
    bias: float = 0.0
    likelihood: float = 0.0

    def score(self, z: float, logp: float) -> float:
        return z / self.temperature + self.likelihood * logp + self.bias

    def probability(self, z: float, logp: float) -> float:
        return sigmoid(self.score(z, logp))


def sigmoid(x: float) -> float:
    return 0.0 if x < -700 else 1.0 / (1.0 + math.exp(-x))  # NaN stays NaN


def fit_calibration(signs: list[tuple[float, float]], right: list[bool], prior: float = 1e-2) -> Calibration:
    """Fit the calibration of signs (z, l) by maximum likelihood, by Newton's method.

    prior: precision of a normal prior around the logit itself, which keeps all finite where right and wrong are
    separable. No order is turned round: a slope below LEAST_SLOPE is that, a likelihood below 0 is 0, and the others
    are fitted beside it."""
    y, least = np.array(right, dtype=float), np.array([LEAST_SLOPE, 0.0, -np.inf])
    inputs = np.stack([*np.array(signs, dtype=float).reshape(-1, 2).T, np.ones_like(y)])  # (3, N)
    mean, w, free = np.array([1.0, 0.0, 0.0]), np.array([1.0, 0.0, 0.0]), np.array([True] * 3)
    while True:
        for _ in range(100):
            p = 1 / (1 + np.exp(-np.clip(w @ inputs, -500, 500)))
            gradient = (inputs @ (y - p) - prior * (w - mean))[free]
            step = np.linalg.solve(((inputs * (p * (1 - p))) @ inputs.T + prior * np.eye(3))[free][:, free], gradient)
            w[free] += step * min(1.0, 1.0 / max(np.abs(step).max(), 1e-12))
            if np.abs(step).max() < 1e-10:
                break
        if (w >= least).all():
            return Calibration(float(1 / w[0]), float(w[2]), float(w[1]))
        free, w = free & (w >= least), np.maximum(w, least)


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
