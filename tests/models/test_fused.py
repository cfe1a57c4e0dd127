"""The fused decoder layers compute what transformers' layers with peft's compute, in every setting."""
import copy

import pytest
import torch
from tiny import tiny_model
from toy import policy_of, wake_adapter

from minimath.config.schema import EvalConfig, SFTConfig
from minimath.data.batch import forward_args, micro_batches
from minimath.data.chat import Encoded
from minimath.models import load
from minimath.models.attention import QUERIES, Segment, Segments
from minimath.models.forward import adapter_off, base_causal_lm, hidden_states, inference, takes_rows
from minimath.models.fused import fused_layers, unfusable
from minimath.models.prefix import shared_batch

FAMILIES = ["llama", "llama-untied", "mistral", "qwen2", "qwen2-window", "qwen3", "gemma2", "gemma3_text", "phi3"]
LENGTHS = (70, 33, 1, 5)


def pair(folder, monkeypatch, **options):
    """The same model twice: (fused, as transformers and peft have it)."""
    kept, loaded = load.fuse, []
    for fuse in (kept, lambda model: "for the comparison"):
        monkeypatch.setattr(load, "fuse", fuse)
        model = policy_of(folder, SFTConfig, train=True, **{"attn": "eager", **options}).model
        wake_adapter(model)
        loaded.append(model)
    monkeypatch.setattr(load, "fuse", kept)
    assert fused_layers(base_causal_lm(loaded[0])) and not fused_layers(base_causal_lm(loaded[1]))
    return loaded


def rows_of(lengths=LENGTHS):
    return [Encoded([(7 * i + n) % 300 for i in range(n)], [False] + [True] * (n - 1), False) for n in lengths]


def batch_of(*, packing: bool, lengths=LENGTHS) -> dict:
    [(_, batch)] = micro_batches(rows_of(lengths), packing=packing, micro_batch_tokens=10**6, pad_id=0)
    return batch


def step(model, batch, real=None):
    """(hidden states of tokens that count, gradients by name) of a loss that weighs every number differently."""
    model.zero_grad()
    torch.manual_seed(3)  # dropout
    hidden = hidden_states(model, **forward_args(batch)).flatten(0, 1)
    hidden = hidden[batch["source"]] if "source" in batch else hidden[batch["target"] != -100]
    weight = torch.sin(torch.arange(hidden.numel(), dtype=torch.float64)).to(hidden.dtype).view_as(hidden)
    (hidden * weight).sum().backward()
    return hidden.detach().double(), {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other, tolerance=1e-5):
    (hidden, grads), (want, want_grads) = one, other
    assert (hidden - want).norm() <= tolerance * want.norm()
    assert grads.keys() == want_grads.keys() and grads
    for name, grad in want_grads.items():
        assert (grads[name] - grad).norm() <= tolerance * grad.norm(), name
    total, want_total = (torch.cat([g.flatten() for g in each.values()]).norm() for each in (grads, want_grads))
    assert abs(total - want_total) <= tolerance * want_total


SETTINGS = {"plain": {}, "dropout": {"lora_dropout": 0.3}, "checkpointing": {"gradient_checkpointing": True},
            "both": {"lora_dropout": 0.2, "gradient_checkpointing": True}, "rslora": {"rslora": True, "lora_r": 3},
            "nf4": {"quant": "nf4"}, "nf4 with dropout": {"quant": "nf4", "lora_dropout": 0.3}}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("setting, packing", [*((name, True) for name in SETTINGS), ("dropout", False)])
def test_loss_and_gradient_are_those_of_transformers_and_peft(tmp_path, monkeypatch, family, setting, packing):
    fused, plain = pair(tiny_model(tmp_path, family), monkeypatch, **SETTINGS[setting])
    batch = batch_of(packing=packing)
    assert_same(step(fused, batch), step(plain, batch))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prompt_and_the_model_without_its_adapter(tmp_path, monkeypatch, family):
    fused, plain = pair(tiny_model(tmp_path, family), monkeypatch)
    prompt = list(range(5, 25))
    rows = [Encoded(prompt + list(range(30, 30 + n)), [False] * 20 + [True] * n, False) for n in (9, 40, 1, 2)]
    assert_same(step(fused, shared_batch(rows)), step(plain, shared_batch(rows)))
    batch = batch_of(packing=True)
    with inference(fused), inference(plain), adapter_off(fused), adapter_off(plain):
        got, want = (hidden_states(model, **forward_args(batch)) for model in (fused, plain))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
    assert_same(step(fused, batch), step(plain, batch))  # on again


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text"])
def test_rows_of_several_blocks_of_queries(tmp_path, monkeypatch, family):
    """Longer than QUERIES, whose blocks share keys; alone, and behind a prompt."""
    fused, plain = pair(tiny_model(tmp_path, family), monkeypatch)
    batch = batch_of(packing=True, lengths=(2 * QUERIES + 50, QUERIES, QUERIES + 1, 7))
    assert_same(step(fused, batch), step(plain, batch))
    prompt = [i % 300 for i in range(45)]
    rows = [Encoded(prompt + [i % 290 for i in range(n)], [False] * 45 + [True] * n, False) for n in (QUERIES + 40, 20)]
    assert_same(step(fused, shared_batch(rows)), step(plain, shared_batch(rows)))


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_the_error_is_no_larger_than_that_of_the_unfused_step(tmp_path, monkeypatch, family):
    folder, batch = tiny_model(tmp_path, family), batch_of(packing=True)
    fused, plain = pair(folder, monkeypatch, dtype="bf16")
    exact = copy.deepcopy(plain).double()
    (want, grads), got, rough = step(exact, batch), step(fused, batch), step(plain, batch)
    assert (got[0] - want).norm() <= 1.1 * (rough[0] - want).norm()
    ours, theirs = ({name: (each[1][name] - grad).norm() for name, grad in grads.items()} for each in (got, rough))
    total = [sum(e ** 2 for e in errors.values()) ** 0.5 for errors in (ours, theirs)]
    assert total[0] <= 1.1 * total[1]
    for name, grad in grads.items():  # by tensor with room for chance: some of theirs happen to be near 0
        assert ours[name] <= 2 * theirs[name] + 0.01 * grad.norm(), name


def test_targets_may_be_few_and_adapters_several(tmp_path, monkeypatch):
    fused, plain = pair(tiny_model(tmp_path), monkeypatch, lora_targets="q_proj,v_proj,down_proj")
    batch = batch_of(packing=True)
    assert_same(step(fused, batch), step(plain, batch))
    for model in (fused, plain):
        torch.manual_seed(5)
        model.add_adapter("judge", copy.deepcopy(model.peft_config["default"]))
        wake_adapter(model, seed=2)
        model.set_adapter("judge")
    judged = step(fused, batch)
    assert_same(judged, step(plain, batch))
    assert all("judge" in name for name in judged[1])
    for model in (fused, plain):
        model.base_model.set_adapter(["default", "judge"])
    assert_same(step(fused, batch), step(plain, batch))


def test_the_weights_are_there_once_under_their_own_names(tmp_path, monkeypatch):
    fused, plain = pair(tiny_model(tmp_path), monkeypatch)
    assert list(fused.state_dict()) == list(plain.state_dict())
    for (name, one), other in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in fused.parameters()}
    assert sum(storages.values()) == sum(p.nbytes for p in plain.parameters())
    for layer in fused_layers(base_causal_lm(fused)).layers:
        for group in layer.groups:
            assert group.weight.untyped_storage().data_ptr() in storages


def test_a_changed_model_is_followed(tmp_path, monkeypatch):
    """merge, unmerge, to(dtype), new values: whatever moves the weights."""
    fused, plain = pair(tiny_model(tmp_path), monkeypatch)
    batch = batch_of(packing=True)
    for change in (lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter(), lambda m: m.double(),
                   lambda m: [p.data.mul_(1.5) for n, p in m.named_parameters() if "lora_B" in n],
                   lambda m: m.load_state_dict({n: 0.5 * v for n, v in m.state_dict().items()})):
        for model in (fused, plain):
            change(model)
        with inference(fused), inference(plain):
            got, want = (hidden_states(model, **forward_args(batch)) for model in (fused, plain))
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
    merged = fused.merge_and_unload()
    with inference(merged):
        torch.testing.assert_close(hidden_states(merged, **forward_args(batch)), want, atol=1e-4, rtol=1e-5)


def test_a_backward_pass_has_the_adapters_of_its_forward_pass(tmp_path, monkeypatch):
    """A reference under adapter_off between the two changes nothing; an optimizer step there is refused."""
    model, _ = pair(tiny_model(tmp_path), monkeypatch)
    batch = batch_of(packing=True)
    want = step(model, batch)
    model.zero_grad()
    hidden = hidden_states(model, **forward_args(batch)).flatten(0, 1)[batch["target"] != -100]
    with inference(model), adapter_off(model):
        hidden_states(model, **forward_args(batch))
    weight = torch.sin(torch.arange(hidden.numel(), dtype=torch.float64)).to(hidden.dtype).view_as(hidden)
    (hidden * weight).sum().backward()
    for name, grad in want[1].items():
        assert torch.equal(dict(model.named_parameters())[name].grad.double(), grad), name
    hidden = hidden_states(model, **forward_args(batch))
    with torch.no_grad():
        for param in [p for p in model.parameters() if p.requires_grad]:
            param.mul_(0.9)
    with pytest.raises(RuntimeError, match="changed between"):
        hidden.sum().backward()


def kept_bytes(model, batch) -> int:
    """Bytes saved for the backward pass, without those of parameters."""
    own, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(tensor):
        if (key := tensor.untyped_storage().data_ptr()) not in own:
            saved[key] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden_states(model, **forward_args(batch))
    return sum(saved.values())


def test_half_of_what_a_step_kept_is_kept(tmp_path, monkeypatch):
    """x, q, k, v, attention, g and u remain; with checkpointing x alone."""
    batch = batch_of(packing=True, lengths=(512,))
    fused, plain = pair(tiny_model(tmp_path), monkeypatch, dtype="bf16", attn="sdpa", lora_r=2)
    assert kept_bytes(fused, batch) < 0.6 * kept_bytes(plain, batch)
    again, _ = pair(tmp_path, monkeypatch, dtype="bf16", attn="sdpa", lora_r=2, gradient_checkpointing=True)
    assert kept_bytes(again, batch) < 0.4 * kept_bytes(fused, batch)


@pytest.mark.parametrize("options, said", [
    ({"dora": True}, "not a plain linear layer"), ({"family": "granite"}, "GraniteDecoderLayer is not of a known")])
def test_what_is_not_fused_runs_as_before_and_says_so(tmp_path, capsys, options, said):
    folder = tiny_model(tmp_path, options.pop("family", "llama"))
    model = policy_of(folder, SFTConfig, train=True, **options).model
    assert said in capsys.readouterr().err and not takes_rows(model)
    assert step(model, batch_of(packing=True))[1]


def test_a_layer_of_a_models_own_code_is_not_fused_whatever_its_name(tmp_path):
    """trust_remote_code=true: such a class may compute something else."""
    model = policy_of(tiny_model(tmp_path), EvalConfig).model
    layer = model.base_model.layers[0]
    layer.__class__ = type("LlamaDecoderLayer", (type(layer),), {"__module__": "transformers_modules.other.modeling"})
    assert "LlamaDecoderLayer is not of a known family" in unfusable(model)


def test_layers_without_an_adapter_are_fused_too(tiny_dir):
    model = policy_of(tiny_dir, EvalConfig).model
    assert takes_rows(model)
    assert hidden_states(model, torch.arange(5, 25)[None]).shape == (1, 20, 32)


def test_blocks_cover_every_query_once():
    rows = [Segment(0, 40), Segment(40, 600, range(40)), Segment(640, 1, range(40)), Segment(641, 31)]
    segments, seen = Segments(rows, 672), []
    for block in segments.blocks:
        for start, count in zip(block.starts, block.lengths, strict=True):
            seen += range(start + block.first, start + block.first + count)
            assert start + block.first + block.queries <= 672
    assert sorted(seen) == list(range(672))
