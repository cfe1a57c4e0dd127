"""The door to the engines: which one samples, and what is said of it."""

import os
import signal

import pytest
import torch
from engines import policy_with
from test_rollout import prompts_of
from tiny import tiny_tokenizer, write_tiny
from toy import policy_of
from transformers import AutoConfig, AutoModelForCausalLM

from minimath.config.schema import EngineOptions, SamplingOptions
from minimath.core import interrupt
from minimath.core.errors import Interrupted, UserError
from minimath.core.run_folder import say_once
from minimath.models.forward import base_causal_lm
from minimath.models.fused import fused_layers
from minimath.rollout.open import OWN_ENGINE_ONLY, OwnEngine, open_engine
from minimath.rollout.transformers_engine import TransformersEngine


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return policy_of(write_tiny(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def rwkv():
    """The policy of a model whose state has no place in transformers' cache."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "rwkv", vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, attention_hidden_size=32,
        intermediate_size=64, pad_token_id=3, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return policy_with(model, tokenizer)


def opened(policy, *, seed=0, say=print, temperature=1.0, **options):
    return open_engine(EngineOptions(**options), SamplingOptions(max_new_tokens=8, temperature=temperature), policy,
                       seed=seed, say=say)


def test_the_own_engine_samples_unless_told_otherwise(llama):
    with opened(llama) as engine:
        assert type(engine) is OwnEngine
        groups = engine.generate(prompts_of(), 2)
    assert [len(group) for group in groups] == [2] * 4
    assert engine.metrics().keys() == {"max_num_seqs", "seq_fill", "weights", "halved", "preempted",
                                       "sampled_places", "graph_replays", "plain_steps"}
    with opened(llama, rollout="transformers") as engine:
        assert type(engine) is TransformersEngine and engine.metrics() == engine.state_dict() == {}


def test_cuts_that_greedy_decoding_ignores_are_said_once(llama, capsys):
    say_once.cache_clear()
    for cuts in ({}, {"top_p": 0.9, "top_k": 5}, {"min_p": 0.1}):
        for temperature in (0.7, 0.0, 0.0):
            with open_engine(EngineOptions(), SamplingOptions(temperature=temperature, **cuts), llama):
                pass
    assert [line for line in capsys.readouterr().err.splitlines() if "effect" in line] == [
        "top_p and top_k have no effect at temperature=0, which takes the likeliest token",
        "min_p has no effect at temperature=0, which takes the likeliest token"]


def test_both_engines_draw_the_same_completions(llama):
    """The same streams, the same sampler: fp32 tokens are equal, whichever engine serves a model."""
    told = []
    for name in ("auto", "transformers"):
        with opened(llama, rollout=name, seed=5) as engine:
            told.append([[(c.ids, c.text) for c in group] for group in engine.generate(prompts_of(), 3)])
    assert told[0] == told[1]


def test_a_model_without_kv_cache_goes_to_transformers_and_says_so_once(rwkv):
    said = []
    with opened(rwkv, say=said.append, max_num_seqs=1) as engine:
        for _ in range(2):
            groups = engine.generate(prompts_of((5, 9)), 2)
    assert [len(group) for group in groups] == [2, 2] and type(engine) is TransformersEngine
    assert len(said) == 1 and "RwkvForCausalLM" in said[0] and "slower" in said[0]


@pytest.mark.parametrize("name, value", [("stop_boxed", True), ("loop_guard", 32)])
def test_options_of_the_own_engine_are_never_ignored(llama, rwkv, name, value):
    assert name in OWN_ENGINE_ONLY
    for policy, options in ((llama, {"rollout": "transformers"}), (rwkv, {}), (llama, {"rollout": "vllm"})):
        with pytest.raises(UserError, match=f"{name}={value} needs minimath's own engine"):
            opened(policy, **options, **{name: value})


def test_all_options_reach_the_engine(llama):
    engine = open_engine(EngineOptions(stop_boxed=True, loop_guard=32, max_num_seqs=7),
                         SamplingOptions(9, 0.5, 0.9, 0.1, 5), llama, seed=3)
    assert engine.how == (0.5, 0.9, 0.1, 5) and (engine.max_new_tokens, engine.max_num_seqs, engine.seed) == (9, 7, 3)
    assert engine.options.stop_boxed and engine.options.loop_guard == 32 and engine.eos == llama.eos


@pytest.mark.parametrize("rollout", ["auto", "transformers"])
def test_a_signal_between_tokens_ends_the_rollout(llama, rollout, monkeypatch):
    calls, forward = [], llama.model.base_model.forward

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*args, **kwargs)

    with opened(llama, rollout=rollout) as engine, interrupt.interruptible((), lambda text: None):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(llama.model.base_model, "forward", counted)
            engine.generate(prompts_of(), 2)
    assert 3 <= len(calls) <= 4
    with opened(llama, rollout=rollout) as engine:  # the model is as it was
        assert engine.generate(prompts_of())


def test_a_caller_stops_by_asking_for_no_more(llama):
    with opened(llama) as engine:
        for finished in engine.stream(prompts_of(), 2):
            if finished:
                break
    layers = fused_layers(base_causal_lm(llama.model)).layers
    assert all(group.product is None for layer in layers for group in layer.groups)


def test_evaluation_takes_the_same_door(llama):
    with opened(llama, temperature=0.0) as engine:
        assert all(len(group) == 1 for group in engine.generate(prompts_of()))


@pytest.mark.parametrize("rollout", ["auto", "transformers"])
def test_the_url_of_a_server_that_nothing_would_ask_is_refused(llama, rollout):
    with pytest.raises(UserError, match=f"vllm_url= would do nothing with rollout={rollout}: add rollout=vllm"):
        opened(llama, rollout=rollout, vllm_url="http://127.0.0.1:8000")
