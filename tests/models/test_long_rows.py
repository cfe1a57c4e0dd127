"""Long rows: inputs of layers that wait in host memory, and MLPs by pieces, change no number that they need not."""
import pytest
import torch
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy import policy_of, wake_adapter

from minimath.config.schema import SFTConfig
from minimath.core.errors import UserError
from minimath.data.batch import forward_args
from minimath.models import fused, nodes, offload
from minimath.models.forward import base_causal_lm, hidden_states, inference
from tests.models.test_fused import assert_same, batch_of, step

PIECE = 40  # of 109 tokens: three pieces, none full


def model_of(folder, **options):
    options = {"gradient_checkpointing": True, "attn": "eager", **options}
    model = policy_of(folder, SFTConfig, train=True, **options).model
    wake_adapter(model)
    return model


@pytest.fixture
def pieces(monkeypatch):
    """Rows beyond which the MLP goes by pieces."""
    def cut(rows: int):
        for module in (nodes, fused):
            monkeypatch.setattr(module, "PIECE", rows)
    return cut


def test_waiting_inputs_give_the_same_bits(tmp_path):
    folder, batch = tiny_model(tmp_path, "qwen3"), batch_of(packing=True)
    options = {"lora_dropout": 0.2}
    (hidden, grads), (want, want_grads) = (step(model_of(folder, **options, offload=o), batch) for o in (True, False))
    assert torch.equal(hidden, want) and all(torch.equal(grads[name], grad) for name, grad in want_grads.items())


@pytest.mark.parametrize("family", ["qwen2", "granite"])  # granite is not fused
def test_the_input_of_every_layer_waits_in_host_memory(tmp_path, monkeypatch, family):
    sizes, make = [], offload.host_memory
    monkeypatch.setattr(offload, "host_memory", lambda numbers, *how: sizes.append(numbers) or make(numbers, *how))
    model, batch = model_of(tiny_model(tmp_path, family), offload=True), batch_of(packing=True)
    inputs = [batch["input_ids"].numel() * 32] * len(base_causal_lm(model).base_model.layers)  # no positions, no masks
    hidden = hidden_states(model, **forward_args(batch))
    assert sizes == inputs
    hidden.sum().backward()
    assert sizes == inputs


@pytest.mark.parametrize("family, options", [
    ("llama", {}), ("gemma2", {}), ("phi3", {}), ("qwen2", {"quant": "nf4", "offload": True})], ids=str)
def test_an_mlp_by_pieces_has_the_same_loss_and_gradient(tmp_path, pieces, family, options):
    folder, batch = tiny_model(tmp_path, family), batch_of(packing=True)
    want = step(model_of(folder, **options), batch)
    pieces(PIECE)
    model = model_of(folder, **options)
    assert_same(step(model, batch), want, 3e-6)
    with inference(model):
        hidden = hidden_states(model, **forward_args(batch)).flatten(0, 1)[batch["target"] != -100]
    assert (hidden.double() - want[0]).norm() <= 3e-6 * want[0].norm()


def test_pieces_err_no_more_than_the_whole(tmp_path, pieces):
    folder, batch = tiny_model(tmp_path, "llama"), batch_of(packing=True)
    hidden, exact = step(model_of(folder).double(), batch)
    errors = []
    for rows in (nodes.PIECE, PIECE):
        pieces(rows)
        got, grads = step(model_of(folder), batch)
        errors.append((sum((grads[n] - g).norm() ** 2 for n, g in exact.items()) ** 0.5, (got - hidden).norm()))
    assert all(one <= 1.2 * whole for whole, one in zip(*errors, strict=True)), errors


def test_dropout_of_pieces_is_drawn_again_as_it_was(tmp_path, pieces):
    """Against GatedMLP over each piece in turn, which keeps what it drew."""
    model = model_of(tiny_model(tmp_path, "qwen3"), lora_dropout=0.3)
    layer = base_causal_lm(model).fused_layers.layers[0]
    model.train()
    pieces(PIECE)
    x, params = torch.randn(100, 32), (*layer.gate_up.params, *layer.down.params)
    found = []
    for run in (lambda x: nodes.MLPForward.apply(nodes.MLPBackward.apply(x, layer, *params), layer),
                lambda x: torch.cat([nodes.GatedMLP.apply(part, layer, *params) for [part] in nodes.pieces_of(x)])):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        torch.rand(3)  # others draw in between
        found.append((y, *torch.autograd.grad((y * x.sin()).sum(), (leaf, *params))))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_nothing_as_wide_as_the_mlp_is_there_as_a_whole(tmp_path, monkeypatch, pieces):
    """And a layer that is computed again does not compute its MLP before the backward pass of that does."""
    model, batch, shapes, rows = model_of(tiny_model(tmp_path, "llama")), batch_of(packing=True), [], []
    layers = base_causal_lm(model).fused_layers.layers
    wide, forward = layers[0].down.bases[0].in_features, nodes.GatedMLP.forward

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            shapes.extend(each.shape for each in tree_leaves(out) if isinstance(each, torch.Tensor))
            return out
    pieces(PIECE)
    monkeypatch.setattr(nodes.GatedMLP, "forward", staticmethod(lambda ctx, x, *args: (
        rows.append(len(x)), forward(ctx, x, *args))[1]))
    with Shapes():
        step(model, batch)
    tokens = batch["input_ids"].numel()
    assert max(rows) <= PIECE and sum(rows) == 2 * len(layers) * tokens
    assert (tokens, 2 * wide) not in set(map(tuple, shapes))


@pytest.mark.parametrize("options", [{"gradient_checkpointing": False}, {"compile": True}])
def test_offload_alone_is_refused(tiny_dir, options):
    with pytest.raises(UserError, match="offload=true moves what gradient checkpointing keeps"):
        model_of(tiny_dir, offload=True, **options)
