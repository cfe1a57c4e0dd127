import math
import random

import numpy as np
import pytest
import torch

from minimath.config.load import load_config
from minimath.config.schema import RLAIFConfig
from minimath.core.errors import UserError
from minimath.data.examples import Example
from minimath.train.rewards import (
    GroupFacts,
    check_reward,
    cosine_reward,
    format_score,
    group_advantages,
    group_rewards,
    judge_rewards,
    length_reward,
    length_term,
    overlong_penalty,
    parse_parts,
    parts_rewards,
    penalised,
    uses_judge,
)

TOKENS = [120, 40, 300, 80, 80]
RIGHT = [True, True, False, True, False]


def test_length_term_ranks_right_completions_within_the_group_only():
    assert length_term(TOKENS, RIGHT) == [-1.0, 1.0, 0.0, 0.0, 0.0]
    assert length_term([5, 5, 9], [True, True, False]) == [0.0, 0.0, 0.0]
    assert length_term([5, 9], [False, False]) == [0.0, 0.0]
    assert length_term([], []) == []


def test_judge_rewards_follow_the_formula():
    win, length, fmt = [0.5, 1.0, 0.0, 0.25, None], length_term(TOKENS, RIGHT), [1.0, 0.0, 1.0, 1.0, 0.0]
    out = judge_rewards(RIGHT, win, length, fmt, judge_weight=0.2, brevity_weight=0.3, format_weight=0.1)
    c, w = np.array(RIGHT, float), np.array([0.5, 1.0, 0.0, 0.25, 0.5])
    expected = c * (1 + 0.2 * (2 * w - 1) + 0.3 * np.array(length)) + 0.1 * np.array(fmt)
    np.testing.assert_allclose(out, expected, rtol=1e-12)


def test_no_vote_leaves_the_judge_term_out():
    lams = {"judge_weight": 0.25, "brevity_weight": 0.0}
    silent, neutral = (judge_rewards([True], [w], [0.0], [0.0], **lams) for w in (None, 0.5))
    assert silent == neutral


def test_right_always_beats_wrong_whatever_the_judge_and_the_lengths_say():
    rng = random.Random(0)
    for _ in range(2000):
        size = rng.randint(2, 8)
        judge_weight = rng.uniform(0, 0.5)
        lams = {"judge_weight": judge_weight, "brevity_weight": rng.uniform(0, 0.5 - judge_weight),
                "format_weight": rng.uniform(0, 0.4999)}
        right = [rng.random() < 0.5 for _ in range(size)]
        win = [rng.choice([None, 0.0, 1.0, rng.uniform(-3, 3)]) for _ in range(size)]
        length = length_term([rng.randint(1, 50) for _ in range(size)], right)
        out = judge_rewards(right, win, length, [rng.choice([0.0, 1.0]) for _ in range(size)], **lams)
        lowest_right = min((r for r, ok in zip(out, right) if ok), default=math.inf)
        assert lowest_right > max((r for r, ok in zip(out, right) if not ok), default=-math.inf)


@pytest.mark.parametrize("lams", [(0.3, 0.3, 0.0), (0.6, 0.0, 0.0), (0.25, 0.25, 0.5), (-0.1, 0.1, 0.0)])
def test_weights_that_let_a_wrong_answer_win_are_refused(lams):
    with pytest.raises(UserError, match="outrank"):
        judge_rewards([True, False], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0],
                      judge_weight=lams[0], brevity_weight=lams[1], format_weight=lams[2])


def test_cosine_reward_equals_numpy_and_is_bounded():
    tokens, right = [0, 500, 1000, 4000, 0, 500, 1000, 4000], [True] * 4 + [False] * 4
    out = cosine_reward(tokens, right, max_tokens=1000)
    wave = np.cos(np.pi * np.minimum(np.array(tokens) / 1000, 1.0))
    expected = np.where(right, 0.55 + 0.45 * wave, -0.55 - 0.45 * wave)
    np.testing.assert_allclose(out, expected, atol=1e-12)
    assert out[0] == pytest.approx(1.0) and out[3] == pytest.approx(0.1)       # right: short is best
    assert out[4] == pytest.approx(-1.0) and out[7] == pytest.approx(-0.1)     # wrong: short is worst


def test_length_reward_equals_numpy_over_the_whole_group():
    n = np.array(TOKENS, float)
    lam = 0.5 - (n - n.min()) / (n.max() - n.min())
    expected = np.where(RIGHT, lam, np.minimum(0, lam))
    np.testing.assert_allclose(length_reward(TOKENS, RIGHT), expected, atol=1e-12)
    assert length_reward([7, 7], [True, False]) == [0.0, 0.0] and length_reward([], []) == []


def facts_of(tokens=TOKENS, right=RIGHT, win=(0.5, 1.0, None, 0.25, None), fmt=(1.0, 1.0, 0.0, 0.0, 1.0)):
    texts, example = [f"text {i}" for i in range(len(tokens))], Example("1 + 1?", answer="2")
    return GroupFacts(example, texts, right, tokens, [True] * len(tokens), list(fmt), list(win), 400)


def test_parts_are_summed_by_name_and_weight():
    cosine, length = cosine_reward(TOKENS, RIGHT, max_tokens=400), length_reward(TOKENS, RIGHT)
    out = parts_rewards(facts_of(), parse_parts("format=0.5, cosine=2, length=3"))
    expected = 0.5 * np.array([1, 1, 0, 0, 1]) + 2 * np.array(cosine) + 3 * np.array(length)
    np.testing.assert_allclose(out, expected, atol=1e-12)
    out = parts_rewards(facts_of(), parse_parts("right=1,judge=0.25,brevity=-0.5"))
    judged, brevity = np.array([0, 1, 0, -0.5, 0]), np.array(length_term(TOKENS, RIGHT))
    np.testing.assert_allclose(out, np.array(RIGHT, float) + 0.25 * judged - 0.5 * brevity, atol=1e-12)


def test_the_default_parts_are_the_papers_three_rules():
    cfg = RLAIFConfig(reward="paper")
    rules = (np.array([1, 1, 0, 0, 1]), cosine_reward(TOKENS, RIGHT, max_tokens=400), length_reward(TOKENS, RIGHT))
    np.testing.assert_allclose(group_rewards(cfg, facts_of()), sum(map(np.array, rules)), atol=1e-12)


@pytest.mark.parametrize("text, words", [
    ("cosin=1", "did you mean 'cosine'"), ("cosine=x", "name=weight"), ("", "empty"), ("cosine", "name=weight"),
    ("cosine=1,cosine=2", "once"), ("cosine=inf", "name=weight")])
def test_wrong_parts_are_refused_before_any_work(text, words):
    with pytest.raises(UserError, match=words):
        check_reward(RLAIFConfig(reward="paper", reward_parts=text))


def test_a_judge_is_asked_only_when_a_reward_depends_on_it():
    assert uses_judge(RLAIFConfig()) and not uses_judge(RLAIFConfig(judge_weight=0.0))
    assert not uses_judge(RLAIFConfig(reward="paper"))
    assert uses_judge(RLAIFConfig(reward="paper", reward_parts="right=1,judge=0.2"))
    assert not uses_judge(RLAIFConfig(reward="python:mine.fn"))


@pytest.fixture
def my_rewards(tmp_path, monkeypatch):
    """A module of the user's in the current folder."""
    (tmp_path / "my_rewards_for_test.py").write_text(
        "import numpy, torch\n"
        "def short(texts, facts):\n"
        "    assert facts.example.answer == '2' and len(facts.ended) == len(texts)\n"
        "    return [float(ok) - n / facts.max_tokens for ok, n in zip(facts.right, facts.tokens)]\n"
        "def array(texts, facts): return numpy.arange(len(texts), dtype=numpy.float32)\n"
        "def tensor(texts, facts): return torch.ones(len(texts))\n"
        "def few(texts, facts): return [1.0]\n"
        "def nan(texts, facts): return [float('nan')] * len(texts)\n"
        "def words(texts, facts): return ['good'] * len(texts)\n"
        "def one(texts, facts): return 1.0\n"
        "def fails(texts, facts): return 1 / 0\n"
        "number = 3\n")
    monkeypatch.chdir(tmp_path)
    return "python:my_rewards_for_test."


def test_a_python_reward_is_taken_as_it_is_and_as_a_part(my_rewards):
    expected = np.array(RIGHT, float) - np.array(TOKENS) / 400
    cfg = load_config(RLAIFConfig, None, [f"reward={my_rewards}short"])
    np.testing.assert_allclose(group_rewards(cfg, facts_of()), expected)
    assert group_rewards(RLAIFConfig(reward=my_rewards + "array"), facts_of()) == [0, 1, 2, 3, 4]
    assert group_rewards(RLAIFConfig(reward=my_rewards + "tensor"), facts_of()) == [1.0] * 5
    mixed = RLAIFConfig(reward="paper", reward_parts=f"right=1,{my_rewards}short=0.5")
    np.testing.assert_allclose(group_rewards(mixed, facts_of()), np.array(RIGHT, float) + 0.5 * expected)


@pytest.mark.parametrize("name, words", [("few", r"returned \[1.0\]"), ("nan", "returned .*nan"), ("words", "good"),
                                         ("one", "returned 1.0"), ("fails", "ZeroDivisionError")])
def test_a_python_reward_that_returns_nonsense_is_named_with_what_it_returned(my_rewards, name, words):
    with pytest.raises(UserError, match=f"my_rewards_for_test.{name} .*{words}"):
        group_rewards(RLAIFConfig(reward=my_rewards + name), facts_of())


@pytest.mark.parametrize("name", ["my_rewards_for_test.nothing", "my_rewards_for_test.number", "no_such_module.fn"])
def test_a_python_reward_that_is_not_there_is_refused_before_any_work(my_rewards, name):
    with pytest.raises(UserError, match=name.split(".")[0]):
        check_reward(RLAIFConfig(reward="python:" + name))


@pytest.mark.parametrize("word", ["reward=python:", "reward=python:fn", "reward=python:a b.c", "gate=python:os..x"])
def test_what_names_no_function_is_refused_on_the_command_line(word):
    with pytest.raises(UserError, match="python:module.function"):
        load_config(RLAIFConfig, None, [word])


def test_the_overlong_penalty_equals_numpy_and_never_puts_a_right_answer_below_a_wrong_one():
    rng = np.random.default_rng(0)
    for _ in range(500):
        right = rng.random(6) < 0.5
        rewards = np.where(right, rng.uniform(0.5, 1.5, 6), rng.uniform(0, 0.49, 6))
        penalty = -rng.random(6) * (rng.random(6) < 0.7)
        out = np.array(penalised(rewards.tolist(), right.tolist(), penalty.tolist()))
        both = right.any() and not right.all()
        share = min(1, (rewards[right].min() - rewards[~right].max()) / 2) if both else 1
        np.testing.assert_allclose(out, rewards + penalty * np.where(right, share, 1), atol=1e-12)
        assert not both or out[right].min() > out[~right].max()


def test_a_long_right_answer_stays_above_a_short_wrong_one_in_every_reward():
    tokens, right = [399, 399, 30, 10], [True, True, False, False]
    for options in ({"reward": "judge", "format_weight": 0.4}, {"reward": "rules", "reward_parts": "right=1"}):
        cfg = RLAIFConfig(overlong="penalty", **options)
        out = group_rewards(cfg, facts_of(tokens, right, [0.0, 1.0, None, None], [0.0, 1.0, 1.0, 1.0]))
        assert min(out[:2]) > max(out[2:]), options


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
    np.testing.assert_allclose(overlong_penalty(tokens, max_new_tokens=100, buffer=0.2), expected, atol=1e-12)


@pytest.mark.parametrize("scale", ["group", "none", "rloo"])
def test_advantages_equal_numpy_and_ignore_masked_rows(scale):
    rng = np.random.default_rng(0)
    rewards, valid = rng.normal(size=(6, 8)), rng.random((6, 8)) < 0.7
    valid[:, :2] = True
    out = group_advantages(rewards, scale=scale, valid=valid)
    for row in range(6):
        kept = rewards[row, valid[row]]
        expected = (kept - kept.mean()) / (kept.std() if scale == "group" else 1.0)
        if scale == "rloo":
            expected = [r - np.delete(kept, i).mean() for i, r in enumerate(kept)]
        np.testing.assert_allclose(out[row].numpy()[valid[row]], expected, rtol=1e-5, atol=1e-6)
        assert (out[row].numpy()[~valid[row]] == 0).all()
    poisoned = torch.as_tensor(rewards).masked_fill(~torch.as_tensor(valid), 1e9)
    torch.testing.assert_close(group_advantages(poisoned, scale=scale, valid=valid), out)


def test_groups_without_variance_get_exact_zeros():
    out = group_advantages([[1.0, 1.0, 1.0], [0.1, 0.1, 0.1], [1.0, 0.0, 1.0], [2.0, 3.0, 4.0]],
                           valid=[[1, 1, 1], [1, 1, 1], [1, 0, 1], [0, 0, 0]])
    assert out.dtype == torch.float32 and (out == 0).all()


def test_unknown_scale_is_a_user_error():
    with pytest.raises(UserError, match="scale_advantage"):
        group_advantages([[1.0, 0.0]], scale="batch")
