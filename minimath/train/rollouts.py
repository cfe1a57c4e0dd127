"""From problems to groups of verified samples, shared between the processes of a run."""
from collections.abc import Callable

from minimath.config.schema import RLAIFConfig
from minimath.core import dist
from minimath.core.errors import UserError
from minimath.data.examples import Example, describe_report
from minimath.data.sample import Group, Sample
from minimath.models.load import base_causal_lm, inference
from minimath.models.policy import Policy
from minimath.models.variants import is_sharded
from minimath.rollout.transformers_engine import LOGP_TOLERANCE, logp_difference
from minimath.train.curriculum import Problem
from minimath.train.losses import clip_hint
from minimath.train.verifier import Verifier


def encode_problems(cfg: RLAIFConfig, policy: Policy, examples: list[Example], report,
                    say: Callable[[str], None]) -> list[tuple[Example, list[int]]]:
    """Pair examples with prompts that fit, and say so; UserError if too few do."""
    longest = cfg.prompt.max_prompt_len
    prompts = [policy.prompt_ids(example) for example in examples]
    problems = [(e, p) for e, p in zip(examples, prompts, strict=True) if len(p) <= longest]
    if len(problems) < cfg.prompts_per_step:
        raise UserError(f"{len(problems)} of {len(examples)} prompts fit max_prompt_len={longest}, but a step needs "
                        f"{cfg.prompts_per_step}; raise max_prompt_len or lower prompts_per_step")
    if text := describe_report(report):
        say(text)
    reward = getattr(cfg.reward.name, "__name__", cfg.reward.name)
    verifier = getattr(cfg.verifier, "__name__", cfg.verifier)
    judge = f" with judge {cfg.judge.name}" if cfg.uses_judge() else ""
    say(f"{len(problems)} problems ({len(examples) - len(problems)} too long), reward={reward}{judge}, "
        f"verifier={verifier}, loss={cfg.loss.name}")
    if hint := clip_hint(cfg):
        say(hint)
    return problems


def check_logp(engine, prompt: list[int], sample: Sample) -> None:
    """Raise UserError when the rollout's log-probs are not the training forward's.

    vLLM's engine looks by itself, at a probe; a forward of a sharded model is work of all processes.
    """
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
