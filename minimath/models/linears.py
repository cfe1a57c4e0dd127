"""Linear layers as decoding runs them: those with the same input in one product, the adapter behind it.

y = x W^T + x A^T (s B)^T, for q, k, v or gate, up together. What stands in the model is never changed:
- where memory allows (always asked for on a CPU, and for NF4 weights), a copy [W; A] made once per rollout: NF4 weights
  are dequantised once instead of in every step, and a CPU gets its weights in oneDNN's own layout, 1.3 to 1.9 times as
  fast for 64 rows of bf16 as a plain product; in fp32 the copy is W + s B A, exact up to fp32 rounding. In 16 bits that
  sum would lose what the adapter learnt below 1/256 of a weight, so there the adapter stays apart;
- else W as it is, and the adapters of a group in one small product.
"""
import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from minimath.models.load import base_causal_lm, compute_dtype


class Parts(NamedTuple):
    """Hold what a linear layer computes: x W^T + bias + x A^T B^T."""
    base: nn.Module  # holds W (out, in), maybe quantised, and the bias
    a: torch.Tensor | None  # (r, in) fp32, of all active adapters
    b: torch.Tensor | None  # (out, r) fp32, times their scales


def parts_of(module: nn.Module) -> Parts | None:
    """Take a linear layer apart, plain or 4-bit, with or without LoRA.

    None for one that is something else or more: DoRA and other variants, fan_in_fan_out, other quantisation.
    """
    base, a, b = module, [], []
    if isinstance(module, LoraLayer):
        base = module.base_layer
        if module.merged or getattr(module, "fan_in_fan_out", False):
            return None
        active = [] if module.disable_adapters else [n for n in module.active_adapters if n in module.lora_A]
        if any(name in getattr(module, "lora_variant", {}) for name in active):
            return None
        for name in active:
            up = module.lora_B[name]
            if getattr(up, "bias", None) is not None:
                return None
            a.append(module.lora_A[name].weight.float())
            b.append(up.weight.float() * module.scaling[name])
    if type(base) is not nn.Linear and not is_4bit(base):
        return None
    return Parts(base, torch.cat(a) if a else None, torch.cat(b, 1) if b else None)


def is_4bit(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def weight_of(base: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """Give the W of a layer in dtype, dequantised: shape [out, in]."""
    if not is_4bit(base):
        return base.weight.detach().to(dtype)
    from bitsandbytes.functional import dequantize_4bit
    return dequantize_4bit(base.weight.data, base.weight.quant_state).to(dtype)


class Group:
    """Linear layers with one input, computed together at the first one's call."""

    def __init__(self, parts: list[Parts], dtype: torch.dtype, *, copy: bool, rows: int):
        self.widths = [p.base.out_features for p in parts]
        self.width = sum(self.widths)
        self.x = self.y = None
        device = parts[0].base.weight.device
        biases = [p.base.bias for p in parts]
        bias = None
        if any(b is not None for b in biases):
            bias = torch.cat([torch.zeros(w, device=device, dtype=dtype) if b is None else b.detach().to(dtype)
                              for b, w in zip(biases, self.widths, strict=True)])
        self.a, self.b = self.adapters(parts, dtype)
        if copy:
            weight = torch.cat([weight_of(p.base, dtype) for p in parts])
            if self.a is not None and dtype == torch.float32:
                weight += self.b.T @ self.a
                self.a = self.b = None
            if self.a is not None:
                weight = torch.cat([weight, self.a])
                bias = None if bias is None else torch.cat([bias, bias.new_zeros(len(self.a))])
            self.product = packed_product(weight, bias, rows) if packs(weight) else plain_product(weight, bias)
            self.bases = None
        else:
            self.bases = [p.base for p in parts]

    def adapters(self, parts: list[Parts], dtype: torch.dtype):
        """Stack all A of the group to [R, in], and their B to one [R, width]."""
        ranks = [0 if p.a is None else len(p.a) for p in parts]
        if not any(ranks):
            return None, None
        a = torch.cat([p.a for p in parts if p.a is not None])
        b = a.new_zeros(sum(ranks), self.width)
        row = column = 0
        for p, rank, width in zip(parts, ranks, self.widths, strict=True):
            if rank:
                b[row:row + rank, column:column + width] = p.b.T
            row, column = row + rank, column + width
        return a.to(dtype), b.to(dtype)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        """Compute all layers of the group: from x [..., in] to [..., width]."""
        flat = x.reshape(-1, x.shape[-1])
        if self.bases is None:
            y = self.product(flat)
            if self.a is not None:
                y = torch.addmm(y[:, :self.width], y[:, self.width:], self.b)
        else:
            y = [type(base).forward(base, flat) for base in self.bases]  # the layer's own, whatever stands in its place
            y = y[0] if len(y) == 1 else torch.cat(y, -1)
            if self.a is not None:
                y = torch.addmm(y, flat @ self.a.T, self.b)
        return y.view(*x.shape[:-1], self.width)

    def forward_of(self, index: int):
        """Make the forward of the layer `index`: the first one computes for all."""
        start = sum(self.widths[:index])
        last = index == len(self.widths) - 1

        def forward(x):
            if self.x is not x:  # the first, or a layer that is not called as it was when the groups were found
                self.x, self.y = x, self.compute(x)
            y = self.y[..., start:start + self.widths[index]]
            if last:
                self.x = self.y = None
            return y
        return forward if len(self.widths) > 1 else self.compute


def packs(weight: torch.Tensor) -> bool:
    """Tell whether oneDNN can hold this weight in its own layout.

    bf16 only on processors with AVX-512 or better.
    """
    if weight.device.type != "cpu" or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed_product(weight: torch.Tensor, bias, rows: int):
    """Make x -> x W^T + bias with W in oneDNN's layout for about `rows` rows.

    That is what torch.compile does to frozen weights.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def plain_product(weight: torch.Tensor, bias):
    return lambda x: nn.functional.linear(x, weight, bias)


def copied_bytes(model, dtype: torch.dtype) -> int:
    """Count the bytes of a copy in dtype of all linear layers, the head included."""
    return sum(m.in_features * m.out_features for m in model.modules()
               if type(m) is nn.Linear or is_4bit(m)) * dtype.itemsize


def called_together(model) -> list[list[nn.Module]]:
    """List the decoder's linear layers as called; those with one input together."""
    base, calls, hooks = base_causal_lm(model), [], []
    inner = {id(part) for m in model.modules() if isinstance(m, LoraLayer) for part in m.modules() if part is not m}

    def note(module, args):
        calls.append((module, args[0] if args else None))

    for module in base.base_model.modules():
        if (isinstance(module, LoraLayer) or type(module) is nn.Linear or is_4bit(module)) and id(module) not in inner:
            hooks.append(module.register_forward_pre_hook(note))
    try:
        with torch.no_grad(), compute_dtype(model):
            base.base_model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=base.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    groups, seen, last = [], set(), None
    for module, x in calls:
        if id(module) in seen:  # a layer that is called twice stands alone
            continue
        seen.add(id(module))
        if groups and x is not None and x is last:
            groups[-1].append(module)
        else:
            groups.append([module])
        last = x
    return groups


@contextlib.contextmanager
def decoding_linears(model, *, copy: bool, rows: int) -> Iterator[bool]:
    """Run the decoder's linear layers in groups inside. Weights must not change there.

    rows: how many are decoded side by side, for the layout. Yields whether every adapted layer is in a group, so that
    nothing needs autocast.
    """
    patched, adapted = [], 0
    if isinstance(model, PeftModel):
        adapted = sum(isinstance(m, LoraLayer) and isinstance(getattr(m, "base_layer", None), nn.Module)
                      for m in model.modules())
    try:
        for modules in called_together(model):
            known = [(m, parts) for m in modules if (parts := parts_of(m)) is not None]
            if not known or not copy and all(parts.a is None for _, parts in known):  # nothing to gain
                adapted -= sum(isinstance(m, LoraLayer) for m, _ in known)
                continue
            group = Group([parts for _, parts in known], base_causal_lm(model).dtype, copy=copy, rows=rows)
            for index, (module, _) in enumerate(known):
                patched.append((module, module.__dict__.get("forward")))
                module.forward = group.forward_of(index)
                adapted -= isinstance(module, LoraLayer)
        yield adapted == 0
    finally:
        for module, before in patched:
            if before is None:
                del module.forward
            else:
                module.forward = before
