"""Loss and gradient of any per-token loss of the targets' log-probs under a linear head, in one sweep.

After the last tile of C rows (`tiles`) the caller's loss function maps their log-probs to losses, autograd on those
numbers alone gives the derivative in each statistic, and the gradient in hidden is a scaled sum of what is there
already: with a frozen weight two products of N * V * D, the least there is. Backward multiplies by a scalar.
"""
from collections.abc import Callable

import torch

from .common import differentiable, runs_as_it_is, wide
from .head import Gradients, Scaling, TokenStats, cast_operands, check_arguments, kept_rows
from .linear_logp import forward_stats
from .tiles import chunks, forward_tiles, gradient_tiles, pulled_gradient

LossFn = Callable[[TokenStats, torch.Tensor], torch.Tensor]


def summed(loss_fn: LossFn, stats: TokenStats, rows) -> torch.Tensor:
    """Sum of loss_fn over some rows."""
    per_token = loss_fn(stats, rows)
    if per_token.shape != rows.shape:
        raise ValueError(f"loss_fn must return one loss per row, {tuple(rows.shape)}, got {tuple(per_token.shape)}")
    return per_token.sum()


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss_fn, all_stats, *arguments):
        """One pass over the rows that count; arguments as of `chunks`."""
        hidden, scaling, needs = arguments[0], arguments[5], ctx.needs_input_grad[2:5]
        grads = Gradients.zeros(arguments[:3], needs)
        # what a head that trains needs, or a loss that uses the entropy, takes the logits a second time
        pull = needs == (True, False, False)
        out = torch.zeros((4, len(hidden)), dtype=wide(hidden.dtype), device=hidden.device)
        loss = out.new_zeros(())
        for index, chunk in chunks(*arguments):
            stats, end, pulled = forward_tiles(chunk, pull=pull, all_four=all_stats)
            leaves = TokenStats(*(each.detach().requires_grad_() for each in stats))
            with torch.enable_grad():
                part = summed(loss_fn, leaves, index)
            found = torch.autograd.grad(part, leaves, allow_unused=True) if part.requires_grad else [None] * 4
            coefs = TokenStats(*found)  # derivatives, None where the loss does not use a statistic
            if not all_stats and (coefs.entropy is not None or coefs.mean_logp is not None):
                raise ValueError("loss_fn uses entropy or mean_logp, which all_stats=False leaves at 0: "
                                 "leave it at True")
            loss += part.detach()
            out.index_copy_(1, index, torch.stack(stats))
            if all(each is None for each in coefs):
                continue
            if pull and coefs.entropy is None and (coefs.mean_logp is None or not scaling.softcap):
                grad = pulled_gradient(chunk, pulled, end, coefs)
                grads.hidden.index_copy_(0, index, grad.to(grads.hidden.dtype))
            else:
                pull = False  # the loss will use the same statistics of the next chunk
                gradient_tiles(chunk, index, stats, coefs, grads)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [each if each is None else each.dtype for each in arguments[:3]]
        ctx.mark_non_differentiable(*(stats := out.unbind()))
        return loss, *stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        grads = (None if grad is None else (grad * grad_loss).to(dtype)
                 for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes))
        return None, None, *grads, None, None, None, None


@runs_as_it_is
def linear_token_loss(hidden, weight, target, loss_fn: LossFn, *, bias=None, temperature=1.0, softcap=0.0,
                      logit_scale=1.0, ignore_index=-100, rows=None, all_stats=True, workspace_bytes=None):
    """Sum over rows of loss_fn(statistics of the target), with its gradient, without the (N, V) logits.

    hidden (N, D) and weight (V, D) floating point, bias (V,) or None, target (N,) int64; rows whose target is
    ignore_index are dropped before any work. rows (M,) int64: the rows that count, distinct, for a caller that knows
    them and has checked their targets; ignore_index is then not looked at, and nothing is read back from the device,
    which waits for a GPU twice without it. loss_fn(stats: TokenStats of (C,), rows (C,) int64) -> (C,) is called
    once per chunk under autograd; rows are indices into the N given rows. It must not mix rows of a chunk and must
    apply the caller's normaliser itself. A loss whose gradient uses the entropy, and a weight or bias that requires
    grad, cost a second making of the logits. all_stats=False leaves entropy and mean_logp at 0 for a loss that uses
    neither, which on a CPU saves two of six passes over the logits.

    Returns (loss, stats): loss a scalar, differentiable in hidden, weight and bias where they require grad; stats a
    detached TokenStats of (N,), 0 at ignored rows. Both are fp32 (fp64 for fp64 input). Peak extra memory:
    workspace_bytes (None: 32 MiB, on a CPU 24) of logits, a (C, D) sum in fp32, the (N, D) gradient, and up to 16 MiB
    of scratch. Raises ValueError on bad arguments.
    """
    scaling = Scaling(float(temperature), float(softcap), float(logit_scale))
    check_arguments(hidden, weight, target, bias, scaling)
    rows = kept_rows(target, ignore_index, len(weight), rows)
    hidden, weight, bias = cast_operands(hidden, weight, bias)
    arguments = hidden, weight, bias, target, rows, scaling, workspace_bytes
    with torch.autocast(hidden.device.type, enabled=False):
        if differentiable(hidden, weight, bias):
            loss, *stats = _LinearTokenLoss.apply(loss_fn, all_stats, *arguments)
            return loss, TokenStats(*stats)
        with torch.no_grad():
            out = forward_stats(*arguments, all_four=all_stats)
            loss = summed(loss_fn, TokenStats(*out[:, rows]), rows) if len(rows) else out.new_zeros(())
        return loss, TokenStats(*out)
