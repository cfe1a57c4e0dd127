"""The PTX that Triton makes of our kernels, run on a CPU and compared with float64: `python -m bench.ptx`.

Written from the text of the PTX ISA, for sm_75 to sm_90 and sm_120; `bench.gcn` runs gfx942's machine code behind the
same door. numpy works over all threads of a few blocks at once; what our kernels do not contain raises
NotImplementedError. Stricter than a card, so that a run is also a proof of absence:

- a global access outside the storages of the arguments, or not aligned to its own width, raises Fault;
- so does a shared access outside the block's allocation; shared memory and registers start as NaN patterns, not 0;
- two warps at one shared byte without a barrier in between, one of them writing something new, raise;
- cp.async copies, and wgmma reads its operands, at the last moment that the program allows: at its wait;
- a warp-wide instruction (shfl, ldmatrix, mma) with a lane missing, and a barrier that not all threads reach, raise.

More exact than a card: ex2, lg2, rsqrt, div.full and the sums of tensor cores are rounded once from float64; `noise`
adds an error of up to that size to the first four (a card: 2^-22). It says nothing of time, of cards' memory order
within a warp, or of what ptxas makes of the PTX.
"""
from .device import installed
from .formats import Fault
from .machine import Launch
from .memory import GlobalMemory
from .program import Program

__all__ = ["Fault", "GlobalMemory", "Launch", "Program", "installed"]
