"""Compile every Triton kernel for every supported chip, without a GPU, and look at what the compiler made.

    python -m bench.compile            # every dtype, head and alignment; minutes on 2 cores
    python -m bench.compile --quick    # what CI runs
    python -m bench.compile --peers    # Liger's and cut-cross-entropy's kernels beside ours
    python -m bench.compile --space    # which tiles of logp_kernel are worth having, per chip

Prints registers, spills, stack, shared memory, occupancy, and the tensor and memory instructions of the inner loop per
kernel and chip; writes bench/results/compile.json unless it is of --quick or --arch (compile-peers.json,
compile-space.json: always). Exits 1 if anything spills
to memory, needs more shared memory than the chip has (triton.compile does not check that: it builds a kernel for
131,072 B on a chip with 101,376 B), or moves an aligned tile in pieces under 16 bytes.
"""
import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from . import measure
from .disassembly import amd_resources, count, hot_code, moved_wide, nvidia_resources
from .occupancy import PROCESSORS, SHARED_LIMIT, occupancy

POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
TYPES = dict.fromkeys(("target", "length", "table"), "*i64")
TYPES |= dict.fromkeys("raw_target out sums factor numbers coefs pulled r means lse".split(), "*fp32")
TYPES |= dict.fromkeys(("inner", "outer", "chain", "slack", "lift", "eps"), "fp32")
# Pointers to numbers of the model's type.
OPERANDS = ("hidden", "weight", "bias", "logits", "part", "x", "y", "dy", "dx", "residual", "cos", "sin", "gate_up",
            "dh", "grad", "h", "query", "keys", "values", "result")
# Of them, what alone can take more than 2 GiB; no entry: all of them. On AMD the compiler is told of each tensor below
# that size, and addresses it in 32 bits (buffer loads).
LARGE = {"logp_kernel": ("weight",), "attend_kernel": ("keys", "values")}
# Integer arguments that are multiples of 16 at run time where the operands are aligned. The vocabulary is not
# among them: 50,257 has to be read as wide as 151,936.
ROUND = ("width", "hidden_stride", "weight_stride", "vocab_per_split", "row_stride", "whole")
ROUND += ("pulled_stride", "part_stride", "x_stride", "dy_stride", "residual_stride", "head_stride", "table_stride")
ROUND += ("half", "gate_up_stride", "dh_stride")
# Arrays that a block of a layer's kernels loads and stores, each as long as its tile.
MOVED = {"norm_kernel": (2, 1), "norm_backward_kernel": (4, 1), "rotate_kernel": (4, 2), "gated_kernel": (3, 3)}
# Of minimath.kernels, where the Triton functions live.
MODULES = ("linear_logp", "linear_kl", "tile_triton", "elementwise", "decode_attention_triton")


class Case(NamedTuple):
    """One kernel specialisation; `types` has argument names, others are i32."""
    kernel: str
    arch: str
    dtype: str
    variant: str
    types: dict
    constants: dict
    options: dict
    aligned: bool
    round: tuple = ROUND  # integer arguments known to be multiples of 16
    module: str = ""  # of a peer; ours are looked up by name
    large: tuple = ()  # tensors of more than 2 GiB


def kernel_function(name: str, module: str = ""):
    """Find the Triton function, without its autotuner or heuristics."""
    places = [module] if module else [f"minimath.kernels.{each}" for each in MODULES]
    function = next(vars(each)[name] for each in map(import_module, places) if name in vars(each))
    while not hasattr(function, "params"):
        function = function.fn
    return function


def logp_case(arch: str, dtype, config: dict, bias: bool, cap: bool, precision: str, even: bool, aligned: bool) -> Case:
    fixed = {"HAS_BIAS": bias, "HAS_CAP": cap, "PRECISION": precision, "UPCAST": False, "EVEN_D": even}
    variant = f"bias={bias:d} cap={cap:d} even={even:d} {precision}"
    return case_of("logp_kernel", arch, dtype, config, fixed, aligned, variant)


def case_of(kernel: str, arch: str, dtype, config: dict, flags: dict, aligned: bool, variant: str = "") -> Case:
    """Make a case of a kernel's config, whose num_ are launch options, and of flags, which tell it from others."""
    options = {key: value for key, value in config.items() if key.startswith("num_")}
    constants = {key: value for key, value in config.items() if key not in options} | flags
    words = [variant] if variant else [f"{name.removeprefix('HAS_').lower()}={value or 0:d}"
                                       for name, value in flags.items()]
    types = dict.fromkeys(OPERANDS, POINTER[dtype]) | TYPES
    name, variant = str(dtype).split(".")[1], " ".join([*words, *([] if aligned else ["unaligned"])])
    return Case(kernel, arch, name, variant, types, constants, options, aligned)


def row_cases(arch: str, dtype, aligned: bool, *, quick: bool) -> list[Case]:
    """List the cases of the kernels that work on one row.

    Whole tiles, and without quick also the narrow ones of a small vocabulary.
    """
    common, tiles = (import_module(f"minimath.kernels.{each}") for each in ("common", "tile_triton"))
    found = [case_of(name, arch, dtype, tiles.pull_config(896), {}, aligned)
             for name in ("pull_kernel", "kl_pull_kernel")]
    if not aligned:  # the workspace's rows are aligned, whatever the vocabulary; the hidden size may be odd
        return found
    for columns in (common.VOCAB_TILE["cuda"],) if quick else (common.VOCAB_TILE["cuda"], 1000):
        config = tiles.row_config(columns, arch)
        choices = (True,) if quick else (False, True)
        for cap in choices:
            flags = {"HAS_CAP": cap}
            found.append(case_of("gradient_kernel", arch, dtype, config, flags, aligned))
            found += [case_of("tile_kernel", arch, dtype, config, flags | {"KEEP": keep}, aligned) for keep in choices]
            found += [case_of("kl_kernel", arch, dtype, config, flags | {"HAS_BIAS": bias, "KEEP": keep}, aligned)
                      for bias, keep in product(choices, choices)]
    return found


def logp_cases(arch: str, dtype, aligned: bool, *, quick: bool) -> list[Case]:
    logp = import_module("minimath.kernels.linear_logp")
    if not logp.keeps_registers(arch):  # never launched there
        return []
    config = logp.logp_config(arch, dtype, aligned)
    tf32 = dtype == torch.float32 and arch != "gfx1100" and not quick
    evens = (True, False) if aligned else (False,)  # an odd width is no multiple of BLOCK_D
    precisions = ("ieee", "tf32") if tf32 else ("ieee",)
    found = [logp_case(arch, dtype, config, bias, cap, precision, even, aligned)
             for bias, cap, even, precision in product((False, True), (False, True), evens, precisions)]
    return [found[0], found[-1]] if quick and aligned else found[-1:] if quick else found


def layer_cases(arch: str, dtype, aligned: bool, *, quick: bool) -> list[Case]:
    """List the cases of a decoder layer's kernels: rows of heads, of a hidden size, and of the longest."""
    layer = import_module("minimath.kernels.elementwise")
    forward = {"dh": None, "grad": None}
    gates = [{"GELU": True}, {"GELU": False}, {"GELU": True} | forward][:1 if quick else 3]
    wanted = [("gated_kernel", layer.gated_config(arch), flags) for flags in gates]
    halves = (32,) if quick else (32, 64)
    wanted += [("rotate_kernel", layer.row_config(half, arch), {"BACK": half == 32}) for half in halves]
    for width, again in product((64, 8192) if quick else (64, 896, 8192), (False,) if quick else (False, True)):
        config, flags = layer.row_config(width, arch), {"OFFSET": int(again)}
        wanted += [("norm_kernel", config, flags | {"AGAIN": again}),
                   ("norm_backward_kernel", config, flags | ({"residual": None} if again else {}))]
    return [case_of(kernel, arch, dtype, config, flags, aligned) for kernel, config, flags in wanted]


def decode_cases(arch: str, dtype, *, quick: bool) -> list[Case]:
    """List the cases of decode attention: by head size, query heads of a key head, and softcap."""
    decode, found = import_module("minimath.kernels.decode_attention_triton"), {}
    sizes = (64, 80, 128, 256) if not quick else (128,) if dtype == torch.float32 else (80,)
    for size, group, cap in product(sizes, (8,) if quick else (1, 8), (True,) if quick else (False, True)):
        config = decode.attend_config(arch, dtype, group, size)
        fixed = {"SPLIT": decode.SPLIT, "PAGE": decode.PAGE, "UPCAST": False}
        flags = {"HAS_CAP": cap, "DIM": size}
        case = found[size, cap, config["ROWS"]] = case_of("attend_kernel", arch, dtype, config | fixed, flags, True)
        if arch.startswith("gfx") and decode.takes(arch, dtype, size, True):
            found[size, cap, config["ROWS"], "large"] = over_2_gib(case)
        if not quick or dtype != torch.float32:  # which differs in the last store
            config = decode.merge_config(arch, size) | fixed
            found[size] = case_of("merge_kernel", arch, dtype, config, {"DIM": size}, True)
    return [case for case in found.values() if decode.takes(arch, dtype, case.constants["DIM"], False)]


def over_2_gib(case: Case) -> Case:
    return case._replace(large=LARGE.get(case.kernel, OPERANDS), variant=f"{case.variant} large".strip())


def cases(arch: str, *, quick: bool) -> list[Case]:
    """List every specialisation that a run on this chip can ask for.

    With quick, the extremes of each choice for every kernel.
    """
    half = torch.float16 if arch == "sm_75" else torch.bfloat16  # Turing has no bf16 arithmetic
    found, dtypes = [], (half, torch.float32) if quick else tuple(POINTER)
    for dtype, aligned in product(dtypes, (True, False)):
        found += logp_cases(arch, dtype, aligned, quick=quick)
        if aligned or not quick:
            found += row_cases(arch, dtype, aligned, quick=quick) + layer_cases(arch, dtype, aligned, quick=quick)
    if arch.startswith("gfx") and not quick:
        found += [over_2_gib(case) for case in found]
    return found + [case for dtype in dtypes for case in decode_cases(arch, dtype, quick=quick)]


def gpu_target(arch: str):
    from triton.backends.compiler import GPUTarget
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, PROCESSORS[arch].warp_size)


def tile_bytes(case: Case) -> tuple[int, int]:
    """Compute the bytes that a block loads and stores per step of its inner loop.

    Without the numbers of a row, which are narrow by nature.
    """
    size, constants = getattr(torch, case.dtype).itemsize, case.constants
    if case.kernel == "logp_kernel":
        return (constants["BLOCK_N"] + constants["BLOCK_V"]) * constants["BLOCK_D"] * size, 0
    if case.kernel == "attend_kernel":
        return 2 * constants["BLOCK_T"] * constants["BLOCK_D"] * size, 0
    if case.kernel == "merge_kernel":
        return constants["BLOCK_S"] * constants["BLOCK_D"] * 4, 0
    if case.kernel in ("pull_kernel", "kl_pull_kernel"):
        rows = 2 if case.kernel == "kl_pull_kernel" else 1
        return rows * constants["BLOCK"] * (size + 4), rows * constants["BLOCK"] * 4
    row = constants["BLOCK"] * (2 if case.kernel == "kl_kernel" else constants.get("ROWS", 1)) * size
    if case.kernel in MOVED:
        absent = [name in constants for name in ("residual", "dh", "grad", "grad")]
        loaded, stored = MOVED[case.kernel]
        return (loaded - sum(absent[:2])) * row, (stored - sum(absent[2:])) * row
    return row, row if constants.get("KEEP", True) else 0


def build(case: Case):
    """Compile with Triton, as its launcher would for tensors at multiples of 16 bytes. Needs no GPU."""
    import triton
    from triton.compiler import ASTSource, make_backend
    target = gpu_target(case.arch)
    backend = make_backend(target)
    function = kernel_function(case.kernel, case.module)
    signature = {name: "constexpr" if name in case.constants else case.types.get(name, "i32")
                 for name in function.arg_names}
    general = {each.name for each in function.params if each.do_not_specialize}
    known = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(function.arg_names)
             if case.aligned and name in case.round and name not in general}
    for index, name in enumerate(function.arg_names):
        if signature[name].startswith("*"):
            tensor = torch.empty(1 << (32 if name in case.large else 20), dtype=torch.uint8, device="meta")
            known[index,] = backend.parse_attr(backend.get_tensor_specialization(tensor, align=True))
    constants = {name: value for name, value in case.constants.items() if name in signature}
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=known)
    return triton.compile(source, target=target, options=case.options)


def compile_case(case: Case) -> dict:
    """Compile one case and return its row of the table.

    `wide` is whether the inner loop moves its tile in pieces of 16 bytes (None where nothing is promised), `ok` whether
    the case passes.
    """
    built = build(case)
    nvidia = "cubin" in built.asm
    found, code = nvidia_resources(built.asm["cubin"]) if nvidia else amd_resources(built.asm["amdgcn"])
    threads = case.options["num_warps"] * PROCESSORS[case.arch].warp_size
    shared, columns = built.metadata.shared, getattr(built.metadata, "tmem_size", 0) or 0
    # a layer's kernels have no loop; on AMD a masked load that is placed behind the end would look like one
    loops = [count(code)] if case.kernel in MOVED else hot_code(code)
    row = {key: getattr(case, key) for key in ("kernel", "arch", "dtype", "variant")}
    row |= {"config": config_text(case), **found, "shared": shared, "shared_limit": SHARED_LIMIT[case.arch]}
    row["occupancy"] = round(occupancy(case.arch, threads, found["registers"], shared, columns), 3)
    row["loops"] = [each._asdict() for each in loops]
    row["wide"] = is_wide(case, loops, threads) if case.aligned and not case.module else None
    fits = row["spills"] == 0 and row["stack"] == 0 and shared <= row["shared_limit"]
    row["ok"] = fits and row["wide"] is not False
    return row


def is_wide(case: Case, loops, threads: int) -> bool:
    """Tell whether 16-byte instructions move the whole tile in every inner loop."""
    loaded, stored = tile_bytes(case)
    return all(moved_wide(each.loads, threads) >= loaded and moved_wide(each.stores, threads) >= stored
               for each in loops)


def config_text(case: Case) -> str:
    """Write the tile, warps and stages as "128x64x32 w8 s2"."""
    tile = "x".join(str(case.constants[key]) for key in case.constants if key.startswith(("ROWS", "BLOCK")))
    stages = f" s{case.options['num_stages']}" if "num_stages" in case.options else ""
    return f"{tile} w{case.options['num_warps']}{stages}"


def compile_many(wanted: list[Case], *, workers: int = 0) -> list[dict]:
    """Compile in a pool of fresh processes, in this one for a single worker."""
    if workers == 1 or len(wanted) < 2:
        return [compile_case(case) for case in wanted]
    with ProcessPoolExecutor(workers or os.cpu_count() or 1, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_case, wanted, chunksize=4))


def compile_all(*, quick: bool, archs=tuple(SHARED_LIMIT), workers: int = 0) -> list[dict]:
    """Compile every case for every chip -> the rows."""
    return compile_many([case for arch in archs for case in cases(arch, quick=quick)], workers=workers)


def loop_text(counts: dict) -> str:
    """Write the loads or stores of a loop as "4 LDGSTS.128, 1 LDG.16", widest first."""
    order = sorted(counts, key=lambda key: -int(key.split(".")[1]))
    return ", ".join(f"{counts[key]} {key}" for key in order)


def show(rows: list[dict], title: str) -> None:
    """Print rows of compile_case; numbers of several inner loops are separated by |."""
    table = Table(title=title)
    numbers = ("regs", "spill", "stack", "shared", "occ.")
    for name in ("kernel", "chip", "dtype", "variant", "config", *numbers, "tensor", "loads", "stores", ""):
        table.add_column(name, justify="right" if name in numbers else "left")
    for row in rows:
        resources = (f"{row[key]:,}" for key in ("registers", "spills", "stack", "shared"))
        loops = row["loops"]
        table.add_row(*(row[key] for key in ("kernel", "arch", "dtype", "variant", "config")), *resources,
                      f"{row['occupancy']:.0%}", "|".join(str(each["tensor"]) for each in loops),
                      *("|".join(loop_text(each[key]) or "-" for each in loops) for key in ("loads", "stores")),
                      "ok" if row["ok"] else "[red]FAIL[/]")
    Console(width=230).print(table)


def worst_rows(rows: list[dict]) -> list[dict]:
    """Find the worst case per kernel, chip and dtype: failing, then most registers."""
    worst = {}
    for row in rows:
        key = (row["kernel"], row["arch"], row["dtype"])
        rank = (not row["ok"], row["registers"], row["shared"])
        if key not in worst or rank > worst[key][0]:
            worst[key] = rank, row
    return [row for _, row in worst.values()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile", description=__doc__.split("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--peers", action="store_true", help="other packages' kernels beside ours")
    what.add_argument("--space", action="store_true", help="search logp_kernel's tiles")
    what.add_argument("--quick", action="store_true", help="the extremes of each choice, as CI does")
    parser.add_argument("--arch", action="append", choices=list(SHARED_LIMIT), help="only this chip; repeatable")
    parser.add_argument("--all", action="store_true", help="print every row, not the worst of each kernel and chip")
    parser.add_argument("--workers", type=int, default=0, help="processes; all cores by default")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.compile: unset TRITON_INTERPRET, the interpreter replaces the compiler")
        return 2
    archs = tuple(options.arch or SHARED_LIMIT)
    if options.peers or options.space:
        other = import_module("bench.peer_kernels" if options.peers else "bench.tile_space")
        return other.run(archs, everything=options.all, workers=options.workers)
    rows = compile_all(quick=options.quick, archs=archs, workers=options.workers)
    show(rows if options.all else worst_rows(rows), "Ahead-of-time compilation")
    if not (options.quick or options.arch):  # a part must not take the place of all
        measure.write_rows(measure.RESULTS / "compile.json", rows)
    bad = [row for row in rows if not row["ok"]]
    if bad and not options.all:
        show(bad, "Failing")
    print(f"{len(rows)} compilations, {len(bad)} with spills, too much shared memory or narrow loads")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
