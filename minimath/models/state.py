"""Models that keep more than keys and values of a sequence: convolution and recurrent state of a fixed size.

A token changes the state of what comes after it, and no mask tells it whose row it is: rows never share a sequence."""
import inspect
import weakref

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from minimath.models.forward import adapter_off, base_causal_lm, compute_dtype, inference, layer_kinds

STATE = {"conv", "linear_attention", "hybrid"}  # hybrid: state, and keys and values
NEITHER = {"moe", "mlp"}
_BYTES = weakref.WeakKeyDictionary()  # of a model's state


def keeps_state(model) -> bool:
    """Tell whether tokens reach those behind them other than through attention."""
    return bool(getattr(base_causal_lm(model), "_is_stateful", False) or STATE & set(layer_kinds(model)))


def cache_argument(model) -> str:
    """Name the decoder's argument for the cache."""
    taken = inspect.signature(base_causal_lm(model).base_model.forward).parameters
    return "cache_params" if "cache_params" in taken else "past_key_values"


def fresh_cache(model) -> DynamicCache:
    """Make an empty cache for a prefill; layers with a window keep the full length in it."""
    if not STATE & set(layer_kinds(model)):
        return DynamicCache()  # without a config: full length in every layer
    cache = DynamicCache(config=base_causal_lm(model).config)
    cache.layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers]
    return cache


def states_of(layer) -> list[torch.Tensor]:
    """List the tensors (B, ...) of a layer's convolution and recurrent state."""
    if not isinstance(layer, LinearAttentionLayer):
        return []
    return [each for kept in (layer.conv_states, layer.recurrent_states) for each in kept.values() if each is not None]


def state_bytes(model) -> int:
    """Count the bytes of one sequence's state in all layers, as one token leaves it.

    Works on the meta device too. 0 for a model without, and for one whose state has no place in transformers' cache."""
    base = base_causal_lm(model)
    if not STATE & set(layer_kinds(model)):
        return 0
    if base not in _BYTES:
        cache, ids = fresh_cache(model), torch.zeros(1, 1, dtype=torch.long, device=base.device)
        # autocast knows no meta device, and peft asks for it around experts
        with inference(model), adapter_off(model) if base.device.type == "meta" else compute_dtype(model):
            base.base_model(input_ids=ids, use_cache=True, **{cache_argument(model): cache})
        _BYTES[base] = sum(each.nbytes for layer in cache.layers for each in states_of(layer))
    return _BYTES[base]
