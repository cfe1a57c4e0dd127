"""How well probabilities fit what is true: calibration by two numbers, Brier score, reliability, AUC."""
import math
from typing import NamedTuple

import numpy as np


class Calibration(NamedTuple):
    """Turn a logit z into the probability sigmoid(z / temperature + bias); J. Platt 1999."""
    temperature: float = 1.0
    bias: float = 0.0

    def probability(self, logit: float) -> float:
        return sigmoid(logit / self.temperature + self.bias)


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x > -700 else 0.0


def fit_calibration(logits: list[float], right: list[bool], prior: float = 1e-2) -> Calibration:
    """Fit temperature and bias by maximum likelihood, by Newton's method.

    prior: precision of a normal prior around slope 1 and bias 0, which keeps both finite where right and wrong are
    separable. A slope below 1/100 is taken as that: no order is turned round."""
    z, y, w = np.array(logits, dtype=float), np.array(right, dtype=float), np.array([1.0, 0.0])  # slope, bias
    inputs = np.stack([z, np.ones_like(z)])  # (2, N)
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(w @ inputs, -500, 500)))
        gradient = inputs @ (y - p) - prior * (w - np.array([1.0, 0.0]))
        step = np.linalg.solve((inputs * (p * (1 - p))) @ inputs.T + prior * np.eye(2), gradient)
        w = w + step * min(1.0, 1.0 / max(np.abs(step).max(), 1e-12))
        if np.abs(step).max() < 1e-10:
            break
    return Calibration(float(1 / max(w[0], 0.01)), float(w[1]))


def brier(p: list[float], right: list[bool]) -> float:
    """Mean squared distance of probability and truth: 0 is perfect, always saying 1/2 is 0.25."""
    return float(np.mean((np.array(p, dtype=float) - np.array(right, dtype=float)) ** 2))


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
