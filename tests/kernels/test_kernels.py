"""linear_logp and linear_token_loss on the CPU against the float64 reference.

The shapes are odd on purpose: no size is a multiple of a chunk, a block or another size.
"""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minimath.kernels import TokenStats, linear_logp, linear_token_loss, reference
from minimath.kernels.common import BLOCK_BYTES, PAD, equal_parts, tile_shape

N, D, V = 37, 19, 203
HEADS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 5.0},
    "all": {"temperature": 1.3, "softcap": 7.0, "logit_scale": 0.6},
}


def problem(dtype=torch.float64, *, n=N, d=D, v=V, bias=True, seed=0, ignored=(3, 17)):
    """hidden (n, d), weight (v, d), bias (v,) or None, all requiring grad, and target (n,)."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=draw, dtype=torch.float64) * 0.6).to(dtype).requires_grad_()
    shift = torch.randn(v, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    target = torch.randint(0, v, (n,), generator=draw)
    target[[row for row in ignored if row < n]] = -100
    return hidden, weight, shift, target


def nll(stats, rows):
    return -stats.logp


def smoothed_nll_with_z_loss(stats, rows):
    return -0.9 * stats.logp - 0.1 * stats.mean_logp + 1e-2 * stats.lse.square()


def grpo(stats, rows):
    """Ratio, clip, k3 KL and entropy bonus, with per-row constants found through `rows`."""
    draw = torch.Generator().manual_seed(7)
    dtype = stats.logp.dtype
    old = (-4.0 + torch.randn(N, generator=draw)).to(dtype)[rows]
    ref = (-4.0 + torch.randn(N, generator=draw)).to(dtype)[rows]
    advantage = torch.randn(N, generator=draw).to(dtype)[rows]
    ratio = torch.exp((stats.logp - old).clamp(max=3.0))
    policy = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
    gap = (ref - stats.logp).clamp(max=3.0)
    return (policy + 0.04 * (torch.exp(gap) - gap - 1) - 0.01 * stats.entropy) / 23.0


LOSSES = {"nll": nll, "smoothed": smoothed_nll_with_z_loss, "grpo": grpo}


def gradients(operation, inputs):
    wanted = [each for each in inputs if each is not None]
    return torch.autograd.grad(operation, wanted)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss_name", LOSSES)
def test_loss_stats_and_every_gradient_equal_autograd_of_full_logits(head, loss_name):
    hidden, weight, bias, target = problem()
    loss_fn, options = LOSSES[loss_name], HEADS[head]
    loss, stats = linear_token_loss(
        hidden, weight, target, loss_fn, bias=bias, workspace_bytes=V * 8 * 7, **options
    )
    want, want_stats = reference.linear_token_loss(hidden, weight, target, loss_fn, bias=bias, **options)
    torch.testing.assert_close(loss, want, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(stats, want_stats, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        gradients(loss, (hidden, weight, bias)),
        gradients(want, (hidden, weight, bias)),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize("head", HEADS)
def test_linear_logp_stats_and_gradients_equal_autograd_of_full_logits(head):
    hidden, weight, bias, target = problem()
    options = HEADS[head]
    got = linear_logp(
        hidden, weight, target, bias=bias, return_stats=True, workspace_bytes=V * 8 * 5, **options
    )
    want = reference.linear_logp(hidden, weight, target, bias=bias, return_stats=True, **options)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    mix = torch.randn(4, N, dtype=torch.float64)
    kept = target != -100
    total = sum((part * each)[kept].sum() for part, each in zip(mix, got))
    want_total = sum((part * each)[kept].sum() for part, each in zip(mix, want))
    torch.testing.assert_close(
        gradients(total, (hidden, weight, bias)),
        gradients(want_total, (hidden, weight, bias)),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize("head", HEADS)
def test_reference_and_linear_logp_pass_gradcheck(head):
    hidden, weight, bias, target = problem(n=4, d=3, v=7, ignored=(1,))
    kept = target != -100

    def run(operation, hidden, weight, bias):
        return tuple(
            each[kept]
            for each in operation(hidden, weight, target, bias=bias, return_stats=True, **HEADS[head])
        )

    for operation in (reference.linear_logp, linear_logp):
        assert torch.autograd.gradcheck(functools.partial(run, operation), (hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS)
def test_error_in_each_dtype_is_no_larger_than_that_of_torch(dtype, head):
    """Judged as cut-cross-entropy judges itself: against float64, beside what torch loses in the same
    dtype."""
    hidden, weight, bias, target = problem(dtype, n=61, d=70, v=1009)
    options, kept = HEADS[head], target != -100

    def torch_loss():  # what a user of torch writes: logits in dtype, log-softmax in fp32
        logits = torch.nn.functional.linear(hidden, weight, bias) * options.get("logit_scale", 1.0)
        if "softcap" in options:
            logits = options["softcap"] * torch.tanh(logits / options["softcap"])
        logp = torch.log_softmax(logits.float() / options.get("temperature", 1.0), -1)
        logp = logp.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
        return -(logp[kept]).sum(), logp.masked_fill(~kept, 0.0).detach()

    exact_inputs = tuple(each.detach().double().requires_grad_() for each in (hidden, weight, bias))
    exact, exact_stats = reference.linear_token_loss(
        *exact_inputs[:2], target, nll, bias=exact_inputs[2], **options
    )
    exact_grads = gradients(exact, exact_inputs)
    theirs, their_logp = torch_loss()
    ours, stats = linear_token_loss(
        hidden, weight, target, nll, bias=bias, workspace_bytes=1 << 16, **options
    )
    rows = [(stats.logp, their_logp, exact_stats.logp)]
    rows += zip(
        gradients(ours, (hidden, weight, bias)), gradients(theirs, (hidden, weight, bias)), exact_grads
    )
    assert ours.dtype == stats.logp.dtype == torch.float32
    for mine, other, want in rows:
        scale = want.abs().max()
        mean_error = (mine.double() - want).abs().mean() / scale
        worst_error = (mine.double() - want).abs().max() / scale
        assert mean_error <= 1.1 * (other.double() - want).abs().mean() / scale + 1e-6
        assert worst_error <= 1.5 * (other.double() - want).abs().max() / scale + 1e-6


def test_bf16_log_prob_of_a_sure_target_does_not_exceed_zero_or_lose_its_gradient():
    hidden, weight, _, target = problem(torch.bfloat16, n=8, d=64, v=300, bias=False, ignored=())
    with torch.no_grad():
        hidden.copy_(weight[target] * 3)
    loss, stats = linear_token_loss(hidden, weight, target, nll)
    exact = hidden.detach().double().requires_grad_(), weight.detach().double()
    want, _ = reference.linear_token_loss(*exact, target, nll)
    (got_grad,) = torch.autograd.grad(loss, hidden)
    (want_grad,) = torch.autograd.grad(want, exact[0])
    assert (stats.logp <= 1e-6).all()
    # logits of 30 rounded to bf16 are off by up to 0.06; without the exact target the error would be above 1
    assert (got_grad.double() - want_grad).norm() <= 0.06 * want_grad.norm()


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("ignored", [False, True])
def test_no_row_one_row_and_all_rows_ignored(n, ignored):
    hidden, weight, bias, target = problem(n=n, ignored=())
    if ignored:
        target.fill_(-100)
    loss, stats = linear_token_loss(hidden, weight, target, grpo, bias=bias)
    want, want_stats = reference.linear_token_loss(hidden, weight, target, grpo, bias=bias)
    torch.testing.assert_close((loss, stats), (want.detach(), want_stats))
    for grad, like in zip(gradients(loss, (hidden, weight, bias)), (hidden, weight, bias)):
        assert grad.shape == like.shape and grad.isfinite().all()
    assert linear_logp(hidden, weight, target).shape == (n,)


def test_ignored_rows_get_zero_and_are_dropped_before_the_product():
    hidden, weight, _, target = problem(bias=False, ignored=range(5, 30))
    with torch.no_grad():
        hidden[10] = float("nan")  # would spread if the row were computed
    seen = []
    loss, stats = linear_token_loss(
        hidden,
        weight,
        target,
        lambda s, rows: seen.extend(rows.tolist()) or -s.logp,
        workspace_bytes=V * 8 * 3,
    )
    loss.backward()
    assert seen == [row for row in range(N) if not 5 <= row < 30]
    assert loss.isfinite() and weight.grad.isfinite().all()
    assert (hidden.grad[5:30] == 0).all() and (stats.logp[5:30] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_the_caller_knows_give_the_same_bits(dtype):
    hidden, weight, bias, target = problem(dtype, bias=True)
    rows, runs = (target != -100).nonzero().squeeze(1), []
    target[17] = V  # not looked at
    for known in ({"rows": rows}, {"ignore_index": target[17].item()}):
        target[3] = known.get("ignore_index", -100)
        loss, stats = linear_token_loss(hidden, weight, target, grpo, bias=bias, workspace_bytes=V * 4 * 5, **known)
        with torch.no_grad():
            plain = linear_token_loss(hidden, weight, target, grpo, bias=bias, **known)[0]
        logp = linear_logp(hidden, weight, target, bias=bias, **known)
        runs.append((loss, *stats, plain, logp, *gradients(loss + logp.sum(), (hidden, weight, bias))))
    assert all(torch.equal(first, second) for first, second in zip(*runs))


@pytest.mark.parametrize("rows", [torch.ones(N, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.int64)])
def test_rows_of_another_kind_are_refused(rows):
    for function in (linear_logp, lambda *a, **k: linear_token_loss(*a, nll, **k)):
        with pytest.raises(ValueError, match="rows must be"):
            function(torch.zeros(N, D), torch.zeros(V, D), torch.zeros(N, dtype=torch.int64), rows=rows)


@pytest.mark.parametrize("low", [-1e9, -torch.inf])
def test_columns_that_a_bias_masks_change_nothing_of_the_others(low):
    """The first 4,500 of 9,001, more than a tile on a CPU; torch's cross-entropy is exact there, too."""
    hidden, weight, bias, target = problem(torch.float32, n=5, d=6, v=9001, ignored=(2,))
    bias.requires_grad_(False)[:4500] = low
    target.clamp_(min=4500)[2] = -100
    stats = linear_logp(hidden, weight, target, bias=bias, return_stats=True)
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    logits = exact[0] @ exact[1].t() + bias
    want = -torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(stats.logp.double(), want, rtol=1e-5, atol=1e-5)
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1) * (target >= 0)
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    loss, _ = linear_token_loss(hidden, weight, target, nll, bias=bias)
    wanted = gradients(-want.sum(), exact)
    for got in (gradients(-stats.logp.sum(), (hidden, weight)), gradients(loss, (hidden, weight))):
        for mine, right in zip(got, wanted):
            assert (mine - right).norm() <= 1e-5 * right.norm()
    with torch.no_grad():
        alone = linear_logp(hidden, weight, target, bias=bias, return_stats=True)
    torch.testing.assert_close(alone[:2], stats[:2], rtol=1e-5, atol=1e-5)


def test_incoming_gradient_scales_and_accumulates():
    hidden, weight, _, target = problem(bias=False)
    loss, _ = linear_token_loss(hidden, weight, target, nll)
    (3.0 * loss + loss).backward()
    (want,) = torch.autograd.grad(linear_token_loss(hidden, weight, target, nll)[0], hidden)
    torch.testing.assert_close(hidden.grad, 4.0 * want)


def test_same_input_gives_the_same_bits_twice():
    hidden, weight, bias, target = problem(torch.float32)
    runs = []
    for _ in range(2):
        loss, stats = linear_token_loss(hidden, weight, target, grpo, bias=bias, workspace_bytes=V * 4 * 5)
        runs.append((loss, *stats, *gradients(loss, (hidden, weight, bias))))
    assert all(torch.equal(first, second) for first, second in zip(*runs))


def test_result_does_not_depend_on_the_workspace_budget():
    hidden, weight, bias, target = problem(torch.float32)
    runs = []
    for budget in (1, V * 4 * 3, V * 4 * 16, 1 << 30):
        loss, stats = linear_token_loss(hidden, weight, target, grpo, bias=bias, workspace_bytes=budget)
        runs.append((loss, *stats, *gradients(loss, (hidden, weight, bias))))
    for other in runs[1:]:
        torch.testing.assert_close(runs[0], other, rtol=2e-5, atol=2e-6)


class LargestStorage(TorchDispatchMode):
    """Records the bytes of the largest storage that any torch operation returns, apart from the given
    inputs'."""

    def __init__(self, *inputs):
        super().__init__()
        self.known = {each.untyped_storage().data_ptr() for each in inputs}
        self.bytes, self.operation = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in self.known:
                size = each.untyped_storage().nbytes()
                if size > self.bytes:
                    self.bytes, self.operation = size, str(func)
        return result


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 170, 171, 1024, 4097])
@pytest.mark.parametrize("most", [1, 15, 170])
def test_chunks_cover_the_rows_and_are_nearly_equal(rows, most):
    sizes = equal_parts(rows, most)
    assert sum(sizes) == rows and all(0 < size <= most for size in sizes)
    assert not sizes or max(sizes) - min(sizes) <= 32


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("rows, vocab", [(1, 50_257), (37, 203), (2048, 151_936), (100_000, 256_000)])
@pytest.mark.parametrize("budget", [1, 4 * 16 * 37, 1 << 20, 32 << 20])
def test_a_tile_fits_the_budget_down_to_one_row_of_16_columns(rows, vocab, budget, device):
    sizes, columns = tile_shape(rows, vocab, 4, budget, device)
    assert sum(sizes) == rows and columns % PAD == 0
    assert max(sizes) * columns * 4 <= max(budget, PAD * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["plain", "all"])
def test_nothing_of_size_tokens_times_vocab_is_allocated(dtype, head):
    n, v, budget = 2048, 4099, 1 << 20
    hidden, weight, bias, target = problem(dtype, n=n, d=16, v=v)
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    with LargestStorage(hidden, weight, bias) as used:
        linear_token_loss(
            hidden, weight, target, smoothed_nll_with_z_loss, bias=bias, workspace_bytes=budget, **HEADS[head]
        )[0].backward()
        linear_logp(hidden, weight, target, bias=bias, workspace_bytes=budget, **HEADS[head]).sum().backward()
    most = max(budget, 3 * BLOCK_BYTES)  # logits of a chunk, scratch of a block
    assert 0 < used.bytes <= most < n * v * hidden.element_size() / 2, (used.bytes, used.operation)


def test_the_allocation_test_can_fail():
    hidden, weight, _, target = problem(torch.float32, n=1024, d=16, v=4099, bias=False)
    with LargestStorage(hidden, weight) as used:
        reference.linear_token_loss(hidden, weight, target, nll)[0].backward()
    assert used.bytes >= 1024 * 4099 * 4


def test_frozen_weight_costs_no_weight_gradient_and_no_grad_costs_no_hidden_gradient():
    hidden, weight, _, target = problem(torch.float32, n=5, d=300, v=4099, bias=False)
    weight.requires_grad_(False)
    with LargestStorage(hidden, weight) as used:
        linear_token_loss(hidden, weight, target, nll, workspace_bytes=1 << 16)[0].backward()
    assert used.bytes < weight.numel() * 4
    with torch.no_grad(), LargestStorage(hidden, weight) as used:
        linear_token_loss(hidden, weight, target, nll, workspace_bytes=1 << 16)
    with torch.no_grad():
        assert not linear_token_loss(hidden, weight, target, nll)[0].requires_grad
        assert not linear_logp(hidden, weight, target).requires_grad


def test_autocast_runs_in_its_dtype_and_returns_gradients_in_the_parameters_dtype():
    hidden, weight, bias, target = problem(torch.float32)
    low = tuple(each.detach().bfloat16().requires_grad_() for each in (hidden, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_token_loss(hidden, weight, target, grpo, bias=bias)
        logp = linear_logp(hidden, weight, target, bias=bias)
    grads = gradients(loss, (hidden, weight, bias))
    want, _ = linear_token_loss(low[0], low[1], target, grpo, bias=low[2])
    assert torch.equal(loss, want) and logp.dtype == torch.float32
    assert all(each.dtype == torch.float32 for each in grads)
    torch.testing.assert_close(grads, tuple(each.float() for each in gradients(want, low)))


def test_mixed_dtypes_and_strided_hidden_are_accepted():
    hidden, weight, _, target = problem(torch.float32, bias=False)
    wide = torch.randn(D, N, 2).requires_grad_()
    strided = wide[:, :, 0].t()  # (N, D), no stride is 1
    loss, _ = linear_token_loss(strided, weight, target, nll)
    want, _ = linear_token_loss(strided.contiguous(), weight, target, nll)
    assert torch.equal(loss, want)
    assert torch.equal(*(torch.autograd.grad(each, wide)[0] for each in (loss, want)))
    mixed, _ = linear_token_loss(hidden, weight.detach().bfloat16(), target, nll)
    assert torch.autograd.grad(mixed, hidden)[0].dtype == torch.float32


def test_fp16_gradients_survive_a_small_normaliser():
    """1 / 2e6 is below fp16's smallest number; the sweep must not round the gradient away before a loss
    scaler."""
    hidden, weight, bias, target = problem(torch.float16)
    exact = tuple(each.detach().double().requires_grad_() for each in (hidden, weight, bias))
    for options in ({}, {"softcap": 5.0}):
        loss, _ = linear_token_loss(
            hidden, weight, target, lambda s, rows: -s.logp / 2e6, bias=bias, **options
        )
        want, _ = reference.linear_token_loss(
            *exact[:2], target, lambda s, rows: -s.logp / 2e6, bias=exact[2], **options
        )
        for got, right in zip(
            gradients(loss * 65536.0, (hidden, weight, bias)), gradients(want * 65536.0, exact)
        ):
            assert (got.double() - right).norm() <= 5e-3 * right.norm()


def test_fp16_flat_distribution_over_a_large_vocabulary_stays_finite():
    hidden, weight, _, target = problem(torch.float16, n=3, d=8, v=80_000, bias=False, ignored=())
    with torch.no_grad():
        hidden.mul_(1e-3)
        weight.add_(2.0)
    loss, _ = linear_token_loss(hidden, weight, target, nll)
    exact = hidden.detach().double().requires_grad_()
    want, _ = reference.linear_token_loss(exact, weight.detach().double(), target, nll)
    got, right = torch.autograd.grad(loss, hidden)[0].double(), torch.autograd.grad(want, exact)[0]
    assert (got - right).norm() <= 1e-2 * right.norm()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"target": torch.full((N,), V)}, "targets must be"),
        ({"target": torch.full((N,), -1)}, "targets must be"),
        ({"target": torch.zeros(N, dtype=torch.int32)}, "int64"),
        ({"target": torch.zeros(N - 1, dtype=torch.int64)}, "sizes differ"),
        ({"hidden": torch.zeros(N, D + 1)}, "sizes differ"),
        ({"hidden": torch.zeros(1, N, D)}, "expected hidden"),
        ({"bias": torch.zeros(V + 1)}, "bias must be"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_arguments_raise_a_value_error_that_names_them(change, message):
    arguments = {
        "hidden": torch.zeros(N, D),
        "weight": torch.zeros(V, D),
        "target": torch.zeros(N, dtype=torch.int64),
    }
    arguments |= change
    with pytest.raises(ValueError, match=message):
        linear_logp(**arguments)
    with pytest.raises(ValueError, match=message):
        linear_token_loss(loss_fn=nll, **arguments)


def test_a_loss_function_of_the_wrong_shape_is_refused():
    hidden, weight, _, target = problem(bias=False)
    with pytest.raises(ValueError, match="one loss per row"):
        linear_token_loss(hidden, weight, target, lambda s, rows: s.logp.mean())


def test_stats_is_a_named_tuple_of_fp32():
    hidden, weight, _, target = problem(torch.bfloat16, bias=False)
    stats = linear_logp(hidden, weight, target, return_stats=True)
    assert isinstance(stats, TokenStats) and all(each.dtype == torch.float32 for each in stats)


def test_a_loss_that_uses_no_statistic_has_a_zero_gradient():
    hidden, weight, _, target = problem(torch.float16, bias=False)
    constant = torch.ones(N, requires_grad=True)
    for loss_fn in (lambda s, rows: torch.ones(len(rows)), lambda s, rows: constant[rows]):
        loss, _ = linear_token_loss(hidden, weight, target, loss_fn)
        assert loss.item() == N - 2
        assert not torch.autograd.grad(loss, hidden)[0].any()


def test_the_package_works_where_triton_is_not_installed():
    code = """
import sys
sys.modules["triton"] = None  # what a failed import leaves
import torch
from minimath.kernels import linear_logp, linear_token_loss
hidden, weight, target = torch.randn(5, 3), torch.randn(7, 3), torch.arange(5)
loss, stats = linear_token_loss(hidden, weight, target, lambda s, rows: -s.logp)
assert torch.allclose(loss, -linear_logp(hidden, weight, target).sum()), loss
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_the_folder_hands_over_to_the_package_of_the_same_name(tmp_path):
    """From the repository root `import kernels` finds ours first; it must not stand in for that package."""
    root = Path(__file__).parents[2]
    (tmp_path / "kernels.py").write_text("get_kernel = 'theirs'\n")
    code = "import kernels; print(kernels.get_kernel)"
    command = [sys.executable, "-c", code]
    path = {"PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"}
    done = subprocess.run(command, env=os.environ | path, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "theirs", done.stderr
