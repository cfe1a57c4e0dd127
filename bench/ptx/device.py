"""Makes the interpreter Triton's device, so that our launchers run their kernels on tensors in host memory."""
import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from unittest import mock

import torch

from .. import gcn
from ..compile import gpu_target
from ..occupancy import PROCESSORS
from .machine import Launch
from .memory import GlobalMemory
from .program import Program

PACKAGE = "minimath.kernels"
programs = {}  # by their text, of this process
numbers = count()  # of devices


class Utilities:
    """What Triton asks of a driver about the card and a binary; there is no binary to load."""

    def __init__(self, chip: str):
        self.chip = PROCESSORS[chip]

    def get_device_properties(self, device) -> dict:
        return {"max_shared_mem": self.chip.shared_block, "warpSize": self.chip.warp_size, "multiprocessor_count": 2}

    def load_binary(self, name, binary, shared, device):
        return object(), shared, 0, 0, 1024  # module, function, registers, spills, most threads


class Driver:
    """Triton's driver for a chip; each is a device of its own, as Triton keeps a kernel's launcher for its device."""

    def __init__(self, chip: str, run):
        self.chip, self.utils, self.launcher_cls = chip, Utilities(chip), partial(self.launcher, run)
        self.device = next(numbers)

    def get_current_target(self):
        return gpu_target(self.chip)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device) -> int:
        return 0

    def launcher(self, run, source, metadata):
        """Make the function that Triton calls for one compiled kernel."""
        kinds = list(source.signature.values())

        def launch(x, y, z, stream, shared, packed, extra, enter, leave, *arguments):
            run(metadata, (x, y, z), shared, [pair for pair in zip(kinds, arguments) if pair[0] != "constexpr"])

        return launch


def run_text(sources: dict, noise: float, counts, launches: list, metadata, grid, shared: int, arguments) -> None:
    """Run what Triton made of a kernel; arguments: (type of the signature, value)."""
    text, read = sources[metadata.hash], Program if metadata.target.backend == "cuda" else gcn.Program
    program = programs.get(text) or programs.setdefault(text, read(text))
    storages = [value.untyped_storage() for kind, value in arguments if kind.startswith("*")]
    values = [value.data_ptr() if kind.startswith("*") else float(value) if kind.startswith("fp") else int(value)
              for kind, value in arguments]
    memory = GlobalMemory((each.data_ptr(), each.nbytes()) for each in storages)
    threads = metadata.warp_size * metadata.num_warps
    program.run(Launch(values, grid, threads, shared, memory, noise=noise), counts=counts)
    launches.append((metadata.name, grid))


@contextmanager
def installed(chip: str, *, noise: float = 2.0**-22, counts: Counter | None = None, change=lambda text: text):
    """Compile kernels for a chip and run their PTX, or gfx942's machine code, on CPU tensors; yields the launches.

    Within it the kernels of minimath take tensors in host memory for a card's. change: function of the text, whose
    result is run in its place. Raises what Program.run raises.
    """
    from triton import knobs
    from triton.runtime import driver
    sources, launches = {}, []

    def keep(module, function, name, files, key) -> None:
        text = files.get(f"{name}.ptx") or files[f"{name}.amdgcn"]
        sources[key] = change(Path(text).read_text())

    run = partial(run_text, sources, noise, counts, launches)
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(PACKAGE)]
    with ExitStack() as stack:
        knobs.runtime.kernel_load_start_hook.add(keep)
        stack.callback(knobs.runtime.kernel_load_start_hook.remove, keep)
        stack.enter_context(mock.patch.object(driver, "_active", Driver(chip, run)))
        for module in modules:
            if "runs_triton" in vars(module):
                stack.enter_context(mock.patch.object(module, "runs_triton", lambda x: x.dtype != torch.float64))
            if "architecture" in vars(module):
                stack.enter_context(mock.patch.object(module, "architecture", lambda device: chip))
        yield launches
