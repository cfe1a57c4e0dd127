"""The KV cache of a running batch: S slots whose rows stand at different positions, and attention over them.

Attention, by transformers' own sdpa, reads a block of rows of like length only as far as its longest row: on a CPU
decoding is bound by the keys and values that it reads."""
import contextlib

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from minimath.core.errors import UserError
from minimath.models.forward import base_causal_lm, compute_dtype, inference

ALIGN = 64  # places are a multiple of this, which keeps the rows of a mask aligned for CUDA's sdpa kernels
ATTENTION = "minimath_slots"


class SlotLayer(DynamicLayer):
    """Keys and values of one layer, [S, H, T, Dh]."""

    def __init__(self, prefilled, slots: int, places: int):
        super().__init__()
        self.keys, self.values = (old.new_zeros(slots, old.shape[1], places, old.shape[3])
                                  for old in (prefilled.keys, prefilled.values))
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

    def fill(self, slots: list[int], prefilled: DynamicCache, row: int, length: int) -> None:
        """Copy a prefilled prompt, a row of a right-padded batch, into several slots."""
        for mine, theirs in zip(self.layers, prefilled.layers, strict=True):
            mine.keys[slots, :, :length] = theirs.keys[row, :, :length]
            mine.values[slots, :, :length] = theirs.values[row, :, :length]

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
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


def slot_attention(module, query, key, value, attention_mask, *, spans=None, scaling=None, **kwargs):
    """Attend by torch's sdpa; when decoding, a block of rows at a time.

    query (n, Hq, Q, Dh), key (n, H, T, Dh). spans: (first row, end row, places) of blocks; None: all as one. Heads that
    share keys are rows of one query: to copy the keys for each took four to six times as long."""
    n, heads, rows, dim = query.shape
    if rows > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    query = query.reshape(n, key.shape[1], -1, dim)
    parts = [scaled_dot_product_attention(query[a:b], key[a:b, :, :length], value[a:b, :, :length],
                                          attention_mask[a:b, ..., :length], scale=scaling)
             for a, b, length in spans or [(0, n, key.shape[2])]]
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).reshape(n, 1, heads, dim), None


AttentionInterface.register(ATTENTION, slot_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextlib.contextmanager
def decoding_attention(model):
    """Let the model attend by `slot_attention` inside; yields whether it does.

    Not so with a softcap on scores (Gemma-2), which sdpa lacks: those keep their eager attention. That copies the keys
    of every group of heads per token, and flash_attention_2 takes no mask of ours."""
    base = base_causal_lm(model)
    config = base.config.get_text_config()
    before = config._attn_implementation
    serves = (base._supports_sdpa and getattr(base, "_supports_attention_backend", False)
              and not getattr(config, "attn_logit_softcapping", None))
    config._attn_implementation = ATTENTION if serves else before
    try:
        yield serves
    finally:
        config._attn_implementation = before
