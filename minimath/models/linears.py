"""Linear layers with one input as one product, with the LoRA adapters behind it, in training and in decoding.

    Y = x W^T + b + (x A^T) (s B)^T      dL = dY (s B),  dX = dY W + dL A,  dA = dL^T x,  dB = s dY^T (x A^T)

for q, k, v or gate, up together: W (width, in) is one buffer, whose parts are the layers' own weights from then on; A
(R, in) stands for all their adapters, B for its blocks. For the backward pass only x and x A^T (N, R) are kept. 4-bit
weights are dequantised into one scratch that all layers share. peft's parameters train as they are: fp32, by name.

Decoding reads W in the way that moves the fewest bytes: from a copy made once per rollout, dequantised, on a CPU in
oneDNN's layout; for few rows on a card from the 4 bits themselves; else dequantised by every step. In fp32 the copy is
W + s B A: 16 bits would round off what the adapter learnt below 1/256."""
import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

COPIED, FUSED, DEQUANTISED, IN_PLACE = "copied once", "4-bit product", "dequantised", "in place"  # how W is read


class Adapter(NamedTuple):
    """Hold one active adapter of one layer of a group."""
    a: nn.Parameter  # (r, in)
    b: nn.Parameter  # (out, r)
    scale: float
    dropout: nn.Module
    rank: slice  # its place among the R
    out: slice  # the layer's place in the width


class Active(NamedTuple):
    """Hold the active adapters of a group, which a backward pass needs as they were in its forward pass."""
    adapters: list[Adapter]
    a: torch.Tensor  # (R, in), compute type
    b: torch.Tensor  # (R, width): s B, transposed

    def version(self) -> int:
        """Tell whether the weights changed in place, as torch counts it."""
        return sum(each.a._version + each.b._version for each in self.adapters)


def base_of(module: nn.Module) -> nn.Module:
    """The layer that holds W (out, in), maybe quantised, and the bias."""
    return module.base_layer if isinstance(module, LoraLayer) else module


def is_4bit(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_4bit(module)


def is_plain(module: nn.Module) -> bool:
    """Tell whether a layer is x W^T + b + s x A^T B^T, plain or 4-bit, and no more.

    Not so: DoRA and other variants, fan_in_fan_out, other quantisation, a patched forward."""
    if isinstance(module, LoraLayer) and (
            getattr(module, "fan_in_fan_out", False) or getattr(module, "lora_variant", {}) or module.lora_embedding_A
            or any(getattr(b, "bias", None) is not None for b in module.lora_B.values())):
        return False
    return is_linear(base_of(module)) and "forward" not in {*vars(module), *vars(base_of(module))}


class LinearGroup:
    """Linear layers with one input, computed together."""

    def __init__(self, modules: list[nn.Module], dtype: torch.dtype):
        self.modules, self.dtype = modules, dtype
        self.bases = [base_of(module) for module in modules]
        self.widths = [base.out_features for base in self.bases]
        self.width = sum(self.widths)
        self.forget()
        self.quantised = any(map(is_4bit, self.bases))
        self.way = DEQUANTISED if self.quantised else IN_PLACE  # without a copy
        self.weight = None if self.quantised else join(self.bases)  # (width, in)
        self.bias = None
        if any(base.bias is not None for base in self.bases):
            self.bias = torch.cat([base.weight.new_zeros(base.out_features, dtype=dtype) if base.bias is None
                                   else base.bias.detach().to(dtype) for base in self.bases])
        self.kept: dict[tuple[int, ...], Active] = {}  # by which A they hold
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the adapters that are active now, in the compute type.

        Those that come back find the tensors that they had, at the same addresses."""
        adapters, start, rank = [], 0, 0
        for module, width in zip(self.modules, self.widths, strict=True):
            active = isinstance(module, LoraLayer) and not module.disable_adapters and not module.merged
            names = module.active_adapters if active else ()
            for name in names:
                if name in module.lora_A:
                    a, b = module.lora_A[name].weight, module.lora_B[name].weight
                    adapters.append(Adapter(a, b, module.scaling[name], module.lora_dropout[name],
                                            slice(rank, rank + len(a)), slice(start, start + width)))
                    rank += len(a)
            start += width
        which = tuple(id(each.a) for each in adapters)
        if which not in self.kept:  # each set has its own tensors: a backward pass may wait for them, a graph read them
            own = {id(each.weight) for module in self.modules if isinstance(module, LoraLayer)
                   for each in module.lora_A.values()}
            self.kept = {ids: active for ids, active in self.kept.items() if own.issuperset(ids)}
            new = {"dtype": self.dtype, "device": self.bases[0].weight.device}
            self.kept[which] = Active(adapters, torch.zeros(rank, self.bases[0].in_features, **new),
                                      torch.zeros(rank, self.width, **new))
        self.active = self.kept[which] = active = self.kept[which]._replace(adapters=adapters)
        if adapters:
            torch._foreach_copy_([active.a[each.rank] for each in adapters], [each.a for each in adapters])
            torch._foreach_copy_([active.b[each.rank, each.out].T for each in adapters],
                                 torch._foreach_mul([each.b for each in adapters], [each.scale for each in adapters]))

    @property
    def params(self) -> list[nn.Parameter]:
        return [p for each in self.active.adapters for p in (each.a, each.b)]

    def matrix(self) -> torch.Tensor:
        """W (width, in) in the compute type; of 4-bit layers until the next call only."""
        if not self.quantised:
            return self.weight
        out = scratch(self.dtype, self.width, self.bases[0])
        for base, part in zip(self.bases, out.split(self.widths), strict=True):
            dequantise(base, part)
        return out

    def masks(self, x: torch.Tensor) -> list[torch.Tensor] | None:
        """Draw the places [N, in] that dropout keeps, by adapter, as peft would."""
        if not any(each.dropout.training and getattr(each.dropout, "p", 0) for each in self.active.adapters):
            return None
        return [each.dropout(torch.ones_like(x)) != 0 for each in self.active.adapters]

    def dropped(self, x: torch.Tensor, mask: torch.Tensor, each: Adapter) -> torch.Tensor:
        return (x * mask).mul_(1 / (1 - getattr(each.dropout, "p", 0.0)))

    def forward(self, x: torch.Tensor, masks=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute Y (N, width) and x A^T (N, R) from x (N, in)."""
        way = FUSED if len(x) <= self.few else COPIED if self.product else self.way
        if self.ran is not None:
            self.ran[way] += 1
        if way == COPIED:
            y = self.product(x)
            if self.merged:
                return y, x.new_empty(len(x), 0)
        elif way == FUSED:
            y = self.product_of_4bit(x)
        else:
            y = nn.functional.linear(x, self.matrix(), self.bias)
        if masks is None:
            low = x @ self.active.a.T
        else:
            low = torch.cat([self.dropped(x, mask, each) @ self.active.a[each.rank].T
                             for mask, each in zip(masks, self.active.adapters, strict=True)], -1)
        return (y.addmm_(low, self.active.b) if self.active.adapters else y), low

    def input_grad(self, dy: torch.Tensor, active: Active, masks=None, *, need_x: bool = True) -> tuple:
        """Compute dX (N, in), or None, and dL (N, R) from dY (N, width)."""
        dx, dlow = dy @ self.matrix() if need_x else None, dy @ active.b.T
        if need_x and active.adapters:
            if masks is None:
                dx.addmm_(dlow, active.a)
            for mask, each in zip(masks or (), active.adapters):
                dx += self.dropped(dlow[:, each.rank] @ active.a[each.rank], mask, each)
        return dx, dlow

    def param_grads(self, dy, dlow, x, low, active: Active, masks=None) -> list[torch.Tensor]:
        """Compute the gradients of `params` from dY (N, width), dL (N, R), x (N, in) and x A^T (N, R)."""
        grads, da = [], dlow.T @ x if masks is None else None
        for index, each in enumerate(active.adapters):
            grad_a = da[each.rank] if masks is None else dlow[:, each.rank].T @ self.dropped(x, masks[index], each)
            grad_b = dy[:, each.out].T @ low[:, each.rank]
            grads += [grad_a.to(each.a.dtype), grad_b.to(each.b.dtype).mul_(each.scale)]
        return grads

    def product_of_4bit(self, x: torch.Tensor) -> torch.Tensor:
        """Compute x W^T + b by bitsandbytes' kernel, which reads the 4 bits; without gradients."""
        from bitsandbytes import matmul_4bit
        biases = [None] * len(self.bases) if self.bias is None else self.bias.split(self.widths)
        parts = [matmul_4bit(x, base.weight.data.t(), quant_state=base.weight.quant_state, bias=bias)
                 for base, bias in zip(self.bases, biases, strict=True)]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def choose(self, rows: int, room: float) -> str:
        """Choose how steps of `rows` rows read W; room: bytes that a copy may take.

        By the bytes that a step moves: a copy is read; 4 bits are read, or read, written as the compute type and read
        again."""
        size = self.width * self.bases[0].in_features
        moved = {COPIED: size * self.dtype.itemsize} if size * self.dtype.itemsize <= room else {}
        moved[self.way] = size // 2 + 2 * size * self.dtype.itemsize if self.quantised else size * self.dtype.itemsize
        if rows <= most_fused_rows(self.bases, self.dtype):
            moved[FUSED] = size // 2
        return min(moved, key=moved.get)  # the first of equals

    @torch.no_grad()
    def freeze(self, rows: int, room: float = math.inf, ran: Counter | None = None) -> int:
        """Prepare forward passes of a rollout of at most `rows` rows; return the bytes of a new copy.

        ran: counts the ways in which W is read; a replayed CUDA graph counts once. Weights must not change until
        `forget`."""
        self.few, self.ran = most_fused_rows(self.bases, self.dtype), ran
        if self.choose(rows, room) != COPIED:
            return 0
        weight, self.merged = self.matrix(), self.dtype == torch.float32 and bool(self.active.adapters)
        if self.merged:
            weight = torch.addmm(weight, self.active.b.T, self.active.a)
        elif self.quantised:
            weight = weight.clone()
        packed = packed_product(weight, self.bias, rows)
        self.product = packed or (lambda x: nn.functional.linear(x, weight, self.bias))
        return weight.nbytes if packed or weight is not self.weight else 0

    def forget(self) -> None:
        """Drop the copy, and compute as in training again."""
        self.product, self.merged, self.few, self.ran, self.last = None, False, 0, None, (None, None)

    def patched(self, index: int) -> Callable:
        """Make a forward of the layer `index` by which the first one computes for all."""
        start, stop = sum(self.widths[:index]), sum(self.widths[:index + 1])

        def forward(x):
            if self.last[0] is not x:  # the first, or a layer that is not called as it was when the groups were found
                y, _ = self.forward(x.reshape(-1, x.shape[-1]))
                self.last = x, y.view(*x.shape[:-1], self.width)
            y = self.last[1][..., start:stop]
            if stop == self.width:
                self.last = None, None
            return y
        return forward


def join(bases: list[nn.Module]) -> torch.Tensor:
    """Give the weights of layers as one tensor (width, in), of which they become parts."""
    weights = [base.weight.data for base in bases]
    first, rows, joined = weights[0], 0, True
    for weight in weights:  # whether they are parts of one already
        joined &= (weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
                   and weight.storage_offset() == first.storage_offset() + rows * first.shape[1])
        rows += len(weight)
    if joined:
        return first.as_strided((rows, first.shape[1]), first.stride())
    whole = torch.cat(weights)
    for base, part in zip(bases, whole.split([len(weight) for weight in weights]), strict=True):
        base.weight.data = part
    return whole


_SCRATCH: dict[tuple, torch.Tensor] = {}


def scratch(dtype: torch.dtype, width: int, base: nn.Module) -> torch.Tensor:
    """Give room (width, in) for dequantised weights, the same for all layers."""
    key, size = (dtype, base.weight.device), width * base.in_features
    if key not in _SCRATCH or _SCRATCH[key].numel() < size:
        _SCRATCH[key] = torch.empty(size, dtype=dtype, device=base.weight.device)
    return _SCRATCH[key][:size].view(width, base.in_features)


def dequantise(base: nn.Module, out: torch.Tensor) -> None:
    """Write the W of a 4-bit layer to out (out, in)."""
    from bitsandbytes.functional import dequantize_4bit
    if out.is_cuda and out.dtype == base.weight.quant_state.dtype:  # bitsandbytes has no such operator for a CPU
        dequantize_4bit(base.weight.data, base.weight.quant_state, out=out)
    else:
        out.copy_(dequantize_4bit(base.weight.data, base.weight.quant_state))


def most_fused_rows(bases: list[nn.Module], dtype: torch.dtype) -> int:
    """Tell up to how many rows bitsandbytes multiplies by the 4 bits themselves on any card; 0: never.

    Source: bitsandbytes 0.50's operator gemm_4bit, which matmul_4bit calls: up to four rows on any card, in fp32 under
    ROCm two, beyond that by tables of cards. Blocks must not cross rows of W."""
    if not all(is_4bit(base) and base.weight.is_cuda and base.in_features % base.weight.quant_state.blocksize == 0
               for base in bases):
        return 0
    return 2 if torch.version.hip and dtype == torch.float32 else 4


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
