"""Models that keep convolution or recurrent state of a row: decoded in slots, prompts never seen by another row."""
import sys

import pytest
import tiny
import torch
from engines import engine_of, generate
from test_rollout_device_work import copies, rollout_on_card, waits
from test_rollout_hf import assert_close, full_logps, prompts_of
from toy import load, wake_adapter
from transformers import AutoConfig, AutoModelForCausalLM

from minimath.core.errors import UserError
from minimath.models.forward import base_causal_lm
from minimath.models.memory import cache_bytes_per_token, state_bytes
from minimath.rollout import decode as decoding
from minimath.rollout import kv_cache, passes
from minimath.rollout.transformers_engine import TransformersEngine

PROMPTS = prompts_of((5, 41, 23, 12, 70))


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """family(name) -> (model, tokenizer) of a tiny model with a live adapter, made once."""
    made = {}

    def get(name):
        if name not in made:
            attn = {"attn": "eager"} if name == "mamba2" else {}  # which has none, and transformers says so
            made[name] = load(tiny.tiny_model(tmp_path_factory.mktemp(name), name), train=True, **attn)
            wake_adapter(made[name][0])
        return made[name]
    return get


def ids_of(groups) -> list:
    return [[sample.ids for sample in group] for group in groups]


@pytest.mark.parametrize("name", tiny.STATEFUL)
def test_greedy_tokens_are_those_of_generate_with_the_logp_of_the_training_forward(family, name):
    """In 4 slots, so that rows end, move and are refilled beside running ones; prompts of unlike length."""
    options = {"samples": 2, "max_new_tokens": 12, "temperature": 0.0, "eos": list(range(4, 40))}
    ours = generate(*family(name), PROMPTS, max_num_seqs=4, **options)
    assert ids_of(ours) == ids_of(generate(*family(name), PROMPTS, kind=TransformersEngine, **options))
    assert len({len(sample.ids) for group in ours for sample in group}) > 1
    model = family(name)[0].eval()
    for prompt, [sample, _] in zip(PROMPTS, ours, strict=True):
        assert_close(sample.logp, full_logps(model, prompt, sample.ids), atol=3e-4)  # a scan, and steps
    model.train()


@pytest.mark.parametrize("name", tiny.STATEFUL)
def test_a_completion_does_not_depend_on_its_batch(family, name):
    options = {"samples": 2, "max_new_tokens": 10, "eos": list(range(4, 40)), "seed": 5}
    together = generate(*family(name), PROMPTS, **options)
    assert ids_of(generate(*family(name), PROMPTS, max_num_seqs=3, **options)) == ids_of(together)
    assert ids_of(generate(*family(name), PROMPTS[2:3], keys=[2], max_num_seqs=1, **options)) == ids_of(together[2:3])


def test_prompts_stay_apart_where_padding_would_reach_the_state(family, monkeypatch):
    options, widths, prefill = {"max_new_tokens": 6, "eos": [], "seed": 5}, [], passes.prefill
    whole = engine_of(*family("falcon_h1"), **options)
    assert whole.pads
    groups = whole.generate(PROMPTS, 2)
    monkeypatch.setattr(passes, "_difference", lambda model, padding: 1e-3 * padding)
    apart = engine_of(*family("falcon_h1"), **options)
    monkeypatch.setattr(decoding, "prefill", lambda model, ids, *cache, **how: (
        widths.append(ids.shape) or prefill(model, ids, *cache, **how)))
    assert not apart.pads
    assert ids_of(apart.generate([*PROMPTS, PROMPTS[1][::-1]], 2, keys=[0, 1, 2, 3, 4, 9])[:5]) == ids_of(groups)
    assert sorted(widths) == [(1, 5), (1, 12), (1, 23), (1, 70), (2, 41)]


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5_text", "granitemoehybrid"])
def test_padding_that_reaches_the_state_is_noticed(family, name, monkeypatch):
    model, tokenizer = family(name)
    assert engine_of(model, tokenizer).pads
    module = sys.modules[type(base_causal_lm(model)).__module__]
    monkeypatch.setattr(module, "apply_mask_to_padding_states", lambda hidden_states, attention_mask: hidden_states)
    assert not engine_of(model, tokenizer).pads


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5_text", "falcon_h1"])
def test_out_of_memory_halves_the_rows_and_changes_no_completion(family, name, monkeypatch):
    options, said, step, steps = {"max_new_tokens": 10, "eos": [], "seed": 5}, [], decoding.Decode.run_step, []
    whole = generate(*family(name), PROMPTS, samples=2, **options)

    def full(self, *width):
        steps.append(1)
        if len(steps) == 4:
            raise torch.OutOfMemoryError("simulated")
        return step(self, *width)

    monkeypatch.setattr(decoding.Decode, "run_step", full)
    again = generate(*family(name), PROMPTS, samples=2, max_num_seqs=8, say=said.append, **options)
    assert ids_of(again) == ids_of(whole) and "going on with 4" in said[-1]


@pytest.mark.parametrize("name", ["lfm2", "falcon_h1", "nemotron_h", "mamba2"])
def test_a_slot_takes_the_bytes_that_are_counted(family, name):
    model, tokenizer = family(name)
    engine = engine_of(model, tokenizer, max_new_tokens=4, max_num_seqs=3, eos=[])
    rows = engine.stream(PROMPTS)
    next(rows)
    cache = engine._batch.cache
    assert cache.nbytes == 3 * (cache.blocks.page * cache_bytes_per_token(model) + state_bytes(model))
    assert state_bytes(model) > 0 and (cache_bytes_per_token(model) == 0) == (name == "mamba2")
    rows.close()


def convolve(x, weight, bias=None, padding=0, groups=1):
    """A depthwise convolution of (B, D, T): torch's own needs a card."""
    windows = torch.nn.functional.pad(x, (padding, padding)).unfold(-1, weight.shape[-1], 1)
    out = (windows * weight[:, 0, None]).sum(-1)
    return out if bias is None else out + bias[:, None]


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5_text", "granitemoehybrid", "falcon_h1"])
def test_a_recorded_step_waits_for_nothing(tmp_path, name, monkeypatch):
    """State of fixed size is changed in place: a graph can hold its addresses."""
    monkeypatch.setattr(passes, "_difference", lambda model, padding: 0.0)  # there are no numbers there
    monkeypatch.setattr(torch.nn.functional, "conv1d", convolve)
    with rollout_on_card(tiny.tiny_model(tmp_path, name)) as (work, batch):
        batch.admit()
        places = [each.data_ptr() for layer in batch.cache.layers for each in layer.tensors()]
        work.clear()
        batch.step()
        assert batch.fixed and not waits(work) and not copies(work)
        assert places == [each.data_ptr() for layer in batch.cache.layers for each in layer.tensors()]


def test_a_layer_that_forgets_its_state_is_noticed(family, monkeypatch):
    fill = kv_cache.SlotLayer.fill
    monkeypatch.setattr(kv_cache.SlotLayer, "fill", lambda layer, *rows: (
        fill(layer, *rows), [state.zero_() for state in layer.states]))
    with pytest.raises(UserError, match="FalconH1ForCausalLM decodes from our cache .* away from a whole pass"):
        engine_of(*family("falcon_h1"))


def test_a_cache_that_a_model_passes_by_is_noticed():
    """RecurrentGemma keeps its state in its layers, RWKV in a list; both say why they are slower."""
    tokenizer, common = tiny.tiny_tokenizer(), {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 384}
    for kind, fields, why in (
            ("recurrent_gemma", {"num_hidden_layers": 3, "lru_width": 32, "head_dim": 8, "num_attention_heads": 4,
                                 "num_key_value_heads": 2, "attention_window_size": 16}, "away from a whole pass"),
            ("rwkv", {"num_hidden_layers": 2, "attention_hidden_size": 32}, "no standard KV cache")):
        config = AutoConfig.for_model(kind, **common, **fields)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with pytest.raises(UserError, match=why):
            engine_of(model, tokenizer)
