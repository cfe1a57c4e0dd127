"""Rewards of the samples of one problem. Lengths are in tokens, every minimum and maximum is taken over one group."""
import math
import statistics
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from minimath.config.options import as_number, options_of, user_function
from minimath.config.schema import RLAIFConfig
from minimath.core import dist
from minimath.core.errors import UserError
from minimath.core.text import no_effect
from minimath.data.sample import Group
from minimath.grading.answer import extract_answer
from minimath.judges.judge import Judge, judge_groups, make_judge
from minimath.models.policy import Policy
from minimath.train.brevity import BrevityControl, brevity, cosine, minmax

PENALTY_SHARE = 0.2  # of max_new_tokens, over which overlong=penalty grows
SUMS = ("comparisons", "no_votes", "skipped", "fallbacks", "seconds")  # of the judge's calls of a step
MEANS = ("position_bias", "order_conflicts")  # of the pairs that have both votes


class Reward:
    """Gives every sample of a group its reward and the parts that it is made of.

    This one gives nothing: a teacher alone speaks."""

    def __init__(self, cfg: RLAIFConfig, judge: Judge | None = None):
        self.options, self.max_new_tokens = cfg.reward, cfg.sampling.max_new_tokens
        self.judge_of, self.stats = judge, []
        unweighed = replace(cfg.brevity, scale="together", control="none")  # of those without a length term
        self.control = BrevityControl(cfg.brevity if cfg.reward.name == "judge" else unweighed)

    def score(self, groups: list[Group]) -> None:
        """Set reward, win and parts of all samples."""
        if dist.is_main():  # a judge's call costs, and a user's function may throw dice; all get its result
            if self.judge_of:
                self.judge(groups)
            for group in groups:
                rewards = self.rewards(group)
                if self.options.overlong == "penalty":
                    penalty = overlong_penalty([s.tokens for s in group.samples], self.max_new_tokens)
                    rewards = penalised(rewards, [s.correct for s in group.samples], penalty)
                for sample, reward in zip(group.samples, rewards, strict=True):
                    sample.reward = reward
        for group, scored in zip(groups, dist.broadcast(groups), strict=True):
            group.samples = scored.samples

    def judge(self, groups: list[Group]) -> None:
        """Set the win probabilities of all groups."""
        wins, stats = judge_groups(self.judge_of, groups)
        self.stats.append(stats)
        for group, of_group in zip(groups, wins, strict=True):
            for sample, win in zip(group.samples, of_group, strict=True):
                sample.win = win

    def rewards(self, group: Group) -> list[float]:
        """One reward per sample, without the penalty of overlong ones; sets the parts."""
        return [0.0] * len(group.samples)

    def metrics(self) -> dict:
        """Figures of the judge since the last call; of process 0 alone."""
        judged, self.stats = self.stats, []
        if not judged:
            return {}
        metrics = {name: sum(s[name] for s in judged) for name in SUMS}
        for name in dict.fromkeys(name for s in judged for name in s["counts"]):  # of an endpoint: faults, cost
            metrics[name.replace(" ", "_")] = sum(s["counts"].get(name, 0) for s in judged)
        voted = sum(s["voted"] for s in judged)
        for name in MEANS if voted else ():
            metrics[name] = sum(s[name] * s["voted"] for s in judged) / voted
        metrics["error"] = next((s["error"] for s in judged if s["error"]), "")
        return {f"judge/{name}": value for name, value in metrics.items()}


class JudgeReward(Reward):
    """Rewards correctness, judge wins, brevity, format and steps that hold.

    R_i = c_i (1 + judge_weight (2 w_i - 1) + brevity_weight l_i) + format_weight f_i - step_weight e_i. c_i in {0, 1}:
    correct; w_i in [0, 1]: mean win probability over the other correct samples, 1/2 without a vote; l_i in [-1, 1]:
    `brevity`; f_i in {0, 1}: `format_score`; e_i in {0, 1}: an equation of it does not hold, which also tells wrong
    samples apart. The bounds of the weights keep every correct sample above every wrong one. With brevity_scale=apart
    l_i is no part of R_i: `set_advantages` adds it."""

    def rewards(self, group: Group) -> list[float]:
        options, brevity_weight = self.options, self.control.weight - self.control.advantage_weight
        lengths, rewards = brevity(group.samples, self.control.options, self.max_new_tokens), []
        for s, length in zip(group.samples, lengths, strict=True):
            s.parts = {"judge": s.win, "brevity": length, "format": format_score(s.solution)}
            judged = 0.0 if s.win is None else options.judge_weight * (2.0 * min(1.0, max(0.0, s.win)) - 1.0)
            correct = 1.0 + judged + brevity_weight * length if s.correct else 0.0
            rewards.append(correct + options.format_weight * s.parts["format"])
            if options.step_weight:
                s.parts["wrong_step"] = float(not s.steps.sound)
                rewards[-1] -= options.step_weight * s.parts["wrong_step"]
        of_wrong = [r for r, s in zip(rewards, group.samples, strict=True) if not s.correct]
        assert all(r > max(of_wrong, default=-math.inf) for r, s in zip(rewards, group.samples) if s.correct), rewards
        return rewards


class PaperReward(Reward):
    """R_i = format_i + cosine_i + length_i: the paper's stage 2 (arXiv 2507.08267 section 3.2), without a judge.

    As published, a long correct sample (0.1 - 0.5) can get less than a well-formed wrong one (1 - 0.1)."""

    def rewards(self, group: Group) -> list[float]:
        tokens, correct = [s.tokens for s in group.samples], [s.correct for s in group.samples]
        waves = cosine_reward(tokens, correct, max_tokens=self.max_new_tokens)
        for sample, wave, length in zip(group.samples, waves, length_reward(tokens, correct), strict=True):
            sample.parts = {"format": format_score(sample.text), "cosine": wave, "length": length}
        return [sum(sample.parts.values()) for sample in group.samples]


class HookReward(Reward):
    """Asks the user's fn: samples and example in, one finite number or None per sample out."""

    def __init__(self, *args):
        super().__init__(*args)
        self.fn, self.name = user_function(self.options.name, "reward")

    def rewards(self, group: Group) -> list[float]:
        """Raise UserError that names the function and what it returned or raised."""
        try:
            values = self.fn(group.samples, group.example)
            values = values.tolist() if hasattr(values, "tolist") else values
            wrong = not isinstance(values, (list, tuple)) or len(values) != len(group.samples)
            numbers = [] if wrong else [None if value is None else as_number(value) for value in values]
        except Exception as error:
            raise UserError(f"reward={self.name} raised {type(error).__name__}: {error}") from error
        if wrong or any(number is None and value is not None for number, value in zip(numbers, values)):
            raise UserError(f"reward={self.name} returned {str(values)[:200]}; it must return a list of "
                            f"{len(group.samples)} finite numbers, one per sample, or None for those that do not count")
        return numbers


def training_judge(cfg: RLAIFConfig, policy: Policy, say: Callable[[str], None]) -> Judge | None:
    """Make the judge that the reward asks, or None, and try it; or UserError."""
    if not cfg.uses_judge():
        return None
    judge = make_judge(cfg.judge, policy, micro_batch_tokens=cfg.optimizer.micro_batch_tokens, say=say)
    if dist.is_main():
        judge.ping()
    return judge


def idle_options(cfg: RLAIFConfig) -> list[str]:
    """Say what has no effect: no error, as a recipe may set it and the command line another reward."""
    known, form, idle = options_of(RLAIFConfig), cfg.brevity.name, {}  # option: where it does nothing
    judging = [name for name, option in known.items() if option.group == "judge" and name != "judge"]
    lengths = [name for name in known if name.startswith("brevity_") and name != "brevity_limit"]
    for where, there, names in (
            (f"with brevity={form}", form != "truncate", lengths),
            ("without reward=judge", cfg.reward.name == "judge", ["judge_weight", "format_weight", "step_weight",
                                                                  *["brevity"] * (form != "truncate"), *lengths]),
            (f"with brevity={form}", form in ("ratio", "log"), ["brevity_yardstick"]),
            ("without a teacher=", cfg.teacher.name, ["teacher_weight", "teacher_kl"]),
            ("where neither reward nor verifier asks a judge", cfg.uses_judge(), judging),
            ("without judge_refresh=N", cfg.judge.refresh, ["judge_refresh_steps", "judge_refresh_lr"])):
        for name in names if not there else ():
            if cfg.value(name) != known[name].default:
                idle.setdefault(name, where)
    return [no_effect([name for name in idle if idle[name] == where], where) for where in dict.fromkeys(idle.values())]


def make_reward(cfg: RLAIFConfig, judge: Judge | None) -> Reward:
    """Make the reward that cfg.reward.name says. Raises UserError."""
    kinds = {"judge": JudgeReward, "paper": PaperReward, "none": Reward}
    return kinds.get(cfg.reward.name, HookReward)(cfg, judge if cfg.judges_rewards() else None)


def part_metrics(groups: list[Group]) -> dict:
    """Average the parts; of the judge's wins the distance of best and worst."""
    metrics, names = {}, {"judge": "judge_spread", "mean": "part_mean"}  # reward/mean is that of the reward itself
    for name in dict.fromkeys(name for group in groups for sample in group.samples for name in sample.parts):
        rows = [[v for s in group.samples if (v := s.parts.get(name)) is not None] for group in groups]
        values = [max(row) - min(row) for row in rows if row] if name == "judge" else [v for row in rows for v in row]
        if values:
            metrics[f"reward/{names.get(name, name)}"] = statistics.fmean(values)
    return metrics


# ---- the parts

def format_score(text: str) -> float:
    """Return 1.0 for a complete, non-empty box before any </think>, else 0.0."""
    return float(extract_answer(text.partition("</think>")[0], strict=True) is not None)


def cosine_reward(tokens: list[int], correct: list[bool], *, max_tokens: int) -> list[float]:
    """Score accuracy as a cosine over length; arXiv 2502.03373.

    With t = min(1, n / max_tokens), a correct sample falls from 1 to 0.1 as (1 + cos(pi t)) / 2 does, a wrong one rises
    from -1 to -0.1: giving up early must not pay. The ranges are the paper's, whose max_tokens was 30,000, counted in
    characters."""
    at_zero, at_end = np.where(correct, 1.0, -1.0), np.where(correct, 0.1, -0.1)
    return (at_end + (at_zero - at_end) * (1.0 + cosine(np.array(tokens), max_tokens)) / 2.0).tolist()


def length_reward(tokens: list[int], correct: list[bool]) -> list[float]:
    """Score length as Kimi k1.5 does; arXiv 2501.12599.

    lambda_i = 1/2 - (n_i - min) / (max - min) over the whole group; a correct sample gets lambda_i, a wrong one
    min(0, lambda_i). 0.0 when all are equally long."""
    terms = (minmax(np.array(tokens, dtype=float)) / 2).tolist() if tokens else []
    return [term if ok else min(0.0, term) for term, ok in zip(terms, correct, strict=True)]


def overlong_penalty(tokens: list[int], max_new_tokens: int) -> list[float]:
    """Punish length softly, as DAPO does; arXiv 2503.14476, eq. 13.

    0 up to max_new_tokens - b, then falling linearly to -1 at max_new_tokens, with b = PENALTY_SHARE * max_new_tokens.
    """
    width = max(1.0, PENALTY_SHARE * max_new_tokens)
    return [min(0.0, max(-1.0, (max_new_tokens - width - n) / width)) for n in tokens]


def penalised(rewards: list[float], correct: list[bool], penalty: list[float]) -> list[float]:
    """Add penalties so that correct still beats wrong, unlike DAPO's.

    R_i + p_i for wrong samples; R_i + p_i min(1, gap / 2) for correct ones, where gap >= 0 is the least correct reward
    less the greatest wrong one. Without a wrong one in the group the penalty is whole."""
    known = [(r, ok) for r, ok in zip(rewards, correct, strict=True) if r is not None]
    wrong = [r for r, ok in known if not ok]
    lowest = min((r for r, ok in known if ok), default=0.0)
    share = min(1.0, max(0.0, lowest - max(wrong)) / 2.0) if wrong else 1.0
    return [None if r is None else r + p * (share if ok else 1.0)
            for r, p, ok in zip(rewards, penalty, correct, strict=True)]
