"""The decoder layers of a model as three autograd nodes and an attention, for training and for decoding.

    qkv = R([q k v](norm x))         keeps x, x A^T
    x'  = x + o(attention(qkv))      keeps the attention's output
    y   = x' + down(act(g) u),  [g u] = [gate up](norm x')     keeps x' and [g u]

Norms and act(g) u are cheap: the backward pass computes them again. R rotates q and k, after their own norms where a
model has those; a family with norms behind o and down has them before the sums. What a layer needs beyond the linear
layers (linears.py) comes from minimath.kernels.elementwise.

Only families whose layers are known to be this are fused; others run as transformers has them."""
import functools
import sys
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch.autograd.function import once_differentiable
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from minimath.kernels import elementwise
from minimath.models.attention import Heads, Segments
from minimath.models.block_attention import PackedRows, attend_rows
from minimath.models.linears import LinearGroup, base_of, is_plain

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Phi3")
# For gradient checkpointing, transformers 5.23 wraps the layers' forward, and older ones their __call__
CHECKPOINTS_FORWARD = "__call__" not in vars(GradientCheckpointingLayer)
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class Norm(NamedTuple):
    """An RMSNorm with frozen weight: x r (offset + weight)."""
    weight: torch.Tensor
    eps: float
    offset: int

    def forward(self, x):
        return elementwise.rms_norm(x, self.weight, self.eps, self.offset)

    def again(self, x, r):
        return elementwise.apply_norm(x, self.weight, r, self.offset)

    def backward(self, dy, x, r, residual=None):
        return elementwise.rms_norm_backward(dy, x, self.weight, r, self.offset, residual)


def norm_of(module) -> Norm | None:
    if module is None:
        return None
    eps = getattr(module, "variance_epsilon", None) or module.eps
    return Norm(module.weight, eps, int(type(module).__name__.startswith("Gemma")))


def keep(ctx, layer: "FusedLayer", *groups: LinearGroup) -> None:
    """Note with which adapters a pass was computed: others may be active at its backward pass."""
    ctx.layer, ctx.active = layer, [group.active for group in groups]
    ctx.versions = [active.version() for active in ctx.active]


def kept(ctx) -> tuple:
    """Return the layer and the active adapters of each group; RuntimeError if those changed."""
    if ctx.versions != [active.version() for active in ctx.active]:
        raise RuntimeError("adapter weights were changed between a forward pass and its backward pass")
    return ctx.layer, *ctx.active


class Projection(torch.autograd.Function):
    """x (N, D) -> qkv (N, width): normed before the products, rotated behind."""

    @staticmethod
    def forward(ctx, x, layer: "FusedLayer", cos, sin, *params):
        n, r = layer.norm.forward(x)
        masks = layer.qkv.masks(n)
        y, low = layer.qkv.forward(n, masks)
        raw, factors = None, []
        if layer.head_norms:
            raw = layer.turned(y).clone()
            for norm, part, into in zip(layer.head_norms, layer.parts(raw), layer.parts(layer.turned(y)), strict=True):
                normed, factor = norm.forward(part)
                into.copy_(normed)
                factors.append(factor)
        elementwise.rotate(layer.turned(y), cos, sin)
        keep(ctx, layer, layer.qkv)
        ctx.save_for_backward(x, r, low, cos, sin, raw, *factors, *(masks or ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (layer, active), (x, r, low, cos, sin, raw, *rest) = kept(ctx), ctx.saved_tensors
        factors, masks = rest[:len(layer.head_norms)], rest[len(layer.head_norms):] or None
        elementwise.rotate(layer.turned(dy), cos, sin, back=True)  # in place: nothing else reads this gradient
        for index, norm in enumerate(layer.head_norms):
            part = layer.parts(layer.turned(dy))[index]
            part.copy_(norm.backward(part, layer.parts(raw)[index], factors[index]))
        need_x, grads = ctx.needs_input_grad[0], [None] * (len(ctx.needs_input_grad) - 4)
        dn, dlow = layer.qkv.input_grad(dy, active, masks, need_x=need_x)
        if any(ctx.needs_input_grad[4:]):
            grads = layer.qkv.param_grads(dy, dlow, layer.norm.again(x, r), low, active, masks)
        return (layer.norm.backward(dn, x, r) if need_x else None), None, None, None, *grads


class OutputSum(torch.autograd.Function):
    """(attention's output (N, H Dh), x (N, D)) -> x + o(output), normed before the sum where a family does so."""

    @staticmethod
    def forward(ctx, out, x, layer: "FusedLayer", *params):
        masks = layer.o.masks(out)
        y, low = layer.o.forward(out, masks)
        y, *kept = normed(layer.norm_after, y)
        keep(ctx, layer, layer.o)
        ctx.save_for_backward(out, low, *kept, *(masks or ()))
        return y.add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (layer, active), (out, low, before, r, *masks) = kept(ctx), ctx.saved_tensors
        dy = grad if r is None else layer.norm_after.backward(grad, before, r)
        dout, dlow = layer.o.input_grad(dy, active, masks or None)
        grads = [None] * (len(ctx.needs_input_grad) - 3)
        if any(ctx.needs_input_grad[3:]):
            grads = layer.o.param_grads(dy, dlow, out, low, active, masks or None)
        return dout, grad, None, *grads


class GatedMLP(torch.autograd.Function):
    """x (N, D) -> x + down(act(gate(norm x)) up(norm x)), normed before the sum where a family does so."""

    @staticmethod
    def forward(ctx, x, layer: "FusedLayer", *params):
        n, r = layer.mlp_norm.forward(x)
        masks = layer.gate_up.masks(n)
        gate_up, low = layer.gate_up.forward(n, masks)
        h = elementwise.gated(gate_up, layer.act)
        down_masks = layer.down.masks(h)
        y, down_low = layer.down.forward(h, down_masks)
        y, *kept = normed(layer.mlp_norm_after, y)
        keep(ctx, layer, layer.gate_up, layer.down)
        ctx.of_gate_up = len(masks or ())
        ctx.save_for_backward(x, r, low, gate_up, down_low, *kept, *(masks or ()), *(down_masks or ()))
        return y.add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (layer, active, of_down), saved = kept(ctx), ctx.saved_tensors
        x, r, low, gate_up, down_low, before, r_after, *masks = saved
        masks, down_masks = masks[:ctx.of_gate_up] or None, masks[ctx.of_gate_up:] or None
        dy = grad if r_after is None else layer.mlp_norm_after.backward(grad, before, r_after)
        dh, down_dlow = layer.down.input_grad(dy, of_down, down_masks)
        dgate_up, h = elementwise.gated_backward(dh, gate_up, layer.act)
        dn, dlow = layer.gate_up.input_grad(dgate_up, active, masks)
        grads = [None] * (len(ctx.needs_input_grad) - 2)
        if any(ctx.needs_input_grad[2:]):
            grads = [*layer.gate_up.param_grads(dgate_up, dlow, layer.mlp_norm.again(x, r), low, active, masks),
                     *layer.down.param_grads(dy, down_dlow, h, down_low, of_down, down_masks)]
        return layer.mlp_norm.backward(dn, x, r, grad), None, *grads


def normed(norm: Norm | None, y: torch.Tensor) -> tuple:
    """Return (y normed, y as it was, r), or (y, None, None) without a norm."""
    return (y, None, None) if norm is None else ((result := norm.forward(y))[0], y, result[1])


class FusedLayer:
    """A decoder layer of transformers, computed by the nodes above with its own parameters."""

    def __init__(self, layer, dtype: torch.dtype):
        attn, mlp = layer.self_attn, layer.mlp
        config = attn.config
        self.attn, self.act = attn, ACTIVATIONS[getattr(config, "hidden_activation", None) or config.hidden_act]
        together = hasattr(attn, "qkv_proj")
        self.qkv = LinearGroup([attn.qkv_proj] if together else [attn.q_proj, attn.k_proj, attn.v_proj], dtype)
        self.o = LinearGroup([attn.o_proj], dtype)
        together = hasattr(mlp, "gate_up_proj")
        self.gate_up = LinearGroup([mlp.gate_up_proj] if together else [mlp.gate_proj, mlp.up_proj], dtype)
        self.down = LinearGroup([mlp.down_proj], dtype)
        self.groups = (self.qkv, self.o, self.gate_up, self.down)
        self.norm, after = norm_of(layer.input_layernorm), norm_of(layer.post_attention_layernorm)
        sandwich = hasattr(layer, "pre_feedforward_layernorm")
        self.norm_after = after if sandwich else None
        self.mlp_norm = norm_of(layer.pre_feedforward_layernorm) if sandwich else after
        self.mlp_norm_after = norm_of(layer.post_feedforward_layernorm) if sandwich else None
        self.head_norms = [norm_of(attn.q_norm), norm_of(attn.k_norm)] if hasattr(attn, "q_norm") else []
        self.softcap = getattr(attn, "attn_logit_softcapping", None)
        self.heads = Heads(config.num_attention_heads, config.num_key_value_heads, attn.head_dim, attn.scaling,
                           self.softcap)

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
            out = attend_rows(qkv, self.heads, segments, window)
        else:
            q, k, v = (each.unflatten(-1, (-1, self.heads.dim)).unflatten(0, shape[:2]).transpose(1, 2)
                       for each in qkv.split([self.heads.queries * self.heads.dim] + 2 * [
                           self.heads.keys * self.heads.dim], -1))
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, self.attn.layer_idx)
            module = sys.modules[type(self.attn).__module__]
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.attn.config._attn_implementation,
                                                           module.eager_attention_forward)
            more = {"softcap": self.softcap} if self.softcap else {}
            out, _ = attend(self.attn, q, k, v, attention_mask, dropout=0.0, scaling=self.attn.scaling,
                            sliding_window=window, position_ids=position_ids, use_cache=use_cache,
                            **more, **kwargs)
            out = out.reshape(len(x), -1)
        x = OutputSum.apply(out, x, self, *self.o.params)
        return GatedMLP.apply(x, self, *self.gate_up.params, *self.down.params).view(shape)


def fusable(layer, dtype: torch.dtype) -> str:
    """Say why a decoder layer cannot be fused; "" where it can."""
    name = type(layer).__name__
    if name not in [f"{family}DecoderLayer" for family in FAMILIES]:
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


def checkpointed(layer, fused: FusedLayer, hidden_states, *args, **kwargs):
    """Compute a fused layer, again in backward if the layer is to, as its class's own forward would be."""
    if not (layer.gradient_checkpointing and layer.training):
        return fused.forward(hidden_states, *args, **kwargs)
    actives = [group.active for group in fused.groups]

    def forward(*args):
        for group, active in zip(fused.groups, actives, strict=True):  # others may be active in backward
            group.active = active
        return fused.forward(*args, **kwargs)
    return layer._gradient_checkpointing_func(forward, hidden_states, *args)


class FusedLayers:
    """The fused layers of a decoder, and what they share."""

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
    for layer in layers:
        if why := fusable(layer, model.dtype):
            return why
    return ""


def fused_layers(model) -> FusedLayers | None:
    """The fused layers of a causal LM, None where transformers' own run."""
    return getattr(model, "fused_layers", None)
