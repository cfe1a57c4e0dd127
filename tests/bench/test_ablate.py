"""bench.ablate: its intervals, and the command end to end on a tiny model."""

import json

import numpy as np
import pytest
from tiny import write_tiny

from bench import ablate
from bench.llama_server import missing

QUICK = ["sft.steps=2", "sft.batch_size=2", "rlaif.steps=1", "rlaif.prompts_per_step=2", "rlaif.group_size=2",
         "rlaif.max_new_tokens=6", "eval.max_new_tokens=6", "dtype=fp32", "demo.train_problems=8", "demo.rl_problems=6",
         "demo.test_problems=4", "demo.step_counts=1"]


def row(arm, seed, correct, tokens):
    return {"arm": arm, "seed": seed, "problems": len(correct), "correct": correct, "tokens": tokens,
            "correct_steps": 0.5}


def test_intervals_hold_the_mean_of_new_samples_as_often_as_they_say():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(60):
        values = 100.0 * (rng.random((3, 100)) < 0.6)
        low, high = ablate.interval(values, draws=400)
        held += low <= 60 <= high
    assert 52 <= held <= 60


def test_differences_are_paired_by_seed_and_problem():
    rows = {"heuristic/0": row("heuristic", 0, "1010", [4, 4, 4, 4]),
            "heuristic/1": row("heuristic", 1, "1010", [6, 6, 6, 6]),
            "paper/1": row("paper", 1, "1110", [9, 9, 9, 9]), "paper/2": row("paper", 2, "0000", [1, 1, 1, 1])}
    facts = ablate.figures(rows, "paper")
    assert facts["seeds"] == 2 and facts["correct"] == 37.5 and facts["tokens"] == 5.0
    assert facts["correct_gap"] == 25.0 and facts["tokens_gap"] == 3.0  # seed 1 alone: the reference has no 2
    assert facts["tokens_gap_interval"] == (3.0, 3.0)  # the same on every problem: nothing is left to chance
    assert "correct_gap" not in ablate.figures(rows, "heuristic") and ablate.figures(rows, "grpo") is None


def test_the_command_trains_evaluates_reads_and_goes_on_where_it_was(tmp_path, capsys):
    out = tmp_path / "result.json"
    words = ["--model", str(write_tiny(tmp_path / "model")), "--work", str(tmp_path / "work"), "--out", str(out),
             "--arms", "base", "sft", "heuristic", "--seeds", "5", "--set", *QUICK]
    assert ablate.main(words) == 0
    rows = json.loads(out.read_text())["rows"]
    assert sorted(rows) == ["base/5", "heuristic/5", "sft/5"]
    assert all(len(r["correct"]) == len(r["tokens"]) == r["problems"] == 4 for r in rows.values())
    assert rows["heuristic/5"]["readable"] == [] and "self" in rows["heuristic/5"]["reader"]  # never correct
    before = out.read_text()
    assert ablate.main(words) == 0 and out.read_text() == before  # nothing is run again
    out.with_suffix(".png").unlink()
    assert ablate.main(["--out", str(out), "--table"]) == 0
    assert "heuristic" in capsys.readouterr().out and out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_an_arm_that_fails_is_named_with_its_log_and_the_others_go_on(tmp_path, capsys):
    words = ["--model", str(write_tiny(tmp_path / "model")), "--work", str(tmp_path / "work"), "--arms", "base", "rl",
             "--out", str(tmp_path / "result.json"), "--seeds", "0", "--set", *QUICK, "rlaif.max_prompt_len=1"]
    assert ablate.main(words) == 1
    told = capsys.readouterr().out
    assert "rl/0: rlaif demo ended with status" in told and "rl-0.log" in told and "base/0: 0.0%" in told


@pytest.mark.skipif(bool(missing()), reason=f"needs {missing()}")
@pytest.mark.slow
def test_the_endpoint_arm_asks_a_real_server(tmp_path):
    out = tmp_path / "result.json"
    words = ["--model", str(write_tiny(tmp_path / "model")), "--work", str(tmp_path / "work"), "--out", str(out),
             "--arms", "endpoint", "--seeds", "0", "--readers", "0", "--set", *QUICK, "rlaif.verifier=none",
             "rlaif.group_size=4", "rlaif.max_new_tokens=400"]  # long enough for a random model to end some
    assert ablate.main(words) == 0
    judge = json.loads(out.read_text())["rows"]["endpoint/0"]["judge"]
    assert judge["comparisons"] >= 2 and judge["no_votes"] == 0
