"""Rollouts by transformers' `generate`, for models that minimath's own decode loop cannot serve.

A logits processor with our own sampler lets one token through: options, random streams and recorded log-probs mean the
same in both engines, and of each step only (n,) numbers are kept, not logits."""
import contextlib
import inspect
import itertools
from collections.abc import Iterator

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from minimath.core import interrupt
from minimath.core.errors import UserError, is_out_of_memory
from minimath.data.sample import Sample
from minimath.kernels import linear_logp
from minimath.models.forward import base_causal_lm, compute_dtype, head, hidden_states, inference
from minimath.models.memory import give_back
from minimath.models.variants import in_step, is_sharded
from minimath.rollout.engine import Engine, Job
from minimath.rollout.passes import PADDING_TOLERANCE, check_model
from minimath.rollout.sampling import Sampling, sample_tokens, stream_noise

ROWS = 64  # of a batch, with max_num_seqs=0
LOGP_TOLERANCE = {torch.float32: 0.01}  # median difference from the training forward; 0.1 in 16 bits


class TransformersEngine(Engine):
    """Decodes by the model's own `generate`, but not by its generation config.

    Prompts of unlike length share a batch, left-padded, only if padding does not change what this model computes.
    stream yields a batch when it ends, and raises Interrupted within one, UserError if the log-probs are not those of
    the training forward (looked at once a call), and what the model's `generate` raises."""
    rows = 0  # of a batch, once memory ran out

    @torch.no_grad()
    def stream(self, prompts, n=1, *, keys=None, skip=()):
        model = self.policy.model
        jobs = sorted(self.jobs(prompts, n, keys, skip), key=lambda job: len(job.prompt))
        with inference(model), compute_dtype(model), own_generation_config(model):
            for number, (batch, _) in enumerate(in_step(model, ((batch, {}) for batch in self.batches(jobs)))):
                # a blank one, where other processes have more to do
                rows = batch or [Job((0, 0), [self.policy.tokenizer.pad_token_id], 0)]
                samples = self._in_memory(rows)
                if number == 0:
                    check_logp(model, rows[0].prompt, samples[0], self.how.temperature)
                yield [(*job.place, sample) for job, sample in zip(batch, samples)]

    def batches(self, jobs: list[Job]) -> Iterator[list[Job]]:
        """Yield batches of jobs, sorted by length, of one length where they must."""
        model, most, mixed = self.policy.model, self.options.max_num_seqs or ROWS, True
        if is_sharded(model):  # a look would be work of all processes; recurrent models are refused
            check_model(model, state=False)
        elif len({len(job.prompt) for job in jobs}) > 1:
            mixed = padding_is_harmless(model, self.policy.tokenizer.pad_token_id, jobs[0].prompt, len(jobs[-1].prompt))
        for _, alike in itertools.groupby(jobs, lambda job: 0 if mixed else len(job.prompt)):
            while batch := list(itertools.islice(alike, self.rows or most)):
                yield batch

    def _in_memory(self, jobs: list[Job]) -> list[Sample]:
        """Decode a batch, half of it at a time when memory runs out."""
        try:
            return self._generate(jobs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # only here, where the exception no longer holds the tensors of the step
        if len(jobs) == 1 or is_sharded(self.policy.model):  # the others wait in a pass for this process's weights
            raise UserError(f"memory is too small for {len(jobs)} sequences side by side; lower max_num_seqs or "
                            "max_new_tokens, use quant=nf4, or a smaller model")
        self.rows = half = -(-len(jobs) // 2)
        give_back()
        self.say(f"out of memory with {len(jobs)} sequences side by side: going on with {half}")
        return self._in_memory(jobs[:half]) + self._in_memory(jobs[half:])

    def _generate(self, jobs: list[Job]) -> list[Sample]:
        """One batch of `generate`, cut at the end tokens."""
        model, pad = self.policy.model, self.policy.tokenizer.pad_token_id
        noise = torch.stack([stream_noise(job.seed, self.max_new_tokens) for job in jobs])
        sampler = _Sampler(noise.to(base_causal_lm(model).device), self.how)
        greedy(model, [job.prompt for job in jobs], max(len(job.prompt) for job in jobs), pad,
               sampler, max_new_tokens=self.max_new_tokens, eos_token_id=list(self.eos) or None)
        samples = []
        for ids, logp, full in zip(*(torch.stack(part, 1).tolist() for part in zip(*sampler.steps))):
            n = next((i + 1 for i, token in enumerate(ids) if token in self.eos), len(ids))
            samples.append(self.sample(ids[:n], logp[:n], ids[n - 1] in self.eos, full[:n]))
        return samples


class _Sampler(LogitsProcessor):
    """Chooses each row's token and lets `generate`, which is greedy, find no other."""

    def __init__(self, noise: torch.Tensor, how: Sampling):
        self.noise, self.how = noise, how  # (n, T) in [0, 1)
        self.steps = []  # (tokens, logp, full_logp), each (n,)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        interrupt.check()  # a signal waits for one token, not for a batch
        self.steps.append(sample_tokens(scores.clone(), self.noise[:, len(self.steps)], self.how))
        token = self.steps[-1][0]
        return torch.full_like(scores, -torch.inf).scatter_(-1, token[:, None], 0.0)


@contextlib.contextmanager
def own_generation_config(model):
    """Empty the model's generation config: it fills what ours leaves open."""
    base = base_causal_lm(model)
    theirs, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = theirs


def greedy(model, prompts: list[list[int]], length: int, pad: int, *processors, **config):
    """Generate without sampling, from prompts left-padded to a length."""
    base = base_causal_lm(model)
    inputs = {"input_ids": torch.tensor([[pad] * (length - len(prompt)) + prompt for prompt in prompts])}
    if takes_padding(model):  # without a mask, generate takes a pad token of the prompt itself for padding
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        inputs["attention_mask"] = (torch.arange(length) >= length - lengths[:, None]).long()
    config = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=pad, **config)
    return base.generate(**{name: value.to(base.device) for name, value in inputs.items()}, generation_config=config,
                         logits_processor=LogitsProcessorList(processors), synced_gpus=is_sharded(model))


def takes_padding(model) -> bool:
    """Tell whether the model has an argument for a mask; RWKV has none."""
    return "attention_mask" in inspect.signature(base_causal_lm(model).forward).parameters


def padding_is_harmless(model, pad: int, prompt: list[int], length: int) -> bool:
    """Tell whether log-probs stay when `prompt` is left-padded to `length`.

    Not all recurrent models leave masked tokens out of their state, and no config says so."""
    base = base_causal_lm(model)
    if not takes_padding(model):
        return False
    plain, padded = (greedy(model, [prompt], n, pad, max_new_tokens=1, output_logits=True,  # position ids include
                            return_dict_in_generate=True).logits[0].log_softmax(-1) for n in (len(prompt), length))
    return float((plain - padded).abs().mean() / plain.std()) <= PADDING_TOLERANCE.get(base.dtype, 1e-4)


def check_logp(model, prompt: list[int], sample: Sample, temperature: float) -> None:
    """Raise UserError unless the log-probs are those of the training forward.

    `generate` of a seldom used model can be wrong without a sign of it (RWKV's, for more than one row), and a head can
    have a scale that models.load.head does not know."""
    base, difference = base_causal_lm(model), logp_difference(model, prompt, sample, temperature)
    if not difference <= LOGP_TOLERANCE.get(base.dtype, 0.1):
        raise UserError(f"transformers' generate of {type(base).__name__} records log-probs {difference:.2g} away from "
                        "those of the training forward; try max_num_seqs=1, or a transformer with softmax attention")


def logp_difference(model, prompt: list[int], sample: Sample, temperature: float, most: int = 64) -> float:
    """Find the median difference of full log-probs, recorded, from the training forward's."""
    lm_head, ids = head(model), torch.tensor([prompt + sample.ids[:most]], device=base_causal_lm(model).device)
    hidden = hidden_states(model, ids[:, :-1])[0, len(prompt) - 1:]  # (n, D)
    logp = linear_logp(hidden, lm_head.weight, ids[0, len(prompt):], temperature=temperature or 1.0,
                       rows=torch.arange(len(hidden), device=hidden.device), **lm_head.kernel_args())
    return float((logp.detach() - logp.new_tensor((sample.full_logp or sample.logp)[:most])).abs().median())
