"""The linear layers of a decoder as decoding runs them: in groups, and from a copy that is made once per rollout."""
import contextlib
import functools
import math
from collections import Counter
from collections.abc import Iterator

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from minimath.models.forward import active_adapters, base_causal_lm, compute_dtype
from minimath.models.fused import fused_layers
from minimath.models.linears import LinearGroup, is_linear, is_plain


@contextlib.contextmanager
def decoding_linears(model, *, copy: bool | int, rows: int) -> Iterator[bool]:
    """Run the decoder's linear layers in groups inside. Weights must not change there.

    A pass with other adapters than on entry raises RuntimeError: copies and groups hold those.
    copy: whether to copy weights, or up to how many bytes, layer by layer. rows: how many are decoded side by side. The
    Counter `linear_ways` of the causal LM tells how often W was read in which way (linears.COPIED and the others).
    Yields whether every adapted layer is in a group, so that nothing needs autocast."""
    base, room, ran = base_causal_lm(model), math.inf if copy is True else copy, Counter()
    base.linear_ways, fused, every = ran, fused_layers(base), True
    with contextlib.ExitStack() as at_end:
        if (before := active_adapters(base))[0]:
            hook = base.base_model.register_forward_pre_hook(functools.partial(refuse_others, base, before))
            at_end.callback(hook.remove)
        if fused:
            fused.refresh()  # which may build the layers anew
            groups, fused.frozen = fused.groups, True
            at_end.callback(setattr, fused, "frozen", False)
        else:
            groups, every = patch(model, bool(copy), at_end)
        for group in groups:
            at_end.callback(group.forget)
            room -= group.freeze(rows, room, ran)
        yield every


def refuse_others(base, before, *_) -> None:
    """Raise RuntimeError if other adapters are active than before."""
    if (now := active_adapters(base)) != before:
        raise RuntimeError(f"the model is set up to decode with the adapters {before}, and a pass has {now}: judge "
                           "and train when the rollout has ended")


def patch(model, copy: bool, at_end: contextlib.ExitStack) -> tuple[list[LinearGroup], bool]:
    """Group layers of transformers that are called with the same input, until at_end.

    Returns the groups, and whether every adapted layer is in one."""
    apart, groups = {m for m in model.modules() if isinstance(m, LoraLayer)}, []
    for modules in called_together(model):
        known = [m for m in modules if is_plain(m)]
        apart -= set(known)
        if known and (copy or any(isinstance(m, LoraLayer) for m in known)):  # else nothing is gained
            groups.append(LinearGroup(known, base_causal_lm(model).dtype))
            for index, module in enumerate(known):
                module.forward = groups[-1].patched(index)
                at_end.callback(delattr, module, "forward")
    return groups, not apart


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
