"""The two fully fused forms of loss + gradient under a frozen head, that kernels/linear_token_loss.py is not.

    python -m bench.fused_forms            # compile every config for four chips; minutes on one core

The workspace form writes a chunk of logits to memory and reads it back. Two forms never do:

    recompute  knows lse and the loss's coefficient a from a forward sweep, makes each tile of logits once
               more and adds (a * (1[j = t] - p_j)) @ W tile to its own fp32 rows of dX in memory. Three
               products.
    online     one sweep as in flash attention with keys = values = W: the running E = sum_j exp(z_j) w_j of
               a row block stays in registers and is rescaled as the maximum moves. dX = a (w_t - E / total),
               so a may come after the sweep. Two products, but BLOCK_N x D fp32 numbers have to fit on one
               multiprocessor. Losses of logp and lse only: an entropy term would need a second such sum.

Both are complete and tested (bench/fused_kernels.py, tests/test_fused_forms.py); parts of the vocabulary are
added in a fixed order, without atomics. They are kept as evidence for the choice, not for use. The command
prints what the compiler made of them per hidden size and chip and writes bench/results/fused-forms.json.
"""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.table import Table

from . import compile as ahead

ARCHS = ("sm_86", "sm_90", "sm_80", "sm_89")
WIDTHS = (576, 896, 1536, 2048)  # SmolLM2 135M, Qwen2.5 0.5B and 1.5B, Llama-3.2 1B and Qwen2.5 3B
TYPES = {
    **dict.fromkeys(("hidden", "weight"), "*bf16"),
    **dict.fromkeys(("lse", "coef", "partial", "stats", "expected"), "*fp32"),
    "target": "*i64",
    "scale": "fp32",
}
NAMES = ("BLOCK_N", "BLOCK_V", "BLOCK_D", "num_warps", "num_stages")
RECOMPUTE = [
    dict(zip(NAMES, values))
    for values in (
        (64, 128, 64, 4, 2),
        (128, 64, 64, 8, 3),
        (128, 128, 64, 8, 2),
        (128, 128, 64, 16, 2),
        (64, 256, 32, 8, 2),
        (128, 256, 32, 8, 2),
    )
]
ONLINE = [
    {"HOLD": hold, **dict(zip(NAMES, values))}
    for hold in (True, False)
    for values in (
        (16, 16, 64, 8, 1),
        (16, 16, 512, 8, 1),
        (16, 32, 256, 8, 2),
        (16, 32, 512, 8, 2),
        (32, 16, 128, 8, 1),
        (32, 16, 128, 8, 3),
        (32, 32, 64, 8, 2),
        (32, 32, 128, 8, 2),
        (32, 32, 512, 16, 1),
        (64, 16, 128, 8, 1),
        (64, 32, 64, 8, 2),
    )
]


# what came out best, per hidden size: (rows x columns x part of D, warps, stages), weight held on chip or not
CHOSEN = {
    576: (True, 32, 32, 64, 8, 2),
    896: (True, 32, 16, 128, 8, 1),
    1536: (True, 16, 32, 256, 8, 2),
    2048: (True, 16, 16, 512, 8, 1),
}
CHOSEN_SMALL = CHOSEN | {1536: (True, 16, 16, 64, 8, 1), 2048: (False, 16, 16, 512, 8, 1)}  # 99 KiB a block


def useful_share(width: int, config: dict) -> float:
    """Part of both products that is not padding of D to whole BLOCK_D."""
    return width / (-(-width // config["BLOCK_D"]) * config["BLOCK_D"])


def candidates(form: str, width: int) -> list[dict]:
    """Configs worth compiling: of `online`, those whose sums leave a thread 64 of the registers it can have;
    with fewer (128 rows at D = 576, 32 at 1536) hundreds of bytes spill and more."""
    if form == "recompute":
        return RECOMPUTE
    kept = []
    for config in ONLINE:
        lanes = 32 * config["num_warps"]
        sums = config["BLOCK_N"] * width / useful_share(width, config) / lanes
        if sums + 64 <= min(255, 65_536 // lanes):
            kept.append(config)
    return kept


def flops_per_byte(form: str, config: dict) -> float:
    """Flops of the kernel per byte that it moves through the L2 cache, 16-bit operands; any D, V and N.

    Per tile of logits, all times D: 4 BLOCK_N BLOCK_V flops. Bytes: the weight tile 2 BLOCK_V for each read,
    of which there are two without HOLD; hidden 2 BLOCK_N unless held; and recompute reads and writes the fp32
    sums, 8 BLOCK_N. A (128, 128) tile of a plain matrix product has 64.
    """
    n, v = config["BLOCK_N"], config["BLOCK_V"]
    if form == "recompute":
        return 4 * n * v / (4 * v + 10 * n)
    return 2.0 * n if config["HOLD"] else 4 * n * v / (4 * v + 2 * n)


def fused_case(form: str, arch: str, width: int, config: dict):
    """The Case of bench.compile for one config in bfloat16; of `recompute` one serves every width."""
    constants, options = ahead.split_config(config)
    constants |= {"PRECISION": "ieee"} | ({"EVEN_D": True} if form == "recompute" else {"WIDTH": width})
    variant = f"D={width} {'hold' if config['HOLD'] else 'stream'}" if form == "online" else "any D"
    return ahead.Case(
        f"{form}_kernel",
        arch,
        "bfloat16",
        variant,
        TYPES,
        constants,
        options,
        True,
        module="bench.fused_kernels",
    )


def measure(form: str, arch: str, width: int, config: dict) -> dict:
    """One row of the results: resources as bench.compile reports them, and what the config means."""
    case = fused_case(form, arch, width, config)
    row = ahead.compile_case(case)
    ptx = ahead.build(case).asm["ptx"]  # from Triton's cache
    kept = ("registers", "spills", "stack", "shared", "shared_limit", "occupancy")
    return {
        "form": form,
        "arch": arch,
        "width": width if form == "online" else None,
        **config,
        **{key: row[key] for key in kept},
        "instruction": "wgmma" if "wgmma.mma_async" in ptx else "mma",
        "flops_per_l2_byte": round(flops_per_byte(form, config), 1),
        "useful_share": round(useful_share(width, config), 3) if form == "online" else 1.0,
        "fits": row["ok"],
    }


def best(rows: list[dict]) -> dict:
    """The row to argue with: it fits, reads least from L2, pads least, holds most warps; if none fits, the
    fewest bytes of spills among those within the shared memory."""

    def rank(row):
        within = row["shared"] <= row["shared_limit"]
        reads = row["flops_per_l2_byte"]
        if row["fits"]:
            return (2, reads, row["useful_share"], row["occupancy"], row["num_stages"])
        return (int(within), -row["spills"], reads)

    return max(rows, key=rank)


def grouped(rows: list[dict]) -> dict:
    """(form, width, arch) -> its rows, in the order of the rows."""
    groups = {}
    for row in rows:
        groups.setdefault((row["form"], row["width"], row["arch"]), []).append(row)
    return groups


def show(rows: list[dict]) -> None:
    """Prints the best config of every form, hidden size and chip."""
    table = Table(title="Fused forms of loss + gradient, bfloat16: best config of each, and how many fit")
    names = ("form", "D", "chip", "N x V x D, warps, stages", "regs", "spills", "shared", "limit", "occ.")
    for name in (*names, "flops/L2 byte", "useful", "fit"):
        table.add_column(name, justify="left" if name in ("form", "chip", names[3], "fit") else "right")
    for (form, width, arch), group in grouped(rows).items():
        row = best(group)
        tile = " x ".join(str(row[key]) for key in NAMES[:3]) + f", {row['num_warps']}, {row['num_stages']}"
        held = {True: " hold", False: " stream", None: ""}[row.get("HOLD")]
        table.add_row(
            form + held,
            str(width or "any"),
            arch,
            tile,
            *(f"{row[key]:,}" for key in ("registers", "spills", "shared", "shared_limit")),
            f"{row['occupancy']:.0%}",
            f"{row['flops_per_l2_byte']:.0f} {row['instruction']}",
            f"{row['useful_share']:.0%}",
            f"{sum(each['fits'] for each in group)} of {len(group)}" if row["fits"] else "[red]none[/]",
        )
    Console(width=130).print(table)


def fused_cases(arch: str) -> list:
    """Cases of bench.compile for one chip: large tiles of `recompute`, the best `online` per hidden size."""
    recompute = [
        config
        for config in RECOMPUTE
        if config["num_warps"] == 8 and config["BLOCK_N"] * config["BLOCK_V"] >= 1 << 14
    ]
    chosen = CHOSEN_SMALL if ahead.SHARED_LIMIT[arch] < 128 * 1024 else CHOSEN
    found = [fused_case("recompute", arch, 0, config) for config in recompute]
    for width, values in chosen.items():
        found.append(fused_case("online", arch, width, dict(zip(("HOLD", *NAMES), values))))
    return found


def main() -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.fused_forms: unset TRITON_INTERPRET, the interpreter replaces the compiler")
        return 2
    wanted = [
        (form, arch, width, config)
        for arch in ARCHS
        for form, widths in (("recompute", WIDTHS[:1]), ("online", WIDTHS))
        for width in widths
        for config in candidates(form, width)
    ]
    rows = []
    for done, each in enumerate(wanted):
        print(f"\r{done} of {len(wanted)}", end="", file=sys.stderr, flush=True)
        rows.append(measure(*each))
    print("\r", end="", file=sys.stderr)
    show(rows)
    ahead.write_rows("fused-forms.json", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
