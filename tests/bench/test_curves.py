"""bench.curves: every arm is one that can run, and its table holds the bar against the SFT model of the same seed."""
import json
import re

import pytest

from bench import ablate, curves
from minimath.config.load import load_config
from minimath.config.schema import RLAIFConfig


def of(correct, tokens, steps):
    return {"correct": correct, "tokens": tokens, "correct_steps": steps, "accuracy": 0.5, "mean_tokens": 9.0,
            "checked_steps": 10, "problems": 4}


def row(seed, correct, tokens, steps):
    kept = of(correct, tokens, steps)
    return {"arm": "ratio", "rate": "1e-4", "seed": seed, "curve": [[0, 0.5, 90.0], [3, 0.6, 50.0]], "last": kept,
            "kept": kept}


SFT = {0: of("1100", [10, 10, 10, 10], 0.8), 1: of("1000", [20, 20, 20, 20], 0.8)}


@pytest.mark.parametrize("arm", curves.ARMS)
def test_an_arm_is_options_that_go_together(arm):
    words = [re.sub(r"=\{(\w+)\}", r"=runs/\1", word) for word in [*curves.UNTIL_NOW, *curves.ARMS[arm]]]
    load_config(RLAIFConfig, "demo", words, "rlaif", allow_other=True)


def test_an_arm_is_trained_for_all_steps_and_its_last_checkpoint_evaluated(tmp_path, monkeypatch):
    stages, evaluated = [], []
    monkeypatch.setattr(curves, "demo_model", lambda: "model")
    for module in (ablate, curves):
        monkeypatch.setattr(module, "run_stage", lambda out, words, threads: stages.append(words))
    monkeypatch.setattr(curves, "read_metrics", lambda path: [])
    monkeypatch.setattr(curves, "evaluated", lambda folder, adapter, *_: evaluated.append(adapter.name))
    options = curves.parse(["--work", str(tmp_path)])
    row = curves.run_arm("judge-steps-apart-control", "1e-4", 0, options)
    assert row["seed"] == 0 and row["words"] == [*curves.UNTIL_NOW, *curves.ARMS["judge-steps-apart-control"]]
    assert {"steps=18", "step_weight=0.5", "lr=1e-4"} <= set(stages[-1])
    assert evaluated == ["step-000018", "curve-judge-steps-apart-control-1e-4-0"]


def test_differences_are_to_the_sft_model_of_the_same_seed():
    facts = curves.figures([row(0, "1110", [4, 4, 4, 4], 0.9), row(1, "1000", [6, 6, 6, 6], 0.8)], SFT, "last")
    assert facts["correct"] == 50.0 and facts["correct_gap"] == 12.5 and facts["tokens_gap"] == -10.0
    assert facts["saved"] == pytest.approx(100 * (1 - 5 / 15)) and facts["steps_gap"] == pytest.approx(5.0)
    assert facts["wrong"] == pytest.approx((1 + 2) / 2 / 4) and facts["wrong_gap"] == pytest.approx(-0.5 / 4)
    assert facts["meets"]


@pytest.mark.parametrize("correct, tokens, steps", [("1000", 4, 0.9), ("1110", 8, 0.9), ("1110", 4, 0.7)])
def test_less_accuracy_or_more_than_half_the_tokens_or_fewer_right_steps_miss_the_bar(correct, tokens, steps):
    assert not curves.figures([row(0, correct, [tokens] * 4, steps)], SFT, "last")["meets"]


def test_the_table_and_the_picture_are_made_of_the_result_file(tmp_path, capsys):
    out = tmp_path / "curves.json"
    out.write_text(json.dumps({"sft": {str(seed): each for seed, each in SFT.items()},
                               "rows": {"ratio/1e-4/0": row(0, "1110", [4, 4, 4, 4], 0.9)}}))
    assert curves.main(["--table", "--out", str(out)]) == 0
    assert "ratio" in (said := capsys.readouterr().out) and "measured with other" not in said
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_row_of_an_arm_that_has_changed_is_said(tmp_path, capsys):
    words = [word for word in curves.words_of("ratio") if word != "brevity=ratio"]
    out, kept = tmp_path / "curves.json", row(0, "1110", [4] * 4, 0.9) | {"words": words}
    out.write_text(json.dumps({"sft": {"0": SFT[0]}, "rows": {"ratio/1e-4/0": kept}}))
    assert curves.main(["--table", "--out", str(out)]) == 0
    said = "ratio/1e-4/0: measured with other options (then without these; now brevity=ratio)"
    assert said in capsys.readouterr().out


def test_arms_can_be_held_against_another_one_on_the_seeds_that_both_have(tmp_path, capsys):
    out, other = tmp_path / "curves.json", {"arm": "log"}
    out.write_text(json.dumps({"sft": {str(seed): each for seed, each in SFT.items()}, "rows": {
        "ratio/1e-4/0": row(0, "1100", [4] * 4, 0.9), "log/1e-4/0": row(0, "1110", [4] * 4, 0.9) | other,
        "log/1e-4/1": row(1, "0000", [4] * 4, 0.9) | other, "log/3e-4/0": row(0, "0000", [4] * 4, 0.9) | other | {
            "rate": "3e-4"}}}))
    assert curves.main(["--table", "--against", "ratio", "--out", str(out)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "1e-4" in line or "3e-4" in line]
    assert len(lines) == 2 and all("+25.0" in line and "log" in line for line in lines)
