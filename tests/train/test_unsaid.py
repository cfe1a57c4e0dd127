"""Stage 2 and 1: what would go wrong without a word ends the run, or is as if it were not there (issue 18)."""
import pytest
from toy import metrics, parity, wake_adapter

import minimath.train.rlaif as loop
from minimath.core.errors import UserError
from minimath.rollout.engine import Engine
from minimath.train.optimizer import Optimizer


@pytest.fixture
def updates(monkeypatch):
    """The (kept groups, all groups) of every update of the loop."""
    seen, real = [], loop.update
    monkeypatch.setattr(loop, "update", lambda *args: seen.append(args[3:5]) or real(*args))
    return seen

def test_the_kl_to_the_reference_does_not_bring_groups_without_a_signal_back(rl, updates):
    records = metrics(rl(verifier=parity, steps=4, max_refill=0, kl_coef=0.5))
    assert sum(record["rollout/dropped_groups"] for record in records) > 0
    for (kept, seen), record in zip(updates, records, strict=True):
        assert kept == [group for group in seen if group.has_signal()]
        assert record.get("data/trained_tokens", 0) == sum(s.tokens for g in kept for s in g.samples if s.finished)


def test_a_reward_hook_may_know_no_reward(rl, updates):
    def reward(samples, example):
        return [None if i == 0 or int(example.answer) % 2 else float(len(s.text)) for i, s in enumerate(samples)]
    records = metrics(rl(reward=reward, overlong="none", steps=3))
    first = [group.samples[0] for _, seen in updates for group in seen]
    assert all(s.reward is None and s.advantage == 0.0 for s in first) and any(r["rollout/groups"] for r in records)
    assert all(group.has_signal() != bool(int(group.example.answer) % 2) for _, seen in updates for group in seen
               if len({s.text for s in group.samples[1:]}) > 1)


def test_a_run_in_which_no_sample_has_a_reward_ends_well(rl):
    for record in metrics(rl(reward=lambda samples, example: [None] * len(samples), max_refill=0)):
        assert record["reward/mean"] is None and record["rollout/groups"] == 0
    taught = metrics(rl("taught", reward=lambda samples, example: [None] * len(samples), overlong="none",
                        teacher="base"))
    assert all(record["reward/mean"] is None and record["rollout/groups"] for record in taught)  # and samples are shown


@pytest.mark.parametrize("rollout", ["auto", "transformers"])
def test_a_rollout_that_leaves_the_adapter_out_ends_the_run(rl, monkeypatch, rollout, tmp_path):
    real = Engine.generate

    def without_adapter(self, *args, **options):
        wake_adapter(self.policy.model, 0.5)
        with self.policy.model.disable_adapter():
            return real(self, *args, **options)

    monkeypatch.setattr(Engine, "generate", without_adapter)
    with pytest.raises(UserError, match="away from those of the training forward: it samples with other weights"):
        rl(rollout=rollout)


@pytest.mark.parametrize("stage", ["rl", "train"])
def test_the_tensors_that_train_are_the_same_at_every_step(stage, request, monkeypatch):
    run, begin, real, policies = request.getfixturevalue(stage), Optimizer.__init__, Optimizer.step, []
    run("sound", steps=2)

    def begins(self, policy, *args):
        policies.append(policy)
        begin(self, policy, *args)

    def thaws(self, *args):
        next(p for p in policies[-1].model.parameters() if not p.requires_grad).requires_grad_()
        return real(self, *args)
    monkeypatch.setattr(Optimizer, "__init__", begins)
    monkeypatch.setattr(Optimizer, "step", thaws)
    with pytest.raises(RuntimeError, match=r"step 1 changed which tensors train \(.*peft #3447"):
        run("thawed", steps=2)
