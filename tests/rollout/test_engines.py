"""The door to the engines: which one samples, and what is said of it."""

import pytest
import torch
from test_rollout import prompts_of
from tiny import tiny_tokenizer, write_tiny
from toy import load, make_config
from transformers import AutoConfig, AutoModelForCausalLM

from minimath.rollout import open as engines
from minimath.config.schema import EvalConfig, RLAIFConfig
from minimath.core.errors import Interrupted, UserError
from minimath.rollout.open import OWN_ENGINE_ONLY, open_engine


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load(write_tiny(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def mamba():
    """A model that keeps a recurrent state, and its tokenizer."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mamba", vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=3,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, use_mambapy=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model, tokenizer


def config(**options):
    return make_config(RLAIFConfig, "unused", max_new_tokens=8, **options)


def test_the_own_engine_samples_unless_told_otherwise(llama, monkeypatch):
    monkeypatch.setattr("minimath.rollout.transformers_engine.generate_hf", lambda *a, **k: pytest.fail("not asked for"))
    facts = {}
    with open_engine(config(), *llama) as sample:
        groups = sample(prompts_of(), samples=2, facts=facts)
    assert [len(group) for group in groups] == [2] * 4 and facts["steps"] > 0


def test_both_engines_draw_the_same_completions(llama):
    """The same streams, the same sampler: fp32 tokens are equal, whichever engine serves a model."""
    told = []
    for name in ("auto", "transformers"):
        with open_engine(config(rollout=name, seed=5), *llama) as sample:
            told.append([[c.ids for c in group] for group in sample(prompts_of(), samples=3)])
    assert told[0] == told[1]


def test_a_model_without_kv_cache_goes_to_transformers_and_says_so_once(mamba):
    said = []
    with open_engine(config(), *mamba, say=said.append) as sample:
        for _ in range(2):
            groups = sample(prompts_of((5, 9)), samples=2)
    assert [len(group) for group in groups] == [2, 2]
    assert len(said) == 1 and "MambaForCausalLM" in said[0] and "slower" in said[0]


@pytest.mark.parametrize("name, value", [("repetition_penalty", 1.2), ("stop_boxed", True), ("loop_guard", 32)])
def test_options_of_the_own_engine_are_never_ignored(llama, mamba, name, value):
    assert name in OWN_ENGINE_ONLY
    with pytest.raises(UserError, match=f"{name}={value}"), open_engine(
            config(rollout="transformers", **{name: value}), *llama):
        pytest.fail("opened")
    with open_engine(config(**{name: value}), *mamba) as sample, pytest.raises(UserError, match=name):
        sample(prompts_of((5, 9)))


def test_own_options_reach_the_engine(llama, monkeypatch):
    seen = {}
    monkeypatch.setattr(engines, "generate", lambda *a, **k: seen.update(k) or [])
    wanted = {"repetition_penalty": 1.2, "stop_boxed": True, "loop_guard": 32, "slots": 7, "top_k": 5}
    with open_engine(config(**wanted), *llama) as sample:
        sample(prompts_of())
    assert {name: seen[name] for name in wanted} == wanted


@pytest.mark.parametrize("rollout", ["auto", "transformers"])
def test_a_stop_between_tokens_ends_the_rollout(llama, rollout):
    calls = []

    def on_step():
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted(15)

    with open_engine(config(rollout=rollout), *llama) as sample, pytest.raises(Interrupted):
        sample(prompts_of(), on_step=on_step)
    assert len(calls) == 3
    with open_engine(config(rollout=rollout), *llama) as sample:  # the model is as it was
        assert sample(prompts_of())


def test_evaluation_takes_the_same_door(llama):
    with open_engine(make_config(EvalConfig, "unused", max_new_tokens=4), *llama) as sample:
        greedy = sample(prompts_of())
    assert all(len(group) == 1 for group in greedy)
