"""Cross-entropy of a linear head: the signature of torch.nn.functional.linear_cross_entropy, on the fused sweep.

    loss = linear_cross_entropy(hidden, lm_head.weight, labels)
    =      F.cross_entropy(hidden @ lm_head.weight.T, labels)

without the (N, V) logits. What torch's has and this has not: class probabilities as target, a head with more than one
class dimension, and label smoothing together with class weights; each raises a ValueError that says so. What this has
beside: softcap and logit_scale, a loss in fp32 whatever the input, and work only for the rows that count.
"""
import torch

from .linear_logp import linear_logp
from .linear_token_loss import linear_token_loss

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(input, linear_weight, target, *, linear_bias=None, weight=None, reduction="mean",
                         ignore_index=None, label_smoothing=0.0, softcap=0.0, logit_scale=1.0, workspace_bytes=None):
    """Cross-entropy of target under softmax(input @ linear_weight.T + linear_bias).

    input (..., D) and linear_weight (V, D) floating point, target (...) int64, linear_bias (V,) or None,
    weight (V,) of the classes or None. ignore_index None means -100. Logits are softcap * tanh(logit_scale * s /
    softcap), or logit_scale * s where softcap is 0.

    Returns fp32 (fp64 for fp64 input): a scalar, or with reduction="none" the loss of each target (...), 0 where
    ignored. "mean" divides by the number of targets that count (by the sum of their weights), and is nan where none
    does, as torch's is. Differentiable in input, linear_weight and linear_bias; with "mean" and "sum" the gradient is
    ready when the loss is, with "none" backward computes the logits again. Raises ValueError on bad arguments.
    """
    ignore_index = -100 if ignore_index is None else ignore_index
    check(input, linear_weight, target, weight, reduction, label_smoothing)
    shape, target = target.shape, target.reshape(-1)
    hidden = input.reshape(-1, input.shape[-1])
    kept = target != ignore_index
    class_weight = None
    if weight is not None:  # of the target of each row, (N,), 0 where ignored
        inside = target.clamp(0, len(weight) - 1)  # what is outside is refused further down
        class_weight = weight.index_select(0, inside).masked_fill(~kept, 0.0)

    def token_loss(stats, rows):
        loss = -(1.0 - label_smoothing) * stats.logp
        if label_smoothing:
            loss = loss - label_smoothing * stats.mean_logp
        return loss if class_weight is None else loss * class_weight.index_select(0, rows)

    head = {"bias": linear_bias, "softcap": softcap, "logit_scale": logit_scale}
    head |= {"ignore_index": ignore_index, "workspace_bytes": workspace_bytes}
    if reduction == "none":
        stats = linear_logp(hidden, linear_weight, target, return_stats=True, **head)
        return token_loss(stats, torch.arange(len(target), device=target.device)).reshape(shape)
    loss, _ = linear_token_loss(hidden, linear_weight, target, token_loss, all_stats=label_smoothing > 0, **head)
    if reduction == "sum":
        return loss
    return loss / (kept.sum() if class_weight is None else class_weight.sum())


def check(input, linear_weight, target, weight, reduction, label_smoothing) -> None:
    """ValueError for what this function does not take; shapes of one row and one head are checked further down."""
    torchs = "use torch.nn.functional.linear_cross_entropy"
    if linear_weight.dim() != 2:
        raise ValueError(f"linear_weight must be (V, D), got {tuple(linear_weight.shape)}; for a head with more class "
                         f"dimensions {torchs}")
    if target.dtype.is_floating_point:
        raise ValueError(f"target must hold class indices (int64); for class probabilities {torchs}")
    if input.shape[:-1] != target.shape:
        raise ValueError(f"input (..., D) and target (...) must agree, got {tuple(input.shape)} and "
                         f"{tuple(target.shape)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if weight is not None and label_smoothing:
        raise ValueError("label_smoothing with class weights needs the log-prob of every class; leave one of the two "
                         f"away, or {torchs}")
    if weight is not None and weight.shape != linear_weight.shape[:1]:
        raise ValueError(f"weight must be ({linear_weight.shape[0]},), got {tuple(weight.shape)}")
