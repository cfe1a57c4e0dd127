"""Passes of the model that fill and read the slot cache, and whether a model's passes can."""
import torch

from minimath.core.errors import is_out_of_memory
from minimath.models.forward import additive_mask, base_causal_lm, compute_dtype, inference, layer_kinds, not_looked_at
from minimath.models.memory import ATTEND, NEITHER, STATE, cache_argument, fresh_cache, keeps_state
from minimath.rollout import kv_cache
from minimath.rollout.blocks import Blocks, Row
from minimath.rollout.engine import Job
from minimath.rollout.kv_cache import NoStandardCache, Seen, SlotCache, decoding_attention, softcap_of, windows_of

PADDING_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # of the values' spread
STEP_TOLERANCE = {torch.float32: 0.01}  # of the same, between a scan and a step; 0.1 in 16 bits
TRIED = 8  # tokens of a prompt
WIDTH_MULTIPLE = 64  # places, of a prefill on a card: few shapes, whose kernels are chosen once
PREFILL_TOKENS = 4096  # in one forward: of several prompts, or a piece of a longer one


class Step:
    """The forward of a step: what the model takes beside the newest tokens."""

    def __init__(self, model, attends: bool):
        base = base_causal_lm(model)
        self.model, self.decoder, self.windows = model, base.base_model, windows_of(model)
        self.fixed = attends and base.device.type in kv_cache.FIXED_SHAPES
        self.argument, self.no_mask = cache_argument(model), None
        if self.fixed:
            self.no_mask = masks_by_kind(model, not_looked_at(model))

    def __call__(self, cache: SlotCache, token: torch.Tensor, pos: torch.Tensor, alive: torch.Tensor, *,
                 length: int = 0, spans=None) -> torch.Tensor:
        """Compute the hidden states [n, D] of n tokens at their places, without a read-back.

        length: of the longest row, spans: see slot_attention; both where shapes are not fixed."""
        if self.fixed:
            cache.at(pos, cache.blocks.longest, together=False)  # a dead row reads one place
            mask, more = self.no_mask, {"seen": Seen(pos * alive + 1, cache.table[:len(pos)], self.windows)}
        else:
            cache.at(pos, length, together=not spans)
            age = pos[:, None, None, None] - torch.arange(length, device=pos.device)  # (n, 1, 1, T)
            mask = masks_by_kind(self.model, additive_mask(self.model, age, age >= 0))
            more = {"spans": spans} if spans else {}
        return self.decoder(input_ids=token[:, None], position_ids=pos[:, None], attention_mask=mask, use_cache=True,
                            **{self.argument: cache}, **more).last_hidden_state[:, 0]


def masks_by_kind(model, mask):
    """Give each kind of layer its mask where some keep state, which takes none in a step."""
    kinds = set(layer_kinds(model))
    if not STATE & kinds:
        return mask
    if not kinds & (ATTEND | {"hybrid"}):
        return None
    attends = mask if isinstance(mask, dict) else dict.fromkeys(ATTEND, mask)
    return attends | dict.fromkeys(STATE | NEITHER)


def batches_of(rows: list[Row], *, pads: bool) -> list[list[list[Row]]]:
    """Split rows into forwards, each a list of groups that begin with the same tokens.

    pads: whether prompts of unlike length share one."""
    by_tokens: dict[tuple, list[Row]] = {}
    for row in rows:
        by_tokens.setdefault(row.tokens(), []).append(row)
    batches: list[list[list[Row]]] = [[]]
    for group in sorted(by_tokens.values(), key=lambda group: group[0].length):  # like lengths: little padding
        length, last = group[0].length, batches[-1]
        if last and ((len(last) + 1) * length > PREFILL_TOKENS or not pads and length != last[0][0].length):
            batches.append(last := [])
        last.append(group)
    return batches


def packed(groups: list[list[Row]], first: int, blocks: Blocks, *, pad: int, width: int, before: bool) -> list:
    """Lay out a forward for groups, which take the slots from `first` on: all on the host, for one copy.

    before: whether padding stands before the prompts. Returns ids (B, width); of each row (4, k): its place in the
    batch, the next token's position, the number of tokens sampled, where its last one stands; padding before each
    prompt (B,); pages (3, m) for SlotCache.fill, and changes (2, c) for SlotCache.tell."""
    lengths, rows = torch.tensor([group[0].length for group in groups]), [row for group in groups for row in group]
    padding = width - lengths if before else torch.zeros_like(lengths)
    ids = torch.full((len(groups), width), pad)
    for line, group, start in zip(ids, groups, padding.tolist(), strict=True):
        line[start:start + group[0].length] = torch.tensor(group[0].tokens())
    source = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group) for group in groups]))
    numbers = torch.stack([source, lengths[source], torch.tensor([len(row.ids) for row in rows]),
                           source * width + (padding + lengths)[source] - 1])
    pages = [(blocks.table[first + i][page], at, page) for i, (row, at) in enumerate(zip(rows, source.tolist()))
             for page in range(row.shared, blocks.pages_of(row))]
    return [ids, numbers, padding, torch.tensor(pages, dtype=torch.long).view(-1, 3).T,
            torch.tensor(blocks.take_changes(), dtype=torch.long)]


def prefill(model, ids: torch.Tensor, cache, *, mask=None, padding: torch.Tensor | None = None) -> torch.Tensor:
    """Compute the hidden states [B, T, D] of prompts, and fill a fresh cache with them.

    In pieces of PREFILL_TOKENS, so that the memory of a pass over a long prompt is bounded; whole where there is state:
    not every recurrent layer goes on from it with several tokens. mask(start, end): the mask of a piece; None: prompts
    are not padded. padding [B]: how many tokens of padding stand before each; None: there is no state."""
    more, hidden, width = {cache_argument(model): cache, "use_cache": True}, [], ids.shape[1]
    if padding is not None:
        place = torch.arange(width, device=ids.device) - padding[:, None]
        more |= {"attention_mask": (place >= 0).long(), "position_ids": place.clamp(min=0)}
    for part in ids.split(PREFILL_TOKENS if padding is None else width, 1):
        if mask:
            start = sum(each.shape[1] for each in hidden)
            more["attention_mask"] = mask(start, start + part.shape[1])
        hidden.append(base_causal_lm(model).base_model(input_ids=part, **more).last_hidden_state)
    return torch.cat(hidden, 1) if len(hidden) > 1 else hidden[0]


def check_model(model, *, state: bool = True) -> bool:
    """Raise NoStandardCache unless layers attend as we know, or keep state that slots hold.

    state: whether they may. Returns whether prompts of unlike length share a prefill: not every recurrent model leaves
    masked tokens out of its state, and no config says so."""
    base, cache, kinds = base_causal_lm(model), fresh_cache(model), set(layer_kinds(model))
    if state and STATE & kinds:
        return check_state(model)
    if kinds <= ATTEND and not keeps_state(model):
        with inference(model), compute_dtype(model):
            prefill(model, torch.zeros(1, 1, dtype=torch.long, device=base.device), cache)
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    if not keys or any(each is None or each.dim() != 4 for each in keys):
        raise NoStandardCache(f"{type(base).__name__} has no standard KV cache")
    return True


def check_state(model) -> bool:
    """Do so for a model with state: compare a step from slots with the whole sequence."""
    base, name = base_causal_lm(model), type(base_causal_lm(model)).__name__
    if softcap_of(model) or not set(layer_kinds(model)) <= ATTEND | STATE | NEITHER:
        raise NoStandardCache(f"{name} has layers of a kind that our cache does not know")
    try:
        with inference(model), compute_dtype(model):
            alone, padded = (_difference(model, padding) for padding in (0, 3))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise NoStandardCache(f"{name} does not decode from our cache ({type(error).__name__}: "
                              f"{' '.join(str(error).split())[:200]})") from error
    if not alone <= STEP_TOLERANCE.get(base.dtype, 0.1):
        raise NoStandardCache(f"{name} decodes from our cache {alone:.2g} away from a whole pass")
    return abs(padded - alone) <= PADDING_TOLERANCE.get(base.dtype, 1e-4)


def _difference(model, padding: int) -> float:
    """Find how far a step behind a prompt, with padding before it, is from a whole pass."""
    base = base_causal_lm(model)
    ids = torch.arange(1, TRIED + 2, device=base.device)[None] * 7 % base.get_input_embeddings().weight.shape[0]
    whole = base.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -2:]
    with decoding_attention(model) as attends:
        before, source, cache = ids[:, :1].expand(1, padding), torch.zeros_like(ids[0, :2]), fresh_cache(model)
        last = prefill(model, torch.cat([before, ids[:, :-1]], 1), cache, padding=source[:1] + padding)[:, -1]
        step, rows = Step(model, attends), [Row(Job((i, 0), [0] * TRIED, 0)) for i in range(2)]
        blocks = Blocks(2, TRIED + 1, 2 * TRIED + 2, alone=step.fixed)
        blocks.hold(rows, 1)
        slots = SlotCache(cache, blocks)
        slots.tell(*source.new_tensor(blocks.take_changes()))
        slots.fill(0, cache, source, source.new_tensor([[cells[0] for cells in blocks.table], [0, 0], [0, 0]]),
                   source[:1] + padding)
        spans = blocks.spans(rows) if attends and not step.fixed else None
        new = step(slots, ids[0, -1:].expand(2), source + TRIED, source == 0, length=TRIED + 1, spans=spans)
    apart = torch.cat([last, new]).float() - whole[[0, 1, 1]].float()
    return float(apart.abs().mean() / whole.float().std())
