"""The running batch of a rollout: rows in slots, the decode step on the device, rows that come and go."""
import functools

import torch
from torch.nn.utils.rnn import pad_sequence

from minimath.core.errors import UserError
from minimath.core.threads import follow_load
from minimath.models.block_attention import on_device
from minimath.models.forward import additive_mask, base_causal_lm, head
from minimath.models.linears import IN_PLACE
from minimath.models.memory import fresh_cache, give_back, has_state
from minimath.rollout.blocks import Blocks, Row
from minimath.rollout.ends import BoxWatch, Flight, in_loop
from minimath.rollout.engine import Engine
from minimath.rollout.graphs import StepGraphs, addresses
from minimath.rollout.kv_cache import Fast, SlotCache, softcap_of
from minimath.rollout.passes import WIDTH_MULTIPLE, Step, batches_of, packed, prefill
from minimath.rollout.sampling import logits_of, sample_tokens, stream_noise

SYNC = {"cuda": 4}  # steps between looks at which rows have ended; elsewhere 1
AHEAD = 64  # tokens that every row has blocks for when another begins: else it would soon wait again
PREFILL_STEPS = 8  # a prefill takes about as long as so many recorded steps: an assumption


class Decode:
    """The running batch: slot i belongs to rows[i].

    Its state lives on the device, in tensors (S, ...): token: sampled last, not yet in the cache; pos: its place;
    count: tokens sampled; alive: goes on; ids, logp and full_logp of the tokens sampled; and the noise to come.
    A rollout begins with `start` and ends with `stop`; state, cache and recorded steps can serve the next one."""

    def __init__(self, engine: Engine):
        self.engine, self.model, self.max_new_tokens = engine, (model := engine.policy.model), engine.max_new_tokens
        self.loop_guard, base = engine.options.loop_guard, base_causal_lm(model)
        self.box = BoxWatch(engine.policy.tokenizer) if engine.options.stop_boxed else None
        self.decoder, self.head, self.device = base.base_model, head(model), base.device
        self.sync = SYNC.get(self.device.type, 1)
        self.ends = self.put(torch.tensor(sorted(set(engine.eos)), dtype=torch.long))
        self.back = self.put(torch.arange(4 * self.sync, 0, -1))
        self.graphs, self.has_state = StepGraphs(model), has_state(model)
        self.graphs.usable &= engine.records
        self.slots, self.cache, self.where, self.rows = 0, None, None, []

    def start(self, queue: list[Row], max_num_seqs: int, places: int, fast: Fast) -> None:
        """Begin a rollout of the rows in queue, max_num_seqs of them at a time, in a pool of so many places."""
        self.queue, self.max_num_seqs, self.places, self.fast = queue, max_num_seqs, places, fast
        self.forward = Step(self.model, fast.attends)
        self.fixed = self.forward.fixed
        self.longest = max(len(row.job.prompt) for row in queue) + self.max_new_tokens
        self.steps = self.used = self.idle = self.halved = self.preempted = self.sampled = self.graphs.replays = 0
        if self.cache is None or self.slots < max_num_seqs or self.blocks.longest < self.longest:
            self.reset()
        self.ways = base_causal_lm(self.model).linear_ways  # in which W is read, by how often
        where, self.where = self.where, addresses(self.model)
        if self.where != where:
            self.graphs.forget()

    def stop(self) -> None:
        """End the rollout; the rows that have not ended are dropped."""
        self.rows, self.queue, self.fast, self.flight = [], [], None, None
        self.alive[:] = False
        self.blocks.hold([])
        if self.where is None:
            self.graphs.forget()

    def reset(self) -> None:
        """Make state for self.max_num_seqs slots, without rows; the cache comes with the first prefill."""
        self.rows, self.slots, self.cache, self.flight = [], self.max_num_seqs, None, None
        self.blocks = Blocks(self.slots, self.longest, self.places, alone=self.fixed)
        self.graphs.forget()
        slots, here = self.slots, {"device": self.device}
        self.token, self.pos, self.count = (torch.zeros(slots, dtype=torch.long, **here) for _ in range(3))
        self.alive = torch.zeros(slots, dtype=torch.bool, **here)
        self.ids = torch.zeros(slots, self.max_new_tokens, dtype=torch.long, **here)
        self.noise, self.logp, self.full_logp = (torch.zeros(slots, self.max_new_tokens, **here) for _ in range(3))

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        return self.token, self.pos, self.count, self.alive, self.noise, self.ids, self.logp, self.full_logp

    def held_bytes(self) -> int:
        """Count the bytes of state and cache, which a next rollout may use; 0 before the first."""
        return self.cache.nbytes + sum(each.nbytes for each in self.state) if self.cache else 0

    def metrics(self) -> dict:
        """Tell how it went: seq_fill is the share of slots in use, over all steps.

        sampled_places: of the tokens that a row sampled, how many the cache held of it at a time."""
        return {"max_num_seqs": self.max_num_seqs, "seq_fill": self.used / max(1, self.steps * self.max_num_seqs),
                "weights": " and ".join(way for way, _ in self.ways.most_common()) or IN_PLACE, "halved": self.halved,
                "preempted": self.preempted, "sampled_places": self.sampled / max(1, self.used),
                "graph_replays": self.graphs.replays, "plain_steps": self.steps - self.graphs.replays}

    def running(self) -> list[tuple[int, int, list[int]]]:
        return [(*row.job.place, self.ids[i, :count].tolist())
                for i, (row, count) in enumerate(zip(self.rows, self.count.tolist()))]

    def put(self, values: torch.Tensor) -> torch.Tensor:
        return on_device(values, self.device)

    def advance(self) -> list[Row]:
        """Take a few steps for all rows, or refill; returns the rows that ended."""
        follow_load(self.device, self.engine.say)
        if self.refills():
            self.admit()
        elif not self.blocks.fit(self.rows, self.sync):
            return self.collect(self.sync)
        else:
            self.blocks.hold(self.rows, self.sync)
            if self.blocks.changes:
                self.cache.tell(*self.put(torch.tensor(self.blocks.take_changes())))
            for _ in range(self.sync):
                self.step()
            self.idle += self.sync * self.vacant()
        return self.collect()

    def vacant(self) -> int:
        """Count the slots without a row; where blocks are short, those that the next rows have blocks for."""
        free = self.max_num_seqs - len(self.rows)
        for count in range(0 if self.blocks.ample else min(free, len(self.queue))):
            new = sorted(self.queue[:count + 1], key=lambda row: row.length)  # as they will be seated
            if not self.blocks.fit(self.rows + new, AHEAD):
                return count
        return free

    def refills(self) -> bool:
        """Tell whether to prefill now.

        On a card a prefill makes the n rows that run wait: it costs n PREFILL_STEPS tokens, however few rows it brings.
        Slots that stand empty cost a token per step. When they have cost as much, or are a quarter, waiting ends."""
        if not self.queue or not self.rows:
            return bool(self.queue)
        free = self.vacant()
        if self.fixed:
            return free > 0 and (4 * free >= self.max_num_seqs or self.idle >= PREFILL_STEPS * len(self.rows))
        return free >= max(1, self.max_num_seqs // 16)

    def step(self) -> None:
        """Sample one more token for every row."""
        n = len(self.rows)
        for row in self.rows:
            row.length += 1
            self.sampled += row.length - len(row.job.prompt)
        if self.fixed:
            width = self.slots  # the slots beyond n are dead
            while width // 2 >= n:
                width //= 2
            self.graphs.run(self.run_step, width)
        else:
            spans = self.blocks.spans(self.rows)
            self.run_step(n, max(places for _, _, places, _ in spans), spans if self.fast.attends else None)
        self.steps += 1
        self.used += n

    def run_step(self, n: int, length: int = 0, spans=None) -> None:
        """Forward the n newest tokens and choose the next ones, without a read-back; length, spans: see passes.Step."""
        pos, alive = self.pos[:n], self.alive[:n]
        hidden = self.forward(self.cache, self.token[:n], pos, alive, length=length, spans=spans)
        pos += alive
        self.choose(hidden, slice(0, n))

    def choose(self, hidden: torch.Tensor, slots: slice) -> None:
        """Sample the next tokens of k slots from their last hidden states [k, D]."""
        count, alive = self.count[slots], self.alive[slots]
        place = count.clamp(max=self.max_new_tokens - 1)[:, None]
        logits = logits_of(hidden, self.head, self.fast.head)
        token, logp, full = sample_tokens(logits, self.noise[slots].gather(1, place)[:, 0], self.engine.how)
        self.token[slots] = token = torch.where(alive, token, self.token[slots])
        for kept, new in ((self.ids[slots], token), (self.logp[slots], logp), (self.full_logp[slots], full)):
            # a row that is over keeps what it has
            kept.scatter_(1, place, torch.where(alive[:, None], new[:, None], kept.gather(1, place)))
        count += alive
        alive &= ~(token[:, None] == self.ends).any(-1) & (count < self.max_new_tokens)

    def collect(self, ahead: int = 0) -> list[Row]:
        """Take out the rows that are over; sort the others into blocks of like length.

        ahead: make room for as many more tokens of each: until there are blocks, the youngest row waits once more."""
        table = self.table().tolist() if ahead else self.look()
        self.end_early(table)
        over, back = [i for i, (alive, *_) in enumerate(table) if not alive], []
        rest = sorted((i for i in range(len(self.rows)) if i not in over), key=lambda i: -self.rows[i].length)
        while ahead and not self.blocks.fit([self.rows[i] for i in rest], ahead):
            back.append(min(rest, key=lambda i: self.rows[i].length - len(self.rows[i].job.prompt)))
            rest.remove(back[-1])
        rows = self.read(over + back) if over or back else []
        if rows or ahead:
            self.arrange(rest)
        self.queue[:0] = reversed(rows[len(over):])
        self.preempted += len(back)
        return rows[:len(over)]

    def table(self) -> torch.Tensor:
        """Tell whether each row goes on, and where rows end early also its count and newest ids, newest last."""
        n = len(self.rows)
        alive, count = self.alive[:n, None], self.count[:n, None]
        if not self.box and not self.loop_guard:
            return alive
        return torch.cat([alive, count, self.ids[:n].gather(1, (count - self.back).clamp(min=0))], 1)

    def look(self) -> list[list[int]]:
        """Read the table; on a card that of the look before, if no row has moved since.

        So the host does not wait for the steps that it has just asked for; rows that are over run on without effect."""
        if not self.fixed:
            return self.table().tolist()
        before, self.flight = self.flight, Flight(self.table())
        return before.land() if before else []

    def end_early(self, table: list[list[int]]) -> None:
        """End rows that have closed their box, or go round in circles; marks them in the table.

        Looks at every new token, for loops at every 16th: where a row ends does not depend on when the host looks."""
        guard = self.loop_guard
        for i, (row, (_, count, *recent)) in enumerate(zip(self.rows, table) if guard or self.box else ()):
            new = count - len(row.known)
            for token in recent[len(recent) - new:] if new <= len(recent) else self.ids[i, count - new:count].tolist():
                row.known.append(token)
                place = len(row.known)
                row.boxed = (self.box is not None and self.box.may_close(token)
                             and self.box.closed(row.known, row.job.prompt))
                if row.boxed or guard and place >= guard and place % 16 == 0 and in_loop(row.known[-guard:]):
                    self.count[i], self.alive[i], table[i][0] = place, False, 0
                    break

    def read(self, slots: list[int]) -> list[Row]:
        """Copy what slots have sampled to their rows, all at once."""
        at = self.put(torch.tensor(slots, dtype=torch.long))
        kept = [self.count[at, None].int(), self.ids[at].int(),
                *(each[at].view(torch.int32) for each in (self.logp, self.full_logp))]
        count, ids, *logps = torch.cat(kept, 1).cpu().split([1, *3 * [self.max_new_tokens]], 1)
        rows = [self.rows[i] for i in slots]
        for i, (row, [n]) in enumerate(zip(rows, count.tolist(), strict=True)):
            row.ids = ids[i, :n].tolist()
            row.logp, row.full_logp = (each[i, :n].view(torch.float32).tolist() for each in logps)
            row.length, row.shared = len(row.job.prompt) + n, 0  # if it goes on, by a prefill
        return rows

    def arrange(self, keep: list[int]) -> None:
        """Make the rows of slots `keep` the rows 0..n-1, in blocks from long to short; take back all other blocks."""
        ranked, width = sorted(keep, key=lambda i: -self.rows[i].length), self.blocks.width
        n = len(ranked)
        # a row that is in its block already stays where it is
        staying = {i for place, i in enumerate(ranked) if i < n and (width == 1 or i // width == place // width)}
        moved, places = [i for i in ranked if i not in staying], sorted(set(range(n)) - staying)
        at, before = dict(zip(places, moved, strict=True)), [self.blocks.table[i] for i in moved]
        rows = [self.rows[at.get(place, place)] for place in range(n)]
        self.blocks.hold(rows)
        if moved:
            cells = [pair for place, old in zip(places, before)
                     for pair in zip(old[:self.blocks.pages_of(rows[place])], self.blocks.table[place])
                     if pair[0] != pair[1]]
            parts = [moved, places, [old for old, _ in cells], [new for _, new in cells]]
            sources, targets, *cells = self.put(torch.tensor(sum(parts, []))).split([len(part) for part in parts])
            longest = max(rows[place].length for place in places)
            self.cache.move(sources, targets, *cells, min(self.blocks.page, longest))
            moving = [each[sources] for each in self.state]  # all, before memory can run out between two of them
            for each, new in zip(self.state, moving, strict=True):
                each[targets] = new
        self.alive[n:] = False
        self.flight = None  # tells of rows where they were
        self.rows = rows

    def admit(self) -> None:
        """Prefill the next rows of the queue, each prompt once; sample their first tokens."""
        batches = batches_of(self.queue[:self.vacant()], pads=self.engine.pads)
        rows = [row for groups in batches for group in groups for row in group]
        slots = slice(len(self.rows), len(self.rows) + len(rows))
        self.noise[slots] = self.put(torch.stack([stream_noise(row.job.seed, self.max_new_tokens) for row in rows]))
        if any(row.ids for row in rows):  # they go on from these
            for kept, had in ((self.ids, "ids"), (self.logp, "logp"), (self.full_logp, "full_logp")):
                values = pad_sequence([torch.tensor(getattr(row, had), dtype=kept.dtype) for row in rows], True)
                kept[slots, :values.shape[1]] = self.put(values)
        for groups in batches:
            self.prefill(groups)
        del self.queue[:len(rows)]
        self.idle = 0

    def prefill(self, groups: list[list[Row]]) -> None:
        """Fill the next slots with groups of rows that begin with the same tokens, and choose the next ones."""
        rows, first, width = [row for group in groups for row in group], len(self.rows), groups[-1][0].length
        if self.fixed and self.engine.pads:
            width = max(width, min(-(-width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, self.longest))
        self.blocks.hold(self.rows + rows, self.sync)
        pad = self.engine.policy.tokenizer.pad_token_id
        parts = packed(groups, first, self.blocks, pad=pad, width=width, before=self.has_state)
        moved = self.put(torch.cat([part.flatten() for part in parts])).split([part.numel() for part in parts])
        ids, (source, pos, count, last), padding, pages, changes = (
            each.view(part.shape) for each, part in zip(moved, parts))
        how = {"padding": padding} if self.has_state else {"mask": functools.partial(self.prefill_mask, groups)}
        prefilled = fresh_cache(self.model)
        hidden = prefill(self.model, ids, prefilled, **how)
        if self.cache is None:
            self.cache = SlotCache(prefilled, self.blocks)
        slots = slice(first, first + len(rows))
        self.cache.tell(*changes)
        self.cache.fill(first, prefilled, source, pages, padding if self.has_state else None)
        self.pos[slots], self.count[slots], self.alive[slots] = pos, count, True
        self.rows += rows
        self.choose(hidden.flatten(0, 1)[last], slots)

    def prefill_mask(self, groups: list[list[Row]], start: int, end: int):
        """Make the mask of a piece of a right-padded batch; on a card none, as no token sees what is to its right."""
        if not (self.fast.attends and softcap_of(self.model)):
            lengths = torch.tensor([[group[0].length] for group in groups])
            return None if self.fixed else (torch.arange(end) < lengths).long().to(self.device)
        places = torch.arange(end, device=self.device)
        age = (places[start:, None] - places)[None, None]
        return additive_mask(self.model, age, age >= 0)

    def halve(self) -> list[Row]:
        """Go on with half the slots, from the tokens sampled; returns the rows that ended.

        Raises UserError if there was one slot, and rows are left to sample."""
        self.cache = None
        self.graphs.forget()
        give_back()
        self.end_early(self.table().tolist())  # those of the steps since the last look
        rows = self.read(list(range(len(self.rows))))
        over = [row for row, goes_on in zip(rows, self.alive.tolist()) if not goes_on]
        self.queue = [row for row in rows if row not in over] + [row for row in self.queue if row not in rows]
        before, self.max_num_seqs, self.places = self.max_num_seqs, max(1, self.max_num_seqs // 2), self.places // 2
        if self.queue and before == 1:
            raise UserError(f"memory is too small for one sequence of {self.longest} tokens; lower max_new_tokens, use "
                            "quant=nf4, or a smaller model")
        if self.queue:
            self.engine.say(f"out of memory with {before} sequences side by side: going on with {self.max_num_seqs}")
        self.halved += 1
        self.reset()
        return over
