"""Which pairs are asked about, and strength fits, against independent forms and known strengths."""
import itertools
import math

import numpy as np
import pytest

from minimath.judges.compare import (
    PRIOR,
    both_orders,
    choose_pairs,
    expected_score,
    fit_strengths,
    win_probabilities,
    won,
)


def all_pairs(n):
    return list(itertools.combinations(range(n), 2))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_posterior(s, results):
    """Bradley and Terry's log-likelihood, outcome by outcome, and the prior."""
    total = -PRIOR * sum(x * x for x in s) / 2
    for i, j, p in results:
        a, b = math.exp(s[i]), math.exp(s[j])
        total += p * math.log(a / (a + b)) + (1 - p) * math.log(b / (a + b))
    return total


def grid_maximum(results):
    """Strengths of 3 items, adding up to 0, at the best point of a grid that is refined around it."""
    best, width = np.zeros(3), 4.0
    for _ in range(14):
        steps = np.linspace(-width, width, 9)
        points = ((best[0] + x, best[1] + y, -best[0] - x - best[1] - y)
                  for x, y in itertools.product(steps, steps))
        best = max(points, key=lambda point: log_posterior(point, results))
        width /= 2
    return np.array(best)


@pytest.mark.parametrize("results", [
    [(0, 1, 0.7), (0, 2, 0.9), (1, 2, 0.55)],
    [(0, 1, 1.0), (0, 2, 1.0), (1, 2, 0.5)],                          # one wins everything
    [(0, 1, 1.0), (1, 2, 1.0), (0, 2, 0.0), (0, 1, 0.5)],             # a circle, and a pair compared twice
    [(0, 1, 0.25), (1, 2, 0.75)],                                     # a pair not compared
])
def test_the_fit_is_the_maximum_of_a_brute_force_grid(results):
    fit = fit_strengths(3, results)
    assert fit == pytest.approx(grid_maximum(results), abs=5e-3)
    assert fit.sum() == pytest.approx(0, abs=1e-9)


def test_one_who_wins_everything_is_finite_and_first():
    n = 16
    fit = fit_strengths(n, [(i, j, 1.0) for i, j in all_pairs(n)])
    assert np.isfinite(fit).all()
    assert (np.diff(fit) < 0).all() and fit[0] < 12


def test_known_strengths_are_found():
    rng = np.random.default_rng(0)
    truth = np.array([1.2, 0.4, 0.1, -0.6, -1.1])
    fits = []
    for _ in range(40):
        results = [(i, j, float(rng.random() < sigmoid(truth[i] - truth[j]))) for i, j in all_pairs(5) * 12]
        fits.append(fit_strengths(5, results))
    assert np.mean(fits, 0) == pytest.approx(truth, abs=0.15) and np.std(fits, 0).max() < 0.5


def test_the_expected_score_is_the_sigmoid_of_the_distance():
    for d in (-2.0, 0.0, 0.7, 1.3):
        assert expected_score(d) == pytest.approx(sigmoid(d))


# ---- votes

def test_both_orders_take_the_position_out():
    sure = sigmoid(3.0), sigmoid(2.0)
    assert both_orders(*sure, soft=True) == pytest.approx(sigmoid(0.5))
    assert both_orders(*sure, soft=False) == pytest.approx((sure[0] + 1 - sure[1]) / 2)
    assert both_orders(1.0, 1.0, soft=True) == 0.5 == both_orders(1.0, 1.0, soft=False)
    assert both_orders(1.0, 0.0, soft=True) == 1.0 and both_orders(1.0, 0.5, soft=True) == 0.75    # verdicts
    assert (won(0.9, 0.8), won(0.8, 0.8), won(0.1, 0.2)) == (1.0, 0.5, 0.0)


# ---- win probabilities

def test_wins_of_all_pairs_are_plain_means_and_those_of_the_fit_but_for_the_prior():
    rng = np.random.default_rng(1)
    results = [(i, j, rng.uniform(0.1, 0.9)) for i, j in all_pairs(6)]
    wins, fit = win_probabilities(6, results, [1] * 6), fit_strengths(6, results)
    scores = [[p if a == i else 1 - p for a, b, p in results if i in (a, b)] for i in range(6)]
    assert wins == pytest.approx([np.mean(row) for row in scores])
    nearly_flat = fit_strengths(6, results, prior=1e-6)
    expected = expected_score(nearly_flat[:, None] - nearly_flat)
    assert (expected.sum(1) - 0.5) / 5 == pytest.approx(wins, abs=1e-5)
    shrunk = expected_score(fit[:, None] - fit)
    assert (shrunk.sum(1) - 0.5) / 5 == pytest.approx(wins, abs=0.05)


def test_unjudged_pairs_come_from_the_fit():
    results = [(0, 1, 0.8), (1, 2, 0.8)]
    wins, fit = win_probabilities(3, results, [1] * 3), fit_strengths(3, results)
    beyond = sigmoid(fit[0] - fit[2])
    assert beyond > 0.85                                              # 0 over 1 over 2: more than either step
    assert wins == pytest.approx([(0.8 + beyond) / 2, 0.5, (0.2 + 1 - beyond) / 2])


def test_candidates_that_nothing_joins_drop_out():
    assert win_probabilities(5, [(0, 1, 1.0), (2, 3, 0.6)], [1] * 5) == [1.0, 0.0, 0.6, 0.4, None]
    assert win_probabilities(2, [], [1, 1]) == [None, None] and win_probabilities(0, [], []) == []
    assert win_probabilities(1, [], [1]) == [None]


def test_copies_of_a_text_tie_and_count_as_opponents():
    wins = win_probabilities(2, [(0, 1, 0.9)], copies=[3, 1])
    assert wins == pytest.approx([(0.5 * 2 + 0.9) / 3, 0.1])
    assert win_probabilities(1, [], copies=[4]) == [0.5]


# ---- part of the pairs

def joined(n, pairs):
    """Whether chains of pairs join all of n."""
    reached, due = {0}, [0]
    while due:
        i = due.pop()
        new = {k for pair in pairs if i in pair for k in pair} - reached
        reached |= new
        due += new
    return len(reached) == n


@pytest.mark.parametrize("n", [2, 3, 4, 5, 7, 8, 9, 16, 33])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8])
def test_each_meets_about_k_others_all_are_joined_and_no_pair_comes_twice(n, k):
    pairs = choose_pairs(n, k, "seed")
    assert len(set(pairs)) == len(pairs) and all(0 <= i < j < n for i, j in pairs) and joined(n, pairs)
    met = [sum(i in pair for pair in pairs) for i in range(n)]
    if k >= n - 1:
        assert pairs == all_pairs(n)
    elif k == 1:
        assert len(pairs) == n - 1 and max(met) == 2
    else:
        assert set(met) <= {k, k - 1} and met.count(k - 1) == (k % 2 and n % 2)
    assert pairs == choose_pairs(n, k, "seed") and choose_pairs(n, 0, "seed") == all_pairs(n)
    if k <= n - 3:
        assert any(pairs != choose_pairs(n, k, f"seed {i}") for i in range(5))


def test_no_group_is_too_small():
    assert [choose_pairs(n, k, "") for n in (0, 1) for k in (0, 1, 4)] == [[]] * 6


@pytest.mark.parametrize("n, k, least", [(8, 4, 0.93), (16, 5, 0.93), (16, 8, 0.95)])
def test_wins_of_part_of_the_pairs_rank_like_all_pairs_of_the_same_noisy_judge(n, k, least):
    """Mean rank correlation with all pairs, and with the truth hardly worse than that of all pairs."""
    def ranks(values):
        return np.argsort(np.argsort(values))

    like_full, part_true, full_true = [], [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        skill = rng.normal(size=n)
        noise = rng.normal(size=(n, n)) * 0.7
        full, part = (ranks(win_probabilities(n, [(i, j, sigmoid(skill[i] - skill[j] + noise[i, j]))
                                                  for i, j in pairs], [1] * n))
                      for pairs in (all_pairs(n), choose_pairs(n, k, str(seed))))
        like_full.append(np.corrcoef(full, part)[0, 1])
        part_true.append(np.corrcoef(ranks(skill), part)[0, 1])
        full_true.append(np.corrcoef(ranks(skill), full)[0, 1])
    print(f"n={n}, k={k}: part~full {np.mean(like_full):.3f}, part~truth {np.mean(part_true):.3f}, "
          f"full~truth {np.mean(full_true):.3f}")
    assert np.mean(like_full) > least
    assert np.mean(part_true) > np.mean(full_true) - 0.08
