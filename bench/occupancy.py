"""How many blocks of a kernel fit on one multiprocessor, from what the compiler reports.

Limits per compute capability: CUDA programming guide, table "technical specifications per compute
capability", and NVIDIA's libcu++ (cuda/__device/arch_traits.h; it has 32 blocks for 12.0 where the guide has
24, which blocks of 4 or more warps never reach). Allocation units: CUDA occupancy calculator (registers by
256 a warp, warps by 4, shared memory by 128 B; 1 KB a block is the driver's from 8.0 on).
AMD: LLVM's AMDGPU backend (AMDGPUBaseInfo.cpp: 1,536 vector registers a SIMD in steps of 24 and 16 waves on
gfx1100, 512 in steps of 8 and 8 waves on gfx942); LLVM prints the result beside each kernel, and the tests
compare. Theoretical occupancy says how much latency can be hidden by other warps; a tile that reuses operands
from registers trades it away on purpose.
"""
from typing import NamedTuple


class Processor(NamedTuple):
    """Limits of a multiprocessor of CUDA, or of the unit of AMD that shares an LDS."""
    shared_block: int  # bytes of shared memory that one block may ask for
    shared: int  # bytes there are
    shared_reserved: int  # bytes that the driver takes from each block
    shared_unit: int  # allocation unit, bytes
    warps: int
    blocks: int
    registers: int  # per lane of a SIMD: of each of the four partitions of 32 or 64 lanes
    register_unit: int  # allocation unit, registers per lane
    warp_size: int
    tensor_columns: int = 0  # columns of tensor memory


SIMDS = 4  # partitions of every processor below; a warp's registers come from one of them
KIB = 1024
PROCESSORS = {
    "sm_75": Processor(64 * KIB, 64 * KIB, 0, 256, 32, 16, 512, 8, 32),
    "sm_80": Processor(163 * KIB, 164 * KIB, KIB, 128, 64, 32, 512, 8, 32),
    "sm_86": Processor(99 * KIB, 100 * KIB, KIB, 128, 48, 16, 512, 8, 32),
    "sm_89": Processor(99 * KIB, 100 * KIB, KIB, 128, 48, 24, 512, 8, 32),
    "sm_90": Processor(227 * KIB, 228 * KIB, KIB, 128, 64, 32, 512, 8, 32),
    "sm_100": Processor(227 * KIB, 228 * KIB, KIB, 128, 64, 32, 512, 8, 32, 512),
    "sm_120": Processor(99 * KIB, 100 * KIB, KIB, 128, 48, 24, 512, 8, 32),
    # a work-group processor: two compute units, as LLVM compiles for by default
    "gfx1100": Processor(64 * KIB, 128 * KIB, 0, 1024, 64, 32, 1536, 24, 32),
    "gfx942": Processor(64 * KIB, 64 * KIB, 0, 512, 32, 16, 512, 8, 64),
}
SHARED_LIMIT = {arch: each.shared_block for arch, each in PROCESSORS.items()}


def round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def resident_blocks(arch: str, threads: int, registers: int, shared: int, tensor_columns: int = 0) -> int:
    """Count the blocks that a multiprocessor holds at a time; 0 if none fits.

    registers per thread, shared bytes per block (without the driver's share), tensor_columns of tensor memory
    per block.
    """
    chip = PROCESSORS[arch]
    if shared > chip.shared_block:
        return 0
    warps = -(-threads // chip.warp_size)
    per_partition = chip.registers // round_up(max(registers, 1), chip.register_unit)
    limits = [
        chip.blocks,
        chip.warps // warps,
        SIMDS * per_partition // (round_up(warps, SIMDS) if arch.startswith("sm_") else warps),
    ]
    taken = round_up(shared + chip.shared_reserved, chip.shared_unit)
    if taken:
        limits.append(chip.shared // taken)
    if tensor_columns:
        limits.append(chip.tensor_columns // tensor_columns)
    return min(limits)


def occupancy(arch: str, threads: int, registers: int, shared: int, tensor_columns: int = 0) -> float:
    """Resident warps as a share of what the multiprocessor can hold, 0 to 1."""
    chip = PROCESSORS[arch]
    blocks = resident_blocks(arch, threads, registers, shared, tensor_columns)
    return blocks * -(-threads // chip.warp_size) / chip.warps
