"""Plots of a run."""
from pathlib import Path


def plot_tradeoff(rows: dict[str, dict], path: Path, title: str) -> None:
    """Accuracy (with its 95% interval) against mean tokens of each model, as a PNG: up and to the left is better.

    rows: name -> summary of an evaluation. Colours hold in dark and light surroundings (white background, dark ink).
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.2, 4.2), dpi=150)
    colours = ["#6b7280", "#2563eb", "#dc2626", "#d97706", "#7c3aed", "#059669"]
    names = list(rows)
    for i, (name, summary) in enumerate(rows.items()):
        x, y = summary["mean_tokens"], 100 * summary["accuracy"]
        low, high = (100 * v for v in summary["interval"])
        axis.errorbar(x, y, yerr=[[y - low], [high - y]], fmt="o", ms=8, capsize=4, color=colours[i % len(colours)],
                      label=f"{name}: {y:.1f}%, {x:.0f} tokens")
    if len(names) >= 3:  # base -> SFT -> RLAIF, the two stages
        for a, b in zip(names[:2], names[1:3]):
            axis.annotate("", xy=(rows[b]["mean_tokens"], 100 * rows[b]["accuracy"]),
                          xytext=(rows[a]["mean_tokens"], 100 * rows[a]["accuracy"]),
                          arrowprops={"arrowstyle": "->", "color": "#9ca3af", "lw": 1.4, "shrinkA": 9, "shrinkB": 9})
    axis.set_xlabel("mean tokens per solution (fewer is better)")
    axis.set_ylabel("accuracy, % (bars: 95% interval)")
    axis.set_ylim(0, 100)
    axis.set_xlim(0, 1.12 * max(summary["mean_tokens"] for summary in rows.values()))
    axis.set_title(title, fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="best", framealpha=0.9)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
