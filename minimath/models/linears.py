"""Linear layers as decoding runs them: those with the same input in one product, the adapter behind it.

y = x W^T + x A^T (s B)^T, for q, k, v or gate, up together. What stands in the model is never changed: either W is
used as it is, with the adapters of a group in one small product, or, where memory allows (asked for on a CPU and for
NF4), a copy [W; A] made once per rollout: dequantised once, and on a CPU in oneDNN's layout, 1.3 to 1.9 times as fast
for 64 rows of bf16. In fp32 the copy is W + s B A; 16 bits would round off what the adapter learnt below 1/256."""
import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from minimath.models.load import base_causal_lm, compute_dtype


class Parts(NamedTuple):
    """Hold what a linear layer computes: x W^T + bias + x A^T B^T."""
    base: nn.Module  # holds W (out, in), maybe quantised, and the bias
    a: torch.Tensor  # (R, in) fp32, of all active adapters; R is 0 without
    b: torch.Tensor  # (out, R) fp32, times their scales


def parts_of(module: nn.Module) -> Parts | None:
    """Take a linear layer apart, plain or 4-bit, with or without LoRA.

    None for one that is something else or more: DoRA and other variants, fan_in_fan_out, other quantisation, a patched
    forward."""
    base, active = module, []
    if isinstance(module, LoraLayer):
        base = module.base_layer
        active = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.lora_A]
        if module.merged or getattr(module, "fan_in_fan_out", False):
            return None
    if any(name in getattr(module, "lora_variant", {}) or getattr(module.lora_B[name], "bias", None) is not None
           for name in active):
        return None
    if not is_linear(base) or "forward" in vars(module):
        return None
    none = torch.zeros(0, dtype=torch.float32, device=base.weight.device)
    a = [module.lora_A[name].weight.float() for name in active]
    b = [module.lora_B[name].weight.float() * module.scaling[name] for name in active]
    return Parts(base, torch.cat([none.view(0, base.in_features), *a]),
                 torch.cat([none.view(base.out_features, 0), *b], 1))


def is_4bit(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_4bit(module)


def weight_of(base: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Give the W of a layer in dtype, dequantised: shape [out, in]."""
    if not is_4bit(base):
        return base.weight.detach().to(dtype)
    from bitsandbytes.functional import dequantize_4bit
    return dequantize_4bit(base.weight.data, base.weight.quant_state).to(dtype)


class Group:
    """Linear layers with one input, computed together at the first one's call."""

    def __init__(self, parts: list[Parts], dtype: torch.dtype, *, copy: bool, rows: int):
        self.bases, self.product = [p.base for p in parts], None
        self.widths = [base.out_features for base in self.bases]
        self.width, self.x, self.y = sum(self.widths), None, None
        self.a = torch.cat([p.a for p in parts]).to(dtype)  # (R, in)
        self.b = torch.block_diag(*(p.b.T for p in parts)).to(dtype)  # (R, width)
        if copy:
            merged = self.a[:0] if dtype == torch.float32 else self.a
            weight = torch.cat([*(weight_of(base, dtype) for base in self.bases), merged])
            if len(merged) < len(self.a):
                weight += self.b.T @ self.a
            self.a, bias = merged, None
            if any(base.bias is not None for base in self.bases):
                biases = [weight.new_zeros(base.out_features) if base.bias is None else base.bias.detach().to(dtype)
                          for base in self.bases]
                bias = torch.cat([*biases, weight.new_zeros(len(self.a))])
            self.product = packed_product(weight, bias, rows) or (lambda x: nn.functional.linear(x, weight, bias))

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """Compute all layers of the group: from x [..., in] to [..., width]."""
        flat = x.reshape(-1, x.shape[-1])
        if self.product:
            y = self.product(flat)
            y, low = y[:, :self.width], y[:, self.width:]
        else:
            y = [type(base).forward(base, flat) for base in self.bases]  # the layer's own, whatever stands in its place
            y, low = y[0] if len(y) == 1 else torch.cat(y, -1), flat @ self.a.T
        if len(self.a):
            y = torch.addmm(y, low, self.b)
        return y.view(*x.shape[:-1], self.width)

    def forward_of(self, index: int) -> Callable:
        """Make the forward of the layer `index`: the first one computes for all."""
        start = sum(self.widths[:index])

        def forward(x):
            if self.x is not x:  # the first, or a layer that is not called as it was when the groups were found
                self.x, self.y = x, self.compute(x)
            y = self.y[..., start:start + self.widths[index]]
            if index == len(self.widths) - 1:
                self.x = self.y = None
            return y
        return forward if len(self.widths) > 1 else self.compute


def packed_product(weight: torch.Tensor, bias, rows: int) -> Callable | None:
    """Make x -> x W^T + bias with W in oneDNN's layout for about `rows` rows.

    That is what torch.compile does to frozen weights. None where oneDNN cannot: bf16 needs AVX-512 or better."""
    if weight.device.type != "cpu" or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return None
    if weight.dtype != torch.float32 and not (
            weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def copied_bytes(model, dtype: torch.dtype) -> int:
    """Count the bytes of a copy in dtype of all linear layers, the head included."""
    return sum(m.in_features * m.out_features for m in model.modules() if is_linear(m)) * dtype.itemsize


def called_together(model) -> list[list[nn.Module]]:
    """List the decoder's linear layers as called; those with one input together."""
    decoder, groups, hooks, last = base_causal_lm(model).base_model, [], {}, None
    inner = {part for m in model.modules() if isinstance(m, LoraLayer) for part in m.modules() if part is not m}

    def note(module, args):
        nonlocal last
        if args[0] is last:
            groups[-1].append(module)
        else:
            groups.append([module])
        last = args[0]
        hooks.pop(module).remove()  # a layer that is called twice is listed once

    for module in decoder.modules():
        if (isinstance(module, LoraLayer) or is_linear(module)) and module not in inner:
            hooks[module] = module.register_forward_pre_hook(note)
    try:
        with torch.no_grad(), compute_dtype(model):
            decoder(input_ids=torch.zeros(1, 2, dtype=torch.long, device=decoder.device), use_cache=False)
    finally:
        for hook in hooks.values():
            hook.remove()
    return groups


@contextlib.contextmanager
def decoding_linears(model, *, copy: bool, rows: int) -> Iterator[bool]:
    """Run the decoder's linear layers in groups inside. Weights must not change there.

    rows: how many are decoded side by side, for the layout. Yields whether every adapted layer is in a group, so that
    nothing needs autocast."""
    apart, patched = {m for m in model.modules() if isinstance(m, LoraLayer)}, []  # apart: adapted, in no group
    try:
        for modules in called_together(model):
            known = {m: parts for m in modules if (parts := parts_of(m)) is not None}
            apart -= known.keys()
            if known and (copy or any(len(parts.a) for parts in known.values())):  # else nothing is gained
                group = Group(list(known.values()), base_causal_lm(model).dtype, copy=copy, rows=rows)
                for index, module in enumerate(known):
                    patched.append(module)
                    module.forward = group.forward_of(index)
        yield not apart
    finally:
        for module in patched:
            del module.forward
