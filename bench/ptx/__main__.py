"""Run the compiled code of every kernel on a CPU and compare it with float64: sm_75 to sm_90, sm_120, gfx942.

    python -m bench.ptx            # every shape, dtype and chip; minutes on 2 cores
    python -m bench.ptx --quick    # a cross-section of the shapes

Prints, per operation, chip and dtype, how many results were compared, the worst error as a share of the largest number,
and torch's own in that dtype; without --quick and --arch writes bench/results/ptx.json. Exits 1 if a result is wrong,
or if a program does what a card would answer with an error: see the docstrings of bench.ptx and bench.gcn.
"""
import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from rich.console import Console
from rich.table import Table

from .. import measure
from .compare import CHIPS, dtypes, run_chip


def show(rows: list[dict]) -> None:
    table = Table(title="PTX, and gfx942's machine code, executed on a CPU: error over the largest number")
    for name in ("operation", "chip", "dtype", "results", "worst error", "torch's own", "", "kernels"):
        table.add_column(name, justify="right" if name in ("results", "worst error", "torch's own") else "left")
    for row in rows:
        table.add_row(row["operation"], row["arch"], row["dtype"], str(row["results"]), f"{row['error']:.1e}",
                      f"{row['torch']:.1e}", "[red]WRONG[/]" if row["wrong"] else "ok", ", ".join(row["kernels"]))
    Console(width=150).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ptx", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a cross-section of the shapes")
    parser.add_argument("--arch", action="append", choices=CHIPS, help="only this chip; repeatable")
    parser.add_argument("--workers", type=int, default=0, help="processes; all cores by default")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.ptx: unset TRITON_INTERPRET, the interpreter replaces the compiler")
        return 2
    wanted = [(chip, dtype) for chip in options.arch or CHIPS for dtype in dtypes(chip)]
    with ProcessPoolExecutor(options.workers or os.cpu_count() or 1, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run_chip, *each, options.quick) for each in wanted]
        rows = [row for future in futures for row in future.result()]
    show(rows)
    if not (options.quick or options.arch):  # a part must not take the place of all
        measure.write_rows(measure.RESULTS / "ptx.json", rows)
    for row in rows:
        for text in row["wrong"]:
            print(f"{row['operation']}, {row['arch']}, {row['dtype']}: {text}")
    wrong = sum(bool(row["wrong"]) for row in rows)
    print(f"{sum(row['results'] for row in rows)} results compared, {wrong} of {len(rows)} rows wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
