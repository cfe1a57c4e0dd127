"""The per-token losses that run inside the fused sweep: functions of the log-prob of a token, and nothing wider.

minimath.kernels.linear_token_loss calls such a function on a chunk of C rows and differentiates it on those C
numbers alone; another loss is another small function. Divisors (trained tokens of the global step, group sizes) are
folded into a per-row weight, so a loss is a plain sum and does not depend on how a step is cut into micro-batches.
"""
from typing import NamedTuple

import torch

from minimath.config.schema import LossOptions, RLAIFConfig
from minimath.kernels import TokenStats


def nll_loss(trained_tokens: int):
    """Return the negative log-likelihood per trained token of the global step."""
    return lambda stats, rows: -stats.logp / trained_tokens  # (C,), (C,) -> (C,)


class PolicyRows(NamedTuple):
    """Holds what the policy loss knows of each kernel row: N fp32, 0 if untrained."""
    advantage: torch.Tensor
    weight: torch.Tensor  # 1 / divisor of the loss type, from token_weights
    sampled_logp: torch.Tensor  # as recorded by the rollout, under the distribution sampled from
    old_logp: torch.Tensor | None = None  # under the policy before this rollout's updates; None: strictly on-policy
    ref_logp: torch.Tensor | None = None  # under the reference policy, needed for kl_coef > 0
    seq_log_ratio: torch.Tensor | None = None  # gspo off-policy: mean over the completion of logp - old_logp


def token_weights(loss: str, lengths: list[int], max_new_tokens: int) -> list[float]:
    """Weigh the tokens of each completion: one divisor for the whole step.

    lengths: trained tokens of every completion of the step (0: masked out). dapo and cispo: 1 / all trained tokens
    (arXiv 2503.14476 eq. 8; 2506.13585 eq. 4). grpo and gspo: 1 / (completions * own length) (arXiv 2402.03300 eq. 3;
    2507.18071 eq. 5). dr_grpo: 1 / (completions * max_new_tokens), a constant (arXiv 2503.20783)."""
    tokens, count = max(1, sum(lengths)), max(1, sum(n > 0 for n in lengths))
    if loss in ("dapo", "cispo"):
        return [1 / tokens] * len(lengths)
    if loss in ("grpo", "gspo"):
        return [1 / (count * max(1, n)) for n in lengths]
    if loss == "dr_grpo":
        return [1 / (count * max_new_tokens)] * len(lengths)
    raise ValueError(f"unknown loss {loss!r}")


def policy_loss(data: PolicyRows, options: LossOptions):
    """Return the policy-gradient loss, a per-token function.

    With r = exp(logp - old_logp), old_logp = logp (in value) when strictly on-policy, A the advantage:
      dapo, grpo, dr_grpo: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)   (PPO's clip, arXiv 1707.06347 eq. 7,
        with clip-higher of DAPO; they differ in token_weights)
      cispo: -sg(min(r, 1 + clip_high)) A logp   (arXiv 2506.13585 eq. 4-5: no lower clip, gradient at every token)
      gspo: the clip on the sequence's ratio s = exp(mean_t(logp - old_logp)), with the token form
        s_t = sg(s) exp(logp - sg(logp))   (arXiv 2507.18071 eq. 7, 13-14; see `clip_hint`)
    Added: kl_coef times `kl_term`, and -entropy_coef H. Policy term and KL are expectations over the sampler's tokens:
    both are multiplied by `importance_weight`. Returns loss_fn(stats (C,), rows (C,)) -> (C,), times data.weight."""
    low, high = options.clip_low, options.clip_high

    def loss_fn(stats: TokenStats, rows: torch.Tensor) -> torch.Tensor:
        logp, fixed = stats.logp, stats.logp.detach()  # (C,)
        advantage = data.advantage[rows]
        old = fixed if data.old_logp is None else data.old_logp[rows]
        ratio = torch.exp(logp - old)
        weight = importance_weight(old - data.sampled_logp[rows], options.importance_cap)
        if options.name == "cispo":
            loss = -ratio.detach().clamp(max=1 + high) * advantage * logp
        else:
            clipped = ratio
            if options.name == "gspo":
                mean = torch.zeros_like(fixed) if data.seq_log_ratio is None else data.seq_log_ratio[rows]
                clipped = torch.exp(mean + logp - fixed)
            loss = -torch.minimum(clipped * advantage, clipped.clamp(1 - low, 1 + high) * advantage)
        loss = loss * weight
        if options.kl_coef:
            loss = loss + options.kl_coef * (kl_term(logp, data.ref_logp[rows], ratio) * weight)
        if options.entropy_coef:
            loss = loss - options.entropy_coef * stats.entropy
        return loss * data.weight[rows]

    return loss_fn


def clip_hint(cfg: RLAIFConfig) -> str:
    """Say what to change where gspo's clip hardly bites; arXiv 2507.18071 section 5."""
    loss = cfg.loss
    if loss.name != "gspo" or cfg.on_policy() or max(loss.clip_low, loss.clip_high) <= 0.02:
        return ""
    return (f"loss=gspo with clip_low={loss.clip_low:g} clip_high={loss.clip_high:g}: the ratio of a whole completion "
            "stays near 1 and is hardly ever clipped; its paper takes clip_low=0.0003 clip_high=0.0004")


def importance_weight(log_ratio: torch.Tensor, cap: float) -> torch.Tensor:
    """Weigh tokens that another distribution drew, without gradient.

    min(exp(log_ratio), cap) with log_ratio = old_logp - sampled_logp (C,): other rounding, another engine, top-p, older
    weights. cap 0: every weight is 1. Truncated importance sampling: Ionides 2008; for two engines, Yao et al. 2025."""
    weight = torch.exp(log_ratio.detach())
    return weight.clamp(max=cap) if cap else torch.ones_like(weight)


def kl_term(logp: torch.Tensor, ref_logp: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """Estimate the KL to the reference at the sampled tokens.

    ratio * (exp(d) - d - 1) with d = ref_logp - logp, all (C,). ratio = exp(logp - old_logp) has its gradient: the
    expectation over the old policy's tokens is the KL for every policy, so its gradient is the KL's (DeepSeek-V3.2,
    arXiv 2512.02556 eq. 7). k3 without the ratio, as GRPO was published, has the gradient of KL(reference || policy)
    (Tang and Munos 2025, arXiv 2506.09477)."""
    distance = ref_logp - logp
    return ratio * (torch.exp(distance) - distance - 1)
