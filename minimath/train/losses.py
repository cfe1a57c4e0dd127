"""The per-token losses that run inside the fused sweep: functions of the log-prob of a token, and nothing wider.

minimath.kernels.linear_token_loss calls such a function on a chunk of C rows and differentiates it on those C
numbers alone; another loss is another small function. Divisors (trained tokens of the global step, group sizes) are
folded into a per-row weight, so a loss is a plain sum and does not depend on how a step is cut into micro-batches.
"""
from typing import NamedTuple

import torch

from minimath.kernels import TokenStats


def nll_loss(trained_tokens: int, *, label_smoothing: float = 0.0, z_loss: float = 0.0):
    """Negative log-likelihood over the trained tokens of the global step, for SFT.

    Per token: -(1 - e) logp - e mean_v logp_v + z lse^2 (label smoothing e: Szegedy et al. 2015, arXiv 1512.00567,
    section 7; z-loss: PaLM, arXiv 2204.02311, section 5). Returns loss_fn(stats (C,), rows (C,)) -> (C,).
    """
    def loss_fn(stats: TokenStats, rows: torch.Tensor) -> torch.Tensor:  # (C,), (C,) -> (C,)
        loss = -stats.logp
        if label_smoothing:
            loss = (1 - label_smoothing) * loss - label_smoothing * stats.mean_logp
        if z_loss:
            loss = loss + z_loss * stats.lse.square()
        return loss / trained_tokens

    return loss_fn


class PolicyRows(NamedTuple):
    """What the policy loss knows of each kernel row; (N,) fp32 each, 0 at untrained rows."""
    advantage: torch.Tensor
    weight: torch.Tensor  # 1 / divisor of the loss type, from token_weights
    sampled_logp: torch.Tensor  # as recorded by the rollout, under the distribution sampled from
    old_logp: torch.Tensor | None = None  # under the policy before this rollout's updates; None: strictly on-policy
    ref_logp: torch.Tensor | None = None  # under the reference policy, needed for beta > 0
    seq_log_ratio: torch.Tensor | None = None  # gspo off-policy: mean over the completion of logp - old_logp


def token_weights(loss_type: str, lengths: list[int], max_new_tokens: int) -> list[float]:
    """Weight of the tokens of each completion: one divisor for the whole step, whatever its micro-batches.

    lengths: trained tokens of every completion of the step (0: masked out). dapo and cispo: 1 / all trained tokens
    (arXiv 2503.14476 eq. 8; 2506.13585 eq. 4). grpo and gspo: 1 / (completions * own length) (arXiv 2402.03300 eq. 3;
    2507.18071 eq. 5). dr_grpo: 1 / (completions * max_new_tokens), a constant (arXiv 2503.20783).
    """
    tokens, count = max(1, sum(lengths)), max(1, sum(n > 0 for n in lengths))
    if loss_type in ("dapo", "cispo"):
        return [1 / tokens] * len(lengths)
    if loss_type in ("grpo", "gspo"):
        return [1 / (count * max(1, n)) for n in lengths]
    if loss_type == "dr_grpo":
        return [1 / (count * max_new_tokens)] * len(lengths)
    raise ValueError(f"unknown loss_type {loss_type!r}")


def policy_loss(data: PolicyRows, *, loss_type: str = "dapo", clip_low: float = 0.2, clip_high: float = 0.28,
                clip_dual: float = 0.0, beta: float = 0.0, kl: str = "unbiased", entropy_coef: float = 0.0,
                importance: str = "truncate", importance_cap: float = 2.0):
    """The policy-gradient loss of a step, as a per-token function for linear_token_loss.

    With r = exp(logp - old_logp), old_logp = logp (in value) when strictly on-policy, A the advantage:
      dapo, grpo, dr_grpo: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)   (PPO's clip, arXiv 1707.06347 eq. 7,
        with clip-higher of DAPO; they differ in token_weights)
      cispo: -sg(min(r, 1 + clip_high)) A logp   (arXiv 2506.13585 eq. 4-5: no lower clip, gradient at every token)
      gspo: the clip on the sequence's ratio s = exp(mean_t(logp - old_logp)), with the token form
        s_t = sg(s) exp(logp - sg(logp))   (arXiv 2507.18071 eq. 7, 13-14; see `clip_hint`)
    clip_dual = c > 1 bounds the second side: for A < 0 the gain is max(min(r A, clip(r) A), c A), so that a token
    that the policy now likes much more than the one that sampled does not swamp the step (Ye et al., arXiv 1912.09729);
    0: off, and cispo has no use for it. Added: beta times `kl_term`, and -entropy_coef H. Policy term and unbiased KL
    are expectations over the sampler's tokens: both are multiplied by `importance_weight`. Strictly on-policy the
    ratio is 1 and the clips idle.

    Returns loss_fn(stats (C,), rows (C,)) -> (C,), already multiplied by data.weight.
    """
    def loss_fn(stats: TokenStats, rows: torch.Tensor) -> torch.Tensor:
        logp, fixed = stats.logp, stats.logp.detach()  # (C,)
        advantage = data.advantage[rows]
        old = fixed if data.old_logp is None else data.old_logp[rows]
        ratio = torch.exp(logp - old)
        weight = importance_weight(old - data.sampled_logp[rows], importance, importance_cap)
        if loss_type == "cispo":
            loss = -ratio.detach().clamp(max=1 + clip_high) * advantage * logp
        else:
            if loss_type == "gspo":
                mean = torch.zeros_like(fixed) if data.seq_log_ratio is None else data.seq_log_ratio[rows]
                clipped = torch.exp(mean + logp - fixed)
            else:
                clipped = ratio
            gain = torch.minimum(clipped * advantage, clipped.clamp(1 - clip_low, 1 + clip_high) * advantage)
            if clip_dual:
                gain = torch.where(advantage < 0, torch.maximum(gain, clip_dual * advantage), gain)
            loss = -gain
        loss = loss * weight
        if beta:
            term = kl_term(logp, data.ref_logp[rows], ratio, kl)
            loss = loss + beta * (term * weight if kl == "unbiased" else term)
        if entropy_coef:
            loss = loss - entropy_coef * stats.entropy
        return loss * data.weight[rows]

    return loss_fn


def clip_hint(cfg) -> str:
    """What to change where the clip can hardly bite: gspo's ratio is that of a mean over the completion's tokens and
    stays near 1; its paper clips at 3e-4 and 4e-4 (arXiv 2507.18071 section 5). "" when there is nothing to say."""
    on_policy = cfg.updates_per_rollout == cfg.minibatches == 1
    if cfg.loss.name != "gspo" or on_policy or max(cfg.loss.clip_low, cfg.loss.clip_high) <= 0.02:
        return ""
    return (f"loss_type=gspo with clip_low={cfg.loss.clip_low:g} clip_high={cfg.loss.clip_high:g}: the ratio of a whole "
            "completion stays near 1 and is hardly ever clipped; its paper takes clip_low=0.0003 clip_high=0.0004")


def importance_weight(log_ratio: torch.Tensor, importance: str, cap: float) -> torch.Tensor:
    """Weight (C,) of tokens drawn by another distribution than the policy that trains, no gradient: other rounding or
    another engine, top-p / min-p, older weights. log_ratio = old_logp - sampled_logp (C,), w = exp(log_ratio).

      truncate: min(w, cap)   (truncated importance sampling: Ionides 2008; for two engines, Yao et al. 2025)
      mask: w within [1 / cap, cap], else 0: a token on which the two disagree more says nothing sound, and a
        bound below catches what truncation lets pass (IcePop, arXiv 2510.18855, there within [0.5, 5])
    cap 0: every weight is 1.
    """
    weight = torch.exp(log_ratio.detach())
    if not cap:
        return torch.ones_like(weight)
    if importance == "mask":
        return weight * ((weight >= 1 / cap) & (weight <= cap))
    return weight.clamp(max=cap)


def kl_term(logp: torch.Tensor, ref_logp: torch.Tensor, ratio: torch.Tensor, kl: str = "unbiased") -> torch.Tensor:
    """KL(policy || reference) at the sampled tokens (C,); k3 = exp(d) - d - 1, d = ref_logp - logp (Schulman 2020).

      unbiased: ratio * k3, ratio = exp(logp - old_logp) with its gradient (DeepSeek-V3.2, arXiv 2512.02556 eq. 7):
        the expectation over the old policy's tokens is the KL for every policy, so its gradient is the KL's. On-policy
        the gradient is (logp - ref_logp) d logp.
      k3: k3 alone, as GRPO was published (arXiv 2402.03300 eq. 4). Its value is right on-policy, but its gradient
        (1 - exp(d)) d logp is that of KL(reference || policy), and without bound where the policy has left the
        reference's tokens (Tang and Munos 2025, arXiv 2506.09477).
    Both are per token: how a token changes the KL of the tokens behind it is left out, as everywhere in this field.
    """
    distance = ref_logp - logp
    k3 = torch.exp(distance) - distance - 1
    return ratio * k3 if kl == "unbiased" else k3
