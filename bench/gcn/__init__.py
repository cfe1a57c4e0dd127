"""The machine code that Triton makes for gfx942, run on a CPU like the PTX of `bench.ptx`, wave by wave of 64 lanes.

Written from AMD's text of the CDNA3 instruction set and LLVM's notes on the kernel ABI. A load reaches its registers,
and a store or an access of shared memory happens, at the last moment that the program allows: at its s_waitcnt; until
then NaN patterns stand there. Accesses outside of the arguments, and races in shared memory, raise Fault as there.
Not shown: the waits between matrix and other instructions that the assembler counts in s_nop, and preloaded arguments
(the entry that loads them is taken). v_exp, v_log, v_rcp, v_rsq and sums of products are rounded once from float64;
v_div_scale does not scale, v_div_fixup puts right what would have needed it.
"""
from .program import Program

__all__ = ["Program"]
