"""The picture of an RL run and its judge, and the reading of metrics.jsonl."""
import contextlib
import json
import math
from pathlib import Path

from minimath.core.stats import wilson

MEAN_OF = 5  # points of a running mean
MEAN_OF_CANARIES = 3  # they are fewer
GAP_SHOWN = 10.0  # points by which the wins of wrong completions must rise, less is noise of few pairs
RIGHT_RISEN = 5.0  # points by which the share of right completions rises when it does


def write_judge_plot(run_dir, say) -> None:
    """judge.png in the folder of an RL run whose canary pairs were judged. Whatever fails is said, never raised: the
    run is complete without a picture."""
    try:
        rows = read_metrics(Path(run_dir) / "metrics.jsonl")
        if series(rows, "canary_worse_wins") or series(rows, "canary_rollout_worse_wins"):
            plot_judge(rows, Path(run_dir) / "judge.png", Path(run_dir).name)
            say(f"judged against right, step by step: {Path(run_dir) / 'judge.png'}")
    except Exception as error:
        say(f"judge.png could not be drawn, everything else is saved ({type(error).__name__}: {error}); "
            "metrics.jsonl has the numbers")


def plot_judge(metrics, path, title: str) -> None:
    """What a judge is made to believe against what is right, step by step, as a PNG: the canary gap of an RL run.

    metrics: path of a metrics.jsonl or its records; records without a figure are left out. Above: share of right
    completions and the judged win rate of worse solutions (judge_canary.py), with Wilson's interval of one standard
    error; shaded where wrong completions of the rollout win more than in the first canaries and no more are right.
    Below: length and reward. Points are raw, lines running means. White background, dark ink. OSError: not readable or
    not writable.
    """
    from matplotlib.figure import Figure
    from matplotlib.style import context

    rows = metrics if isinstance(metrics, list) else read_metrics(Path(metrics))
    with context("default"):  # a style file of the user's may be white on black
        figure = Figure(figsize=(7.6, 6.4), dpi=150, layout="constrained", facecolor="white")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        draw_gap(top, rows)
        draw_lengths(bottom, rows)
        bottom.set_xlim(0, max([row["step"] for row in rows if isinstance(row.get("step"), int)], default=1) * 1.03)
        figure.suptitle(title, fontsize=11, parse_math=False)  # a folder name may hold dollar signs
        figure.savefig(path)


def draw_gap(axis, rows: list[dict]) -> None:
    """The upper axis of plot_judge, in per cent."""
    right = draw_curve(axis, series(rows, "right", 100), "#2563eb", "right completions, up is good")
    wins = []
    for name, colour, marker, label in (
            ("canary", "#d97706", "^", "judged wins of worse solutions, fixed pairs, down is good"),
            ("canary_rollout", "#dc2626", "o", "judged wins of wrong over right completions, down is good")):
        wins = series(rows, f"{name}_worse_wins", 100)
        pairs = dict(series(rows, f"{name}_pairs"))
        for x, y in wins:
            n = max(1, pairs.get(x, 1))
            axis.vlines(x, *(100 * end for end in wilson(y / 100 * n, n, z=1.0)), color=colour, lw=1, alpha=0.35)
        mean = draw_curve(axis, wins, colour, label, marker, MEAN_OF_CANARIES)
    shade_gap(axis, wins, mean, right)
    axis.axhline(50, color="#6b7280", lw=1, ls="--", label="chance: the judge cannot tell worse from better")
    axis.set_ylim(-3, 103)
    axis.set_ylabel("share of completions or wins, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, ncol=2, loc="lower left", bbox_to_anchor=(0, 1.01), frameon=False, borderaxespad=0)


def shade_gap(axis, wins: list[tuple], mean: list[tuple], right: list[tuple]) -> None:
    """Fill from the win rate of wrong completions in the first canaries to the present one where it has risen and the
    share of right ones has not. wins: its points; mean, right: running means of draw_curve."""
    if len(wins) < 2 or not right:
        return
    from numpy import interp, linspace

    first = wins[:MEAN_OF_CANARIES]
    before = sum(y for _, y in first) / len(first)
    steps = linspace(wins[0][0], wins[-1][0], 500)
    now, right_now = interp(steps, *zip(*mean)), interp(steps, *zip(*right))
    right_before = sum(interp([x for x, _ in first], *zip(*right))) / len(first)
    gap = (now > before + GAP_SHOWN) & (right_now <= right_before + RIGHT_RISEN)
    if gap.any():
        axis.fill_between(steps, before, now, where=gap, color="#dc2626", alpha=0.18, lw=0,
                          label="gap: judge fooled more than at first, no more are right")


def draw_lengths(axis, rows: list[dict]) -> None:
    """The lower axis of plot_judge: mean tokens to the left, mean reward to the right."""
    other = axis.twinx()
    draw_curve(axis, series(rows, "mean_tokens"), "#111827", "tokens per completion")
    draw_curve(other, series(rows, "reward"), "#7c3aed", "reward")
    axis.set_xlabel("step")
    axis.set_ylabel("mean tokens per completion")
    other.set_ylabel("mean reward per completion", color="#7c3aed")
    other.tick_params(axis="y", colors="#7c3aed")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.set_ylim(bottom=0)
    for side, column in ((axis, 0.0), (other, 0.25)):
        if side.lines:
            side.legend(fontsize=7, loc="lower left", bbox_to_anchor=(column, 1.01), frameon=False, borderaxespad=0)


def draw_curve(axis, points: list[tuple], colour: str, label: str, marker=".", width: int = MEAN_OF) -> list[tuple]:
    """Faint points and the line of their running mean over `width` points, fewer at the ends; returns the line."""
    mean = []
    for i, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, i - width // 2):i + width // 2 + 1]]
        mean.append((x, sum(near) / len(near)))
    if points:
        axis.plot(*zip(*points), marker, color=colour, ms=5, alpha=0.4, mew=0)
        lone = marker if len(points) == 1 else None  # one point has no line
        axis.plot(*zip(*mean), color=colour, lw=1.8, marker=lone, ms=5, label=label)
    return mean


def series(rows: list[dict], name: str, scale: float = 1.0) -> list[tuple]:
    """[(step, scale * value)] of the records that have a finite number of that name, in order of their steps."""
    values = {}
    for row in rows:
        value = row.get(name)
        if isinstance(value, (int, float)) and math.isfinite(value) and isinstance(row.get("step"), int):
            values[row["step"]] = scale * value
    return sorted(values.items())


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl. What a kill left of a line is skipped; OSError when there is no such file."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # other line ends may be text
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]
