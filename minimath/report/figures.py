"""The figures of a report: SVG in the colour of the page's text, PNG on white."""
import io
import re
from pathlib import Path

import numpy as np

from minimath.report.metrics import series

INK = "#101418"  # of text and axes; the page's own colour takes its place in the SVG
COLOURS = ["#6b7280", "#2f7de1", "#e0533d", "#d98a00", "#8b5cf6", "#10a37f"]
SMOOTH = 0.05  # share of the steps in a running mean

# arXiv 2507.08267 and its tables by stage: accuracy in %, mean tokens; original, + SFT, + SFT and RL
PAPER = {"MATH-500 (paper, 14B)": [(86.4, 2556), (88.1, 2969), (91.2, 2084)],
         "AIME24 (paper, 14B)": [(63.3, 9590), (65.2, 10268), (66.0, 7932)]}


def new_figure(width: float = 7.2, height: float = 3.6, **grid):
    """Make a figure and its axes in plain style, without pyplot's global state."""
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 10, "axes.grid": True, "grid.alpha": 0.25,
                                "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False,
                                **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color",
                                                 "ytick.color", "grid.color"), INK)}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(**grid)
    return figure, axes


def svg(figure, name: str) -> str:
    """Turn a figure into an <svg> element whose ids begin with `name`.

    Text stays text, and ink is currentColor.
    """
    import matplotlib
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    body = text.getvalue()
    body = body[body.index("<svg"):].replace(INK, "currentColor")
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{re.sub(r'[^a-z0-9]', '', name.lower())}-", body)
    return body.replace("<svg ", '<svg role="img" ', 1)


def save_png(figure, path: Path) -> None:
    figure.savefig(path, dpi=150, facecolor="white")


def legend(axis, **options) -> None:
    axis.legend(**{"fontsize": 8, "frameon": False, "labelcolor": INK, **options})


# ---- evaluations

def tradeoff(rows: dict[str, dict]):
    """Draw accuracy against mean tokens, one point per evaluation.

    rows: name -> summary of an evaluation, with its 95% interval. Up and to the left is better.
    """
    figure, axis = new_figure(height=3.8)
    for i, (name, summary) in enumerate(rows.items()):
        x, y = summary["mean_tokens"], 100 * summary["accuracy"]
        low, high = (100 * v for v in summary["interval"])
        axis.errorbar(x, y, yerr=[[max(0, y - low)], [max(0, high - y)]], fmt="o", ms=8, capsize=4,
                      color=COLOURS[i % len(COLOURS)], label=f"{name}: {y:.1f}%, {x:.0f} tokens")
    points = [(s["mean_tokens"], 100 * s["accuracy"]) for s in rows.values()][:3]
    for start, end in zip(points, points[1:]):
        axis.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "->", "color": COLOURS[0], "lw": 1.3,
                                                            "shrinkA": 9, "shrinkB": 9})
    axis.set(xlabel="mean tokens per solution (fewer is better)", ylabel="accuracy, % (bars: 95% interval)",
             xlim=(0, 1.12 * max(s["mean_tokens"] for s in rows.values()) or 1), ylim=(0, 100))
    legend(axis, loc="best")
    return figure


def beside_paper(rows: dict[str, dict]):
    """Draw the two stages beside the paper's, relative to the model before them."""
    figure, axis = new_figure(height=3.4)
    ours = [(100 * s["accuracy"], s["mean_tokens"]) for s in rows.values()][:3]
    for i, (name, points) in enumerate({"this run": ours, **PAPER}.items()):
        first_accuracy, first_tokens = points[0]
        x = [100 * tokens / max(first_tokens, 1e-9) for _, tokens in points]
        y = [accuracy - first_accuracy for accuracy, _ in points]
        axis.plot(x, y, "o-" if i == 0 else "s--", ms=6 if i == 0 else 4, color=COLOURS[(2, 0, 1)[i]], label=name)
        if i == 0:  # the paper's stand in the same order
            for label, px, py in zip(("before", "SFT", "SFT + RL"), x, y):
                axis.annotate(label, (px, py), textcoords="offset points", xytext=(6, 4), fontsize=8, color=INK)
    axis.axhline(0, lw=0.8, color=INK, alpha=0.4)
    axis.set(xlabel="mean tokens, % of those before (fewer is better)", ylabel="accuracy gained, points")
    legend(axis, loc="best")
    return figure


def lengths(completions: dict[str, list[dict]]):
    """Draw histograms of completion lengths, correct ones filled."""
    figure, axes = new_figure(height=0.9 + 1.15 * len(completions), nrows=len(completions), sharex=True, squeeze=False)
    most = max((r["tokens"] for records in completions.values() for r in records), default=1)
    bins = np.linspace(0, max(most, 1), 41)
    for i, (axis, (name, records)) in enumerate(zip(axes[:, 0], completions.items())):
        every, correct = ([r["tokens"] for r in records if not only or r["correct"]] for only in (False, True))
        axis.hist(every, bins, color=COLOURS[i % len(COLOURS)], alpha=0.3, label="all")
        axis.hist(correct, bins, color=COLOURS[i % len(COLOURS)], label="correct")
        axis.set_title(name, fontsize=9, loc="left", color=INK)
        axis.set_ylabel("solutions")
    legend(axes[0, 0], loc="upper right")
    axes[-1, 0].set_xlabel("tokens")
    return figure


# ---- training

def curves(metrics: list[dict], panels: list[tuple[str, list[str]]]):
    """Draw metrics over steps, faint as logged, bold smoothed.

    panels: (label of the axis, names of its metrics).
    """
    figure, axes = new_figure(height=0.8 + 1.5 * len(panels), nrows=len(panels), sharex=True, squeeze=False)
    for axis, (label, names) in zip(axes[:, 0], panels):
        for i, name in enumerate(names):
            x, y = np.array(series(metrics, name), dtype=float).T
            colour = COLOURS[(i + 1) % len(COLOURS)]
            axis.plot(x, y, lw=0.8, alpha=0.35, color=colour)
            axis.plot(x, smoothed(y, int(len(y) * SMOOTH / 2)), lw=1.8, color=colour, label=name)
        axis.set_ylabel(label)
        if len(names) > 1:
            legend(axis, loc="best")
    axes[-1, 0].set_xlabel("step")
    return figure


def smoothed(values: np.ndarray, half: int) -> np.ndarray:
    """Compute the running mean over a value and `half` on each side, fewer at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    left = np.maximum(np.arange(len(values)) - half, 0)
    right = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[right] - total[left]) / (right - left)
