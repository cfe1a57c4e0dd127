"""Inputs of checkpointed layers wait in host memory, copied there and back beside the computation.

The backward pass asks for the inputs in reverse: when it takes one, the one before sets out. All copies go through one
stream, so that a buffer is read before it is written again. The launching thread runs ahead of a card, so memory freed
by torch's record_stream would come back too late; here the computation waits instead: each layer for the copy of the
input before its own, in backward for its input. Two inputs at a time are on a card. On a CPU both are plain copies."""
import functools
import weakref

import torch
from torch.autograd.graph import saved_tensors_hooks

from minimath.models.memory import KEEPERS


class Waiting:
    """An input in host memory, `here` and `ready` once it is on its way back."""

    def __init__(self, host: "Host", buffer: torch.Tensor, shape: torch.Size, before):
        self.host, self.buffer, self.before = host, buffer, before
        self.there, self.here, self.ready = buffer[:shape.numel()].view(shape), None, None

    def __del__(self):
        self.host.free.append(self.buffer)


class Host:
    """Takes the inputs of layers, and gives them back; put and get are hooks of saved tensors."""

    def __init__(self, device: torch.device):
        self.device, self.side = device, torch.cuda.Stream(device) if device.type == "cuda" else None
        self.free: list[torch.Tensor] = []
        self.close()
        KEEPERS.add(self)

    def close(self) -> None:
        self.free.clear()
        self.last, self.leaving = None, (None, None)  # the input put last, weakly; tensor and event of a copy under way

    def buffer(self, x: torch.Tensor) -> torch.Tensor:
        """Take a flat buffer of x's dtype with room for it."""
        if self.free and (found := self.free.pop()).dtype == x.dtype and len(found) >= x.numel():
            return found
        return host_memory(x.numel(), x.dtype, self.side is not None)

    def copy(self, target: torch.Tensor, source: torch.Tensor):
        """Copy behind what was launched so far, and beside what comes; returns the event of its end."""
        if self.side is None:
            target.copy_(source)
            return None
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            target.copy_(source, non_blocking=True)
            return self.side.record_event()

    def wait(self, event) -> None:
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def settle(self) -> None:
        """Let go of the tensor whose copy is under way, once it has ended."""
        self.wait(self.leaving[1])
        self.leaving = None, None

    def put(self, x: torch.Tensor) -> "Waiting | torch.Tensor":
        if not x.requires_grad:  # positions, masks: the same for all layers
            return x
        self.settle()
        waiting, x = Waiting(self, self.buffer(x), x.shape, self.last), x.detach()
        self.leaving, self.last = (x, self.copy(waiting.there, x)), weakref.ref(waiting)
        return waiting

    def get(self, waiting: "Waiting | torch.Tensor") -> torch.Tensor:
        if isinstance(waiting, torch.Tensor):
            return waiting
        self.settle()
        for each in (waiting, waiting.before and waiting.before()):
            if each is not None and each.here is None:
                each.here = torch.empty_like(each.there, device=self.device)
                each.ready = self.copy(each.here, each.there)
        self.wait(waiting.ready)
        x, waiting.here = waiting.here, None
        return x


def host_memory(numbers: int, dtype: torch.dtype, pinned: bool) -> torch.Tensor:
    return torch.empty(numbers, dtype=dtype, pin_memory=pinned)


def offload_inputs(model, device: torch.device) -> None:
    """Let the inputs of a model's checkpointed layers wait in host memory."""
    host = Host(device)
    for module in model.modules():
        if checkpoint := getattr(module, "_gradient_checkpointing_func", None):
            module._gradient_checkpointing_func = functools.partial(with_hooks, checkpoint, host)


def with_hooks(checkpoint, host: Host, *args, **kwargs):
    """Checkpoint a layer; what its own hooks don't see, its inputs, goes to the host."""
    with saved_tensors_hooks(host.put, host.get):
        return checkpoint(*args, **kwargs)
