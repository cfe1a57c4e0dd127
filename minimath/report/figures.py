"""The figures of a report: SVG in the colour of the page's text, PNG on white."""
import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from minimath.core.stats import wilson

INK = "#101418"  # of text and axes; the page's own colour takes its place in the SVG
COLOURS = ["#6b7280", "#2f7de1", "#e0533d", "#d98a00", "#8b5cf6", "#10a37f"]
STYLE = {"font.size": 10, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
         "axes.titlesize": 9, "axes.titlelocation": "left", "legend.fontsize": 8, "legend.frameon": False,
         "text.parse_math": False,  # the names of folders may hold dollar signs
         **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color",
                          "grid.color"), INK)}

# of the judge's canary pairs: prefix of the metrics, colour, legend
CANARIES = [("canary/", COLOURS[3], "judged wins of worse solutions, fixed pairs, down is good"),
            ("canary/rollout_", COLOURS[2], "judged wins of wrong over correct completions, down is good")]
GAP_SHOWN = 0.1  # by which the wins of wrong completions must rise, less is noise of few pairs
CORRECT_RISEN = 0.05  # by which the share of correct completions rises when it does


@rc_context(STYLE)
def new_figure(width: float = 7.2, height: float = 3.6, **grid):
    """Make a figure and its axes in plain style, without pyplot's global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**grid)


def svg(figure: Figure, name: str) -> str:
    """Turn a figure into an <svg> whose ids begin with `name`; text stays text, ink is currentColor."""
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True,
                       metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg"):].replace(INK, "currentColor").replace("<svg ", '<svg role="img" ', 1)
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)


def save_png(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150, facecolor="white")


@rc_context(STYLE)
def tradeoff(rows: dict[str, dict]) -> Figure:
    """Draw accuracy against mean tokens, one point per evaluation: name -> summary."""
    figure, axis = new_figure(height=3.8)
    points = [(summary["mean_tokens"], 100 * summary["accuracy"]) for summary in rows.values()]
    for i, ((x, y), (name, summary)) in enumerate(zip(points, rows.items())):
        low, high = (100 * end for end in summary["interval"])
        axis.errorbar(x, y, yerr=[[max(0, y - low)], [max(0, high - y)]], fmt="o", ms=8, capsize=4,
                      color=COLOURS[i % len(COLOURS)], label=f"{name}: {y:.1f}%, {x:.0f} tokens")
    for start, end in zip(points[:3], points[1:3]):
        axis.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": COLOURS[0], "lw": 1.3,
                                                            "shrinkA": 9, "shrinkB": 9})
    axis.set(xlabel="mean tokens per solution (fewer is better)", ylabel="accuracy, % (bars: 95% interval)",
             xlim=(0, 1.12 * max(x for x, _ in points) or 1), ylim=(0, 100))
    axis.legend()
    return figure


@rc_context(STYLE)
def lengths(completions: dict[str, list[dict]]) -> Figure:
    """Draw histograms of completion lengths, correct ones filled: name -> records."""
    figure, axes = new_figure(height=0.9 + 1.15 * len(completions), nrows=len(completions), sharex=True, squeeze=False)
    bins = np.linspace(0, max(1, *(r["tokens"] for records in completions.values() for r in records)), 41)
    for i, (axis, (name, records)) in enumerate(zip(axes[:, 0], completions.items())):
        colour = COLOURS[i % len(COLOURS)]
        axis.hist([r["tokens"] for r in records], bins, color=colour, alpha=0.3, label="all")
        axis.hist([r["tokens"] for r in records if r["correct"]], bins, color=colour, label="correct")
        axis.set(title=name, ylabel="solutions")
    axes[0, 0].legend()
    axes[-1, 0].set_xlabel("tokens")
    return figure


@rc_context(STYLE)
def curves(metrics: list[dict], panels: dict[str, list[str]]) -> Figure:
    """Draw metrics over steps: label of a panel's axis -> names of its metrics."""
    figure, axes = new_figure(height=0.8 + 1.5 * len(panels), nrows=len(panels), sharex=True, squeeze=False)
    for axis, (label, names) in zip(axes[:, 0], panels.items()):
        for name, colour in zip(names, COLOURS[1:]):
            points = series(metrics, name)
            draw_curve(axis, points, colour, name, half=len(points) // 40)
        axis.set_ylabel(label)
        axis.legend()
    axes[-1, 0].set_xlabel("step")
    return figure


def draw_curve(axis, points: list[tuple], colour: str, label: str, half: int = 2) -> list[tuple]:
    """Draw points and their running mean over `half` on each side; returns its points."""
    steps, values = [x for x, _ in points], [y for _, y in points]
    mean = [np.mean(values[max(0, i - half):i + half + 1]) for i in range(len(values))]
    if points:
        axis.plot(steps, values, ".", color=colour, ms=5, alpha=0.4, mew=0)
        axis.plot(steps, mean, color=colour, lw=1.8, label=label)
    return list(zip(steps, mean))


@rc_context(STYLE)
def judged(rows: list[dict]) -> Figure | None:
    """Draw judged wins of worse solutions, length, reward; None: no pair was judged."""
    if not any(series(rows, f"{prefix}worse_wins") for prefix, *_ in CANARIES):
        return None
    figure, (top, bottom) = new_figure(7.2, 6.2, nrows=2, sharex=True, height_ratios=[3, 2])
    draw_gap(top, rows)
    top.legend(loc="lower left", bbox_to_anchor=(0, 1.01), borderaxespad=0)
    other = bottom.twinx()
    other.grid(False)
    draw_curve(bottom, series(rows, "rollout/tokens"), INK, "tokens per completion")
    draw_curve(other, series(rows, "reward/mean"), COLOURS[4], "reward")
    bottom.set(xlabel="step", ylabel="mean tokens per completion")
    bottom.set_ylim(bottom=0)
    other.set_ylabel("mean reward per completion", color=COLOURS[4])
    other.tick_params(axis="y", colors=COLOURS[4])
    return figure


def draw_gap(axis, rows: list[dict]) -> None:
    """Draw the upper axis, with Wilson's intervals of one standard error as bars."""
    correct = draw_curve(axis, series(rows, "rollout/correct"), COLOURS[1], "correct completions, up is good")
    for prefix, colour, label in CANARIES:
        wins, pairs = series(rows, f"{prefix}worse_wins"), dict(series(rows, f"{prefix}pairs"))
        for x, y in wins:
            axis.vlines(x, *wilson(y * pairs[x], pairs[x], z=1.0), color=colour, lw=1, alpha=0.35)
        mean = draw_curve(axis, wins, colour, label, half=1)
    if correct and len(mean) > 1:  # of the rollout's pairs
        first, before = np.transpose(wins[:3])
        before, correct_before = before.mean(), np.interp(first, *zip(*correct)).mean()
        steps = np.linspace(wins[0][0], wins[-1][0], 500)
        now, correct_now = np.interp(steps, *zip(*mean)), np.interp(steps, *zip(*correct))
        gap = (now > before + GAP_SHOWN) & (correct_now <= correct_before + CORRECT_RISEN)
        if gap.any():
            axis.fill_between(steps, before, now, where=gap, color=COLOURS[2], alpha=0.18, lw=0,
                              label="gap: judge fooled more than at first, no more are correct")
    axis.axhline(0.5, color=COLOURS[0], lw=1, ls="--", label="chance: the judge cannot tell worse from better")
    axis.set(ylim=(-0.03, 1.03), ylabel="share of completions or wins")
    axis.yaxis.set_major_formatter(PercentFormatter(1))


def read_metrics(path: Path) -> list[dict]:
    """Read a metrics.jsonl; what a kill left of a line is skipped. Raises OSError."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # other line ends may be text
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def series(rows: list[dict], name: str) -> list[tuple]:
    """Collect the numbers of one name as points of step and value, by step."""
    return sorted({row["step"]: row[name] for row in rows if isinstance(row.get(name), (int, float))}.items())
