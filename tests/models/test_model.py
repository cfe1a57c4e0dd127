"""Loading: adapters, 4-bit weights that stay trainable, what the config says of the head, errors in one line."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from engines import generate
from toy import load, make_config, wake_adapter
from transformers import AutoConfig, AutoModelForCausalLM

from minimath.config.schema import EvalConfig, SFTConfig
from minimath.core.checkpoint import save_adapter
from minimath.core.errors import UserError
from minimath.kernels.reference import full_logits
from minimath.models.forward import adapter_off, head, hidden_states, inference
from minimath.models.load import describe, pick_device, pick_dtype
from minimath.plan.needs import Planner

IDS = torch.arange(10, 26)[None]  # (1, 16)


@pytest.fixture(scope="module")
def nf4_dir(tmp_path_factory):
    """A tiny Llama whose layers are wide enough for the packed 4-bit kernels (multiples of 64)."""
    folder = tmp_path_factory.mktemp("nf4")
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


# ---- the adapter


def test_adapter_off_gives_the_base_model(tiny_dir):
    base, _ = load(tiny_dir)
    model, _ = load(tiny_dir, train=True)
    wake_adapter(model)
    with inference(model):
        live = hidden_states(model, IDS)
        with adapter_off(model):
            off = hidden_states(model, IDS)
        assert torch.equal(off, hidden_states(base, IDS))
        assert not torch.allclose(live, off, atol=1e-2)
        assert torch.equal(live, hidden_states(model, IDS))  # on again
    with adapter_off(base):  # a no-op without an adapter
        hidden_states(base, IDS)


def test_only_the_adapter_is_trained_and_in_fp32(tiny_dir):
    model, _ = load(tiny_dir, train=True, dtype="bf16")
    for name, param in model.named_parameters():
        assert param.requires_grad == ("lora_" in name)
        assert param.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)
    assert not any("lm_head" in name for name, param in model.named_parameters() if param.requires_grad)
    assert model.training


def test_a_saved_adapter_is_loaded_for_inference_and_for_more_training(tiny_dir, tmp_path):
    model, _ = load(tiny_dir, train=True)
    wake_adapter(model)
    save_adapter(model, tmp_path / "run" / "adapter")
    with inference(model):
        wanted = hidden_states(model, IDS)
    frozen, _ = load(tiny_dir, adapter=str(tmp_path / "run"))  # a run folder will do
    assert not any(p.requires_grad for p in frozen.parameters()) and not frozen.training
    with torch.no_grad():
        torch.testing.assert_close(hidden_states(frozen, IDS), wanted)
    trained, _ = load(tiny_dir, train=True, adapter=str(tmp_path / "run"))
    assert {n for n, p in trained.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize(
    "options",
    [
        {"dora": True},
        {"rslora": True},
        {"lora_init": "pissa"},
        {"lora_init": "gaussian"},
        {"lora_init": "olora"},
        {"lora_targets": "q_proj, v_proj"},
    ],
)
def test_adapter_variants_get_gradients(tiny_dir, options):
    model, _ = load(tiny_dir, train=True, lora_r=4, **options)
    hidden_states(model, IDS).square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert grads and all(g is not None and torch.isfinite(g).all() for g in grads)
    assert sum(float(g.abs().sum()) for g in grads) > 0
    names = {n.split(".")[-4] for n, p in model.named_parameters() if "lora_A" in n}
    assert names == (
        {"q_proj", "v_proj"}
        if "lora_targets" in options
        else {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    )


def test_rslora_scales_by_the_root_of_the_rank(tiny_dir):
    scales = []
    for rslora in (False, True):
        model, _ = load(tiny_dir, train=True, lora_r=4, lora_alpha=8.0, rslora=rslora)
        scales.append(next(m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")))
    assert scales == [2.0, 4.0]


# ---- 4-bit weights


def lora_gradients(model):
    """{name: gradient} of one forward and backward in train mode."""
    model.train()
    model.zero_grad()
    hidden_states(model, IDS).float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_nf4_gradients_after_generate_equal_those_of_a_fresh_model(nf4_dir):
    """The repack trap: on CPUs with avx512_bf16, bitsandbytes repacks 4-bit weights in the first no-grad
    forward, and every LoRA gradient after it is wrong. An RL loop generates and trains with the same weights."""
    fresh, tokenizer = load(nf4_dir, train=True, quant="nf4", dtype="bf16")
    wake_adapter(fresh)
    wanted = lora_gradients(fresh)
    used, _ = load(nf4_dir, train=True, quant="nf4", dtype="bf16")
    wake_adapter(used)
    generate(used, tokenizer, [IDS[0].tolist()] * 3, samples=2, max_new_tokens=4, eos=[])
    got = lora_gradients(used)
    for name, gradient in wanted.items():
        assert torch.equal(got[name], gradient), name
    assert sum(float(g.abs().sum()) for g in wanted.values()) > 0


def test_the_guard_reaches_every_4bit_layer(nf4_dir):
    import bitsandbytes

    model, _ = load(nf4_dir, train=True, quant="nf4", dtype="bf16")
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14 and not any(layer.support_avx512bf16_for_cpu for layer in layers)


# ---- the head


@pytest.mark.parametrize(
    "family, softcap, scale",
    [
        ("llama", 0.0, 1.0),
        ("gemma2", 30.0, 1.0),
        ("granite", 0.0, 0.25),
        ("cohere", 0.0, 0.25),
        ("llama-untied", 0.0, 1.0),
    ],
)
def test_head_reads_softcap_and_scale_from_the_config(tmp_path, family, softcap, scale):
    model, _ = load(tiny.tiny_model(tmp_path, family), attn="eager")
    lm_head = head(model)
    assert (lm_head.softcap, lm_head.logit_scale) == (softcap, scale)
    with torch.no_grad():
        hidden = hidden_states(model, IDS)
        logits = scale * (hidden @ lm_head.weight.T)
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        torch.testing.assert_close(logits, model(input_ids=IDS).logits)


def test_head_has_the_bias_of_the_output_layer(tiny_dir):
    model, _ = load(tiny_dir)
    assert head(model).bias is None
    old = model.get_output_embeddings()
    new = torch.nn.Linear(old.in_features, old.out_features, bias=True)
    model.set_output_embeddings(new)
    assert head(model).bias is new.bias and head(model).weight is new.weight


# ---- errors


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text and len(text) < 600
    return text


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder"])
def test_a_missing_model_folder_is_named(name):
    with pytest.raises(UserError) as caught:
        load(name)
    assert name in one_line(caught) and "config.json" in str(caught.value)


def test_a_model_that_cannot_be_downloaded_is_named():
    with pytest.raises(UserError) as caught:
        load("owner/not-a-model-of-anyone")
    assert "owner/not-a-model-of-anyone" in one_line(caught) and "network" in str(caught.value)


def test_a_folder_with_broken_weights_is_named(tiny_dir, tmp_path):
    for file in Path(tiny_dir).iterdir():
        (tmp_path / file.name).write_bytes(
            file.read_bytes()[:1000] if file.suffix == ".safetensors" else file.read_bytes()
        )
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert str(tmp_path) in one_line(caught)


@pytest.mark.parametrize("file, text, said", [
    ("config.json", {"hidden_size": "32"}, "expected int, got str"),
    ("config.json", {"hidden_size": 30}, "not a multiple of the number of attention heads"),
    ("tokenizer.json", [], "tokenizer"),
])
def test_a_folder_with_a_file_that_transformers_refuses_is_named(tiny_dir, tmp_path, file, text, said):
    shutil.copytree(tiny_dir, tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | text if text else text))
    with pytest.raises(UserError, match=said) as caught:
        load(tmp_path / "model")
    assert str(tmp_path) in one_line(caught)
    if file == "config.json":
        with pytest.raises(UserError, match=said):
            Planner(str(tmp_path / "model"), "cpu")


def test_a_model_without_its_head_is_refused_and_not_given_a_random_one(tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny.tiny_model(tmp_path, "llama-untied")).model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="lack 1 of a causal LM's weights, such as lm_head.weight") as caught:
        load(tmp_path)
    assert str(tmp_path) in one_line(caught)


def test_a_card_too_small_for_the_weights_is_no_fault_of_the_folder(tiny_dir, monkeypatch):
    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load(tiny_dir)


def test_a_missing_adapter_is_named(tiny_dir, tmp_path):
    with pytest.raises(UserError) as caught:
        load(tiny_dir, adapter=str(tmp_path / "nothing"))
    assert "nothing" in one_line(caught)


def test_a_pickled_adapter_is_never_read(tiny_dir, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    with pytest.raises(UserError, match="pickle") as caught:
        load(tiny_dir, adapter=str(tmp_path))
    one_line(caught)
    assert not (tmp_path / "ran").exists()


def test_an_adapter_of_another_model_is_refused(tiny_dir, nf4_dir, tmp_path):
    model, _ = load(nf4_dir, train=True)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(UserError, match="can.t fit model=") as caught:
        load(tiny_dir, adapter=str(tmp_path / "adapter"))
    one_line(caught)


@pytest.mark.parametrize(
    "targets, said", [("lm_head", "LM head"), ("q_proj,lm_head", "LM head"), ("q_prj", "q_proj")]
)
def test_lora_targets_that_cannot_work_are_refused(tmp_path, targets, said):
    folder = tiny.tiny_model(tmp_path, "llama-untied")
    with pytest.raises(UserError, match=said) as caught:
        load(folder, train=True, lora_targets=targets)
    assert targets in one_line(caught)


def test_an_unknown_lora_init_is_refused(tiny_dir):
    with pytest.raises(UserError, match="pisa") as caught:
        load(tiny_dir, train=True, lora_init="pisa")
    one_line(caught)


# ---- device and dtype


def test_device_choices():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("cuda:99", "gpu"):
        with pytest.raises(UserError, match="device=auto"):
            pick_device(name)


@pytest.mark.parametrize("name, current, card", [("cuda", 0, 0), ("cuda", 1, 1), ("cuda:1", 0, 1), ("auto", 1, 1)])
def test_a_card_is_named_by_its_index_and_becomes_the_current_one(monkeypatch, name, current, card):
    """Triton and CUDA graphs take the current card, whatever their tensors'."""
    chosen = []
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert pick_device(name) == torch.device("cuda", card)
    assert chosen == [torch.device("cuda", card)]


def test_dtype_choices():
    cpu = torch.device("cpu")
    assert [pick_dtype(name, cpu)[0] for name in ("fp32", "bf16", "fp16")] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]
    dtype, reason = pick_dtype("auto", cpu)
    assert dtype in (torch.float32, torch.bfloat16) and reason


def test_describe_names_device_dtype_and_quantisation(nf4_dir):
    cfg = make_config(EvalConfig, str(nf4_dir), quant="nf4", dtype="bf16")
    model, _ = load(nf4_dir, quant="nf4", dtype="bf16")
    text = describe(model, cfg)
    assert all(part in text for part in (str(nf4_dir), "cpu", "bfloat16", "NF4", "double", "0.00 M trained"))
    assert "\n" not in text


def test_rows_beyond_the_context_of_the_model_are_said(tiny_dir):
    model, _ = load(tiny_dir)
    for cls, options, which in ((SFTConfig, {"max_len": 4096}, ""), (SFTConfig, {"max_len": 4097}, "max_len="),
                                (EvalConfig, {"max_new_tokens": 3072}, ""),
                                (EvalConfig, {"max_new_tokens": 3073}, "max_new_tokens=")):
        _, said, line = describe(model, make_config(cls, str(tiny_dir), **options)).partition("\n")
        assert bool(said) == bool(which) and (not which or f"{which} allow rows of 4097 tokens" in line)


@pytest.mark.parametrize(
    "kind, fields",
    [("falcon_h1", {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
                    "head_dim": 8}),
     ("recurrent_gemma", {"logits_soft_cap": 2.0, "lru_width": 32, "num_key_value_heads": 1, "num_hidden_layers": 3})],
)
def test_the_head_of_recurrent_models_has_their_scale_and_cap(kind, fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.5, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids, lm_head = torch.arange(3, 12)[None], head(model)
    with torch.no_grad():
        hidden = hidden_states(model, ids)[0]
        wanted = model(input_ids=ids).logits[0]
        got = full_logits(hidden, lm_head.weight, **lm_head.kernel_args())
        plain = full_logits(hidden, lm_head.weight)
    torch.testing.assert_close(got.float(), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain.float(), wanted, atol=1e-2)
