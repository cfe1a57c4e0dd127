"""bench.busy: what is compared, and a tiny run."""
import json
import sys

import pytest

from bench import busy


def test_a_round_s_quiet_and_busy_rates_are_compared_and_steps_told_in_seconds():
    def told(*rates):
        names = ("rollout quiet", "rollout busy", "sft quiet", "sft busy")
        return {name: {"rate": rate} for name, rate in zip(names, rates, strict=True)}
    rollout, sft = busy.summarise({"follows": [told(800.0, 400.0, 0.5, 0.25), told(600.0, 200.0, 1.0, 0.25),
                                               told(700.0, 350.0, 1.0, 0.25)]})
    assert rollout == {"worker": "follows", "work": "rollout", "quiet": 700.0, "busy": 350.0, "slower": 2.0}
    assert sft == {"worker": "follows", "work": "sft", "quiet": 1.0, "busy": 4.0, "slower": 4.0}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_tiny_run_measures_both_workers(tmp_path, capfd):
    words = "--tiny --rounds 1 --seconds 0.2 --settle 0.1 --patience 0 --dtype fp32 --out".split()
    assert busy.main([*words, str(tmp_path / "busy.json")]) == 0
    result = json.loads((tmp_path / "busy.json").read_text())["fp32"]
    assert [(row["worker"], row["work"]) for row in result["summary"]] == [
        (worker, work) for worker in ("follows", "fixed") for work in ("rollout", "sft")]
    assert all(row["quiet"] > 0 and row["busy"] > 0 for row in result["summary"])
    assert result["rounds"]["follows"][0]["rollout busy"]["threads"] >= 1 and "follows, sft:" in capfd.readouterr().out
