"""Calibration: the most likely temperature and bias, whatever the data; Brier score, reliability and AUC by hand."""
import math

import numpy as np
import pytest

from minimath.judges.calibrate import (
    MIXES,
    PRIOR,
    Calibration,
    auc_within,
    brier,
    fit_calibration,
    fit_platt,
    reliability,
    sigmoid,
)
from minimath.judges.compare import fit_logistic


def loss(slope, bias, z, y):
    """Negative log posterior, up to a constant."""
    t = slope * z + bias
    return np.sum(np.logaddexp(0.0, t) - y * t) + PRIOR / 2 * ((slope - 1.0) ** 2 + bias ** 2)


def by_search(z, y, least=0.01):
    """(slope, bias) of the least loss, by golden sections of both: no derivative, no step size."""
    def golden(f, low, high):
        g = (math.sqrt(5) - 1) / 2
        for _ in range(90):
            a, b = high - g * (high - low), low + g * (high - low)
            low, high = (low, b) if f(a) < f(b) else (a, high)
        return (low + high) / 2

    def best_bias(slope):
        return golden(lambda bias: loss(slope, bias, z, y), -400.0, 400.0)
    slope = golden(lambda s: loss(s, best_bias(s), z, y), least, 60.0)
    return slope, best_bias(slope)


def draws(seed, n=60, scale=2.0, offset=0.0, gap=1.0):
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.5
    return scale * (rng.normal(size=n) + gap * (y - 0.5)) + offset, y


def fitted(z, y):
    return fit_platt(z, y)


@pytest.mark.parametrize("data", [draws(0), draws(1, scale=20.0), draws(2, offset=-30.0), draws(3, scale=0.1),
                                  draws(4, n=3), draws(5, gap=8.0), draws(6, n=200, offset=9.0, scale=5.0)],
                         ids=["plain", "large", "far", "small", "three", "separable", "many"])
def test_weights_are_the_most_likely_ones(data):
    z, y = data
    got, want = fitted(z, y), by_search(z, y.astype(float))
    assert loss(*got, z, y) <= loss(*want, z, y) + 1e-7
    assert tuple(got) == pytest.approx(want, abs=2e-3, rel=2e-3)


@pytest.mark.parametrize("offset", [0.0, -10.0, 40.0])
def test_scores_that_point_the_wrong_way_are_not_turned_round_and_fit_in_the_mean(offset):
    z, y = draws(7, n=200, offset=offset, gap=-2.0)
    slope, bias = fitted(z, y)
    p = [sigmoid(slope * x + bias) for x in z]
    assert slope == 0.01 and np.mean(p) == pytest.approx(y.mean(), abs=1e-3)
    assert brier(p, y.tolist()) < 0.26  # of -10 it was 0.47: the bias was that of the slope given up
    assert bias == pytest.approx(by_search(z, y.astype(float))[1], abs=1e-3)


def solutions(seed, *, of_verdict=1.0, of_numbers=1.0, problems=40, each=6):
    """(signs, right, problem): how much each sign tells of right and wrong within a problem."""
    rng = np.random.default_rng(seed)
    problem = np.repeat(np.arange(problems), each)
    right = rng.random(len(problem)) < 0.5
    hard = rng.normal(size=problems)[problem] * 5  # says of a problem, and nothing within it
    z, logp = rng.normal(size=len(problem)) + of_verdict * right, 2 * rng.normal(size=len(problem)) - 20
    return [*zip(z, logp + 2 * of_numbers * right + hard)], right.tolist(), problem.tolist()


def share_of_pairs(signs, right, problem, mix):
    """Of all right against wrong solutions of one problem, pair by pair, the share whose mixed signs say so."""
    wins = [(d > 0) + 0.5 * (d == 0) for i, (z, logp) in enumerate(signs) for j, (y, other) in enumerate(signs)
            if problem[i] == problem[j] and right[i] and not right[j]
            for d in [mix[0] * (z - y) + (mix[1] * (logp - other) if mix[1] else 0.0)]]
    return sum(wins) / len(wins)


def test_the_mix_of_both_signs_is_the_one_that_tells_right_from_wrong_of_one_problem_best():
    signs, right, problem = solutions(1)
    got = fit_calibration(signs, right, problem)
    shares = {mix: share_of_pairs(signs, right, problem, mix) for mix in MIXES}
    best = max(shares, key=shares.get)
    assert 0.1 < best[0] / best[1] < 5.0 and shares[best] > max(shares[1.0, 0.0], shares[0.0, 1.0]) + 0.02
    assert got.likelihood * got.temperature == pytest.approx(best[1] / best[0])
    p = np.array([got.probability(*sign) for sign in signs])
    assert p.mean() == pytest.approx(np.mean(right), abs=2e-3) and brier(p, right) < 0.25


def test_a_few_far_values_of_the_numbers_do_not_give_all_to_the_verdict():
    signs, right, problem = solutions(1)
    for i in range(0, len(signs), 60):
        signs[i] = (signs[i][0], -400.0 if right[i] else -1.0)  # one in 60 tells the wrong way, and far
    got = fit_calibration(signs, right, problem)
    assert got.likelihood * got.temperature >= 0.1999
    pairs = np.array([np.subtract(signs[i], signs[j]) for i in range(len(right)) for j in range(len(right))
                      if problem[i] == problem[j] and right[i] and not right[j]])
    mix = fit_logistic(pairs, np.ones(len(pairs)), PRIOR, mean=np.array([1.0, 0.0]), leap=1.0)
    assert 0 < mix[1] / mix[0] < 0.02  # what the likelihood of the same pairs says


@pytest.mark.parametrize("turned, alone", [({"of_numbers": -2.0}, 1), ({"of_verdict": -2.0}, 0)])
def test_a_sign_that_points_the_wrong_way_counts_nothing(turned, alone):
    signs, right, problem = solutions(2, **turned)
    got = fit_calibration(signs, right, problem)
    weights = [1 / got.temperature, got.likelihood]
    assert weights[alone] <= 1e-6 < 0.01 < weights[1 - alone]


def test_both_the_wrong_way_give_the_mean():
    signs, right, problem = solutions(3, of_verdict=-3.0, of_numbers=-3.0)
    got = fit_calibration(signs, right, problem)
    assert [got.probability(*sign) for sign in signs] == pytest.approx([np.mean(right)] * len(right), abs=1e-3)


@pytest.mark.parametrize("right", [True, False])
def test_one_class_alone_gives_finite_numbers_on_its_side(right):
    got = fit_calibration([(0.1, -3.0), (-2.0, -1.0), (3.0, -40.0)], [right] * 3, [0, 0, 1])
    assert all(map(math.isfinite, got)) and got.temperature > 0
    assert (got.probability(0.0, -1.0) > 0.8) == right


def test_nothing_to_fit_changes_nothing():
    assert fit_calibration([], [], []) == Calibration(1.0, 0.0, 0.0)
    assert Calibration().probability(0.3, -5.0) == pytest.approx(1 / (1 + math.exp(-0.3)))
    assert Calibration(2.0, 0.5, 0.25).score(3.0, -8.0) == pytest.approx(1.5 + 0.5 - 2.0)


def test_separable_scores_stay_finite_and_far_apart():
    got = fit_calibration([(z, 0.0) for z in (-3.0, -2.0, 2.0, 3.0)], [False, False, True, True], [0, 1, 0, 1])
    assert got.probability(-2.0, 0.0) < 0.02 and got.probability(2.0, 0.0) > 0.98 and all(map(math.isfinite, got))


def test_sigmoid_takes_any_number_and_keeps_nan():
    assert sigmoid(0.0) == 0.5 and sigmoid(-1e9) == 0.0 and sigmoid(1e9) == 1.0 and sigmoid(math.inf) == 1.0
    assert sigmoid(-math.inf) == 0.0 and sigmoid(-699.0) > 0.0
    assert math.isnan(sigmoid(math.nan))  # it was 0: a grade of NaN logits


def test_brier_and_reliability_by_hand():
    p, right = [0.0, 0.05, 0.5, 0.55, 1.0, 0.95], [False, True, True, False, True, True]
    assert brier(p, right) == pytest.approx((0 + 0.9025 + 0.25 + 0.3025 + 0 + 0.0025) / 6)
    bins = reliability(p, right)
    assert [count for _, _, count in bins] == [2, 2, 2]  # 1.0 belongs to the last bin
    assert [(round(a, 3), b) for a, b, _ in bins] == [(0.025, 0.5), (0.525, 0.5), (0.975, 1.0)]
    assert reliability([], []) == [] and reliability([0.2], [True], bins=4) == [(0.2, 1.0, 1)]


def test_auc_counts_pairs_ties_one_half():
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 5, 30).tolist(), rng.integers(0, 4, 20).tolist()
    pairs = [1.0 if x > y else 0.5 if x == y else 0.0 for x in a for y in b]
    right = np.arange(50) < 30
    assert auc_within(np.zeros(50), right, np.array(a + b)) == pytest.approx(sum(pairs) / len(pairs))
    assert math.isnan(auc_within(np.zeros(50), right | True, np.array(a + b)))


def test_a_solution_without_numbers_has_the_likelihood_of_wrong_ones():
    signs, right = [(1.0, -1.0), (0.5, -2.0), (-1.0, -8.0), (-0.5, -6.0)], [True, True, False, False]
    got = fit_calibration(signs, right, [0, 1, 0, 1])
    assert got.unwritten == -7.0 and got.probability(0.3, math.nan) == got.probability(0.3, -7.0)
    assert math.isnan(got.probability(math.nan, math.nan))


def test_auc_within_counts_pairs_of_one_problem_and_of_like_length():
    number, right = np.array([0, 0, 0, 1, 1, 2]), np.array([True, False, False, True, False, True])
    score, tokens = np.array([2.0, 1.0, 2.0, 0.0, 5.0, 9.0]), np.array([100, 101, 200, 50, 62, 7])
    assert auc_within(number, right, score) == pytest.approx((1 + 0.5 + 0) / 3)
    assert auc_within(number, right, score, tokens) == pytest.approx((1 + 0) / 2)   # 100 and 200 are not alike
    assert math.isnan(auc_within(number, np.ones(6, dtype=bool), score))
