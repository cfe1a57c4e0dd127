"""A second adapter beside the policy's: one is active, and neither is ever computed, trained or saved as the other."""
import contextlib
import json

import pytest
import torch
from engines import engine_of
from safetensors.torch import load_file
from tiny import tiny_model
from toy import load, policy_of, same_tensors, wake_adapter

from minimath.config.schema import SFTConfig
from minimath.core.checkpoint import adapter_tensors, save_adapter, save_checkpoint
from minimath.core.errors import UserError
from minimath.export.merge import merge
from minimath.models import load as loading
from minimath.models.decoding import decoding_linears
from minimath.models.forward import (
    active_adapters,
    adapter_named,
    adapter_off,
    base_causal_lm,
    compute_dtype,
    hidden_states,
    inference,
)
from minimath.models.fused import fused_layers
from minimath.models.load import add_adapter, describe
from minimath.models.policy import Policy
from minimath.train.optimizer import make_optimizer

IDS = torch.arange(10, 26)[None]
JUDGE = {"lora_r": 3, "lora_targets": "q_proj,o_proj,up_proj,down_proj", "lora_alpha": 5.0}  # other than the policy's
FAMILIES = ["llama", "qwen3", "gemma3_text", "phi3", "granite"]  # the last is not fused
ALTERNATE = ["judge", None, "default"]


def saved(folder, where, seed=7, **options):
    """The folder of an adapter that changes much."""
    if "lora_targets" not in options and "phi3" in str(folder):
        options["lora_targets"] = "qkv_proj,down_proj"
    model, _ = load(folder, SFTConfig, train=True, **JUDGE | options)
    wake_adapter(model, 0.3, seed)
    return save_adapter(model, where)


def states(model) -> torch.Tensor:
    with inference(model):
        return hidden_states(model, IDS)


def step(model, seed=3) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states of a forward pass in training, and the gradients; dropout by the seed."""
    torch.manual_seed(seed)
    model.zero_grad()
    hidden = hidden_states(model, IDS)
    (hidden * torch.sin(torch.arange(hidden.numel())).view_as(hidden).to(hidden.dtype)).sum().backward()
    return hidden.detach(), grads_of(model)


def grads_of(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one, two):
    assert torch.equal(one[0], two[0]) and one[1].keys() == two[1].keys() and one[1]
    for name, grad in one[1].items():
        assert torch.equal(grad, two[1][name]), name


def flags(model) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}



@pytest.fixture
def both(tiny_dir, tmp_path):
    """A policy that trains, the judge beside it, and the folder that the judge was loaded from."""
    folder = saved(tiny_dir, tmp_path / "judge")
    model, tokenizer = load(tiny_dir, SFTConfig, train=True, lora_r=4)
    wake_adapter(model)
    return add_adapter(model, folder, "judge"), tokenizer, folder


# ---- loaded beside another

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_judge_changes_no_bit_of_the_policy_and_is_what_it_is_alone(tmp_path, family, dtype):
    base, options = tiny_model(tmp_path / family, family), {"lora_r": 4, "lora_dropout": 0.2, "dtype": dtype}
    folder = saved(base, tmp_path / "judge", dtype=dtype)
    model, _ = load(base, SFTConfig, train=True, **options)
    wake_adapter(model)
    want, fused, dice = step(model), fused_layers(base_causal_lm(model)), torch.get_rng_state()
    before = flags(model)
    assert add_adapter(model, folder, "judge") is model
    assert torch.equal(torch.get_rng_state(), dice) and model.training
    assert active_adapters(model) == (["default"], False)
    assert fused_layers(base_causal_lm(model)) is fused and (fused is None) == (family == "granite")
    own = {name: p for name, p in model.named_parameters() if ".judge." in name}
    assert own and all(p.dtype == torch.float32 and not p.requires_grad for p in own.values())
    assert {name: does for name, does in flags(model).items() if name not in own} == before
    assert_same(step(model), want)
    alone = states(load(base, adapter=str(folder), dtype=dtype)[0])
    with adapter_named(model, "judge"):
        assert torch.equal(states(model), alone)
    assert not torch.equal(alone, states(model))
    assert_same(step(model), want)


@pytest.mark.parametrize("family", ["llama", "granite"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_plain_model_with_a_judge_is_the_base_but_inside(tmp_path, family, dtype):
    base = tiny_model(tmp_path / family, family)
    folder = saved(base, tmp_path / "judge", dtype=dtype)
    policy = policy_of(base, dtype=dtype)
    want, alone = states(policy.model), states(load(base, adapter=str(folder), dtype=dtype)[0])
    policy.add_adapter(folder, "judge")
    model = policy.model
    casts = {m.cast_input_dtype_enabled for m in model.modules() if hasattr(m, "cast_input_dtype_enabled")}
    assert casts == {dtype == "fp32"}
    for _ in range(2):
        assert torch.equal(states(model), want) and not any(flags(model).values()) and not model.training
        assert isinstance(compute_dtype(model), contextlib.nullcontext)  # on a card autocast changes bits of a base
        with adapter_named(model, "judge"):
            assert torch.equal(states(model), alone)
            with adapter_off(model):
                assert torch.equal(states(model), want)
            assert torch.equal(states(model), alone)
    [[plain]] = engine_of(load(base, dtype=dtype)[0], policy.tokenizer, max_new_tokens=9, eos=[]).generate([[5, 6, 7]])
    [[sample]] = engine_of(model, policy.tokenizer, max_new_tokens=9, eos=[]).generate([[5, 6, 7]])
    assert sample.ids == plain.ids


def test_what_can_not_stand_beside_another_adapter_is_refused(tiny_dir, tmp_path, monkeypatch):
    def refused(folder, match, base=tiny_dir, **options):
        model, _ = load(base, SFTConfig, train=True, lora_r=4, **options)
        with pytest.raises(UserError, match=match):
            add_adapter(model, folder, "judge")

    refused(tmp_path, "no adapter_model.safetensors .pickled adapters are never loaded")
    folder = saved(tiny_dir, tmp_path / "judge")
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, match in (({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changed the base"),
                          ({"bias": "all"}, "its bias='all' is more than LoRA layers"),
                          ({"modules_to_save": ["norm"]}, r"its modules_to_save=\['norm'\] is more than LoRA"),
                          ({"r": 8}, "cannot be loaded into this model .*trained on another base")):
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        refused(folder, match)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    dora = saved(tiny_dir, tmp_path / "dora", dora=True)
    refused(dora, "could not stay fused .*q_proj is not a plain linear layer.*dora=false")
    untied = tiny_model(tmp_path / "untied", "llama-untied")
    monkeypatch.setattr(loading, "_refuse_head", lambda *args: None)
    on_head = saved(untied, tmp_path / "head", lora_targets="lm_head")
    monkeypatch.undo()
    refused(on_head, "the adapter in .*head includes the LM head", untied)
    monkeypatch.setattr(loading.variants, "is_sharded", lambda model: True)
    refused(folder, "does not go with shard=true")
    monkeypatch.undo()
    model, _ = load(tiny_dir, SFTConfig, train=True, dora=True)  # not fused: peft computes both
    alone = states(load(tiny_dir, adapter=str(dora))[0])
    with adapter_named(add_adapter(model, dora, "judge"), "judge"):
        torch.testing.assert_close(states(model), alone)
    with pytest.raises(ValueError, match="a name like 'jud'"):
        add_adapter(model, folder, "jud")


@pytest.mark.parametrize("name, value, says", [
    ("hidden_size", 64, "hidden size 64"), ("num_hidden_layers", 3, "layers 3"),
    ("intermediate_size", 96, "intermediate size 96"), ("num_attention_heads", 2, "heads 2"),
    ("num_key_value_heads", 4, "key heads 4")])
def test_a_judge_of_another_base_is_refused_by_what_differs(tiny_dir, tmp_path, name, value, says):
    policy, folder = policy_of(tiny_dir, SFTConfig, train=True), saved(tiny_dir, tmp_path / "judge")
    other = tiny_model(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {name: value}))
    mine = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(mine | {"base_model_name_or_path": str(other)}))
    with pytest.raises(UserError, match=fr"the adapter in .*judge was trained on .* .{says}. and can't fit .*\d+.: le"):
        policy.add_adapter(folder, "judge")


# ---- on and off

def test_the_active_adapter_and_what_trains_come_back_nested_and_after_errors(both):
    model, _, _ = both
    before, policy = flags(model), states(model)
    with adapter_off(model):
        base = states(model)
    with adapter_named(model, "judge"):
        assert flags(model) == before and active_adapters(model) == (["judge"], False)
        judge = states(model)
        with adapter_off(model):
            assert flags(model) == before and torch.equal(states(model), base)
            with adapter_named(model, "default"):
                assert torch.equal(states(model), policy)
            assert torch.equal(states(model), base)
        with pytest.raises(ZeroDivisionError), adapter_off(model):
            raise ZeroDivisionError
        assert torch.equal(states(model), judge) and flags(model) == before
    with pytest.raises(ZeroDivisionError), adapter_named(model, "judge"), adapter_named(model, "default"):
        raise ZeroDivisionError
    with model.disable_adapter():  # peft's own, and ours inside
        with adapter_named(model, "judge"):
            assert torch.equal(states(model), judge)
        assert torch.equal(states(model), base)
    assert torch.equal(states(model), policy) and active_adapters(model) == (["default"], False)
    with pytest.raises(ValueError, match="no adapter 'jugde'"), adapter_named(model, "jugde"):
        pass


def test_a_model_without_peft_has_no_adapter_but_none(tiny_dir):
    model, _ = load(tiny_dir)
    with adapter_named(model, None):
        states(model)
    with pytest.raises(ValueError, match="no adapter 'judge'"), adapter_named(model, "judge"):
        pass


# ---- its gradients

@pytest.mark.parametrize("family, options", [("llama", {}), ("gemma3_text", {"lora_dropout": 0.2}), ("granite", {}),
                                             ("llama", {"gradient_checkpointing": True})])
def test_a_judge_that_trains_gets_the_gradients_that_it_gets_alone(tmp_path, family, options):
    base = tiny_model(tmp_path / family, family)
    folder = saved(base, tmp_path / "judge", **options)
    alone, _ = load(base, SFTConfig, train=True, adapter=str(folder), **options)
    want = step(alone)
    model, _ = load(base, SFTConfig, train=True, lora_r=4, **options)
    wake_adapter(model)
    policy = step(model)
    model.zero_grad()
    add_adapter(model, folder, "judge")
    before = flags(model)
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or ".judge." in name)  # both
    with adapter_named(model, "judge"):
        hidden, grads = step(model)
    assert_same((hidden, {name.replace("judge", "default"): grad for name, grad in grads.items()}), want)
    for name, p in model.named_parameters():
        p.requires_grad_(before[name])
    assert_same(step(model), policy)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_backward_pass_outside_has_the_adapters_of_its_forward_pass(tiny_dir, tmp_path, checkpointing):
    """Also where layers are computed again, with a judge whose tensors have the shapes of the policy's."""
    options = {"lora_r": 4, "gradient_checkpointing": checkpointing}
    folder = saved(tiny_dir, tmp_path / "judge", **options)
    model, _ = load(tiny_dir, SFTConfig, train=True, **JUDGE | options)
    wake_adapter(model)
    want = step(model)[1]
    add_adapter(model, folder, "judge")
    model.zero_grad()
    hidden = hidden_states(model, IDS)
    with adapter_named(model, "judge"):
        states(model)
        (hidden * torch.sin(torch.arange(hidden.numel())).view_as(hidden)).sum().backward()
    assert_same((IDS, grads_of(model)), (IDS, want))


# ---- the tensors of each, and decoding

def test_each_set_of_adapters_keeps_its_tensors_until_its_adapters_are_gone(both):
    model, _, folder = both

    def places():
        states(model)
        return [group.active.a.data_ptr() for group in fused_layers(base_causal_lm(model)).groups]

    def round_trip():
        found = {}
        for name in ALTERNATE:
            with adapter_named(model, name):
                found[name] = places()
        return found
    first = round_trip()
    for p in model.parameters():
        if p.requires_grad:
            p.data.mul_(0.9)
    assert round_trip() == first
    group = fused_layers(base_causal_lm(model)).layers[0].qkv
    assert len(group.kept) == 3 and len({place[0] for place in first.values()}) == 3
    for _ in range(3):
        model.delete_adapter("judge")
        add_adapter(model, folder, "judge")
        again = round_trip()
        assert again["default"] == first["default"] and len(group.kept) == 3


@pytest.mark.parametrize("family", ["llama", "granite"])
@pytest.mark.parametrize("copy", [True, False])
def test_no_other_adapter_runs_while_the_model_is_set_up_to_decode(tmp_path, family, copy):
    base = tiny_model(tmp_path / family, family)
    folder = saved(base, tmp_path / "judge")
    model, _ = load(base, SFTConfig, train=True, lora_r=4)
    wake_adapter(model)
    add_adapter(model, folder, "judge")
    policy = states(model)
    with adapter_named(model, "judge"):
        judge = states(model)
    for active, want, others in (("default", policy, ("judge", None)), ("judge", judge, ("default", None)),
                                 (None, None, ("default", "judge"))):
        with adapter_named(model, active), inference(model), decoding_linears(model, copy=copy, rows=1):
            got = states(model)
            for other in others:
                with adapter_named(model, other), pytest.raises(RuntimeError, match="set up to decode with the adapt"):
                    states(model)
            assert torch.equal(states(model), got)
        if want is not None:
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    with adapter_named(model, "judge"):
        assert torch.equal(states(model), judge)
    assert torch.equal(states(model), policy)


def test_a_judge_that_reads_within_an_open_stream_is_told_so(both):
    model, tokenizer, _ = both
    stream = engine_of(model, tokenizer, max_new_tokens=9, eos=[]).stream([[5, 6, 7]])
    next(stream)
    with adapter_named(model, "judge"), pytest.raises(RuntimeError, match="when the rollout has ended"):
        states(model)
    stream.close()
    with adapter_named(model, "judge"):
        states(model)


# ---- saved and exported

def test_neither_adapter_is_in_the_files_of_the_other(both, tiny_dir, tmp_path):
    model, _, folder = both
    judge, policy = load_file(folder / "adapter_model.safetensors"), adapter_tensors(model)
    optimizer = make_optimizer(model.parameters(), SFTConfig().optimizer)
    for name in ALTERNATE:
        with adapter_named(model, name):
            path = save_checkpoint(tmp_path / "run", 1, model=model, optimizer=optimizer, state={}, keep=3)
            own = save_adapter(model, tmp_path / "run" / "adapter")
            again = save_adapter(model, tmp_path / "again", "judge")
        for where, want in ((path, policy), (own, policy), (again, judge)):
            got = load_file(where / "adapter_model.safetensors")
            assert same_tensors(got, want)
            assert not [each.name for each in where.iterdir() if each.is_dir()]
        assert json.loads((own / "adapter_config.json").read_text())["r"] == 4
        assert same_tensors(adapter_tensors(model, "judge"), judge)
        assert json.loads((again / "adapter_config.json").read_text())["r"] == JUDGE["lora_r"]
    assert torch.equal(states(load(tiny_dir, adapter=str(again))[0]), states(load(tiny_dir, adapter=str(folder))[0]))


def test_what_is_said_of_a_model_and_a_merge_of_it_leave_the_judge_out(tiny_dir, tmp_path):
    folder = saved(tiny_dir, tmp_path / "judge")
    cfg = SFTConfig(model=str(tiny_dir), device="cpu", dtype="fp32")
    model, tokenizer = load(tiny_dir, SFTConfig, train=True, lora_r=4)
    wake_adapter(model)
    policy, count = Policy(model, tokenizer, cfg.model, cfg.prompt), describe(model, cfg).split(", ")[-3]
    names = policy.trainable()
    policy.add_adapter(folder, "judge")
    assert describe(model, cfg).split(", ")[-3] == count and "trained" in count and policy.trainable() == names
    want = states(model)
    torch.testing.assert_close(states(merge(model)), want, atol=1e-4, rtol=1e-4)
