"""CUDA graphs of the decode step: one launch for a thousand kernels. Elsewhere, or where capture fails, plain calls."""
import warnings

import torch

WARM_UP = 2  # calls before capture: lazy set-up of libraries must not be recorded
MOST = 24  # graphs kept; a batch that shrinks needs a new one for every size


class StepGraphs:
    """Runs a step from recordings, where the device can.

    Recordings hold addresses: `forget` them when a tensor that the step uses has moved.
    """

    def __init__(self, device: torch.device):
        self.usable = device.type == "cuda" and torch.version.hip is None
        self.used, self.recorded, self.pool = False, {}, None

    def forget(self) -> None:
        self.recorded = {}

    def run(self, step, n: int, length: int, spans) -> None:
        """Run step(n, length, spans), as Decode.run_step takes them."""
        key = (n, length)
        if not self.usable or spans or (key not in self.recorded and len(self.recorded) >= MOST):
            step(n, length, spans)
            return
        seen = self.recorded.get(key, 0)
        if isinstance(seen, int) and seen < WARM_UP:
            self.recorded[key] = seen + 1
            step(n, length, spans)
            return
        if isinstance(seen, int):
            graph = self.record(step, n, length)
            if graph is None:
                step(n, length, spans)
                return
            seen = self.recorded[key] = graph
        seen.replay()
        self.used = True

    def record(self, step, n: int, length: int):
        """Record one step without running it; None if it cannot be recorded, said once."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                step(n, length, None)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.usable = False
            warnings.warn("rollouts run without CUDA graphs, which is slower: the step could not be recorded "
                          f"({str(error).splitlines()[0]})", stacklevel=2)
            return None
        self.pool = graph.pool()
        return graph
