"""linear_kl on the CPU against the float64 reference; interpret_kernels.py runs most of it again, on Triton's path."""

import functools

import pytest
import torch
from test_kernels import HEADS, LargestStorage, problem
from torch.nn import functional

from minimath.kernels import linear_kl, reference
from minimath.kernels.common import BLOCK_BYTES

N, D, V = 37, 19, 203
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Between the two paths: how far a 16-bit result may be from float64 of the same inputs.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 1.6e-2}


def pair(dtype, *, far=0.3, **sizes):
    """hidden (n, d) that requires grad; teacher_hidden, `far` times as large a step away; weight, bias or None."""
    hidden, weight, bias, _ = problem(dtype, **{"n": N, "d": D, "v": V, "ignored": ()} | sizes)
    step = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    teacher = (hidden.detach().double() + far * step).to(dtype)
    return hidden, teacher, weight.detach(), None if bias is None else bias.detach()


def budget(hidden, columns: int = 64) -> int:
    """Workspace in which all rows take so many columns at a time."""
    return 2 * len(hidden) * columns * hidden.element_size()


def exact(hidden, teacher, weight, bias, **head):
    """KL in float64 and the gradient of its sum in hidden."""
    leaf = hidden.detach().double().requires_grad_()
    kl = reference.linear_kl(leaf, teacher.double(), weight.double(), bias=None if bias is None else bias.double(),
                             **head)
    return kl.detach(), torch.autograd.grad(kl.sum(), leaf)[0]


def torch_kl(hidden, teacher, weight, *, bias=None, temperature=1.0, softcap=0.0, logit_scale=1.0):
    """What a user of torch writes: logits in the dtype of the inputs, log-softmax in fp32."""
    logits = [functional.linear(each, weight, bias) * logit_scale for each in (hidden, teacher)]
    logits = [softcap * torch.tanh(each / softcap) if softcap else each for each in logits]
    log_p, log_q = (torch.log_softmax(each.float() / temperature, -1) for each in logits)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def with_gradient(function, hidden, *others, **options):
    kl = function(hidden, *others, **options)
    return kl.detach().double(), torch.autograd.grad(kl.sum(), hidden)[0].double()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("far", [0.3, 3.0])
def test_value_and_gradient_equal_autograd_of_full_logits(head, bias, far):
    hidden, teacher, weight, b = pair(torch.float64, far=far, bias=bias)
    mix = torch.randn(N, dtype=torch.float64)
    kl = linear_kl(hidden, teacher, weight, bias=b, workspace_bytes=2 * 8 * 64 * 20, **HEADS[head])
    want = reference.linear_kl(hidden, teacher, weight, bias=b, **HEADS[head])
    torch.testing.assert_close(kl, want, rtol=1e-11, atol=1e-11)
    got, right = (torch.autograd.grad((mix * each).sum(), hidden)[0] for each in (kl, want))
    torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("head", HEADS)
def test_gradcheck(head):
    hidden, teacher, weight, bias = pair(torch.float64, n=4, d=3, v=33)
    run = functools.partial(linear_kl, bias=bias, workspace_bytes=2 * 8 * 16 * 3, **HEADS[head])
    assert torch.autograd.gradcheck(lambda hidden: run(hidden, teacher, weight), hidden)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("far", [3.0, 1.0, 0.3, 3e-3])
def test_error_in_each_dtype_is_no_larger_than_that_of_torch(dtype, head, far):
    inputs = pair(dtype, n=61, d=70, v=1009, far=far)
    want = exact(*inputs, **HEADS[head])
    options = {"bias": inputs[-1], **HEADS[head]}
    ours = with_gradient(linear_kl, *inputs[:3], workspace_bytes=1 << 16, **options)
    theirs = with_gradient(torch_kl, *inputs[:3], **options)
    room = 1.1 if far <= 1 else 1.5  # a difference larger than either is rounded more than either, at 10 to 50 nats
    for mine, other, right in zip(ours, theirs, want):
        scale = right.abs().max()
        mean_error, worst_error = ((mine - right).abs() / scale).mean(), ((mine - right).abs() / scale).max()
        assert mean_error <= room * ((other - right).abs() / scale).mean() + 1e-6
        assert worst_error <= 1.5 * ((other - right).abs() / scale).max() + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("far", [0.3, 3e-3])
def test_a_kl_near_0_keeps_its_digits(dtype, head, far):
    """Of single rows of 1e-5 nats and less too, where logits rounded apart are off by many times the KL."""
    inputs = pair(dtype, far=far, n=9)
    kl, grad = with_gradient(linear_kl, *inputs[:3], bias=inputs[-1], workspace_bytes=budget(inputs[0]), **HEADS[head])
    want, right = exact(*inputs, **HEADS[head])
    # fp32's exp(-x) - 1 + x is off by its rounding of x, and x is as large as the root of the KL
    assert ((kl - want).abs() <= 5 * TOLERANCE[dtype] * want + 2e-7 * want.sqrt()).all()
    assert (grad - right).norm() <= TOLERANCE[dtype] * right.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", ["plain", "all"])
def test_equal_rows_give_0_and_a_gradient_of_0(dtype, head):
    hidden, _, weight, bias = pair(dtype, n=9)
    kl, grad = with_gradient(linear_kl, hidden, hidden.detach().clone(), weight, bias=bias, **HEADS[head])
    assert not kl.any() and not grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_peaked_student_and_logits_in_the_hundreds(dtype):
    """Of some rows the KL is above 88 nats, where exp of it is over fp32."""
    hidden, teacher, weight, bias = pair(dtype, n=9, far=1.0)
    hidden, teacher = (hidden.detach() * 40).requires_grad_(), teacher * 40
    kl, grad = with_gradient(linear_kl, hidden, teacher, weight, bias=bias, workspace_bytes=budget(hidden))
    want, right = exact(hidden, teacher, weight, bias)
    assert want.max() > 88 and kl.isfinite().all() and (kl >= 0).all()
    theirs = with_gradient(torch_kl, hidden, teacher, weight, bias=bias)
    for mine, other, exactly in zip((kl, grad), theirs, (want, right)):
        assert (mine - exactly).norm() <= 1.5 * (other - exactly).norm() + TOLERANCE[dtype] * exactly.norm()


def test_a_gradient_of_fp16_survives_a_flat_distribution_and_a_small_difference():
    """exp(z - m) x is below fp16's smallest number there: the tile holds it in units of its largest."""
    hidden, teacher, weight, _ = pair(torch.float16, n=3, d=8, v=20_000, far=1e-3, bias=False)
    hidden, teacher = (hidden.detach() * 1e-2).requires_grad_(), teacher * 1e-2
    _, grad = with_gradient(linear_kl, hidden, teacher, weight + 2)
    _, right = exact(hidden, teacher, weight + 2, None)
    assert (grad - right).norm() <= 1e-2 * right.norm()


@pytest.mark.parametrize("n", [0, 1])
def test_no_row_and_one_row(n):
    hidden, teacher, weight, bias = pair(torch.float64, n=n)
    kl, grad = with_gradient(linear_kl, hidden, teacher, weight, bias=bias)
    torch.testing.assert_close((kl, grad), exact(hidden, teacher, weight, bias))
    assert kl.shape == (n,) and grad.shape == hidden.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_twice_and_with_or_without_a_gradient(dtype):
    hidden, teacher, weight, bias = pair(dtype, n=5)
    half = budget(hidden) // 2
    run = functools.partial(linear_kl, teacher_hidden=teacher, weight=weight, bias=bias, workspace_bytes=half)
    first, again = (with_gradient(run, hidden) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    with torch.no_grad():
        assert torch.equal(run(hidden).double(), first[0]) and not run(hidden).requires_grad


def test_an_incoming_gradient_scales_rows_and_autocast_runs_in_its_dtype():
    hidden, teacher, weight, bias = pair(torch.float32)
    _, grad = with_gradient(linear_kl, hidden, teacher, weight, bias=bias)
    mix = torch.arange(N, dtype=torch.float32)
    (got,) = torch.autograd.grad((linear_kl(hidden, teacher, weight, bias=bias) * mix).sum(), hidden)
    torch.testing.assert_close(got.double(), grad * mix[:, None])
    low = [each.detach().bfloat16() for each in (hidden, teacher, weight, bias)]
    want, right = with_gradient(linear_kl, low[0].requires_grad_(), *low[1:3], bias=low[3])
    with torch.autocast("cpu", torch.bfloat16):
        kl, grad = with_gradient(linear_kl, hidden, teacher, weight, bias=bias)
    assert torch.equal(kl, want) and torch.equal(grad, right)


def test_no_pull_without_a_gradient_and_nothing_of_size_tokens_times_vocab():
    n, v, workspace = 1024, 4099, 1 << 20
    for dtype in (torch.float32, torch.bfloat16):
        hidden, teacher, weight, bias = pair(dtype, n=n, d=16, v=v)
        with LargestStorage(hidden, teacher, weight, bias) as used:
            linear_kl(hidden, teacher, weight, bias=bias, softcap=5.0, workspace_bytes=workspace).sum().backward()
        most = max(workspace, 4 * BLOCK_BYTES)  # both tiles of a chunk, scratch of a block
        assert 0 < used.bytes <= most < n * v * hidden.element_size() * 1.01, (used.bytes, used.operation)
    wide = torch.zeros(2, 50_000)
    with torch.no_grad(), LargestStorage(wide, weight := torch.zeros(20, 50_000)) as used:
        linear_kl(wide, wide, weight)
    assert used.bytes <= 2 * wide.numel() * 4  # the pair itself, no sum of its size beside other things
    assert weight.grad is None


@pytest.mark.parametrize("name", ["teacher_hidden", "weight", "bias"])
def test_what_is_frozen_must_not_require_grad(name):
    given = dict(zip(("hidden", "teacher_hidden", "weight", "bias"), pair(torch.float32)))
    given[name] = given[name].clone().requires_grad_()
    with pytest.raises(ValueError, match=rf"{name}\.detach"):
        linear_kl(**given)
    with torch.no_grad():
        assert linear_kl(**given).shape == (N,)


@pytest.mark.parametrize("change, message", [({"teacher_hidden": torch.zeros(N, D + 1)}, "teacher_hidden must be"),
                                             ({"teacher_hidden": torch.zeros(N, D).long()}, "floating point"),
                                             ({"weight": torch.zeros(V, D + 1)}, "sizes differ"),
                                             ({"hidden": torch.zeros(N)}, "expected hidden"),
                                             ({"temperature": 0.0}, "temperature")])
def test_bad_arguments_raise_a_value_error_that_names_them(change, message):
    given = {"hidden": torch.zeros(N, D), "teacher_hidden": torch.zeros(N, D), "weight": torch.zeros(V, D)}
    with pytest.raises(ValueError, match=message):
        linear_kl(**given | change)
