"""judge.png: what the judge of an RL run is made to believe, step by step."""
from pathlib import Path

import numpy as np

from minimath.core.run_folder import METRICS
from minimath.core.stats import wilson
from minimath.report.figures import INK, legend, new_figure, save_png, smoothed
from minimath.report.metrics import read_metrics, series

JUDGE_PLOT = "judge.png"
MEAN_OF, MEAN_OF_CANARIES = 5, 3  # points of a running mean
GAP_SHOWN = 10.0  # points by which the wins of wrong completions must rise, less is noise of few pairs
CORRECT_RISEN = 5.0  # points by which the share of correct completions rises when it does
ABOVE = {"loc": "lower left", "borderaxespad": 0, "fontsize": 7}  # where the legends are
PURPLE = "#7c3aed"


def write_judge_plot(run_dir, say) -> None:
    """Draw judge.png in the folder of an RL run whose canary pairs were judged.

    What fails is said, never raised: the run is complete without a picture.
    """
    path = Path(run_dir) / JUDGE_PLOT
    try:
        rows = read_metrics(Path(run_dir) / METRICS)
        if series(rows, "canary/worse_wins") or series(rows, "canary/rollout_worse_wins"):
            plot_judge(rows, path, Path(run_dir).name)
            say(f"judged against correct, step by step: {path}")
    except Exception as error:
        say(f"{JUDGE_PLOT} could not be drawn, everything else is saved ({type(error).__name__}: {error}); "
            f"{METRICS} has the numbers")


def plot_judge(rows: list[dict], path: Path, title: str) -> None:
    """Write the picture as a PNG on white.

    rows: records of metrics.jsonl. Above: share of correct completions and the judged win rate of worse solutions, with
    Wilson's interval of one standard error, shaded as by shade_gap. Below: length and reward. Points are raw, lines
    running means. Raises OSError when it can't be written.
    """
    figure, (top, bottom) = new_figure(7.6, 6.4, nrows=2, sharex=True, height_ratios=[3, 2])
    draw_gap(top, rows)
    draw_lengths(bottom, rows)
    bottom.set_xlim(0, max([row["step"] for row in rows if isinstance(row.get("step"), int)], default=1) * 1.03)
    figure.suptitle(title, fontsize=11, color=INK, parse_math=False)  # a folder name may hold dollar signs
    save_png(figure, path)


def draw_gap(axis, rows: list[dict]) -> None:
    """Draw the upper axis, in per cent."""
    correct = draw_curve(axis, series(rows, "rollout/correct", 100), "#2563eb", "correct completions, up is good")
    wins, mean = [], []
    for name, colour, marker, label in (
            ("canary/", "#d97706", "^", "judged wins of worse solutions, fixed pairs, down is good"),
            ("canary/rollout_", "#dc2626", "o", "judged wins of wrong over correct completions, down is good")):
        wins = series(rows, f"{name}worse_wins", 100)
        pairs = dict(series(rows, f"{name}pairs"))
        for x, y in wins:
            n = max(1, pairs.get(x, 1))
            axis.vlines(x, *(100 * end for end in wilson(y / 100 * n, n, z=1.0)), color=colour, lw=1, alpha=0.35)
        mean = draw_curve(axis, wins, colour, label, marker, MEAN_OF_CANARIES)
    shade_gap(axis, wins, mean, correct)
    axis.axhline(50, color="#6b7280", lw=1, ls="--", label="chance: the judge cannot tell worse from better")
    axis.set(ylim=(-3, 103), ylabel="share of completions or wins, %")
    legend(axis, ncol=2, bbox_to_anchor=(0, 1.01), **ABOVE)


def shade_gap(axis, wins: list[tuple], mean: list[tuple], correct: list[tuple]) -> None:
    """Fill up from the first canaries where the judge is fooled more than then.

    That is where the win rate of wrong completions has risen and the share of correct ones has not. wins: points of the
    win rate; mean, correct: running means of draw_curve.
    """
    if len(wins) < 2 or not correct:
        return
    first = wins[:MEAN_OF_CANARIES]
    before = sum(y for _, y in first) / len(first)
    steps = np.linspace(wins[0][0], wins[-1][0], 500)
    now, correct_now = np.interp(steps, *zip(*mean)), np.interp(steps, *zip(*correct))
    correct_before = sum(np.interp([x for x, _ in first], *zip(*correct))) / len(first)
    gap = (now > before + GAP_SHOWN) & (correct_now <= correct_before + CORRECT_RISEN)
    if gap.any():
        axis.fill_between(steps, before, now, where=gap, color="#dc2626", alpha=0.18, lw=0,
                          label="gap: judge fooled more than at first, no more are correct")


def draw_lengths(axis, rows: list[dict]) -> None:
    """Draw the lower axis: mean tokens to the left, mean reward to the right."""
    other = axis.twinx()
    draw_curve(axis, series(rows, "rollout/tokens"), "#111827", "tokens per completion")
    draw_curve(other, series(rows, "reward/mean"), PURPLE, "reward")
    axis.set(xlabel="step", ylabel="mean tokens per completion")
    other.set_ylabel("mean reward per completion", color=PURPLE)
    other.tick_params(axis="y", colors=PURPLE)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylim(bottom=0)
    for side, column in ((axis, 0.0), (other, 0.25)):
        if side.lines:
            legend(side, bbox_to_anchor=(column, 1.01), **ABOVE)


def draw_curve(axis, points: list[tuple], colour: str, label: str, marker=".", width: int = MEAN_OF) -> list[tuple]:
    """Draw faint points and the line of their running mean; returns the line's points."""
    if not points:
        return []
    x, y = zip(*points)
    mean = smoothed(np.array(y, dtype=float), width // 2)
    axis.plot(x, y, marker, color=colour, ms=5, alpha=0.4, mew=0)
    lone = marker if len(points) == 1 else None  # one point has no line
    axis.plot(x, mean, color=colour, lw=1.8, marker=lone, ms=5, label=label)
    return list(zip(x, mean))
