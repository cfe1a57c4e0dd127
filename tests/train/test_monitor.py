"""The warnings of a collapse: each sign alone, once, and none on a healthy run."""

import json
import random

import pytest

from minimath.train.monitor import CANARY_PAIRS, WINDOW, CollapseMonitor

HEALTHY = {"policy/entropy": 0.5, "rollout/tokens": 100.0, "rollout/correct": 0.5, "rollout/finished": 1.0,
           "rollout/groups": 8, "rollout/dropped_groups": 2}
COLLAPSES = {
    "entropy": ({"policy/entropy": 0.05}, "entropy collapse"),
    "length": ({"rollout/tokens": 220.0}, "length is running away"),
    "correct": ({"rollout/correct": 0.1}, "solve rate falls off"),
    "cut": ({"rollout/finished": 0.5}, "cut at max_new_tokens"),
}


def run(steps, monitor=None):
    """[(step, warning)] of the given metrics."""
    monitor = monitor or CollapseMonitor()
    return [(i, text) for i, metrics in enumerate(steps, 1) for text in monitor.check(metrics)]


@pytest.mark.parametrize("kind", COLLAPSES)
def test_each_sign_is_said_alone_once_and_in_plain_words(kind):
    change, words = COLLAPSES[kind]
    said = run([HEALTHY] * 30 + [HEALTHY | change] * 60)
    assert len(said) == 1, said
    step, text = said[0]
    assert words in text and 30 < step <= 30 + WINDOW


@pytest.mark.parametrize("kind", COLLAPSES)
def test_one_bad_step_is_noise(kind):
    change = {"policy/entropy": 0.0, "rollout/tokens": 300.0, "rollout/correct": 0.0, "rollout/finished": 0.0}
    name = next(iter(COLLAPSES[kind][0]))
    assert run([HEALTHY] * 30 + [HEALTHY | {name: change[name]}] + [HEALTHY] * 30) == []


def test_longer_completions_that_are_correct_more_often_are_no_collapse():
    assert run([HEALTHY] * 20 + [HEALTHY | {"rollout/tokens": 200.0, "rollout/correct": 0.7}] * 40) == []


def test_chance_alone_raises_no_alarm():
    """200 runs of 100 steps at a constant solve rate, the completions of a problem all correct or all wrong."""
    rng = random.Random(0)
    false_alarms = 0
    for _ in range(200):
        rates = [sum(rng.random() < 0.5 for _ in range(8)) / 8 for _ in range(100)]
        of_a_step = HEALTHY | {"rollout/groups": 8, "rollout/dropped_groups": 0}
        false_alarms += bool(run([of_a_step | {"rollout/correct": r} for r in rates]))
    assert false_alarms <= 10


def test_steps_without_an_update_have_no_entropy_and_are_taken():
    idle = {name: value for name, value in HEALTHY.items() if name != "policy/entropy"}
    said = run([HEALTHY, idle] * 15 + [HEALTHY | {"policy/entropy": 0.01}, idle] * 15)
    assert len(said) == 1 and "entropy" in said[0][1]
    assert run([idle] * 40) == []


def test_a_monitor_saved_and_read_again_at_any_step_says_the_same():
    change = {"policy/entropy": 0.05, "rollout/correct": 0.1, "rollout/tokens": 400.0, "rollout/finished": 0.4}
    steps = canaries(hacked, steps=25) + [metrics | change for metrics in canaries(lambda step: 0.9, steps=25)]
    whole = run(steps)
    assert len(whole) == 5
    for cut in range(1, len(steps)):
        monitor, again = CollapseMonitor(), CollapseMonitor()
        before = run(steps[:cut], monitor)
        again.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
        after = run(steps[cut:], again)
        assert before + [(i + cut, text) for i, text in after] == whole


def canaries(rate, steps=60, every=4, correct=lambda step: 0.5, seed=None):
    """Metrics of a run whose wrong completions win `rate(step)` of 8 pairs every few steps; by chance with a seed."""
    rng, out = random.Random(seed), []
    for step in range(1, steps + 1):
        metrics = HEALTHY | {"rollout/correct": correct(step)}
        if seed is not None:
            metrics["rollout/correct"] = sum(rng.random() < correct(step) for _ in range(10)) / 10
        if step % every == 0:
            wins = rate(step) if seed is None else sum(rng.random() < rate(step) for _ in range(8)) / 8
            metrics |= {"canary/rollout_worse_wins": wins, "canary/rollout_pairs": 8, "canary/rollout_no_votes": 0}
        out.append(metrics)
    return out


def hacked(step):
    return 0.1 if step <= 24 else 0.9


def gaps(steps):
    return [(step, text) for step, text in run(steps) if "canary gap" in text]


def test_the_canary_gap_of_a_hacked_run_is_said_once_with_what_it_means_and_what_to_do():
    said = gaps(canaries(hacked, steps=100))
    assert len(said) == 1 and 24 < said[0][0] <= 24 + 4 * CANARY_PAIRS // 8
    for words in ("please the judge rather than to be correct", "best checkpoint", "stronger judge", "verifier=exact",
                  "judge_weight"):
        assert words in said[0][1]


def test_a_rise_below_one_half_is_a_gap_too_unless_more_are_correct():
    def rise(step):
        return 0.0 if step <= 24 else 0.48
    assert len(gaps(canaries(rise, steps=100))) == 1
    assert gaps(canaries(rise, steps=100, correct=lambda step: 0.4 if step <= 24 else 0.8)) == []


def test_a_judge_that_prefers_wrong_completions_from_the_start_is_said_as_such():
    [(step, text)] = gaps(canaries(lambda step: 0.95))
    assert step == 4 * CANARY_PAIRS // 8 and "the judge prefers wrong solutions" in text
    assert gaps(canaries(lambda step: 0.5)) == []


def test_few_pairs_and_missing_votes_are_no_evidence():
    few = [f | {"canary/rollout_pairs": 1} if "canary/rollout_pairs" in f else f for f in canaries(hacked)]
    unanswered = [f | {"canary/rollout_no_votes": 15} if "canary/rollout_pairs" in f else f for f in canaries(hacked)]
    silent = [f | {"canary/rollout_worse_wins": None} for f in canaries(hacked)]
    assert gaps(few) == gaps(unanswered) == gaps(silent) == []


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_the_canary_gap_is_hardly_ever_said_by_chance(rate):
    """200 runs of 100 steps whose rates stand still."""
    assert sum(bool(gaps(canaries(lambda step: rate, steps=100, seed=seed))) for seed in range(200)) < 4


def test_the_canary_gap_is_found_through_the_noise():
    found = [gaps(canaries(hacked, steps=80, seed=seed)) for seed in range(50)]
    assert sum(map(bool, found)) >= 48 and all(text[0][0] > 24 for text in found if text)
