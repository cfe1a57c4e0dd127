"""Log-probability (and entropy, log-sum-exp, mean log-prob) of targets under softmax(hidden @ weight.T / temperature).

Forward-only it is what the reference policy, the judge and evaluation need. Where a gradient is needed, backward
recomputes the logits chunk by chunk, so nothing but (N,) numbers is kept between the two.
"""
from __future__ import annotations

import torch

from .common import (WORKSPACE_BYTES, Coefficients, Scaling, TokenStats, cast_operands, check_arguments, kept_rows,
                     raw_logits, raw_target_logit, rows_per_chunk, torch_stats, wide)
from .linear_token_loss import chunk_backward, empty_gradients


def chunks(hidden, weight, bias, target, ignore_index, workspace_bytes):
    """Yield (rows, x, target, logits workspace filled) for each chunk of the rows that count."""
    rows = kept_rows(target, ignore_index, weight.shape[0])
    chunk = rows_per_chunk(len(rows), weight.shape[0], hidden.element_size(), workspace_bytes)
    workspace = torch.empty((min(chunk, len(rows)), weight.shape[0]), dtype=hidden.dtype, device=hidden.device)
    for index in rows.split(chunk) if len(rows) else ():
        x = hidden.index_select(0, index)
        logits = workspace[: len(index)]
        raw_logits(x, weight, bias, logits)
        yield index, x, target.index_select(0, index), logits


def forward_stats(hidden, weight, bias, target, scaling: Scaling, ignore_index, workspace_bytes) -> torch.Tensor:
    """(4, N): the TokenStats rows, 0 at ignored tokens."""
    out = torch.zeros((4, hidden.shape[0]), dtype=wide(hidden.dtype), device=hidden.device)
    for index, x, wanted, logits in chunks(hidden, weight, bias, target, ignore_index, workspace_bytes):
        raw_target = raw_target_logit(x, weight, bias, wanted)
        stats, _ = torch_stats(logits, wanted, raw_target, scaling, keep_exp=False)
        out.index_copy_(1, index, torch.stack(stats))
    return out


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, scaling, ignore_index, workspace_bytes):
        ctx.save_for_backward(hidden, weight, bias, target)
        ctx.options = scaling, ignore_index, workspace_bytes
        ctx.set_materialize_grads(False)
        return tuple(forward_stats(hidden, weight, bias, target, scaling, ignore_index, workspace_bytes))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grad_stats):
        hidden, weight, bias, target = ctx.saved_tensors
        scaling, ignore_index, workspace_bytes = ctx.options
        needs = tuple(ctx.needs_input_grad[:3])
        grads = empty_gradients(hidden, weight, bias, needs)
        if any(each is not None for each in grad_stats):
            for index, x, wanted, logits in chunks(hidden, weight, bias, target, ignore_index, workspace_bytes):
                coefs = Coefficients(*(None if each is None else each.index_select(0, index) for each in grad_stats))
                raw_target = raw_target_logit(x, weight, bias, wanted)
                stats, state = torch_stats(logits, wanted, raw_target, scaling, keep_exp=True)
                chunk_backward(logits, x, weight, wanted, raw_target, index, stats, state, coefs, scaling, grads)
        cast = (None if grad is None else grad.to(like.dtype) for grad, like in zip(grads, (hidden, weight, bias)))
        return *cast, None, None, None, None


def linear_logp(hidden, weight, target, *, bias=None, temperature=1.0, softcap=0.0, logit_scale=1.0,
                ignore_index=-100, return_stats=False, workspace_bytes=WORKSPACE_BYTES):
    """Per-token log-prob of target under the model's head, without the (N, V) logits.

    hidden (N, D) and weight (V, D) floating point, bias (V,) or None, target (N,) int64. Returns logp (N,), or
    TokenStats of four (N,) with return_stats; fp32 (fp64 for fp64 input), 0 at rows whose target is ignore_index.
    Differentiable in hidden, weight and bias where they require grad. Raises ValueError on bad arguments.
    """
    scaling = Scaling(float(temperature), float(softcap), float(logit_scale))
    check_arguments(hidden, weight, target, bias, scaling)
    hidden, weight, bias = cast_operands(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        stats = TokenStats(*_LinearLogp.apply(hidden, weight, bias, target, scaling, ignore_index, workspace_bytes))
    return stats if return_stats else stats.logp
