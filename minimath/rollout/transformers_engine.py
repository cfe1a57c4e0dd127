"""Rollouts by transformers' `generate`, for models that minimath's own decode loop cannot serve.

Mamba, RWKV and the hybrids of attention and a recurrence keep other state than keys and values; `generate` of each
model knows its own. Slower than rollout.py: every row is prefilled, and a batch lasts as long as its longest row.
transformers' continuous batching is no alternative: in 5.23 it serves full and sliding-window attention alone, which
rollout.py serves as well, and seeds all requests together.

The tokens are not chosen by `generate` but by a logits processor with rollout.py's own sampler, which lets one token
through. So temperature, top-k, min-p, top-p, random streams and recorded log-probs mean the same in both, the
completions do not depend on the batch (up to rounding), and of each step only (n,) numbers are kept, not logits.
"""
import contextlib
import inspect

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from minimath.core.errors import UserError
from minimath.kernels import linear_logp
from minimath.models.load import base_causal_lm, compute_dtype, head, hidden_states, inference
from minimath.rollout.engine import Completion
from minimath.rollout.sampling import Sampling, sample_tokens, stream_noise, stream_seed
from minimath.models.sharding import in_step, is_sharded
from minimath.rollout.kv_cache import check_model

PADDING_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # of the log-probs' spread
LOGP_TOLERANCE = {torch.float32: 0.01}  # median difference from the training forward; 0.1 in 16 bits


def generate_hf(model, tokenizer, prompts: list[list[int]], *, samples: int = 1, max_new_tokens: int,
                temperature: float = 1.0, top_p: float = 1.0, min_p: float = 0.0, top_k: int = 0, eos: list[int],
                seed: int = 0, slots: int = 64, keys: list[int] | None = None, done: dict | None = None,
                on_done=None) -> list[list[Completion]]:
    """Sample `samples` completions of each prompt; arguments and result as in rollout.generate.

    slots: most rows of a batch, 0 for all. on_done is called for all completions of a batch when the batch ends.
    Prompts of unlike length share a batch, left-padded, only if a look at one of them shows that padding does not
    change what this model computes. The model's generation config (its temperature, penalties, forced tokens) counts
    for nothing here. UserError if the log-probs are not those of the training forward (looked at once a call);
    otherwise raises what the model's `generate` raises.
    """
    keys = list(range(len(prompts))) if keys is None else keys
    done = dict(done or {})
    jobs = [(p, s) for p in range(len(prompts)) for s in range(samples) if (p, s) not in done]
    how = Sampling(temperature, top_p, min_p, top_k)
    with inference(model), compute_dtype(model), own_generation_config(model):
        first = None
        for batch, _ in in_step(model, ((b, {}) for b in batches(model, tokenizer.pad_token_id, prompts, jobs,
                                                                 slots or len(jobs)))):
            first = batch if first is None else first
            seeds = [stream_seed(seed, keys[p], s) for p, s in batch] or [0]
            rows = [prompts[p] for p, _ in batch] or [[tokenizer.pad_token_id]]  # a blank one
            completions = _generate(model, tokenizer.pad_token_id, rows, seeds, how, max_new_tokens, eos)
            if batch is first:
                check_logp(model, rows[0], completions[0], temperature)
            for job, completion in zip(batch, completions[:len(batch)], strict=True):
                done[job] = completion
                if on_done is not None:
                    on_done(*job, completion)
    return [[done[p, s] for s in range(samples)] for p in range(len(prompts))]


@contextlib.contextmanager
def own_generation_config(model):
    """Inside, the model has an empty generation config: `generate` fills what a given one leaves open from there."""
    base = base_causal_lm(model)
    theirs, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = theirs


def batches(model, pad: int, prompts: list[list[int]], jobs: list[tuple[int, int]], slots: int):
    """Yield lists of at most `slots` jobs (prompt, sample), by length of the prompt, of one length where they must."""
    jobs = sorted(jobs, key=lambda job: len(prompts[job[0]]))
    mixed = len({len(prompts[p]) for p, _ in jobs}) > 1 and slots > 1
    if is_sharded(model):  # a look at one of them would be work of all processes; recurrent models are refused
        check_model(model)
        mixed = False
    one_length = mixed and not padding_is_harmless(model, pad, prompts[jobs[0][0]], len(prompts[jobs[-1][0]]))
    batch = []
    for job in jobs:
        if len(batch) == slots or one_length and batch and len(prompts[batch[0][0]]) != len(prompts[job[0]]):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def padding_is_harmless(model, pad: int, prompt: list[int], length: int) -> bool:
    """Whether the next-token log-probs of `prompt`, left-padded to `length`, are those without padding.

    Not all recurrent models leave masked tokens out of their state, and none says so in its config.
    """
    base = base_causal_lm(model)
    if "attention_mask" not in inspect.signature(base.forward).parameters:
        return False
    plain, padded = (_first_logp(base, left_pad([prompt], n, pad)) for n in (len(prompt), length))
    return float((plain - padded).abs().mean() / plain.std()) <= PADDING_TOLERANCE.get(base.dtype, 1e-4)


def _first_logp(base, inputs: dict) -> torch.Tensor:
    """Log-probs (V,) of the first new token, by way of `generate`, which knows the model's position ids."""
    seen = _Sampler(torch.zeros(1, 1), Sampling(0.0))
    inputs = {name: value.to(base.device) for name, value in inputs.items()}
    base.generate(**inputs, generation_config=_config(1, [], 0), logits_processor=LogitsProcessorList([seen]))
    return torch.log_softmax(seen.scores[0], -1)


def left_pad(prompts: list[list[int]], length: int, pad: int) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (n, length)."""
    ids = torch.tensor([[pad] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def check_logp(model, prompt: list[int], completion: Completion, temperature: float) -> None:
    """UserError unless the log-probs of a completion are, in the median, those of the training forward.

    `generate` of a seldom used model can be wrong without a sign of it (RWKV's, for more than one row), and a head
    can have a scale that minimath.models.load.head does not know.
    """
    base, difference = base_causal_lm(model), logp_difference(model, prompt, completion, temperature)
    if not difference <= LOGP_TOLERANCE.get(base.dtype, 0.1):
        raise UserError(f"transformers' generate of {type(base).__name__} records log-probs {difference:.2g} away from "
                        "those of the training forward; try slots=1, or use a transformer with softmax attention")


def logp_difference(model, prompt: list[int], completion: Completion, temperature: float, most: int = 64) -> float:
    """Median difference of the first `most` log-probs recorded (before truncation) from the training forward's."""
    lm_head, device = head(model), base_causal_lm(model).device
    ids = torch.tensor([prompt + completion.ids[:most]], device=device)
    hidden = hidden_states(model, ids[:, :-1])[0, len(prompt) - 1:]  # (n, D)
    logp = linear_logp(hidden, lm_head.weight, ids[0, len(prompt):], temperature=temperature or 1.0,
                       **lm_head.kernel_args())
    recorded = torch.tensor((completion.full_logp or completion.logp)[:most], device=device)
    return float((logp.detach() - recorded).abs().median())


class _Sampler(LogitsProcessor):
    """Chooses each row's token and lets `generate`, which is told to be greedy, find no other."""

    def __init__(self, noise: torch.Tensor, how: Sampling):
        self.noise, self.how = noise, how  # (n, T) in [0, 1)
        self.steps = []  # (tokens, logp, full_logp), each (n,)
        self.scores = None  # (n, V) of the newest step

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.scores = scores
        noise = self.noise[:, len(self.steps)].to(scores.device)
        self.steps.append(sample_tokens(scores.clone(), noise, self.how))
        token = self.steps[-1][0]
        return torch.full_like(scores, -torch.inf).scatter_(-1, token[:, None], 0.0)


def _config(max_new_tokens: int, eos: list[int], pad: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=list(eos) or None, pad_token_id=pad,
                            do_sample=False, use_cache=True)


def _generate(model, pad: int, prompts: list[list[int]], seeds: list[int], how: Sampling, max_new_tokens: int,
              eos: list[int]) -> list[Completion]:
    """One batch of `generate`, cut at the end tokens."""
    base = base_causal_lm(model)
    sampler = _Sampler(torch.stack([stream_noise(seed, max_new_tokens) for seed in seeds]), how)
    inputs = left_pad(prompts, max(map(len, prompts)), pad)
    if all(inputs["attention_mask"].flatten().tolist()):
        del inputs["attention_mask"]  # not every model takes one
    base.generate(**{name: value.to(base.device) for name, value in inputs.items()},
                  generation_config=_config(max_new_tokens, eos, pad), logits_processor=LogitsProcessorList([sampler]),
                  synced_gpus=is_sharded(model))
    tokens, logps, full_logps = (torch.stack(part, 1).tolist() for part in zip(*sampler.steps, strict=True))
    ends, completions = set(eos), []
    for ids, logp, full in zip(tokens, logps, full_logps, strict=True):
        n = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
        completions.append(Completion(ids[:n], logp[:n], ids[n - 1] in ends, None if how.full() else full[:n]))
    return completions
