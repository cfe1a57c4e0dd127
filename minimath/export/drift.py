"""Measure how far a merged model is from the live adapter, on its own completions."""
import contextlib
import random
from pathlib import Path
from typing import NamedTuple

import torch

from minimath.config.schema import EvalConfig
from minimath.core.errors import UserError
from minimath.data.examples import load_examples
from minimath.data.problems import make_problems
from minimath.export.model_card import shown
from minimath.models.load import base_causal_lm, compute_dtype, inference
from minimath.models.policy import Policy, load_policy
from minimath.rollout.open import open_engine

LONGEST_PROMPT = 1024  # tokens; longer problems are left out of the measurement


class Drift(NamedTuple):
    """How far next-token distributions moved from the live to the merged model."""
    kl: float         # mean KL(live || merged), nats
    worst: float      # largest |change| of the log-prob of live's greedy token, nats
    agreement: float  # share where both have the same greedy token
    tokens: int

    def __str__(self) -> str:
        return (f"mean KL {self.kl:.2e} nats a token, greedy token the same on {100 * self.agreement:.1f}% of "
                f"{self.tokens} tokens, its log-prob moved by at most {self.worst:.2g}")


def drift_texts(policy: Policy, cfg: EvalConfig, count: int) -> tuple[list[tuple[list[int], list[int]]], str]:
    """Write the live adapter's greedy completions of `count` problems.

    Returns ([(prompt ids, completion ids)], where the problems are from). The problems are those of cfg.data, else made
    ones. Raises UserError when no prompt is short enough.
    """
    problems, path = [], cfg.data.source
    if path and Path(path).exists():
        with contextlib.suppress(UserError):  # it may have changed since: the made ones do as well
            problems = [e.problem for e in load_examples(cfg.data)[0] if e.problem]
    if problems:
        problems = random.Random(0).sample(problems, min(count, len(problems)))
        source = f"{len(problems)} problems of {shown(path)}"
    else:
        problems, source = [e.problem for e in make_problems(count, seed=0, split="test")], f"{count} made problems"
    prompts = [ids for ids in map(policy.prompt_ids, problems) if len(ids) <= LONGEST_PROMPT]
    if not prompts:
        raise UserError(f"none of the {source} fits {LONGEST_PROMPT} tokens; the drift can't be measured on them")
    with open_engine(cfg.engine, cfg.sampling, policy) as engine:
        return [(prompt, group[0].ids) for prompt, group in zip(prompts, engine.generate(prompts))], source


def completion_logits(model, texts) -> list[torch.Tensor]:
    """Compute the logits that each token of the completions is drawn from, (C, V) fp32."""
    out, base = [], base_causal_lm(model)
    with inference(model), compute_dtype(model):
        for prompt, completion in texts:
            ids = torch.tensor([prompt + completion], device=base.device)
            logits = base(input_ids=ids, use_cache=False, logits_to_keep=len(completion) + 1).logits[0]
            out.append(logits[-len(completion) - 1:-1].float().cpu())
    return out


def compare(live: list[torch.Tensor], merged: list[torch.Tensor]) -> Drift:
    """Compare lists of logits, (C, V) each, in float64: fp32 alone would show 1e-7."""
    kl, worst, same, tokens = 0.0, 0.0, 0, 0
    for before, after in zip(live, merged, strict=True):
        p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        greedy = p.argmax(-1, keepdim=True)
        worst = max(worst, float((p - q).gather(-1, greedy).abs().max()))
        same += int((greedy[:, 0] == q.argmax(-1)).sum())
        tokens += len(p)
    return Drift(kl / tokens, worst, same / tokens, tokens)


def nf4_drift(cfg: EvalConfig, texts, merged: list[torch.Tensor]) -> str:
    """Say how far the merged model is from the 4-bit one: no reason to refuse."""
    try:
        found = compare(completion_logits(load_policy(cfg.replace(quant="nf4"), train=False).model, texts), merged)
    except (UserError, RuntimeError) as error:
        return f"drift from the 4-bit model in training: not measured ({str(error).splitlines()[0]})"
    return f"drift from the 4-bit model in training, whose rounding the base does not have: {found}"
