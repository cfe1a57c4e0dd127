"""bench.train: arguments, ratios and table on made-up timings, messages; with TRL, a tiny run."""

import importlib.util
import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from bench import busy, parts, same, train, train_worker, turns
from bench.measure import ROOT
from minimath.core.errors import UserError


def step(seconds: float, tokens: int, peak: int | None = 0, **more) -> dict:
    return {"seconds": seconds, "tokens": tokens, "peak_extra_bytes": peak, **more}


def test_arguments_default_to_both_stages_against_trl():
    options = train.parse([])
    assert options.only is None and options.trainers == ["minimath", "trl", "trl-logits"] and options.device == "cpu"
    assert train.parse(["--only", "rlaif", "--steps", "9"]).steps == 9


@pytest.mark.parametrize(
    "words",
    [
        ["--steps", "0"],
        ["--prompts", "two"],
        ["--device", "tpu"],
        ["--only", "eval"],
        ["--trainers", "trl"],
        ["--trainers", "minimath"],
        ["--trainers", "minimath", "x"],
    ],
)
def test_bad_arguments_are_refused_before_any_work(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.parse(words)
    assert stopped.value.code == 2 and "error" in capsys.readouterr().err


def test_ratio_is_the_median_of_paired_rounds_not_the_ratio_of_medians():
    ours, peer = [step(1, 100), step(2, 100), step(9, 100)], [step(3, 100), step(2, 100), step(9, 100)]
    assert train.compare(ours, peer)["step speed"] == 1.0  # of 3, 1, 1; medians would give 1.5
    assert train.compare(ours, peer)["token speed range"] == [1.0, 3.0]


def test_token_speed_does_not_reward_shorter_completions():
    ours, peer = [step(1, 50)], [step(2, 100)]
    ratios = train.compare(ours, peer)
    assert ratios["step speed"] == 2.0 and ratios["token speed"] == 1.0


def test_memory_ratio_is_ours_over_theirs_and_unknown_stays_unknown():
    assert train.compare([step(1, 1, 30)], [step(1, 1, 60)])["peak memory"] == 0.5
    assert train.compare([step(1, 1, None)], [step(1, 1, 60)])["peak memory"] is None


def test_table_shows_ratios_for_peers_only():
    steps = {
        "minimath": [step(1.0, 100, 10**8, rollout_seconds=0.7, update_seconds=0.3)],
        "trl": [step(2.5, 100, 4 * 10**8, rollout_seconds=2.0, update_seconds=0.5)],
    }
    rows = train.summarise(steps)
    assert "minimath against it" not in rows[0]
    console = Console(width=130, file=io.StringIO())
    console.print(train.table_of("rlaif bf16", rows))
    ours, peer = (
        next(line for line in console.file.getvalue().splitlines() if name in line)
        for name in (" minimath ", " trl ")
    )
    assert "2.50x" in peer and "0.25x" in peer and "400" in peer and "2.00" in peer
    assert "x" not in ours and "100" in ours


def test_saving_one_stage_keeps_the_other(tmp_path):
    path = tmp_path / "new" / "train-cpu.json"
    train.save(path, "sft bf16", {"a": 1})
    train.save(path, "rlaif bf16", {"b": 2})
    train.save(path, "sft bf16", {"a": 3})
    assert json.loads(path.read_text()) == {"sft bf16": {"a": 3}, "rlaif bf16": {"b": 2}}


def test_a_run_that_failed_in_both_records_is_not_the_same_numbers(capsys):
    record = {"tiny/sft": {"failed": "error: no such option"}, "tiny/eval": {"eval.json": [{"accuracy": 0.5}]}}
    assert same.compare(record, record) == 1 and "it failed" in capsys.readouterr().out


@pytest.mark.parametrize("module", [busy, parts])
@pytest.mark.parametrize("words", [["--device", "cuda"], ["--generate-batch", "4"]])
def test_what_runs_on_a_cpu_alone_takes_no_option_that_it_would_ignore(module, words, capsys):
    assert module.parse([]).device == "cpu"
    with pytest.raises(SystemExit):
        module.parse(words)
    assert "unrecognized arguments" in capsys.readouterr().err


def test_the_planner_s_settings_are_named_to_who_asks_for_another(monkeypatch, capsys):
    from bench import plan

    monkeypatch.setattr(sys, "argv", ["bench.plan", "--only", "qwen9"])
    with pytest.raises(SystemExit):
        plan.main()
    assert "qwen2 rollout nf4" in capsys.readouterr().err


def test_a_setting_of_the_planner_keeps_the_machine_that_it_was_measured_on(monkeypatch, tmp_path):
    from bench import plan

    figures = {"predicted_mb": 1.0, "measured_mb": 1.0, "error": 0.0, "error_above": 0.0}
    before = {"machine": {"commit": "a"}, "settings": [{"setting": "llama padded fp32", **figures}]}
    (tmp_path / "plan-cpu.json").write_text(json.dumps(before))
    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    monkeypatch.setattr(plan, "compare", lambda name: {"setting": name, **figures})
    for commit, name in (("b", "qwen2 rollout nf4"), ("c", "qwen3 padded bf16")):
        monkeypatch.setattr(plan, "machine", lambda device, commit=commit: {"commit": commit})
        monkeypatch.setattr(sys, "argv", ["bench.plan", "--only", name])
        assert plan.main() == 0
    rows = json.loads((tmp_path / "plan-cpu.json").read_text())["settings"]
    assert {row["setting"]: row["machine"]["commit"] for row in rows} == {
        "llama padded fp32": "a", "qwen2 rollout nf4": "b", "qwen3 padded bf16": "c"}


def test_missing_trl_is_one_line_with_the_install_command(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "trl" else found(name, *rest)
    )
    assert train.main(["--tiny"]) == 2
    err = capsys.readouterr().err
    assert "pip install -e '.[bench]'" in err and err.count("\n") == 1


def test_a_trainer_that_dies_is_named_with_its_last_words(tmp_path):
    with open(tmp_path / "log", "w+") as log:
        code = "import sys; sys.exit('no such thing')"
        worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=log, text=True)
        with pytest.raises(UserError, match="trl ended with status 1: no such thing"):
            turns.answer(worker, "trl", log)


@pytest.mark.parametrize(
    ("rows", "longest", "expected"), [(8, 100, 8), (8, 1000, 4), (6, 1000, 3), (8, 9000, 1)]
)
def test_trl_forwards_stay_within_the_tokens_minimath_gets(rows, longest, expected):
    assert train_worker.rows_per_forward(rows, longest, 4096) == expected


def test_every_completion_of_a_group_gets_a_signal_and_correct_beats_wrong():
    rewards = train_worker.completion_rewards([False, True, False], [[1, 2], [1, 2], [3]])
    assert rewards[1] >= 1 > max(rewards[0], rewards[2]) and rewards[0] != rewards[2]


def test_trl_gets_the_examples_in_the_order_in_which_minimath_draws_them():
    from minimath.data.batch import step_indices

    ours, theirs = (train_worker.examples_of(name, 12) for name in ("minimath", "trl"))
    batches = [[ours[i].problem for i in step_indices(step, 12, 4, 0)] for step in range(3)]
    assert batches == [[e.problem for e in theirs[i : i + 4]] for i in (0, 4, 8)]


@pytest.mark.slow
def test_tiny_run_measures_both_stages_at_equal_work(tmp_path):
    pytest.importorskip("trl")
    out = tmp_path / "train.json"
    words = [
        "--tiny",
        "--steps",
        "2",
        "--batch-size",
        "4",
        "--prompts",
        "2",
        "--group-size",
        "3",
        "--max-new-tokens",
        "8",
        "--dtype",
        "fp32",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "bench.train", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    sft, rlaif = result["sft fp32"]["steps"], result["rlaif fp32"]["steps"]
    assert [s["tokens"] for s in sft["minimath"]] == [s["tokens"] for s in sft["trl"]]
    assert len(sft["trl-logits"]) == 2 and "trl-logits" not in rlaif
    for name in ("minimath", "trl"):
        assert len(sft[name]) == len(rlaif[name]) == 2 and all(
            s["seconds"] > 0 for s in sft[name] + rlaif[name]
        )
        assert all(s["completions"] == 6 and 6 <= s["tokens"] <= 48 for s in rlaif[name])
    assert all(s["trained_groups"] == 2 for s in rlaif["minimath"])
    assert result["sft fp32"]["settings"]["dtype"] == "fp32" and result["sft fp32"]["versions"]["trl"]
