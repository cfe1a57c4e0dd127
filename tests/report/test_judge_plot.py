"""What the judge of a run is made to believe: what is drawn of it."""

import json
import struct

import pytest
from matplotlib.figure import Figure

from minimath.report.figures import draw_gap, judged, read_metrics, save_png, series

HACKED = [{"step": i, "rollout/correct": 0.5, "rollout/tokens": 100.0 + i, "reward/mean": 0.5,
           **({"canary/pairs": 24, "canary/worse_wins": 0.1, "canary/rollout_pairs": 8,
               "canary/rollout_worse_wins": 0.1 if i < 30 else 0.9} if i % 5 == 0 else {})} for i in range(1, 61)]


def drawn(rows):
    """{label: drawn artist} of the upper axis."""
    axis = Figure().subplots()
    draw_gap(axis, rows)
    return dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))


def gap(rows):
    """(first, last) step that is shaded, or None."""
    shades = [artist for label, artist in drawn(rows).items() if label.startswith("gap")]
    if not shades:
        return None
    steps = [x for path in shades[0].get_paths() for x, _ in path.vertices]
    return min(steps), max(steps)


def write(folder, rows, rest=""):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + rest, encoding="utf-8")
    return folder


def assert_picture(folder):
    """What is drawn of a run is a PNG of some size that has both axes."""
    save_png(judged(read_metrics(folder / "metrics.jsonl")), folder / "judge.png")
    data = (folder / "judge.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG") and width > 800 and height > 600 and len(data) > 20_000


@pytest.mark.parametrize("rows", [HACKED, HACKED[4:5], HACKED[3:5]], ids=["60", "1", "2"])
def test_a_picture_is_written_of_many_points_and_of_few(tmp_path, rows):
    assert_picture(write(tmp_path, rows))


def test_missing_figures_are_left_out_and_the_others_drawn():
    hole = {"rollout/correct": None, "canary/rollout_worse_wins": None, "canary/rollout_pairs": 0,
            "rollout/tokens": None}
    rows = HACKED + [{"step": 61, "canary/worse_wins": None, **hole}, {"step": 20, "eval/accuracy": 0.5}]
    assert [step for step, _ in series(rows, "rollout/correct")] == list(range(1, 61))
    assert series(rows, "canary/rollout_worse_wins")[-1] == (60, 0.9)
    assert series(rows, "canary/worse_wins")[-1] == (60, 0.1)
    assert judged(rows) and judged(HACKED[:4]) is None
    fixed_only = [{k: v for k, v in row.items() if "rollout_" not in k} for row in HACKED]
    assert len(drawn(fixed_only)) == len(drawn(HACKED)) - 2  # without the curve and its gap


def test_the_gap_is_shaded_where_wrong_ones_win_more_and_no_more_are_correct():
    low, high = gap(HACKED)
    assert 20 < low < 30 and high == 60
    assert gap([row | {"rollout/correct": 0.3 + 0.01 * row["step"]} for row in HACKED]) is None
    assert gap([row | {"canary/rollout_worse_wins": 0.1, "canary/rollout_pairs": 8} for row in HACKED]) is None
    assert gap(HACKED[:5]) is None  # one canary


def test_a_line_that_a_kill_left_unfinished_is_skipped(tmp_path):
    folder = tmp_path / "run$ {of$"
    folder.mkdir()
    write(folder, HACKED, '{"step": 61, "rollout/correct": 0.')
    assert read_metrics(folder / "metrics.jsonl") == HACKED
    assert_picture(folder)
