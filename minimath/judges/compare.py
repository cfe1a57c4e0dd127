"""Which pairs of a group to ask about, and what the votes say of its members.

A result (i, j, p) is one comparison, both orders already in it: p in [0, 1] is the score of i against j. Pairs that
were not asked about come from the model of Bradley and Terry (Biometrika 39, 1952): P(i beats j) = sigmoid(s_i - s_j).
"""
import math
import random

import numpy as np

# Precision of the normal prior of each strength: one who wins everything stays finite. Of 0.01 to 0.3, 0.1 is never
# far from the best when part of the pairs of simulated judges is held against all (8, 16 candidates).
PRIOR = 0.1


def both_orders(forward: float, backward: float, soft: bool) -> float:
    """Score one candidate against another from the votes in both orders.

    forward is v(i, j), backward is v(j, i): p = (v(i, j) + 1 - v(j, i)) / 2. soft: a model's probabilities, whose
    liking for a position adds the same b to the log-odds of both orders; b, the mean of both, is taken out first, else
    it would draw p to 1/2. A vote of exactly 0, 1/2 or 1 is a verdict also there."""
    if soft and not {forward, backward} & {0.0, 0.5, 1.0}:
        odds, reverse = (math.log(p / (1.0 - p)) for p in (forward, backward))
        bias = (odds + reverse) / 2
        forward, backward = (1.0 / (1.0 + math.exp(bias - x)) for x in (odds, reverse))
    return (forward + 1.0 - backward) / 2.0


def won(forward: float, backward: float) -> float:
    """Say on which side of 1/2 `both_orders` lies, without its rounding: 1, 1/2 or 0."""
    return 1.0 if forward > backward else 0.5 if forward == backward else 0.0


def all_pairs(n: int) -> list[tuple[int, int]]:
    """Return all pairs of n candidates, smaller number first."""
    return [(i, j) for i in range(n) for j in range(i + 1, n)]


def choose_pairs(n: int, k: int, seed: str) -> list[tuple[int, int]]:
    """Choose pairs so that each of n candidates is in about k, all joined; k = 0: all.

    The candidates stand in a circle, in an order drawn from the seed; each meets its k / 2 neighbours on either side,
    with odd k also the one opposite. k = 1 is the circle cut open."""
    if not k or k >= n - 1:
        return all_pairs(n)
    order = list(range(n))
    random.Random(seed).shuffle(order)
    chosen = [(i, (i + step) % n) for step in range(1, k // 2 + 1) for i in range(n)]
    if k == 1:
        chosen = [(i, i + 1) for i in range(n - 1)]
    elif k % 2:
        chosen += [(i, i + n // 2) for i in range(n // 2)]
    return sorted((min(order[i], order[j]), max(order[i], order[j])) for i, j in chosen)


def expected_score(d):
    """Return the chance of a candidate that is d stronger than the other."""
    return 0.5 + np.sinh(d / 2) / (2 * np.cosh(d / 2))


def fit_strengths(n: int, results: list[tuple[int, int, float]], prior: float = PRIOR) -> np.ndarray:
    """Fit strengths of n candidates, adding up to 0, by maximum posterior.

    Returns (n,) float64; by Newton's method."""
    first, second = np.array([r[:2] for r in results], dtype=int).reshape(-1, 2).T  # (M,) each
    p = np.array([r[2] for r in results], dtype=float)  # (M,)
    side = np.zeros((len(p), n))  # (M, n): s_i - s_j = side @ s
    side[np.arange(len(p)), first] = 1
    side[np.arange(len(p)), second] = -1
    strengths = np.zeros(n)
    for _ in range(500):
        d = side @ strengths
        slope = 1 / (2 * np.cosh(d / 2)) ** 2  # of the expected score
        hessian = side.T @ (slope[:, None] * side) + prior * np.eye(n)
        step = np.linalg.solve(hessian, side.T @ (p - expected_score(d)) - prior * strengths)
        longest = np.abs(step).max(initial=1e-12)
        strengths = strengths + step * min(1.0, 2.0 / longest)  # no leap on the flat ends
        if longest < 1e-9:
            break
    return strengths


def win_probabilities(n: int, results: list[tuple[int, int, float]], copies: list[int]) -> list[float | None]:
    """Compute each candidate's mean score against the others.

    A compared pair counts with its p, another one with what the fit expects; with all pairs compared, the wins are
    plain means. Candidates that no chain of comparisons joins drop out of each other's means, as nothing is known of
    them; None for one without any. copies[i] candidates share the text of i; they tie among themselves."""
    strengths = fit_strengths(n, results)
    score = expected_score(strengths[:, None] - strengths[None])  # (n, n)
    joined = np.arange(n)  # candidates with the same number are joined
    for i, j, p in results:
        score[i, j], score[j, i] = p, 1 - p
        joined[joined == joined[j]] = joined[i]
    weight = (joined[:, None] == joined[None]) * np.array(copies, dtype=float) - np.eye(n)
    total = weight.sum(1)
    wins = (weight * score).sum(1) / np.maximum(total, 1)
    return [float(w) if known else None for w, known in zip(wins, total > 0, strict=True)]
