"""From problems to groups of verified samples, shared between the processes; and what a step tells about them."""
import statistics
from collections.abc import Callable, Iterable

import torch

from minimath.config.schema import LossOptions, RLAIFConfig
from minimath.core import dist
from minimath.core.errors import UserError
from minimath.data.examples import Example, describe_report
from minimath.data.sample import Group, Sample
from minimath.models.forward import base_causal_lm, inference
from minimath.models.policy import Policy
from minimath.models.variants import is_sharded
from minimath.rollout.transformers_engine import LOGP_TOLERANCE, logp_difference
from minimath.train.curriculum import Problem
from minimath.train.losses import PolicyRows, clip_hint, importance_weight
from minimath.train.rewards import idle_options, part_metrics
from minimath.train.verifier import Verifier

ENGINE_METRICS = ("max_num_seqs", "seq_fill", "weights", "graph_replays", "plain_steps")


def encode_problems(cfg: RLAIFConfig, policy: Policy, examples: list[Example], report,
                    say: Callable[[str], None]) -> list[tuple[Example, list[int]]]:
    """Pair examples with prompts that fit, and say so; UserError if too few do."""
    longest = cfg.prompt.max_prompt_len
    own = sum(bool(example.messages) and example.messages[0]["role"] == "system" for example in examples)
    if cfg.teacher.system and own:
        raise UserError(f"teacher_system= has no place in {own} chat rows that begin with a system message: take it "
                        "out of them, or leave teacher_system= out")
    prompts = [policy.prompt_ids(example) for example in examples]
    problems = [(e, p) for e, p in zip(examples, prompts, strict=True) if len(p) <= longest]
    if len(problems) < cfg.prompts_per_step:
        raise UserError(f"{len(problems)} of {len(examples)} prompts fit max_prompt_len={longest}, but a step needs "
                        f"{cfg.prompts_per_step}; raise max_prompt_len or lower prompts_per_step")
    if text := describe_report(report):
        say(text)
    reward = getattr(cfg.reward.name, "__name__", cfg.reward.name)
    verifier = getattr(cfg.verifier, "__name__", cfg.verifier)
    judge = f" with judge {cfg.judge.adapter or cfg.judge.name}" if cfg.uses_judge() else ""
    say(f"{len(problems)} problems ({len(examples) - len(problems)} too long), reward={reward}{judge}, "
        f"verifier={verifier}, loss={cfg.loss.name}")
    for hint in filter(None, [clip_hint(cfg), *idle_options(cfg)]):
        say(hint)
    return problems


def check_logp(engine, prompt: list[int], sample: Sample) -> None:
    """Raise UserError when the rollout's log-probs are not the training forward's.

    vLLM's engine looks by itself, at a probe; a forward of a sharded model is work of all processes."""
    model = engine.policy.model
    if engine.options.rollout == "vllm" or is_sharded(model):
        return
    with inference(model):
        difference = logp_difference(model, prompt, sample, engine.how.temperature)
    if difference > LOGP_TOLERANCE.get(base_causal_lm(model).dtype, 0.1):  # NaN is counted by the optimizer
        raise UserError(f"the rollout's log-probs are {difference:.2g} away from those of the training forward: it "
                        "samples with other weights, such as those without the adapter; try rollout=transformers")


def sample_groups(engine, verifier: Verifier, drawn: list[Problem], group_size: int) -> list[Group]:
    """Sample and verify a group of each problem, shared between the processes."""
    mine = dist.shard(drawn)
    sampled = engine.generate([p.prompt for p in mine], group_size, keys=[p.key for p in mine])
    groups = [Group(p.example, p.prompt, samples) for p, samples in zip(mine, sampled, strict=True)]
    if groups:
        check_logp(engine, groups[0].prompt, groups[0].samples[0])
    verifier.mark(groups)
    return dist.gather(groups)


# ---- what a step tells

def rollout_metrics(kept: list[Group], seen: list[Group], engine) -> dict:
    """Metrics of a step's rollouts: groups with a signal, and all that were sampled."""
    samples, of_engine = [sample for group in seen for sample in group.samples], engine.metrics()

    def mean(values: Iterable[float]) -> float | None:
        return statistics.fmean(values) if (values := list(values)) else None

    metrics = {"reward/mean": mean(s.reward for s in samples if s.reward is not None),
               "rollout/correct": mean(s.correct for s in samples), "rollout/tokens": mean(s.tokens for s in samples),
               "rollout/correct_tokens": mean(s.tokens for s in samples if s.correct),
               "rollout/finished": mean(s.finished for s in samples), "rollout/samples": len(samples),
               "rollout/groups": len(kept), "rollout/dropped_groups": len(seen) - len(kept),
               "rollout/surprisal": mean(-logp for s in samples for logp in s.logp)}
    if any(s.thought for s in samples):
        metrics["rollout/thought_tokens"] = mean(s.thought for s in samples)
        metrics["rollout/answer_tokens"] = mean(s.tokens - s.thought for s in samples)
    return metrics | part_metrics(seen) | {f"rollout/{k}": of_engine[k] for k in ENGINE_METRICS if k in of_engine}


def token_metrics(options: LossOptions, rows: PolicyRows, stats, full_logp: torch.Tensor,
                  trained: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sum figures over the trained tokens of a micro-batch, on their device.

    stats, full_logp (N,), trained (M,) int64: their rows. policy/off_policy: tokens whose probability is beyond [0.9,
    1.1] of that in the rollout, both before top-p and the like. policy/reweighted: tokens whose weight was cut to the
    cap."""
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
    return sums


def show_group(group: Group, step: int, log) -> None:
    """Keep one whole group in samples.jsonl and print its best and its worst sample."""
    samples = group.samples
    log.sample({"step": step, "problem": group.example.problem, "answer": group.example.answer,
                "texts": [s.text for s in samples], "correct": [s.correct for s in samples],
                "rewards": [s.reward for s in samples], "advantages": [s.advantage for s in samples]})
    order = sorted((s for s in samples if s.reward is not None), key=lambda s: s.reward)
    for what, s in (("best", order[-1]), ("worst", order[0])) if order else ():
        parts = "".join(f", {name} {value:.2f}" for name, value in s.parts.items() if value is not None)
        log.show(f"step {step}, {what} of {len(order)} (reward {s.reward:.2f}, "
                 f"{'correct' if s.correct else 'wrong'}{parts}, {s.tokens} tokens)", s.text)
