"""Other packages' kernels, compiled the way their own launchers would have them compiled, beside ours.

Liger (fused linear cross-entropy: its row kernel, and the kernel that scales gradients) and cut-cross-entropy
(log-sum-exp, target logit, backward), for bf16, hidden sizes 896 and 3584, a vocabulary of 151,936, and 4,001 rows that
count. A launcher's call is given here as its arguments, with tensors on the meta device; what Triton specialises on (1,
multiples of 16, None) and the packages' heuristics do the rest. cut-cross-entropy takes one fixed tile unless
CCE_AUTOTUNE is set; the tiles it then tries are compiled as well, for three chips, and a line says how many of them
spill or need more shared memory than the chip has.
"""
from importlib import import_module
from importlib.util import find_spec

import torch

from . import measure
from .compile import Case, compile_many, logp_cases, row_cases, show
from .occupancy import SHARED_LIMIT

ROWS, VOCAB, WIDTHS = 4001, 151_936, (896, 3584)
PACKAGES = {"liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}
TUNED = ("sm_86", "sm_89", "sm_90")  # chips for which the autotuner's tiles are compiled too
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32",
         torch.uint32: "*u32"}


def pointer(dtype, *shape) -> torch.Tensor:
    return torch.empty(shape or 1, dtype=dtype, device="meta")


def liger_calls(arch: str, width: int) -> list[tuple]:
    """List module, kernel, arguments, launch options of Liger's cross-entropy."""
    warps = {"num_warps": 16 if arch.startswith("gfx") else 32}
    largest = 65536 // 2
    loss = {"X_ptr": pointer(torch.bfloat16), "X_stride": VOCAB, "Y_ptr": pointer(torch.int64), "Y_stride": 1,
            "loss_ptr": pointer(torch.float32), "loss_stride": 1, "n_cols": VOCAB, "n_non_ignore": ROWS,
            "sum_non_ignore_weight": ROWS, "weight_sum": 0.0, "ignore_index": -100, "lse_square_scale": 0.0,
            "label_smoothing": 0.0, "reduction": "mean", "token_accuracy_stride": 0, "predicted_tokens_stride": 0,
            "BLOCK_SIZE": min(largest, 1 << (VOCAB - 1).bit_length()), "HAS_GRADIENTS": True}
    loss |= dict.fromkeys(("weight_ptr", "z_loss_ptr", "token_accuracy_ptr", "predicted_tokens_ptr", "softcap"))
    loss |= dict.fromkeys(("RETURN_Z_LOSS", "RETURN_TOKEN_ACCURACY", "RETURN_PREDICTED_TOKENS", "HAS_WEIGHT",
                           "HAS_SOFTCAPPING"), False)
    scale = {"X_ptr": pointer(torch.bfloat16), "X_stride": width, "grad_output_ptr": pointer(torch.float32),
             "n_cols": width, "X_col_stride": 1, "BLOCK_SIZE": min(largest, 1 << (width - 1).bit_length())}
    return [("liger_kernel.ops.cross_entropy", "liger_cross_entropy_kernel", loss, warps),
            ("liger_kernel.ops.utils", "element_mul_kernel", scale, warps)]


def cce_calls(width: int) -> list[tuple]:
    """List the same for cut-cross-entropy.

    Forward with the mean logit that its gradient filter sorts by, and backward for a frozen head (no dC).
    """
    e, c = pointer(torch.bfloat16, ROWS, width), pointer(torch.bfloat16, VOCAB, width)
    numbers, valids = pointer(torch.float32, ROWS), pointer(torch.int32, ROWS)
    shared = {"E": e, "C": c, "Valids": valids, "B": ROWS, "D": width, "B_BIN": 1024, "stride_eb": width,
              "stride_ed": 1, "stride_cv": width, "stride_cd": 1, "stride_vb": 1}
    locks = -(-width // 64)
    lse = shared | {"LSE": numbers, "LA": pointer(torch.float32, VOCAB), "Locks": pointer(torch.uint32),
                    "softcap": None, "V": VOCAB, "stride_lse_b": 1, "num_locks": -(-ROWS // 128)}
    dot = shared | {"Inds": pointer(torch.int64, ROWS), "Out": numbers, "stride_ib": 1, "SHIFT": False}
    back = shared | {
        "LSE": numbers, "dOut": pointer(torch.bfloat16), "grad_scale": 1 / ROWS,
        "VocabOrdering": pointer(torch.int32, VOCAB), "softcap": None, "Targets": pointer(torch.int64, ROWS), "dE": e,
        "dELocks": pointer(torch.int32), "dC": c, "dCLocks": pointer(torch.int32), "V": VOCAB,
        "n_de_locks_0": -(-ROWS // locks), "n_de_locks_1": locks, "n_dc_locks_0": -(-VOCAB // locks),
        "n_dc_locks_1": locks, "filter_eps": torch.finfo(torch.bfloat16).eps / 32, "SHIFT": False,
        "REQUIRES_GRAD": False}
    return [("cut_cross_entropy.cce_lse_forward", "_cce_lse_forward_kernel", lse, {}),
            ("cut_cross_entropy.indexed_dot", "_indexed_neg_dot_forward_kernel", dot, {}),
            ("cut_cross_entropy.cce_backward", "_cce_backward_kernel", back, {})]


def specialised(arch: str, module: str, kernel: str, arguments: dict, options: dict, variant: str) -> Case:
    """Make the case that Triton would compile for this call.

    Heuristics are applied, then 1 and None are constants and multiples of 16 known as such.
    """
    function, given, options = getattr(import_module(module), kernel), dict(arguments), dict(options)
    while not hasattr(function, "params"):
        for name, heuristic in function.values.items():
            given.setdefault(name, heuristic(given))
        function = function.fn
    options |= {name: given.pop(name) for name in list(given) if name.startswith("num_") and name not in arguments}
    types, constants, even = {}, {}, []
    for parameter in function.params:
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            types[name] = TYPES[value.dtype]
        elif isinstance(value, float):
            types[name] = "fp32"
        elif value % 16 == 0:
            even.append(name)
    launch = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    return Case(kernel, arch, "bfloat16", variant, types, constants, launch, True, tuple(even), module)


def tuner_tiles(arch: str) -> list[dict]:
    """List the tiles of cut-cross-entropy's autotuner that arithmetic bounds.

    Without those whose operands alone exceed the chip's shared memory: it drops them too.
    """
    found = []
    for config in import_module("cut_cross_entropy.tl_autotune").get_autotune_config():
        tile = config.kwargs
        operands = (tile["BLOCK_B"] + tile["BLOCK_V"]) * tile["BLOCK_D"] * 2 * config.num_stages
        if min(tile["BLOCK_B"], tile["BLOCK_V"]) >= 64 and operands <= SHARED_LIMIT[arch]:
            found.append(tile | {"num_warps": config.num_warps, "num_stages": config.num_stages})
    return found


def peer_cases(arch: str, package: str) -> list[Case]:
    """List what a package would compile by default; empty if not installed.

    Widths that lead to the same specialisation appear once.
    """
    if not installed(package):
        return []
    found = {}
    for width in WIDTHS:
        calls = liger_calls(arch, width) if package == "liger" else cce_calls(width)
        for module, kernel, arguments, options in calls:
            case = specialised(arch, module, kernel, arguments, options, f"D={width}")
            found.setdefault(str(case._replace(variant="")), case)
    return list(found.values())


def tuned_cases(arch: str) -> list[Case]:
    """List the autotuner's tiles for the two kernels that it tunes over them."""
    if arch not in TUNED or not installed("cut-cross-entropy"):
        return []
    launch = ("num_warps", "num_stages")
    return [specialised(arch, module, kernel, arguments | tile, options | {name: tile[name] for name in launch},
                        "autotune")
            for tile in tuner_tiles(arch) for module, kernel, arguments, options in cce_calls(WIDTHS[0])
            if "BLOCK_V" in import_module(module).__dict__[kernel].fn.fn.arg_names]


def installed(package: str) -> bool:
    return find_spec(PACKAGES[package]) is not None


def our_cases(arch: str) -> list[Case]:
    """List what our launchers compile for the same call."""
    return logp_cases(arch, torch.bfloat16, True, quick=True)[:1] + [
        case for case in row_cases(arch, torch.bfloat16, True, quick=False) if not case.constants.get("HAS_CAP")
        and (case.constants["BLOCK"] > 1024 or case.kernel == "pull_kernel")]  # not a small vocabulary's tile


def tuner_summary(rows: list[dict]) -> list[str]:
    """Write per chip and kernel how many autotuned tiles spill, and the best left."""
    lines = []
    for arch, kernel in dict.fromkeys((row["arch"], row["kernel"]) for row in rows):
        mine = [row for row in rows if (row["arch"], row["kernel"]) == (arch, kernel)]
        large = sum(row["shared"] > row["shared_limit"] for row in mine)
        left = [row for row in mine if row["ok"]]
        best = max(left, key=lambda row: (tile_reuse(row["config"]), row["occupancy"]), default=None)
        spilling = sum(row["spills"] > 0 for row in mine)
        lines.append(f"{arch} {kernel}: {len(mine)} tiles of its autotuner, {spilling} spill, "
                     f"{large} exceed shared memory; best left {best['config'] if best else 'none'}")
    return lines


def tile_reuse(config: str) -> float:
    """Compute multiply-adds per element loaded of a tile like "128x64x32 w8 s2"."""
    rows, columns = map(int, config.split(" ")[0].split("x")[:2])
    return rows * columns / (rows + columns)


def run(archs, *, everything: bool, workers: int) -> int:
    """Print the tables, write compile-peers.json; 0, as peers are held to nothing."""
    wanted = [("minimath", case) for arch in archs for case in our_cases(arch)]
    for package in PACKAGES:
        if not installed(package):
            print(f"{package}: not installed")
        wanted += [(package, case) for arch in archs for case in peer_cases(arch, package)]
    wanted += [("cut-cross-entropy autotune", case) for arch in archs for case in tuned_cases(arch)]
    rows = compile_many([case for _, case in wanted], workers=workers)
    rows = [{"package": package} | row for (package, _), row in zip(wanted, rows)]
    tuned = [row for row in rows if row["package"].endswith("autotune")]
    for arch in archs:
        mine = [row for row in rows if row["arch"] == arch and (everything or row not in tuned)]
        show(mine, f"Ours and theirs on {arch}, bf16, V={VOCAB:,}")
    print("\n".join(tuner_summary(tuned)))
    measure.write_rows(measure.RESULTS / "compile-peers.json", rows)
    return 0
