"""The KV cache of a running batch: rows of different length in blocks of a pool, and attention over them.

Decoding is bound by the keys and values that it reads. On a CPU batched products read the cells of a block side by
side, as far as its longest row; on CUDA a kernel reads each row to its own end, which it finds on the device."""
import contextlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, LinearAttentionLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from minimath.core.errors import UserError
from minimath.kernels.decode_attention import decode_attention, together
from minimath.models.attention import scores
from minimath.models.forward import base_causal_lm, layer_kinds, sliding_window, text_config
from minimath.models.memory import keeps_state, states_of
from minimath.rollout.blocks import Blocks

ATTENTION = "minimath_slots"
FIXED_SHAPES = ("cuda",)  # devices whose steps have one shape for each number of rows, as recording needs it


class Place(NamedTuple):
    """Where the first n rows write in a step, and what they see."""
    cells: torch.Tensor  # (n,)
    inside: torch.Tensor  # (n,) places in those cells
    length: int  # of what attention sees
    table: torch.Tensor | None  # (n, pages) cells to put behind one another; None: attention reads them where they are


class SlotLayer(LinearAttentionLayer, DynamicLayer):
    """What a batch keeps of a layer: keys and values, convolution and recurrent state, both or neither.

    keys, values (cells, H, page, Dh); of the keys the page is innermost where products read them. Of the states
    (slots, ...) a step changes in place the rows that it is given."""

    def __init__(self, prefilled, blocks: Blocks):
        DynamicLayer.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=getattr(prefilled, "number_of_states", 0))
        self.whole, self.cells, self.is_initialized, self.place = {}, [], True, None
        if states_of(prefilled):
            self.whole = {name: {i: old.new_zeros(blocks.slots, *old.shape[1:])
                                 for i, old in getattr(prefilled, name).items() if old is not None}
                          for name in ("conv_states", "recurrent_states")}
            for name in ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state",
                         "conv_kernel_size"):
                setattr(self, name, dict(getattr(prefilled, name)))
        self.states = [each for kept in self.whole.values() for each in kept.values()]
        if getattr(prefilled, "keys", None) is not None:
            self.keys, self.values = (old.new_zeros(blocks.cells, old.shape[1], blocks.page, old.shape[3])
                                      for old in (prefilled.keys, prefilled.values))
            if blocks.width > 1 or self.keys.device.type not in FIXED_SHAPES:
                self.keys = self.keys.view(*self.keys.shape[:2], -1, blocks.page).transpose(2, 3)
            self.cells = [self.keys, self.values]

    def tensors(self) -> list[torch.Tensor]:
        return self.states + self.cells

    def at(self, place: Place) -> None:
        """Stand at the coming step: its rows are the first n."""
        self.place = place
        for name, kept in self.whole.items():
            getattr(self, name).update((i, each[:len(place.cells)]) for i, each in kept.items())

    def update(self, key_states, value_states, *args, **kwargs):
        """Write one token (n, H, 1, Dh) per row at its place; return all cells, or the rows that they make."""
        cells, inside, length, table = self.place
        self.keys[cells, :, inside] = key_states[:, :, 0]
        self.values[cells, :, inside] = value_states[:, :, 0]
        if table is None:
            return self.keys, self.values
        return tuple(together(each, table)[:, :, :length] for each in self.cells)

    def get_seq_length(self) -> int:
        return self.place.length - 1  # without the token that the coming forward adds

    def fill(self, prefilled, slots: slice, source, padding, cells, rows, pages) -> None:
        """Copy rows of a prefilled layer, as SlotCache.fill."""
        for mine, theirs in zip(self.states, states_of(prefilled), strict=True):
            mine[slots] = theirs.index_select(0, source)
        if not self.cells:
            return
        places, page = prefilled.keys.shape[2], self.keys.shape[2]
        if padding is not None:
            order = (torch.arange(places, device=self.keys.device) + padding[:, None]) % places
        for mine, theirs in ((self.keys, prefilled.keys), (self.values, prefilled.values)):
            if padding is not None:
                theirs = theirs.gather(2, order[:, None, :, None].expand_as(theirs))
            if places > page:
                theirs = pad(theirs, (0, 0, 0, -places % page))
            cut = theirs.unflatten(2, (-1, min(page, places)))
            mine[cells, :, :cut.shape[3]] = cut[rows, :, pages]

    def move(self, sources, targets, old, new, places: int) -> None:
        """Copy slots `sources` to `targets`, and the first places of cells `old` to `new`, all at once."""
        for each in self.states:
            each[targets] = each[sources]
        for each in self.cells if len(old) else ():
            each[new, :, :places] = each[old, :, :places]


class SlotCache(Cache):
    """A transformers cache in which each of S rows has its own length; table (S, pages): their cells."""

    def __init__(self, prefilled: DynamicCache, blocks: Blocks):
        """Make a pool of zeros, as of a prefilled cache.

        Once: buffers that grow leave holes in the heap, and recorded steps hold their addresses."""
        super().__init__(layers=[SlotLayer(layer, blocks) for layer in prefilled.layers])
        self.blocks, device = blocks, next((t.device for layer in self.layers for t in layer.tensors()), None)
        self.table = torch.zeros(blocks.slots, blocks.pages, dtype=torch.long, device=device)

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for layer in self.layers for each in layer.tensors())

    def tell(self, places: torch.Tensor, cells: torch.Tensor) -> None:
        """Write cells [c] at places [c] of the table: Blocks.take_changes."""
        self.table.view(-1)[places] = cells

    def fill(self, first: int, prefilled: DynamicCache, source: torch.Tensor, pages: torch.Tensor, padding=None):
        """Copy rows `source` [k] of a batch into the slots from `first` on.

        pages [3, m]: cells, rows of the batch, and their pages that go there. padding [B]: how much stands before each
        row of the batch, and is left out; None: it stands behind."""
        for mine, theirs in zip(self.layers, prefilled.layers, strict=True):
            mine.fill(theirs, slice(first, first + len(source)), source, padding, *pages)

    def move(self, *what) -> None:
        """Move rows and cells, see SlotLayer."""
        for layer in self.layers:
            layer.move(*what)

    def at(self, pos: torch.Tensor, length: int, *, together: bool) -> None:
        """Set the places [n] of the rows' next tokens; attention sees the first `length`.

        together: as one tensor, not by slot_attention."""
        page, table = pos // self.blocks.page, self.table[:len(pos)]
        place = Place(table.gather(1, page[:, None])[:, 0], pos - page * self.blocks.page, length,
                      table[:, :-(-length // self.blocks.page)] if together else None)
        for layer in self.layers:
            layer.at(place)


class Seen(NamedTuple):
    """What the rows of a step see: their last places."""
    length: torch.Tensor  # (n,) places in use, the new token's included
    table: torch.Tensor  # (n, pages) cells
    windows: list[int]  # of each layer; 0: none


class Fast(NamedTuple):
    """How the model computes while it decodes, see open.fast_decoding."""
    attends: bool  # by slot_attention
    head: Callable | None  # multiplies by the head's weight; None: a plain product


class NoStandardCache(UserError):
    """The model keeps something else than keys and values, or state that our slots can hold."""


def windows_of(model) -> list[int]:
    """List how many places each layer sees, by the rule of additive_mask; 0 is all."""
    window = sliding_window(model) or 0
    kinds = layer_kinds(model) or ["sliding_attention"] * text_config(model).num_hidden_layers
    return [window if kind == "sliding_attention" else 0 for kind in kinds]


def slot_attention(module, query, key, value, attention_mask, *, spans=None, seen: Seen | None = None, scaling=None,
                   softcap=None, **kwargs):
    """Attend to a prompt as transformers does; in a step by the kernel (seen), or by products for neighbours.

    query (n, Hq, Q, Dh), key (n, H, T, Dh), in a step (cells, H, page, Dh). spans: Blocks.spans. Heads that share keys
    are rows of one query."""
    n, heads, _, dim = query.shape
    if seen is None and spans is None:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        attend, more = (eager, {"softcap": softcap}) if softcap else (sdpa_attention_forward, {})
        return attend(module, query, key, value, attention_mask, scaling=scaling, **more, **kwargs)
    query, scale = query.reshape(n, key.shape[1], -1, dim), dim ** -0.5 if scaling is None else scaling
    if seen is not None:
        out = decode_attention(query, key, value, seen.length, seen.table, scale=scale, softcap=softcap or 0.0,
                               window=seen.windows[module.layer_idx])
        return out.reshape(n, 1, heads, dim), None
    out, page = torch.empty_like(query), key.shape[2]
    for a, b, length, cells in spans:
        q, to = query[a:b].flatten(0, 1), out[a:b].flatten(0, 1)
        masks = attention_mask[a:b, ..., :length].expand(-1, key.shape[1], -1, -1).flatten(0, 1).split(page, -1)
        k, v = ([each[cell:cell + b - a, :, :mask.shape[-1]].flatten(0, 1) for cell, mask in zip(cells, masks)]
                for each in (key, value))
        parts = [scores(q, each, scale, softcap, mask)[0] for each, mask in zip(k, masks)]
        weights = torch.softmax(torch.cat(parts, -1), -1).split(page, -1)
        for i, (weight, each) in enumerate(zip(weights, v)):
            to.baddbmm_(weight, each, beta=int(i > 0))  # the first page does not read `to`
    return out.reshape(n, 1, heads, dim), None


AttentionInterface.register(ATTENTION, slot_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextlib.contextmanager
def decoding_attention(model):
    """Let the model attend by `slot_attention` inside; yields whether it does."""
    base, config = base_causal_lm(model), text_config(model)
    before = config._attn_implementation
    serves = getattr(base, "_supports_attention_backend", False) and (base._supports_sdpa or softcap_of(model))
    # most models with state do not say so, but ask transformers for a function; check_state tries it
    serves = serves or keeps_state(model) and hasattr(sys.modules[type(base).__module__], "ALL_ATTENTION_FUNCTIONS")
    config._attn_implementation = ATTENTION if serves else before
    try:
        yield bool(serves)
    finally:
        config._attn_implementation = before


def softcap_of(model) -> float | None:
    return getattr(text_config(model), "attn_logit_softcapping", None)
