"""Runs the cases of an operation for a chip and a dtype, and judges the results."""
from contextlib import contextmanager

import torch

from .cases import BF16, FLOAT, HALF, chosen_cases
from .device import installed
from .formats import Fault

CHIPS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "gfx942")


def dtypes(chip: str):
    return (FLOAT, HALF) if chip == "sm_75" else (FLOAT, HALF, BF16)  # Turing has no bf16 arithmetic


@contextmanager
def unwritten_is_nan():
    """What torch.empty returns is NaN: a kernel that reads what nothing wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def run_operation(operation: str, chip: str, dtype, cases, **options) -> dict:
    """Run the cases of one operation -> a row of the table. options: of `installed`."""
    row = {"operation": operation, "arch": chip, "dtype": str(dtype).split(".")[1], "results": 0, "error": 0.0,
           "torch": 0.0, "wrong": []}
    with installed(chip, **options) as launches, unwritten_is_nan():
        for function, sizes in cases:
            try:
                for check in function(dtype, **sizes):
                    row["results"] += 1
                    row["error"] = max(row["error"], check.error())
                    row["torch"] = max(row["torch"], check.error("torch"))
                    if not check.ok():
                        row["wrong"].append(f"{check.name} {sizes}: error {check.error():.1e}, "
                                            f"torch {check.error('torch'):.1e}")
            except (Fault, NotImplementedError) as fault:
                row["wrong"].append(f"{sizes}: {type(fault).__name__}: {fault}")
    return row | {"kernels": sorted({name for name, _ in launches})}


def run_chip(chip: str, dtype, quick: bool) -> list[dict]:
    """Run every operation for a chip and a dtype -> rows of the table."""
    return [run_operation(name, chip, dtype, cases) for name, cases in chosen_cases(quick).items()]
