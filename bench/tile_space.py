"""Which tiles of logp_kernel are worth having on each chip, found without a GPU, so that nobody waits for an
autotuner at the first step: logp_config() holds the winner.

Candidates are pruned twice. Before compiling: by the shared memory that the operands need, by the registers
that the fp32 accumulator takes (a quarter of a thread's 255: the epilogue holds the tile, its exponentials
and the running sums), and by reuse (a tile under 64 x 64 loads more per flop than any second-level cache here
can supply). After: by spills, shared memory and 16-byte loads, as the compiler reports them. What is left is
ranked by traffic per flop, then occupancy, then bytes in flight; the winner is the first of which every head
(bias, cap, ragged width) passes the gate.
"""
from itertools import product

import torch
from rich.console import Console
from rich.table import Table

from . import measure
from .compile import compile_many, logp_case
from .occupancy import PROCESSORS, SHARED_LIMIT

EDGES, DEPTHS, WARPS, STAGES = (32, 64, 128, 256), (32, 64), (4, 8), (2, 3, 4)
ACCUMULATOR = 64  # registers a thread; with 128 every tile tried on sm_86 and sm_90 spills
REUSE = 32  # multiply-adds per element loaded, of a 64 x 64 tile


def all_tiles() -> list[dict]:
    """List every candidate, as logp_config would return it."""
    names = ("BLOCK_N", "BLOCK_V", "BLOCK_D", "num_warps", "num_stages")
    return [dict(zip(names, each)) for each in product(EDGES, EDGES, DEPTHS, WARPS, STAGES)]


def traffic(tile: dict) -> float:
    """Compute the elements loaded from the second-level cache per multiply-add."""
    return (tile["BLOCK_N"] + tile["BLOCK_V"]) / (tile["BLOCK_N"] * tile["BLOCK_V"])


def in_flight(tile: dict) -> int:
    """Compute the bytes of 16-bit operands that are on their way or in use."""
    return tile["num_stages"] * (tile["BLOCK_N"] + tile["BLOCK_V"]) * tile["BLOCK_D"] * 2


def plausible(tile: dict, arch: str) -> bool:
    """Tell whether a tile fits and reuses enough, as known without compiling."""
    lanes = tile["num_warps"] * PROCESSORS[arch].warp_size
    # one buffer a stage; products that read operands through registers need one less, Turing and AMD just one
    single = arch == "sm_75" or arch.startswith("gfx")
    buffered = in_flight(tile | {"num_stages": 1}) if single else in_flight(tile)
    return (buffered <= SHARED_LIMIT[arch] and tile["BLOCK_N"] * tile["BLOCK_V"] / lanes <= ACCUMULATOR
            and traffic(tile) <= 1 / REUSE)


def rank(row: dict) -> tuple:
    """Order rows, the best first."""
    return traffic(row["tile"]), -row["occupancy"], -in_flight(row["tile"])


def heads(arch: str, tile: dict) -> list:
    """List the cases of one tile for every head: bias, cap, ragged width."""
    half = torch.float16 if arch == "sm_75" else torch.bfloat16
    return [logp_case(arch, half, tile, bias, cap, "ieee", even, True)
            for bias, cap, even in product((True, False), (True, False), (False, True))]


def search(arch: str, *, workers: int) -> tuple[list[dict], dict | None]:
    """Compile the plausible tiles; return rows, best first, and the winner or None."""
    tiles = [tile for tile in all_tiles() if plausible(tile, arch)]
    # the head with everything on takes the most registers, so it decides
    rows = compile_many([heads(arch, tile)[0] for tile in tiles], workers=workers)
    rows = [row | {"tile": tile} for row, tile in zip(rows, tiles)]
    rows.sort(key=lambda row: (not row["ok"], rank(row)))
    for row in rows:
        if row["ok"] and all(each["ok"] for each in compile_many(heads(arch, row["tile"])[1:], workers=workers)):
            return rows, row
    return rows, None


def run(archs, *, everything: bool, workers: int) -> int:
    """Print the table, write compile-space.json; 1 if a chip is left without a tile."""
    table = Table(title=f"logp_kernel, 16-bit: of {len(all_tiles())} tiles")
    for name in ("chip", "dtype", "compiled", "left", "tile", "registers", "shared", "occupancy", "tensor ops"):
        table.add_column(name)
    written, lost = [], 0
    for arch in archs:
        rows, winner = search(arch, workers=workers)
        left = [row for row in rows if row["ok"]]
        lost += winner is None
        for row in rows:
            row["winner"] = row is winner
        written += rows
        for row in left if everything else [winner] if winner else []:
            table.add_row(arch, row["dtype"], str(len(rows)), str(len(left)), row["config"], str(row["registers"]),
                          f"{row['shared']:,}", f"{row['occupancy']:.0%}",
                          str([each["tensor"] for each in row["loops"]]))
    Console(width=150).print(table)
    measure.write_rows(measure.RESULTS / "compile-space.json", written)
    return 1 if lost else 0
