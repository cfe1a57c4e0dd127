"""The curriculum: off it changes nothing; on, it draws where there is something to learn, and survives a resume."""

import json
import math

import numpy as np
import pytest

from minimath.data.batch import stream_indices
from minimath.config.load import load_config
from minimath.config.schema import RLAIFConfig
from minimath.core.errors import UserError
from minimath.train.curriculum import (
    MEMORY,
    REST,
    chance_of_both,
    counts,
    curriculum_facts,
    draw,
    new_curriculum,
    record,
)

SIZE, STEP, GROUP = 20, 4, 8
SOLVED = [0] * 8 + [4] * 4 + [8] * 8  # right completions of 8 of each problem: only 8 .. 11 can teach


def run(cfg, steps, state=None, cursor=0, reload=False):
    """(draws of each step, state, cursor) of steps whose problems are solved as SOLVED says."""
    state, drawn = new_curriculum() if state is None else state, []
    for _ in range(steps):
        chosen = draw(cfg, state, cursor, STEP, SIZE, [])
        for index in chosen:
            record(state, index, SOLVED[index], GROUP, cursor)
            cursor += 1
        drawn.append(chosen)
        state = json.loads(json.dumps(state)) if reload else state
    return drawn, state, cursor


ON = [{"curriculum": "learnable"}, {"min_solve_rate": 0.1, "max_solve_rate": 0.9}, {"max_solve_rate": 0.9},
      {"curriculum": "learnable", "min_solve_rate": 0.2}]


@pytest.mark.parametrize("seed", [0, 7])
def test_off_draws_the_order_of_the_data_bit_for_bit(seed):
    drawn, state, _ = run(RLAIFConfig(seed=seed), 30)
    assert sum(drawn, []) == stream_indices(0, 30 * STEP, SIZE, seed)
    assert curriculum_facts(RLAIFConfig(), state, 120, SIZE) == {}


@pytest.mark.parametrize("options", ON)
def test_a_state_saved_and_read_again_at_every_step_draws_the_same(options):
    cfg = RLAIFConfig(group_size=GROUP, **options)
    whole, after, cursor = run(cfg, 40)
    assert run(cfg, 40, reload=True) == (whole, after, cursor)
    first, state, cursor = run(cfg, 17)
    assert first + run(cfg, 23, json.loads(json.dumps(state)), cursor)[0] == whole
    assert run(RLAIFConfig(group_size=GROUP, seed=1, **options), 40)[0] != whole


def test_the_solve_rate_is_an_exponential_mean_of_counts():
    state = new_curriculum()
    visits = [3, 0, 8, 5]
    for cursor, right in enumerate(visits):
        record(state, 2, right, GROUP, cursor)
    powers = MEMORY ** np.arange(len(visits))[::-1]
    assert counts(state, 2) == pytest.approx((float(powers @ visits), float(GROUP * powers.sum())))
    assert counts(state, 3) == (0, 0)


@pytest.mark.parametrize("right, seen, group", [(0, 0, 8), (3, 8, 8), (0, 24, 4), (12.5, 12.5, 8)])
def test_the_chance_of_both_is_that_of_a_beta_binomial(right, seen, group):
    """Against the integral of 1 - p^G - (1 - p)^G over the Beta density, by a sum over a fine grid."""
    p = (np.arange(200_000) + 0.5) / 200_000
    density = p**right * (1 - p) ** (seen - right)
    wanted = (density / density.sum() * (1 - p**group - (1 - p) ** group)).sum()
    assert chance_of_both(right, seen, group) == pytest.approx(wanted, rel=1e-5)
    if not seen:
        assert chance_of_both(right, seen, group) == pytest.approx(1 - 2 / (group + 1))


def test_learnable_problems_are_drawn_more_often_and_no_other_is_given_up():
    cfg = RLAIFConfig(group_size=GROUP, curriculum="learnable")
    drawn = np.bincount(sum(run(cfg, 400)[0], []), minlength=SIZE)
    assert drawn[8:12].mean() > 2 * drawn[:8].mean() and drawn[8:12].mean() > 2 * drawn[12:].mean()
    assert drawn.min() > 0


def test_weights_are_those_of_the_draw():
    """With one draw a step, each index comes as often as its weight says (chi-square over 4000 draws)."""
    state = new_curriculum()
    for index, right in enumerate(SOLVED):
        record(state, index, right, GROUP, 0)
    cfg = RLAIFConfig(group_size=GROUP, curriculum="learnable")
    n = 4000
    hits = np.bincount([draw(cfg, state, cursor, 1, SIZE, [])[0] for cursor in range(n)], minlength=SIZE)
    weights = np.array([chance_of_both(right, GROUP, GROUP) for right in SOLVED])
    expected = n * weights / weights.sum()
    assert ((hits - expected) ** 2 / expected).sum() < 44  # 0.1% of chi-square with 19 degrees of freedom


def test_problems_outside_the_band_rest_and_come_back():
    cfg = RLAIFConfig(group_size=GROUP, min_solve_rate=0.1, max_solve_rate=0.9)
    drawn, state, cursor = run(cfg, 60)
    order = sum(drawn, [])
    assert sorted(order[:SIZE]) == list(range(SIZE))  # first each is measured once
    hard = [place for place, index in enumerate(order) if index == 0]
    assert len(hard) >= 2 and min(b - a for a, b in zip(hard, hard[1:])) >= REST * SIZE
    assert set(order[SIZE:SIZE + 30]) == {8, 9, 10, 11}  # the others rest
    facts = curriculum_facts(cfg, state, cursor, SIZE)
    assert facts["problems_seen"] == SIZE and facts["problems_resting"] == 16
    assert facts["solve_rate"] == pytest.approx(np.mean(SOLVED) / GROUP)


def informative(**options):
    """Share of groups with right and wrong ones in steps 50 to 150 of 8 draws; most problems are too easy or hard."""
    cfg, rng = RLAIFConfig(group_size=GROUP, **options), np.random.default_rng(0)
    solve, state, useful = rng.beta(0.25, 0.25, 200), new_curriculum(), []
    for cursor in range(0, 150 * 8, 8):
        for place, index in enumerate(draw(cfg, state, cursor, 8, 200, [])):
            right = int(rng.binomial(GROUP, solve[index]))
            record(state, index, right, GROUP, cursor + place)
            useful.append(0 < right < GROUP)
    return np.mean(useful[400:])


def test_a_curriculum_draws_more_groups_that_teach():
    off, learnable = informative(), informative(curriculum="learnable")
    band = informative(min_solve_rate=0.05, max_solve_rate=0.95)
    assert learnable > 1.25 * off and band > 1.5 * off, (off, learnable, band)


@pytest.mark.parametrize("options", ON)
def test_a_step_never_draws_a_problem_twice_even_when_most_rest(options):
    cfg = RLAIFConfig(group_size=GROUP, **options)
    state, cursor = run(cfg, 30)[1:]
    taken = draw(cfg, state, cursor, 8, SIZE, [])
    more = draw(cfg, state, cursor + 8, 12, SIZE, taken)  # a refill, to the last problem
    assert sorted(taken + more) == list(range(SIZE))


def test_switched_on_by_a_resume_the_band_goes_on_in_the_data_where_the_run_was():
    off, state, cursor = run(RLAIFConfig(), 2)
    cfg = RLAIFConfig(min_solve_rate=0.01)
    assert draw(cfg, state, cursor, STEP, SIZE, []) == stream_indices(cursor, STEP, SIZE, 0)


def test_an_empty_band_is_refused():
    with pytest.raises(UserError, match="must be below"):
        load_config(RLAIFConfig, None, ["min_solve_rate=0.9", "max_solve_rate=0.5"])
    assert math.isclose(load_config(RLAIFConfig, None, ["min_solve_rate=0.1"]).min_solve_rate, 0.1)
