"""Intervals and paired comparisons of evaluations: every figure of a model comes with its uncertainty."""
import math
import statistics

import numpy as np

from minimath.core.errors import UserError

AT_ONCE = 1 << 20  # values that a bootstrap draws at once


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Compute Wilson's score interval of a proportion, 95% for z = 1.96."""
    p, spread = right / n, z * z / n
    centre = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: list[float], seed: int, draws: int = 2000) -> tuple[float, float]:
    """Percentile bootstrap 95% interval of the mean of per-problem values."""
    array, rng, n = np.asarray(values), np.random.default_rng(seed), len(values)
    rows = max(1, AT_ONCE // n)  # the same draws as all at once, which takes gigabytes for 100,000 problems
    means = [array[rng.integers(0, n, (min(rows, draws - i), n))].mean(1) for i in range(0, draws, rows)]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def paired(records: list[dict], others: list[dict], what: str = "correct") -> tuple[float, float, float]:
    """Compare `what` of records with the others', problem by problem.

    what: correct or tokens. Returns the mean gap and its bootstrap 95% interval, narrower than those of the two models.
    Raises UserError without a common problem."""
    gaps = [statistics.fmean(float(r[what]) for r in mine) - statistics.fmean(float(r[what]) for r in theirs)
            for _, mine, theirs in in_common(records, others)]
    return statistics.fmean(gaps), *bootstrap(gaps, 0)


def in_common(records: list[dict], others: list[dict]) -> list[tuple[str, list[dict], list[dict]]]:
    """Pair the records of each common problem with the others', or UserError."""
    mine, theirs = by_text(records), by_text(others)
    common = [(key[0], mine[key], theirs[key]) for key in mine if key in theirs]
    if not common:
        raise UserError("the two evaluations have no problem in common: evaluate both on the same data=")
    return common


def by_text(records: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Group records by problem and gold answer, wherever they stand in the data."""
    problems: dict[tuple[str, str], list[dict]] = {}
    for record in records:
        problems.setdefault((record["problem"], record["gold"]), []).append(record)
    return problems


def pass_at(n: int, k: int, right: int) -> float:
    """Estimate, unbiased, that one of n is right, from `right` of k; arXiv 2107.03374."""
    return 1.0 - math.comb(k - right, n) / math.comb(k, n)
