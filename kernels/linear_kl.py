"""Reverse KL between two hidden states under one frozen head, over the whole vocabulary, in one sweep.

z and u are a row's logits of student and teacher, p = softmax(z), delta = z - u, c = E_p[delta], x = delta - c. As
sum_v exp u_v = sum_v exp(z_v) exp(-delta_v), and E_p[x] = 0,
    KL = E_p[log p - log q] = E_p[delta] - lse(z) + lse(u) = log E_p[exp(-x)] = log(1 + E_p[phi(x)]),
    phi(x) = exp(-x) - 1 + x >= 0,    d KL / d z_v = p_v x_v.
The first form loses its digits where S is near T; the last is a sum of what isn't negative, and keeps them. The
gradient in hidden is chain E_p[x s w], s = cap'(z), chain = logit_scale / temperature: a covariance of delta and w.

delta is no difference of rounded logits either. Under one head it is made of (hidden - teacher_hidden) @ weight.T,
times logit_scale / temperature; with b that product, a the student's, both times logit_scale / softcap, it is
    softcap / temperature * (tanh a - tanh(a - b)) = softcap / temperature * tanh(b) (1 - tanh a tanh(a - b)).
So equal rows give 0 and a gradient of 0, and near ones a relative error of roundings in any dtype.

One sweep: the running sums are relative to a shift m of each row, as in `tiles`, and to the mean c so far. When a tile
moves that by t, x becomes x - t, and (Chan, Golub and LeVeque, 1979, for the variance)
    sum e phi(x - t) = exp(t) sum e phi(x) + (exp(t) - 1 - t) sum e,    sum e x s w -> sum e x s w - t sum e s w.
Rows come in pairs: C of x and C of hidden - teacher_hidden are one product with a tile of the weight, 2 C rows; one
pass leaves e s and e x s in their places, and a second product pulls the weight's rows together under both. That is
four products of N V D, and nothing is made twice. Above 88 nats, where exp(-x) is over fp32, the first form is used.
"""
from __future__ import annotations

import torch

from .common import architecture, differentiable, jit, on_device, runs_as_it_is, runs_triton, tl, wide
from .head import Chunk, Gradients, Scaling, cast_operands, check_arguments, slack_and_lift
from .tile_torch import blocks_of
from .tile_triton import launch_pull, row_config, touchable
from .tiles import LOWEST, room, tiles

# Rows of the running numbers of a chunk, (SUMS, C): m, sum e, c, sum e phi; the teacher's shift and sum; and of the
# last tile exp(old m - m), old c - c, and what its e x s were divided by.
SUMS = 9


@jit()
def tanh(x):
    """By its series below 0.2, which keeps the digits of a small x."""
    square = x * x
    series = x * (1.0 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
    return tl.where(square < 0.04, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@jit()
def phi(x):
    """exp(-x) - 1 + x; by its series below 1/2."""
    series = x * x * (0.5 - x * (1 / 6 - x * (1 / 24 - x * (1 / 120 - x * (1 / 720 - x * (1 / 5040 - x / 40320))))))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(-x) - 1.0 + x)


@jit("sums_stride", "columns")
def kl_kernel(logits, bias, sums, row_stride, sums_stride, columns, whole, inner, outer, slack, lift,
              HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    """One program per pair of rows: a tile of raw logits (2 C, K) into the running numbers `sums` (9, C) fp32.

    Rows C and up hold the products of hidden - teacher_hidden, without the bias (K,). With KEEP the pair becomes e s
    and e x s / its unit. columns, whole, slack and lift as in tile_kernel; the numbers' order: SUMS.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < columns
    place = logits + row * row_stride + lanes
    apart = place + tl.num_programs(0).to(tl.int64) * row_stride
    old_other = tl.load(sums + 4 * sums_stride + row)  # both shifts before a reduction: each warp has read them then,
    old = tl.load(sums + row)  # and one of them may write
    z = tl.load(place, mask=lanes < whole, other=0.0).to(tl.float32)
    x = tl.load(apart, mask=lanes < whole, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + lanes, mask=inside, other=0.0).to(tl.float32)
    z = tl.where(inside, z, 0.0) * inner
    x = tl.where(inside, x, 0.0) * inner
    slope = 1.0
    if HAS_CAP:
        other = tanh(z - x)
        z = tanh(z)
        x = tanh(x) * (1.0 - z * other) * outer
        slope = 1.0 - z * z
        z = z * outer
    u = z - x
    top = tl.max(tl.where(inside, u, -1e30), 0)
    new = tl.where(top > old_other + slack, top, old_other)
    e = tl.where(inside, tl.exp(u - new), 0.0)
    tl.store(sums + 4 * sums_stride + row, new)
    place_total = sums + 5 * sums_stride + row
    tl.store(place_total, tl.load(place_total) * tl.exp(old_other - new) + tl.sum(e, 0))

    top = tl.max(tl.where(inside, z, -1e30), 0)
    new = tl.where(top > old + slack, top + lift, old)
    e = tl.where(inside, tl.exp(z - new), 0.0)
    before = tl.load(sums + sums_stride + row) * tl.exp(old - new)
    total = before + tl.sum(e, 0)
    mean = tl.load(sums + 2 * sums_stride + row)
    x = x - mean
    step = tl.sum(e * x, 0) / total
    x = x - step
    bent = tl.load(sums + 3 * sums_stride + row) * tl.exp(old - new + step)
    bent += tl.where(before > 0.0, before * phi(-step), 0.0) + tl.sum(tl.where(inside, e * phi(x), 0.0), 0)
    tl.store(sums + row, new)
    tl.store(sums + sums_stride + row, total)
    tl.store(sums + 2 * sums_stride + row, mean + step)
    tl.store(sums + 3 * sums_stride + row, bent)
    if KEEP:
        e = e * slope
        x = tl.where(inside, e * x, 0.0)
        unit = tl.maximum(64.0 * tl.max(tl.abs(x), 0), 1e-30)
        tl.store(sums + 6 * sums_stride + row, tl.exp(old - new))
        tl.store(sums + 7 * sums_stride + row, -step)
        tl.store(sums + 8 * sums_stride + row, unit)
        tl.store(place, e.to(logits.dtype.element_ty), mask=lanes < whole)
        tl.store(apart, (x / unit).to(logits.dtype.element_ty), mask=lanes < whole)


@jit("sums_stride")
def kl_pull_kernel(pulled, part, sums, pulled_stride, part_stride, sums_stride, width, blocks, BLOCK: tl.constexpr):
    """One program per (pair of rows, block of D): pulled (2 C, D) fp32 moves to the new shift and mean, + part."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    apart = (tl.num_programs(0) // blocks).to(tl.int64)
    lane = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < width
    rescale = tl.load(sums + 6 * sums_stride + row)
    moved = tl.load(sums + 7 * sums_stride + row)
    unit = tl.load(sums + 8 * sums_stride + row)
    place, crossed = pulled + row * pulled_stride + lane, pulled + (row + apart) * pulled_stride + lane
    place_part = part + row * part_stride + lane
    old = tl.load(place, mask=inside, other=0.0)
    new = tl.load(place_part, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, old * rescale + new, mask=inside)
    new = tl.load(place_part + apart * part_stride, mask=inside, other=0.0).to(tl.float32) * unit
    tl.store(crossed, (tl.load(crossed, mask=inside, other=0.0) + moved * old) * rescale + new, mask=inside)


def triton_kl(chunk: Chunk, logits, bias, sums, *, keep: bool) -> None:
    """kl_kernel on a tile of pairs (2 C, K) raw, bias (K,) or None, sums (9, C) fp32."""
    assert logits.stride(1) == 1 and sums.stride(1) == 1 and (bias is None or bias.stride(0) == 1)
    with on_device(logits):
        kl_kernel[(len(logits) // 2,)](
            logits, logits if bias is None else bias, sums, logits.stride(0), sums.stride(0), logits.shape[1],
            touchable(logits), *chunk.scaling.factors, *slack_and_lift(logits.dtype), HAS_BIAS=bias is not None,
            HAS_CAP=chunk.scaling.softcap > 0, KEEP=keep, **row_config(chunk.columns, architecture(logits.device)))


def triton_kl_pull(pulled, part, sums) -> None:
    """kl_pull_kernel: pulled (2 C, D) fp32, part (2 C, D), sums (9, C) fp32."""
    launch_pull(kl_pull_kernel, len(pulled) // 2, pulled, part, sums, sums.stride(0))


def torch_kl(chunk: Chunk, logits, bias, sums, *, keep: bool) -> None:
    """What kl_kernel does, in torch, block by block of rows in the cache."""
    half, capped = len(logits) // 2, chunk.scaling.softcap
    (inner, outer), (slack, lift) = chunk.scaling.factors, slack_and_lift(logits.dtype)
    for block, (z, x, e, slope) in blocks_of(logits[:half], chunk.scratch):
        shift, total, mean, bent, other, other_total, rescale, moved, unit = sums[:, block]
        first, second = logits[:half][block], logits[half:][block]
        z.copy_(first)
        (z if bias is None else z.add_(bias)).mul_(inner)
        x.copy_(second).mul_(inner)
        if capped:
            torch.sub(z, x, out=e).tanh_()
            z.tanh_()
            x.tanh_().mul_(e.mul_(z).neg_().add_(1.0)).mul_(outer)
            torch.mul(z, z, out=slope).neg_().add_(1.0)
            z.mul_(outer)
        torch.sub(z, x, out=e)  # the teacher's logits
        top = e.amax(-1)
        new = torch.where(top > other + slack, top, other)
        other_total.mul_((other - new).exp_()).add_(e.sub_(new[:, None]).exp_().sum(-1))
        other.copy_(new)
        top = z.amax(-1)
        new = torch.where(top > shift + slack, top + lift, shift)
        gap = shift - new
        torch.exp(gap, out=rescale)
        shift.copy_(new)
        torch.exp(z.sub_(new[:, None]), out=e)
        before = total * rescale
        torch.add(before, e.sum(-1), out=total)
        step = torch.mul(e, x.sub_(mean[:, None]), out=z).sum(-1).div_(total)
        x.sub_(step[:, None])
        mean.add_(step)
        torch.neg(step, out=moved)
        bend = torch.where(before > 0.0, before * (step.expm1() - step), 0.0)
        bent.mul_(gap.add_(step).exp_()).add_(bend)
        bent.add_(torch.neg(x, out=z).expm1_().add_(x).mul_(e).sum(-1))
        if keep:
            if capped:
                e.mul_(slope)
            low, high = x.mul_(e).aminmax(dim=-1)
            torch.maximum(-low, high, out=unit).mul_(64.0).clamp_(min=1e-30)
            first.copy_(e)
            second.copy_(x.div_(unit[:, None]))


def torch_kl_pull(pulled, part, sums) -> None:
    """What kl_pull_kernel does, in torch."""
    half = len(part) // 2
    (plain, crossed), (rescale, moved, unit) = pulled.split(half), sums[6:, :, None]
    crossed.addcmul_(plain, moved).mul_(rescale).addcmul_(part[half:].to(crossed.dtype), unit)
    plain.mul_(rescale).add_(part[:half])


def sweep(hidden, teacher_hidden, weight, bias, scaling: Scaling, workspace_bytes, grad) -> torch.Tensor:
    """KL of each row, (N,) wide; fills grad (N, D) with its gradient in hidden, if not None."""
    pull, dtype = grad is not None, wide(hidden.dtype)
    add, add_pull = (triton_kl, triton_kl_pull) if runs_triton(hidden) else (torch_kl, torch_kl_pull)
    out = torch.zeros(len(hidden), dtype=dtype, device=hidden.device)
    sizes, place = room(hidden, weight, len(hidden), workspace_bytes, logits=2, scratch=4)
    walked = hidden, teacher_hidden, out, grad if pull else out
    for x, teacher, kl, into in zip(*(each.split(sizes) for each in walked)):
        chunk = Chunk(torch.cat((x, x - teacher)), weight, None, None, None, scaling, *place)
        sums = torch.zeros((SUMS, len(x)), dtype=dtype, device=x.device)
        sums[0] = sums[4] = LOWEST
        pulled = torch.zeros_like(chunk.x, dtype=dtype) if pull else None  # sums under e s, and under e x s
        for first, part, logits in tiles(chunk):
            add(chunk, logits, None if bias is None else bias[first:first + len(part)], sums, keep=pull)
            if pull:
                add_pull(pulled, logits @ part, sums)
        shift, total, mean, bent, other, other_total = sums[:6]
        near = torch.log1p(bent / total)
        far = mean + other - shift + (other_total / total).log()
        kl.copy_(torch.where(near.isfinite(), near, far).clamp_(min=0.0))  # below it there is rounding only
        if pull:
            into.copy_(pulled[len(x):].mul_((scaling.chain / total)[:, None]))
    return out


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pull, hidden, *others):
        grad = Gradients.zeros((hidden, None, None), (pull, False, False)).hidden
        ctx.save_for_backward(grad)
        ctx.dtype = hidden.dtype
        return sweep(hidden, *others, grad)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_kl):
        (grad,) = ctx.saved_tensors
        return None, (grad * grad_kl[:, None]).to(ctx.dtype), None, None, None, None, None


@runs_as_it_is
def linear_kl(hidden, teacher_hidden, weight, *, bias=None, temperature=1.0, softcap=0.0, logit_scale=1.0,
              workspace_bytes=None):
    """KL(student || teacher) of each row over the vocabulary, without the (N, V) logits of either.

    hidden and teacher_hidden (N, D), weight (V, D) floating point, bias (V,) or None: the head, and what follows it, is
    the same for both. Returns (N,) in nats, fp32 (fp64 for fp64 input), not below 0, differentiable in hidden alone;
    no double backward. The gradient is made in forward, where hidden asks for it; backward multiplies it.

    Error: the student's logits are rounded to the dtype of the inputs, as torch's would be; delta has an error relative
    to its own size, so that unlike torch's a KL near 0 keeps its digits. Peak extra memory: workspace_bytes (None:
    32 MiB, on a CPU 24) for both tiles of logits, of C rows each; with a gradient a (2 C, D) sum in fp32, a product of
    that shape, and the (N, D) gradient; (2 C, D) of inputs; on a CPU up to 8 MiB of scratch.

    Raises ValueError on bad arguments, and where teacher_hidden, weight or bias require grad.
    """
    scaling = Scaling(float(temperature), float(softcap), float(logit_scale))
    check_arguments(hidden, weight, None, bias, scaling)
    if teacher_hidden.shape != hidden.shape or not teacher_hidden.dtype.is_floating_point:
        got = f"{tuple(teacher_hidden.shape)} {teacher_hidden.dtype}"
        raise ValueError(f"teacher_hidden must be floating point {tuple(hidden.shape)}, as hidden, got {got}")
    if teacher_hidden.device != hidden.device:
        raise ValueError(f"teacher_hidden must be on {hidden.device}, got {teacher_hidden.device}")
    for name, each in {"teacher_hidden": teacher_hidden, "weight": weight, "bias": bias}.items():
        if differentiable(each):
            raise ValueError(f"linear_kl has a gradient in hidden alone: pass {name}.detach(), or freeze it")
    other, _, _ = cast_operands(teacher_hidden, weight, bias)
    hidden, weight, bias = cast_operands(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearKL.apply(differentiable(hidden), hidden, other.to(hidden.dtype), weight, bias, scaling,
                               workspace_bytes)
