"""bench.gsm8k: its arms can run, what overlaps is named, and its table holds differences to SFT."""
import json
from types import SimpleNamespace

import pytest

from bench import gsm8k
from minimath.config.load import load_config
from minimath.config.schema import STAGES, EvalConfig

LONG = "Tom buys 3 bags of 4 red apples and 5 green pears at the market on Monday"


def write(folder, name, rows):
    made = [{"id": f"{name}/{i}", "problem": p, "solution": s, "answer": "1"} for i, (p, s) in enumerate(rows)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
    (folder / f"gsm8k_{name}.jsonl").write_text(text, encoding="utf-8")


def row(arm, correct, **more):
    return {"arm": arm, "seed": 0, "correct": correct, "tokens": [10] * len(correct), "accuracy": 0.5, "avg@4": 0.4,
            "accuracy@64": 0.3, "accuracy@128": 0.4, "mean_tokens": 10.0, "correct_steps": 0.9, **more}


@pytest.mark.parametrize("arm", [arm for arm, what in gsm8k.ARMS.items() if what])
def test_an_arm_is_options_of_the_recipe(arm):
    stage, _, changes = gsm8k.ARMS[arm]
    cfg = load_config(STAGES[stage], "gsm8k", ["data=x.jsonl", "model=m", *changes], stage)
    assert stage == "sft" or (cfg.steps, cfg.prompts_per_step * cfg.group_size) == (gsm8k.STEPS, gsm8k.SAMPLES)
    assert arm != "sft" or (cfg.epochs, cfg.batch_size, cfg.evaluation.eval_limit) == (
        gsm8k.EPOCHS, gsm8k.BATCH, gsm8k.HELD_OUT)
    assert load_config(EvalConfig, "gsm8k", [], "eval").budgets == "64,128,256"


def test_a_test_problem_that_shares_13_words_with_a_training_row_is_named(tmp_path):
    write(tmp_path, "train", [("one", "a"), ("two\u2028lines", LONG + ".")] + [("x", "y")] * gsm8k.HELD_OUT)
    write(tmp_path, "test", [("another problem", ""), (LONG.upper() + "?", ""), (LONG[:40], "")])
    held = gsm8k.write_data(tmp_path, tmp_path / "out", None)
    assert held == {"train": 2, "valid": gsm8k.HELD_OUT, "test": 3, "overlap": ["test/1"]}
    assert gsm8k.read(tmp_path / "out" / "train.jsonl")[1]["problem"] == "two\u2028lines"


def test_fewer_problems_are_the_first_ones_and_the_overlap_is_still_with_all(tmp_path, monkeypatch):
    write(tmp_path, "train", [("one", "a"), (LONG, "b")] + [("x", "y")] * gsm8k.HELD_OUT)
    write(tmp_path, "test", [(LONG, "")])
    held = gsm8k.write_data(tmp_path, tmp_path / "out", 1)
    assert held == {"train": 1, "valid": gsm8k.HELD_OUT, "test": 1, "overlap": ["test/0"]}
    ran = []
    monkeypatch.setattr(gsm8k, "run_stage", lambda out, words, threads: ran.append(words))
    monkeypatch.setattr(gsm8k, "row_of", lambda *args: {})
    monkeypatch.setattr(gsm8k, "demo_model", lambda: "model")
    options = gsm8k.parse([str(tmp_path), "--work", str(tmp_path / "w"), "--rl-steps", "18"])
    for arm in ("sft", "rlaif"):
        with pytest.raises(FileNotFoundError):
            gsm8k.run_arm(arm, 0, 160, options)
    assert "eval_every=10" in ran[0] and not any(word.startswith("steps=") for word in ran[0])
    assert "steps=18" in ran[3] and "eval_every=6" in ran[3]


@pytest.mark.parametrize("problems, sampled, steps", [(7273, 2000, 1818), (1500, 1500, 375)])
def test_sft_on_own_solutions_has_as_many_problems_and_steps_as_sft(tmp_path, monkeypatch, problems, sampled, steps):
    ran = []
    monkeypatch.setattr(gsm8k, "run_stage", lambda out, words, threads: ran.append(words))
    monkeypatch.setattr(gsm8k, "demo_model", lambda: "model")
    for name in ("data", "own-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").touch()
    with pytest.raises(FileNotFoundError):
        gsm8k.run_arm("sft-own", 0, problems, gsm8k.parse([str(tmp_path), "--work", str(tmp_path)]))
    assert f"limit={sampled}" in ran[0] and f"steps={steps}" in ran[1]


def test_rows_of_other_settings_are_not_gone_on_with(tmp_path, monkeypatch, capsys):
    write(tmp_path, "train", [("one", "a"), ("two", "b")] + [("x", "y")] * gsm8k.HELD_OUT)
    write(tmp_path, "test", [("z", "")])
    made = {"curve": [[0, 0.1, 90.0]], "steps": 1}
    monkeypatch.setattr(gsm8k, "run_arm", lambda arm, seed, *_: row(arm, "10", seed=seed, **made))
    command = [str(tmp_path), "--work", str(tmp_path / "w"), "--out", str(tmp_path / "x.json"), "--arms"]
    assert gsm8k.main([*command, "sft", "--train", "1"]) == 0
    before = (tmp_path / "w" / "data" / "train.jsonl").read_bytes()
    assert gsm8k.main([*command, "base"]) == 1 and "another --work" in capsys.readouterr().out
    assert (tmp_path / "w" / "data" / "train.jsonl").read_bytes() == before
    assert gsm8k.main([*command, "base", "--train", "1"]) == 0
    assert sorted(json.loads((tmp_path / "x.json").read_text())["rows"]) == ["base/0", "sft/0"]


def test_the_table_and_the_picture_are_made_of_the_result_file(tmp_path, capsys):
    out = tmp_path / "gsm8k.json"
    curve = {"curve": [[0, 0.1, 90.0], [10, 0.2, 60.0]], "steps": 10}
    rows = {"sft/0": row("sft", "1100", **curve), "rlaif/0": row("rlaif", "1110", **curve)}
    out.write_text(json.dumps({"rows": rows}))
    assert gsm8k.main(["--table", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "75.0" in said and "+25.0" in said and out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_missing_data_is_named(tmp_path, capsys):
    assert gsm8k.main([str(tmp_path), "--work", str(tmp_path / "w"), "--out", str(tmp_path / "x.json")]) == 1
    assert "gsm8k_train.jsonl is missing" in capsys.readouterr().out


def test_the_plan_counts_what_sft_on_own_solutions_samples_for_itself(tmp_path, monkeypatch):
    class Words:
        def __call__(self, texts):
            return SimpleNamespace(input_ids=[text.split() for text in texts])

    monkeypatch.setattr(gsm8k, "demo_model", lambda: "model")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name: Words())
    options = gsm8k.parse([str(tmp_path), "--work", str(tmp_path), "--arms", "sft", "sft-own"])
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "train.jsonl").write_text(json.dumps({"problem": "p", "solution": "s"}) + "\n")
    for problems, more in ((7273, 0.88), (1500, 0.66)):  # 4 x 2000 or 1500 solutions of 110 tokens
        sft, own = gsm8k.plan(options, {"test": 0, "train": problems}).columns[2].cells
        assert float(own) - float(sft) == pytest.approx(more, abs=0.11)
