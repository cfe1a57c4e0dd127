"""How decoding reads W, by rows and memory: a copy, 4 bits or dequantised. The kernel of a card is faked."""
from collections import Counter
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from tiny import tiny_model
from toy import load, wake_adapter

from minimath.models import linears
from minimath.models.decoding import decoding_linears
from minimath.models.forward import base_causal_lm, hidden_states, inference
from minimath.models.fused import fused_layers
from minimath.models.linears import COPIED, DEQUANTISED, FUSED, IN_PLACE, LinearGroup, most_fused_rows

MOST = 4  # rows that the faked card multiplies by 4 bits


@pytest.fixture(params=["llama", "qwen2", "granite"])  # fused; with biases; layers of transformers
def model(request, tmp_path, monkeypatch):
    """An NF4 model on a card as far as its linear layers can tell; `product_rows`: of the faked kernel's calls."""
    rows = []

    def product(x, packed, quant_state, bias=None):
        rows.append(len(x))
        weight = bitsandbytes.functional.dequantize_4bit(packed.reshape(-1, 1), quant_state)
        return torch.nn.functional.linear(x, weight, bias)
    monkeypatch.setattr(linears, "most_fused_rows", lambda bases, dtype: MOST if linears.is_4bit(bases[0]) else 0)
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", product)
    model, _ = load(tiny_model(tmp_path, request.param), train=True, quant="nf4")
    wake_adapter(model)
    model.product_rows = rows
    return model


@pytest.mark.parametrize("rows, copy, ways", [
    (MOST, True, {FUSED}), (MOST + 1, True, {COPIED}), (MOST + 1, False, {DEQUANTISED}), (1, False, {FUSED})])
def test_rows_and_memory_choose_and_numbers_stay(model, rows, copy, ways):
    ids = torch.arange(5, 5 + rows)[:, None]  # one token each, as in a decode step
    with inference(model):
        wanted = hidden_states(model, ids)
        with decoding_linears(model, copy=copy, rows=rows):
            model.product_rows.clear()
            got = hidden_states(model, ids)
            assert set(base_causal_lm(model).linear_ways) == ways
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        assert set(model.product_rows) == ({rows} if FUSED in ways else set())


def test_the_last_rows_of_a_rollout_read_4_bits_though_there_is_a_copy(model):
    with inference(model), decoding_linears(model, copy=True, rows=9):
        for rows in (9, 5, 4, 1):
            hidden_states(model, torch.arange(5, 5 + rows)[:, None])
    ran = base_causal_lm(model).linear_ways
    assert set(ran) == {COPIED, FUSED} and ran[COPIED] == ran[FUSED]


def test_memory_for_half_of_the_layers_copies_those(model):
    if not (fused := fused_layers(base_causal_lm(model))):
        pytest.skip("its groups are made for each rollout")
    groups = [group for layer in fused.layers for group in layer.groups]
    sizes = [4 * group.width * group.bases[0].in_features for group in groups]
    with inference(model), decoding_linears(model, copy=sum(sizes) // 2, rows=9):
        hidden_states(model, torch.arange(5, 14)[:, None])
        copied = [size for size, group in zip(sizes, groups, strict=True) if group.product]
        assert 0 < sum(copied) <= sum(sizes) // 2 and sum(sizes) // 2 - sum(copied) < max(sizes)
        assert base_causal_lm(model).linear_ways == Counter({COPIED: len(copied),
                                                             DEQUANTISED: len(groups) - len(copied)})


def test_training_dequantises_whatever_ran_before(model):
    def gradient():
        model.zero_grad()
        hidden_states(model, torch.arange(5, 8)[None]).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]
    before = gradient()
    with inference(model), decoding_linears(model, copy=True, rows=2):
        hidden_states(model, torch.arange(5, 7)[:, None])
    model.product_rows.clear()
    after = gradient()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if fused_layers(base_causal_lm(model)):  # else peft's layers call bitsandbytes themselves
        assert not model.product_rows


def on_a_card(in_features: int = 128):
    state = SimpleNamespace(blocksize=64)
    return SimpleNamespace(weight=SimpleNamespace(is_cuda=True, quant_state=state), in_features=in_features)


def test_how_many_rows_bitsandbytes_multiplies_by_4_bits(monkeypatch):
    assert most_fused_rows([on_a_card(), on_a_card()], torch.bfloat16) == 4
    assert most_fused_rows([on_a_card(), on_a_card(96)], torch.bfloat16) == 0  # a block crosses the rows of W
    assert most_fused_rows([torch.nn.Linear(2, 2)], torch.float32) == 0
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert most_fused_rows([on_a_card()], torch.float32) == 2


def test_plain_weights_are_copied_where_there_is_room_and_else_read_in_place():
    group = LinearGroup([torch.nn.Linear(8, 4).requires_grad_(False)], torch.float32)
    assert [group.choose(1, room) for room in (128, 127)] == [COPIED, IN_PLACE]
