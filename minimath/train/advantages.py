"""Advantages: what a sample got, relative to the others of its group."""
import math
import statistics

import torch

from minimath.core.errors import UserError
from minimath.data.sample import Group


def set_advantages(groups: list[Group], scale: str, in_loss, brevity_weight: float = 0.0) -> None:
    """Set all advantages; samples that are not in_loss, or without a reward, count in no mean.

    brevity_weight (l_i - mean l of the correct ones) is added to those of the correct ones, in the scale of no group:
    where all are correct, a token is no more than a token."""
    for group in groups:
        rewards = [0.0 if sample.reward is None else sample.reward for sample in group.samples]
        valid = [group.decided and sample.reward is not None and in_loss(sample) for sample in group.samples]
        values = group_advantages([rewards], scale=scale, valid=[valid])[0].tolist()
        if not all(map(math.isfinite, rewards)):  # it must reach the loss, and be counted there
            values = [math.nan] * len(rewards)
        for sample, value in zip(group.samples, values, strict=True):
            sample.advantage = value
        if brevity_weight:
            short = [s for s, ok in zip(group.samples, valid, strict=True) if ok and s.correct]
            lengths = [s.parts["brevity"] for s in short]
            for sample in short if len(set(lengths)) > 1 else ():  # a mean of equal ones may differ in its last bit
                sample.advantage += brevity_weight * (sample.parts["brevity"] - statistics.fmean(lengths))


def group_advantages(rewards, *, scale: str = "group", valid=None) -> torch.Tensor:
    """Compute advantages relative to the n valid rewards of a group.

      group: (r_i - mean) / population standard deviation   (GRPO, DeepSeekMath, arXiv 2402.03300)
      none: r_i - mean   (Dr. GRPO, arXiv 2503.20783)
      rloo: r_i - mean of the others = n / (n - 1) (r_i - mean)   (leave-one-out baseline, which keeps the gradient
        unbiased: Kool et al. 2019; Ahmadian et al., arXiv 2402.14740); 0 for a group of one
      maxrl: (r_i - mean) / mean, for rewards >= 0 (MaxRL, arXiv 2602.02710): the rarer correct is, the more it counts

    rewards (P, G) and valid (P, G) bool, as tensors or nested lists; -> (P, G) fp32. Rows with valid False enter
    neither mean nor deviation and get 0. Groups whose valid rewards are all equal get exact zeros."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64)                              # (P, G)
    valid = torch.ones_like(rewards) if valid is None else torch.as_tensor(valid).to(rewards)
    count = valid.sum(1, keepdim=True).clamp(min=1)                                      # (P, 1)
    centred = (rewards - (rewards * valid).sum(1, keepdim=True) / count) * valid
    deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
    if scale == "group":
        centred = centred / deviation.clamp(min=1e-12)
    elif scale == "rloo":
        centred = centred * count / (count - 1).clamp(min=1)
    elif scale == "maxrl":
        mean = (rewards * valid).sum(1, keepdim=True) / count
        centred = centred / mean.clamp(min=1e-12)
    elif scale != "none":
        raise UserError(f"scale_advantage={scale!r}: use group, none, rloo or maxrl")
    return torch.where(deviation > 1e-8, centred, 0.0).float()
