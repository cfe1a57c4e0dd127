"""How far a merged model is from the live adapter: next-token distributions on the live adapter's own completions."""
import contextlib
import random
from pathlib import Path
from typing import NamedTuple

import torch

from minimath.data.chat import prompt_ids
from minimath.config.load import config_dict
from minimath.config.schema import EvalConfig
from minimath.core.errors import UserError
from minimath.data.examples import load_examples
from minimath.rollout.open import open_engine
from minimath.models.load import base_causal_lm, compute_dtype, inference, load_model
from minimath.export.model_card import shown
from minimath.data.problems import make_problems

LONGEST_PROMPT = 1024  # tokens; longer problems are left out of the measurement


class Drift(NamedTuple):
    """Of `tokens` next-token distributions: how far the merged model's are from the live adapter's."""
    kl: float         # mean KL(live || merged), nats
    worst: float      # largest |change| of the log-prob of live's greedy token, nats
    agreement: float  # share where both have the same greedy token
    tokens: int

    def __str__(self) -> str:
        return (f"mean KL {self.kl:.2e} nats a token, greedy token the same on {100 * self.agreement:.1f}% of "
                f"{self.tokens} tokens, its log-prob moved by at most {self.worst:.2g}")


def drift_texts(model, tokenizer, load: EvalConfig, run: dict, count: int):
    """([(prompt ids, completion ids)], where the `count` problems are from): greedy completions of the live adapter,
    at most load.max_new_tokens long, since on those its next-token distributions matter."""
    problems, source = [], f"{count} made problems"
    if (path := str(run.get("data", ""))) and Path(path).exists():
        with contextlib.suppress(UserError):  # it may have changed since: the made ones do as well
            problems = [e.problem for e in load_examples(path, split=run.get("split", "train"), need=(),
                                                         data_format=run.get("data_format", "auto"))[0] if e.problem]
    if problems:
        problems = random.Random(0).sample(problems, min(count, len(problems)))
        source = f"{len(problems)} problems of {shown(path)}"
    else:
        problems = [e.problem for e in make_problems(count, seed=0, split="test")]
    prompts = [prompt_ids(tokenizer, problem, system=load.system, prompt_template=load.prompt_template)
               for problem in problems]
    prompts = [prompt for prompt in prompts if len(prompt) <= LONGEST_PROMPT]
    if not prompts:
        raise UserError(f"none of the {source} fits {LONGEST_PROMPT} tokens; the drift can't be measured on them")
    with open_engine(load, model, tokenizer) as sample:
        return [(prompt, group[0].ids) for prompt, group in zip(prompts, sample(prompts, samples=1))], source


def completion_logits(model, texts) -> list[torch.Tensor]:
    """Logits (C, V), fp32 on the CPU, from which each token of each completion is drawn."""
    out, base = [], base_causal_lm(model)
    with inference(model), compute_dtype(model):
        for prompt, completion in texts:
            ids = torch.tensor([prompt + completion], device=base.device)
            logits = base(input_ids=ids, use_cache=False, logits_to_keep=len(completion) + 1).logits[0]
            out.append(logits[-len(completion) - 1:-1].float().cpu())
    return out


def compare(live: list[torch.Tensor], merged: list[torch.Tensor]) -> Drift:
    """Drift from lists of logits (C, V), text by text in float64: fp32 alone would show 1e-7 where nothing changed."""
    kl, worst, same, tokens = 0.0, 0.0, 0, 0
    for before, after in zip(live, merged, strict=True):
        p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        greedy = p.argmax(-1, keepdim=True)
        worst = max(worst, float((p - q).gather(-1, greedy).abs().max()))
        same += int((greedy[:, 0] == q.argmax(-1)).sum())
        tokens += len(p)
    return Drift(kl / tokens, worst, same / tokens, tokens)


def nf4_drift(load: EvalConfig, run: dict, texts, merged: list[torch.Tensor]) -> str:
    """How far the merged model is from the 4-bit one that was trained: larger, and no reason to refuse. In words."""
    four_bit = EvalConfig(**{**config_dict(load), "quant": "nf4", "double_quant": run.get("double_quant", True)})
    try:
        model, _ = load_model(four_bit, train=False)
        found = compare(completion_logits(model, texts), merged)
    except (UserError, RuntimeError) as error:
        return f"drift from the 4-bit model in training: not measured ({str(error).splitlines()[0]})"
    return f"drift from the 4-bit model in training, whose rounding the base does not have: {found}"
