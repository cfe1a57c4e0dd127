"""The decoder layers of a model as three autograd nodes (nodes.py) and an attention, for training and for decoding.

Only families whose layers are known to be this are fused; others run as transformers has them."""
import functools
import sys

import torch
from peft.tuners.lora import LoraLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from minimath.models.attention import Heads, SegmentAttention, Segments
from minimath.models.block_attention import PackedRows, RowAttention
from minimath.models.linears import LinearGroup, base_of, is_plain
from minimath.models.nodes import PIECE, GatedMLP, MLPBackward, MLPForward, OutputSum, Projection, norm_of

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Phi3")
# For gradient checkpointing, transformers 5.23 wraps the layers' forward, and older ones their __call__
CHECKPOINTS_FORWARD = "__call__" not in vars(GradientCheckpointingLayer)
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class FusedLayer:
    """A decoder layer of transformers, computed by nodes.py with its own parameters."""

    def __init__(self, layer, dtype: torch.dtype):
        attn, mlp = layer.self_attn, layer.mlp
        config = attn.config
        self.module, self.attn = layer, attn
        self.act = ACTIVATIONS[getattr(config, "hidden_activation", None) or config.hidden_act]
        qkv = [attn.qkv_proj] if hasattr(attn, "qkv_proj") else [attn.q_proj, attn.k_proj, attn.v_proj]
        gate_up = [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]
        self.qkv, self.o, self.gate_up, self.down = (
            LinearGroup(modules, dtype) for modules in (qkv, [attn.o_proj], gate_up, [mlp.down_proj]))
        self.groups = (self.qkv, self.o, self.gate_up, self.down)
        self.norm, after = norm_of(layer.input_layernorm), norm_of(layer.post_attention_layernorm)
        self.norm_after, self.mlp_norm, self.mlp_norm_after = None, after, None
        if hasattr(layer, "pre_feedforward_layernorm"):
            self.norm_after, self.mlp_norm, self.mlp_norm_after = (
                after, norm_of(layer.pre_feedforward_layernorm), norm_of(layer.post_feedforward_layernorm))
        self.head_norms = [norm_of(attn.q_norm), norm_of(attn.k_norm)] if hasattr(attn, "q_norm") else []
        self.heads = Heads(config.num_attention_heads, config.num_key_value_heads, attn.head_dim, attn.scaling,
                           getattr(attn, "attn_logit_softcapping", None))

    def turned(self, qkv: torch.Tensor) -> torch.Tensor:
        """View the heads of q and k in qkv (N, width): (N, queries + keys, Dh)."""
        heads = self.heads
        return qkv[:, :(heads.queries + heads.keys) * heads.dim].unflatten(-1, (-1, heads.dim))

    def parts(self, turned: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return turned.split([self.heads.queries, self.heads.keys], 1)

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None,
                position_embeddings=None, *, segments: Segments | PackedRows | None = None, **kwargs):
        """Compute the layer as transformers calls it; segments: of hidden_states."""
        x, shape = hidden_states.flatten(0, 1), hidden_states.shape
        cos, sin = (each.expand(shape[0], -1, -1).flatten(0, 1) for each in position_embeddings)
        window = getattr(self.attn, "sliding_window", getattr(self.attn.config, "sliding_window", None))
        qkv = Projection.apply(x, self, cos, sin, *self.qkv.params)
        if segments is not None and past_key_values is None:
            attention = SegmentAttention if isinstance(segments, Segments) else RowAttention
            out = attention.apply(qkv, self.heads, segments, window)
        else:
            q, k, v = self.heads.split(qkv)
            q, k, v = (each.unflatten(0, shape[:2]).transpose(1, 2) for each in (q.flatten(1, 2), k, v))
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, self.attn.layer_idx)
            module = sys.modules[type(self.attn).__module__]
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.attn.config._attn_implementation,
                                                           module.eager_attention_forward)
            more = {"softcap": self.heads.softcap} if self.heads.softcap else {}
            out, _ = attend(self.attn, q, k, v, attention_mask, dropout=0.0, scaling=self.attn.scaling,
                            sliding_window=window, position_ids=position_ids, use_cache=use_cache,
                            **more, **kwargs)
            out = out.reshape(len(x), -1)
        x = OutputSum.apply(out, x, self, *self.o.params)
        params = (*self.gate_up.params, *self.down.params)
        if len(x) <= PIECE or torch.is_grad_enabled() and not is_checkpointed(self.module):
            return GatedMLP.apply(x, self, *params).view(shape)
        x = MLPBackward.apply(x, self, *params) if torch.is_grad_enabled() else x
        return MLPForward.apply(x, self).view(shape)


def unfusable_layer(layer, dtype: torch.dtype) -> str:
    """Say why a decoder layer can't be fused, or ""."""
    name, known = type(layer).__name__, type(layer).__module__.startswith("transformers.")
    if not known or name not in [f"{family}DecoderLayer" for family in FAMILIES]:  # own code has such names, too
        return f"{name} is not of a known family ({', '.join(FAMILIES)})"
    config = layer.self_attn.config
    if (getattr(config, "hidden_activation", None) or config.hidden_act) not in ACTIVATIONS:
        return f"its activation is {config.hidden_act}"
    if any(getattr(config, each, 0) for each in ("attention_dropout", "resid_pdrop")):
        return "it drops activations"
    for path, module in layer.named_modules():
        if path.endswith("_proj") and not is_plain(module):
            return f"{path} is not a plain linear layer with plain LoRA"
    if any(p.dtype != dtype for n, p in layer.named_parameters() if "lora_" not in n and p.is_floating_point()):
        return "its weights are of several types"
    return ""


def is_checkpointed(layer) -> bool:
    return layer.gradient_checkpointing and layer.training


def checkpointed(layer, fused: FusedLayer, hidden_states, *args, **kwargs):
    """Compute a fused layer, again in backward if the layer is to, as its class's own forward would be."""
    if not is_checkpointed(layer):
        return fused.forward(hidden_states, *args, **kwargs)
    actives = [group.active for group in fused.groups]

    def forward(*args):
        for group, active in zip(fused.groups, actives, strict=True):  # others may be active in backward
            group.active = active
        return fused.forward(*args, **kwargs)
    return layer._gradient_checkpointing_func(forward, hidden_states, *args)


class FusedLayers:
    """The fused layers of a decoder."""

    def __init__(self, decoder):
        self.decoder, self.frozen = decoder, False  # frozen: weights don't change, adapters are cast already
        self.build()
        decoder.register_forward_pre_hook(self.refresh)

    def build(self) -> None:
        self.layers = [FusedLayer(layer, self.decoder.dtype) for layer in self.decoder.layers]
        for layer, fused in zip(self.decoder.layers, self.layers, strict=True):
            layer.forward = functools.partial(checkpointed, layer, fused) if CHECKPOINTS_FORWARD else fused.forward
        self.built_of = self.weights()

    @property
    def groups(self) -> list[LinearGroup]:
        return [group for layer in self.layers for group in layer.groups]

    def weights(self) -> list[tuple[int, int]]:
        """Identify the linear layers and where their weights are."""
        return [(id(module), base_of(module).weight.data_ptr()) for layer in self.decoder.layers
                for owner in (layer.self_attn, layer.mlp) for name, module in owner.named_children()
                if name.endswith("_proj")]

    def refresh(self, *_) -> None:
        """Take over the active adapters before a pass; all anew after merge, to() and the like."""
        if self.frozen:
            return
        if self.weights() != self.built_of:
            self.build()
        for group in self.groups:
            group.refresh()


def fuse(model) -> str:
    """Fuse the decoder layers of a causal LM; return why not, or ""."""
    if not (why := unfusable(model)):
        model.fused_layers = FusedLayers(model.base_model)
    return why


def unfusable(model) -> str:
    """Say why the decoder layers of a causal LM can't be fused, or ""."""
    if not (layers := getattr(model.base_model, "layers", None)):
        return f"{type(model.base_model).__name__} has no list of decoder layers"
    inside = {module for layer in layers for module in layer.modules()}
    if any(isinstance(module, LoraLayer) and module not in inside for module in model.modules()):
        return "an adapter stands outside of them"
    return next(filter(None, (unfusable_layer(layer, model.dtype) for layer in layers)), "")


def fused_layers(model) -> FusedLayers | None:
    """The fused layers of a causal LM, None where transformers' own run."""
    return getattr(model, "fused_layers", None)
