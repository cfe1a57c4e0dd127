"""Advantages: relative to the group, whatever is masked; brevity apart from correctness."""
import math

import numpy as np
import pytest
import torch

from minimath.core.errors import UserError
from minimath.data.examples import Example
from minimath.data.sample import Group, Sample
from minimath.train.advantages import group_advantages, set_advantages


def group_of(rewards, correct=None, lengths=None, finished=None):
    """A group whose samples have their rewards and scores of length."""
    n = len(rewards)
    samples = [Sample([7] * 5, [-1.0] * 5, done, correct=ok, reward=r, parts={"brevity": short})
               for r, ok, short, done in zip(rewards, correct or [True] * n, lengths or [0.0] * n,
                                             finished or [True] * n, strict=True)]
    return Group(Example("1 + 1?", answer="2"), [1], samples)


@pytest.mark.parametrize("scale", ["group", "none", "rloo", "maxrl"])
def test_advantages_equal_numpy_and_ignore_masked_rows(scale):
    rng = np.random.default_rng(0)
    rewards, valid = rng.uniform(0, 2, size=(6, 8)), rng.random((6, 8)) < 0.7
    valid[:, :2] = True
    out = group_advantages(rewards, scale=scale, valid=valid)
    for row in range(6):
        kept = rewards[row, valid[row]]
        expected = (kept - kept.mean()) / (kept.std() if scale == "group" else 1.0)
        if scale == "rloo":
            expected = [r - np.delete(kept, i).mean() for i, r in enumerate(kept)]
        if scale == "maxrl":
            expected = kept / kept.mean() - 1
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


def test_advantages_are_set_on_the_samples_and_a_reward_that_is_no_number_reaches_the_loss():
    groups = [group_of((3.0, 1.0, 9.0, 2.0, 2.0), finished=[True, True, False, True, True]) for _ in range(2)]
    groups[1].samples[0].reward = math.inf
    set_advantages(groups, "none", lambda sample: sample.finished)
    assert [sample.advantage for sample in groups[0].samples] == [1.0, -1.0, 0.0, 0.0, 0.0]
    assert groups[0].has_signal() and all(math.isnan(sample.advantage) for sample in groups[1].samples)


def test_an_undecided_group_teaches_nothing_whatever_its_rewards():
    group = group_of([1.0, 0.0])
    group.decided = False
    set_advantages([group], "group", lambda sample: True)
    assert [s.advantage for s in group.samples] == [0.0, 0.0] and not group.has_signal()


def test_brevity_apart_is_added_undivided_and_around_its_mean_over_the_correct_ones():
    correct, short = [True, True, True, False, True], [0.5, -0.5, 0.3, 0.0, 1.0]
    group = group_of([1.0, 1.0, 1.0, 0.0, 1.0], correct, short, finished=[True, True, True, True, False])
    set_advantages([group], "group", lambda sample: sample.finished, brevity_weight=0.4)
    base = np.array([1.0, 1.0, 1.0, 0.0])
    base = (base - base.mean()) / base.std()
    mean = np.mean([0.5, -0.5, 0.3])  # not of the one that was cut
    expected = [*(base[:3] + 0.4 * (np.array([0.5, -0.5, 0.3]) - mean)), base[3], 0.0]
    np.testing.assert_allclose([s.advantage for s in group.samples], expected, rtol=1e-6)


@pytest.mark.parametrize("count", range(2, 9))
def test_equally_long_correct_samples_are_no_signal(count):
    """A mean of equal scores can be another in its last bit: groups of 3 and 6 were kept, and not refilled."""
    group = group_of([1.0] * count, lengths=[math.cos(math.pi / 64)] * count)  # of brevity=cosine
    set_advantages([group], "group", lambda sample: True, 1.0)
    assert not group.has_signal()


def test_where_all_are_correct_a_little_shorter_is_a_little_better_only_apart():
    def spread(rewards, lengths, weight):
        group = group_of(rewards, lengths=lengths)
        set_advantages([group], "group", lambda sample: True, brevity_weight=weight)
        values = [s.advantage for s in group.samples]
        return max(values) - min(values)
    lengths = [0.01, 0.0, 0.0, 0.0]
    together = spread([1.0 + 0.2 * short for short in lengths], lengths, 0.0)
    assert together > 2 and spread([1.0] * 4, lengths, 0.2) == pytest.approx(0.002)  # 2.3 times a deviation
    assert spread([1.0] * 4, [0.0] * 4, 0.2) == 0.0
