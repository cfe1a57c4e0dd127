"""Sample completions with the weights that train: groups of G per prompt, batched KV-cache decoding.

A group's prompt is prefilled once and its keys and values are copied into G slots. Slots decode side by side; when an
eighth of them is free the next completions move in, and when none is left the batch shrinks, so no step is spent on
rows that have ended. Every completion has its own random stream, seeded by (seed, prompt, sample): it does not
depend on the batch it was decoded in (up to rounding). The log-prob of every token is recorded as it was sampled:
under the temperature and after top-k / top-p / min-p.
"""
import contextlib
import hashlib
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from minimath.config import UserError
from minimath.model import base_causal_lm, compute_dtype, head, hidden_states, inference


class Completion(NamedTuple):
    """One sampled completion."""
    ids: list[int]  # with the end token, if it was reached
    logp: list[float]  # log-prob of each id under the distribution that it was sampled from
    ended: bool  # False: cut at max_new_tokens
    full_logp: list[float] | None = None  # after temperature, before top-k, top-p and min-p; None: the same as logp


class Sampling(NamedTuple):
    """How a token is chosen. temperature 0 is greedy; its log-probs are those at temperature 1."""
    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: a buffer (S, H, T, Dh) whose rows stand at different positions."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.rows = self.pos = None  # set by SlotCache.at for the coming forward
        self.length = 0

    def lazy_initialization(self, key_states, value_states):
        raise RuntimeError("a SlotLayer is allocated by SlotCache")

    def update(self, key_states, value_states, *args, **kwargs):
        """Write one token per row at its position; return the filled part. key_states (n, H, 1, Dh)."""
        n = key_states.shape[0]
        self.keys[self.rows, :, self.pos] = key_states[:, :, 0]
        self.values[self.rows, :, self.pos] = value_states[:, :, 0]
        return self.keys[:n, :, :self.length], self.values[:n, :, :self.length]

    def get_seq_length(self) -> int:
        return self.length - 1  # without the token that the coming forward adds

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    def get_max_length(self) -> int:
        return self.keys.shape[2]


class SlotCache(Cache):
    """A transformers cache in which each of S rows has its own length."""

    def __init__(self, prefilled: DynamicCache, slots: int, max_len: int):
        layers = []
        for layer in prefilled.layers:
            heads, dim_k, dim_v = layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]
            layers.append(SlotLayer(layer.keys.new_zeros(slots, heads, max_len, dim_k),
                                    layer.values.new_zeros(slots, heads, max_len, dim_v)))
        super().__init__(layers=layers)

    def fill(self, slots: list[int], prefilled: DynamicCache, row: int, length: int):
        """Copy a prefilled prompt (its row of a right-padded batch) into several slots."""
        for mine, theirs in zip(self.layers, prefilled.layers, strict=True):
            mine.keys[slots, :, :length] = theirs.keys[row, :, :length]
            mine.values[slots, :, :length] = theirs.values[row, :, :length]

    def move(self, source: int, target: int, length: int):
        for layer in self.layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    def at(self, pos: torch.Tensor):
        """Set the position (n,) at which each row's next token is written."""
        rows, length = torch.arange(len(pos), device=pos.device), int(pos.max()) + 1
        for layer in self.layers:
            layer.rows, layer.pos, layer.length = rows, pos, length


def generate(model, tokenizer, prompts: list[list[int]], *, samples: int = 1, max_new_tokens: int,
             temperature: float = 1.0, top_p: float = 1.0, min_p: float = 0.0, top_k: int = 0, eos: list[int],
             seed: int = 0, slots: int = 64, keys: list[int] | None = None, done: dict | None = None,
             on_done=None) -> list[list[Completion]]:
    """Sample `samples` completions of each prompt.

    prompts: token ids, one list per prompt, none empty. eos: ids that end a completion. seed, keys: the random stream
    of sample s of prompt p is seeded by (seed, keys[p], s); keys default to the prompt's index. slots: rows decoded
    side by side (memory), 0 for all. done: {(prompt, sample): Completion} that an earlier call left; they are not
    sampled again. on_done(prompt, sample, completion) is called as each one ends.
    Returns one list of `samples` completions per prompt. Raises UserError if the model has no standard KV cache.
    """
    if not prompts:
        return []
    how = Sampling(temperature, top_p, min_p, top_k)
    done = dict(done or {})
    jobs = [(p, s) for p in range(len(prompts)) for s in range(samples) if (p, s) not in done]
    slots = min(slots or len(jobs), len(jobs))
    keys = list(range(len(prompts))) if keys is None else keys
    with inference(model), sdpa_on_cpu(model), compute_dtype(model):  # one autocast around all steps: adapter weights are cast once
        state = _Decode(model, tokenizer, prompts, how, slots, max_new_tokens, set(eos))
        while jobs or state.active:
            free = slots - len(state.active)
            if jobs and (free >= max(1, slots // 8) or not state.active):  # a forward per refilled row costs more
                take, jobs = jobs[:free], jobs[free:]
                state.start([(p, s, stream_seed(seed, keys[p], s)) for p, s in take])
            ended = state.step()
            done.update(ended)
            if on_done is not None:
                for (p, s), completion in ended.items():
                    on_done(p, s, completion)
    return [[done[p, s] for s in range(samples)] for p in range(len(prompts))]


@contextlib.contextmanager
def sdpa_on_cpu(model):
    """Decode with sdpa where training uses eager attention: eager copies the keys of every group of heads per token."""
    base = base_causal_lm(model)
    config = base.config.get_text_config()
    swap = (config._attn_implementation == "eager" and base.device.type == "cpu" and base._supports_sdpa
            and not getattr(config, "attn_logit_softcapping", None))
    if swap:
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        if swap:
            config._attn_implementation = "eager"


def stream_seed(*parts: int) -> int:
    """A 63-bit seed from several integers; unlike hash(), the same in every process."""
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class _Row:
    """One running completion."""

    def __init__(self, job: tuple[int, int], length: int, noise: torch.Tensor):
        self.job, self.length, self.noise = job, length, noise  # noise (max_new_tokens,) uniform in [0, 1)
        self.ids, self.logp = [], []


class _Decode:
    """The running batch: rows 0..n-1 of the cache are active, each with the hidden state of its last token."""

    def __init__(self, model, tokenizer, prompts, how, slots, max_new_tokens, eos):
        self.model, self.prompts, self.how, self.eos = model, prompts, how, eos
        self.pad, self.max_new, self.slots = tokenizer.pad_token_id, max_new_tokens, slots
        self.device = base_causal_lm(model).device
        self.head = head(model)
        self.cache = None
        self.active: list[_Row] = []
        self.hidden = None  # (n, D)

    def start(self, jobs: list[tuple[int, int, int]]):
        """Prefill the prompts of new jobs (prompt, sample, seed), each once, and put them into free slots."""
        rows_of: dict[int, list[_Row]] = {}
        for prompt, sample, seed in jobs:
            generator = torch.Generator().manual_seed(seed)
            noise = torch.rand(self.max_new, generator=generator, dtype=torch.float64).to(torch.float32)
            rows_of.setdefault(prompt, []).append(_Row((prompt, sample), len(self.prompts[prompt]), noise))
        unique = sorted(rows_of, key=lambda p: len(self.prompts[p]))
        for first in range(0, len(unique), 32):  # 32 prompts of like length per forward bound the padding
            self._prefill(unique[first:first + 32], rows_of)

    def _prefill(self, batch: list[int], rows_of):
        lengths = [len(self.prompts[p]) for p in batch]
        ids = torch.full((len(batch), max(lengths)), self.pad)
        for i, p in enumerate(batch):
            ids[i, :lengths[i]] = torch.tensor(self.prompts[p])
        mask = torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]  # (B, T)
        prefilled = DynamicCache()  # without a config: full length in every layer, whatever its window
        hidden = hidden_states(self.model, ids.to(self.device), attention_mask=mask.long().to(self.device),
                               past_key_values=prefilled)
        if self.cache is None:
            if any(getattr(layer, "keys", None) is None for layer in prefilled.layers) or not prefilled.layers:
                raise UserError(f"{type(base_causal_lm(self.model)).__name__} does not use the standard KV cache, "
                                "which minimath's rollouts need; use a transformer with softmax attention")
            longest = max(map(len, self.prompts)) + self.max_new
            self.cache = SlotCache(prefilled, self.slots, longest)
        last = hidden[torch.arange(len(batch)), torch.tensor(lengths, device=self.device) - 1]  # (B, D)
        new = []
        for i, p in enumerate(batch):
            free = list(range(len(self.active), len(self.active) + len(rows_of[p])))
            self.cache.fill(free, prefilled, i, lengths[i])
            self.active += rows_of[p]
            new.append(last[i].expand(len(free), -1))
        self.hidden = torch.cat(([] if self.hidden is None else [self.hidden]) + new)

    def step(self) -> dict[tuple[int, int], Completion]:
        """Sample one token for every active row, retire rows that ended, run the others one token on."""
        noise = torch.stack([row.noise[len(row.ids)] for row in self.active]).to(self.device)
        token, logp = sample_tokens(logits_of(self.hidden, self.head), noise, self.how)
        ended = {}
        for row, t, lp in zip(self.active, token.tolist(), logp.tolist(), strict=True):
            row.ids.append(t)
            row.logp.append(lp)
            row.length += 1
            if t in self.eos or len(row.ids) == self.max_new:
                ended[row.job] = Completion(row.ids, row.logp, t in self.eos)
        if ended:
            token = token[self._retire(ended)]
        if self.active:
            self._forward(token)
        else:
            self.hidden = None
        return ended

    def _retire(self, ended) -> torch.Tensor:
        """Fill the places of ended rows with rows from the back; returns the order of the survivors (n,)."""
        order = list(range(len(self.active)))
        i = 0
        while i < len(order):
            if self.active[order[i]].job not in ended:
                i += 1
                continue
            while len(order) > i and self.active[order[-1]].job in ended:
                order.pop()
            if len(order) > i:
                order[i] = order.pop()
                row = self.active[order[i]]
                self.cache.move(order[i], i, row.length - 1)  # the newest token is not in the cache yet
        self.active = [self.active[j] for j in order]
        return torch.tensor(order, dtype=torch.long, device=self.device)

    def _forward(self, token: torch.Tensor):
        pos = torch.tensor([row.length - 1 for row in self.active], device=self.device)
        self.cache.at(pos)
        out = hidden_states(self.model, token[:, None], position_ids=pos[:, None], past_key_values=self.cache,
                            attention_mask=decode_mask(self.model, pos))
        self.hidden = out[:, 0]


def decode_mask(model, pos: torch.Tensor):
    """The attention mask for one new token per row at position pos (n,), in the form the model takes.

    Without a sliding window in play, a plain (n, T) mask of filled places. With one, transformers would count the
    window from the longest row, so the masks are made here: additive (n, 1, 1, T), by layer type where the model
    has layers of several types. A window w lets a token see itself and the w - 1 before it.
    """
    config = base_causal_lm(model).config.get_text_config()
    age = pos[:, None] - torch.arange(int(pos.max()) + 1, device=pos.device)[None]  # (n, T)
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False or age.shape[1] <= window:
        return (age >= 0).long()
    dtype = base_causal_lm(model).dtype

    def additive(seen):
        mask = torch.zeros(seen.shape, dtype=dtype, device=pos.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None, None]

    sliding = additive((age >= 0) & (age < window))
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return {"full_attention": additive(age >= 0), "sliding_attention": sliding}
    return sliding


def logits_of(hidden: torch.Tensor, lm_head) -> torch.Tensor:
    """Next-token logits (n, V) in fp32 of hidden (n, D): n is the number of slots, not of tokens."""
    logits = torch.nn.functional.linear(hidden.to(lm_head.weight.dtype), lm_head.weight, lm_head.bias).float()
    if lm_head.logit_scale != 1.0:
        logits *= lm_head.logit_scale
    if lm_head.softcap:
        logits = lm_head.softcap * torch.tanh(logits / lm_head.softcap)
    return logits


def sample_tokens(logits: torch.Tensor, noise: torch.Tensor, how: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose one token per row by inverting the cumulative distribution at noise.

    logits (n, V) fp32 (overwritten), noise (n,) in [0, 1) -> token (n,) int64, logp (n,) fp32: the log-prob under the
    distribution sampled from, that is after temperature and renormalised after top-k, top-p and min-p.
    """
    if how.temperature == 0:
        token = logits.argmax(-1)
        return token, logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1)
    if how.temperature != 1:
        logits /= how.temperature
    logits = truncate(logits, how)
    probs = torch.softmax(logits, -1)
    cumulative = probs.cumsum(-1)
    # scaled by the sum and kept below it: noise rounded to 1 would fall on the last token, whatever its probability
    noise = noise.clamp(max=1 - 2 ** -24)
    token = torch.searchsorted(cumulative, noise[:, None] * cumulative[:, -1:], right=True)[:, 0]
    token = token.clamp_(max=logits.shape[-1] - 1)
    return token, torch.log(probs.gather(-1, token[:, None])[:, 0])


def truncate(logits: torch.Tensor, how: Sampling) -> torch.Tensor:
    """Set the logits (n, V) outside top-k, min-p and top-p to -inf, in this order."""
    if 0 < how.top_k < logits.shape[-1]:
        logits.masked_fill_(logits < logits.topk(how.top_k, -1).values[:, -1:], -torch.inf)
    if how.min_p > 0:
        logits.masked_fill_(logits < logits.amax(-1, keepdim=True) + torch.log(torch.tensor(how.min_p)), -torch.inf)
    if how.top_p < 1:
        best, order = torch.softmax(logits, -1).sort(-1, descending=True)
        drop = best.cumsum(-1) - best >= how.top_p  # mass before a token already suffices; the first always stays
        logits.masked_fill_(torch.zeros_like(drop).scatter_(-1, order, drop), -torch.inf)
    return logits
