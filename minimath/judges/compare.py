"""Which pairs of solutions a judge is asked about, in both orders, and what its votes say.

A result (i, j, p) is one comparison, both orders already in it: p in [0, 1] is the score of i against j. Pairs that
were not asked about come from the model of Bradley and Terry (Biometrika 39, 1952): P(i beats j) = sigmoid(s_i - s_j).
"""
import itertools
import math
import random
from collections.abc import Callable

import numpy as np

from minimath.core.errors import Interrupted
from minimath.core.stats import wilson
from minimath.judges.base import Asked, Judge, Pair

# Precision of the normal prior of each strength: one who wins everything stays finite. Of 0.01 to 0.3, 0.1 is never
# far from the best when part of the pairs of simulated judges is held against all (8, 16 candidates).
PRIOR = 0.1
TALLY = ["pairs", "agreement", "95% interval", "position bias", "order conflicts"]  # columns of tally_cells
MOST_FAILURES = 20  # of one call: enough to find the one question of a thousand that fails


# ---- asking

def ask(judge: Judge, questions: list[Pair] | list[Asked], advance: Callable[[int], None] = lambda n: None,
        chunk: int = 0, put: Callable | None = None) -> tuple[list, str]:
    """Ask a judge, and return its votes and its last exception in words, or "".

    A judge that raises is said once for each kind of exception; the questions are then asked again in halves, so that
    one that it can't take costs its own vote alone. chunk: questions per call, 0: all; advance(n) follows every n.
    put: judge.grade or judge.grade_all for single solutions, else pairs go to judge.compare."""
    votes, error, failures, size, put = [], "", 0, chunk or max(1, len(questions)), put or judge.compare
    due = [questions[start:start + size] for start in range(0, len(questions), size)][::-1]
    while due:
        part = due.pop()
        try:
            got = list(put(part)) if failures < MOST_FAILURES else [None] * len(part)
            if len(got) != len(part):
                raise ValueError(f"{len(got)} votes for {len(part)} questions")
        except Interrupted:
            raise
        except Exception as problem:  # whatever it is, it is counted and said, and the run goes on
            failures, error = failures + 1, f"{type(problem).__name__}: {problem}"[:300]
            judge.say_once(type(problem).__name__, f"the judge {judge.name} failed ({error}); its questions are asked "
                           "again in smaller batches, and those that fail alone have no vote")
            if len(part) > 1:
                due += [part[len(part) // 2:], part[:len(part) // 2]]
                continue
            got = [None]
        votes += got
        advance(len(part))
    return votes, error


def ask_both(judge: Judge, pairs: list[tuple[Pair, Pair]], advance: Callable[[int], None] = lambda n: None,
             chunk: int = 32) -> tuple[list[tuple], str]:
    """Ask about pairs in both orders; returns the two votes on each, and `ask`'s error."""
    votes, error = ask(judge, [question for both in pairs for question in both], advance, chunk)
    return list(zip(votes[::2], votes[1::2], strict=True)), error


def choose_pairs(n: int, k: int, seed: str) -> list[tuple[int, int]]:
    """Choose pairs so that each of n candidates is in about k, all joined; k = 0: all, smaller number first.

    The candidates stand in a circle, in an order drawn from the seed; each meets its k / 2 neighbours on either side,
    with odd k also the one opposite. k = 1 is the circle cut open."""
    order = list(range(n))
    if not k or k >= n - 1:
        return list(itertools.combinations(order, 2))
    random.Random(seed).shuffle(order)
    chosen = [(i, (i + step) % n) for step in range(1, k // 2 + 1) for i in range(n)]
    if k == 1:
        chosen = [(i, i + 1) for i in range(n - 1)]
    elif k % 2:
        chosen += [(i, i + n // 2) for i in range(n // 2)]
    return sorted((min(order[i], order[j]), max(order[i], order[j])) for i, j in chosen)


# ---- votes

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


def tally(votes: list[tuple], soft: bool) -> dict:
    """Compute figures from both votes on some pairs.

    agreement: share of pairs whose first solution wins with both orders together, a tie counting one half, and its 95%
    interval. first_wins: mean of both_orders. position_bias: mean of v(i, j) + v(j, i) - 1, above 0 for a judge that
    likes what stands first. order_conflicts: share of pairs whose winner changes with the order. None without a pair
    that has both votes."""
    voted = [pair for pair in votes if None not in pair]

    def mean(figure: Callable) -> float | None:
        return sum(figure(*pair) for pair in voted) / len(voted) if voted else None

    agreement = mean(won)
    return {"pairs": len(votes), "voted": len(voted), "no_votes": sum(pair.count(None) for pair in votes),
            "agreement": agreement, "interval": wilson(agreement * len(voted), len(voted)) if voted else None,
            "first_wins": mean(lambda f, b: both_orders(f, b, soft)),
            "position_bias": mean(lambda f, b: f + b - 1.0),
            "order_conflicts": mean(lambda f, b: (f - 0.5) * (b - 0.5) > 0)}


# ---- wins

def expected_score(d):
    """Return the chance of a candidate that is d stronger than the other."""
    return 0.5 + np.sinh(d / 2) / (2 * np.cosh(d / 2))


def fit_logistic(inputs: np.ndarray, y: np.ndarray, prior: float, mean=0.0, offset=0.0, leap=2.0) -> np.ndarray:
    """Fit weights (K,) of P(y) = sigmoid(inputs @ w + offset) by maximum posterior, by Newton's method.

    inputs (N, K), y (N,) in [0, 1]. prior: precision of a normal prior around `mean`, which keeps them finite where y
    is separable. leap: most that a step changes a weight, for the flat ends."""
    w = mean + np.zeros(inputs.shape[1])
    for _ in range(500):
        d = np.clip(inputs @ w + offset, -500, 500)
        slope = 1 / (2 * np.cosh(d / 2)) ** 2  # of the expected score
        hessian = inputs.T @ (slope[:, None] * inputs) + prior * np.eye(len(w))
        step = np.linalg.solve(hessian, inputs.T @ (y - expected_score(d)) - prior * (w - mean))
        longest = np.abs(step).max(initial=1e-12)
        w = w + step * min(1.0, leap / longest)
        if longest < 1e-9:
            break
    return w


def fit_strengths(n: int, results: list[tuple[int, int, float]], prior: float = PRIOR) -> np.ndarray:
    """Fit strengths (n,) of n candidates, adding up to 0, by maximum posterior."""
    side = np.zeros((len(results), n))  # (M, n): s_i - s_j = side @ s
    for row, (i, j, _) in zip(side, results):
        row[[i, j]] = 1, -1
    return fit_logistic(side, np.array([p for *_, p in results], dtype=float), prior)


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


def tally_cells(f: dict) -> list:
    return [f["pairs"], percent(f["agreement"]), span(f["interval"]), percent(f["position_bias"]),
            percent(f["order_conflicts"])]


def percent(share: float | None, digits: int = 0) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f}%"


def span(interval: tuple[float, float] | None, form: str = ".0f") -> str:
    return "-" if interval is None else f"{100 * interval[0]:{form}} to {100 * interval[1]:{form}}"
