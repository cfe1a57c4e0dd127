"""Intervals and paired comparisons against published values, brute force and the normal approximation."""
import itertools
import statistics
import tracemalloc

import numpy as np
import pytest

from minimath.core import stats
from minimath.core.errors import UserError
from minimath.core.stats import bootstrap, paired, pass_at, wilson


def record(number, correct):
    return {"number": number, "problem": "p", "gold": "1", "correct": correct, "tokens": 10}


@pytest.mark.parametrize(
    "right, n, low, high",
    [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_equals_published_values(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-4)


def test_pass_at_k_equals_brute_force():
    k = 6
    for right, n in itertools.product(range(k + 1), range(1, k + 1)):
        picks = list(itertools.combinations([True] * right + [False] * (k - right), n))
        assert pass_at(n, k, right) == pytest.approx(statistics.fmean(any(p) for p in picks))


def test_bootstrap_covers_the_mean_and_narrows_with_more_problems():
    values = np.random.default_rng(0).choice([0.0, 0.5, 1.0], 400).tolist()
    low, high = bootstrap(values, 0)
    half = 1.96 * np.std(values) / 20
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.01)
    few = bootstrap(values[:25], 0)
    assert few[1] - few[0] > 2 * (high - low)
    assert bootstrap([0.5] * 9, 0) == (0.5, 0.5) and bootstrap(values, 0) == bootstrap(values, 0)


@pytest.mark.parametrize("n, at_once", [(7, 1 << 20), (7, 21), (1001, 1 << 20), (1001, 5)])
def test_bootstrap_in_pieces_is_bit_for_bit_that_of_all_draws_at_once(n, at_once, monkeypatch):
    values = np.random.default_rng(1).random(n)
    picks = np.random.default_rng(5).integers(0, n, (2000, n))
    monkeypatch.setattr(stats, "AT_ONCE", at_once)
    assert bootstrap(values.tolist(), 5) == tuple(np.percentile(values[picks].mean(1), [2.5, 97.5]))


def test_bootstrap_of_many_problems_needs_little_memory():
    tracemalloc.start()
    try:
        bootstrap([0.0, 1.0] * 50_000, 0, draws=40)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


def test_paired_differences_are_narrower_than_unpaired_ones_and_skip_other_problems():
    def rows(rights):
        return [record(n, right) | {"problem": f"p{n}"} for n, right in enumerate(rights)]

    hard = [n % 2 == 0 for n in range(60)]
    mean, low, high = paired(rows([r or n % 10 == 1 for n, r in enumerate(hard)]), rows(hard))
    assert mean == pytest.approx(0.1) and 0 < low < mean < high < 0.2
    several = [record(0, right) for right in (True, False, False, False)]  # four samples of one problem
    assert paired(several, [record(0, True)])[0] == pytest.approx(-0.75)
    with pytest.raises(UserError, match="no problem in common"):
        paired(rows([True]), [record(0, True) | {"problem": "another"}])
