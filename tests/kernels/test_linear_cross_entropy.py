"""linear_cross_entropy against torch's function of that name and against cross_entropy of full logits."""

import pytest
import torch
import torch.nn.functional as F

from minimath.kernels import linear_cross_entropy

N, D, V = 23, 17, 101


def problem(dtype=torch.float64, *, ignored=(2, 11)):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    head = (0.6 * torch.randn(V, D, generator=draw, dtype=torch.float64)).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    class_weight = torch.rand(V, generator=draw, dtype=torch.float64).to(dtype)
    target = torch.randint(0, V, (N,), generator=draw)
    target[list(ignored)] = -100
    return hidden, head, bias, class_weight, target


def full(hidden, head, target, *, linear_bias=None, **options):
    return F.cross_entropy(F.linear(hidden, head, linear_bias), target, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("extra", ["nothing", "bias", "class weight", "label smoothing"])
def test_loss_and_gradients_equal_cross_entropy_of_full_logits(reduction, extra):
    hidden, head, bias, class_weight, target = problem()
    options = {
        "nothing": {},
        "bias": {"linear_bias": bias},
        "class weight": {"weight": class_weight},
        "label smoothing": {"label_smoothing": 0.1},
    }[extra] | {"reduction": reduction}
    got, want = linear_cross_entropy(hidden, head, target, **options), full(hidden, head, target, **options)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    inputs = (hidden, head, bias) if extra == "bias" else (hidden, head)
    mix = torch.linspace(0.5, 2.0, got.numel(), dtype=torch.float64).reshape(got.shape)
    torch.testing.assert_close(
        torch.autograd.grad((mix * got).sum(), inputs),
        torch.autograd.grad((mix * want).sum(), inputs),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="came with torch 2.13")
def test_a_call_of_torchs_function_works_unchanged():
    hidden, head, bias, class_weight, target = problem(torch.float32)
    for call in (
        lambda f: f(hidden, head, target),
        lambda f: f(hidden, head, target, linear_bias=bias, reduction="sum", ignore_index=None),
        lambda f: f(hidden, head, target, weight=class_weight, ignore_index=-100),
        lambda f: f(hidden[3], head, target[3], label_smoothing=0.2),  # one row, a scalar target
    ):
        torch.testing.assert_close(call(linear_cross_entropy), call(F.linear_cross_entropy))


def test_another_ignore_index_and_leading_dimensions():
    hidden, head, _, _, target = problem(ignored=())
    target[5] = 0
    batch = hidden.detach()[:20].reshape(4, 5, D).requires_grad_()
    got = linear_cross_entropy(batch, head, target[:20].reshape(4, 5), ignore_index=0, reduction="none")
    want = full(hidden[:20], head, target[:20], ignore_index=0, reduction="none")
    assert got.shape == (4, 5) and got[1, 0] == 0
    torch.testing.assert_close(got.reshape(-1), want)
    mean = linear_cross_entropy(batch, head, target[:20].reshape(4, 5), ignore_index=0)
    torch.testing.assert_close(mean, full(hidden[:20], head, target[:20], ignore_index=0))


@pytest.mark.parametrize("reduction, want", [("mean", float("nan")), ("sum", 0.0)])
def test_no_target_that_counts_gives_what_torch_gives(reduction, want):
    hidden, head, _, _, target = problem()
    target.fill_(-100)
    got = linear_cross_entropy(hidden, head, target, reduction=reduction)
    torch.testing.assert_close(got, full(hidden, head, target, reduction=reduction), equal_nan=True)
    torch.testing.assert_close(got.item(), want, equal_nan=True)


def test_softcap_and_logit_scale_are_those_of_gemma_and_cohere():
    hidden, head, _, _, target = problem()
    logits = 5.0 * torch.tanh(0.3 * (hidden @ head.t()) / 5.0)
    got = linear_cross_entropy(hidden, head, target, softcap=5.0, logit_scale=0.3)
    torch.testing.assert_close(got, F.cross_entropy(logits, target))


def test_bf16_input_gives_an_fp32_loss_that_is_closer_than_torchs():
    hidden, head, _, _, target = problem(torch.bfloat16)
    exact = full(hidden.double(), head.double(), target)
    got = linear_cross_entropy(hidden, head, target)
    assert got.dtype == torch.float32
    assert abs(got - exact) <= abs(full(hidden, head, target) - exact)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"linear_weight": torch.zeros(V, 2, D)}, r"linear_weight must be \(V, D\)"),
        ({"target": torch.zeros(N, V)}, "class probabilities"),
        ({"target": torch.zeros(N - 1, dtype=torch.int64)}, "must agree"),
        ({"reduction": "avg"}, "one of mean, sum, none"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"label_smoothing": 0.1, "weight": torch.ones(V)}, "leave one of the two"),
        ({"weight": torch.ones(V + 1)}, r"weight must be \(101,\)"),
        ({"linear_bias": torch.ones(V + 1)}, "bias must be"),
        ({"target": torch.full((N,), V)}, "targets must be"),
        ({"target": torch.full((N,), V), "weight": torch.ones(V)}, "targets must be"),
    ],
)
def test_bad_arguments_raise_a_value_error_that_names_them(change, message):
    call = {"input": torch.zeros(N, D), "linear_weight": torch.zeros(V, D)}
    call |= {"target": torch.zeros(N, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**call)
