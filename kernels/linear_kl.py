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

from .common import (
    Chunk,
    Scaling,
    cast_operands,
    check_arguments,
    empty_gradients,
    empty_sum,
    kernel_factors,
    runs_as_it_is,
    runs_triton,
    slack_and_lift,
    tile_shape,
    wide,
)
from .linear_kl_triton import triton_kl, triton_kl_pull
from .tile_torch import blocks_of, torch_scratch
from .tiles import LOWEST, tiles

# Rows of the running numbers of a chunk, (SUMS, C): m, sum e, c, sum e phi; the teacher's shift and sum; and of the
# last tile exp(old m - m), old c - c, and what its e x s were divided by.
SUMS = 9


def torch_kl(logits, bias, sums, scratch, scaling: Scaling, *, keep: bool) -> None:
    """What kl_kernel does, in torch, block by block of rows in the cache."""
    half = len(logits) // 2
    (inner, outer), (slack, lift) = kernel_factors(scaling), slack_and_lift(logits.dtype)
    for block, (z, x, e, slope) in blocks_of(logits[:half], scratch):
        shift, total, mean, bent, other, other_total, rescale, moved, unit = sums[:, block]
        first, second = logits[:half][block], logits[half:][block]
        z.copy_(first)
        (z if bias is None else z.add_(bias)).mul_(inner)
        x.copy_(second).mul_(inner)
        if scaling.softcap:
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
            if scaling.softcap:
                e.mul_(slope)
            low, high = x.mul_(e).aminmax(dim=-1)
            torch.maximum(-low, high, out=unit).mul_(64.0).clamp_(min=1e-30)
            first.copy_(e)
            second.copy_(x.div_(unit[:, None]))


def kl_tiles(chunk: Chunk, bias, scaling: Scaling, *, pull: bool):
    """(running numbers (SUMS, C), their sums under e s and e x s (2 C, D) or None) of a chunk of C pairs of rows."""
    pairs, on_triton = chunk.x, runs_triton(chunk.x)
    half = len(pairs) // 2
    sums = torch.zeros((SUMS, half), dtype=wide(pairs.dtype), device=pairs.device)
    sums[0] = sums[4] = LOWEST
    pulled = empty_sum(pairs) if pull else None
    scratch = None if on_triton else torch_scratch(chunk, 4)
    for first, part, logits in tiles(chunk):
        shift = None if bias is None else bias[first : first + len(part)]
        if on_triton:
            triton_kl(logits, shift, sums, chunk.columns, scaling, keep=pull)
        else:
            torch_kl(logits, shift, sums, scratch, scaling, keep=pull)
        if pull and on_triton:
            triton_kl_pull(pulled, logits @ part, sums)
        elif pull:
            under, (plain, crossed) = logits @ part, pulled.split(half)
            rescale, moved, unit = sums[6:, :, None]
            crossed.addcmul_(plain, moved).mul_(rescale).addcmul_(under[half:].to(crossed.dtype), unit)
            plain.mul_(rescale).add_(under[:half])
    return sums, pulled


def sweep(hidden, teacher_hidden, weight, bias, scaling: Scaling, workspace_bytes, grad) -> torch.Tensor:
    """KL of each row, (N,) wide; fills grad (N, D) with its gradient in hidden, if not None."""
    out = torch.zeros(len(hidden), dtype=wide(hidden.dtype), device=hidden.device)
    kind, pair_bytes = hidden.device.type, 2 * hidden.element_size()
    sizes, columns = tile_shape(len(hidden), len(weight), pair_bytes, workspace_bytes, kind)
    workspace = torch.empty(2 * max(sizes, default=0) * columns, dtype=hidden.dtype, device=hidden.device)
    walked = hidden, teacher_hidden, out, hidden if grad is None else grad
    for x, teacher, kl, into in zip(*(each.split(sizes) for each in walked)):
        chunk = Chunk(torch.cat((x, x - teacher)), weight, None, None, None, workspace, columns)
        sums, pulled = kl_tiles(chunk, bias, scaling, pull=grad is not None)
        shift, total, mean, bent, other, other_total = sums[:6]
        near = torch.log1p(bent / total)
        far = mean + other - shift + (other_total / total).log()
        kl.copy_(torch.where(near.isfinite(), near, far).clamp_(min=0.0))  # below it there is rounding only
        if grad is not None:
            chain = scaling.logit_scale / scaling.temperature
            into.copy_(pulled[len(x) :].mul_((chain / total)[:, None]))
    return out


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, teacher_hidden, weight, bias, scaling, workspace_bytes):
        grad = empty_gradients(hidden, weight, bias, (True, False, False)).hidden
        ctx.save_for_backward(grad)
        ctx.dtype = hidden.dtype
        return sweep(hidden, teacher_hidden, weight, bias, scaling, workspace_bytes, grad)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_kl):
        (grad,) = ctx.saved_tensors
        return (grad * grad_kl[:, None]).to(ctx.dtype), None, None, None, None, None


@runs_as_it_is
def linear_kl(
    hidden, teacher_hidden, weight, *, bias=None, temperature=1.0, softcap=0.0, logit_scale=1.0, workspace_bytes=None
):
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
    frozen = {"teacher_hidden": teacher_hidden, "weight": weight, "bias": bias}
    if teacher_hidden.device != hidden.device:
        raise ValueError(f"teacher_hidden must be on {hidden.device}, got {teacher_hidden.device}")
    for name, each in frozen.items():
        if torch.is_grad_enabled() and each is not None and each.requires_grad:
            raise ValueError(f"linear_kl has a gradient in hidden alone: pass {name}.detach(), or freeze it")
    other, _, _ = cast_operands(teacher_hidden, weight, bias)
    hidden, weight, bias = cast_operands(hidden, weight, bias)
    arguments = hidden, other.to(hidden.dtype), weight, bias, scaling, workspace_bytes
    with torch.autocast(hidden.device.type, enabled=False):
        if torch.is_grad_enabled() and hidden.requires_grad:
            return _LinearKL.apply(*arguments)
        with torch.no_grad():
            return sweep(*arguments, None)
