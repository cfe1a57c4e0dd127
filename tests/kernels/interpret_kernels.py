"""The Triton kernels under Triton's interpreter. test_triton.py runs this file in a process of its own, with
TRITON_INTERPRET=1: the variable must be set before triton is imported and changes every kernel of the
process.

The same promises as test_kernels.py (its tests are run again here, on the Triton path), plus shapes that need
several blocks along every axis. The interpreter truncates where hardware rounds fp32 to bf16, which doubles
that error.
"""

import pytest
import test_kernel_limits
import test_kernels
import test_linear_kl
import torch
from test_kernels import HEADS, LOSSES, LargestStorage, N, V, gradients, nll, problem

from minimath.kernels import TokenStats, linear_kl, linear_logp, linear_token_loss, reference, tile_triton, tiles
from minimath.kernels.common import INTERPRET, padded, runs_triton
from minimath.kernels.head import Chunk, Gradients, Scaling

# pytest collects these here a second time
for name in (
    "test_autocast_runs_in_its_dtype_and_returns_gradients_in_the_parameters_dtype",
    "test_fp16_gradients_survive_a_small_normaliser",
    "test_ignored_rows_get_zero_and_are_dropped_before_the_product",
    "test_mixed_dtypes_and_strided_hidden_are_accepted",
    "test_no_row_one_row_and_all_rows_ignored",
    "test_result_does_not_depend_on_the_workspace_budget",
    "test_same_input_gives_the_same_bits_twice",
    "test_a_loss_that_uses_no_statistic_has_a_zero_gradient",
    "test_bf16_log_prob_of_a_sure_target_does_not_exceed_zero_or_lose_its_gradient",
    "test_columns_that_a_bias_masks_change_nothing_of_the_others",
):
    globals()[name] = getattr(test_kernels, name)
for name in (
    "test_every_16_bit_gradient_element_is_as_close_as_torchs",
    "test_an_expanded_or_flipped_hidden_is_accepted",
    "test_inside_a_compiled_function_and_inside_a_checkpoint",
    "test_under_torch_compile_of_the_model_and_gradient_checkpointing",
):
    globals()[name] = getattr(test_kernel_limits, name)
for name in (
    "test_a_kl_near_0_keeps_its_digits",
    "test_a_peaked_student_and_logits_in_the_hundreds",
    "test_equal_rows_give_0_and_a_gradient_of_0",
    "test_no_row_and_one_row",
    "test_same_bits_twice_and_with_or_without_a_gradient",
):
    globals()[name] = getattr(test_linear_kl, name)

TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 1.6e-2}


def exact_copy(*inputs):
    return tuple(None if each is None else each.detach().double().requires_grad_() for each in inputs)


def close(got, want, tolerance):
    got = got.double()
    assert (got - want).norm() <= tolerance * want.norm() + 1e-6, ((got - want).norm(), want.norm())


def test_this_process_takes_the_triton_path():
    assert INTERPRET and runs_triton(torch.zeros(1)) and not runs_triton(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss_name", LOSSES)
def test_loss_stats_and_every_gradient_equal_the_float64_reference(loss_name, head, dtype):
    hidden, weight, bias, target = problem(dtype)
    exact = exact_copy(hidden, weight, bias)
    options, loss_fn = HEADS[head], LOSSES[loss_name]
    loss, stats = linear_token_loss(
        hidden, weight, target, loss_fn, bias=bias, workspace_bytes=V * 4 * 20, **options
    )
    want, want_stats = reference.linear_token_loss(*exact[:2], target, loss_fn, bias=exact[2], **options)
    tolerance = TOLERANCE[dtype]
    for got, right in zip((loss, *stats), (want, *want_stats)):
        close(got.detach(), right.detach(), tolerance)
    for got, right in zip(gradients(loss, (hidden, weight, bias)), gradients(want, exact)):
        close(got, right, tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head", HEADS)
def test_fused_logp_and_its_gradient_equal_the_float64_reference(head, dtype):
    """Rows, vocabulary and hidden size each span several blocks with a ragged end; all of it is one
    product."""
    hidden, weight, bias, target = problem(dtype, n=131, d=75, v=517)
    exact = exact_copy(hidden, weight, bias)
    options = HEADS[head]
    with torch.no_grad():
        alone = linear_logp(hidden, weight, target, bias=bias, return_stats=True, **options)
    got = linear_logp(hidden, weight, target, bias=bias, return_stats=True, **options)
    want = reference.linear_logp(*exact[:2], target, bias=exact[2], return_stats=True, **options)
    for mine, tiled, right in zip(alone, got, want):
        # without a gradient the logits stay in fp32 registers, so 16-bit inputs lose nothing
        torch.testing.assert_close(mine.double(), right.detach(), rtol=2e-5, atol=2e-5)
        close(tiled.detach(), right.detach(), TOLERANCE[dtype])
    kept = (target != -100).double()
    mixed = sum((factor * each * kept).sum() for factor, each in zip((1.0, -0.3, 0.2, 0.5), got))
    right = sum((factor * each * kept).sum() for factor, each in zip((1.0, -0.3, 0.2, 0.5), want))
    for mine, theirs in zip(gradients(mixed, (hidden, weight, bias)), gradients(right, exact)):
        close(mine, theirs, TOLERANCE[dtype])


def test_vocabulary_of_several_blocks_with_extreme_logits():
    """V above the row kernels' block of 4096, and logits of +-300 that overflow exp without the running
    maximum."""
    hidden, weight, _, target = problem(torch.float32, n=5, d=6, v=9001, bias=False, ignored=(2,))
    with torch.no_grad():
        hidden.mul_(50.0)
    exact = exact_copy(hidden, weight)
    loss, stats = linear_token_loss(hidden, weight, target, nll)
    want, want_stats = reference.linear_token_loss(*exact, target, nll)
    torch.testing.assert_close(
        tuple(each.double() for each in stats), tuple(want_stats), rtol=1e-5, atol=1e-4
    )
    for got, right in zip(gradients(loss, (hidden, weight)), gradients(want, exact)):
        close(got, right, 1e-4)
    got = linear_logp(hidden, weight, target, return_stats=True)
    torch.testing.assert_close(
        tuple(each.detach().double() for each in got), tuple(want_stats), rtol=1e-5, atol=1e-4
    )


def test_nothing_of_size_tokens_times_vocab_is_allocated_on_the_triton_path():
    n, v, budget = 67, 301, 1 << 14
    hidden, weight, _, target = problem(torch.float32, n=n, d=16, v=v, bias=False)
    weight.requires_grad_(False)
    with LargestStorage(hidden, weight) as used:
        linear_token_loss(hidden, weight, target, nll, workspace_bytes=budget)[0].backward()
        linear_logp(hidden, weight, target, workspace_bytes=budget).sum().backward()
    assert 0 < used.bytes <= budget < n * v * 4 / 4, (used.bytes, used.operation)


@pytest.mark.parametrize("vocab", [500, 517, 523])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lies_between_the_pairs_of_a_tile_is_not_used(vocab, dtype, monkeypatch):
    inputs, empty = test_linear_kl.pair(dtype, n=7, d=6, v=vocab), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    kl, grad = test_linear_kl.with_gradient(
        linear_kl, *inputs[:3], bias=inputs[-1], workspace_bytes=7 * 2 * 128 * inputs[0].element_size()
    )
    want, right = test_linear_kl.exact(*inputs)
    close(kl, want, 2 * TOLERANCE[dtype])
    close(grad, right, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("n", [1, 3])
def test_few_rows_split_the_vocabulary_and_merge_to_the_same(n):
    hidden, weight, bias, target = problem(torch.float32, n=n, d=8, v=1000, ignored=())
    got = linear_logp(hidden, weight, target, bias=bias, return_stats=True)
    want = reference.linear_logp(
        *exact_copy(hidden, weight)[:2], target, bias=bias.double(), return_stats=True
    )
    torch.testing.assert_close(
        tuple(each.detach().double() for each in got),
        tuple(each.detach() for each in want),
        rtol=1e-5,
        atol=1e-5,
    )


def test_weight_with_a_stride_is_read_right():
    hidden, weight, _, target = problem(torch.float32, bias=False)
    padded = torch.zeros(V, 64)
    padded[:, : weight.shape[1]] = weight.detach()
    sliced = padded[:, : weight.shape[1]]
    transposed = weight.detach().t().contiguous().t()  # columns contiguous
    want = linear_logp(hidden, weight, target)
    for other in (sliced, transposed):
        torch.testing.assert_close(linear_logp(hidden, other, target), want)
        torch.testing.assert_close(linear_token_loss(hidden, other, target, nll)[1].logp, want)
    assert want.shape == (N,)


@pytest.mark.parametrize("vocab", [500, 517, 523])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lies_between_the_rows_of_a_tile_is_not_used(vocab, dtype):
    """Rows of a tile start at multiples of 16 elements; all of the workspace is nan before, as reused memory may be."""
    hidden, weight, _, target = problem(dtype, n=7, d=6, v=vocab, bias=False, ignored=())
    hidden, weight, rows = hidden.detach(), weight.detach(), torch.arange(7)
    (_, chunk), *others = tiles.chunks(hidden, weight, None, target, rows, Scaling(), 7 * 128 * hidden.element_size())
    assert chunk.columns == 128 and not others
    chunk.workspace.fill_(float("nan"))
    stats, end, pulled = tiles.forward_tiles(chunk, pull=True)
    want = reference.linear_logp(hidden.double(), weight.double(), target, return_stats=True)
    tolerance = {"rtol": 2 * TOLERANCE[dtype], "atol": 4 * TOLERANCE[dtype]}
    torch.testing.assert_close(tuple(each.double() for each in stats), tuple(want), **tolerance)
    coefs = TokenStats(torch.ones(7), None, None, None)
    direct = tiles.pulled_gradient(chunk, pulled, end, coefs)
    chunk.workspace.fill_(float("nan"))
    grads = Gradients.zeros((hidden, weight, None), (True, False, False))
    tiles.gradient_tiles(chunk, rows, stats, coefs, grads)
    p = torch.softmax(hidden.double() @ weight.double().t(), -1)
    exact = (torch.nn.functional.one_hot(target, vocab) - p) @ weight.double()
    close(direct, exact, 2 * TOLERANCE[dtype])
    close(grads.hidden, exact, 2 * TOLERANCE[dtype])


def test_a_row_stride_beyond_32_bits_is_read_and_written_right():
    """Two rows of logits 2^31 elements apart: memory that is reserved, and touched only where the rows lie."""
    vocab, stride = 203, 2**31 + 16
    logits = torch.empty(stride + vocab + 16, dtype=torch.float16).as_strided((2, vocab), (stride, 1))
    hidden, weight, _, target = problem(torch.float32, n=2, d=6, v=vocab, bias=False, ignored=())
    full = (hidden @ weight.t()).detach()
    raw_target = full.gather(1, target[:, None]).squeeze(1)
    chunk = Chunk(hidden, weight, None, target, raw_target, Scaling(), logits, padded(vocab))
    logits.copy_(full)
    sums, factor = torch.zeros(4, 2), torch.ones(2)
    sums[0] = tiles.LOWEST
    tile_triton.tile(chunk, logits, 0, sums, factor, keep=True)
    stats, _ = tiles.finish(chunk, sums, all_four=True)
    want = torch.log_softmax(full.double(), -1).gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(stats.logp.double(), want, rtol=1e-2, atol=1e-2)
    logits.copy_(full)
    numbers = torch.stack((-torch.expm1(stats.logp), stats.entropy, stats.lse))
    coefs = torch.zeros(4, 2)
    coefs[0] = 1.0
    tile_triton.gradient(chunk, logits, 0, numbers, coefs)
    exact = torch.nn.functional.one_hot(target, vocab) - torch.softmax(full, -1)
    torch.testing.assert_close(logits.float(), exact.float(), rtol=1e-2, atol=1e-2)


def test_hidden_sizes_with_and_without_a_ragged_last_block_agree():
    """EVEN_D drops the masks of the inner loop; zeros behind the hidden size must change nothing."""
    hidden, weight, bias, target = problem(torch.float32, n=70, d=64, v=150)
    whole = linear_logp(hidden, weight, target, bias=bias)
    ragged = linear_logp(
        torch.nn.functional.pad(hidden, (0, 3)), torch.nn.functional.pad(weight, (0, 3)), target, bias=bias
    )
    torch.testing.assert_close(whole, ragged, rtol=1e-5, atol=1e-5)
