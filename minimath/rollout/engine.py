"""Sample completions with the weights that train: groups of G per prompt, in slots that are refilled as rows end.

Slots decode side by side, one token per row and step. A prompt is prefilled once for the completions that start with
it and its keys and values are copied into their slots. Rows that end free their slots; when a sixteenth is free the
next completions move in, and when none is left the batch shrinks. Prompts likely to take longest go first, so that few
rows are left at the end. How many slots there are follows from the memory (memory.py); should it run out all the same,
the slots are halved and everything goes on from the tokens sampled so far.

Every completion has its own random stream, seeded by (seed, prompt, sample), and every token its place in it: a
completion does not depend on the batch it was decoded in (up to rounding). The log-prob of every token is recorded as
it was sampled and, where top-k, top-p, min-p or a penalty cut the distribution, also before that.

decoding.py is the running batch, sampling.py chooses the tokens, slots.py holds keys and values, linears.py makes the
adapter's products cheap, plain_step.py spares a CPU the modules' overhead, and graphs.py replays the step on CUDA.
"""
import contextlib
import warnings
from typing import NamedTuple

import torch

from minimath.rollout.decode import Decode, Row
from minimath.models.linears import copied_bytes, decoding_linears, is_4bit, packed_product, packs
from minimath.models.memory import fitting_slots, free_bytes
from minimath.models.load import base_causal_lm, compute_dtype, head, inference
from minimath.rollout.sampling import Sampling, stream_seed
from minimath.rollout.kv_cache import check_model, decoding_attention
from minimath.rollout.stopping import BoxWatch


class Completion(NamedTuple):
    """One sampled completion."""
    ids: list[int]  # with the end token, if it was reached
    logp: list[float]  # log-prob of each id under the distribution that it was sampled from
    ended: bool  # False: cut at max_new_tokens, or by the loop guard
    full_logp: list[float] | None = None  # after temperature, before top-k, top-p and min-p; None: the same as logp


def generate(model, tokenizer, prompts: list[list[int]], *, samples: int = 1, max_new_tokens: int,
             temperature: float = 1.0, top_p: float = 1.0, min_p: float = 0.0, top_k: int = 0,
             repetition_penalty: float = 1.0, eos: list[int], stop_boxed: bool = False, loop_guard: int = 0,
             seed: int = 0, slots: int = 0, keys: list[int] | None = None, expected: list[float] | None = None,
             done: dict | None = None, on_done=None, on_step=None, on_tokens=None,
             facts: dict | None = None, say=None) -> list[list[Completion]]:
    """Sample `samples` completions of each prompt.

    prompts: token ids, one list per prompt, none empty. eos: ids that end a completion. stop_boxed: a closed
    \\boxed{...} ends it too. loop_guard: a completion whose last `loop_guard` tokens repeat themselves is cut (0: off).
    seed, keys: the random stream of sample s of prompt p is seeded by (seed, keys[p], s); keys default to the prompt's
    index. slots: rows decoded side by side, 0 for as many as memory allows. expected: guess of each prompt's completion
    length, the longest go first; default: long prompts. done: {(prompt, sample): Completion} that an earlier call left;
    they are not sampled again. on_done(prompt, sample, completion) is called as each one ends, on_step() after every
    step: it may raise to stop. on_tokens(prompt, sample, ids) tells of every running completion how far it is. facts: a
    dict that gets slots, steps, slot_fill (share of slots in use, over all steps), slot_fill_full (the same while
    completions waited), halved, graphs (CUDA), weights (copied once, NF4 dequantised, or in place). say(text):
    messages; default: a warning.
    Returns one list of `samples` completions per prompt. Raises NoStandardCache, a UserError, for models that keep
    other state than keys and values, and UserError if memory is too small for one sequence.
    """
    check_model(model)
    done, say = dict(done or {}), say or warnings.warn
    keys = list(range(len(prompts))) if keys is None else keys
    expected = [len(p) for p in prompts] if expected is None else expected
    order = sorted(range(len(prompts)), key=lambda p: -expected[p])
    queue = [Row((p, s), stream_seed(seed, keys[p], s), prompts[p])
             for p in order for s in range(samples) if (p, s) not in done]
    if not queue:
        return [[done[p, s] for s in range(samples)] for p in range(len(prompts))]
    how = Sampling(temperature, top_p, min_p, top_k, repetition_penalty)
    longest = max(len(row.prompt) for row in queue) + max_new_tokens
    slots = min(slots, len(queue)) if slots else fitting_slots(model, longest, len(queue))
    with inference(model), decoding_attention(model) as blocks, fast_linears(model, slots) as fast:
        state = Decode(model, tokenizer, queue, how, slots, max_new_tokens, eos, blocks, *fast)
        watch = BoxWatch(tokenizer) if stop_boxed else None
        while state.queue or state.rows or state.over:
            try:
                for row in state.advance(watch, loop_guard):
                    done[row.job] = Completion(row.ids, row.logp, row.ended, None if how.full() else row.full_logp)
                    if on_done is not None:
                        on_done(*row.job, done[row.job])
            except torch.OutOfMemoryError:
                state.halve(say)
            if on_tokens is not None:
                for row in state.rows:
                    on_tokens(*row.job, row.ids)
            if on_step is not None:
                on_step()
        if facts is not None:
            facts.update(state.facts())
    return [[done[p, s] for s in range(samples)] for p in range(len(prompts))]


@contextlib.contextmanager
def fast_linears(model, slots: int):
    """linears.decoding_linears with a copy of the weights where it pays and fits: on a CPU, and for NF4 weights.
    Autocast around all steps where an adapter runs by itself. Yields the groups, the head's product (None: plain), and
    whether the weights are copied."""
    base = base_causal_lm(model)
    wanted = base.device.type == "cpu" or any(is_4bit(m) for m in base.modules())
    copy = wanted and 3 * copied_bytes(model, base.dtype) < free_bytes(base.device)
    with decoding_linears(model, copy=copy, rows=slots) as (groups, every):
        lm_head = head(model)
        product = packed_product(lm_head.weight, lm_head.bias, slots) if copy and packs(lm_head.weight) else None
        with contextlib.nullcontext() if every else compute_dtype(model):
            yield groups, product, copy
