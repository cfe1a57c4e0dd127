"""The stages as commands: the picture of the judge is drawn when the loop has returned, and never costs a run."""
import json

import pytest

from minimath.commands import run as train
from minimath.config.schema import RLAIFConfig


@pytest.fixture
def loop(monkeypatch, tmp_path):
    """loop(figures) -> the summary of `rlaif` of a loop that leaves records with these figures."""
    def run(figures):
        def leaves_records(cfg):
            records = [{"step": step, "rollout/correct": 0.5, "rollout/tokens": 90.0, **figures} for step in (1, 2, 3)]
            (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            return {"steps": 3, "run_dir": str(tmp_path), "adapter": "", "signal": 0}

        monkeypatch.setattr(train, "train_rlaif", leaves_records)
        return train.rlaif(RLAIFConfig())
    return run


def test_the_picture_of_a_run_with_canaries_is_drawn_when_it_is_over(loop, tmp_path, capsys):
    summary = loop({"canary/worse_wins": 0.25, "canary/pairs": 24})
    assert summary["steps"] == 3 and (tmp_path / "judge.png").stat().st_size > 10_000
    assert f"judge.png: {tmp_path / 'judge.png'}" in capsys.readouterr().out


def test_a_run_without_canaries_has_no_picture(loop, tmp_path, capsys):
    assert loop({})["steps"] == 3 and not (tmp_path / "judge.png").exists() and capsys.readouterr().out == ""


def test_a_picture_that_fails_is_said_and_the_summary_returned(loop, tmp_path, capsys):
    (tmp_path / "judge.png").mkdir()
    assert loop({"canary/worse_wins": 0.25, "canary/pairs": 24})["steps"] == 3
    assert "judge.png could not be written, everything else is saved (IsADirectoryError" in capsys.readouterr().out
