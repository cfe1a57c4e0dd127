"""compile=true: what trains through compiled layers is what trains through minimath's, and decoding sees none of it."""
import functools

import pytest
import torch
from engines import all_facts, generate
from tiny import tiny_model
from toy import ending_model, even, load, make_config, metrics, wake_adapter, write_problems

from minimath.config.schema import RLAIFConfig, SFTConfig
from minimath.core.errors import UserError
from minimath.models import variants
from minimath.models.forward import base_causal_lm, hidden_states
from minimath.models.fused import fused_layers
from minimath.models.variants import compile_layers
from minimath.train.rlaif import rlaif
from minimath.train.sft import sft

PROMPTS = [list(range(10, 40)), list(range(50, 57))]


@pytest.fixture(autouse=True)
def counters(monkeypatch):
    """Counters of Dynamo, at 0; layers are traced and checked for their guards, and run by torch without a compiler."""
    import torch._dynamo
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(variants, "compile_layers", functools.partial(compile_layers, backend="eager"))
    return torch._dynamo.utils.counters


def pair(folder, **options):
    """The same model twice: (with compiled layers, with fused ones)."""
    models = [load(folder, SFTConfig, train=True, compile=compiled, **options) for compiled in (True, False)]
    for model, _ in models:
        wake_adapter(model)
    assert [bool(fused_layers(base_causal_lm(model))) for model, _ in models] == [False, True]
    return models


def gradients(model, length: int) -> list:
    model.zero_grad()
    hidden = hidden_states(model, torch.arange(5, 5 + length)[None])
    (hidden * torch.sin(torch.arange(hidden.numel())).view_as(hidden)).sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family, kinds", [("llama", 1), ("gemma3_text", 2)])
def test_a_graph_serves_all_sizes_and_layers_of_a_kind(tmp_path, counters, family, kinds):
    """A layer whose input needs no gradient, the first one, has a graph of its own."""
    model, _ = load(tiny_model(tmp_path, family), SFTConfig, train=True, compile=True)
    for length in (20, 33, 64):
        assert all(grad.isfinite().all() for grad in gradients(model, length))
    assert 0 < counters["stats"]["unique_graphs"] <= 2 * kinds and not counters["graph_break"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_decoding_between_steps_gives_the_same_tokens_and_gradients(tmp_path, counters, checkpointing):
    """It puts functions of its own into the linear layers, which compiled code must neither use nor keep."""
    (compiled, tokenizer), (fused, _) = pair(tiny_model(tmp_path), gradient_checkpointing=checkpointing)
    sampled = []
    for length in (20, 33):
        for one, other in zip(gradients(compiled, length), gradients(fused, length), strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm()
        graphs = counters["stats"]["unique_graphs"]
        sampled.append([[[ids for ids, *_ in group] for group in all_facts(
            generate(model, tokenizer, PROMPTS, samples=2, max_new_tokens=24))] for model in (compiled, fused)])
        assert counters["stats"]["unique_graphs"] == graphs <= 2
        for model in (compiled, fused):
            wake_adapter(model, seed=length)
    for one, other in sampled:
        assert one == other
    assert sampled[0] != sampled[1]


@pytest.mark.parametrize("family, checkpointing, backend", [
    ("llama", False, "eager"), ("llama", True, "eager"), ("qwen3", False, "eager"), ("qwen3", True, "eager"),
    pytest.param("llama", False, "inductor", marks=pytest.mark.slow),
    pytest.param("qwen3", True, "inductor", marks=pytest.mark.slow)])
def test_two_steps_have_the_same_loss_and_gradient(tmp_path, monkeypatch, family, checkpointing, backend):
    monkeypatch.setattr(variants, "compile_layers", functools.partial(compile_layers, backend=backend))
    model, data = str(tiny_model(tmp_path / "model", family)), write_problems(tmp_path / "problems.jsonl")
    for name in ("compiled", "fused"):
        sft(make_config(SFTConfig, model, data=data, steps=2, batch_size=6, lora_r=4, lr=1e-2, save_every=0,
                        eval_data=data, eval_every=1, eval_max_new_tokens=8, gradient_checkpointing=checkpointing,
                        compile=name == "compiled", out=str(tmp_path / name)))
    assert_same_records(tmp_path, ("loss", "optim/grad_norm", "eval/tokens"))


def assert_same_records(folder, names, count: int = 4) -> None:
    """Of two steps and the evaluation after each, in stage 2 of one before them, too."""
    compiled, fused = (metrics(folder / name, *names) for name in ("compiled", "fused"))
    assert len(compiled) == len(fused) == count
    for one, other in zip(compiled, fused, strict=True):
        assert {k: v for k, v in one.items() if v is not None} == pytest.approx(
            {k: v for k, v in other.items() if v is not None}, rel=1e-5)


def test_rollouts_updates_judge_and_reference_are_the_same(tmp_path):
    folder, data = tiny_model(tmp_path / "model"), write_problems(tmp_path / "problems.jsonl", n=12)
    model = ending_model(folder, tmp_path / "ending")
    for name in ("compiled", "fused"):
        rlaif(make_config(RLAIFConfig, model, data=data, steps=2, prompts_per_step=2, group_size=4, max_new_tokens=16,
                          lora_r=4, lr=1e-2, judge="self", verifier=even, kl_coef=0.05, save_every=0, warmup=0.0,
                          eval_data=data, eval_every=1, eval_max_new_tokens=8, compile=name == "compiled",
                          out=str(tmp_path / name)))
    assert_same_records(tmp_path, ("loss", "optim/grad_norm", "policy/kl", "reward/mean", "rollout/tokens",
                                   "judge/prompt_tokens", "eval/tokens"), count=5)


def test_a_compiler_that_fails_is_said_with_what_to_do(tmp_path, monkeypatch):
    def no_compiler(graph, inputs):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(variants, "compile_layers", functools.partial(compile_layers, backend=no_compiler))
    model, _ = load(tiny_model(tmp_path), SFTConfig, train=True, compile=True)
    with torch.no_grad():
        hidden_states(model, torch.tensor([[5, 6]]))  # needs none
    with pytest.raises(UserError, match="no working C.. compiler.* Use compile=false") as error:
        hidden_states(model, torch.tensor([[5, 6]]))
    assert "\n" not in str(error.value)


def test_adapters_that_cannot_be_traced_are_refused(tmp_path):
    with pytest.raises(UserError, match="dora=true; use one of the two"):
        load(tiny_model(tmp_path), SFTConfig, train=True, compile=True, dora=True)
