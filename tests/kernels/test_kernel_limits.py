"""Where fused losses go wrong in practice: real vocabularies, more than 2^31 logits, 16-bit gradients element by
element, torch.compile, gradient checkpointing, autocast, a new number of tokens in every batch."""

import pytest
import torch
from test_kernels import grpo, nll, problem
from torch.utils.checkpoint import checkpoint

from minimath.kernels import linear_cross_entropy, linear_logp, linear_token_loss, reference
from minimath.kernels.common import PAD, padded

VOCABULARIES = [49_152, 50_257, 128_256, 151_936, 152_064, 256_000]


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_real_vocabularies(vocab):
    hidden, weight, _, target = problem(torch.float32, n=9, d=16, v=vocab, bias=False, ignored=(4,))
    target[0], target[1] = vocab - 1, 0
    weight.requires_grad_(False)
    exact = hidden.detach().double().requires_grad_()
    want, want_stats = reference.linear_token_loss(exact, weight.double(), target, nll)
    loss, stats = linear_token_loss(hidden, weight, target, nll, workspace_bytes=4 * vocab * 4)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(stats.logp.double(), want_stats.logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear_logp(hidden, weight, target), stats.logp, rtol=1e-5, atol=1e-5)
    got, right = torch.autograd.grad(loss, hidden)[0], torch.autograd.grad(want, exact)[0]
    assert (got.double() - right).norm() <= 1e-5 * right.norm()


def test_more_than_two_to_the_31_logits():
    """The last row's logits start at element 2.2e9 of the (N, V) matrix that is never there."""
    n, vocab = 14_500, 151_936
    assert (n - 1) * vocab > 2**31
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 4, generator=draw).bfloat16()
    weight = torch.randn(vocab, 4, generator=draw).bfloat16()
    target = torch.randint(0, vocab, (n,), generator=draw)
    logp = linear_logp(hidden, weight, target)
    edge = [0, 2**31 // vocab, 2**31 // vocab + 1, n - 1]
    want = reference.linear_logp(hidden[edge].double(), weight.double(), target[edge])
    torch.testing.assert_close(logp[edge].double(), want, rtol=2e-2, atol=2e-2)
    assert logp.max() < 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_gradient_element_is_as_close_as_torchs(dtype):
    """Cut-cross-entropy's rule: |ours - f64| <= |torch in the same dtype - f64| + tolerance, element by element.
    The tolerance is one unit in the last place of the largest element of the row."""
    hidden, weight, _, target = problem(dtype, n=61, d=70, v=1009, bias=False, ignored=())
    exact = hidden.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(
        reference.linear_token_loss(exact, weight.detach().double(), target, nll)[0], exact
    )
    logits = hidden @ weight.t()
    (theirs,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(logits.float(), target, reduction="sum"), hidden
    )
    (ours,) = torch.autograd.grad(linear_token_loss(hidden, weight, target, nll)[0], hidden)
    largest = want.abs().amax(1, keepdim=True)
    tolerance = torch.finfo(dtype).eps * largest
    excess = (ours.double() - want).abs() - (theirs.double() - want).abs() - tolerance
    assert (excess <= 0).all(), f"{(excess > 0).sum()} of {excess.numel()} elements, worst {excess.max():.2e}"


class Backbone(torch.nn.Module):
    """Two linear layers, the second under gradient checkpointing if asked for."""

    def __init__(self, checkpointed: bool):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Linear(12, 19), torch.nn.Linear(19, 19)
        self.checkpointed = checkpointed

    def forward(self, x):
        x = torch.tanh(self.first(x))
        if self.checkpointed:
            return checkpoint(self.second, x, use_reentrant=False)
        return self.second(x)


def parameter_gradients(model, run) -> list[torch.Tensor]:
    model.zero_grad()
    run().backward()
    return [each.grad.clone() for each in model.parameters()]


def test_under_torch_compile_of_the_model_and_gradient_checkpointing():
    _, weight, _, target = problem(torch.float32, bias=False)
    weight.requires_grad_(False)
    x = torch.randn(len(target), 12, generator=torch.Generator().manual_seed(1))
    plain = Backbone(False)

    def loss_of(model):
        return linear_token_loss(model(x), weight, target, nll)[0]

    want = parameter_gradients(plain, lambda: loss_of(plain))
    recomputed = Backbone(True)
    torch.testing.assert_close(parameter_gradients(recomputed, lambda: loss_of(recomputed)), want)
    compiled = torch.compile(plain, backend="aot_eager")
    torch.testing.assert_close(parameter_gradients(plain, lambda: loss_of(compiled)), want)


def test_inside_a_compiled_function_and_inside_a_checkpoint():
    """A user may compile the whole step, loss included, or checkpoint over it: the sweep then runs as it is."""
    _, weight, _, target = problem(torch.float32, bias=False)
    weight.requires_grad_(False)
    x = torch.randn(len(target), 12, generator=torch.Generator().manual_seed(1))
    model = Backbone(False)

    def step(x):
        return linear_token_loss(model(x), weight, target, nll)[0] + linear_logp(model(x), weight, target).sum()

    want = parameter_gradients(model, lambda: step(x))
    compiled = torch.compile(step, backend="aot_eager")
    torch.testing.assert_close(parameter_gradients(model, lambda: compiled(x)), want)
    kept = parameter_gradients(model, lambda: checkpoint(step, x, use_reentrant=False))
    torch.testing.assert_close(kept, want)


def test_under_autocast_the_loss_of_a_model_trains_its_fp32_parameters():
    _, weight, _, target = problem(torch.float32, bias=False)
    weight.requires_grad_(False)
    x = torch.randn(len(target), 12, generator=torch.Generator().manual_seed(1))
    model = Backbone(False)
    want = parameter_gradients(model, lambda: linear_token_loss(model(x), weight, target, nll)[0])

    def under_autocast():
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = linear_token_loss(model(x), weight, target, nll)
        assert loss.dtype == torch.float32
        return loss

    got = parameter_gradients(model, under_autocast)
    assert all(each.dtype == torch.float32 for each in got)
    for mine, right in zip(got, want):
        assert (mine - right).norm() <= 0.02 * right.norm()


def test_an_expanded_or_flipped_hidden_is_accepted():
    hidden, weight, _, target = problem(torch.float32, bias=False, ignored=())
    for view in (hidden[:1].expand(len(target), -1), hidden.flip(0), hidden.t().contiguous().t()):
        loss, _ = linear_token_loss(view, weight, target, grpo)
        want, _ = linear_token_loss(view.contiguous(), weight, target, grpo)
        assert torch.equal(loss, want)
        assert torch.equal(*(torch.autograd.grad(each, hidden)[0] for each in (loss, want)))
        torch.testing.assert_close(
            linear_cross_entropy(view, weight, target), linear_cross_entropy(view.contiguous(), weight, target)
        )


def test_nothing_that_follows_the_number_of_tokens_makes_triton_compile_again():
    triton = pytest.importorskip("triton")
    from importlib import import_module

    followers = {
        "linear_logp.logp_kernel": {"rows", "out_stride"},
        "tile_triton.tile_kernel": {"sums_stride", "first", "columns"},
        "tile_triton.gradient_kernel": {"numbers_stride", "first", "columns"},
        "tile_triton.pull_kernel": set(),
        "linear_kl.kl_kernel": {"sums_stride", "columns"},
        "linear_kl.kl_pull_kernel": {"sums_stride"},
    }
    for name, arguments in followers.items():
        module, kernel = name.split(".")
        kernel = getattr(import_module(f"minimath.kernels.{module}"), kernel)
        assert isinstance(kernel, triton.runtime.KernelInterface)
        if hasattr(kernel, "params"):  # the interpreter's stand-in has none
            assert {each.name for each in kernel.params if each.do_not_specialize} == arguments


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_a_padded_row_starts_at_16_bytes(vocab):
    assert padded(vocab) % PAD == 0 and 0 <= padded(vocab) - vocab < PAD
