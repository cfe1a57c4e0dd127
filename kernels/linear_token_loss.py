"""Loss and gradient of any per-token loss of the targets' log-probs under a linear head, in one sweep.

For each chunk of C rows the logits go once into a reused (C, V) workspace; one pass reads them for the four
statistics; the caller's loss function maps those C numbers to C losses, and autograd on them alone gives
the derivative in each statistic; a second pass turns the workspace into the gradient in place; one more
matrix product gives the gradient in hidden. With a frozen weight that is two
products of N * V * D, the least there is, and nothing of size N x V exists. Backward is a multiplication by
the incoming scalar.
"""

from __future__ import annotations

from typing import Callable

import torch

from .common import (
    PAD,
    Coefficients,
    Gradients,
    Scaling,
    TokenStats,
    cast_operands,
    check_arguments,
    empty_gradients,
    empty_workspace,
    jit,
    kept_rows,
    kernel_factors,
    padded,
    power_of_two,
    raw_logits,
    raw_target_logit,
    runs_as_it_is,
    runs_triton,
    tl,
    torch_gradient,
    torch_stats,
    triton,
    wide,
)

LossFn = Callable[[TokenStats, torch.Tensor], torch.Tensor]


@jit("out_stride")
def row_stats_kernel(
    logits,
    target,
    raw_target,
    out,
    row_stride,
    out_stride,
    vocab,
    whole,
    inner,
    outer,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row: logits (C, V) read once -> out (4, C) fp32 = logp, entropy, lse, mean_logp.

    whole: columns that may be touched, V or padded(V); the columns between hold anything.
    """
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(target + row)
    exact = tl.load(raw_target + row)
    lanes = tl.arange(0, BLOCK)
    # running maximum is one scalar a row, the sums stay in BLOCK lanes until the end: one reduction per block
    top = -1e30  # finite, so that 0 * (top - new) is 0
    total = tl.zeros([BLOCK], tl.float32)  # sum of exp(z - top)
    weighted = tl.zeros([BLOCK], tl.float32)  # sum of exp(z - top) * (z - top)
    plain = tl.zeros([BLOCK], tl.float32)  # sum of z
    target_z = 0.0
    for start in range(0, vocab, BLOCK):
        column = start + lanes
        inside = column < vocab
        z = tl.load(logits + row * row_stride + column, mask=column < whole, other=0.0).to(tl.float32)
        z = tl.where(column == wanted, exact, tl.where(inside, z, 0.0)) * inner
        if HAS_CAP:
            z = outer * (2.0 * tl.sigmoid(2.0 * z) - 1.0)
        plain += tl.where(inside, z, 0.0)
        target_z += tl.sum(tl.where(column == wanted, z, 0.0), 0)
        new = tl.maximum(top, tl.max(tl.where(inside, z, -1e30), 0))
        rescale = tl.exp(top - new)
        weighted = (weighted + total * (top - new)) * rescale
        total = total * rescale
        e = tl.where(inside, tl.exp(z - new), 0.0)
        total += e
        weighted += e * (z - new)
        top = new
    mass = tl.sum(total, 0)
    lse = top + tl.log(mass)
    tl.store(out + row, target_z - lse)
    tl.store(out + out_stride + row, tl.log(mass) - tl.sum(weighted, 0) / mass)
    tl.store(out + 2 * out_stride + row, lse)
    tl.store(out + 3 * out_stride + row, tl.sum(plain, 0) / vocab - lse)


@jit("stats_stride")
def gradient_kernel(
    logits,
    target,
    raw_target,
    stats,
    coefs,
    row_stride,
    stats_stride,
    vocab,
    whole,
    blocks,
    inner,
    outer,
    chain,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per (row, block of the vocabulary): logits (C, V) become the gradient in place.

    The gradient is that in the raw logits; stats and coefs (4, C) fp32 in the order of TokenStats;
    whole as in row_stats_kernel, its columns past V become 0; chain = logit_scale / temperature.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    touched = column < whole
    wanted = tl.load(target + row)
    exact = tl.load(raw_target + row)
    entropy = tl.load(stats + stats_stride + row)
    lse = tl.load(stats + 2 * stats_stride + row)
    a = tl.load(coefs + row) * chain
    b = tl.load(coefs + stats_stride + row) * chain
    c = tl.load(coefs + 2 * stats_stride + row) * chain
    d = tl.load(coefs + 3 * stats_stride + row) * chain
    place = logits + row * row_stride + column
    z = tl.load(place, mask=touched, other=0.0).to(tl.float32)
    hit = column == wanted
    z = tl.where(hit, exact, z) * inner
    slope = 1.0
    if HAS_CAP:
        capped = 2.0 * tl.sigmoid(2.0 * z) - 1.0
        slope = 1.0 - capped * capped
        z = outer * capped
    logp = z - lse
    grad = tl.exp(logp) * (c - a - d - b * (entropy + logp)) + d / vocab
    grad = (grad + tl.where(hit, a, 0.0)) * slope
    grad = tl.where(column < vocab, grad, 0.0)  # a matrix product may read past a row's end, times nothing
    tl.store(place, grad.to(logits.dtype.element_ty), mask=touched)


def touchable(logits) -> int:
    """Columns of logits (C, V) that the row kernels may read and write: padded(V) where the stride leaves room."""
    vocab, stride = logits.shape[1], logits.stride(0)
    return padded(vocab) if stride % PAD == 0 and stride >= vocab else vocab


def row_config(vocab: int) -> dict:
    """Block and warps of the two row kernels: memory bound, so only wide enough loads matter; lanes stay few
    enough that the five running values of row_stats_kernel sit in registers on every target."""
    block = min(4096, triton.next_power_of_2(vocab))
    return {"BLOCK": block, "num_warps": 8 if block >= 2048 else 4}


def triton_stats(logits, target, raw_target, scaling: Scaling) -> TokenStats:
    """row_stats_kernel on logits (C, V) raw, target (C,) int64, raw_target (C,) fp32."""
    rows, vocab = logits.shape
    assert logits.stride(1) == 1 and target.is_contiguous() and raw_target.is_contiguous()
    out = torch.empty((4, rows), dtype=torch.float32, device=logits.device)
    inner, outer = kernel_factors(scaling)
    row_stats_kernel[(rows,)](
        logits,
        target,
        raw_target,
        out,
        logits.stride(0),
        out.stride(0),
        vocab,
        touchable(logits),
        inner,
        outer,
        HAS_CAP=scaling.softcap > 0,
        **row_config(vocab),
    )
    return TokenStats(*out)


def triton_gradient(
    logits, target, raw_target, stats: TokenStats, coefs: Coefficients, scaling: Scaling
) -> None:
    """gradient_kernel in place on logits (C, V) raw; stats and coefs (C,) each."""
    rows, vocab = logits.shape
    assert logits.stride(1) == 1 and target.is_contiguous() and raw_target.is_contiguous()
    zero = torch.zeros_like(stats.logp)
    packed, numbers = torch.stack(stats), torch.stack([zero if each is None else each for each in coefs])
    inner, outer = kernel_factors(scaling)
    config = row_config(vocab)
    blocks = triton.cdiv(vocab, config["BLOCK"])
    gradient_kernel[(rows * blocks,)](
        logits,
        target,
        raw_target,
        packed,
        numbers,
        logits.stride(0),
        packed.stride(0),
        vocab,
        touchable(logits),
        blocks,
        inner,
        outer,
        scaling.logit_scale / scaling.temperature,
        HAS_CAP=scaling.softcap > 0,
        **config,
    )


def chunk_stats(logits, target, raw_target, scaling: Scaling, *, keep_exp: bool, all_four: bool = True):
    """(TokenStats, state) of one chunk of raw logits on whatever path the device has."""
    if runs_triton(logits):
        return triton_stats(logits, target, raw_target, scaling), None
    return torch_stats(logits, target, raw_target, scaling, keep_exp=keep_exp, all_four=all_four)


def chunk_gradient(logits, target, raw_target, stats, state, coefs: Coefficients, scaling: Scaling):
    """Gradient in the raw logits, in place. Returns (row_scale, target_coef) as torch_gradient does."""
    if runs_triton(logits):
        return triton_gradient(logits, target, raw_target, stats, coefs, scaling), None
    return torch_gradient(logits, target, raw_target, stats, state, coefs, scaling)


def chunk_backward(logits, x, weight, target, raw_target, rows, stats, state, coefs, scaling, grads) -> None:
    """Add one chunk's share to the gradient buffers.

    logits (C, V) as the statistics pass left it, overwritten; x (C, D); target, raw_target, rows (C,).
    """
    unit = None
    if logits.dtype == torch.float16:
        unit = power_of_two(coefs)
        coefs = Coefficients(*(None if each is None else each / unit for each in coefs))
    row_scale, target_coef = chunk_gradient(logits, target, raw_target, stats, state, coefs, scaling)
    dtype = wide(x.dtype)
    if grads.hidden is not None:
        grad = logits @ weight  # (C, D)
        if row_scale is not None:
            grad = grad.to(dtype).mul_(row_scale[:, None])
            grad.addcmul_(weight.index_select(0, target).to(dtype), target_coef[:, None])
        if unit is not None:
            grad = grad.to(dtype) * unit
        grads.hidden.index_copy_(0, rows, grad.to(grads.hidden.dtype))
    if grads.weight is not None:
        scaled_x = x if row_scale is None else (x * row_scale[:, None]).to(x.dtype)
        update = (logits.t() @ scaled_x).to(dtype)  # (V, D)
        if target_coef is not None:
            update.index_add_(0, target, x.to(dtype) * target_coef[:, None])
        grads.weight.add_(update if unit is None else update.mul_(unit))
    if grads.bias is not None:
        if row_scale is None:
            update = logits.sum(0, dtype=dtype)
        else:
            update = (logits.t() @ row_scale.to(x.dtype)).to(dtype).index_add_(0, target, target_coef)
        grads.bias.add_(update if unit is None else update * unit)


def loss_and_coefficients(loss_fn: LossFn, stats: TokenStats, rows, *, need_grad: bool):
    """Sum of loss_fn over one chunk, and its derivative in each of the four statistics (None if unused)."""
    leaves = TokenStats(*(each.detach().requires_grad_(need_grad) for each in stats))
    with torch.set_grad_enabled(need_grad):
        per_token = loss_fn(leaves, rows)
        if per_token.shape != rows.shape:
            raise ValueError(
                f"loss_fn must return one loss per row, {tuple(rows.shape)}, got {tuple(per_token.shape)}"
            )
        loss = per_token.sum()
    if not need_grad or not loss.requires_grad:
        return loss.detach(), None
    coefs = Coefficients(*torch.autograd.grad(loss, leaves, allow_unused=True))
    return loss.detach(), None if all(each is None for each in coefs) else coefs


def sweep(
    hidden, weight, bias, target, loss_fn, scaling: Scaling, ignore_index, workspace_bytes, grads: Gradients
):
    """One pass over the rows that count. Returns (loss scalar, TokenStats of (N,)), and fills `grads`."""
    count, vocab = hidden.shape[0], weight.shape[0]
    dtype, device = wide(hidden.dtype), hidden.device
    need_grad = any(each is not None for each in grads)
    rows = kept_rows(target, ignore_index, vocab)
    out = torch.zeros((4, count), dtype=dtype, device=device)
    loss = torch.zeros((), dtype=dtype, device=device)
    sizes, workspace = empty_workspace(hidden[: len(rows)], vocab, workspace_bytes)
    for index in rows.split(sizes):
        x, wanted = hidden.index_select(0, index), target.index_select(0, index)
        logits = workspace[: len(index)]  # (C, V)
        raw_logits(x, weight, bias, logits)
        raw_target = raw_target_logit(x, weight, bias, wanted)
        stats, state = chunk_stats(logits, wanted, raw_target, scaling, keep_exp=need_grad)
        part, coefs = loss_and_coefficients(loss_fn, stats, index, need_grad=need_grad)
        loss += part
        out.index_copy_(1, index, torch.stack(stats))
        if coefs is not None:
            chunk_backward(logits, x, weight, wanted, raw_target, index, stats, state, coefs, scaling, grads)
    return loss, TokenStats(*out)


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, loss_fn, scaling, ignore_index, workspace_bytes):
        needs = tuple(ctx.needs_input_grad[:3])
        grads = empty_gradients(hidden, weight, bias, needs)
        loss, stats = sweep(
            hidden, weight, bias, target, loss_fn, scaling, ignore_index, workspace_bytes, grads
        )
        ctx.save_for_backward(*grads)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        grads = (
            None if grad is None else (grad * grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        )
        return *grads, None, None, None, None, None


@runs_as_it_is
def linear_token_loss(
    hidden,
    weight,
    target,
    loss_fn: LossFn,
    *,
    bias=None,
    temperature=1.0,
    softcap=0.0,
    logit_scale=1.0,
    ignore_index=-100,
    workspace_bytes=None,
):
    """Sum over rows of loss_fn(statistics of the target), with its gradient, without the (N, V) logits.

    hidden (N, D) and weight (V, D) floating point, bias (V,) or None, target (N,) int64; rows whose target is
    ignore_index are dropped before any work. loss_fn(stats: TokenStats of (C,), rows (C,) int64) -> (C,) is
    called once per chunk under autograd; rows are indices into the N given rows. It must not mix rows of a
    chunk and must apply the caller's normaliser itself. Returns (loss, stats): loss a scalar, differentiable
    in hidden, weight and bias where they require grad; stats a detached TokenStats of (N,), 0 at ignored
    rows. Both are fp32 (fp64 for fp64 input). Peak extra memory: workspace_bytes, one (N, D) gradient, and up
    to 6 MiB of scratch on the CPU. Raises ValueError on bad arguments.
    """
    scaling = Scaling(float(temperature), float(softcap), float(logit_scale))
    check_arguments(hidden, weight, target, bias, scaling)
    hidden, weight, bias = cast_operands(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        if torch.is_grad_enabled() and any(
            each is not None and each.requires_grad for each in (hidden, weight, bias)
        ):
            loss, *stats = _LinearTokenLoss.apply(
                hidden, weight, bias, target, loss_fn, scaling, ignore_index, workspace_bytes
            )
            return loss, TokenStats(*stats)
        nothing = Gradients(None, None, None)
        return sweep(
            hidden.detach(), weight, bias, target, loss_fn, scaling, ignore_index, workspace_bytes, nothing
        )
