"""Plots of a run: what is drawn, and that a picture never costs a run."""

import json
import struct

import pytest
from matplotlib.figure import Figure

from minimath.report import judge_plot as report
from minimath.report.metrics import read_metrics, series

HACKED = [{"step": i, "rollout/correct": 0.5, "rollout/tokens": 100.0 + i, "reward/mean": 0.5,
           **({"canary/pairs": 24, "canary/worse_wins": 0.1, "canary/rollout_pairs": 8,
               "canary/rollout_worse_wins": 0.1 if i < 30 else 0.9} if i % 5 == 0 else {})} for i in range(1, 61)]


def drawn(rows, draw=report.draw_gap):
    """{label: drawn artist} of one axis."""
    axis = Figure().subplots()
    draw(axis, rows)
    return dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))


def gap(rows):
    """(first, last) step that is shaded, or None."""
    shades = [artist for label, artist in drawn(rows).items() if label.startswith("gap")]
    if not shades:
        return None
    steps = [x for path in shades[0].get_paths() for x, _ in path.vertices]
    return min(steps), max(steps)


def is_picture(path):
    """A PNG of some size that has both axes."""
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    return data.startswith(b"\x89PNG") and width > 800 and height > 600 and len(data) > 20_000


def write(path, rows, rest=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + rest, encoding="utf-8")
    return path


@pytest.mark.parametrize("rows", [HACKED, HACKED[4:5], HACKED[3:5], []], ids=["60", "1", "2", "0"])
def test_a_picture_is_written_of_many_points_and_of_few(tmp_path, rows):
    report.plot_judge(rows, tmp_path / "judge.png", "run")
    assert is_picture(tmp_path / "judge.png")


def test_missing_figures_are_left_out_and_the_others_drawn(tmp_path):
    hole = {"rollout/correct": None, "canary/rollout_worse_wins": None, "canary/rollout_pairs": 0,
            "rollout/tokens": None}
    rows = HACKED + [{"step": 61, "canary/worse_wins": float("nan"), **hole}, {"step": 20, "eval/accuracy": 0.5}]
    assert [step for step, _ in series(rows, "rollout/correct")] == list(range(1, 61))
    assert series(rows, "canary/rollout_worse_wins")[-1] == (60, 0.9)
    assert series(rows, "canary/worse_wins")[-1] == (60, 0.1)
    report.plot_judge(rows, tmp_path / "judge.png", "run")
    assert is_picture(tmp_path / "judge.png")
    fixed_only = [{k: v for k, v in row.items() if "rollout_" not in k} for row in HACKED]
    assert len(drawn(fixed_only)) == len(drawn(HACKED)) - 2  # without the curve and its gap


def test_the_gap_is_shaded_where_wrong_ones_win_more_and_no_more_are_correct():
    low, high = gap(HACKED)
    assert 20 < low < 30 and high == 60
    assert gap([row | {"rollout/correct": 0.3 + 0.01 * row["step"]} for row in HACKED]) is None
    assert gap([row | {"canary/rollout_worse_wins": 0.1} for row in HACKED]) is None
    assert gap(HACKED[:5]) is None  # one canary


def test_a_line_that_a_kill_left_unfinished_is_skipped(tmp_path):
    path = write(tmp_path / "metrics.jsonl", HACKED, '{"step": 61, "rollout/correct": 0.')
    assert read_metrics(path) == HACKED
    report.plot_judge(read_metrics(path), tmp_path / "judge.png", "run$ {of$")
    assert is_picture(tmp_path / "judge.png")


def test_a_run_without_canaries_gets_no_picture_and_no_words(tmp_path):
    said = []
    write(tmp_path / "metrics.jsonl", [{"step": 1, "rollout/correct": 0.5}])
    report.write_judge_plot(tmp_path, said.append)
    assert said == [] and not (tmp_path / "judge.png").exists()


def test_a_picture_that_fails_is_said_with_its_reason_and_raises_nothing(tmp_path):
    said = []
    write(tmp_path / "metrics.jsonl", HACKED)
    (tmp_path / "judge.png").mkdir()
    report.write_judge_plot(tmp_path, said.append)
    report.write_judge_plot(tmp_path / "nowhere", said.append)
    assert "IsADirectoryError" in said[0] and "FileNotFoundError" in said[1]
    assert all("everything else is saved" in text for text in said)
