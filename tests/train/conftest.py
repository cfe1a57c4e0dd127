"""Runs of both stages on a tiny random model."""
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy import ending_model, even, make_config, write_problems

from minimath.config.schema import RLAIFConfig, SFTConfig
from minimath.train.rlaif import rlaif
from minimath.train.sft import sft
from minimath.train.trainer import Trainer


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> str:
    return write_problems(tmp_path_factory.mktemp("data") / "problems.jsonl")


@pytest.fixture(scope="session")
def ending_dir(tiny_dir, tmp_path_factory) -> str:
    """The tiny model with many end tokens."""
    return ending_model(tiny_dir, tmp_path_factory.mktemp("ending") / "llama")


@pytest.fixture
def train(tiny_dir, data, tmp_path):
    """train(name, **options) -> (summary, run folder) of an SFT run of the tiny Llama."""
    def run(name="run", **options):
        options = {"data": data, "steps": 3, "batch_size": 6, "lora_r": 4, "lr": 1e-2, "save_every": 0} | options
        return sft(make_config(SFTConfig, tiny_dir, out=str(tmp_path / name), **options)), tmp_path / name
    return run


@pytest.fixture(scope="session")
def few(tmp_path_factory) -> str:
    return write_problems(tmp_path_factory.mktemp("few") / "problems.jsonl", n=12)


@pytest.fixture
def rl(ending_dir, few, tmp_path):
    """rl(name, **options) -> run folder of an RL run of the tiny Llama."""
    def run(name="run", **options):
        options = {"data": few, "steps": 2, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 16, "lora_r": 4,
                   "lr": 1e-2, "judge": "heuristic", "save_every": 0, "sample_every": 1, "warmup": 0.0,
                   "verifier": even} | options
        rlaif(make_config(RLAIFConfig, ending_dir, out=str(tmp_path / name), **options))
        return tmp_path / name
    return run


@pytest.fixture
def one_thread():
    """As in the processes that the tests start: sums in another order differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Counter:
    """Something with memory."""

    def __init__(self):
        self.seen = []

    def state_dict(self):
        return {"seen": self.seen}  # the live list: the trainer takes a copy

    def load_state_dict(self, state):
        self.seen = state["seen"]


BATCH = SimpleNamespace(lengths=[1], trained_tokens=1, micro_batches=lambda most: [([0], {})])


@pytest.fixture
def go(tiny_dir, data, tmp_path):
    """go(name, total, hook, **options) -> the trainer of a run whose loss and counter throw dice of all kinds.

    hook(place, step): called "before" the update, "between" two updates of a step, and "after". begin(trainer): before.
    """
    def run(name="run", total=4, hook=lambda place, step: None, cls=SFTConfig, begin=lambda trainer: None, **options):
        options = {"data": data, "lora_r": 2, "lr": 1e-2, "save_every": 0} | options
        cfg = make_config(cls, tiny_dir, out=str(tmp_path / name), **options)
        with Trainer(cfg, "rlaif" if cls is RLAIFConfig else "sft") as trainer:
            counter = Counter()
            trainer.track(counter=counter)
            begin(trainer)

            def closure(indices, micro):
                dice = torch.rand(()) + random.random() + np.random.rand()
                return dice * sum(p.sum() for p in trainer.policy.params), {}
            for step in trainer.steps(total):
                counter.seen.append(random.random())
                hook("before", step)
                for update in range(getattr(cfg, "updates_per_rollout", 1)):
                    if update:
                        hook("between", step)
                    step.log(trainer.optimizer.step(BATCH, closure))
                hook("after", step)
        trainer.counter = counter
        return trainer
    return run
