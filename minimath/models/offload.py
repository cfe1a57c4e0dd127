"""Inputs of checkpointed layers wait in host memory: copied there in forward, and back when backward takes them.

On a card the copies stand in the stream of the computation, so that nothing waits for them but what comes behind, and
one input at a time is there. Pinned memory goes back to torch, which keeps it for the next pass."""
import functools

import torch
from torch.autograd.graph import saved_tensors_hooks


def host_memory(numbers: int, dtype: torch.dtype, pinned: bool) -> torch.Tensor:
    return torch.empty(numbers, dtype=dtype, pin_memory=pinned)


def offload_inputs(model, device: torch.device) -> None:
    """Let the inputs of a model's checkpointed layers wait in host memory."""
    on_card = device.type == "cuda"

    def put(x: torch.Tensor):
        if not x.requires_grad:  # positions, masks: the same for all layers
            return x
        there = host_memory(x.numel(), x.dtype, on_card).view(x.shape)
        return (there.copy_(x.detach(), non_blocking=on_card),)

    def get(kept) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        return torch.empty_like(kept[0], device=device).copy_(kept[0], non_blocking=on_card)

    for module in model.modules():
        if checkpoint := getattr(module, "_gradient_checkpointing_func", None):
            module._gradient_checkpointing_func = functools.partial(with_hooks, checkpoint, put, get)


def with_hooks(checkpoint, put, get, *args, **kwargs):
    """Checkpoint a layer; what its own hooks don't see, its inputs, goes to the host."""
    with saved_tensors_hooks(put, get):
        return checkpoint(*args, **kwargs)
