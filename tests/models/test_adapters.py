"""The base stays the base: initialisations, tensors that train, tied embeddings, ids without a row, rollouts."""
import json

import pytest
import torch
from engines import engine_of
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer
from tokenizers import AddedToken
from toy import load, make_config, policy_of, wake_adapter, write_problems

from minimath.config.schema import EvalConfig, SFTConfig
from minimath.core.checkpoint import save_adapter
from minimath.core.errors import UserError
from minimath.data.examples import Example
from minimath.eval.evaluate import evaluate
from minimath.models.forward import adapter_off, hidden_states, inference
from minimath.models.variants import factors
from minimath.rollout.open import OwnEngine
from minimath.rollout.transformers_engine import TransformersEngine, logp_difference
from minimath.train.sft import sft

IDS = torch.arange(10, 26)[None]
PRINCIPAL = ["pissa", "pissa_niter_4", "olora"]


def states(model) -> torch.Tensor:
    with inference(model):
        return hidden_states(model, IDS)


def trained(tiny_dir, tmp_path, **options):
    """The run folder of an SFT run of the tiny model."""
    data = write_problems(tmp_path / "p.jsonl", 12)
    sft(make_config(SFTConfig, str(tiny_dir), data=data, steps=3, batch_size=4, lora_r=4, lr=1e-2, save_every=0,
                    out=str(tmp_path / "run"), **options))
    return tmp_path / "run"


# ---- PiSSA and OLoRA

@pytest.mark.parametrize("more", [{}, {"rslora": True}, {"dora": True}, {"lora_alpha": 3.0}, {"lora_r": 64}],
                         ids=["plain", "rslora", "dora", "alpha", "rank above the width"])
@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", *PRINCIPAL])
def test_with_and_without_a_new_adapter_the_model_is_the_base(tiny_dir, init, more):
    if init == "orthogonal" and more.get("lora_r") == 64:
        pytest.skip("peft refuses ranks above the width")
    base, (model, _) = states(load(tiny_dir)[0]), load(tiny_dir, SFTConfig, train=True, lora_init=init, **more)
    if init != "orthogonal":  # whose product is small, not 0
        torch.testing.assert_close(states(model), base, atol=1e-4, rtol=0)
    wake_adapter(model)
    assert (states(model) - base).abs().max() > 0.1
    with adapter_off(model):
        torch.testing.assert_close(states(model), base, atol=1e-5, rtol=0)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_half_that_trains_begins_where_peft_begins(tiny_dir, init, rslora):
    options = {"lora_r": 4, "lora_init": init, "rslora": rslora}
    model, _ = load(tiny_dir, SFTConfig, train=True, **options)
    theirs = load(tiny_dir)[0]
    torch.manual_seed(0)
    theirs = PeftModel(theirs, LoraConfig(r=4, lora_alpha=SFTConfig().adapter.lora_alpha, init_lora_weights=init,
                                          target_modules="all-linear", use_rslora=rslora, task_type="CAUSAL_LM"))
    for (name, ours), peft in zip(model.named_modules(), theirs.modules(), strict=True):
        if name.endswith("lora_A.default"):
            layer, other = model.get_submodule(name[:-15]), theirs.get_submodule(name[:-15])
            assert layer.scaling["default"] == pytest.approx(other.scaling["default"])
            product = layer.lora_B["default"].weight[:, :4] @ ours.weight[:4]
            wanted = other.lora_B["default"].weight @ peft.weight
            assert (product - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_factors_of_a_principal_part_are_its_best_approximation():
    weight = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(weight)
    for init in ("pissa", "pissa_niter_60"):
        left, right = factors(weight, init, 2, 0.5)
        torch.testing.assert_close(0.5 * left @ right, u[:, :2] * s[:2] @ v[:2], atol=1e-3, rtol=0)
    left, right = factors(weight, "olora", 9, 0.5)  # all of it
    torch.testing.assert_close(left @ right, weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_run_keeps_the_second_half_and_saves_a_plain_adapter(tiny_dir, tmp_path, init):
    before, _ = load(tiny_dir, SFTConfig, train=True, lora_init=init, lora_r=4)
    run = trained(tiny_dir, tmp_path, lora_init=init)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"]) == (True, 8)
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    for name, param in before.named_parameters():
        if "lora_" in name:
            now = saved[name.replace(".default", "")]
            first, second = (now[:4], now[4:]) if "lora_A" in name else (now[:, :4], now[:, 4:])
            was = (param[:4], param[4:]) if "lora_A" in name else (param[:, :4], param[:, 4:])
            assert torch.equal(second, was[1]) and not torch.equal(first, was[0])
    loaded, _ = load(tiny_dir, adapter=str(run))
    base = states(load(tiny_dir)[0])
    assert (states(loaded) - base).abs().max() > 1e-3
    with adapter_off(loaded):
        assert torch.equal(states(loaded), base)


def test_a_run_that_begins_with_such_an_adapter_trains_both_halves(tiny_dir, tmp_path):
    run = trained(tiny_dir, tmp_path, lora_init="pissa")
    model, _ = load(tiny_dir, SFTConfig, train=True, adapter=str(run))
    hidden_states(model, IDS).sum().backward()
    for name, param in model.named_parameters():
        if "lora_B" in name:
            assert param.grad[:, :4].abs().sum() > 0 and param.grad[:, 4:].abs().sum() > 0, name


def test_an_adapter_that_changed_its_base_and_unknown_initialisations_are_refused(tiny_dir, tmp_path):
    model, _ = load(tiny_dir, SFTConfig, train=True)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    for init in ("pissa_niter_4", "olora", "loftq", "corda"):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": init}))
        with pytest.raises(UserError, match=f"init_lora_weights='{init}' changed the base.*weight_conversion"):
            load(tiny_dir, adapter=str(folder))
        if init in ("loftq", "corda"):
            with pytest.raises(UserError, match=f"lora_init='{init}': use default, gaussian"):
                load(tiny_dir, SFTConfig, train=True, lora_init=init)


# ---- what trains

def flags(model) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("train", [True, False])
def test_adapter_off_changes_no_requires_grad(tiny_dir, tmp_path, train):
    model, _ = load(tiny_dir, SFTConfig, train=True, lora_r=4)
    model, _ = load(tiny_dir, SFTConfig if train else None, train=train, adapter=str(save_adapter(model, tmp_path)))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    for name, p in model.named_parameters():
        if "second" in name:
            p.requires_grad_(False)
    before = flags(model)
    assert any(before.values()) == train
    with adapter_off(model):
        states(model)
    assert flags(model) == before
    with pytest.raises(ZeroDivisionError), adapter_off(model):
        raise ZeroDivisionError
    assert flags(model) == before and not any(m.disable_adapters for m in model.modules() if hasattr(m, "lora_A"))


@pytest.mark.parametrize("targets", ["embed_tokens,q_proj", "embed_tokens"])
def test_an_embedding_that_is_the_head_is_no_target(tiny_dir, tmp_path, targets):
    with pytest.raises(UserError, match="includes the embedding, which is tied to the head"):
        load(tiny_dir, SFTConfig, train=True, lora_targets=targets)
    untied = tiny_model(tmp_path / "untied", "llama-untied")
    model, _ = load(untied, SFTConfig, train=True, lora_targets=targets)
    assert any("embedding" in name for name, trains in flags(model).items() if trains)
    with pytest.raises(UserError, match="includes the LM head"):
        load(untied, SFTConfig, train=True, lora_targets="lm_head")


# ---- ids that the embedding has no row for

@pytest.fixture
def beyond(tmp_path):
    folder, tokenizer = tiny_model(tmp_path / "beyond"), tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    tokenizer.save_pretrained(folder)
    return folder


def test_tokens_without_a_row_are_said_at_loading_and_refused_where_they_are_used(beyond, tmp_path, capsys):
    policy = policy_of(beyond)
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{beyond}: the embedding has no row for 1 tokens of the tokenizer (<think>, ...): texts with them "
                    "are refused"]
    assert policy.prompt_ids("2+3?") and policy.prompt_ids("<think>")  # broken up in a problem
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>"},
                        {"role": "user", "content": "q"}], "answer": "5"}
    with pytest.raises(UserError, match="token '<think>' has no row in the embedding of .*beyond"):
        policy.prompt_ids(Example("q", messages=row["messages"]))
    with pytest.raises(UserError, match="token '<think>' has no row"):
        evaluate(make_config(EvalConfig, str(beyond), data=[row], out=str(tmp_path / "eval")))
    with pytest.raises(UserError, match="token '<think>' has no row"):
        sft(make_config(SFTConfig, str(beyond), data=[{"problem": "p", "solution": "5<think>"}], steps=1,
                        out=str(tmp_path / "sft")))


# ---- rollouts are of the weights that train

@pytest.mark.parametrize("kind", [OwnEngine, TransformersEngine])
@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rslora": True}, {"lora_init": "pissa"}, {"dtype": "bf16"}],
                         ids=["plain", "dora", "rslora", "pissa", "bf16"])
def test_every_engine_samples_with_a_large_adapter_on(tiny_dir, kind, options):
    model, tokenizer = load(tiny_dir, SFTConfig, train=True, lora_r=4, **options)
    wake_adapter(model, 0.5)
    prompt, tolerance = tokenizer("Tom has 12")["input_ids"], 0.05 if "dtype" in options else 1e-4
    [[sample]] = engine_of(model, tokenizer, kind=kind, max_new_tokens=20, eos=[]).generate([prompt])
    with inference(model):
        assert logp_difference(model, prompt, sample, 1.0) < tolerance
        with adapter_off(model):
            assert logp_difference(model, prompt, sample, 1.0) > 0.1
