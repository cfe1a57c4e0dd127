"""Rewards of a group of completions of one problem, and their group-relative advantages.

Two reward modes. `judge_rewards` is RLAIF: a right/wrong gate, the share of comparisons won before an AI
judge, and brevity among the right ones. `rules_rewards` is the paper's stage 2 (arXiv 2507.08267), the
control: format, accuracy as a cosine over length, and a length rule, with no judge. All lengths are in
tokens, and every minimum and maximum is taken over one group. Lists are per completion, in the order of the
group. """
from __future__ import annotations

import math

import torch

from .answer import extract_answer
from .config import UserError


def format_score(text: str) -> float:
    """1.0 when the text shows a complete, non-empty \\boxed{...}, else 0.0. For models that close their
    reasoning with </think>, the box must stand before it, as the paper's format reward asks: the decoding
    stops there."""
    return float(extract_answer(text.partition("</think>")[0], strict=True) is not None)


def length_term(tokens: list[int], right: list[bool]) -> list[float]:
    """l_i = 1 - 2 (n_i - min) / (max - min) over the right completions of the group: the shortest gets +1,
    the longest -1. 0.0 for wrong ones (brevity of a wrong answer is worth nothing) and when all are equally
    long."""
    lengths = [n for n, ok in zip(tokens, right, strict=True) if ok]
    if not lengths or min(lengths) == max(lengths):
        return [0.0] * len(tokens)
    low, high = min(lengths), max(lengths)
    return [1.0 - 2.0 * (n - low) / (high - low) if ok else 0.0 for n, ok in zip(tokens, right, strict=True)]


def check_weights(lam_judge: float, lam_length: float, lam_format: float) -> None:
    """Raises UserError unless the weights keep every right completion above every wrong one: the lowest right
    reward is 1 - lam_judge - lam_length (at least 0.5), the highest wrong one lam_format."""
    if min(lam_judge, lam_length, lam_format) < 0 or lam_judge + lam_length > 0.5 or lam_format >= 0.5:
        weights = f"lam_judge={lam_judge:g}, lam_length={lam_length:g}, lam_format={lam_format:g}"
        raise UserError(f"{weights}: with these a wrong answer could outrank a right one; "
                        "keep lam_judge + lam_length <= 0.5 and lam_format < 0.5, none negative")


def judge_rewards(right: list[bool], win: list[float | None], length: list[float], fmt: list[float], *,
                  lam_judge: float, lam_length: float, lam_format: float = 0.0) -> list[float]:
    """R_i = c_i (1 + lam_judge (2 w_i - 1) + lam_length l_i) + lam_format f_i.

    c_i in {0, 1} is the answer gate, w_i in [0, 1] the mean win probability over the other right completions
    (None, no vote: its term is left out, as for w_i = 1/2), l_i in [-1, 1] from `length_term`, f_i in [0, 1]
    the format. A right completion gets more than any wrong one, whatever the judge says: the weights are
    checked, and so is the result. Raises UserError for weights that would allow otherwise. """
    check_weights(lam_judge, lam_length, lam_format)
    rewards = []
    for ok, w, term, f in zip(right, win, length, fmt, strict=True):
        judged = 0.0 if w is None else lam_judge * (2.0 * min(1.0, max(0.0, w)) - 1.0)
        rewards.append((1.0 + judged + lam_length * term if ok else 0.0) + lam_format * f)
    best_wrong = max((r for r, ok in zip(rewards, right, strict=True) if not ok), default=-math.inf)
    assert all(r > best_wrong for r, ok in zip(rewards, right, strict=True) if ok), (rewards, right)
    return rewards


def cosine_reward(tokens: list[int], right: list[bool], *, max_tokens: int, right_range=(0.1, 1.0),
                  wrong_range=(-1.0, -0.1)) -> list[float]:
    """Accuracy as a cosine over length: "Demystifying Long Chain-of-Thought Reasoning", arXiv 2502.03373.

    With t = min(1, n / max_tokens), a right completion gets low + (high - low) (1 + cos(pi t)) / 2 over
    right_range (short is best), a wrong one high + (low - high) (1 + cos(pi t)) / 2 over wrong_range (short
    is worst: giving up early must not pay). The default ranges are the paper's, whose max_tokens was 30,000,
    counted in characters. """
    rewards = []
    for n, ok in zip(tokens, right, strict=True):
        at_end, at_zero = right_range if ok else reversed(wrong_range)
        wave = math.cos(math.pi * min(1.0, n / max_tokens))
        rewards.append(at_end + (at_zero - at_end) * (1.0 + wave) / 2.0)
    return rewards


def length_reward(tokens: list[int], right: list[bool]) -> list[float]:
    """Kimi k1.5's length reward (arXiv 2501.12599): lambda_i = 1/2 - (n_i - min) / (max - min) over the whole
    group, right and wrong; a right completion gets lambda_i, a wrong one min(0, lambda_i). 0.0 when all are
    equally long."""
    low, high = min(tokens, default=0), max(tokens, default=0)
    if low == high:
        return [0.0] * len(tokens)
    terms = [0.5 - (n - low) / (high - low) for n in tokens]
    return [term if ok else min(0.0, term) for term, ok in zip(terms, right, strict=True)]


def rules_rewards(right: list[bool], tokens: list[int], fmt: list[float], *, max_tokens: int,
                  weights: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> list[float]:
    """The paper's stage-2 reward (arXiv 2507.08267), without a judge:
    R_i = weights[0] f_i + weights[1] cosine_reward_i + weights[2] length_reward_i.

    With the paper's weights (1, 1, 1) a right completion that is the longest of its group (0.1 - 0.5) can get
    less than a wrong one that is well formatted (1 - 0.1): that is the control as published. `judge_rewards`
    can't. """
    cosine = cosine_reward(tokens, right, max_tokens=max_tokens)
    parts = zip(fmt, cosine, length_reward(tokens, right), strict=True)
    return [sum(weight * part for weight, part in zip(weights, row, strict=True)) for row in parts]


def overlong_penalty(tokens: list[int], *, max_new_tokens: int, buffer: float) -> list[float]:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), to be added to the rewards: 0 up to
    max_new_tokens - b, then falling linearly to -1 at max_new_tokens, with b = buffer * max_new_tokens."""
    width = max(1.0, buffer * max_new_tokens)
    return [min(0.0, max(-1.0, (max_new_tokens - width - n) / width)) for n in tokens]


def group_advantages(rewards, *, scale: str = "group", valid=None) -> torch.Tensor:
    """Advantages relative to the group (DeepSeekMath, arXiv 2402.03300): r - mean, divided by the group's
    population standard deviation when scale="group"; undivided when scale="none" (Dr. GRPO, arXiv
    2503.20783).

    rewards (P, G) and valid (P, G) bool, as tensors or nested lists; -> (P, G) fp32. Rows with valid False
    (masked, truncated) enter neither mean nor deviation and get 0. Groups whose valid rewards are all equal
    get exact zeros: there is nothing to learn from them. """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)                              # (P, G)
    valid = torch.ones_like(rewards) if valid is None else torch.as_tensor(valid).to(rewards)
    count = valid.sum(1, keepdim=True).clamp(min=1)                                      # (P, 1)
    centred = (rewards - (rewards * valid).sum(1, keepdim=True) / count) * valid
    deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
    if scale == "group":
        centred = centred / deviation.clamp(min=1e-12)
    elif scale != "none":
        raise UserError(f"scale_advantage={scale!r}: use group or none")
    return torch.where(deviation > 1e-8, centred, 0.0).float()
