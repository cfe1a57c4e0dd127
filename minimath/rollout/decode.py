"""The running batch of a rollout: rows in slots, the decode step on the device, rows that come and go."""
import collections
import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import DynamicCache

from minimath.core.errors import UserError
from minimath.core.threads import follow_load
from minimath.grading.answer import box_closed
from minimath.models.forward import additive_mask, base_causal_lm, head
from minimath.rollout.engine import Engine, Job
from minimath.rollout.kv_cache import SlotCache
from minimath.rollout.sampling import sample_tokens, stream_noise

BLOCK = 16  # rows that attention treats alike on a CPU
SYNC = {"cuda": 4}  # steps between looks at which rows have ended; a look makes the host wait for the device
FIXED_SHAPES = ("cuda",)  # devices whose steps have few shapes, as recording needs them: rounded up
WINDOW = 256  # to a multiple of this, for lengths
PREFILL_TOKENS = 4096  # of prompts in one forward
WARM_UP = 2  # calls before capture: lazy set-up of libraries must not be recorded
MOST = 24  # graphs kept; a batch that shrinks needs a new one for every size


class Fast(NamedTuple):
    """How the model computes while it decodes, see open.fast_decoding."""
    blocks: bool  # attention can be over blocks of rows
    head: Callable | None  # multiplies by the head's weight; None: a plain product
    copied: bool  # weights are copied once


class Row:
    """One completion, running or waiting."""

    def __init__(self, job: Job):
        self.job = job
        self.ids, self.logp, self.full_logp = [], [], []  # filled in when it ends, or is put back
        self.boxed, self.length, self.seen = False, 0, 0  # closed its box; tokens in the cache; ids that end_early saw


class Decode:
    """The running batch: slot i belongs to rows[i].

    Its state lives on the device, in tensors (S, ...): token: sampled last, not yet in the cache; pos: its place;
    count: tokens sampled; alive: goes on; ids, logp and full_logp of the tokens sampled."""

    def __init__(self, engine: Engine, queue: list[Row], max_num_seqs: int, fast: Fast):
        model, tokenizer, options = engine.policy.model, engine.policy.tokenizer, engine.options
        self.engine, self.model, self.pad, self.queue, self.fast = engine, model, tokenizer.pad_token_id, queue, fast
        self.max_num_seqs, self.max_new_tokens = max_num_seqs, engine.max_new_tokens
        self.loop_guard, self.box = options.loop_guard, BoxWatch(tokenizer) if options.stop_boxed else None
        base = base_causal_lm(model)
        self.decoder, self.head, self.device = base.base_model, head(model), base.device
        self.ends = torch.tensor(sorted(set(engine.eos)), device=self.device, dtype=torch.long)
        self.fixed, self.sync = self.device.type in FIXED_SHAPES, SYNC.get(self.device.type, 1)
        self.longest = max(len(row.job.prompt) for row in queue) + self.max_new_tokens
        self.steps = self.used = self.halved = 0
        self.graphs = StepGraphs(self.device)
        self.reset()

    def reset(self) -> None:
        """Start with no rows and an empty cache for self.max_num_seqs slots."""
        slots, here = self.max_num_seqs, {"device": self.device}
        self.rows: list[Row] = []
        self.cache = None
        self.token, self.pos, self.count = (torch.zeros(slots, dtype=torch.long, **here) for _ in range(3))
        self.alive = torch.zeros(slots, dtype=torch.bool, **here)
        self.ids = torch.zeros(slots, self.max_new_tokens, dtype=torch.long, **here)
        self.noise, self.logp, self.full_logp = (torch.zeros(slots, self.max_new_tokens, **here) for _ in range(3))
        self.graphs.forget()

    def metrics(self) -> dict:
        """Tell how it went: seq_fill is the share of slots in use, over all steps."""
        return {"max_num_seqs": self.max_num_seqs, "seq_fill": self.used / max(1, self.steps * self.max_num_seqs),
                "weights": "copied once" if self.fast.copied else "in place", "halved": self.halved,
                "graphs": self.graphs.used}

    def running(self) -> list[tuple[int, int, list[int]]]:
        """List (prompt, sample, ids so far) of the rows that decode."""
        return [(*row.job.place, self.ids[i, :count].tolist())
                for i, (row, count) in enumerate(zip(self.rows, self.count.tolist()))]

    def advance(self) -> list[Row]:
        """Take a few steps for all rows, or refill; returns the rows that ended."""
        follow_load(self.device, self.engine.say)
        if self.queue and self.max_num_seqs - len(self.rows) >= max(1, self.max_num_seqs // 16 if self.rows else 1):
            self.admit()
        else:
            for _ in range(self.sync):
                self.step()
        return self.collect()

    def step(self) -> None:
        """Sample one more token for every row."""
        n = width = len(self.rows)
        for row in self.rows:
            row.length += 1
        length, spans = max(row.length for row in self.rows), None
        if self.fixed:  # the slots beyond n are dead
            length, width = min(-(-length // WINDOW) * WINDOW, self.cache.places), self.max_num_seqs
            while width // 2 >= n:
                width //= 2
        elif self.fast.blocks:
            spans = [(a, min(a + BLOCK, n), max(row.length for row in self.rows[a:a + BLOCK]))
                     for a in range(0, n, BLOCK)]
        self.graphs.run(self.run_step, width, length, spans)
        self.steps += 1
        self.used += n

    def run_step(self, n: int, length: int, spans) -> None:
        """Forward the n newest tokens and choose the next ones, without a read-back."""
        pos = self.pos[:n]
        self.cache.at(pos, length)
        age = pos[:, None, None, None] - torch.arange(length, device=self.device)  # (n, 1, 1, T)
        mask = additive_mask(self.model, age, age >= 0)
        more = {"spans": spans} if spans else {}
        hidden = self.decoder(input_ids=self.token[:n, None], position_ids=pos[:, None], attention_mask=mask,
                              past_key_values=self.cache, use_cache=True, **more).last_hidden_state[:, 0]
        self.pos[:n] += self.alive[:n]
        self.choose(hidden, torch.arange(n, device=self.device))

    def choose(self, hidden: torch.Tensor, slots: torch.Tensor) -> None:
        """Sample the next tokens of k slots from their last hidden states [k, D]."""
        count, alive = self.count[slots], self.alive[slots]
        place = count.clamp(max=self.max_new_tokens - 1)
        logits = logits_of(hidden, self.head, self.fast.head)
        token, logp, full = sample_tokens(logits, self.noise[slots, place], self.engine.how)
        self.token[slots] = token = torch.where(alive, token, self.token[slots])
        for kept, new in ((self.ids, token), (self.logp, logp), (self.full_logp, full)):
            kept[slots, place] = torch.where(alive, new, kept[slots, place])  # a row that is over keeps what it has
        self.count[slots] = count + alive
        self.alive[slots] = alive & ~(token[:, None] == self.ends).any(-1) & (count + 1 < self.max_new_tokens)

    def collect(self) -> list[Row]:
        """Take out the rows that are over; sort the others into blocks of like length."""
        if self.box or self.loop_guard:
            self.end_early()
        alive = self.alive[:len(self.rows)].tolist()
        if all(alive):
            return []
        over = [self.read(i) for i, goes_on in enumerate(alive) if not goes_on]
        self.arrange([i for i, goes_on in enumerate(alive) if goes_on])
        return over

    def end_early(self) -> None:
        """End rows that have closed their box, or go round in circles.

        Looks at every new token, for loops at every 16th: where a row ends does not depend on when the host looks."""
        n, guard = len(self.rows), self.loop_guard
        back = torch.arange(2 * self.sync, 0, -1, device=self.device)  # after an out-of-memory more are new
        slots = torch.arange(n, device=self.device)[:, None]
        recent = self.ids[slots, (self.count[:n, None] - back).clamp(min=0)].tolist()  # (n, 2 sync), newest last
        for i, (row, count) in enumerate(zip(self.rows, self.count[:n].tolist(), strict=True)):
            for place in range(row.seen + 1, count + 1):
                closes = self.box is not None and self.box.may_close(recent[i][place - count - 1])
                turns = guard and place >= guard and place % 16 == 0
                if not closes and not turns:
                    continue
                ids = self.ids[i, :place].tolist()
                row.boxed = closes and self.box.closed(ids)
                if row.boxed or turns and in_loop(ids[-guard:]):
                    self.count[i], self.alive[i] = place, False
                    break
            row.seen = count

    def read(self, i: int) -> Row:
        """Copy what slot i has sampled to its row."""
        row, count = self.rows[i], int(self.count[i])
        row.ids, row.logp, row.full_logp = (kept[i, :count].tolist() for kept in (self.ids, self.logp, self.full_logp))
        return row

    def arrange(self, keep: list[int]) -> None:
        """Make the rows of slots `keep` the rows 0..n-1, in blocks from long to short."""
        ranked = sorted(keep, key=lambda i: -self.rows[i].length)
        n = len(ranked)
        # a row that is in its block already stays where it is
        staying = {i for place, i in enumerate(ranked)
                   if i < n and (i // BLOCK == place // BLOCK or not self.fast.blocks)}
        moved, places = [i for i in ranked if i not in staying], sorted(set(range(n)) - staying)
        if moved:
            self.cache.move(moved, places, max(self.rows[i].length for i in moved))
            for each in (self.token, self.pos, self.count, self.alive, self.noise, self.ids, self.logp, self.full_logp):
                each[places] = each[moved]
        self.alive[n:] = False
        at = dict(zip(places, moved, strict=True))
        self.rows = [self.rows[at.get(place, place)] for place in range(n)]

    def admit(self) -> None:
        """Prefill the next rows of the queue, each prompt once; sample their first tokens."""
        new = self.queue[:self.max_num_seqs - len(self.rows)]
        by_tokens: dict[tuple, list[Row]] = {}
        for row in new:
            by_tokens.setdefault((*row.job.prompt, *row.ids), []).append(row)
        batch: list[tuple] = []
        for tokens in sorted(by_tokens, key=len):  # prompts of like length in a forward: little padding
            if batch and (len(batch) + 1) * len(tokens) > PREFILL_TOKENS:
                self.prefill(batch, by_tokens)
                batch = []
            batch.append(tokens)
        self.prefill(batch, by_tokens)
        del self.queue[:len(new)]

    def prefill(self, batch: list[tuple], by_tokens: dict[tuple, list[Row]]) -> None:
        """Fill the next slots with the rows of a batch of prompts, and choose their tokens."""
        lengths = torch.tensor([len(tokens) for tokens in batch])
        ids = pad_sequence([torch.tensor(tokens) for tokens in batch], batch_first=True, padding_value=self.pad)
        mask = torch.arange(ids.shape[1])[None] < lengths[:, None]  # (B, T)
        prefilled = DynamicCache()  # without a config: full length in every layer, whatever its window
        hidden = self.decoder(input_ids=ids.to(self.device), attention_mask=mask.long().to(self.device),
                              past_key_values=prefilled, use_cache=True).last_hidden_state
        if self.cache is None:
            self.cache = SlotCache(prefilled, self.max_num_seqs, self.longest)
        first, source = len(self.rows), []
        for i, tokens in enumerate(batch):
            rows = by_tokens[tokens]
            slots = range(len(self.rows), len(self.rows) + len(rows))
            self.cache.fill(list(slots), prefilled, i, len(tokens))
            for slot, row in zip(slots, rows, strict=True):
                self.seat(slot, row, len(tokens))
            self.rows += rows
            source += [i] * len(rows)
        last = hidden[torch.arange(len(batch)), lengths.to(self.device) - 1]  # (B, D)
        self.choose(last[source], torch.arange(first, len(self.rows), device=self.device))

    def seat(self, slot: int, row: Row, length: int) -> None:
        """Set the state of a slot: a row starts, or goes on with the tokens it has."""
        count, row.length = len(row.ids), length
        self.noise[slot] = stream_noise(row.job.seed, self.max_new_tokens).to(self.device)
        self.pos[slot], self.count[slot], self.alive[slot] = length, count, True
        for kept, had in ((self.ids, row.ids), (self.logp, row.logp), (self.full_logp, row.full_logp)):
            kept[slot, :count] = torch.tensor(had, dtype=kept.dtype, device=self.device)

    def halve(self) -> list[Row]:
        """Go on with half the slots, from the tokens sampled; returns the rows that ended.

        Raises UserError if there was one slot, and rows are left to sample."""
        rows = [self.read(i) for i in range(len(self.rows))]
        over = [row for row, goes_on in zip(rows, self.alive.tolist()) if not goes_on]
        self.queue = [row for row in rows if row not in over] + [row for row in self.queue if row not in rows]
        before, self.max_num_seqs = self.max_num_seqs, max(1, self.max_num_seqs // 2)
        if self.queue and before == 1:
            raise UserError(f"memory is too small for one sequence of {self.longest} tokens; lower max_new_tokens, use "
                            "quant=nf4, or a smaller model")
        if self.queue:
            self.engine.say(f"out of memory with {before} sequences side by side: going on with {self.max_num_seqs}")
        self.halved += 1
        self.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return over


def logits_of(hidden: torch.Tensor, lm_head, product) -> torch.Tensor:
    """Compute next-token logits [n, V] in fp32 of hidden [n, D]; product: Fast.head."""
    weight, bias, hidden = lm_head.weight, lm_head.bias, hidden.to(lm_head.weight.dtype)
    if product is not None:
        logits = product(hidden).float()
    elif weight.is_cuda and weight.dtype != torch.float32:  # not rounded to 16 bits, like linear_logp's
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        logits = logits if bias is None else logits + bias
    else:
        logits = torch.nn.functional.linear(hidden, weight, bias).float()
    if lm_head.logit_scale != 1.0:
        logits *= lm_head.logit_scale
    if lm_head.softcap:
        logits = lm_head.softcap * torch.tanh(logits / lm_head.softcap)
    return logits


class StepGraphs:
    """Runs a step from CUDA graphs, one launch for a thousand kernels; `forget` them when tensors move.

    Elsewhere, or where capture fails, plain calls."""

    def __init__(self, device: torch.device):
        self.usable = device.type == "cuda" and torch.version.hip is None
        self.used, self.pool = False, None
        self.forget()

    def forget(self) -> None:
        self.recorded, self.calls = {}, collections.Counter()

    def run(self, step, n: int, length: int, spans) -> None:
        """Run step(n, length, spans), as Decode.run_step takes them."""
        key = (n, length)
        if self.usable and self.calls[key] >= WARM_UP and key not in self.recorded and len(self.recorded) < MOST:
            self.record(step, n, length)
        self.calls[key] += 1
        if key in self.recorded:
            self.recorded[key].replay()
            self.used = True
        else:
            step(n, length, spans)

    def record(self, step, n: int, length: int) -> None:
        """Record one step without running it; say once if it cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                step(n, length, None)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.usable = False
            warnings.warn("rollouts run without CUDA graphs, which is slower: the step could not be recorded "
                          f"({str(error).splitlines()[0]})", stacklevel=2)
        else:
            self.recorded[n, length], self.pool = graph, graph.pool()


@functools.lru_cache(maxsize=4)
def closing_ids(tokenizer) -> frozenset[int]:
    """Find the ids whose text has a closing brace."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return frozenset(i for i, text in enumerate(texts) if "}" in text)


class BoxWatch:
    """Tells when a completion has closed a \\boxed{...}; decodes only when it can have."""

    def __init__(self, tokenizer):
        self.tokenizer, self.closing = tokenizer, closing_ids(tokenizer)

    def may_close(self, token: int) -> bool:
        return token in self.closing

    def closed(self, ids: list[int]) -> bool:
        return box_closed(self.tokenizer.decode(ids, skip_special_tokens=True))


def in_loop(ids: list[int]) -> bool:
    """Tell whether all of ids repeats a piece of at most a quarter of its length."""
    return any(ids[period:] == ids[:-period] for period in range(1, len(ids) // 4 + 1))
