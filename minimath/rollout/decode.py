"""The running batch of a rollout: rows in slots, the decode step on the device, rows that come and go."""
import torch
from transformers.cache_utils import DynamicCache

from minimath.core.errors import UserError
from minimath.rollout.graphs import StepGraphs
from minimath.models.load import base_causal_lm, head
from minimath.rollout.plain_step import plain_layers, plain_step
from minimath.rollout.sampling import Sampling, sample_tokens, stream_noise
from minimath.rollout.kv_cache import SlotCache, check_cache, decode_mask
from minimath.rollout.stopping import in_loop

BLOCK = 16  # rows that attention treats alike on a CPU
SYNC = {"cuda": 4}  # steps between looks at which rows have ended; a look makes the host wait for the device
WINDOW = 256  # lengths of attention on CUDA are multiples of this
PREFILL_TOKENS = 4096  # of prompts in one forward


def fixed_shapes(device: torch.device) -> bool:
    """Whether steps have few shapes, as recording them needs: rows and lengths are rounded up."""
    return device.type == "cuda"


class Row:
    """One completion, running or waiting."""

    def __init__(self, job: tuple[int, int], seed: int, prompt: list[int]):
        self.job, self.seed, self.prompt = job, seed, prompt
        self.ids, self.logp, self.full_logp = [], [], []  # filled in when it ends, or is put back
        self.ended, self.length, self.seen = False, 0, 0  # length: tokens in the cache; seen: of ids, by early_ends

    def tokens(self) -> list[int]:
        return self.prompt + self.ids


class Decode:
    """The running batch. Slot i < len(rows) belongs to rows[i]; its state lives on the device, in tensors (S, ...):
    token: sampled last, not yet in the cache; pos: its place; count: tokens sampled; alive: goes on."""

    def __init__(self, model, tokenizer, queue: list[Row], how: Sampling, slots: int, max_new: int, eos, blocks: bool,
                 groups: dict, product, copied: bool):
        self.model, self.queue, self.how, self.slots, self.max_new = model, queue, how, slots, max_new
        self.decoder, self.head, self.product = base_causal_lm(model).base_model, head(model), product
        self.device, self.pad = base_causal_lm(model).device, tokenizer.pad_token_id
        self.eos = torch.tensor(sorted(set(eos)), device=self.device, dtype=torch.long)
        self.copied, self.blocks, self.plain = copied, blocks, plain_layers(model, groups) if blocks else None
        self.fixed = fixed_shapes(self.device)
        self.sync = SYNC.get(self.device.type, 1)
        self.longest = max(len(row.prompt) for row in queue) + max_new
        self.steps = self.used = self.full_steps = self.full_used = self.halved = 0
        self.over: list[Row] = []  # ended, not yet handed out
        self.graphs = StepGraphs(self.device)
        self.reset()

    def reset(self) -> None:
        """No rows and an empty cache for self.slots slots."""
        slots, here = self.slots, {"device": self.device}
        self.rows: list[Row] = []
        self.cache = None
        self.token, self.pos, self.count = (torch.zeros(slots, dtype=torch.long, **here) for _ in range(3))
        self.alive = torch.zeros(slots, dtype=torch.bool, **here)
        self.noise, self.logp, self.full_logp = (torch.zeros(slots, self.max_new, **here) for _ in range(3))
        self.ids = torch.full((slots, self.longest + 1), self.pad, dtype=torch.long, **here)  # prompt and completion
        self.graphs.forget()

    def facts(self) -> dict:
        return {"slots": self.slots, "steps": self.steps, "halved": self.halved, "graphs": self.graphs.used,
                "weights": "copied once" if self.copied else "in place",
                "slot_fill": self.used / max(1, self.steps * self.slots),
                "slot_fill_full": self.full_used / max(1, self.full_steps * self.slots)}

    def advance(self, watch, loop_guard: int) -> list[Row]:
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
        n = width = len(self.rows)
        for row in self.rows:
            row.length += 1
        length, spans = max(row.length for row in self.rows), None
        if self.fixed:  # few shapes, each of which is recorded; the slots beyond n are dead
            length, width = min(-(-length // WINDOW) * WINDOW, self.cache.capacity()), self.slots
            while width // 2 >= n:
                width //= 2
        if self.device.type == "cpu" and self.blocks and not self.fixed:
            spans = [(a, min(a + BLOCK, n), max(row.length for row in self.rows[a:a + BLOCK]))
                     for a in range(0, n, BLOCK)]
        self.graphs.run(self.run_step, width, length, spans)
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
        over = [not alive for alive in self.alive[:n].tolist()]
        early = self.early_ends(watch, loop_guard) if watch is not None or loop_guard else {}
        if not any(over) and not early:
            return
        for i in range(n):
            if over[i] or i in early:
                self.read(i, early.get(i))
                self.finish(self.rows[i])
        self.arrange([i for i in range(n) if not over[i] and i not in early])

    def early_ends(self, watch, loop_guard: int) -> dict[int, int]:
        """Slots whose rows have closed their box, or go round in circles, and the tokens that these then have.

        Every new token is looked at, and loops at every 16th of a row: where a completion ends does not depend on when
        the host looks.
        """
        n, early = len(self.rows), {}
        back = torch.arange(2 * self.sync - 1, -1, -1, device=self.device)  # after an out-of-memory more are new
        slots = torch.arange(n, device=self.device)[:, None]
        recent = self.ids[slots, (self.pos[:n, None] - back).clamp(min=0)].tolist()  # (n, 2 sync), newest last
        for i, (row, count) in enumerate(zip(self.rows, self.count[:n].tolist(), strict=True)):
            start = len(row.prompt)
            for place in range(row.seen + 1, count + 1):
                closes = watch is not None and watch.may_close(recent[i][place - count - 1])
                turns = loop_guard and place >= loop_guard and place % 16 == 0
                if not closes and not turns:
                    continue
                ids = self.ids[i, start:start + place].tolist()
                row.ended = closes and watch.closed(ids)
                if row.ended or turns and in_loop(ids[-loop_guard:]):
                    early[i] = place
                    break
            row.seen = count
        return early

    def read(self, i: int, count: int | None = None) -> None:
        """Copy what slot i has sampled, or the first `count` tokens of it, to its row."""
        row, count = self.rows[i], int(self.count[i]) if count is None else count
        row.ids = self.ids[i, len(row.prompt):len(row.prompt) + count].tolist()
        row.logp, row.full_logp = self.logp[i, :count].tolist(), self.full_logp[i, :count].tolist()

    def finish(self, row: Row) -> None:
        """A row that is over, with what it has sampled read."""
        row.ended = row.ended or row.ids[-1] in self.eos.tolist()
        self.over.append(row)

    def arrange(self, keep: list[int]) -> None:
        """Make the rows of slots `keep` the rows 0..n-1, in blocks from long to short, moving as few as possible."""
        ranked = sorted(keep, key=lambda i: -self.rows[i].length)
        n, targets = len(ranked), {}
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
        self.alive[n:] = False
        at = {j: self.rows[i] for i, j in targets.items()}
        self.rows = [at[j] for j in range(n)]

    def admit(self) -> None:
        """Prefill the next rows of the queue, each prompt once, into the free slots, and sample their first tokens."""
        new = self.queue[:self.slots - len(self.rows)]
        by_tokens: dict[tuple, list[Row]] = {}
        for row in new:
            by_tokens.setdefault(tuple(row.tokens()), []).append(row)
        batch: list[tuple] = []
        for tokens in sorted(by_tokens, key=len):  # prompts of like length in a forward: little padding
            if batch and (len(batch) + 1) * len(tokens) > PREFILL_TOKENS:
                self.prefill(batch, by_tokens)
                batch = []
            batch.append(tokens)
        self.prefill(batch, by_tokens)

    def prefill(self, batch: list[tuple], by_tokens: dict[tuple, list[Row]]) -> None:
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
            self.cache = SlotCache(prefilled, self.slots, self.longest)
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

    def place(self, slot: int, row: Row, tokens: tuple) -> None:
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
        alive = self.alive.tolist()
        for i, row in enumerate(self.rows):
            if row not in self.over:
                self.read(i)
                if not alive[i]:  # it ended since the last look
                    self.finish(row)
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
