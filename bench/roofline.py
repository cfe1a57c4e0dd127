"""How long a linear head's loss must take on each card, by counted work: ours and peers.

    python -m bench.roofline                       # every card and model head, 4096 tokens, bf16
    python -m bench.roofline --cards "RTX 3090" --shapes Qwen2.5-7B 4096x151936 --workspace-mib 16

Needs no GPU. bench/cards.py has each card's figures and their sources, bench/work.py counts the passes. Times are
bounds, as multiples of the products at full rate: loss+gradient, forward, linear_kl (of four products). Writes
roofline.json and .png to bench/results, or to the folder named by --out. What the numbers decided: bench/README.md,
"Counted work".
"""
import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from .cards import CARDS, KIB, MIB, SHAPES, Card, Head, card_named, nearest_names
from .measure import RESULTS, positive, told_path, write_rows
from .work import (
    FILTER_KEPT,
    POLICY_LAUNCHES,
    Method,
    choose_tile,
    cut_cross_entropy,
    divergence,
    eager,
    floor_seconds,
    liger,
    ours,
    ours_forward,
)

ROWS, COLUMNS = (512, 1024, 2048, 4096, 8192), (2048, 4096, 8192, 16_384, 32_768)
BUILT_IN = (2048, 8192)  # of kernels.common.tile_shape, 16-bit logits on a GPU
WORKSPACE = 32 * MIB  # kernels.common.WORKSPACE_BYTES on a GPU
LARGER = tuple(size * MIB for size in (64, 128, 256))
METHODS = ("ours", "eager", "Liger", "CCE", "CCE filtered")


class TileChoice(NamedTuple):
    """The fastest tile of logits within a workspace."""
    rows: int
    columns: int
    seconds: float


def best_tile(card: Card, head: Head, tokens: int, cap_bytes: int = WORKSPACE) -> TileChoice:
    """Find the fastest tile whose 16-bit logits stay within cap_bytes."""
    shapes = [(r, c) for r in ROWS for c in COLUMNS if 2 * r * c <= cap_bytes] or [(ROWS[0], COLUMNS[0])]
    found = [TileChoice(*each, ours(card, head, tokens, *each, POLICY_LAUNCHES).seconds(card)) for each in shapes]
    return min(found, key=lambda each: each.seconds)


def methods(card: Card, head: Head, tokens: int, gradient: bool) -> list[Method]:
    """Count every method that has this phase, ours first."""
    peers = [each(card, head, tokens, gradient) for each in (eager, liger, cut_cross_entropy)]
    if not gradient:
        return [ours_forward(card, head, tokens, choose_tile(card, "bf16")), *peers]
    own = ours(card, head, tokens, *BUILT_IN, POLICY_LAUNCHES)
    return [own, *peers, cut_cross_entropy(card, head, tokens, True, FILTER_KEPT)]


def row_of(card: Card, head: Head, tokens: int, workspace: int = WORKSPACE) -> dict:
    """Collect all numbers of one card and head; times in ms, memory in MB.

    "tiles": the best (rows, columns) of each workspace in MiB, and the time of the built-in tile over its time.
    """
    row = {"card": card.name, "head": head.name, "d": head.d, "v": head.v, "tokens": tokens}
    for phase, gemms in (("forward", 1), ("loss+gradient", 2)):
        found = methods(card, head, tokens, gemms == 2)
        row[phase] = {"floor": round(floor_seconds(card, head, tokens, gemms) * 1e3, 3),
                      "ms": {each.name: round(each.seconds(card) * 1e3, 3) for each in found},
                      "extra MB": {each.name: round(each.extra_bytes / 1e6, 1) for each in found}}
    row["reverse KL"] = {"floor": round(floor_seconds(card, head, tokens, 4) * 1e3, 3),
                         "ms": round(divergence(card, head, tokens, *BUILT_IN).seconds(card) * 1e3, 3)}
    own = ours(card, head, tokens, *BUILT_IN, POLICY_LAUNCHES).seconds(card)
    row["tiles"] = {}
    for cap_bytes in (workspace, *(size for size in LARGER if size > workspace)):
        best = best_tile(card, head, tokens, cap_bytes)
        row["tiles"][f"{cap_bytes // MIB}"] = {"rows": best.rows, "columns": best.columns,
                                               "speedup": round(own / best.seconds, 3)}
    taller = ours(card, head, tokens, 2 * BUILT_IN[0], BUILT_IN[1], POLICY_LAUNCHES).seconds(card)
    # what workspace_bytes=64 MiB does: more rows, the columns are fixed
    row["tiles"]["64 as is"] = {"rows": 2 * BUILT_IN[0], "columns": BUILT_IN[1], "speedup": round(own / taller, 3)}
    return row


def show_times(rows: list[dict], card: Card, console) -> None:
    """Print every method's time as a multiple of the floor."""
    from rich.table import Table
    tile = "x".join(map(str, choose_tile(card, "bf16")))
    title = (f"{card.name}: {card.tensor_flops / 1e12:.0f} TFLOP/s, {card.bandwidth / 1e9:.0f} GB/s, ridge "
             f"{card.ridge:.0f}, L2 {card.l2_bytes / MIB:.0f} MiB, block {card.block_shared_bytes // KIB} KiB; "
             f"forward tile {tile}; {rows[0]['tokens']} tokens, times as multiples of the floor")
    table = Table(title=title, title_justify="left")
    table.add_column("head", no_wrap=True)
    for name in ("floor ms", *METHODS, "forward: ours", *METHODS[1:4], "KL: ours"):
        table.add_column(name, justify="right")
    for row in (each for each in rows if each["card"] == card.name):
        both, first = row["loss+gradient"], row["forward"]
        table.add_row(row["head"], f"{both['floor']:.1f}",
                      *(f"{both['ms'][name] / both['floor']:.2f}" for name in METHODS),
                      *(f"{first['ms'][name] / first['floor']:.2f}" for name in METHODS[:4]),
                      f"{row['reverse KL']['ms'] / row['reverse KL']['floor']:.2f}")
    console.print(table)


def show_tiles(rows: list[dict], console) -> None:
    """Print what each workspace would buy over the built-in tile, per card and head."""
    from rich.table import Table
    title = ("loss+gradient: best tile (rows x columns) of a workspace; times faster than "
             + "x".join(map(str, BUILT_IN)))
    table = Table(title=title, title_justify="left")
    table.add_column("card", no_wrap=True)
    for name in ("MiB", *dict.fromkeys(row["head"] for row in rows)):
        table.add_column(name, justify="right")
    sizes = list(rows[0]["tiles"])
    for card in dict.fromkeys(row["card"] for row in rows):
        for size in sizes:
            cells = [row["tiles"][size] for row in rows if row["card"] == card]
            texts = (f"{each['rows']}x{each['columns']} {each['speedup']:.3f}" for each in cells)
            table.add_row(card if size == sizes[0] else "", size, *texts)
    console.print(table)


def show(rows: list[dict], cards: list[Card]) -> None:
    """Print a table per card, then the tiles."""
    from rich.console import Console
    console = Console(width=172)
    for card in cards:
        show_times(rows, card, console)
    show_tiles(rows, console)


def plot(rows: list[dict], path: Path) -> None:
    """Draw loss+gradient time over the two-product floor, three heads at most."""
    from matplotlib.figure import Figure
    heads = list(dict.fromkeys(row["head"] for row in rows))
    heads = heads if len(heads) <= 3 else [heads[0], heads[len(heads) // 2], heads[-1]]
    top = 6.0
    figure = Figure(figsize=(11, 2.6 * len(heads) + 0.8))
    axes = figure.subplots(len(heads), 1, sharex=True, squeeze=False)
    for axis, head in zip(axes[:, 0], heads):
        mine = [row for row in rows if row["head"] == head]
        for place, name in enumerate(METHODS):
            for index, row in enumerate(mine):
                left = index + (place - (len(METHODS) - 1) / 2) * 0.16
                height = row["loss+gradient"]["ms"][name] / row["loss+gradient"]["floor"]
                label = name.replace("filtered", "filtered (drops gradient)") if index == 0 else None
                axis.bar(left, min(height, top), 0.145, color=f"C{place}", label=label)
                if height > top:  # cut off; the number says how far
                    axis.text(left, top - 0.1, f"{height:.0f}", ha="center", va="top", fontsize=6.5, color="white")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylim(0, min(top, max(1.5, 1.05 * axis.dataLim.ymax)))
        axis.set_ylabel("time / floor")
        axis.set_title(f"{head} (D {mine[0]['d']}, V {mine[0]['v']:,})", fontsize=9, loc="left")
        axis.set_xticks(range(len(mine)), [row["card"].replace(" SXM", "\nSXM") for row in mine], fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, ncol=len(METHODS), fontsize=8, loc="upper center", frameon=False)
    figure.supxlabel(f"loss + gradient of {rows[0]['tokens']} tokens, bf16, frozen head: bound by counted work over "
                     "the time of two matrix products at full rate;\nbars cut at 6 carry their value", fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 0.96))
    figure.savefig(path, dpi=110)


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
            f"{text!r}: expected hidden x vocabulary, like 4096x128256, or {known}") from None
    return Head(text, d, v)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description=__doc__.split("\n")[0])
    for name, kind, default, metavar in (("--cards", parse_card, CARDS, "NAME"),
                                         ("--shapes", parse_head, SHAPES, "MODEL|DxV")):
        parser.add_argument(name, nargs="+", type=kind, default=list(default), metavar=metavar,
                            help="of: " + ", ".join(each.name for each in default))
    parser.add_argument("--tokens", type=positive, default=4096, help="rows whose loss is asked for")
    parser.add_argument("--workspace-mib", type=positive, default=WORKSPACE // MIB,
                        help="what the best tile's logits may take")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the json and the plot")
    options = parser.parse_args(words)
    workspace = options.workspace_mib * MIB
    rows = [row_of(card, head, options.tokens, workspace) for card in options.cards for head in options.shapes]
    show(rows, options.cards)
    path = options.out / "roofline.json"
    write_rows(path, rows)
    plot(rows, path.with_suffix(".png"))
    print(f"wrote {told_path(path)} and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
