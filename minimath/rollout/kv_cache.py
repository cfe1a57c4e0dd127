"""The KV cache of a running batch: S slots whose rows stand at different positions, and attention over them.

Decoding is bound by the keys and values that it reads. On a CPU two batched products read a block of rows of like
length as far as its longest row; on CUDA a kernel reads each row to its own end, which it finds on the device."""
import contextlib
import sys
from typing import NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from minimath.core.errors import UserError
from minimath.kernels.decode_attention import decode_attention
from minimath.models.attention import probabilities
from minimath.models.forward import base_causal_lm, compute_dtype, inference, sliding_window

ALIGN = 64  # places are a multiple of this, which keeps the rows of a mask aligned
FIXED_SHAPES = ("cuda",)  # devices whose steps have one shape for each number of rows, as recording needs it
ATTENTION = "minimath_slots"


class SlotLayer(DynamicLayer):
    """Keys and values of one layer, [S, H, T, Dh]; of the keys T is innermost where products read them."""

    def __init__(self, prefilled, slots: int, places: int):
        super().__init__()
        self.keys, self.values = (old.new_zeros(slots, old.shape[1], places, old.shape[3])
                                  for old in (prefilled.keys, prefilled.values))
        if self.keys.device.type not in FIXED_SHAPES:
            self.keys = self.keys.view(*self.keys.shape[:2], -1, places).transpose(2, 3)
        self.is_initialized = True
        self.rows = self.pos = self.length = None  # set by SlotCache.at for the coming forward

    def update(self, key_states, value_states, *args, **kwargs):
        """Write one token [n, H, 1, Dh] per row at its position; return the part in use."""
        n = key_states.shape[0]
        self.keys[self.rows, :, self.pos] = key_states[:, :, 0]
        self.values[self.rows, :, self.pos] = value_states[:, :, 0]
        return self.keys[:n, :, :self.length], self.values[:n, :, :self.length]

    def get_seq_length(self) -> int:
        return self.length - 1  # without the token that the coming forward adds


class SlotCache(Cache):
    """A transformers cache in which each of S rows has its own length."""

    def __init__(self, prefilled: DynamicCache, slots: int, length: int):
        """Make buffers of zeros for `slots` rows of `length` places, as of a prefilled cache.

        Once: buffers that grow leave holes in the heap, and recorded steps hold their addresses."""
        self.places = -(-length // ALIGN) * ALIGN
        super().__init__(layers=[SlotLayer(layer, slots, self.places) for layer in prefilled.layers])

    def fill(self, first: int, prefilled: DynamicCache, source: torch.Tensor) -> None:
        """Copy rows `source` [k] of a right-padded batch into the slots from `first` on; what is padding is unseen."""
        slots, places = slice(first, first + len(source)), prefilled.layers[0].keys.shape[2]
        for mine, theirs in zip(self.layers, prefilled.layers, strict=True):
            mine.keys[slots, :, :places] = theirs.keys.index_select(0, source)
            mine.values[slots, :, :places] = theirs.values.index_select(0, source)

    def move(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """Move rows `sources`, their first `length` places, to `targets` all at once."""
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                buffer[targets, :, :length] = buffer[sources, :, :length]

    def at(self, pos: torch.Tensor, length: int) -> None:
        """Set the places [n] of the rows' next tokens; attention sees the first `length`."""
        rows = torch.arange(len(pos), device=pos.device)
        for layer in self.layers:
            layer.rows, layer.pos, layer.length = rows, pos, length


class NoStandardCache(UserError):
    """The model keeps something else than keys and values in every layer."""


def check_model(model) -> None:
    """Raise NoStandardCache unless all layers attend as we know, and keep keys and values."""
    base, cache = base_causal_lm(model), DynamicCache()
    kinds = set(getattr(base.config.get_text_config(), "layer_types", None) or ())
    if kinds <= {"full_attention", "sliding_attention"} and not getattr(base, "_is_stateful", False):
        with inference(model), compute_dtype(model):
            ids = torch.zeros(1, 1, dtype=torch.long, device=base.device)
            base.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    if not keys or any(each is None or each.dim() != 4 for each in keys):
        raise NoStandardCache(f"{type(base).__name__} has no standard KV cache")


class Seen(NamedTuple):
    """What the rows of a step see of their slots: their last places."""
    length: torch.Tensor  # (n,) places in use, the new token's included
    windows: list[int]  # of each layer; 0: none


def windows_of(model) -> list[int]:
    """List how many places each layer sees, by the rule of additive_mask; 0 is all."""
    config = base_causal_lm(model).config.get_text_config()
    kinds, window = getattr(config, "layer_types", None), sliding_window(model) or 0
    kinds = kinds or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else 0 for kind in kinds]


def slot_attention(module, query, key, value, attention_mask, *, spans=None, seen: Seen | None = None, scaling=None,
                   softcap=None, **kwargs):
    """Attend to a prompt as transformers does; in a step by the kernel (seen), or by products for blocks of rows.

    query (n, Hq, Q, Dh), key (n, H, T, Dh). spans: (first row, end row, places) of blocks. Heads that share keys are
    rows of one query."""
    n, heads, _, dim = query.shape
    if seen is None and spans is None:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        attend, more = (eager, {"softcap": softcap}) if softcap else (sdpa_attention_forward, {})
        return attend(module, query, key, value, attention_mask, scaling=scaling, **more, **kwargs)
    query, scale = query.reshape(n, key.shape[1], -1, dim), dim ** -0.5 if scaling is None else scaling
    if seen is not None:
        out = decode_attention(query, key, value, seen.length, scale=scale, window=seen.windows[module.layer_idx],
                               softcap=softcap or 0.0)
        return out.reshape(n, 1, heads, dim), None
    out = torch.empty_like(query)
    for a, b, length in spans:
        q, k, v = (each.flatten(0, 1) for each in (query[a:b], key[a:b, :, :length], value[a:b, :, :length]))
        mask = attention_mask[a:b, ..., :length].expand(-1, key.shape[1], -1, -1).flatten(0, 1)
        torch.bmm(probabilities(q, k, scale, softcap, mask)[0], v, out=out[a:b].flatten(0, 1))
    return out.reshape(n, 1, heads, dim), None


AttentionInterface.register(ATTENTION, slot_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextlib.contextmanager
def decoding_attention(model):
    """Let the model attend by `slot_attention` inside; yields whether it does."""
    base = base_causal_lm(model)
    config = base.config.get_text_config()
    before = config._attn_implementation
    serves = getattr(base, "_supports_attention_backend", False) and (base._supports_sdpa or softcap_of(model))
    config._attn_implementation = ATTENTION if serves else before
    try:
        yield bool(serves)
    finally:
        config._attn_implementation = before


def softcap_of(model) -> float | None:
    return getattr(base_causal_lm(model).config.get_text_config(), "attn_logit_softcapping", None)
