"""Measure how far a merged model is from the one that was trained."""
import contextlib
import random
from pathlib import Path
from typing import NamedTuple

import torch

from minimath.config.schema import EvalConfig
from minimath.core.errors import UserError
from minimath.data.examples import load_examples
from minimath.data.problems import make_problems
from minimath.models.forward import base_causal_lm, compute_dtype, inference
from minimath.models.policy import Policy
from minimath.rollout.open import open_engine


class Drift(NamedTuple):
    """How far next-token distributions moved from the trained to the merged model."""
    kl: float         # mean KL(trained || merged), nats
    agreement: float  # share where both have the same greedy token
    tokens: int


def drift_texts(policy: Policy, cfg: EvalConfig, count: int) -> tuple[list[tuple[list[int], list[int]]], str]:
    """Write the model's greedy completions of `count` problems of the run or made.

    Returns ([(prompt ids, completion ids)], where the problems are from). UserError: no prompt is short enough."""
    problems, source = [], cfg.data.source
    if source and Path(source).expanduser().exists():
        with contextlib.suppress(UserError):  # it may have changed since: the made ones do as well
            problems = [example.problem for example in load_examples(cfg.data)[0] if example.problem]
    if not problems:
        problems, source = [example.problem for example in make_problems(count, seed=0, split="test")], "minimath's own"
    problems = random.Random(0).sample(problems, min(count, len(problems)))
    prompts = [ids for ids in map(policy.prompt_ids, problems) if len(ids) <= cfg.prompt.max_prompt_len]
    if not prompts:
        raise UserError(f"none of {len(problems)} problems of {shown(source)} is short enough; raise drift_problems")
    with open_engine(cfg.engine, cfg.sampling, policy) as engine:
        texts = [(prompt, sample.ids) for prompt, [sample] in zip(prompts, engine.generate(prompts))]
    return texts, f"{len(texts)} problems of {shown(source)}"


def shown(text: str) -> str:
    """A path without its folders; anything else as it is."""
    return Path(text).name if text.startswith(("/", ".", "~")) or Path(text).exists() else text


def completion_logits(model, texts) -> list[torch.Tensor]:
    """Compute the logits that a completion's tokens are drawn from: fp32, C by V each."""
    out, base = [], base_causal_lm(model)
    with inference(model), compute_dtype(model):
        for prompt, completion in texts:
            ids = torch.tensor([prompt + completion], device=base.device)
            logits = base(input_ids=ids, use_cache=False, logits_to_keep=len(completion) + 1).logits[0]
            out.append(logits[-len(completion) - 1:-1].float().cpu())
    return out


def compare(trained: list[torch.Tensor], merged: list[torch.Tensor]) -> Drift:
    """Compare lists of logits, C by V each, in float64: fp32 alone would show 1e-7."""
    kl, same, tokens = 0.0, 0, 0
    for before, after in zip(trained, merged, strict=True):
        p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens += len(p)
    return Drift(kl / tokens, same / tokens, tokens)
