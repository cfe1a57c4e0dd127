"""The autograd nodes of a decoder layer.

    qkv = R([q k v](norm x))         keeps x, x A^T
    x'  = x + o(attention(qkv))      keeps the attention's output
    y   = x' + down(act(g) u),  [g u] = [gate up](norm x')     keeps x' and [g u]

Norms and act(g) u are cheap: the backward pass computes them again. R rotates q and k, after their own norms where a
model has those; a family with norms behind o and down has them before the sums. `layer` is a fused.FusedLayer.

The MLP of more than PIECE rows, in a pass without gradients or a layer that is computed again anyway, goes by pieces:
[g u] of 24,000 tokens of a 14B model as a whole would be 1.3 GB, and twice that in backward."""
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from minimath.kernels import elementwise
from minimath.models.linears import LinearGroup

PIECE = 4096  # rows; enough that products, and what 4-bit weights take to be dequantised, cost no more than at once


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


def norm_of(module) -> Norm:
    eps = getattr(module, "variance_epsilon", None) or module.eps
    return Norm(module.weight, eps, int(type(module).__name__.startswith("Gemma")))


def keep(ctx, layer, *groups: LinearGroup) -> None:
    """Note the adapters of a pass: others may be active at its backward pass."""
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
    def forward(ctx, x, layer, cos, sin, *params):
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
        need_x = ctx.needs_input_grad[0]
        dn, dlow = layer.qkv.input_grad(dy, active, masks, need_x=need_x)
        grads = layer.qkv.param_grads(dy, dlow, layer.norm.again(x, r), low, active, masks)
        return (layer.norm.backward(dn, x, r) if need_x else None), None, None, None, *grads


class OutputSum(torch.autograd.Function):
    """(attention's output (N, H Dh), x (N, D)) -> x + o(output), normed before the sum where a family does so."""

    @staticmethod
    def forward(ctx, out, x, layer, *params):
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
        return dout, grad, None, *layer.o.param_grads(dy, dlow, out, low, active, masks or None)


class GatedMLP(torch.autograd.Function):
    """x (N, D) -> x + down(act(gate(norm x)) up(norm x)), normed before the sum where a family does so."""

    @staticmethod
    def forward(ctx, x, layer, *params):
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
        grads = [*layer.gate_up.param_grads(dgate_up, dlow, layer.mlp_norm.again(x, r), low, active, masks),
                 *layer.down.param_grads(dy, down_dlow, h, down_low, of_down, down_masks)]
        return layer.mlp_norm.backward(dn, x, r, grad), None, *grads


def normed(norm: Norm | None, y: torch.Tensor) -> tuple:
    """Return (y normed, y as it was, r), or (y, None, None) without a norm."""
    if norm is None:
        return y, None, None
    result, r = norm.forward(y)
    return result, y, r


class Piece:
    """What GatedMLP notes of some rows; stands for autograd's own context."""

    def save_for_backward(self, *tensors) -> None:
        self.saved_tensors = tensors


def pieces_of(*tensors: torch.Tensor):
    """Cut tensors into equal pieces of at most PIECE rows; yield those of each place."""
    return zip(*(each.chunk(-(-len(each) // PIECE)) for each in tensors), strict=True)


class MLPBackward(torch.autograd.Function):
    """x (N, D) -> x, with the backward pass of GatedMLP, by pieces that are computed again from x.

    MLPForward stands behind it and keeps nothing: a checkpointed layer that is computed again ends before it."""

    @staticmethod
    def forward(ctx, x, layer, *params):
        keep(ctx, layer, layer.gate_up, layer.down)
        ctx.random = torch.get_rng_state(), *get_device_states(x)  # dropout draws by pieces
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (layer, *active), (x,), total = kept(ctx), ctx.saved_tensors, []
        layer.gate_up.active, layer.down.active = active
        host, devices, states = ctx.random
        dx = torch.empty_like(x)
        with torch.random.fork_rng(devices):
            torch.set_rng_state(host)
            set_device_states(devices, states)
            for rows in pieces_of(x, grad, dx):
                grads = piece_backward(Piece(), layer, *rows)
                if total:
                    torch._foreach_add_(total, grads)
                total = total or grads
        return dx, None, *total


def piece_backward(ctx: Piece, layer, x, dy, dx) -> list[torch.Tensor]:
    """Write the gradient of some rows to dx; return those of the parameters."""
    GatedMLP.forward(ctx, x, layer)
    one, _, *grads = GatedMLP.backward(ctx, dy)
    dx.copy_(one)
    return grads


class MLPForward(torch.autograd.Function):
    """x (N, D) -> what GatedMLP makes of it, by pieces; its gradient goes to MLPBackward as it is."""

    @staticmethod
    def forward(ctx, x, layer):
        y = torch.empty_like(x)
        for piece, into in pieces_of(x, y):
            into.copy_(GatedMLP.forward(Piece(), piece, layer))
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad, None
