"""The elementwise work of a decoder layer against float64 autograd of the plain formulas: in torch, and in Triton under
its interpreter, for which this file runs itself again in a process of its own.

Sizes are odd on purpose, and rows lie apart in wider buffers. In 16 bits the yardstick is what transformers' own layers
lose against float64 in that dtype.
"""

import pytest
import torch
from interpreter import assert_passes_under_interpreter

from minimath.kernels import elementwise, reference
from minimath.kernels.common import INTERPRET

ACTS = ("silu", "gelu_tanh")
torch_alone = pytest.mark.skipif(INTERPRET, reason="the interpreter truncates to bf16 where hardware rounds")


def drawn(*shape, dtype=torch.float32, seed=0, apart=0):
    """Numbers of several sizes; apart: as a slice of a buffer that is so many columns wider, nan outside."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=draw, dtype=torch.float64) * 2
    wide = torch.full((shape[0], values[0].numel() + apart), torch.nan, dtype=dtype)
    part = wide[:, apart // 2:apart // 2 + values[0].numel()].view(shape)
    return part.copy_(values)


def tables(rows, size, dtype=torch.float32):
    angle = torch.outer(torch.arange(rows) * 1.7, 0.3 ** torch.arange(size // 2)).repeat(1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def exact(formula, x, dy, *others):
    """(formula(x, ...), its gradient in x for dy) in float64."""
    x = x.detach().double().requires_grad_()
    y = formula(x, *(each.double() if torch.is_tensor(each) else each for each in others))
    return y.detach(), torch.autograd.grad(y, x, dy.double())[0]


def close(got, want, dtype=torch.float32):
    assert got.dtype == dtype and got.shape == want.shape
    size = want.abs().amax(-1, keepdim=True)
    # twice the rounding of a result, as the interpreter truncates
    assert ((got.double() - want).abs() <= torch.finfo(dtype).eps * (want.abs() + 1e-3 * size) + 8e-7 * size).all()


def no_worse(ours, theirs, want):
    """Each number as close to float64 as theirs, but for a unit in the last place of its row; all of them together."""
    mine, other = (ours.double() - want).abs(), (theirs.double() - want).abs()
    slack = torch.finfo(ours.dtype).eps * want.abs().amax(-1, keepdim=True)
    assert ours.dtype == theirs.dtype and (mine <= other + slack).all()
    assert mine.norm() <= 1.02 * other.norm() and mine.max() <= 1.5 * other.max()


NORMS = [((5, 576), 0), ((3, 1536), 64), ((7, 19), 3), ((4, 3, 64), 128), ((6, 5, 24), 10), ((2, 1, 4864), 0),
         ((1, 8192), 0), ((33, 5), 0)]


@pytest.mark.parametrize("shape, apart", NORMS)
@pytest.mark.parametrize("offset", [0, 1])
def test_norm_and_its_gradient(shape, apart, offset):
    x, dy = drawn(*shape, apart=apart), drawn(*shape, seed=1, apart=2 * apart)
    weight, residual = drawn(1, shape[-1], seed=2)[0], drawn(*shape, seed=3, apart=apart)
    want, grad = exact(reference.rms_norm, x, dy, weight, 1e-5, offset)
    y, r = elementwise.rms_norm(x, weight, 1e-5, offset)
    close(y, want)
    close(r.expand(shape), (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt().expand(shape))
    close(elementwise.apply_norm(x, weight, r, offset), want)
    close(elementwise.rms_norm_backward(dy, x, weight, r, offset), grad)
    close(elementwise.rms_norm_backward(dy, x, weight, r, offset, residual), grad + residual.double())


@pytest.mark.parametrize("shape, part, apart", [((5, 3, 64), 64, 64), ((7, 4, 96), 96, 32), ((3, 5, 80), 32, 0),
                                                ((1, 1, 6), 2, 3), ((300, 1, 8), 8, 0)])
@pytest.mark.parametrize("back", [False, True])
def test_rotation_in_place(shape, part, apart, back):
    x, dy = drawn(*shape, apart=apart), drawn(*shape, seed=1)
    table = tables(shape[0], part)
    turned, gradient = exact(reference.rotated, x, dy, *table)
    buffer = torch.cat((torch.full((shape[0], apart + 1), torch.nan), (dy if back else x).flatten(1)), 1)
    elementwise.rotate(buffer[:, apart + 1:].view(shape), *table, back=back)
    close(buffer[:, apart + 1:].view(shape), gradient if back else turned)
    assert buffer[:, :apart + 1].isnan().all()


@pytest.mark.parametrize("rows, width, apart", [(5, 1536, 64), (3, 4864, 0), (7, 19, 3), (1, 1, 0)])
@pytest.mark.parametrize("act", ACTS)
def test_gate_and_its_gradient(rows, width, apart, act):
    gate_up, dh = drawn(rows, 2 * width, apart=apart), drawn(rows, width, seed=1, apart=apart)
    want, grad = exact(reference.gated, gate_up, dh, act)
    close(elementwise.gated(gate_up, act), want)
    for got, right in zip(elementwise.gated_backward(dh, gate_up, act), (grad, want), strict=True):
        close(got, right)


@pytest.mark.parametrize("act", ACTS)
def test_gate_far_from_zero_is_finite(act):
    a = torch.tensor([-1e4, -200.0, -90.0, -20.0, 0.0, 20.0, 90.0, 200.0, 1e4])
    gate_up = torch.cat((a, torch.ones(9)))[None]
    grad, h = elementwise.gated_backward(torch.ones(1, 9), gate_up, act)
    torch.testing.assert_close(h[0], a.clamp(min=0), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(grad[0, :9], (a > 0) + 0.5 * (a == 0), atol=1e-6, rtol=1e-6)


def test_no_rows():
    x, weight = torch.empty(0, 3, 8), torch.ones(8)
    y, r = elementwise.rms_norm(x, weight, 1e-6, 0)
    assert y.shape == (0, 3, 8) and elementwise.rms_norm_backward(y, x, weight, r, 0).shape == (0, 3, 8)
    elementwise.rotate(x, torch.empty(0, 8), torch.empty(0, 8))
    assert elementwise.gated_backward(torch.empty(0, 4), torch.empty(0, 8), "silu")[0].shape == (0, 8)


def test_an_expanded_gradient_and_a_batch_of_sequences():
    x, weight = drawn(2, 3, 20), drawn(1, 20, seed=2)[0]
    dy = torch.full((1, 1, 1), 0.7).expand(2, 3, 20)
    y, r = elementwise.rms_norm(x.transpose(0, 1), weight, 1e-6, 1)
    want, grad = exact(reference.rms_norm, x, dy, weight, 1e-6, 1)
    close(y.transpose(0, 1), want)
    close(elementwise.rms_norm_backward(dy, x, weight, r.transpose(0, 1), 1), grad)


@pytest.mark.skipif(not INTERPRET, reason="torch rounds where transformers does")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_results_of_triton_are_rounded_once(dtype):
    half = {"dtype": dtype}
    x, dy, weight = drawn(5, 72, **half), drawn(5, 72, seed=1, **half), drawn(1, 72, seed=2, **half)[0]
    want, grad = exact(reference.rms_norm, x, dy, weight, 1e-6, 0)
    y, r = elementwise.rms_norm(x, weight, 1e-6, 0)
    close(y, want, dtype)
    close(elementwise.rms_norm_backward(dy, x, weight, r, 0, dy), grad + dy.double(), dtype)
    for act in ACTS:
        want, grad = exact(reference.gated, x, dy[:, :36], act)
        for got, right in zip(elementwise.gated_backward(dy[:, :36], x, act), (grad, want), strict=True):
            close(got, right, dtype)
    table = tables(5, 24, dtype)
    want, _ = exact(reference.rotated, x.view(5, 3, 24), dy.view(5, 3, 24), *table)
    elementwise.rotate(x.view(5, 3, 24), *table)
    close(x.view(5, 3, 24), want, dtype)


@torch_alone
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("with_residual", [False, True])
def test_bf16_norm_loses_no_more_than_transformers(offset, with_residual):
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, dy, residual = (drawn(61, 576, dtype=torch.bfloat16, seed=seed, apart=64) for seed in (0, 1, 2))
    norm = (Gemma2RMSNorm if offset else LlamaRMSNorm)(576, eps=1e-6).bfloat16().requires_grad_(False)
    norm.weight.copy_(1 - offset + 0.3 * drawn(1, 576, seed=3)[0])
    want, grad = exact(reference.rms_norm, x, dy, norm.weight, 1e-6, offset)
    leaf = x.detach().clone().requires_grad_()
    theirs = norm(leaf)
    (their_grad,) = torch.autograd.grad(theirs, leaf, dy)
    y, r = elementwise.rms_norm(x, norm.weight, 1e-6, offset)
    no_worse(y, theirs.detach(), want)
    assert torch.equal(elementwise.apply_norm(x, norm.weight, r, offset), y)
    if with_residual:
        grad, their_grad = grad + residual.double(), their_grad + residual
    ours = elementwise.rms_norm_backward(dy, x, norm.weight, r, offset, residual if with_residual else None)
    no_worse(ours, their_grad, grad)


@torch_alone
@pytest.mark.parametrize("part", [64, 32])
def test_bf16_rotation_loses_no_more_than_transformers(part):
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

    x, dy = (drawn(61, 5, 64, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    table = tables(61, part, torch.bfloat16)
    want, grad = exact(reference.rotated, x, dy, *table)
    leaf = x.detach().clone().requires_grad_()
    theirs, _ = apply_rotary_pos_emb(leaf, leaf, *table)
    (their_grad,) = torch.autograd.grad(theirs, leaf, dy)
    elementwise.rotate(x, *table)
    elementwise.rotate(dy, *table, back=True)
    no_worse(x, theirs.detach(), want)
    no_worse(dy, their_grad, grad)


@torch_alone
@pytest.mark.parametrize("act", ACTS)
def test_bf16_gate_loses_no_more_than_transformers(act):
    from transformers.activations import ACT2FN

    gate_up = drawn(61, 2 * 391, dtype=torch.bfloat16, apart=2)
    dh = drawn(61, 391, dtype=torch.bfloat16, seed=1)
    want, grad = exact(reference.gated, gate_up, dh, act)
    leaf = gate_up.detach().clone().requires_grad_()
    a, u = leaf.chunk(2, -1)
    theirs = ACT2FN[{"gelu_tanh": "gelu_pytorch_tanh"}.get(act, act)](a) * u
    (their_grad,) = torch.autograd.grad(theirs, leaf, dh)
    got, h = elementwise.gated_backward(dh, gate_up, act)
    no_worse(h, theirs.detach(), want)
    assert torch.equal(elementwise.gated(gate_up, act), h)
    for mine, other, right in zip(got.chunk(2, -1), their_grad.chunk(2, -1), grad.chunk(2, -1), strict=True):
        no_worse(mine, other, right)


@torch_alone
def test_the_same_in_triton_under_its_interpreter():
    assert_passes_under_interpreter(__file__, 40)
