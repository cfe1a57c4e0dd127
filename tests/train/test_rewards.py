"""Rewards of a group: the judge's, the paper's, the user's own; overlong completions; advantages."""
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimath.config.load import load_config
from minimath.config.schema import RLAIFConfig
from minimath.core.errors import UserError
from minimath.data.examples import Example
from minimath.data.sample import Group, Sample
from minimath.judges.base import HeuristicJudge
from minimath.train.advantages import set_advantages
from minimath.train.rewards import (
    JudgeReward,
    cosine_reward,
    format_score,
    idle_options,
    length_reward,
    make_reward,
    overlong_penalty,
    part_metrics,
    penalised,
)

TOKENS = [120, 40, 300, 80, 80]
CORRECT = [True, True, False, True, False]
WIN = (0.5, 1.0, None, 0.25, None)
BOX = (1, 1, 0, 0, 1)


def group_of(tokens=TOKENS, correct=CORRECT, win=WIN, box=BOX, finished=True):
    samples = [Sample([7] * n, [-1.0] * n, finished, rf"text {i} \boxed{{{i}}}" if boxed else f"text {i}",
                      correct=ok, win=w)
               for i, (n, ok, w, boxed) in enumerate(zip(tokens, correct, win, box, strict=True))]
    return Group(Example("1 + 1?", answer="2"), [1], samples)


def rewards_of(group, max_new_tokens=400, **options):
    """Rewards of a group whose wins are set."""
    together = {"brevity": "minmax", "brevity_weight": 0.25, "brevity_scale": "together", "brevity_control": "none"}
    cfg = RLAIFConfig(max_new_tokens=max_new_tokens, **(together | options))
    reward = make_reward(cfg, None)
    reward.score([group])
    return [sample.reward for sample in group.samples]


def test_judge_rewards_follow_the_formula_and_are_made_of_their_parts():
    group = group_of()
    out = rewards_of(group, judge_weight=0.2, brevity_weight=0.3, format_weight=0.1)
    c, w, f = np.array(CORRECT, float), np.array([0.5, 1.0, 0.5, 0.25, 0.5]), np.array(BOX, float)
    short = np.array([-1.0, 1.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(out, c * (1 + 0.2 * (2 * w - 1) + 0.3 * short) + 0.1 * f, rtol=1e-12)
    assert [sample.parts for sample in group.samples] == [
        {"judge": win, "brevity": b, "format": x} for win, b, x in zip(WIN, short, f, strict=True)]
    silent = group_of(win=[None] * 5)
    rewards_of(silent)
    metrics = part_metrics([group, silent])
    assert metrics == {"reward/judge_spread": 0.75, "reward/brevity": 0.0, "reward/format": pytest.approx(0.6)}
    assert "reward/judge_spread" not in part_metrics([silent])  # nobody voted: nothing to show


def test_no_vote_leaves_the_judge_term_out():
    silent, neutral = (rewards_of(group_of([9], [True], [w], [0]), brevity_weight=0.0) for w in (None, 0.5))
    assert silent == neutral == [1.0]


def test_correct_always_beats_wrong_whatever_the_judge_and_the_lengths_say():
    rng = random.Random(0)
    for _ in range(500):
        size = rng.randint(2, 8)
        judge_weight = rng.uniform(0, 0.5)
        weights = {"judge_weight": judge_weight, "brevity_weight": rng.uniform(0, 0.5 - judge_weight),
                   "format_weight": (format_weight := rng.uniform(0, 0.4999)),
                   "step_weight": rng.uniform(0, 0.4999 - format_weight)}
        correct = [rng.random() < 0.5 for _ in range(size)]
        group = group_of([rng.randint(1, 50) for _ in range(size)], correct,
                         [rng.choice([None, 0.0, 1.0, rng.uniform(-3, 3)]) for _ in range(size)],
                         [rng.random() < 0.5 for _ in range(size)])
        for sample in group.samples:
            sample.text += rng.choice(["", " 2 + 2 = 4", " 2 + 2 = 5"])
        out = rewards_of(group, overlong=rng.choice(["none", "penalty"]), max_new_tokens=50, **weights)
        lowest = min((r for r, ok in zip(out, correct) if ok), default=math.inf)
        assert lowest > max((r for r, ok in zip(out, correct) if not ok), default=-math.inf)


def test_a_step_that_does_not_hold_costs_whether_the_answer_is_correct_or_not():
    group = group_of([9] * 5, [True, True, False, False, False], [None] * 5, [0] * 5)
    for sample, text in zip(group.samples, ("2 + 2 = 4", "2 + 2 = 5, 1 + 1 = 2", "2 + 2 = 4", "2 + 2 = 5", "no sum")):
        sample.text = text
    assert rewards_of(group, brevity_weight=0.0, step_weight=0.5) == [1.0, 0.5, 0.0, -0.5, 0.0]
    assert part_metrics([group])["reward/wrong_step"] == pytest.approx(0.4)
    assert rewards_of(group, brevity_weight=0.0) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert "step_weight=0" in RLAIFConfig(step_weight=0.5, brevity_weight=0.1, scale_advantage="maxrl").check()


@pytest.mark.parametrize("weights", [(0.3, 0.3, 0.0), (0.6, 0.0, 0.0), (0.25, 0.25, 0.5), (0.2, 0.0, 0.3, 0.5)])
def test_weights_that_let_a_wrong_answer_win_are_refused(weights):
    names = ("judge_weight", "brevity_weight", "format_weight", "step_weight")
    with pytest.raises(UserError, match="correct answer always beats"):
        load_config(RLAIFConfig, None, ["brevity_scale=together", *(f"{n}={w}" for n, w in zip(names, weights))])


class Counting(HeuristicJudge):
    """Prefers the second of the texts, and counts what it is asked."""
    def compare(self, pairs):
        self.counts["asked"] += len(pairs)
        return [float(a.text > b.text) for _, a, b, *_ in pairs]


def test_the_judge_compares_the_correct_samples_of_all_groups_at_once_and_its_figures_are_of_the_step():
    judge = Counting()
    reward = JudgeReward(RLAIFConfig(), judge)
    groups = [group_of(win=[None] * 5) for _ in range(2)]
    reward.score(groups)
    for group in groups:
        assert [sample.win for sample in group.samples] == [0.0, 0.5, None, 1.0, None]
    reward.score([group_of(correct=[True] + [False] * 4, win=[None] * 5)])  # nothing to compare
    metrics = reward.metrics()
    assert metrics["judge/comparisons"] == metrics["judge/asked"] == judge.counts["asked"] == 12
    assert metrics["judge/skipped"] == 1
    assert reward.metrics() == {}  # told once


def test_judge_figures_of_the_rounds_of_a_step_are_added_up_and_means_are_of_the_pairs_that_were_voted_on():
    same = {"no_votes": 1, "skipped": 2, "fallbacks": 0, "seconds": 0.5, "order_conflicts": 0.1}
    rounds = [same | {"comparisons": n, "voted": voted, "position_bias": bias, "error": error,
                      "counts": {"time outs": 2} if n else {}}
              for n, voted, bias, error in ((30, 15, 0.2, ""), (60, 5, -0.2, "down"), (30, 0, 0.0, ""),
                                            (0, 0, 9.0, ""))]
    reward = JudgeReward(RLAIFConfig())
    reward.stats = list(rounds)
    metrics = reward.metrics()
    assert metrics["judge/comparisons"] == 120 and metrics["judge/no_votes"] == 4 and metrics["judge/skipped"] == 8
    assert metrics["judge/position_bias"] == pytest.approx(0.1) and metrics["judge/error"] == "down"
    assert metrics["judge/time_outs"] == 6
    reward.stats = [rounds[3]]
    assert "judge/position_bias" not in reward.metrics()  # nobody voted: there is none


def test_cosine_reward_equals_numpy_and_is_bounded():
    tokens, correct = [0, 500, 1000, 4000, 0, 500, 1000, 4000], [True] * 4 + [False] * 4
    out = cosine_reward(tokens, correct, max_tokens=1000)
    wave = np.cos(np.pi * np.minimum(np.array(tokens) / 1000, 1.0))
    expected = np.where(correct, 0.55 + 0.45 * wave, -0.55 - 0.45 * wave)
    np.testing.assert_allclose(out, expected, atol=1e-12)
    assert out[0] == pytest.approx(1.0) and out[3] == pytest.approx(0.1)       # correct: short is best
    assert out[4] == pytest.approx(-1.0) and out[7] == pytest.approx(-0.1)     # wrong: short is worst


def test_length_reward_equals_numpy_over_the_whole_group():
    n = np.array(TOKENS, float)
    lam = 0.5 - (n - n.min()) / (n.max() - n.min())
    expected = np.where(CORRECT, lam, np.minimum(0, lam))
    np.testing.assert_allclose(length_reward(TOKENS, CORRECT), expected, atol=1e-12)
    assert length_reward([7, 7], [True, False]) == [0.0, 0.0] and length_reward([], []) == []


def test_the_papers_reward_is_the_sum_of_its_three_parts():
    group = group_of()
    out = rewards_of(group, reward="paper")
    parts = (np.array(BOX, float), cosine_reward(TOKENS, CORRECT, max_tokens=400), length_reward(TOKENS, CORRECT))
    np.testing.assert_allclose(out, sum(map(np.array, parts)), atol=1e-12)
    assert [list(sample.parts.values()) for sample in group.samples] == [list(row) for row in zip(*parts)]


def test_a_judge_is_asked_only_when_a_reward_depends_on_it():
    assert RLAIFConfig().uses_judge() and not RLAIFConfig(judge_weight=0.0).uses_judge()
    assert not RLAIFConfig(reward="paper").uses_judge() and not RLAIFConfig(reward="python:mine.fn").uses_judge()


@pytest.fixture
def my_rewards(tmp_path, monkeypatch):
    """A module of the user's in the current folder."""
    (tmp_path / "my_rewards_for_test.py").write_text(
        "import numpy, torch\n"
        "def short(samples, example):\n"
        "    assert example.answer == '2' and all(s.finished for s in samples)\n"
        "    return [float(s.correct) - s.tokens / 400 for s in samples]\n"
        "def array(samples, example): return numpy.arange(len(samples), dtype=numpy.float32)\n"
        "def tensor(samples, example): return torch.ones(len(samples))\n"
        "def few(samples, example): return [1.0]\n"
        "def nan(samples, example): return [float('nan')] * len(samples)\n"
        "def words(samples, example): return ['good'] * len(samples)\n"
        "def one(samples, example): return 1.0\n"
        "def fails(samples, example): return 1 / 0\n"
        "number = 3\n")
    monkeypatch.chdir(tmp_path)
    return "python:my_rewards_for_test."


def test_a_python_reward_is_taken_as_it_is(my_rewards):
    expected = np.array(CORRECT, float) - np.array(TOKENS) / 400
    np.testing.assert_allclose(rewards_of(group_of(), reward=my_rewards + "short"), expected)
    assert rewards_of(group_of(), reward=my_rewards + "array") == [0, 1, 2, 3, 4]
    assert rewards_of(group_of(), reward=my_rewards + "tensor") == [1.0] * 5
    assert rewards_of(group_of(), reward=lambda samples, example: [s.tokens for s in samples]) == TOKENS


@pytest.mark.parametrize("name, words", [("few", r"returned \[1.0\]"), ("nan", "returned .*nan"), ("words", "good"),
                                         ("one", "returned 1.0"), ("fails", "ZeroDivisionError")])
def test_a_python_reward_that_returns_nonsense_is_named_with_what_it_returned(my_rewards, name, words):
    with pytest.raises(UserError, match=f"my_rewards_for_test.{name} .*{words}"):
        rewards_of(group_of(), reward=my_rewards + name)

    def broken(samples, example):
        return None
    with pytest.raises(UserError, match="reward=broken returned None"):
        rewards_of(group_of(), reward=broken)


@pytest.mark.parametrize("name", ["my_rewards_for_test.nothing", "my_rewards_for_test.number", "no_such_module.fn"])
def test_a_python_reward_that_is_not_there_is_refused_before_any_work(my_rewards, name):
    with pytest.raises(UserError, match=name.split(".")[0]):
        make_reward(RLAIFConfig(reward="python:" + name), None)


@pytest.mark.parametrize("word", ["reward=python:", "reward=python:fn", "reward=python:a b.c", "verifier=python:os..x"])
def test_what_names_no_function_is_refused_on_the_command_line(word):
    with pytest.raises(UserError, match="python:module.function"):
        load_config(RLAIFConfig, None, [word])


def test_the_overlong_penalty_equals_numpy_and_never_puts_a_correct_answer_below_a_wrong_one():
    rng = np.random.default_rng(0)
    for _ in range(500):
        correct = rng.random(6) < 0.5
        rewards = np.where(correct, rng.uniform(0.5, 1.5, 6), rng.uniform(0, 0.49, 6))
        penalty = -rng.random(6) * (rng.random(6) < 0.7)
        out = np.array(penalised(rewards.tolist(), correct.tolist(), penalty.tolist()))
        both = correct.any() and not correct.all()
        share = min(1, (rewards[correct].min() - rewards[~correct].max()) / 2) if both else 1
        np.testing.assert_allclose(out, rewards + penalty * np.where(correct, share, 1), atol=1e-12)
        assert not both or out[correct].min() > out[~correct].max()


def test_a_long_correct_answer_stays_above_a_short_wrong_one_with_the_penalty():
    def group():
        return group_of([399, 399, 30, 10], [True, True, False, False], [0.0, 1.0, None, None], [0, 1, 1, 1])
    for options in ({"format_weight": 0.4}, {"reward": lambda samples, example: [float(s.correct) for s in samples]}):
        plain, out = rewards_of(group(), **options), rewards_of(group(), overlong="penalty", **options)
        assert min(out[:2]) > max(out[2:]) and out[0] < plain[0] and out[2:] == plain[2:], options


def test_format_score_wants_a_complete_box():
    assert format_score(r"so \boxed{5}") == 1.0
    assert format_score(r"so \boxed{5") == 0.0
    assert format_score(r"so \boxed{}") == 0.0
    assert format_score("#### 5") == 0.0
    assert format_score(r"thinking </think> \boxed{5}") == 0.0
    assert format_score(r"thinking \boxed{5} </think> the answer is 5") == 1.0


def test_overlong_penalty_is_dapos_piecewise_linear_one():
    tokens = [0, 80, 90, 99, 100, 120]
    expected = np.clip((80 - np.array(tokens)) / 20, -1, 0)
    np.testing.assert_allclose(overlong_penalty(tokens, max_new_tokens=100), expected, atol=1e-12)


# ---- rewards of None (issue 18, complaint 4)

@pytest.mark.parametrize("overlong", ["none", "penalty"])
@pytest.mark.parametrize("scale", ["group", "none", "rloo"])
@given(data=st.data(), values=st.lists(st.floats(-3, 3), min_size=5, max_size=5))
@settings(max_examples=25, deadline=None)
def test_a_sample_without_a_reward_is_as_if_it_were_not_there(scale, overlong, data, values):
    gone = data.draw(st.sets(st.integers(0, 4), max_size=5))
    given_rewards = [None if i in gone else value for i, value in enumerate(values)]
    left = [i for i in range(5) if i not in gone]
    whole, part = group_of(), group_of()
    part.samples = [part.samples[i] for i in left]
    assert rewards_of(whole, reward=lambda samples, example: given_rewards, overlong=overlong) == [
        None if i in gone else pytest.approx(sample) for i, sample in enumerate(
            _laid_out(rewards_of(part, reward=lambda s, e: [values[i] for i in left], overlong=overlong), left))]
    set_advantages([whole, part], scale, lambda sample: True)
    assert [s.advantage for s in whole.samples] == _laid_out([s.advantage for s in part.samples], left)


def _laid_out(numbers, places) -> list[float]:
    """Numbers at their places among five, 0 elsewhere."""
    return [dict(zip(places, numbers, strict=True)).get(i, 0.0) for i in range(5)]


def test_none_for_every_sample_leaves_the_group_without_a_signal_and_a_nan_is_refused_still():
    group = group_of()
    assert rewards_of(group, reward=lambda samples, example: [None] * 5) == [None] * 5
    set_advantages([group], "group", lambda sample: True)
    assert not group.has_signal()
    with pytest.raises(UserError, match="or None for those that do not count"):
        rewards_of(group, reward=lambda samples, example: [None, 1, 1, 1, math.nan])


# ---- options without effect

@pytest.mark.parametrize("options, said", [
    ({"step_weight": 0.5, "judge_weight": 0.1, "brevity": "log", "teacher_weight": 2.0, "teacher": "base"}, []),
    ({"reward": "paper"}, []),
    ({"reward": "paper", "step_weight": 0.5}, ["step_weight has no effect without reward=judge"]),
    ({"reward": "paper", "judge_weight": 0.1, "format_weight": 0.2, "step_weight": 0.5, "brevity_counts": "thought"},
     ["judge_weight and format_weight and step_weight and brevity_counts have no effect without reward=judge"]),
    ({"reward": lambda samples, example: [], "brevity": "log"}, ["brevity has no effect without reward=judge"]),
    ({"reward": "paper", "brevity": "truncate", "brevity_limit": 9, "overlong": "none"}, []),
    ({"teacher_weight": 2.0, "teacher_kl": "full"},
     ["teacher_weight and teacher_kl have no effect without a teacher="]),
    ({"judge_refresh_steps": 3}, ["judge_refresh_steps has no effect without judge_refresh=N"]),
    ({"judge_refresh_steps": 3, "judge_weight": 0.0, "judge_rubric": "code"},
     ["judge_rubric and judge_refresh_steps have no effect where neither reward nor verifier asks a judge"]),
    ({"brevity": "truncate", "brevity_limit": 9, "overlong": "none", "brevity_weight": 0.5, "brevity_control": "none",
      "brevity_yardstick": "shortest", "judge_weight": 0.1},
     ["brevity_weight and brevity_yardstick and brevity_control have no effect with brevity=truncate"]),
    ({"brevity": "truncate", "brevity_limit": 9, "overlong": "none", "brevity_counts": "thought", "reward": "paper",
      "step_weight": 0.5}, ["brevity_counts has no effect with brevity=truncate",
                            "step_weight has no effect without reward=judge"]),
    ({"brevity": "minmax", "brevity_yardstick": "shortest"},
     ["brevity_yardstick has no effect with brevity=minmax"]),
    ({"brevity": "minmax", "brevity_yardstick": "shortest", "reward": "paper"},
     ["brevity and brevity_yardstick have no effect without reward=judge"]),
])
def test_options_without_effect_are_no_error_but_are_named(options, said):
    cfg = RLAIFConfig(**options)
    assert cfg.check() == "" and idle_options(cfg) == said
