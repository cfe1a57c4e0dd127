"""Rewards of a group of completions of one problem, and their group-relative advantages.

Three reward modes. `judge_rewards` is RLAIF: a right/wrong gate, the share of comparisons won before an AI
judge, and brevity among the right ones. `parts_rewards` (reward=rules) is a weighted sum of named parts, by
default the paper's stage 2 (arXiv 2507.08267), the control: format, accuracy as a cosine over length, and a
length rule, with no judge. `hook_rewards` is the user's own function. All lengths are in tokens, and every
minimum and maximum is taken over one group. Lists are per completion, in the order of the group. """
from __future__ import annotations

import math
from typing import NamedTuple

import torch

from minimath.grading.answer import extract_answer
from minimath.core.errors import UserError
from minimath.core.text import comma_list, did_you_mean
from minimath.data.examples import Example
from minimath.config.hooks import HOOK, as_number, load_function


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


def check_weights(judge_weight: float, brevity_weight: float, format_weight: float) -> None:
    """Raises UserError unless the weights keep every right completion above every wrong one: the lowest right
    reward is 1 - judge_weight - brevity_weight (at least 0.5), the highest wrong one format_weight."""
    if min(judge_weight, brevity_weight, format_weight) < 0 or judge_weight + brevity_weight > 0.5 or format_weight >= 0.5:
        weights = f"judge_weight={judge_weight:g}, brevity_weight={brevity_weight:g}, format_weight={format_weight:g}"
        raise UserError(f"{weights}: with these a wrong answer could outrank a right one; "
                        "keep judge_weight + brevity_weight <= 0.5 and format_weight < 0.5, none negative")


def judge_rewards(right: list[bool], win: list[float | None], length: list[float], fmt: list[float], *,
                  judge_weight: float, brevity_weight: float, format_weight: float = 0.0) -> list[float]:
    """R_i = c_i (1 + judge_weight (2 w_i - 1) + brevity_weight l_i) + format_weight f_i.

    c_i in {0, 1} is the answer gate, w_i in [0, 1] the mean win probability over the other right completions
    (None, no vote: its term is left out, as for w_i = 1/2), l_i in [-1, 1] from `length_term`, f_i in [0, 1]
    the format. A right completion gets more than any wrong one, whatever the judge says: the weights are
    checked, and so is the result. Raises UserError for weights that would allow otherwise. """
    check_weights(judge_weight, brevity_weight, format_weight)
    rewards = []
    for ok, w, term, f in zip(right, win, length, fmt, strict=True):
        judged = 0.0 if w is None else judge_weight * (2.0 * min(1.0, max(0.0, w)) - 1.0)
        rewards.append((1.0 + judged + brevity_weight * term if ok else 0.0) + format_weight * f)
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


class GroupFacts(NamedTuple):
    """What is known of the G completions of one problem when they are rewarded; lists are per completion."""
    example: Example
    texts: list[str]
    right: list[bool]       # by the gate; a cut completion is wrong
    tokens: list[int]       # length
    ended: list[bool]       # False: cut at max_tokens
    format: list[float]     # format_score
    win: list[float | None]  # win probability before the judge, None: no vote (wrong, or no judge)
    max_tokens: int


PARTS = {  # of reward=paper, by name: facts -> one value per completion
    "right": lambda g: [float(ok) for ok in g.right],
    "format": lambda g: g.format,
    "cosine": lambda g: cosine_reward(g.tokens, g.right, max_tokens=g.max_tokens),
    "length": lambda g: length_reward(g.tokens, g.right),
    "brevity": lambda g: length_term(g.tokens, g.right),
    "judge": lambda g: [0.0 if w is None or not ok else 2.0 * w - 1.0 for w, ok in zip(g.win, g.right, strict=True)],
}


def parse_parts(text: str) -> dict[str, float]:
    """"format=1,cosine=0.5,python:mine.fn=2" -> {part: weight}. Raises UserError."""
    parts = {}
    for item in comma_list(text):
        name, _, number = (word.strip() for word in item.partition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight) or name in parts:
            raise UserError(f"reward_parts: {item!r}: write name=weight, each name once, as in format=1,cosine=0.5")
        if name not in PARTS and not name.startswith(HOOK):
            raise UserError(f"reward_parts: unknown part {name!r}{did_you_mean(name, PARTS)}; use "
                            f"{', '.join(PARTS)} or python:module.fn")
        parts[name] = weight
    if not parts:
        raise UserError("reward_parts is empty; the paper's are format=1,cosine=1,length=1")
    return parts


def hook_rewards(spec: str, facts: GroupFacts, option: str = "reward") -> list[float]:
    """fn(texts, facts) -> one number per completion, from the user's `python:module.fn`. Raises UserError that names
    the function and what it returned or raised."""
    fn = load_function(spec, option)
    try:
        values = fn(facts.texts, facts)
        values = values.tolist() if hasattr(values, "tolist") else values
        numbers = [as_number(value) for value in values] if isinstance(values, (list, tuple)) else None
    except Exception as error:
        raise UserError(f"{option}={spec} raised {type(error).__name__}: {error}") from error
    if numbers is None or len(numbers) != len(facts.texts) or None in numbers:
        raise UserError(f"{option}={spec} returned {str(values)[:200]}; it must return a list of "
                        f"{len(facts.texts)} finite numbers, one per completion")
    return numbers


def parts_rewards(facts: GroupFacts, parts: dict[str, float]) -> list[float]:
    """R_i = sum over the named parts of weight * part_i. With format=1,cosine=1,length=1 the paper's stage-2 reward
    (arXiv 2507.08267), without a judge. Parts are

      right    1 right, 0 wrong                      format   `format_score`
      cosine   `cosine_reward`, right and wrong      length   `length_reward`, Kimi k1.5's
      brevity  `length_term`, among the right only   judge    2 w - 1 among the right, w the win probability
      python:module.fn   what `hook_rewards` returns

    As published, a right completion that is the longest of its group (0.1 - 0.5) can get less than a wrong one
    that is well formatted (1 - 0.1): a sum keeps no order by itself. `judge_rewards` does. """
    rows = [PARTS[name](facts) if name in PARTS else hook_rewards(name, facts, "reward_parts") for name in parts]
    return [sum(w * value for w, value in zip(parts.values(), row, strict=True)) for row in zip(*rows, strict=True)]


def group_rewards(cfg, facts: GroupFacts) -> list[float]:
    """The rewards of a group by cfg.reward (judge, rules or python:module.fn) and cfg.reward.overlong."""
    if cfg.reward.name == "judge":
        rewards = judge_rewards(facts.right, facts.win, length_term(facts.tokens, facts.right), facts.format,
                                judge_weight=cfg.reward.judge_weight, brevity_weight=cfg.reward.brevity_weight, format_weight=cfg.reward.format_weight)
    elif cfg.reward.name == "rules":
        rewards = parts_rewards(facts, parse_parts(cfg.reward_parts))
    else:
        rewards = hook_rewards(cfg.reward.name, facts)
    if cfg.reward.overlong == "penalty":
        penalty = overlong_penalty(facts.tokens, max_new_tokens=facts.max_tokens, buffer=cfg.overlong_buffer)
        rewards = penalised(rewards, facts.right, penalty)
    return rewards


def uses_judge(cfg) -> bool:
    """Whether any reward depends on a judge: else none is asked, and none needs to be there."""
    if cfg.reward.name == "judge":
        return cfg.reward.judge_weight > 0
    return cfg.reward.name == "rules" and bool(parse_parts(cfg.reward_parts).get("judge"))


def check_reward(cfg) -> None:
    """Raises UserError, before any long work, for weights, part names and functions that can't be used."""
    if cfg.reward.name == "judge":
        check_weights(cfg.reward.judge_weight, cfg.reward.brevity_weight, cfg.reward.format_weight)
    hooks = [cfg.reward.name] if cfg.reward.name not in ("judge", "rules") else []
    if cfg.reward.name == "rules":
        hooks = [name for name in parse_parts(cfg.reward_parts) if name.startswith(HOOK)]
    for spec in hooks:
        load_function(spec, "reward")


def overlong_penalty(tokens: list[int], *, max_new_tokens: int, buffer: float) -> list[float]:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13): 0 up to max_new_tokens - b, then falling
    linearly to -1 at max_new_tokens, with b = buffer * max_new_tokens."""
    width = max(1.0, buffer * max_new_tokens)
    return [min(0.0, max(-1.0, (max_new_tokens - width - n) / width)) for n in tokens]


def penalised(rewards: list[float], right: list[bool], penalty: list[float]) -> list[float]:
    """R_i + p_i for wrong completions; R_i + p_i min(1, gap / 2) for right ones, where gap >= 0 is the least right
    reward less the greatest wrong one. Unbounded (as DAPO adds it) a long right answer of reward 0.6 would fall to
    -0.4, below a short wrong one: the policy would learn that giving up beats finishing. Bounded by half the gap it
    stays above every wrong one; without a wrong one in the group the penalty is whole."""
    wrong = [r for r, ok in zip(rewards, right, strict=True) if not ok]
    lowest = min((r for r, ok in zip(rewards, right, strict=True) if ok), default=0.0)
    share = min(1.0, max(0.0, lowest - max(wrong)) / 2.0) if wrong else 1.0
    return [r + p * (share if ok else 1.0) for r, p, ok in zip(rewards, penalty, right, strict=True)]


def group_advantages(rewards, *, scale: str = "group", valid=None) -> torch.Tensor:
    """Advantages relative to the n valid rewards of a group:

      group: (r_i - mean) / population standard deviation   (GRPO, DeepSeekMath, arXiv 2402.03300)
      none: r_i - mean   (Dr. GRPO, arXiv 2503.20783)
      rloo: r_i - mean of the others = n / (n - 1) (r_i - mean)   (leave-one-out baseline, which keeps the gradient
        unbiased: Kool et al. 2019; Ahmadian et al., arXiv 2402.14740); 0 for a group of one

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
    elif scale == "rloo":
        centred = centred * count / (count - 1).clamp(min=1)
    elif scale != "none":
        raise UserError(f"scale_advantage={scale!r}: use group, none or rloo")
    return torch.where(deviation > 1e-8, centred, 0.0).float()
