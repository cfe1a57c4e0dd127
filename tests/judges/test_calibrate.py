"""Calibration: the most likely temperature and bias, whatever the data; Brier score, reliability and AUC by hand."""
import math

import numpy as np
import pytest

from minimath.judges.calibrate import Calibration, auc, brier, fit_calibration, reliability, sigmoid

PRIOR = 1e-2


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


@pytest.mark.parametrize("data", [draws(0), draws(1, scale=20.0), draws(2, offset=-30.0), draws(3, scale=0.1),
                                  draws(4, n=3), draws(5, gap=8.0), draws(6, n=200, offset=9.0, scale=5.0)],
                         ids=["plain", "large", "far", "small", "three", "separable", "many"])
def test_temperature_and_bias_are_the_most_likely_ones(data):
    z, y = data
    got = fit_calibration([(x, 0.0) for x in z], y.tolist())
    slope, bias = by_search(z, y.astype(float))
    assert loss(1 / got.temperature, got.bias, z, y) <= loss(slope, bias, z, y) + 1e-7
    assert (1 / got.temperature, got.bias) == pytest.approx((slope, bias), abs=2e-3, rel=2e-3)


@pytest.mark.parametrize("offset", [0.0, -10.0, 40.0])
def test_scores_that_point_the_wrong_way_are_not_turned_round_and_fit_in_the_mean(offset):
    z, y = draws(7, n=200, offset=offset, gap=-2.0)
    got = fit_calibration([(x, 0.0) for x in z], y.tolist())
    p = [got.probability(x, 0.0) for x in z]
    assert got.temperature == pytest.approx(100.0) and np.mean(p) == pytest.approx(y.mean(), abs=1e-3)
    assert brier(p, y.tolist()) < 0.26  # of -10 it was 0.47: the bias was that of the slope given up
    assert sorted(p) == [p[i] for i in np.argsort(z)]


def test_both_signs_are_weighed_and_none_is_turned_round():
    rng = np.random.default_rng(11)
    y = rng.random(400) < 0.5
    z, logp = rng.normal(size=400) + y, 4 * rng.normal(size=400) + 6 * y - 20
    got = fit_calibration(list(zip(z, logp)), y.tolist())

    def loss_of(slope, likelihood, bias):
        return loss(slope, bias, z, y) if not likelihood else np.sum(np.logaddexp(0.0, t := slope * z + likelihood
            * logp + bias) - y * t) + PRIOR / 2 * ((slope - 1) ** 2 + likelihood ** 2 + bias ** 2)
    best = 1 / got.temperature, got.likelihood, got.bias
    assert got.likelihood > 0.1
    for k in range(3):
        for d in (-1e-3, 1e-3):  # convex: a point that is least along every axis is least
            assert loss_of(*(x + d * (i == k) for i, x in enumerate(best))) > loss_of(*best)
    turned = fit_calibration(list(zip(z, -logp)), y.tolist())
    alone = fit_calibration([(x, 0.0) for x in z], y.tolist())
    assert turned.likelihood == 0 and turned == pytest.approx(alone, abs=1e-6)
    assert got.score(1.0, -2.0) == pytest.approx(best[0] - 2 * best[1] + best[2])


@pytest.mark.parametrize("right", [True, False])
def test_one_class_alone_gives_finite_numbers_on_its_side(right):
    got = fit_calibration([(0.1, -3.0), (-2.0, -1.0), (3.0, -40.0)], [right] * 3)
    assert math.isfinite(got.temperature) and math.isfinite(got.bias) and got.temperature > 0
    assert (got.probability(0.0, -1.0) > 0.8) == right


def test_nothing_to_fit_changes_nothing():
    assert fit_calibration([], []) == Calibration(1.0, 0.0, 0.0)
    assert Calibration().probability(0.3, -5.0) == pytest.approx(1 / (1 + math.exp(-0.3)))


def test_separable_scores_stay_finite_and_far_apart():
    got = fit_calibration([(z, 0.0) for z in (-3.0, -2.0, 2.0, 3.0)], [False, False, True, True])
    low, high = got.probability(-2.0, 0.0), got.probability(2.0, 0.0)
    assert low < 0.02 and high > 0.98 and math.isfinite(1 / got.temperature)


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
    assert auc(a, b) == pytest.approx(sum(pairs) / len(pairs))
    assert auc([1.0, 1.0], [1.0]) == 0.5 and auc([2.0], [1.0]) == 1.0 and auc([0.0], [1.0]) == 0.0
    assert math.isnan(auc([], [1.0])) and math.isnan(auc([1.0], []))
