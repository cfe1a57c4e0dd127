"""What a step tells about itself: metrics of the rollout and of the trained tokens, the bar, a group to look at."""
import io
import json
import math
from types import SimpleNamespace

import pytest
import torch

from minimath.config.schema import LossOptions
from minimath.core.log import RunLog
from minimath.data.examples import Example
from minimath.data.sample import Group, Sample
from minimath.train.losses import PolicyRows
from minimath.train.rollouts import rollout_metrics, show_group, token_metrics
from minimath.train.trainer import beside_bar

PARTS = [{"judge": 0.9, "brevity": -1.0, "format": 1.0}, {"judge": 0.2, "brevity": 1.0, "format": 0.0},
         {"judge": None, "brevity": 0.0, "format": 1.0}]


def group_of(parts=PARTS):
    rows = zip((30, 10, 20), (1.2, 0.9, 0.1), (1.0, 0.0, -1.0), ("long", "short", "wrong"), parts, strict=True)
    return Group(Example("p", answer="5"), [1], [
        Sample([1] * n, [-0.5] * n, text != "short", text, correct=text != "wrong", reward=reward, advantage=advantage,
               parts=part) for n, reward, advantage, text, part in rows])


ENGINE = SimpleNamespace(metrics=lambda: {"max_num_seqs": 8, "seq_fill": 0.75, "other": 1})


def test_rollout_metrics_are_over_all_samples_and_say_which_groups_were_dropped():
    kept, dropped = group_of(), group_of([{}] * 3)
    seen = rollout_metrics([kept], [kept, dropped], ENGINE)
    assert seen == pytest.approx({
        "reward/mean": 2.2 / 3, "rollout/correct": 2 / 3, "rollout/tokens": 20.0, "rollout/correct_tokens": 20.0,
        "rollout/finished": 2 / 3, "rollout/samples": 6, "rollout/groups": 1, "rollout/dropped_groups": 1,
        "rollout/surprisal": 0.5, "reward/judge_spread": 0.7, "reward/brevity": 0.0, "reward/format": 2 / 3,
        "rollout/max_num_seqs": 8, "rollout/seq_fill": 0.75})
    for sample in kept.samples:
        sample.correct = False
    assert rollout_metrics([], [kept], ENGINE)["rollout/correct_tokens"] is None


def test_what_stands_beside_the_progress_bar_has_speed_reward_and_its_parts():
    shown = beside_bar(rollout_metrics([], [group_of()] * 2, ENGINE) | {"time/rollout": 2.0, "loss": 0.25})
    assert shown == pytest.approx({"tok_s": 60.0, "loss": 0.25, "reward": 2.2 / 3, "correct": 2 / 3, "tokens": 20.0,
                                   "judge_spread": 0.7, "brevity": 0.0, "format": 2 / 3})
    assert beside_bar({"loss": 1.0, "time/tokens_per_s": 50.0, "optim/lr": 0.1}) == {"loss": 1.0, "tok_s": 50.0}


def test_a_part_named_as_a_figure_of_the_step_does_not_stand_for_it():
    seen = rollout_metrics([], [group_of([{"mean": 9.0, "loss": 7.0, "tokens": 5.0}] * 3)], ENGINE) | {"loss": 0.25}
    assert (seen["reward/mean"], seen["reward/part_mean"], seen["reward/loss"]) == (pytest.approx(2.2 / 3), 9.0, 7.0)
    shown = beside_bar(seen)
    assert (shown["loss"], shown["reward"], shown["tokens"]) == (0.25, pytest.approx(2.2 / 3), 20.0)


def test_the_best_and_the_worst_completion_of_a_group_are_shown_with_their_parts(tmp_path):
    out = io.StringIO()
    with RunLog(tmp_path, "test", stream=out) as log:
        show_group(group_of(), 7, log)
    assert out.getvalue().splitlines()[1:] == [
        "step 7, best of 3 (reward 1.20, correct, judge 0.90, brevity -1.00, format 1.00, 30 tokens):", "    long",
        "step 7, worst of 3 (reward 0.10, wrong, brevity 0.00, format 1.00, 20 tokens):", "    wrong"]
    [record] = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert record["texts"] == ["long", "short", "wrong"] and record["correct"] == [True, True, False]
    assert record["rewards"] == [1.2, 0.9, 0.1] and record["advantages"] == [1.0, 0.0, -1.0] and record["step"] == 7


def test_token_metrics_count_clipped_moved_and_reweighted_tokens_of_the_trained_ones():
    logp = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0])
    old = logp - torch.tensor([0.0, 0.3, -0.3, 0.1, 5.0])  # ratios 1, 1.35, 0.74, 1.11, and an untrained one
    sampled = old - torch.tensor([0.0, 0.0, 0.0, 2.0, 9.0])
    full = logp - torch.tensor([0.0, 0.05, 0.2, 0.0, 9.0])
    trained = torch.tensor([0, 1, 2, 3])
    rows = PolicyRows(torch.zeros(5), torch.zeros(5), sampled, old, logp + math.log(2))
    stats = SimpleNamespace(logp=logp, entropy=torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0]))
    seen = token_metrics(LossOptions(), rows, stats, full, trained)
    assert seen == pytest.approx({"policy/entropy": 10.0, "policy/clipped": 2, "policy/off_policy": 1,
                                  "policy/reweighted": 1, "policy/kl": 4 * (1 - math.log(2))}, rel=1e-5)
    on_policy = PolicyRows(torch.zeros(5), torch.zeros(5), logp)
    seen = token_metrics(LossOptions(importance_cap=0.0), on_policy, stats, logp, trained)
    assert seen == {"policy/entropy": 10.0, "policy/clipped": 0, "policy/off_policy": 0}
