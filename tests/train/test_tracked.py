"""What a loop tracks may have tensors, and a second adapter beside the policy's: neither changes the policy's run."""
import json

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import assert_same, at, fail
from toy import adapter, load, same_tensors, wake_adapter

from minimath.config.options import Stage
from minimath.config.schema import (
    AdapterOptions,
    DataOptions,
    EngineOptions,
    ModelOptions,
    OptimizerOptions,
    PromptOptions,
    SamplingOptions,
    SFTConfig,
    TrainRunOptions,
)
from minimath.core.checkpoint import list_checkpoints, save_adapter, verify
from minimath.models.forward import adapter_named, hidden_states, inference


class Weights:
    """A judge that learns: new tensors at every step, by dice."""

    def __init__(self):
        self.steps, self.values = 0, {"a": torch.zeros(3, dtype=torch.bfloat16), "b.c": torch.zeros(2, 3).T}

    def learn(self):
        self.steps, self.values = self.steps + 1, {k: v + torch.rand(v.shape).to(v) for k, v in self.values.items()}

    def state_dict(self):
        return {"steps": self.steps, "tensors": self.values}

    def load_state_dict(self, state):
        self.steps, self.values = state["steps"], state["tensors"]


class Empty(Weights):
    """A judge that has not begun."""

    def state_dict(self):
        return {"steps": 0, "tensors": {}}


class Bare(Stage):
    """A stage that is not evaluated during training."""
    model: ModelOptions
    prompt: PromptOptions
    adapter: AdapterOptions
    optimizer: OptimizerOptions
    data: DataOptions
    run: TrainRunOptions
    engine: EngineOptions
    sampling: SamplingOptions
    max_len: int = 64
    """longest row"""


def learning(go, name, hook=lambda place, step: None, **options):
    """A run whose judge learns at every step, with another that has nothing yet; (trainer, the judge)."""
    weights = Weights()

    def learn(place, step):
        if place == "before":
            weights.learn()
            if step.number == 2:  # what the commit of the first step has is what it was, not a copy
                assert same_objects(learn.trainer._state["weights"]["tensors"], learn.before)
            learn.before = dict(weights.values)
        hook(place, step)

    def begin(trainer):
        learn.trainer = trainer
        trainer.track(weights=weights, empty=Empty())
    return go(name, hook=learn, begin=begin, **options), weights


def same_objects(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(one[name] is two[name] for name in one)


def test_tensors_of_what_is_tracked_come_back_bitwise_and_are_not_copied_at_a_commit(go, tmp_path):
    unbroken, want = learning(go, "unbroken")
    assert same_objects(unbroken._state["weights"]["tensors"], want.values)
    with pytest.raises(OSError, match="the drive is gone"):
        learning(go, "broken", hook=at(3, fail))
    [folder] = list_checkpoints(tmp_path / "broken")
    assert load_file(folder / "tracked.safetensors").keys() == {"weights.a", "weights.b.c"}
    tracked = json.loads((folder / "state.json").read_text())["tracked"]
    assert tracked["weights"] == {"steps": 2, "tensors": ["a", "b.c"]} and tracked["empty"]["tensors"] == []
    resumed, got = learning(go, "broken", resume=True)
    assert same_tensors(got.values, want.values) and got.steps == want.steps == 4
    assert got.values["a"].dtype == torch.bfloat16
    assert_same(resumed, unbroken)
    assert same_tensors(*(load_file(list_checkpoints(each.log.run_dir)[0] / "tracked.safetensors")
                          for each in (resumed, unbroken)))
    (folder / "tracked.safetensors").write_bytes(b"")
    assert "tracked.safetensors: 0 bytes instead of" in verify(folder)[0]


def test_without_tensors_there_is_no_file_of_them_and_a_stage_needs_no_evaluation(go):
    trainer = go(cls=Bare)
    assert not (list_checkpoints(trainer.log.run_dir)[0] / "tracked.safetensors").exists()


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.2}])
def test_a_judge_that_reads_at_every_step_changes_no_bit_of_the_run(go, tiny_dir, tmp_path, options):
    folder, judge = judge_folder(tiny_dir, tmp_path), {}

    def begin(trainer):
        judge["policy"] = trainer.policy
        trainer.policy.add_adapter(folder, "judge")

    def reads(place, step):
        model = judge["policy"].model
        with adapter_named(model, "judge"), inference(model):
            judge.setdefault("read", []).append(hidden_states(model, torch.arange(9)[None]))
    without, beside = go("without", **options), go("beside", begin=begin, hook=reads, **options)
    assert_same(without, beside)
    assert all(torch.equal(each, judge["read"][0]) for each in judge["read"])
    names = load_file(list_checkpoints(beside.log.run_dir)[0] / "adapter_model.safetensors").keys()
    assert names == adapter(beside.log.run_dir).keys() == adapter(without.log.run_dir).keys()


def test_a_judge_that_is_left_training_ends_the_run(go, tiny_dir, tmp_path):
    folder, kept = judge_folder(tiny_dir, tmp_path), []

    def begin(trainer):
        trainer.policy.add_adapter(folder, "judge")
        kept.append(trainer.policy.model)

    def thaw():
        kept[0].base_model.set_adapter("judge")  # as peft does it
    with pytest.raises(RuntimeError, match="step 2 changed which tensors train .*judge"):
        go(begin=begin, hook=at(2, thaw, "after"))


def judge_folder(tiny_dir, tmp_path):
    model, _ = load(tiny_dir, SFTConfig, train=True, lora_r=3)
    wake_adapter(model, 0.3, 7)
    return save_adapter(model, tmp_path / "judge")
