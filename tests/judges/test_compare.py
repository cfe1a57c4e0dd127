"""Comparison plans and strength fits, against independent forms and known strengths."""
import itertools
import math

import numpy as np
import pytest

from minimath.judges.compare import (
    PRIOR,
    expected_score,
    fit_strengths,
    round_robin,
    swiss_pairs,
    swiss_rounds,
    win_probabilities,
)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_posterior(s, nu, results, ties):
    """Davidson's log-likelihood, outcome by outcome, and the priors; written from the paper's probabilities."""
    total = -PRIOR * sum(x * x for x in s) / 2 - (PRIOR * nu if ties else 0)
    for i, j, p in results:
        a, b = math.exp(s[i]), math.exp(s[j])
        z = a + b + nu * math.sqrt(a * b)
        tie = 1 - abs(2 * p - 1) if ties else 0.0
        won = p - tie / 2
        total += won * math.log(a / z) + (1 - won - tie) * math.log(b / z)
        total += tie * math.log(nu * math.sqrt(a * b) / z) if tie else 0.0
    return total


def grid_maximum(results, ties):
    """Strengths of 3 items (adding up to 0) and nu at the best point of a grid that is refined around it."""
    best, width, nus = np.zeros(3), 4.0, [0.0]
    low, high = (1e-3, 12.0) if ties else (0.0, 0.0)
    for _ in range(14):
        steps = np.linspace(-width, width, 9)
        nus = np.linspace(low, high, 9) if ties else [0.0]
        points = (((best[0] + x, best[1] + y, -best[0] - x - best[1] - y), nu)
                  for x, y, nu in itertools.product(steps, steps, nus))
        best, nu = max(points, key=lambda point: log_posterior(*point, results, ties))
        width /= 2
        span = (high - low) / 4
        low, high = max(1e-3, nu - span), nu + span
    return np.array(best), nu


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("results", [
    [(0, 1, 0.7), (0, 2, 0.9), (1, 2, 0.55)],
    [(0, 1, 1.0), (0, 2, 1.0), (1, 2, 0.5)],                          # one wins everything
    [(0, 1, 1.0), (1, 2, 1.0), (0, 2, 0.0), (0, 1, 0.5)],             # a circle, and a pair compared twice
    [(0, 1, 0.25), (1, 2, 0.75)],                                     # a pair not compared
])
def test_the_fit_is_the_maximum_of_a_brute_force_grid(results, ties):
    fit = fit_strengths(3, results, ties=ties)
    strengths, nu = grid_maximum(results, ties)
    assert fit.strengths == pytest.approx(strengths, abs=5e-3)
    assert fit.nu == pytest.approx(nu, abs=2e-2)
    assert fit.strengths.sum() == pytest.approx(0, abs=1e-9)


def test_all_ties_and_no_ties_stay_finite_in_davidsons_model():
    tied = fit_strengths(3, [(i, j, 0.5) for i, j in round_robin(3)], ties=True)
    assert tied.strengths == pytest.approx(np.zeros(3)) and 3 < tied.nu < 100
    decided = fit_strengths(3, [(0, 1, 1.0), (0, 2, 1.0), (1, 2, 1.0)], ties=True)
    assert decided.nu == 0.0
    assert decided.strengths == pytest.approx(
        fit_strengths(3, [(0, 1, 1.0), (0, 2, 1.0), (1, 2, 1.0)]).strengths)


def test_one_who_wins_everything_is_finite_and_first():
    n = 16
    fit = fit_strengths(n, [(i, j, 1.0) for i, j in round_robin(n)])
    assert np.isfinite(fit.strengths).all() and np.isfinite(fit.se).all() and (fit.se > 0).all()
    assert (np.diff(fit.strengths) < 0).all() and fit.strengths[0] < 12


@pytest.mark.parametrize("nu", [0.0, 1.0])
def test_known_strengths_are_found_and_lie_within_their_errors(nu):
    rng = np.random.default_rng(0)
    truth = np.array([1.2, 0.4, 0.1, -0.6, -1.1])
    pulls, nus = [], []
    for _ in range(40):
        results = []
        for i, j in round_robin(5) * 12:
            d = truth[i] - truth[j]
            weights = np.array([np.exp(d / 2), nu, np.exp(-d / 2)])
            results.append((i, j, rng.choice([1.0, 0.5, 0.0], p=weights / weights.sum())))
        fit = fit_strengths(5, results, ties=nu > 0)
        nus.append(fit.nu)
        pulls.append((fit.strengths - truth) / fit.se)
    assert np.mean(nus) == pytest.approx(nu, abs=0.15)
    pulls = np.array(pulls)
    assert 0.75 < pulls.std() < 1.25 and abs(pulls.mean(0)).max() < 0.5
    assert np.mean(abs(pulls) < 1.96) > 0.9


def test_standard_errors_are_those_of_the_inverse_hessian_by_differences():
    results = [(0, 1, 0.7), (0, 2, 0.9), (1, 2, 0.55), (2, 3, 0.2)]
    fit, step = fit_strengths(4, results), 1e-4
    hessian = np.zeros((4, 4))
    for a, b in itertools.product(range(4), repeat=2):
        for sign_a, sign_b in itertools.product((1, -1), repeat=2):
            s = fit.strengths.copy()
            s[a] += sign_a * step
            s[b] += sign_b * step
            hessian[a, b] -= sign_a * sign_b * log_posterior(s, 0.0, results, False) / (4 * step**2)
    centre = np.eye(4) - 0.25
    want = np.sqrt(np.diag(centre @ np.linalg.inv(hessian) @ centre))
    assert fit.se == pytest.approx(want, rel=1e-3)


def test_expected_score_is_wins_and_half_the_ties():
    for d, nu in itertools.product((-2.0, 0.0, 0.7), (0.0, 0.5, 3.0)):
        weights = np.array([math.exp(d / 2), nu, math.exp(-d / 2)]) / (math.exp(d / 2) + nu + math.exp(-d / 2))
        assert expected_score(d, nu) == pytest.approx(weights[0] + weights[1] / 2)
    assert expected_score(1.3) == pytest.approx(sigmoid(1.3))


# ---- win probabilities

@pytest.mark.parametrize("ties", [False, True])
def test_wins_of_a_full_round_robin_are_plain_means_and_those_of_the_fit_but_for_the_prior(ties):
    rng = np.random.default_rng(1)
    results = [(i, j, rng.uniform(0.1, 0.9)) for i, j in round_robin(6)]
    wins, fit = win_probabilities(6, results, ties=ties)
    scores = [[p if a == i else 1 - p for a, b, p in results if i in (a, b)] for i in range(6)]
    assert wins == pytest.approx([np.mean(row) for row in scores])
    nearly_flat = fit_strengths(6, results, ties=ties, prior=1e-6)
    expected = expected_score(nearly_flat.strengths[:, None] - nearly_flat.strengths, nearly_flat.nu)
    assert (expected.sum(1) - 0.5) / 5 == pytest.approx(wins, abs=1e-5)
    shrunk = expected_score(fit.strengths[:, None] - fit.strengths, fit.nu)
    assert (shrunk.sum(1) - 0.5) / 5 == pytest.approx(wins, abs=0.05)


def test_unjudged_pairs_come_from_the_fit():
    results = [(0, 1, 0.8), (1, 2, 0.8)]
    wins, fit = win_probabilities(3, results)
    beyond = sigmoid(fit.strengths[0] - fit.strengths[2])
    assert beyond > 0.85                                              # 0 over 1 over 2: more than either step
    assert wins == pytest.approx([(0.8 + beyond) / 2, 0.5, (0.2 + 1 - beyond) / 2])


def test_candidates_that_nothing_joins_drop_out():
    wins, fit = win_probabilities(5, [(0, 1, 1.0), (2, 3, 0.6)])
    assert wins == [1.0, 0.0, 0.6, 0.4, None]
    assert np.isfinite(fit.strengths).all() and fit.se[4] == max(fit.se) > 2.5
    assert win_probabilities(2, [])[0] == [None, None] and win_probabilities(0, [])[0] == []
    assert win_probabilities(1, [])[0] == [None]


def test_copies_of_a_text_tie_and_count_as_opponents():
    wins, _ = win_probabilities(2, [(0, 1, 0.9)], copies=[3, 1])
    assert wins == pytest.approx([(0.5 * 2 + 0.9) / 3, 0.1])
    assert win_probabilities(1, [], copies=[4])[0] == [0.5]


def test_misfit_tells_a_circle_from_an_order():
    order = [(0, 1, 0.8), (1, 2, 0.8), (0, 2, sigmoid(2 * math.log(4)))]
    circle = [(0, 1, 0.9), (1, 2, 0.9), (0, 2, 0.1)]
    assert fit_strengths(3, order).misfit < 0.06          # the prior's pull alone
    assert fit_strengths(3, circle).misfit == pytest.approx(0.4, abs=0.02)


# ---- the Swiss schedule

def play_swiss(n, judge):
    """(results, pairs per round) of swiss_rounds(n) rounds of judge(i, j)."""
    results, rounds = [], []
    for _ in range(swiss_rounds(n)):
        played = {(i, j) for i, j, _ in results}
        strengths = fit_strengths(n, results).strengths
        rounds.append(swiss_pairs(strengths, played))
        results += [(i, j, judge(i, j)) for i, j in rounds[-1]]
    return results, rounds


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7, 8, 9, 16, 33])
def test_swiss_rounds_pair_each_at_most_once_and_no_pair_twice(n):
    rng = np.random.default_rng(n)
    skill = rng.normal(size=n)
    results, rounds = play_swiss(n, lambda i, j: sigmoid(skill[i] - skill[j]))
    pairs = [(i, j) for i, j, _ in results]
    assert len(set(pairs)) == len(pairs) and all(i < j for i, j in pairs)
    for one in rounds:
        assert len({k for pair in one for k in pair}) == 2 * len(one)
    assert len(pairs) <= (math.ceil(math.log2(n)) + 1) * (n // 2)
    if n >= 7:                                                        # room for every round to be full
        assert len(pairs) == (math.ceil(math.log2(n)) + 1) * (n // 2) < n * (n - 1) / 2
    if n in (2, 3, 4):
        assert len(pairs) == n * (n - 1) / 2
    assert None not in win_probabilities(n, results)[0]               # and they hang together


def test_swiss_pairs_meet_neighbours_and_the_weakest_sits_out():
    assert swiss_pairs([0.0, 3.0, 1.0, 2.0], set()) == [(1, 3), (0, 2)]
    assert swiss_pairs([0.0, 3.0, 1.0, 2.0], {(1, 3)}) == [(1, 2), (0, 3)]
    assert swiss_pairs([5.0, 1.0, 3.0], set()) == [(0, 2)]
    triangles = {(i, j) for i, j in round_robin(6) if (i < 3) != (j < 3)}
    assert len(swiss_pairs([0.0] * 6, triangles)) == 2                # no three pairs left, but two
    assert swiss_pairs([0.0] * 3, set(round_robin(3))) == [] == swiss_pairs([], set())


@pytest.mark.parametrize("n, least", [(8, 0.93), (16, 0.9)])
def test_swiss_wins_rank_like_a_full_round_robin_of_the_same_noisy_judge(n, least):
    """Mean rank correlation with the full schedule, and with the truth hardly worse than the full schedule's."""
    def ranks(values):
        return np.argsort(np.argsort(values))

    like_full, swiss_true, full_true = [], [], []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        skill = rng.normal(size=n)
        noise = rng.normal(size=(n, n)) * 0.7
        judge = lambda i, j, s=skill, e=noise: sigmoid(s[i] - s[j] + e[i, j])
        full = ranks(win_probabilities(n, [(i, j, judge(i, j)) for i, j in round_robin(n)])[0])
        swiss = ranks(win_probabilities(n, play_swiss(n, judge)[0])[0])
        like_full.append(np.corrcoef(full, swiss)[0, 1])
        swiss_true.append(np.corrcoef(ranks(skill), swiss)[0, 1])
        full_true.append(np.corrcoef(ranks(skill), full)[0, 1])
    print(f"n={n}: swiss~full {np.mean(like_full):.3f}, swiss~truth {np.mean(swiss_true):.3f}, "
          f"full~truth {np.mean(full_true):.3f}")
    assert np.mean(like_full) > least
    assert np.mean(swiss_true) > np.mean(full_true) - 0.06
