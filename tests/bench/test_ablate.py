"""bench.ablate: its intervals, and the command end to end on a tiny model."""

import contextlib
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tiny import write_tiny

from bench import ablate
from bench.llama_server import missing
from minimath.cli import main

QUICK = ["sft.steps=2", "sft.batch_size=2", "rlaif.steps=1", "rlaif.prompts_per_step=2", "rlaif.group_size=2",
         "rlaif.max_new_tokens=6", "eval.max_new_tokens=6", "dtype=fp32", "demo.train_problems=8", "demo.rl_problems=6",
         "demo.test_problems=4", "demo.step_counts=1"]


@pytest.fixture
def stages_here(monkeypatch):
    """stages_here(COMMAND ...): stages run in this process, since each of their own imports torch, but for those."""
    real = ablate.run_words

    def here(words, threads, log):
        monkeypatch.setattr(sys, "argv", ["minimath", *words])
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            return main()

    return lambda *commands: monkeypatch.setattr(
        ablate, "run_words", lambda words, *rest: (real if words[0] in commands else here)(words, *rest))


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


def test_the_command_trains_evaluates_reads_and_goes_on_where_it_was(tmp_path, capsys, stages_here):
    stages_here()
    out = tmp_path / "result.json"
    words = ["--model", str(write_tiny(tmp_path / "model")), "--work", str(tmp_path / "work"), "--out", str(out),
             "--arms", "base", "sft", "heuristic", "--seeds", "5", "--set", *QUICK]
    assert ablate.main(words) == 0
    rows = json.loads(out.read_text())["rows"]
    assert sorted(rows) == ["base/5", "heuristic/5", "sft/5"]
    assert all(len(r["correct"]) == len(r["tokens"]) == r["problems"] == 4 for r in rows.values())
    assert all(r["words"] == ablate.words_of(r["arm"]) for r in rows.values())
    assert rows["heuristic/5"]["readable"] == [] and "self" in rows["heuristic/5"]["reader"]  # never correct
    before = out.read_text()
    assert ablate.main(words) == 0 and out.read_text() == before  # nothing is run again
    assert "read before" not in capsys.readouterr().out
    assert ablate.main([*words, "--readers", "7"]) == 0 and out.read_text() == before
    assert "heuristic/5: read before, with another --reader or --readers" in capsys.readouterr().out
    out.with_suffix(".png").unlink()
    assert ablate.main(["--out", str(out), "--table"]) == 0
    assert "heuristic" in capsys.readouterr().out and out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("again, told", [
    ({}, ""), ({"--set": "rlaif.lr=1e-4"}, "another --work"), ({"--model": "other"}, "another --work"),
    ({"--set": "demo.test_problems=4", "--work": "new"}, "another --out"),
    ({"--set": "rlaif.lr=1e-4", "--work": "new", "--out": "new.json"}, "")])
def test_rows_and_runs_of_other_settings_are_not_gone_on_with(tmp_path, monkeypatch, capsys, again, told):
    def run_all(options, rows, save):
        rows.update({f"base/{seed}": row("base", seed, "10", [4, 4]) for seed in options.seeds})
        save()
        return []

    monkeypatch.setattr(ablate, "run_all", run_all)
    words = {"--seeds": "0", "--readers": "0", "--work": "work", "--out": "result.json"}
    monkeypatch.chdir(tmp_path)
    assert ablate.main([each for pair in words.items() for each in pair]) == 0
    assert ablate.main([each for pair in (words | again).items() for each in pair]) == (2 if told else 0)
    assert told in capsys.readouterr().err


def test_rows_of_the_demo_s_settings_from_before_these_were_kept_are_gone_on_with(tmp_path):
    held = {"rows": {"base/0": row("base", 0, "10", [4, 4])}}
    ablate.keep_settings(tmp_path / "one", tmp_path / "out.json", held, {"model": "", "set": []})
    with pytest.raises(ablate.UserError, match="another --out"):
        ablate.keep_settings(tmp_path / "two", tmp_path / "out.json", held, {"model": "", "set": ["rlaif.steps=9"]})


def test_two_arms_side_by_side_train_their_judge_once(tmp_path, monkeypatch):
    running = []

    def run_stage(out, words, threads):
        assert not running, "the judge's folder is in use"
        running.append(out)
        time.sleep(0.05)
        running.clear()

    monkeypatch.setattr(ablate, "run_stage", run_stage)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: ablate.train_judge(tmp_path, "single", 0, [], 1), range(2)))
    assert found == 2 * [tmp_path / "judge-single-0"]


def test_labels_are_those_of_all_steps_by_decided_groups():
    steps = [{"verifier/decided": 0.75, "verifier/share": 0.5, "verifier/agrees": 1.0, "verifier/seconds": 3.0},
             {"verifier/decided": 0.25, "verifier/share": 0.7, "verifier/agrees": 0.6}, {"verifier/decided": 0.0}]
    assert ablate.labels_of(steps) == pytest.approx(
        {"verifier/decided": 1 / 3, "verifier/share": 0.6, "verifier/agrees": 0.9})
    assert ablate.labels_of([{"loss": 1.0}]) == {}


def test_a_stage_is_a_process_with_a_log_and_a_mark_when_it_is_done(tmp_path):
    ablate.run_stage(tmp_path / "stage", ["--help"], 1)  # comes without torch
    assert "minimath demo" in (tmp_path / "stage.log").read_text()
    assert json.loads((tmp_path / "stage" / "done").read_text()) == ["--help"]


def test_a_stage_that_was_done_with_other_words_is_refused(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(ablate, "run_words", lambda words, threads, log: ran.append(words) or 0)

    def run(work, rate, home="/home/a", port=1):
        words = ["rlaif", "demo", f"model={home}/SmolLM2", f"adapter={work / 'sft-0'}", f"lr={rate}"]
        ablate.run_stage(work / "lr-0", [*words, f"judge_url=http://127.0.0.1:{port}/v1"], port)

    run(tmp_path / "work", "1e-4")
    moved = (tmp_path / "work").rename(tmp_path / "moved")
    run(moved, "1e-4", home="/home/b", port=2)
    with pytest.raises(ablate.UserError, match=r"moved/lr-0 .*lr=1e-4; now lr=3e-4.* remove .* another --work"):
        run(moved, "3e-4")
    (moved / "lr-0" / "done").write_text("")  # from before words were kept
    run(moved, "3e-4")
    assert len(ran) == 1


def test_a_row_of_an_arm_that_has_changed_is_said_and_an_older_one_is_taken_as_it_is(tmp_path, monkeypatch, capsys):
    rows = {f"trained/{seed}": row("trained", seed, "10", [4, 4]) for seed in (0, 1)}
    rows["trained/1"]["words"] = ablate.words_of("trained")
    (out := tmp_path / "result.json").write_text(json.dumps({"rows": rows}))
    assert ablate.main(["--out", str(out), "--table"]) == 0 and "trained/" not in capsys.readouterr().out
    monkeypatch.setitem(ablate.ARMS, "trained", ("sft", ["judge=self", "judge_adapter={pair}"]))
    assert ablate.main(["--out", str(out), "--table"]) == 0
    assert "trained/1: measured with other options (then judge_adapter={single}; now judge_train.form=pair " \
        "judge_adapter={pair}), and not again" in (said := capsys.readouterr().out) and "trained/0" not in said


def test_an_arm_that_fails_is_named_with_its_log_and_the_others_go_on(tmp_path, capsys, stages_here):
    stages_here("rlaif")
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
