"""bench.side_rollout: what look-up gains, counted; the command, end to end on a tiny model."""

import json

import pytest
from tiny import write_tiny

from bench import side_rollout
from bench.side_rollout import drafted, tokens_per_step


def test_a_draft_is_what_followed_the_last_tokens_before():
    assert drafted([1, 2, 3, 9, 8, 1, 2, 3], 3, 2) == [9, 8]
    assert drafted([7, 2, 3, 5, 1, 2, 3], 3, 2) == [5, 1]  # no run of 3 occurred, one of 2 did
    assert drafted([2, 3, 4, 0, 2, 3, 5, 0, 2, 3], 2, 1) == [5]  # the latest
    assert drafted([1, 2, 3], 3, 2) == []


def test_tokens_per_step_counts_right_drafts_and_the_next_token():
    assert tokens_per_step([([], [1, 2, 3, 4])]) == 1.0
    # after 5 6 7 the run 6 7 is found in the prompt: 8 and 9 come in the step of the next token
    assert tokens_per_step([([6, 7, 8, 9, 1], [5, 6, 7, 8, 9, 2])], draft=2) == pytest.approx(6 / 4)
    assert tokens_per_step([([6, 7, 3], [5, 6, 7, 8])], draft=2) == 1.0  # a wrong draft gains nothing


def test_the_command_measures_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(side_rollout, "ROWS", (1, 2))
    monkeypatch.setattr(side_rollout, "ROUNDS", 1)
    monkeypatch.setattr(side_rollout, "STEPS", 4)
    rows, samples = side_rollout.update_rows(2, 2)
    monkeypatch.setattr(side_rollout, "update_rows", lambda: (rows, samples))
    out = tmp_path / "result.json"
    assert side_rollout.main(["--model", str(write_tiny(tmp_path / "model")), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [row["rows"] for row in result["nf4"]["result"]] == [1, 2]
    lookup = result["lookup"]["result"]
    assert lookup["tokens per step"]["made"] > 1 and len(lookup["speed-up at most"]) == 2
    assert [row["attn"] for row in result["update"]["result"]] == ["eager", "sdpa"]
    told = capsys.readouterr().out
    assert "NF4" in told and "update, sdpa" in told
