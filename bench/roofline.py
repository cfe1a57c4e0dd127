"""How long a linear head's loss must take on each card, by counted work: ours, peers, forms not built.

    python -m bench.roofline                                # every card and model head, 4096 tokens, bf16
    python -m bench.roofline --cards "RTX 3090" --shapes Qwen2.5-7B 4096x151936 --tokens 16384

Needs no GPU. bench/cards.py has each card's figures and their sources, bench/work.py counts the passes,
bench/side_kernels.py the policy loss and NF4. Writes roofline.json and roofline.png to bench/results, or to
the folder named by --out. Times are bounds: columns of the table are loss+gradient up to "loss", forward
after "fwd"; "32 MiB" and "no split" are ours with that workspace and without split-K, as multiples of ours;
"loss" is the policy loss's share. What the numbers decided, for a frozen head in 16 bit:

Rows of a chunk: 10 times the multiprocessors, rounded up to 256, within 512 MiB of workspace (`rule_rows`).
  A chunk reads all of the weight twice, so its rows must exceed the ridge (flops per byte of memory: 71 on an
  RTX 3060, 164 on a 4090, 403 on an L4) several times over before that is hidden; its (C, D) product must
  fill the processors; and some 60 small launches are paid. All three grow with the size of the chip. The
  modelled time is within 5% of the best chunk under 512 MiB on every card and head here (5.2% for Llama-3 on
  an L4); any factor from 9 to 13 does that. A workspace small enough for L2 has 4 to 270 rows at these
  vocabularies, and then the weight's traffic costs what the workspace's saves: it never wins by 3%. The
  32 MiB that suit a CPU are 65 to 130 rows: 1.01 to 4.5 times slower, 1.3 to 2.4 times on a 4090.
Tile of the forward kernel: the smallest that reads from L2 at no more than 80% of its rate (`choose_tile`).
Workspace or fused: the workspace. A kernel that keeps dX on chip needs (rows, D) fp32 accumulators; the
  register file is 64k x 4 B, of which a quarter goes to logits and operands, so 16 rows, one tensor-core
  instruction, fit up to D = 3072. For 7B models and larger there is no fused form; at D = 2304 it has 16 rows
  and is bound by L2, 1.3 to 2.5 times slower. At D = 896 and 1536 it saves the passes over the workspace, and
  its ratio to ours in the table is the share of the library's matrix rate that it must reach to win: 0.77 and
  0.85 on a 4090, 0.89 and 0.93 on a 3090, 0.57 and 0.66 on an L4. An attention kernel of that shape, head
  sizes 896 and 1024, is published at 0.76 and 0.56 of a 4090's peak (github.com/DefTruth/
  faster-prefill-attention, release 0.0.1): a draw at best, for two small heads, without entropy, which needs
  a second accumulator. Only an L4 or an H100 with such a head would gain. "inlined" keeps the workspace
  without the passes over it: 16% faster on a 4090 at D = 896, 9% at 1536, nothing from 2304 on, slower on an
  A100 or H100, whose fp32 units are few for the exponentials that it takes again.
Recomputing the logits (the third product): slower than ours everywhere but at D <= 1536 on an L4.
Peers: Liger's chunk is 32 rows at D = 896 (4 times slower than ours on a 4090) and 128 at D = 3584, there as
  good as ours on four cards. cut-cross-entropy with its filter does nearly two products too, and is ahead of
  us at D = 896: by 14% on a 4090, 36% on an L4; what it drops is gradient, and it adds up in 16 bit in no
  fixed order. Without the filter it is behind everywhere but on an L4 at D = 896.
Policy loss: left to torch, 39 launches, 0.1 to 1.6% of a chunk on GeForce cards, 6% at most (H200, D = 896).
NF4: nothing to write. At 2048 tokens and more a fused product gains 11% at most and loses on an A100; for
  decoding (64 tokens) it is 2 to 7 times faster, and bitsandbytes 0.50 has that kernel.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from .cards import CARDS, KIB, MIB, REGISTER_BYTES, SHAPES, Card, Head, card_named, nearest_names
from .side_kernels import POLICY_LAUNCHES, nf4, policy_share
from .work import (
    FILTER_KEPT,
    Method,
    chunk_passes,
    cut_cross_entropy,
    eager,
    floor_seconds,
    fused,
    inlined,
    liger,
    ours,
    ours_forward,
)

__all__ = ["CARDS", "SHAPES", "Card", "Head", "card_named", "choose_chunk", "choose_tile", "rule_rows"]

RESULTS = Path(__file__).parent / "results"
WORKSPACE_CAP = 512 * MIB
CPU_WORKSPACE = 32 * MIB  # kernels.common.WORKSPACE_BYTES as tuned on a CPU
ROWS_PER_PROCESSOR = 10
FORWARD_TILES = ((64, 64), (128, 64), (128, 128), (128, 256), (256, 128))  # rows x vocabulary, small to large
DECODE_TOKENS = (64, 512, 2048, 4096)


def chunk_seconds(card: Card, head: Head, rows: int) -> float:
    """Modelled seconds of loss and gradient per row, in chunks of `rows`."""
    return sum(each.seconds(card) for each in chunk_passes(card, head, rows, POLICY_LAUNCHES)) / rows


def choose_chunk(card: Card, head: Head, itemsize: int = 2, cap_bytes: int = WORKSPACE_CAP) -> int:
    """Smallest number of rows, a multiple of 128 up to 8192, whose modelled time per row is within 3% of the
    best of those whose workspace of rows x V x itemsize stays within cap_bytes; 128 where none does. The time
    is of 16-bit operands."""
    most = max(128, min(8192, cap_bytes // (head.v * itemsize) // 128 * 128))
    times = {rows: chunk_seconds(card, head, rows) for rows in range(128, most + 1, 128)}
    best = min(times.values())
    return next(rows for rows, seconds in times.items() if seconds <= 1.03 * best)


def rule_rows(processors: int, vocab: int, itemsize: int = 2, cap_bytes: int = WORKSPACE_CAP) -> int:
    """The closed rule of this file's head: rows of a chunk from the multiprocessor count and the vocabulary.
    (ROCm counts an RX 7900 XTX as 48 pairs of units instead of 96; the rule holds there too.)"""
    wanted = math.ceil(ROWS_PER_PROCESSOR * processors / 256) * 256
    return min(wanted, max(256, cap_bytes // (vocab * itemsize) // 256 * 256))


def choose_tile(card: Card, dtype: str) -> tuple[int, int]:
    """(BLOCK_N, BLOCK_V) of the forward kernel, dtype "bf16", "fp16" or "fp32" (fp32 runs outside the tensor
    cores).

    The smallest tile that reads operands from L2 at no more than 80% of its rate while the product runs at
    its peak, else the largest that fits: accumulators within half the register file, two stages of 64 columns
    (fp32: 16) within a block's shared memory.
    """
    itemsize, depth = (4, 16) if dtype == "fp32" else (2, 64)
    peak = card.fp32_flops if dtype == "fp32" else card.tensor_flops
    fitting = [
        (rows, columns)
        for rows, columns in FORWARD_TILES
        if 4 * rows * columns <= REGISTER_BYTES / 2
        and 2 * (rows + columns) * depth * itemsize <= card.block_shared_bytes
    ]
    for rows, columns in fitting:
        flops_per_byte = 2 * rows * columns / ((rows + columns) * itemsize)
        if flops_per_byte * 0.8 * card.l2_bandwidth >= peak:
            return rows, columns
    return fitting[-1]


def methods(card: Card, head: Head, tokens: int, gradient: bool) -> list[Method]:
    """Every method that has this phase, ours first; forms that do not fit the chip are left out."""
    if not gradient:
        own = ours_forward(card, head, tokens, choose_tile(card, "bf16"))
        return [own, *(each(card, head, tokens, False) for each in (eager, liger, cut_cross_entropy))]
    rows = rule_rows(card.processors, head.v)
    found = [
        ours(card, head, tokens, rows, POLICY_LAUNCHES),
        eager(card, head, tokens, True),
        liger(card, head, tokens, True),
        cut_cross_entropy(card, head, tokens, True),
        cut_cross_entropy(card, head, tokens, True, FILTER_KEPT),
        inlined(card, head, tokens, rows, POLICY_LAUNCHES),
        fused(card, head, tokens, online=True),
        fused(card, head, tokens, online=False),
    ]
    return [each for each in found if each is not None]


def row_of(card: Card, head: Head, tokens: int) -> dict:
    """All numbers of one card and head; times in ms, memory in MB."""
    row = {"card": card.name, "head": head.name, "d": head.d, "v": head.v, "tokens": tokens}
    rows = rule_rows(card.processors, head.v)
    row["rows"], row["least rows within 3%"] = rows, choose_chunk(card, head)
    for phase, gemms in (("forward", 1), ("loss+gradient", 2)):
        found = methods(card, head, tokens, gemms == 2)
        row[phase] = {
            "floor": round(floor_seconds(card, head, tokens, gemms) * 1e3, 3),
            "ms": {each.name: round(each.seconds(card) * 1e3, 3) for each in found},
            "extra MB": {each.name: round(each.extra_bytes / 1e6, 1) for each in found},
        }
    own = row["loss+gradient"]["ms"]["ours"] / 1e3
    small = ours(card, head, tokens, max(1, CPU_WORKSPACE // (2 * head.v)), POLICY_LAUNCHES)
    whole = ours(card, head, tokens, rows, POLICY_LAUNCHES, split_k=False)
    row["32 MiB workspace"] = round(small.seconds(card) / own, 2)
    row["no split-K"] = round(whole.seconds(card) / own, 2)
    row["policy loss share"] = round(policy_share(card, head, rows).share, 4)
    return row


def ratio(value: float | None, own: float) -> str:
    return "-" if value is None else f"{value / own:.2f}x"


def show(rows: list[dict], cards: list[Card]) -> None:
    """Print a table per card, then NF4's."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=172)
    peers = ("eager", "Liger", "CCE", "CCE filtered", "inlined", "fused online", "fused recompute")
    for card in cards:
        tile = "x".join(map(str, choose_tile(card, "bf16")))
        title = (
            f"{card.name}: {card.tensor_flops / 1e12:.0f} TFLOP/s, {card.bandwidth / 1e9:.0f} GB/s, ridge "
            f"{card.ridge:.0f}, L2 {card.l2_bytes / MIB:.0f} MiB, block "
            f"{card.block_shared_bytes // KIB} KiB; "
            f"forward tile {tile}; ms for {rows[0]['tokens']} tokens, others as multiples of ours"
        )
        table = Table(title=title, title_justify="left")
        table.add_column("head", no_wrap=True)
        for name in (
            "floor",
            "ours",
            *peers,
            "rows",
            "32 MiB",
            "no split",
            "loss",
            "fwd",
            "eager",
            "Liger",
            "CCE",
        ):
            table.add_column(name, justify="right")
        for row in (each for each in rows if each["card"] == card.name):
            both, first = row["loss+gradient"]["ms"], row["forward"]["ms"]
            table.add_row(
                *(row["head"], f"{row['loss+gradient']['floor']:.1f}", f"{both['ours']:.1f}"),
                *(ratio(both.get(name), both["ours"]) for name in peers),
                *(f"{row['rows']}", f"{row['32 MiB workspace']:.2f}x", f"{row['no split-K']:.2f}x"),
                *(f"{row['policy loss share']:.1%}", f"{first['ours']:.1f}"),
                *(ratio(first[name], first["ours"]) for name in ("eager", "Liger", "CCE")),
            )
        console.print(table)
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
    notes = {"CCE filtered": "CCE filtered (drops gradient)", "fused online": "fused online (not built)"}
    heads = heads if len(heads) <= 3 else [heads[0], heads[len(heads) // 2], heads[-1]]
    names = ("ours", "eager", "Liger", "CCE", "CCE filtered", "fused online")
    top = 6.0
    figure, axes = plt.subplots(
        len(heads), 1, figsize=(11, 2.6 * len(heads) + 0.8), sharex=True, squeeze=False
    )
    for axis, head in zip(axes[:, 0], heads):
        mine = [row for row in rows if row["head"] == head]
        for place, name in enumerate(names):
            for index, row in enumerate(mine):
                time = row["loss+gradient"]["ms"].get(name)
                left = index + (place - (len(names) - 1) / 2) * 0.13
                height = 0 if time is None else time / row["loss+gradient"]["floor"]
                label = notes.get(name, name) if index == 0 else None
                axis.bar(left, min(height, top), 0.12, color=f"C{place}", label=label)
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
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the json and the plot")
    options = parser.parse_args(words)
    rows = [row_of(card, head, options.tokens) for card in options.cards for head in options.shapes]
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
