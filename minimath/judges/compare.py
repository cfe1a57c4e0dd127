"""Which candidates of a group to compare, and what the comparisons say of all of them. numpy only, no judge.

A result (i, j, p) is one comparison, both orders already in it: p in [0, 1] is the score of i against j, 1 won, 0
lost, 1/2 a tie. The model is Davidson's (JASA 65, 1970): with d = s_i - s_j,

    P(i wins), P(tie), P(j wins)  =  exp(d / 2), nu, exp(-d / 2), each over their sum;

nu = 0 is that of Bradley and Terry (Biometrika 39, 1952), where a tie is half a win for each. In both, the sums of p
are all that the strengths depend on: at the maximum, the expected scores of a candidate add up to its scores.
"""
import math
from typing import NamedTuple

import numpy as np

# Precision of the normal prior of each strength (standard deviation 3.2): one who wins everything stays finite. Of 0.01
# to 0.3, 0.1 is never far from the best when Swiss wins of simulated judges are held against the full round-robin's
# (8 and 16 candidates, strengths of deviation 0.5 to 2): off by 0.04 to 0.09, correlation 0.88 to 0.99.
PRIOR = 0.1


class Fit(NamedTuple):
    """Strengths (n,), adding up to 0; their standard errors (n,), of the distance to the group's mean; nu; the root
    mean square of p less its expectation, which stays large when the judge's preferences go round in a circle."""
    strengths: np.ndarray
    se: np.ndarray
    nu: float
    misfit: float


def round_robin(n: int) -> list[tuple[int, int]]:
    """All n (n - 1) / 2 pairs."""
    return [(i, j) for i in range(n) for j in range(i + 1, n)]


def swiss_rounds(n: int) -> int:
    """ceil(log2 n) + 1 rounds, of n / 2 pairs each; 0 for fewer than two."""
    return math.ceil(math.log2(n)) + 1 if n > 1 else 0


def swiss_pairs(strengths, played: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """The next round: neighbours in strength, (i, j) with i < j, no pair of `played`, each candidate at most once.

    As many pairs as `played` leaves room for; of an odd number the weakest that can sits out.
    """
    # rounded: strengths that are equal but for the last bits must give one schedule on every machine
    order = sorted(range(len(strengths)), key=lambda i: (-round(float(strengths[i]), 6), i))
    for byes in range(len(order) % 2, len(order) + 1, 2):
        pairs = _match(order, played, byes)
        if pairs is not None:
            return pairs
    return []


def _match(order: list[int], played, byes: int) -> list[tuple[int, int]] | None:
    """Pairs of all but `byes` of order, strongest first, neighbours before others; None when that can't be."""
    if not order:
        return []
    first, *others = order
    for other in others:
        pair = (min(first, other), max(first, other))
        if pair not in played:
            rest = _match([k for k in others if k != other], played, byes)
            if rest is not None:
                return [pair, *rest]
    return _match(others, played, byes - 1) if byes else None


def expected_score(d, nu: float = 0.0):
    """P(win) + P(tie) / 2 of a candidate that is d stronger than the other."""
    return 0.5 + np.sinh(d / 2) / (2 * np.cosh(d / 2) + nu)


def fit_strengths(n: int, results: list[tuple[int, int, float]], *, ties: bool = False,
                  prior: float = PRIOR) -> Fit:
    """Strengths of n candidates by maximum posterior, by Newton's method.

    ties=False: Bradley-Terry, for p that are probabilities. ties=True: Davidson, for p that come of votes; of a p,
    the share 1 - |2 p - 1| counts as a tie, and nu is fitted too (its prior is exponential, of rate `prior`). The
    standard errors are from the inverse Hessian at that nu, and count a comparison as one draw: they say how well the
    schedule pins the strengths down, not how right the judge is.
    """
    first, second = np.array([r[:2] for r in results], dtype=int).reshape(-1, 2).T  # (M,) each
    p = np.array([r[2] for r in results], dtype=float)  # (M,)
    side = np.zeros((len(p), n))  # (M, n): s_i - s_j = side @ s
    side[np.arange(len(p)), first] = 1
    side[np.arange(len(p)), second] = -1
    tied = (1 - np.abs(2 * p - 1)).sum()
    strengths, nu = np.zeros(n), float(ties)
    for _ in range(500):
        half = side @ strengths / 2
        total = 2 * np.cosh(half) + nu
        slope = (2 + nu * np.cosh(half)) / (2 * total**2)  # of the expected score, in d
        hessian = side.T @ (slope[:, None] * side) + prior * np.eye(n)
        step = np.linalg.solve(hessian, side.T @ (p - expected_score(2 * half, nu)) - prior * strengths)
        longest = np.abs(step).max(initial=1e-12)
        strengths = strengths + step * min(1.0, 2.0 / longest)  # no leap on the flat ends
        # of log(total), concave in nu, the tangent: every such step raises the likelihood
        before, nu = nu, tied / (prior + (1 / total).sum()) if ties else 0.0
        if max(longest, abs(nu - before)) < 1e-9:
            break
    # (1, ..., 1) is an eigenvector, of value `prior`: taking it out leaves the errors of the distances to the mean
    variance = np.diag(np.linalg.inv(hessian)) - 1 / (prior * max(1, n))
    misfit = float(np.sqrt(np.mean((p - expected_score(side @ strengths, nu)) ** 2))) if len(p) else 0.0
    return Fit(strengths, np.sqrt(np.maximum(variance, 0.0)), nu, misfit)


def win_probabilities(n: int, results: list[tuple[int, int, float]], *, ties: bool = False,
                      copies: list[int] | None = None) -> tuple[list[float | None], Fit]:
    """(w, fit): w_i is the mean score of i against the others, None without any comparison.

    A compared pair counts with its p, another with what the fit expects; so w of a full round-robin is the plain mean,
    and of a partial schedule it is that of the fit but for the prior. Pairs that no chain of comparisons joins drop
    out: nothing is known of them. copies[i] candidates share the text of i; they tie among themselves.
    """
    fit = fit_strengths(n, results, ties=ties)
    score = expected_score(fit.strengths[:, None] - fit.strengths[None], fit.nu)  # (n, n)
    group = np.arange(n)
    for i, j, p in results:
        score[i, j], score[j, i] = p, 1 - p
        group[group == group[j]] = group[i]
    return mean_wins(score, group, np.ones(n) if copies is None else copies), fit


def mean_wins(score, group, copies) -> list[float | None]:
    """Mean score (n,) of each against the others of its group (n,) of score (n, n), of whom copies (n,) count as often
    as they are there; None for one alone. A candidate ties with the copies of its own."""
    weight = (group[:, None] == group[None]) * np.asarray(copies, dtype=float)[None] - np.eye(len(group))  # (n, n)
    total = weight.sum(1)
    wins = (weight * score).sum(1) / np.maximum(total, 1)
    return [float(w) if known else None for w, known in zip(wins, total > 0, strict=True)]
