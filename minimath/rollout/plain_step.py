"""One decode step of Llama-like models on a CPU, in two dozen operations a layer.

A step of a small model on a CPU is bound by overhead. This spares transformers' modules and half of their operations
(SmolLM2-135M on 2 cores: 63 -> 48 ms a step for 8 rows, 113 -> 92 for 64), for the families whose layers are all

    x += W_o attention(rope(W_qkv norm(x)))        x += W_down (silu(W_gate norm(x)) * W_up norm(x))

with grouped products (linears.py) and rope on queries and keys together. On CUDA the step is recorded as a graph, and
other families go through transformers.
"""
import torch
import torch.nn.functional as F

from minimath.models.linears import Group
from minimath.models.load import base_causal_lm
from minimath.rollout.kv_cache import SlotCache

FAMILIES = {"llama", "mistral", "qwen2", "qwen3"}  # model types; Qwen2's bias is in W_qkv, Qwen3 has norms on q and k


class Layer:
    """The parts of a decoder layer that a step needs."""

    def __init__(self, layer, groups: dict):
        attention, mlp = layer.self_attn, layer.mlp
        self.norm_1, self.norm_2 = norm_of(layer.input_layernorm), norm_of(layer.post_attention_layernorm)
        self.q_norm, self.k_norm = (norm_of(getattr(attention, name, None)) for name in ("q_norm", "k_norm"))
        self.qkv = whole_group(groups, attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = whole_group(groups, attention.o_proj)
        self.gate_up = whole_group(groups, mlp.gate_proj, mlp.up_proj)
        self.down = whole_group(groups, mlp.down_proj)
        self.act, self.dim, self.scaling = mlp.act_fn, attention.head_dim, attention.scaling
        self.repeat = attention.num_key_value_groups
        self.kind = getattr(attention, "layer_type", None) or getattr(layer, "attention_type", "full_attention")


def whole_group(groups: dict, *modules) -> Group | None:
    """The group that consists of exactly these modules, in this order."""
    group = groups.get(modules[0])
    return group if group is not None and group.modules == modules else None


def norm_of(module):
    return None if module is None else (module.weight, module.variance_epsilon)


def rms_norm(x: torch.Tensor, norm) -> torch.Tensor:
    weight, eps = norm
    return F.rms_norm(x, weight.shape, weight, eps)


def plain_layers(model, groups: dict) -> list[Layer] | None:
    """The layers of a model that `plain_step` serves, None for any other. groups: of linears.decoding_linears."""
    base = base_causal_lm(model)
    if base.device.type != "cpu" or base.config.model_type not in FAMILIES:
        return None
    layers = [Layer(layer, groups) for layer in base.base_model.layers]
    known = all(each for layer in layers for each in (layer.qkv, layer.out, layer.gate_up, layer.down))
    return layers if known else None


def plain_step(model, layers: list[Layer], token: torch.Tensor, pos: torch.Tensor, cache: SlotCache, mask,
               spans) -> torch.Tensor:
    """Final hidden states (n, D) of one token per row; keys and values go into the cache, which is `at` its places.

    token, pos (n,) int64; mask: of slots.decode_mask; spans: (first row, end row, places) of each block of rows.
    """
    decoder = base_causal_lm(model).base_model
    x = decoder.embed_tokens(token)  # (n, D)
    cos, sin = decoder.rotary_emb(x, pos[:, None])  # (n, 1, Dh)
    for layer, store in zip(layers, cache.layers, strict=True):
        attended = attend(layer, store, layer.qkv.compute(rms_norm(x, layer.norm_1)), cos, sin,
                          mask[layer.kind] if isinstance(mask, dict) else mask, spans)
        x = x + layer.out.compute(attended)
        both = layer.gate_up.compute(rms_norm(x, layer.norm_2))
        gate, up = both.split(layer.gate_up.widths, -1)
        x = x + layer.down.compute(layer.act(gate) * up)
    return rms_norm(x, norm_of(decoder.norm))


def attend(layer: Layer, store, qkv: torch.Tensor, cos, sin, mask, spans) -> torch.Tensor:
    """Attention of n new tokens: qkv (n, (Hq + 2 H) Dh) -> (n, Hq Dh)."""
    n, dim = len(qkv), layer.dim
    qkv = qkv.view(n, -1, dim)
    heads = (qkv.shape[1] // (layer.repeat + 2)) * layer.repeat  # Hq
    kv_heads = heads // layer.repeat
    queries, keys, values = qkv.split((heads, kv_heads, kv_heads), 1)
    if layer.q_norm:
        queries, keys = rms_norm(queries, layer.q_norm), rms_norm(keys, layer.k_norm)
        both = torch.cat((queries, keys), 1)
    else:
        both = qkv[:, :heads + kv_heads]
    turned = both * cos
    half = dim // 2
    turned[..., :half].addcmul_(both[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(both[..., :half], sin[..., half:])
    store.keys[store.rows, :, store.pos] = turned[:, heads:]
    store.values[store.rows, :, store.pos] = values
    queries = turned[:, :heads].unflatten(1, (kv_heads, layer.repeat))  # query heads of one kv head as rows of one
    parts = [F.scaled_dot_product_attention(queries[a:b], store.keys[a:b, :, :length], store.values[a:b, :, :length],
                                            attn_mask=mask[a:b, ..., :length], scale=layer.scaling)
             for a, b, length in spans]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(n, -1)
