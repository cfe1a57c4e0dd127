"""Sample completions with the weights that train: groups of G per prompt, in slots that are refilled as rows end.

Slots decode side by side, one token per row and step. A prompt is prefilled once for the completions that start with
it and its keys and values are copied into their slots. Rows that end free their slots; when a sixteenth is free the
next completions move in, and when none is left the batch shrinks. Prompts likely to take longest go first, so that few
rows are left at the end. How many slots there are follows from the memory (memory.py); should it run out all the same,
the slots are halved and everything goes on from the tokens sampled so far.

Every completion has its own random stream, seeded by (seed, prompt, sample), and every token its place in it: a
completion does not depend on the batch it was decoded in (up to rounding). The log-prob of every token is recorded as
it was sampled and, where top-k, top-p, min-p or a penalty cut the distribution, also before that.

sampling.py chooses the tokens, slots.py holds keys and values, linears.py makes the adapter's products cheap, and
graphs.py replays the step on CUDA.
"""
import contextlib
import warnings
from typing import NamedTuple

import torch
from transformers.cache_utils import DynamicCache

from minimath.config import UserError
from minimath.graphs import StepGraphs
from minimath.linears import copied_bytes, decoding_linears, is_4bit, packed_product, packs
from minimath.memory import fitting_slots, free_bytes
from minimath.model import base_causal_lm, compute_dtype, head, inference
from minimath.plain_step import plain_layers, plain_step
from minimath.sampling import Sampling, sample_tokens, stream_noise, stream_seed
from minimath.slots import SlotCache, check_cache, check_model, decode_mask, decoding_attention
from minimath.stopping import BoxWatch, in_loop

BLOCK = 16  # rows that attention treats alike on a CPU
SYNC = {"cuda": 4}  # steps between looks at which rows have ended; a look makes the host wait for the device
WINDOW = 256  # lengths of attention on CUDA are multiples of this
PREFILL_TOKENS = 4096  # of prompts in one forward


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
             done: dict | None = None, on_done=None, on_step=None, facts: dict | None = None,
             say=None) -> list[list[Completion]]:
    """Sample `samples` completions of each prompt.

    prompts: token ids, one list per prompt, none empty. eos: ids that end a completion. stop_boxed: a closed
    \\boxed{...} ends it too. loop_guard: a completion whose last `loop_guard` tokens repeat themselves is cut (0: off).
    seed, keys: the random stream of sample s of prompt p is seeded by (seed, keys[p], s); keys default to the prompt's
    index. slots: rows decoded side by side, 0 for as many as memory allows. expected: guess of each prompt's completion
    length, the longest go first; default: long prompts. done: {(prompt, sample): Completion} that an earlier call left;
    they are not sampled again. on_done(prompt, sample, completion) is called as each one ends, on_step() after every
    step: it may raise to stop. facts: a dict that gets slots, steps, slot_fill (share of slots in use, over all steps),
    slot_fill_full (the same while completions waited), halved, graphs (CUDA), weights (copied once, NF4 dequantised, or
    in place). say(text): messages; default: a warning.
    Returns one list of `samples` completions per prompt. Raises NoStandardCache, a UserError, for models that keep other
    state than keys and values, and UserError if memory is too small for one sequence.
    """
    check_model(model)
    done, say = dict(done or {}), say or warnings.warn
    keys = list(range(len(prompts))) if keys is None else keys
    expected = [len(p) for p in prompts] if expected is None else expected
    order = sorted(range(len(prompts)), key=lambda p: -expected[p])
    queue = [_Row((p, s), stream_seed(seed, keys[p], s), prompts[p])
             for p in order for s in range(samples) if (p, s) not in done]
    if not queue:
        return [[done[p, s] for s in range(samples)] for p in range(len(prompts))]
    how = Sampling(temperature, top_p, min_p, top_k, repetition_penalty)
    longest = max(len(row.prompt) for row in queue) + max_new_tokens
    slots = min(slots, len(queue)) if slots else fitting_slots(model, longest, len(queue))
    with inference(model), decoding_attention(model) as blocks, fast_linears(model, slots) as fast:
        state = _Decode(model, tokenizer, queue, how, slots, max_new_tokens, eos, blocks, *fast)
        watch = BoxWatch(tokenizer) if stop_boxed else None
        while state.queue or state.rows or state.over:
            try:
                for row in state.advance(watch, loop_guard):
                    done[row.job] = row.completion(how)
                    if on_done is not None:
                        on_done(*row.job, done[row.job])
            except torch.OutOfMemoryError:
                state.halve(say)
            if on_step is not None:
                on_step()
        if facts is not None:
            facts.update(state.facts())
    return [[done[p, s] for s in range(samples)] for p in range(len(prompts))]


@contextlib.contextmanager
def fast_linears(model, slots: int):
    """linears.decoding_linears with a copy of the weights where it pays and fits: on a CPU, and for NF4 weights.
    Autocast around all steps where an adapter runs by itself. Yields the groups, the head's product (None: plain), and whether
    the weights are copied."""
    base = base_causal_lm(model)
    wanted = base.device.type == "cpu" or any(is_4bit(m) for m in base.modules())
    copy = wanted and 3 * copied_bytes(model, base.dtype) < free_bytes(base.device)
    with decoding_linears(model, copy=copy, rows=slots) as (groups, every):
        lm_head = head(model)
        product = packed_product(lm_head.weight, lm_head.bias, slots) if copy and packs(lm_head.weight) else None
        with contextlib.nullcontext() if every else compute_dtype(model):
            yield groups, product, copy


class _Row:
    """One completion, running or waiting."""

    def __init__(self, job: tuple[int, int], seed: int, prompt: list[int]):
        self.job, self.seed, self.prompt = job, seed, prompt
        self.ids, self.logp, self.full_logp = [], [], []  # filled in when it ends, or is put back
        self.ended, self.length = False, 0  # length: tokens in the cache, as far as the host knows

    def tokens(self) -> list[int]:
        return self.prompt + self.ids

    def completion(self, how: Sampling) -> Completion:
        return Completion(self.ids, self.logp, self.ended, None if how.full() else self.full_logp)


class _Decode:
    """The running batch. Slot i < len(rows) belongs to rows[i]; its state lives on the device, in tensors (S, ...):
    token: sampled last, not yet in the cache; pos: its place; count: tokens sampled; alive: goes on."""

    def __init__(self, model, tokenizer, queue: list[_Row], how: Sampling, slots: int, max_new: int, eos, blocks: bool,
                 groups: dict, product, copied: bool):
        self.model, self.queue, self.how, self.slots, self.max_new = model, queue, how, slots, max_new
        self.decoder, self.head, self.product = base_causal_lm(model).base_model, head(model), product
        self.device, self.pad = base_causal_lm(model).device, tokenizer.pad_token_id
        self.eos = torch.tensor(sorted(set(eos)), device=self.device, dtype=torch.long)
        self.copied, self.blocks, self.plain = copied, blocks, plain_layers(model, groups) if blocks else None
        self.sync = SYNC.get(self.device.type, 1)
        self.longest = max(len(row.prompt) for row in queue) + max_new
        self.steps = self.used = self.full_steps = self.full_used = self.halved = 0
        self.over: list[_Row] = []  # ended, not yet handed out
        self.graphs = StepGraphs(self.device)
        self.reset()

    def reset(self) -> None:
        """No rows and an empty cache for self.slots slots."""
        slots, cuda = self.slots, {"device": self.device}
        self.rows: list[_Row] = []
        self.cache = None
        self.token, self.pos, self.count = (torch.zeros(slots, dtype=torch.long, **cuda) for _ in range(3))
        self.alive = torch.zeros(slots, dtype=torch.bool, **cuda)
        self.noise = torch.zeros(slots, self.max_new, **cuda)
        self.logp, self.full_logp = torch.zeros(slots, self.max_new, **cuda), torch.zeros(slots, self.max_new, **cuda)
        self.ids = torch.full((slots, self.longest + 1), self.pad, dtype=torch.long, **cuda)  # prompt and completion
        self.graphs.forget()

    def facts(self) -> dict:
        return {"slots": self.slots, "steps": self.steps, "halved": self.halved, "graphs": self.graphs.used,
                "weights": "copied once" if self.copied else "in place",
                "slot_fill": self.used / max(1, self.steps * self.slots),
                "slot_fill_full": self.full_used / max(1, self.full_steps * self.slots)}

    def advance(self, watch, loop_guard: int) -> list[_Row]:
        """A few steps for all rows, or a refill; returns the rows that ended."""
        if not self.rows or (self.queue and self.slots - len(self.rows) >= max(1, self.slots // 16)):
            self.admit()
        else:
            for _ in range(self.sync):
                self.step()
        self.collect(watch, loop_guard)
        over, self.over = self.over, []
        return over

    # ---- the step

    def step(self) -> None:
        """One more token for every row."""
        n = len(self.rows)
        for row in self.rows:
            row.length += 1
        length, spans = max(row.length for row in self.rows), None
        if self.device.type == "cuda":  # few lengths, each of which is recorded
            length = min(-(-length // WINDOW) * WINDOW, self.cache.capacity())
        else:
            self.cache.reserve(length)
        if self.device.type == "cpu" and self.blocks:
            spans = [(a, min(a + BLOCK, n), max(row.length for row in self.rows[a:a + BLOCK]))
                     for a in range(0, n, BLOCK)]
        self.graphs.run(self.run_step, n, length, spans)
        self.steps += 1
        self.used += n
        if self.queue:
            self.full_steps += 1
            self.full_used += n

    def run_step(self, n: int, length: int, spans) -> None:
        """The device's part of a step: forward of the n newest tokens, then the choice of the next ones. No read-back;
        fixed shapes for fixed (n, length)."""
        pos = self.pos[:n]
        self.cache.at(pos, length)
        mask = decode_mask(self.model, pos, length)
        if self.plain and spans:
            hidden = plain_step(self.model, self.plain, self.token[:n], pos, self.cache, mask, spans)
        else:
            kwargs = {"spans": spans} if spans else {}
            hidden = self.decoder(input_ids=self.token[:n, None], position_ids=pos[:, None], use_cache=True,
                                  past_key_values=self.cache, attention_mask=mask, **kwargs).last_hidden_state[:, 0]
        self.pos[:n] += self.alive[:n]
        self.choose(hidden, torch.arange(n, device=self.device))

    def choose(self, hidden: torch.Tensor, slots: torch.Tensor) -> None:
        """Sample the next token of the given slots (k,) from the hidden states (k, D) of their last ones."""
        count, pos, alive = self.count[slots], self.pos[slots], self.alive[slots]
        place = count.clamp(max=self.max_new - 1)
        seen = None
        if self.how.repetition_penalty != 1:
            ids = self.ids[slots]
            seen = torch.where(torch.arange(ids.shape[1], device=self.device) < pos[:, None], ids, ids[:, :1])
        token, logp, full = sample_tokens(logits_of(hidden, self.head, self.product), self.noise[slots, place],
                                          self.how, seen)
        token = torch.where(alive, token, self.token[slots])
        self.token[slots] = token
        self.ids[slots, pos] = token
        # a row that is over keeps what it has
        self.logp[slots, place] = torch.where(alive, logp, self.logp[slots, place])
        self.full_logp[slots, place] = torch.where(alive, full, self.full_logp[slots, place])
        self.count[slots] = count + alive
        self.alive[slots] = alive & ~(token[:, None] == self.eos).any(-1) & (count + 1 < self.max_new)

    # ---- rows come and go

    def collect(self, watch, loop_guard: int) -> None:
        """Take out the rows that are over, close the gaps, sort the others into blocks of like length."""
        n = len(self.rows)
        alive = self.alive[:n].tolist()
        over = [not a for a in alive]
        if watch is not None or loop_guard and self.steps % 16 < self.sync:
            for i in range(n):
                over[i] = over[i] or self.cut_early(i, watch, loop_guard)
        if not any(over):
            return
        eos = set(self.eos.tolist())
        for i in range(n):
            if over[i]:
                self.read(i)
                self.rows[i].ended = self.rows[i].ended or self.rows[i].ids[-1] in eos
                self.over.append(self.rows[i])
        self.arrange([i for i in range(n) if not over[i]])

    def cut_early(self, i: int, watch, loop_guard: int) -> bool:
        """Whether a running row has closed its box or goes round in circles; sets what was found on the row."""
        row, count = self.rows[i], int(self.count[i])
        if watch is not None and watch.may_close(int(self.token[i])):
            start = len(row.prompt)
            row.ended = watch.closed(self.ids[i, start:start + count].tolist())
        return row.ended or bool(loop_guard) and count >= loop_guard and in_loop(
            self.ids[i, len(row.prompt) + count - loop_guard:len(row.prompt) + count].tolist())

    def read(self, i: int) -> None:
        """Copy what slot i has sampled to its row."""
        row, count = self.rows[i], int(self.count[i])
        row.ids = self.ids[i, len(row.prompt):len(row.prompt) + count].tolist()
        row.logp, row.full_logp = self.logp[i, :count].tolist(), self.full_logp[i, :count].tolist()

    def arrange(self, keep: list[int]) -> None:
        """Make the rows of slots `keep` the rows 0..n-1, in blocks from long to short, moving as few as possible."""
        ranked = sorted(keep, key=lambda i: -self.rows[i].length)
        n, targets, free = len(ranked), {}, []
        for a in range(0, n, BLOCK):  # a row that is in its block already stays where it is
            block, places = ranked[a:a + BLOCK], range(a, min(a + BLOCK, n))
            staying = {i for i in block if i in places} if self.blocks else {i for i in block if i < n}
            targets |= {i: i for i in staying}
        free = iter(sorted(set(range(n)) - set(targets.values())))
        moved = [i for i in ranked if i not in targets]
        targets |= {i: next(free) for i in moved}
        if moved:
            places = [targets[i] for i in moved]
            self.cache.move(moved, places, max(self.rows[i].length for i in moved))
            for state in (self.token, self.pos, self.count, self.alive, self.noise, self.logp, self.full_logp,
                          self.ids):
                state[places] = state[moved]
        at = {j: self.rows[i] for i, j in targets.items()}
        self.rows = [at[j] for j in range(n)]

    def admit(self) -> None:
        """Prefill the next rows of the queue, each prompt once, into the free slots, and sample their first tokens."""
        new = self.queue[:self.slots - len(self.rows)]
        by_tokens: dict[tuple, list[_Row]] = {}
        for row in new:
            by_tokens.setdefault(tuple(row.tokens()), []).append(row)
        batch: list[tuple] = []
        for tokens in sorted(by_tokens, key=len):  # prompts of like length in a forward: little padding
            if batch and (len(batch) + 1) * len(tokens) > PREFILL_TOKENS:
                self.prefill(batch, by_tokens)
                batch = []
            batch.append(tokens)
        self.prefill(batch, by_tokens)

    def prefill(self, batch: list[tuple], by_tokens: dict[tuple, list[_Row]]) -> None:
        lengths = torch.tensor([len(tokens) for tokens in batch])
        ids = torch.full((len(batch), int(lengths.max())), self.pad)
        for i, tokens in enumerate(batch):
            ids[i, :len(tokens)] = torch.tensor(tokens)
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]  # (B, T)
        prefilled = DynamicCache()  # without a config: full length in every layer, whatever its window
        hidden = self.decoder(input_ids=ids.to(self.device), attention_mask=mask.long().to(self.device),
                              past_key_values=prefilled, use_cache=True).last_hidden_state
        if self.cache is None:
            check_cache(self.model, prefilled)
            self.cache = SlotCache(prefilled, self.slots)
        # recorded steps hold the buffers' addresses: on CUDA they are made once, as large as they can become
        self.cache.reserve(self.longest if self.device.type == "cuda" else int(lengths.max()) + 1)
        first, source = len(self.rows), []
        for i, tokens in enumerate(batch):
            rows = by_tokens[tokens]
            taken = list(range(len(self.rows), len(self.rows) + len(rows)))
            self.cache.fill(taken, prefilled, i, len(tokens))
            for slot, row in zip(taken, rows, strict=True):
                self.place(slot, row, tokens)
            self.rows += rows
            source += [i] * len(rows)
        started = {id(row) for row in self.rows[first:]}
        self.queue = [row for row in self.queue if id(row) not in started]
        last = hidden[torch.arange(len(batch)), lengths.to(self.device) - 1]  # (B, D)
        self.choose(last[source], torch.arange(first, len(self.rows), device=self.device))

    def place(self, slot: int, row: _Row, tokens: tuple) -> None:
        """The state of a row that starts, or goes on with the tokens it has, in a slot."""
        count, row.length = len(row.ids), len(tokens)
        self.ids[slot, :len(tokens)] = torch.tensor(tokens, device=self.device)
        self.noise[slot] = stream_noise(row.seed, self.max_new).to(self.device)
        self.pos[slot], self.count[slot], self.alive[slot] = len(tokens), count, True
        if count:
            self.logp[slot, :count] = torch.tensor(row.logp, device=self.device)
            self.full_logp[slot, :count] = torch.tensor(row.full_logp, device=self.device)

    def halve(self, say) -> None:
        """After an out-of-memory: put all rows back with the tokens they have, and go on with half the slots."""
        if self.slots == 1:
            raise UserError(f"memory is too small for one sequence of {self.longest} tokens; lower max_new_tokens, use "
                            "quant=nf4, or a smaller model")
        for i, row in enumerate(self.rows):
            if row not in self.over:
                self.read(i)
        running = [row for row in self.rows if row not in self.over]
        self.queue = running + [row for row in self.queue if row not in running]
        say(f"out of memory with {self.slots} sequences side by side: going on with {self.slots // 2}")
        self.slots //= 2
        self.halved += 1
        self.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def logits_of(hidden: torch.Tensor, lm_head, product=None) -> torch.Tensor:
    """Next-token logits (n, V) in fp32 of hidden (n, D): n is the number of slots, not of tokens. product: what
    multiplies by the head's weight, if not a plain product."""
    weight, bias = lm_head.weight, lm_head.bias
    hidden = hidden.to(weight.dtype)
    if product is not None:
        logits = product(hidden).float()
    elif weight.is_cuda and weight.dtype != torch.float32:  # not rounded to 16 bits, like linear_logp's
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        if bias is not None:
            logits += bias
    else:
        logits = torch.nn.functional.linear(hidden, weight, bias).float()
    if lm_head.logit_scale != 1.0:
        logits *= lm_head.logit_scale
    if lm_head.softcap:
        logits = lm_head.softcap * torch.tanh(logits / lm_head.softcap)
    return logits
