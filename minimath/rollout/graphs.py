"""CUDA graphs of the decode step: one launch for a thousand kernels. Elsewhere, or where capture fails, plain calls."""
import collections
import warnings

import torch

WARM_UP = 2  # calls before capture: lazy set-up of libraries must not be recorded
MOST = 24  # graphs kept; a batch that shrinks needs a new one for every size


class StepGraphs:
    """Runs a step from recordings, where the device can; `forget` them when tensors move."""

    def __init__(self, device: torch.device):
        self.usable = device.type == "cuda" and torch.version.hip is None
        self.used, self.pool = False, None
        self.forget()

    def forget(self) -> None:
        self.recorded, self.calls = {}, collections.Counter()

    def run(self, step, n: int, length: int, spans) -> None:
        """Run step(n, length, spans), as Decode.run_step takes them."""
        key = (n, length)
        if self.usable and self.calls[key] >= WARM_UP and key not in self.recorded and len(self.recorded) < MOST:
            self.record(step, n, length)
        self.calls[key] += 1
        if key in self.recorded:
            self.recorded[key].replay()
            self.used = True
        else:
            step(n, length, spans)

    def record(self, step, n: int, length: int) -> None:
        """Record one step without running it; say once if it cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                step(n, length, None)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.usable = False
            warnings.warn("rollouts run without CUDA graphs, which is slower: the step could not be recorded "
                          f"({str(error).splitlines()[0]})", stacklevel=2)
        else:
            self.recorded[n, length], self.pool = graph, graph.pool()
