"""Compile every Triton kernel for every supported chip, without a GPU, and look at what the compiler made of
it.

    python -m bench.compile            # every dtype, head and alignment; about two minutes on 2 cores
    python -m bench.compile --quick    # what CI runs

Prints registers, spills, stack and shared memory per kernel and chip, writes bench/results/compile.json, and
exits 1 if anything spills to memory or needs more shared memory than the chip has. triton.compile itself does
not check that: it builds a kernel for 131,072 B on a chip with 101,376 B.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

# Shared memory (LDS on AMD) that one block may take, bytes: CUDA C programming guide, table "technical
# specifications per compute capability"; AMD ISA guides.
SHARED_LIMIT = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_120": 101_376,
    "gfx1100": 65_536,
    "gfx942": 65_536,
}
POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
RESULTS = Path(__file__).parent / "results"
ROW_TYPES = {
    "target": "*i64",
    "raw_target": "*fp32",
    "out": "*fp32",
    "stats": "*fp32",
    "coefs": "*fp32",
    "inner": "fp32",
    "outer": "fp32",
    "chain": "fp32",
}


class Case(NamedTuple):
    """One kernel specialisation. `types` maps argument names to Triton types (others are i32)."""

    kernel: str
    arch: str
    dtype: str
    variant: str
    types: dict
    constants: dict
    options: dict
    aligned: bool


def kernel_function(name: str):
    module = "linear_logp" if name == "logp_kernel" else "linear_token_loss"
    return getattr(import_module(f"minimath.kernels.{module}"), name)


def split_config(config: dict) -> tuple[dict, dict]:
    """(compile-time constants, launch options) of a kernel's config."""
    options = {key: value for key, value in config.items() if key.startswith("num_")}
    return {key: value for key, value in config.items() if key not in options}, options


def cases(arch: str, *, quick: bool) -> list[Case]:
    """Every specialisation that a run on this chip can ask for; with quick, a fifth of them, all kernels
    among them."""
    logp, loss = (import_module(f"minimath.kernels.{name}") for name in ("linear_logp", "linear_token_loss"))
    found = []
    for dtype, aligned in product(
        (torch.bfloat16, torch.float32) if quick else tuple(POINTER), (True, False)
    ):
        name = str(dtype).split(".")[1]
        constants, options = split_config(logp.logp_config(arch, dtype, aligned))
        types = dict.fromkeys(("hidden", "weight", "bias"), POINTER[dtype]) | ROW_TYPES
        precisions = (
            ("ieee", "tf32") if dtype == torch.float32 and arch != "gfx1100" and not quick else ("ieee",)
        )
        for bias, cap, precision in product((False, True), (False, True), precisions):
            if quick and bias != cap:
                continue
            fixed = constants | {"HAS_BIAS": bias, "HAS_CAP": cap, "PRECISION": precision, "UPCAST": False}
            variant = f"bias={bias:d} cap={cap:d} {precision}"
            found.append(Case("logp_kernel", arch, name, variant, types, fixed, options, aligned))
        if quick and not aligned:
            continue
        types = {"logits": POINTER[dtype]} | ROW_TYPES
        for kernel, vocab, cap in product(
            ("row_stats_kernel", "gradient_kernel"), (49152,) if quick else (49152, 1000), (False, True)
        ):
            constants, options = split_config(loss.row_config(vocab))
            found.append(
                Case(
                    kernel,
                    arch,
                    name,
                    f"cap={cap:d} block={constants['BLOCK']}",
                    types,
                    constants | {"HAS_CAP": cap},
                    options,
                    aligned,
                )
            )
    return found


def gpu_target(arch: str):
    from triton.backends.compiler import GPUTarget

    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)


def ptx_resources(ptx: str, arch: str) -> dict:
    """Registers, spilled and stack bytes that ptxas reports."""
    from triton.backends.nvidia.compiler import get_ptxas

    number = int(arch[3:])
    name = arch + ("a" if number >= 90 else "")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        done = subprocess.run(
            [
                get_ptxas(number).path,
                "-v",
                f"--gpu-name={name}",
                str(source),
                "-o",
                str(Path(folder) / "kernel.cubin"),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    stack, stores, loads = map(
        int,
        re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", done.stderr).groups(),
    )
    return {
        "registers": int(re.search(r"Used (\d+) registers", done.stderr).group(1)),
        "spills": stores + loads,
        "stack": stack,
    }


def gcn_resources(text: str) -> dict:
    """Vector registers, spills and scratch bytes in the kernel's metadata. Spilled scalar registers are not
    counted: they go to lanes of vector registers, not to memory."""

    def number(key):
        return int(re.search(rf"\.{key}:\s*(\d+)", text).group(1))

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),
        "stack": number("private_segment_fixed_size"),
    }


def compile_case(case: Case) -> dict:
    """Compile one case and return its row of the table. Needs no GPU."""
    import triton
    from triton.compiler import ASTSource

    function = kernel_function(case.kernel)
    signature = {
        name: "constexpr" if name in case.constants else case.types.get(name, "i32")
        for name in function.arg_names
    }
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(function.arg_names)
        if signature[name].startswith("*") or (case.aligned and signature[name] == "i32" and name != "rows")
    }
    built = triton.compile(
        ASTSource(function, signature=signature, constexprs=case.constants, attrs=divisible),
        target=gpu_target(case.arch),
        options=case.options,
    )
    found = (
        gcn_resources(built.asm["amdgcn"])
        if "amdgcn" in built.asm
        else ptx_resources(built.asm["ptx"], case.arch)
    )
    row = {
        "kernel": case.kernel,
        "arch": case.arch,
        "dtype": case.dtype,
        "variant": case.variant + ("" if case.aligned else " unaligned"),
        **found,
        "shared": built.metadata.shared,
        "shared_limit": SHARED_LIMIT[case.arch],
    }
    row["ok"] = row["spills"] == 0 and row["stack"] == 0 and row["shared"] <= row["shared_limit"]
    return row


def compile_all(*, quick: bool, archs=tuple(SHARED_LIMIT), workers: int = 0) -> list[dict]:
    """Rows of every case for every chip, in a pool of fresh processes."""
    wanted = [case for arch in archs for case in cases(arch, quick=quick)]
    with ProcessPoolExecutor(workers or os.cpu_count() or 1, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_case, wanted, chunksize=4))


def show(rows: list[dict], *, everything: bool) -> None:
    """Worst case per kernel, chip and dtype; every row with `everything`; all failing rows in any case."""
    table = Table(title="Ahead-of-time compilation")
    for name in ("kernel", "chip", "dtype", "variant", "registers", "spills", "stack", "shared", "limit", ""):
        table.add_column(name)
    worst = {}
    for row in rows:
        key = (row["kernel"], row["arch"], row["dtype"])
        rank = (not row["ok"], row["registers"], row["shared"])
        if key not in worst or rank > worst[key][0]:
            worst[key] = rank, row
    for row in rows if everything else [row for _, row in worst.values()]:
        table.add_row(
            row["kernel"],
            row["arch"],
            row["dtype"],
            row["variant"],
            *(f"{row[key]:,}" for key in ("registers", "spills", "stack", "shared", "shared_limit")),
            "ok" if row["ok"] else "[red]FAIL[/]",
        )
    Console(width=130).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the extremes of each choice, as CI does")
    parser.add_argument(
        "--arch", action="append", choices=list(SHARED_LIMIT), help="only this chip; repeatable"
    )
    parser.add_argument(
        "--all", action="store_true", help="print every row, not the worst of each kernel and chip"
    )
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.compile: unset TRITON_INTERPRET, the interpreter replaces the compiler")
        return 2
    rows = compile_all(quick=options.quick, archs=tuple(options.arch or SHARED_LIMIT))
    show(rows, everything=options.all)
    RESULTS.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)  # one row a line
    (RESULTS / "compile.json").write_text(f"[\n{lines}\n]\n")
    bad = sum(not row["ok"] for row in rows)
    print(f"{len(rows)} compilations, {bad} with spills or too much shared memory")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
