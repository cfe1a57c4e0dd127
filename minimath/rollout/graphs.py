"""CUDA graphs of the decode step: one launch in place of some thousand."""
import collections
import contextlib
import functools
import warnings
from collections.abc import Callable

import torch

from minimath.core.errors import is_out_of_memory
from minimath.models import linears
from minimath.models.forward import base_causal_lm
from minimath.models.fused import fused_layers

WARM_UP = 2  # calls before capture: lazy set-up of libraries must not be recorded


class StepGraphs:
    """Runs a step from one graph for each width; plainly elsewhere, and where it cannot be recorded.

    A graph holds addresses: `forget` all when a tensor that the step reads or writes has moved."""

    def __init__(self, model):
        device = base_causal_lm(model).device
        self.usable = device.type == "cuda" and torch.version.hip is None and not reads_back(model)
        self.replays = 0
        self.forget()

    def forget(self) -> None:
        """Let go of the graphs, and of the memory that they share."""
        self.recorded, self.calls, self.pool = {}, collections.Counter(), None

    def run(self, step: Callable[[int], None], width: int) -> None:
        """Run step(width). Raises what it raises; running out of memory in a capture too."""
        if self.usable and width not in self.recorded and self.calls[width] >= WARM_UP:
            self.record(step, width)
        self.calls[width] += 1
        if width in self.recorded:
            self.recorded[width].replay()
            self.replays += 1
        else:
            step(width)

    def record(self, step, width: int) -> None:
        """Record a step without running it; say once if it cannot be recorded."""
        graph, stream = torch.cuda.CUDAGraph(), capture_stream(torch.cuda.current_device())
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            # the outer context: torch.cuda.graph does not leave its stream if the capture cannot be ended
            with torch.cuda.stream(stream), torch.cuda.graph(graph, pool=self.pool, stream=stream,
                                                             capture_error_mode="thread_local"):
                step(width)
        except (RuntimeError, MemoryError) as error:
            end_capture(graph, self.pool)
            self.forget()
            if is_out_of_memory(error):
                raise
            self.usable = False
            warnings.warn("rollouts run without CUDA graphs, which is slower: the step could not be recorded "
                          f"({str(error).splitlines()[0]})", stacklevel=2)
        else:
            self.recorded[width] = graph


@functools.cache
def capture_stream(index: int) -> torch.cuda.Stream:
    """Give the stream of all captures on a card: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(index)


def end_capture(graph, pool) -> None:
    """Undo what a failed capture leaves behind in the allocator and the random generator.

    torch does so only where the capture could be ended: pool() raises where it was not."""
    index = torch.cuda.current_device()
    try:
        graph.pool()
    except RuntimeError:
        for undo in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
            with contextlib.suppress(RuntimeError):
                undo(index, pool)
    generator = torch.cuda.default_generators[index]
    generator.graphsafe_set_state(generator.clone_state())


def reads_back(model) -> bool:
    """Tell whether rotary positions are computed from a number that the host reads, by transformers' rope types."""
    kinds = [getattr(module, "rope_type", None) for module in model.modules()]
    names = [name for kind in kinds for name in (kind.values() if isinstance(kind, dict) else [kind])]
    return any(name and ("dynamic" in name or name == "longrope") for name in names)


def addresses(model) -> list[int] | None:
    """List where that of a model is which steps read; None if the next rollout has it elsewhere.

    To be called as the model decodes. Elsewhere: copies of weights, and layers that are not fused."""
    fused = fused_layers(base_causal_lm(model))
    groups = fused.groups if fused else []
    if not groups or any(group.product for group in groups):
        return None
    read = [*model.parameters(), *model.buffers(), *linears._SCRATCH.values()]
    for group in groups:
        read += [each for each in (group.weight, group.bias, group.active.a, group.active.b) if each is not None]
    return [each.data_ptr() for each in read]
