import math
import random

import numpy as np
import pytest
import torch

from minimath.config import UserError
from minimath.reward import (
    cosine_reward,
    format_score,
    group_advantages,
    judge_rewards,
    length_reward,
    length_term,
    overlong_penalty,
    rules_rewards,
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
    out = judge_rewards(RIGHT, win, length, fmt, lam_judge=0.2, lam_length=0.3, lam_format=0.1)
    c, w = np.array(RIGHT, float), np.array([0.5, 1.0, 0.0, 0.25, 0.5])
    expected = c * (1 + 0.2 * (2 * w - 1) + 0.3 * np.array(length)) + 0.1 * np.array(fmt)
    np.testing.assert_allclose(out, expected, rtol=1e-12)


def test_no_vote_leaves_the_judge_term_out():
    lams = {"lam_judge": 0.25, "lam_length": 0.0}
    silent, neutral = (judge_rewards([True], [w], [0.0], [0.0], **lams) for w in (None, 0.5))
    assert silent == neutral


def test_right_always_beats_wrong_whatever_the_judge_and_the_lengths_say():
    rng = random.Random(0)
    for _ in range(2000):
        size = rng.randint(2, 8)
        lam_judge = rng.uniform(0, 0.5)
        lams = {"lam_judge": lam_judge, "lam_length": rng.uniform(0, 0.5 - lam_judge),
                "lam_format": rng.uniform(0, 0.4999)}
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
                      lam_judge=lams[0], lam_length=lams[1], lam_format=lams[2])


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


def test_rules_rewards_are_the_weighted_sum_of_the_three_rules():
    fmt = [1.0, 1.0, 0.0, 0.0, 1.0]
    cosine, length = cosine_reward(TOKENS, RIGHT, max_tokens=400), length_reward(TOKENS, RIGHT)
    out = rules_rewards(RIGHT, TOKENS, fmt, max_tokens=400, weights=(0.5, 2.0, 3.0))
    expected = 0.5 * np.array(fmt) + 2 * np.array(cosine) + 3 * np.array(length)
    np.testing.assert_allclose(out, expected, atol=1e-12)


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


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_equal_numpy_and_ignore_masked_rows(scale):
    rng = np.random.default_rng(0)
    rewards, valid = rng.normal(size=(6, 8)), rng.random((6, 8)) < 0.7
    valid[:, :2] = True
    out = group_advantages(rewards, scale=scale, valid=valid)
    for row in range(6):
        kept = rewards[row, valid[row]]
        expected = (kept - kept.mean()) / (kept.std() if scale == "group" else 1.0)
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
