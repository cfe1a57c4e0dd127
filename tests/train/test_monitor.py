"""The warnings of a collapse: each sign alone, once, and none on a healthy run."""

import io
import json
import random
from types import SimpleNamespace

import pytest

from minimath.config.schema import RLAIFConfig
from minimath.core.log import RunLog
from minimath.train.monitor import (
    CANARY_PAIRS,
    WINDOW,
    collapse_warnings,
    judge_facts,
    log_group,
    new_monitor,
    part_facts,
    reward_parts,
    rollout_facts,
    shown,
)
from minimath.train.rewards import GroupFacts, group_rewards

HEALTHY = {"entropy": 0.5, "mean_tokens": 100.0, "right": 0.5, "ended": 1.0, "groups": 8, "dropped_groups": 2}
COLLAPSES = {
    "entropy": ({"entropy": 0.05}, "entropy collapse"),
    "length": ({"mean_tokens": 220.0}, "length is running away"),
    "right": ({"right": 0.1}, "solve rate falls off"),
    "cut": ({"ended": 0.5}, "cut at max_new_tokens"),
}


def run(steps, monitor=None):
    """[(step, warning)] of the given metrics."""
    monitor = new_monitor() if monitor is None else monitor
    return [(i, text) for i, facts in enumerate(steps, 1) for text in collapse_warnings(monitor, facts)]


@pytest.mark.parametrize("kind", COLLAPSES)
def test_each_sign_is_said_alone_once_and_in_plain_words(kind):
    change, words = COLLAPSES[kind]
    said = run([HEALTHY] * 30 + [HEALTHY | change] * 60)
    assert len(said) == 1, said
    step, text = said[0]
    assert words in text and 30 < step <= 30 + WINDOW


@pytest.mark.parametrize("kind", COLLAPSES)
def test_one_bad_step_is_noise(kind):
    change = {"entropy": 0.0, "mean_tokens": 300.0, "right": 0.0, "ended": 0.0}
    name = next(iter(COLLAPSES[kind][0]))
    assert run([HEALTHY] * 30 + [HEALTHY | {name: change[name]}] + [HEALTHY] * 30) == []


def test_longer_completions_that_are_right_more_often_are_no_collapse():
    assert run([HEALTHY] * 20 + [HEALTHY | {"mean_tokens": 200.0, "right": 0.7}] * 40) == []


def test_chance_alone_raises_no_alarm():
    """200 runs of 100 steps at a constant solve rate, the completions of a problem all right or all wrong."""
    rng = random.Random(0)
    false_alarms = 0
    for _ in range(200):
        rates = [sum(rng.random() < 0.5 for _ in range(8)) / 8 for _ in range(100)]
        false_alarms += bool(run([HEALTHY | {"right": r, "groups": 8, "dropped_groups": 0} for r in rates]))
    assert false_alarms <= 10


def test_steps_without_an_update_have_no_entropy_and_are_taken():
    idle = {name: value for name, value in HEALTHY.items() if name != "entropy"}
    said = run([HEALTHY, idle] * 15 + [HEALTHY | {"entropy": 0.01}, idle] * 15)
    assert len(said) == 1 and "entropy" in said[0][1]
    assert run([idle] * 40) == []


def test_a_monitor_saved_and_read_again_at_any_step_says_the_same():
    change = {"entropy": 0.05, "right": 0.1, "mean_tokens": 400.0, "ended": 0.4}
    steps = canaries(hacked, steps=25) + [facts | change for facts in canaries(lambda step: 0.9, steps=25)]
    whole = run(steps)
    assert len(whole) == 5
    for cut in range(1, len(steps)):
        monitor = new_monitor()
        before = run(steps[:cut], monitor)
        after = run(steps[cut:], json.loads(json.dumps(monitor)))
        assert before + [(i + cut, text) for i, text in after] == whole


def canaries(rate, steps=60, every=4, right=lambda step: 0.5, seed=None):
    """Metrics of a run whose wrong completions win `rate(step)` of 8 pairs every few steps; by chance with a seed."""
    rng, out = random.Random(seed), []
    for step in range(1, steps + 1):
        facts = HEALTHY | {"right": right(step)}
        if seed is not None:
            facts["right"] = sum(rng.random() < right(step) for _ in range(10)) / 10
        if step % every == 0:
            wins = rate(step) if seed is None else sum(rng.random() < rate(step) for _ in range(8)) / 8
            facts |= {"canary_rollout_worse_wins": wins, "canary_rollout_pairs": 8, "canary_rollout_no_votes": 0}
        out.append(facts)
    return out


def hacked(step):
    return 0.1 if step <= 24 else 0.9


def gaps(steps):
    return [(step, text) for step, text in run(steps) if "canary gap" in text]


def test_the_canary_gap_of_a_hacked_run_is_said_once_with_what_it_means_and_what_to_do():
    said = gaps(canaries(hacked, steps=100))
    assert len(said) == 1 and 24 < said[0][0] <= 24 + 4 * CANARY_PAIRS // 8
    for words in ("please the judge rather than to be right", "best checkpoint", "stronger judge", "gate=exact",
                  "judge_weight"):
        assert words in said[0][1]


def test_a_rise_below_one_half_is_a_gap_too_unless_more_are_right():
    def rise(step):
        return 0.0 if step <= 24 else 0.48
    assert len(gaps(canaries(rise, steps=100))) == 1
    assert gaps(canaries(rise, steps=100, right=lambda step: 0.4 if step <= 24 else 0.8)) == []


def test_a_judge_that_prefers_wrong_completions_from_the_start_is_said_as_such():
    [(step, text)] = gaps(canaries(lambda step: 0.95))
    assert step == 4 * CANARY_PAIRS // 8 and "the judge prefers wrong solutions" in text
    assert gaps(canaries(lambda step: 0.5)) == []


def test_few_pairs_and_missing_votes_are_no_evidence():
    few = [f | {"canary_rollout_pairs": 1} if "canary_rollout_pairs" in f else f for f in canaries(hacked)]
    unanswered = [f | {"canary_rollout_no_votes": 15} if "canary_rollout_pairs" in f else f for f in canaries(hacked)]
    silent = [f | {"canary_rollout_worse_wins": None} for f in canaries(hacked)]
    assert gaps(few) == gaps(unanswered) == gaps(silent) == []


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_the_canary_gap_is_hardly_ever_said_by_chance(rate):
    """200 runs of 100 steps whose rates stand still."""
    assert sum(bool(gaps(canaries(lambda step: rate, steps=100, seed=seed))) for seed in range(200)) < 4


def test_the_canary_gap_is_found_through_the_noise():
    found = [gaps(canaries(hacked, steps=80, seed=seed)) for seed in range(50)]
    assert sum(map(bool, found)) >= 48 and all(text[0][0] > 24 for text in found if text)


def test_a_monitor_of_an_older_checkpoint_learns_of_canaries():
    monitor = new_monitor()
    del monitor["canary_first"], monitor["canary_last"]
    assert any("canary gap" in text for _, text in run(canaries(hacked), monitor))


def test_judge_figures_of_the_rounds_of_a_step_are_added_up_and_means_weighted_by_the_questions():
    same = {"no_votes": 1, "skipped": 2, "seconds": 0.5, "order_conflicts": 0.1}
    rounds = [same | {"comparisons": n, "position_bias": bias, "error": error}
              for n, bias, error in ((30, 0.2, ""), (10, -0.2, "down"), (0, 9.0, ""))]
    facts = judge_facts(rounds)
    assert facts["judge_comparisons"] == 40 and facts["judge_no_votes"] == 3 and facts["judge_skipped"] == 6
    assert facts["judge_position_bias"] == pytest.approx(0.1) and facts["judge_error"] == "down"
    assert judge_facts([rounds[2]])["judge_position_bias"] == 0


def group_facts(**changes):
    facts = {"example": None, "texts": ["long", "short", "wrong"], "right": [True, True, False], "tokens": [30, 10, 20],
             "ended": [True] * 3, "format": [1.0, 0.0, 1.0], "win": [0.9, 0.2, None], "max_tokens": 64}
    return GroupFacts(**{**facts, **changes})


def test_the_parts_of_a_reward_add_up_to_it():
    cfg, facts = RLAIFConfig(reward="judge", judge_weight=0.3, brevity_weight=0.2, format_weight=0.1), group_facts()
    parts = reward_parts(cfg, facts)
    assert parts == {"judge": [0.9, 0.2, None], "length": [-1.0, 1.0, 0.0], "format": [1.0, 0.0, 1.0]}
    want = [ok * (1 + 0.3 * (2 * (w or 0.5) - 1) + 0.2 * length) + 0.1 * f
            for ok, w, length, f in zip(facts.right, *parts.values(), strict=True)]
    assert group_rewards(cfg, facts) == pytest.approx(want)
    cfg = RLAIFConfig(reward="paper", reward_parts="right=1,brevity=0.5")
    assert group_rewards(cfg, facts) == pytest.approx([r + 0.5 * b for r, b in zip(*reward_parts(cfg, facts).values())])
    assert reward_parts(RLAIFConfig(reward="python:mine.fn"), facts) == {}


def rollout(**fields):
    completion = [SimpleNamespace(ids=[1] * n, logp=[-0.5] * n, ended=True) for n in (30, 10, 20)]
    return SimpleNamespace(completions=completion, right=[True, True, False], rewards=[1.2, 0.9, 0.1],
                           advantage=[1.0, 0.0, -1.0], texts=["long", "short", "wrong"],
                           example=SimpleNamespace(problem="p", answer="5"), **({"parts": {}} | fields))


def test_what_stands_beside_the_progress_bar_has_speed_reward_and_its_parts():
    parts = reward_parts(RLAIFConfig(), group_facts())
    facts = rollout_facts([rollout(parts=parts)] * 2, [], []) | {"rollout_seconds": 2.0, "update_seconds": 1.0}
    beside = shown(facts)
    assert beside.pop("judge_spread") == pytest.approx(0.7)  # of 0.9 and 0.2; a vote that is missing does not count
    assert beside == pytest.approx({"tok_s": 40.0, "reward": 2.2 / 3, "right": 2 / 3, "tokens": 20.0, "length": 0.0,
                                    "format": 2 / 3})
    assert part_facts([{"judge": [None, None]}]) == {}  # nobody voted: nothing to show
    assert set(shown(rollout_facts([rollout()], [], []) | {"rollout_seconds": 0.0})) == {"tok_s", "reward", "right",
                                                                                        "tokens"}


def test_the_best_and_the_worst_completion_of_a_group_are_shown_with_their_parts(tmp_path):
    out = io.StringIO()
    with RunLog(tmp_path, "test", stream=out) as log:
        log_group(rollout(parts=reward_parts(RLAIFConfig(), group_facts())), 7, log)
    assert out.getvalue().splitlines()[1:] == [
        "step 7, best of 3 (reward 1.20, right, judge 0.90, length -1.00, format 1.00, 30 tokens):", "    long",
        "step 7, worst of 3 (reward 0.10, wrong, length 0.00, format 1.00, 20 tokens):", "    wrong"]
    assert json.loads((tmp_path / "samples.jsonl").read_text())["texts"] == ["long", "short", "wrong"]
