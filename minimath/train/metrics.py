"""What an RL step tells about itself: its metrics, and a group of completions to look at."""
import statistics

import torch

from minimath.config.schema import LossOptions
from minimath.data.sample import Group
from minimath.train.losses import PolicyRows, importance_weight
from minimath.train.rewards import part_metrics

ENGINE_METRICS = ("max_num_seqs", "seq_fill", "weights")


def rollout_metrics(kept: list[Group], seen: list[Group], engine) -> dict:
    """Metrics of a step's rollouts: groups with a signal, and all that were sampled."""
    samples = [sample for group in seen for sample in group.samples]
    correct = [sample.tokens for sample in samples if sample.correct]
    of_engine = engine.metrics()
    rewards = [s.reward for s in samples if s.reward is not None]
    return {"reward/mean": statistics.fmean(rewards) if rewards else None,
            "rollout/correct": statistics.fmean(s.correct for s in samples),
            "rollout/tokens": statistics.fmean(s.tokens for s in samples),
            "rollout/correct_tokens": statistics.fmean(correct) if correct else None,
            "rollout/finished": statistics.fmean(s.finished for s in samples), "rollout/samples": len(samples),
            "rollout/groups": len(kept), "rollout/dropped_groups": len(seen) - len(kept),
            "rollout/surprisal": statistics.fmean(-logp for s in samples for logp in s.logp),
            **part_metrics(seen), **{f"rollout/{k}": of_engine[k] for k in ENGINE_METRICS if k in of_engine}}


def token_metrics(options: LossOptions, rows: PolicyRows, stats, full_logp: torch.Tensor,
                  trained: torch.Tensor) -> dict[str, float]:
    """Sum figures over the trained tokens of a micro-batch.

    stats, full_logp (N,), trained (N,) bool. policy/off_policy: tokens whose probability is beyond [0.9, 1.1] of that
    in the rollout, both before top-p and the like. policy/reweighted: tokens whose weight was cut to the cap.
    """
    logp, sampled = stats.logp[trained], rows.sampled_logp[trained]
    old = logp if rows.old_logp is None else rows.old_logp[trained]
    ratio = torch.exp(logp - old if rows.seq_log_ratio is None else rows.seq_log_ratio[trained])
    drift = torch.exp(logp - full_logp[trained])
    weight = importance_weight(old - sampled, options.importance_cap)
    sums = {"policy/entropy": stats.entropy[trained].sum(),
            "policy/clipped": ((ratio < 1 - options.clip_low) | (ratio > 1 + options.clip_high)).sum(),
            "policy/off_policy": ((drift < 0.9) | (drift > 1.1)).sum()}
    if options.importance_cap:
        sums["policy/reweighted"] = (weight != torch.exp(old - sampled)).sum()
    if rows.ref_logp is not None:
        d = rows.ref_logp[trained] - logp
        sums["policy/kl"] = (torch.exp(d) - d - 1).sum()
    return {name: float(value) for name, value in sums.items()}


def show_group(group: Group, step: int, log) -> None:
    """Keep one whole group in samples.jsonl and print its best and its worst sample."""
    samples = group.samples
    log.sample({"step": step, "problem": group.example.problem, "answer": group.example.answer,
                "texts": [s.text for s in samples], "correct": [s.correct for s in samples],
                "rewards": [s.reward for s in samples], "advantages": [s.advantage for s in samples]})
    order = sorted((s for s in samples if s.reward is not None), key=lambda s: s.reward)
    for what, s in (("best", order[-1]), ("worst", order[0])):
        parts = "".join(f", {name} {value:.2f}" for name, value in s.parts.items() if value is not None)
        log.show(f"step {step}, {what} of {len(order)} (reward {s.reward:.2f}, "
                 f"{'correct' if s.correct else 'wrong'}{parts}, {s.tokens} tokens)", s.text)
