"""How long a linear head's loss must take on each card, by counted work: ours, peers, forms not used.

    python -m bench.roofline                       # every card and model head, 4096 tokens, bf16
    python -m bench.roofline --cards "RTX 3090" --shapes Qwen2.5-7B 4096x151936 --workspace-mib 16

Needs no GPU. bench/cards.py has each card's figures and their sources, bench/work.py counts the passes,
bench/other_forms.py those of forms that we do not use, bench/side_kernels.py the policy loss and NF4. Writes
roofline.json and .png to bench/results, or to the folder named by --out. Times are bounds, as multiples of
the products at full rate: loss+gradient up to "loss", which is the policy loss's share, then forward. What
the numbers decide, for a frozen head in 16 bit:

Tile of logits: 2048 rows x 8192 columns, 32 MiB (`BUILT_IN`). Many rows, as the weight is read, and a hundred
  small launches are paid, once per chunk; many columns, as each tile moves 10 bytes for every number of a
  (C, D) sum; no more than L2 holds, or each logit costs 8 bytes of memory traffic. Within 5% of the best tile
  of up to 32 MiB on every card and head but an L4's, which would be 6 to 14% faster with 16 MiB: tile and sum
  are both in L2 then. More workspace is for cards of fast memory or little L2: 256 MiB as 4096 x 32768 gain 4
  to 11% on an A100, 6 to 13% on an H100 or H200, 2 to 3% on a 3060 or 3090, nothing on a 4090 or L4. Twice
  the rows alone ("64 as is", workspace_bytes=) gain 6% at most; 4090 and L4 fall to 0.91 and 0.80 in speed.
Rows workspace, the design before: up to 512 MiB. With them it takes 1.06 to 1.48 times our time on an L4,
  0.98 to 1.19 on a 4090, 0.98 to 1.01 on a 3060 or 3090, 0.93 (D = 5120) to 1.07 (D = 896) on an H100. Held
  to our 32 MiB it takes 1.0 to 5.3 times our time.
Fully fused: no. Our sum over tiles is its online form (attention with keys = values = weight), the products
  left to the library. One kernel needs (rows, D) fp32 accumulators on chip: 16 rows, one tensor-core
  instruction, up to D = 3072, nothing above, so not for a 7B model. At D = 2304 it is bound by L2 and takes
  1.2 to 3.0 times our time. At D = 896 and 1536 its ratio to ours is the share of the library's rate that it
  must reach: 0.91 and 0.94 on a 4090, 0.89 and 0.91 on a 3090, 0.83 and 0.83 on an L4, 0.69 and 0.78 on an
  H100. Published attention kernels of head size 896 and 1024 reach 0.76 and 0.56 of a 4090's peak
  (github.com/DefTruth/faster-prefill-attention, release 0.0.1): only an H100 with a small head could gain.
  Recomputing the logits takes 1.1 to 3.4 times our time. "inlined", products of our own that do the passes
  between them, would be up to 9% faster if they ran at the library's rate.
Peers: Liger takes up to 10 times our time at D = 896 (chunks of 32 rows); at D = 5120 its chunks are full,
  and it takes 0.90 to 0.98 of our time but on an L4 and an H100. cut-cross-entropy takes 1.3 to 2.0 times our
  time; with its filter, which drops gradient, 0.93 (L4) to 1.18 (H200).
Policy loss: left to torch, 39 launches per chunk: 1.3% at most on GeForce cards, 4.3% on an H200 (D = 896).
NF4: nothing to write. At 2048 tokens a fused product gains 11% at most and loses on an A100; for decoding (64
  tokens) it is 2 to 7 times faster, and bitsandbytes 0.50 has that kernel.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

from .cards import CARDS, KIB, MIB, SHAPES, Card, Head, card_named, nearest_names
from .other_forms import fused, inlined, row_workspace, rule_rows
from .side_kernels import POLICY_LAUNCHES, nf4, policy_share
from .work import (
    FILTER_KEPT,
    Method,
    choose_tile,
    cut_cross_entropy,
    eager,
    floor_seconds,
    liger,
    ours,
    ours_forward,
    share_floor,
)

__all__ = ["CARDS", "SHAPES", "best_tile", "card_named", "choose_tile", "share_of_roofline"]

RESULTS = Path(__file__).parent / "results"
ROWS, COLUMNS = (512, 1024, 2048, 4096, 8192), (2048, 4096, 8192, 16_384, 32_768)
BUILT_IN = (2048, 8192)  # of kernels.common.tile_shape, 16-bit logits on a GPU
WORKSPACE = 32 * MIB  # kernels.common.WORKSPACE_BYTES on a GPU
LARGER = tuple(size * MIB for size in (64, 128, 256))
DECODE_TOKENS = (64, 512, 2048, 4096)


class TileChoice(NamedTuple):
    """The fastest tile of logits within a workspace."""

    rows: int
    columns: int
    seconds: float


def best_tile(card: Card, head: Head, tokens: int, cap_bytes: int = WORKSPACE) -> TileChoice:
    """The fastest of ROWS x COLUMNS whose 16-bit logits stay within cap_bytes; the smallest if none does."""
    shapes = [(r, c) for r in ROWS for c in COLUMNS if 2 * r * c <= cap_bytes] or [(ROWS[0], COLUMNS[0])]
    times = [ours(card, head, tokens, *each, POLICY_LAUNCHES).seconds(card) for each in shapes]
    found = [TileChoice(*each, seconds) for each, seconds in zip(shapes, times)]
    return min(found, key=lambda each: each.seconds)


def share_of_roofline(
    card: Card, head_d: int, head_v: int, tokens: int, dtype_name: str, gradient: bool, seconds: float
) -> float:
    """Time that no exact method can beat over the time measured: 1.0 at the roof. The roof is one product of
    2 N V D flops (two with the gradient) at the peak of dtype_name ("fp32" outside the tensor cores, "bf16",
    "fp16"), or weight and hidden read once and the gradient written once, whichever takes longer."""
    return share_floor(card, head_d, head_v, tokens, dtype_name, gradient) / seconds


def methods(card: Card, head: Head, tokens: int, gradient: bool) -> list[Method]:
    """Every method that has this phase, ours first; forms that do not fit the chip are left out."""
    if not gradient:
        own = ours_forward(card, head, tokens, choose_tile(card, "bf16"))
        return [own, *(each(card, head, tokens, False) for each in (eager, liger, cut_cross_entropy))]
    found = [
        ours(card, head, tokens, *BUILT_IN, POLICY_LAUNCHES),
        row_workspace(card, head, tokens, rule_rows(card.processors, head.v), POLICY_LAUNCHES),
        eager(card, head, tokens, True),
        liger(card, head, tokens, True),
        cut_cross_entropy(card, head, tokens, True),
        cut_cross_entropy(card, head, tokens, True, FILTER_KEPT),
        inlined(card, head, tokens, *BUILT_IN, POLICY_LAUNCHES),
        fused(card, head, tokens, online=True),
        fused(card, head, tokens, online=False),
    ]
    return [each for each in found if each is not None]


def row_of(card: Card, head: Head, tokens: int, workspace: int = WORKSPACE) -> dict:
    """All numbers of one card and head; times in ms, memory in MB; "tiles": the best (rows, columns) of each
    workspace in MiB, and the time of the built-in tile over its time."""
    row = {"card": card.name, "head": head.name, "d": head.d, "v": head.v, "tokens": tokens}
    for phase, gemms in (("forward", 1), ("loss+gradient", 2)):
        found = methods(card, head, tokens, gemms == 2)
        row[phase] = {
            "floor": round(floor_seconds(card, head, tokens, gemms) * 1e3, 3),
            "ms": {each.name: round(each.seconds(card) * 1e3, 3) for each in found},
            "extra MB": {each.name: round(each.extra_bytes / 1e6, 1) for each in found},
        }
    own = ours(card, head, tokens, *BUILT_IN, POLICY_LAUNCHES).seconds(card)
    row["tiles"] = {}
    for cap_bytes in (workspace, *(size for size in LARGER if size > workspace)):
        best = best_tile(card, head, tokens, cap_bytes)
        speedup = round(own / best.seconds, 3)
        row["tiles"][f"{cap_bytes // MIB}"] = {"rows": best.rows, "columns": best.columns, "speedup": speedup}
    taller = ours(card, head, tokens, 2 * BUILT_IN[0], BUILT_IN[1], POLICY_LAUNCHES).seconds(card)
    speedup = round(own / taller, 3)  # what workspace_bytes=64 MiB does: more rows, the columns are fixed
    row["tiles"]["64 as is"] = {"rows": 2 * BUILT_IN[0], "columns": BUILT_IN[1], "speedup": speedup}
    small = row_workspace(card, head, tokens, max(1, WORKSPACE // (2 * head.v)), POLICY_LAUNCHES)
    row["rows workspace in 32 MiB"] = round(small.seconds(card) * 1e3, 3)
    row["policy loss share"] = round(policy_share(card, head, *BUILT_IN).share, 4)
    row["host bound"] = policy_share(card, head, *BUILT_IN).host_bound
    return row


def show_times(rows: list[dict], card: Card, console) -> None:
    """Every method's time as a multiple of the floor."""
    from rich.table import Table

    methods = "ours|rows workspace|eager|Liger|CCE|CCE filtered|inlined|fused online|fused recompute".split(
        "|"
    )
    tile = "x".join(map(str, choose_tile(card, "bf16")))
    title = (
        f"{card.name}: {card.tensor_flops / 1e12:.0f} TFLOP/s, {card.bandwidth / 1e9:.0f} GB/s, ridge "
        f"{card.ridge:.0f}, L2 {card.l2_bytes / MIB:.0f} MiB, block {card.block_shared_bytes // KIB} KiB; "
        f"forward tile {tile}; {rows[0]['tokens']} tokens, times as multiples of the floor"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("head", no_wrap=True)
    for name in ("floor ms", *methods, "rows in 32 MiB", "loss", "fwd", "eager", "Liger", "CCE"):
        table.add_column(name, justify="right")
    for row in (each for each in rows if each["card"] == card.name):
        both, first = row["loss+gradient"], row["forward"]
        times, floor = both["ms"], both["floor"]
        table.add_row(
            *(row["head"], f"{floor:.1f}"),
            *(f"{times[name] / floor:.2f}" if name in times else "-" for name in methods),
            *(f"{row['rows workspace in 32 MiB'] / floor:.2f}", f"{row['policy loss share']:.1%}"),
            *(f"{first['ms'][name] / first['floor']:.2f}" for name in ("ours", "eager", "Liger", "CCE")),
        )
    console.print(table)


def show_tiles(rows: list[dict], console) -> None:
    """What each workspace would buy over the built-in tile, per card and head."""
    from rich.table import Table

    sizes, heads = list(rows[0]["tiles"]), list(dict.fromkeys(row["head"] for row in rows))
    built_in = "x".join(map(str, BUILT_IN))
    title = f"loss+gradient: best tile (rows x columns) of a workspace; times faster than {built_in}"
    table = Table(title=title, title_justify="left")
    table.add_column("card", no_wrap=True)
    table.add_column("MiB", justify="right")
    for name in heads:
        table.add_column(name, justify="right")
    for card in dict.fromkeys(row["card"] for row in rows):
        for size in sizes:
            cells = [row["tiles"][size] for row in rows if row["card"] == card]
            texts = (f"{each['rows']}x{each['columns']} {each['speedup']:.3f}" for each in cells)
            table.add_row(card if size == sizes[0] else "", size, *texts)
    console.print(table)


def show(rows: list[dict], cards: list[Card]) -> None:
    """Print a table per card, the tiles, then NF4's."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=172)
    for card in cards:
        show_times(rows, card, console)
    show_tiles(rows, console)
    table = Table(
        title="NF4 product that dequantises its tiles, against dequantise + product (write it at 1.2x)"
    )
    table.add_column("card")
    for tokens in DECODE_TOKENS:
        table.add_column(f"{tokens} tokens", justify="right")
    for card in cards:
        table.add_row(card.name, *(f"{nf4(card, tokens).speedup:.2f}x" for tokens in DECODE_TOKENS))
    console.print(table)


def plot(rows: list[dict], path: Path) -> None:
    """Bars of loss+gradient time over the two-product floor, a panel per head (three at most)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heads = list(dict.fromkeys(row["head"] for row in rows))
    notes = {"CCE filtered": "CCE filtered (drops gradient)", "fused online": "fused online (not used)"}
    notes["rows workspace"] = "rows workspace (replaced)"
    heads = heads if len(heads) <= 3 else [heads[0], heads[len(heads) // 2], heads[-1]]
    names = ("ours", "rows workspace", "eager", "Liger", "CCE", "CCE filtered", "fused online")
    top = 6.0
    figure, axes = plt.subplots(
        len(heads), 1, figsize=(11, 2.6 * len(heads) + 0.8), sharex=True, squeeze=False
    )
    for axis, head in zip(axes[:, 0], heads):
        mine = [row for row in rows if row["head"] == head]
        for place, name in enumerate(names):
            for index, row in enumerate(mine):
                time = row["loss+gradient"]["ms"].get(name)
                left = index + (place - (len(names) - 1) / 2) * 0.115
                height = 0 if time is None else time / row["loss+gradient"]["floor"]
                label = notes.get(name, name) if index == 0 else None
                axis.bar(left, min(height, top), 0.105, color=f"C{place}", label=label)
                if height > top:  # cut off; the number says how far
                    axis.text(
                        left, top - 0.1, f"{height:.0f}", ha="center", va="top", fontsize=6.5, color="white"
                    )
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylim(0, min(top, max(1.5, 1.05 * axis.dataLim.ymax)))
        axis.set_ylabel("time / floor")
        axis.set_title(f"{head} (D {mine[0]['d']}, V {mine[0]['v']:,})", fontsize=9, loc="left")
        axis.set_xticks(range(len(mine)), [row["card"].replace(" SXM", "\nSXM") for row in mine], fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, ncol=len(names), fontsize=8, loc="upper center", frameon=False)
    figure.supxlabel(
        f"loss + gradient of {rows[0]['tokens']} tokens, bf16, frozen head: bound by counted work over "
        "the time of two matrix products at full rate;\n"
        "bars cut at 6 carry their value; no bar: does not fit the chip",
        fontsize=8,
    )
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_card(text: str) -> Card:
    card = card_named(text)
    if card is None:
        raise argparse.ArgumentTypeError(f"no card {text!r}; nearest: {', '.join(nearest_names(text))}")
    return card


def parse_head(text: str) -> Head:
    for head in SHAPES:
        if head.name.lower() == text.lower():
            return head
    try:
        d, v = map(int, text.split("x"))
        if d < 1 or v < 1:
            raise ValueError
    except ValueError:
        known = ", ".join(head.name for head in SHAPES)
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected hidden x vocabulary, like 4096x128256, or {known}"
        ) from None
    return Head(text, d, v)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.roofline", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--cards",
        nargs="+",
        type=parse_card,
        default=list(CARDS),
        metavar="NAME",
        help="of: " + ", ".join(each.name for each in CARDS),
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=parse_head,
        default=list(SHAPES),
        metavar="MODEL|DxV",
        help="of: " + ", ".join(each.name for each in SHAPES),
    )
    parser.add_argument("--tokens", type=positive, default=4096, help="rows whose loss is asked for")
    parser.add_argument(
        "--workspace-mib",
        type=positive,
        default=WORKSPACE // MIB,
        help="what the best tile's logits may take",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the json and the plot")
    options = parser.parse_args(words)
    workspace = options.workspace_mib * MIB
    rows = [
        row_of(card, head, options.tokens, workspace) for card in options.cards for head in options.shapes
    ]
    products = [
        {"card": c.name, "tokens": t, **nf4(c, t)._asdict()} for c in options.cards for t in DECODE_TOKENS
    ]
    show(rows, options.cards)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "roofline.json"
    lines = [json.dumps(row) for row in [*rows, *products]]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    plot(rows, path.with_suffix(".png"))
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path} and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
