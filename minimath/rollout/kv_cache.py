"""The KV cache of a running batch: S slots whose rows stand at different positions, and attention over them.

Decoding is bound by the keys and values that it reads. On a CPU two batched products read a block of rows of like
length as far as its longest row; on CUDA a kernel reads each row to its own end, which it finds on the device."""
import contextlib
import sys
from typing import NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from minimath.core.errors import UserError
from minimath.kernels.decode_attention import decode_attention
from minimath.models.attention import probabilities
from minimath.models.forward import base_causal_lm, sliding_window
from minimath.models.state import keeps_state, layer_kinds
from minimath.rollout.slots import slots_of

ALIGN = 64  # places are a multiple of this, which keeps the rows of a mask aligned
ATTENTION = "minimath_slots"


class SlotCache(Cache):
    """A transformers cache in which each of S rows has its own length."""

    def __init__(self, prefilled: DynamicCache, slots: int, length: int):
        """Make buffers of zeros for `slots` rows of `length` places, as of a prefilled cache.

        Once: buffers that grow leave holes in the heap, and recorded steps hold their addresses."""
        self.places = -(-length // ALIGN) * ALIGN
        super().__init__(layers=[slots_of(layer, slots, self.places) for layer in prefilled.layers])

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for layer in self.layers for each in layer.tensors())

    def fill(self, first: int, prefilled: DynamicCache, source: torch.Tensor, padding=None) -> None:
        """Copy rows `source` [k] of a batch into the slots from `first` on; what is padding is unseen.

        padding [k]: how much stands before each of them; None: the batch is padded at the right."""
        width = next((layer.keys.shape[2] for layer in prefilled.layers if getattr(layer, "keys", None) is not None), 0)
        order = None
        if padding is not None and width:
            order = (torch.arange(width, device=source.device) + padding[:, None]) % width
        for mine, theirs in zip(self.layers, prefilled.layers, strict=True):
            mine.fill(slice(first, first + len(source)), theirs, source, order)

    def move(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """Move rows `sources`, their first `length` places, to `targets` all at once."""
        for layer in self.layers:
            layer.move(sources, targets, length)

    def at(self, pos: torch.Tensor, length: int) -> None:
        """Set the places [n] of the rows' next tokens; attention sees the first `length`."""
        rows = torch.arange(len(pos), device=pos.device)
        for layer in self.layers:
            layer.at(rows, pos, length)


class Seen(NamedTuple):
    """What the rows of a step see of their slots: their last places."""
    length: torch.Tensor  # (n,) places in use, the new token's included
    windows: list[int]  # of each layer; 0: none


class NoStandardCache(UserError):
    """The model keeps something else than keys and values, or state that our slots can hold."""


def windows_of(model) -> list[int]:
    """List how many places each layer sees, by the rule of additive_mask; 0 is all."""
    layers, window = base_causal_lm(model).config.get_text_config().num_hidden_layers, sliding_window(model) or 0
    kinds = layer_kinds(model) or ["sliding_attention"] * layers
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
    # most models with state do not say so, but ask transformers for a function; check_state tries it
    serves = serves or keeps_state(model) and hasattr(sys.modules[type(base).__module__], "ALL_ATTENTION_FUNCTIONS")
    config._attn_implementation = ATTENTION if serves else before
    try:
        yield bool(serves)
    finally:
        config._attn_implementation = before


def softcap_of(model) -> float | None:
    return getattr(base_causal_lm(model).config.get_text_config(), "attn_logit_softcapping", None)
