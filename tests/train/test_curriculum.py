"""The curriculum: off it changes nothing; on, it draws where there is something to learn, and survives a resume."""

import json

import numpy as np
import pytest

from minimath.data.batch import stream_indices
from minimath.data.examples import Example
from minimath.data.sample import Group, Sample
from minimath.train.curriculum import MEMORY, ProblemSampler, chance_of_both

SIZE, STEP, GROUP = 20, 4, 8
SOLVED = [0] * 8 + [4] * 4 + [8] * 8  # correct completions of 8 of each problem: only 8 .. 11 can teach


def sampler_of(curriculum="learnable", seed=0, size=SIZE):
    problems = [(Example(f"problem {i}", answer="1"), [i]) for i in range(size)]
    return ProblemSampler(curriculum, problems, GROUP, seed)


def groups_of(drawn, correct):
    """A group of each problem drawn, of which correct[index] samples are."""
    return [Group(p.example, p.prompt, [Sample([1], [0.0], True, correct=n < correct[p.index]) for n in range(GROUP)])
            for p in drawn]


def reloaded(sampler):
    """A new sampler with the state of another one, through JSON as in a checkpoint."""
    again = sampler_of(sampler.curriculum, sampler.seed)
    again.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    return again


def run(sampler, steps, reload=False):
    """(draws of each step, sampler) of steps whose problems are solved as SOLVED says."""
    drawn = []
    for _ in range(steps):
        problems = sampler.draw(STEP, [])
        sampler.record(problems, groups_of(problems, SOLVED))
        drawn.append([p.index for p in problems])
        sampler = reloaded(sampler) if reload else sampler
    return drawn, sampler


@pytest.mark.parametrize("seed", [0, 7])
def test_off_draws_the_order_of_the_data_bit_for_bit(seed):
    drawn, sampler = run(sampler_of("none", seed), 30)
    assert sum(drawn, []) == stream_indices(0, 30 * STEP, SIZE, seed)
    assert sampler.metrics() == {}


def test_a_problem_drawn_carries_its_prompt_and_its_place_in_the_run_as_the_key_of_its_samples():
    sampler = sampler_of()
    first, second = sampler.draw(3, []), sampler.draw(2, [])
    assert [p.key for p in first + second] == [0, 1, 2, 3, 4]
    assert all(p.prompt == [p.index] and p.example.problem == f"problem {p.index}" for p in first + second)


@pytest.mark.parametrize("curriculum", ["none", "learnable"])
def test_a_state_saved_and_read_again_at_every_step_draws_the_same(curriculum):
    whole, after = run(sampler_of(curriculum), 40)
    again, state = run(sampler_of(curriculum), 40, reload=True)
    assert again == whole and state.state_dict() == after.state_dict()
    first, sampler = run(sampler_of(curriculum), 17)
    assert first + run(reloaded(sampler), 23)[0] == whole
    assert run(sampler_of(curriculum, seed=1), 40)[0] != whole


def test_switched_on_by_a_resume_it_knows_the_solve_rates_measured_before():
    off = run(sampler_of("none"), 2 * SIZE // STEP)[1]
    on = sampler_of()
    on.load_state_dict(off.state_dict())
    drawn = np.bincount(sum(run(on, 30)[0], []), minlength=SIZE)
    assert drawn[8:12].mean() > 1.5 * drawn[:8].mean() and on.metrics()["curriculum/seen"] == SIZE


def test_the_solve_rate_is_an_exponential_mean_of_counts():
    sampler = sampler_of()
    visits = [3, 0, 8, 5]
    [problem] = [p for p in sampler.draw(SIZE, []) if p.index == 2]
    for correct in visits:
        sampler.record([problem], groups_of([problem], {2: correct}))
    powers = MEMORY ** np.arange(len(visits))[::-1]
    assert sampler.counts == {2: pytest.approx((float(powers @ visits), float(GROUP * powers.sum())))}
    assert sampler.metrics() == {"curriculum/seen": 1, "curriculum/solve_rate": pytest.approx(
        float(powers @ visits) / float(GROUP * powers.sum()))}


@pytest.mark.parametrize("correct, seen, group", [(0, 0, 8), (3, 8, 8), (0, 24, 4), (12.5, 12.5, 8)])
def test_the_chance_of_both_is_that_of_a_beta_binomial(correct, seen, group):
    """Against the integral of 1 - p^G - (1 - p)^G over the Beta density, by a sum over a fine grid."""
    p = (np.arange(200_000) + 0.5) / 200_000
    density = p**correct * (1 - p) ** (seen - correct)
    wanted = (density / density.sum() * (1 - p**group - (1 - p) ** group)).sum()
    assert chance_of_both(correct, seen, group) == pytest.approx(wanted, rel=1e-5)
    if not seen:
        assert chance_of_both(correct, seen, group) == pytest.approx(1 - 2 / (group + 1))


def test_learnable_problems_are_drawn_more_often_and_no_other_is_given_up():
    drawn = np.bincount(sum(run(sampler_of(), 400)[0], []), minlength=SIZE)
    assert drawn[8:12].mean() > 2 * drawn[:8].mean() and drawn[8:12].mean() > 2 * drawn[12:].mean()
    assert drawn.min() > 0


def test_weights_are_those_of_the_draw():
    """With one draw a step, each index comes as often as its weight says (chi-square over 4000 draws)."""
    sampler, n = sampler_of(), 4000
    every = sampler.draw(SIZE, [])
    sampler.record(every, groups_of(every, SOLVED))
    hits = np.bincount([sampler.draw(1, [])[0].index for _ in range(n)], minlength=SIZE)
    weights = np.array([chance_of_both(correct, GROUP, GROUP) for correct in SOLVED])
    expected = n * weights / weights.sum()
    assert ((hits - expected) ** 2 / expected).sum() < 44  # 0.1% of chi-square with 19 degrees of freedom


def informative(curriculum):
    """Share of groups with correct and wrong ones in steps 50 to 150 of 8 draws; most problems are too easy or hard."""
    rng, sampler, useful = np.random.default_rng(0), sampler_of(curriculum, size=200), []
    solve = rng.beta(0.25, 0.25, 200)
    for _ in range(150):
        drawn = sampler.draw(8, [])
        correct = {p.index: int(rng.binomial(GROUP, solve[p.index])) for p in drawn}
        sampler.record(drawn, groups_of(drawn, correct))
        useful += [0 < n < GROUP for n in correct.values()]
    return np.mean(useful[400:])


def test_a_curriculum_draws_more_groups_that_teach():
    off, learnable = informative("none"), informative("learnable")
    assert learnable > 1.25 * off, (off, learnable)


def test_a_step_draws_a_problem_twice_only_when_there_is_no_other():
    sampler = run(sampler_of(), 30)[1]
    taken = [p.index for p in sampler.draw(8, [])]
    more = [p.index for p in sampler.draw(12, taken)]  # a refill, to the last problem
    assert sorted(taken + more) == list(range(SIZE))
    assert {p.index for p in sampler.draw(3, [*taken, *more])} <= set(taken[:3])  # those drawn longest ago
