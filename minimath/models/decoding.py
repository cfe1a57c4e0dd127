"""The linear layers of a decoder as decoding runs them: in groups, and from a copy that is made once per rollout."""
import contextlib
import math
from collections import Counter
from collections.abc import Iterator

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from minimath.models.forward import active_adapters, base_causal_lm, compute_dtype
from minimath.models.fused import FusedLayers, fused_layers
from minimath.models.linears import LinearGroup, is_linear, is_plain


@contextlib.contextmanager
def decoding_linears(model, *, copy: bool | int, rows: int) -> Iterator[bool]:
    """Run the decoder's linear layers in groups inside. Weights must not change there.

    A pass with other adapters than on entry raises RuntimeError: copies and groups hold those.
    copy: whether to copy weights, or up to how many bytes, layer by layer. rows: how many are decoded side by side. The
    Counter `linear_ways` of the causal LM tells how often W was read in which way (linears.COPIED and the others).
    Yields whether every adapted layer is in a group, so that nothing needs autocast."""
    base = base_causal_lm(model)
    room, ran = math.inf if copy is True else copy, Counter()
    base.linear_ways, fused = ran, fused_layers(base)
    with _same_adapters(base), _patched(model, room, rows, ran) if fused is None else _frozen(
            fused, room, rows, ran) as every:
        yield every


@contextlib.contextmanager
def _same_adapters(base) -> Iterator[None]:
    """Refuse passes of the decoder with other adapters than those of now."""
    before = active_adapters(base)
    if not before[0]:
        yield
        return

    def check(*_):
        if (now := active_adapters(base)) != before:
            raise RuntimeError(f"the model is set up to decode with the adapters {before}, and a pass has {now}: judge "
                               "and train when the rollout has ended")
    hook = base.base_model.register_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _frozen(fused: FusedLayers, room: float, rows: int, ran: Counter) -> Iterator[bool]:
    """Do so for fused layers."""
    fused.refresh()  # which may build the layers anew
    groups = fused.groups
    try:
        fused.frozen = True
        for group in groups:
            room -= group.freeze(rows, room, ran)
        yield True
    finally:
        fused.frozen = False
        for group in groups:
            group.forget()


@contextlib.contextmanager
def _patched(model, room: float, rows: int, ran: Counter) -> Iterator[bool]:
    """Do so for layers of transformers: those that are called with the same input."""
    apart, patched = {m for m in model.modules() if isinstance(m, LoraLayer)}, []  # apart: adapted, in no group
    try:
        for modules in called_together(model):
            known = [m for m in modules if is_plain(m)]
            apart -= set(known)
            if known and (room or any(isinstance(m, LoraLayer) for m in known)):  # else nothing is gained
                group = LinearGroup(known, base_causal_lm(model).dtype)
                room -= group.freeze(rows, room, ran)
                for index, module in enumerate(known):
                    patched.append(module)
                    module.forward = group.patched(index)
        yield not apart
    finally:
        for module in patched:
            del module.forward


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
