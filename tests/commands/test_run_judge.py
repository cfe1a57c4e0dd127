"""A run whose recipe trains a judge: a stage like the others, which RLAIF then asks."""
import json
import os
import signal

import pytest
import yaml
from safetensors.torch import load_file
from toy import ending_model, write_problems

from minimath.commands import run as run_module
from minimath.commands.run import load_stages, run
from minimath.core.errors import Interrupted, UserError
from minimath.core.run_folder import find_adapter
from minimath.train import judge as judge_module

SECTIONS = {
    "sft": {"steps": 1, "batch_size": 2},
    "judge_train": {"steps": 2, "samples": 2, "held_out": 0.3, "limit": 10, "lr": 1e-2, "save_every": 1},
    "rlaif": {"steps": 1, "prompts_per_step": 2, "group_size": 2, "max_new_tokens": 12, "max_refill": 0,
              "verifier": "none", "judge": "heuristic"},
    "eval": {"max_new_tokens": 8, "limit": 2}}


@pytest.fixture
def recipe(tiny_dir, tmp_path, request, monkeypatch):
    if "between" not in request.node.name:
        monkeypatch.setattr(run_module, "draw", lambda *args: None)
    data = write_problems(tmp_path / "problems.jsonl", n=12)
    shared = {"model": ending_model(tiny_dir, tmp_path / "llama"), "device": "cpu", "dtype": "fp32", "lora_r": 4,
              "prompt_template": "{problem}", "data": data}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(shared | SECTIONS))
    return str(tmp_path / "r.yaml")


def test_a_judge_is_trained_between_the_stages_and_asked(recipe, tmp_path, capsys):
    out = tmp_path / "run"
    summary = run(recipe, [f"out={out}"])
    assert list(summary["rows"]) == ["base", "SFT", "SFT + RLAIF (trained judge)"]
    assert summary["judge"] == json.loads((out / "judge/adapter/judge.json").read_text())["figures"]
    trained, asked = (yaml.safe_load((out / name / "config.yaml").read_text()) for name in ("judge", "rlaif"))
    assert trained["adapter"] == str(out / "sft") and trained["limit"] == 10
    assert trained["data"] == asked["data"] and trained["max_new_tokens"] == 12  # RLAIF's
    assert (asked["judge"], asked["judge_adapter"]) == ("self", str(out / "judge"))
    said, page = capsys.readouterr().out, (out / "report.html").read_text()
    for words in ("AUC within a problem", "Brier score"):
        assert words in said and words in page
    assert "Training: judge" in page
    assert find_adapter(out) == out / "rlaif/adapter"
    for stage in ("rlaif", "sft"):
        (out / stage / "summary.json").unlink()
    with pytest.raises(UserError, match="no stage of it is complete"):  # the judge's is
        find_adapter(out)


def test_a_run_that_is_stopped_while_its_judge_learns_goes_on_to_the_same(recipe, tmp_path, monkeypatch, capsys):
    run(recipe, [f"out={tmp_path / 'whole'}"])
    learn = judge_module.learn

    def stopped(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return learn(*args)

    monkeypatch.setattr(judge_module, "learn", stopped)
    with pytest.raises(Interrupted):
        run(recipe, [f"out={tmp_path / 'broken'}"])
    assert not (tmp_path / "broken/judge/summary.json").exists() and not (tmp_path / "broken/rlaif").exists()
    assert "judge train goes on" not in capsys.readouterr().out
    monkeypatch.setattr(judge_module, "learn", learn)
    run(recipe, [f"out={tmp_path / 'broken'}", "resume=true"])
    monkeypatch.setattr(run_module, "judge_train", None)  # complete: not called again
    run(recipe, [f"out={tmp_path / 'broken'}", "resume=true"])
    for name in ("judge", "rlaif"):
        adapters = [load_file(tmp_path / each / name / "adapter/adapter_model.safetensors")
                    for each in ("whole", "broken")]
        assert all(adapters[0][key].equal(adapters[1][key]) for key in adapters[0]), name


def test_a_judge_that_runs_out_of_time_is_measured_and_complete(recipe, tmp_path):
    summary = run(recipe, [f"out={tmp_path / 'run'}", "judge_train.steps=1000", "judge_train.max_minutes=0.0001"])
    assert summary["judge"]["pairs"] is not None
    assert json.loads((tmp_path / "run/judge/summary.json").read_text())["steps"] < 1000


def test_a_run_without_a_judge_is_not_named_after_one(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "part", lambda work, cfg, out: {})
    for stage in ("sft", "rlaif"):
        (tmp_path / "run" / stage).mkdir(parents=True)
    out, cfgs = load_stages(recipe, [f"out={tmp_path / 'run'}", "judge=self", "judge_weight=0"], "run")
    assert list(run_module.run_arms(out, cfgs, False, float)) == ["base", "SFT", "SFT + RLAIF (no judge)"]


@pytest.mark.parametrize("words", [["judge=heuristic"], ["--rlaif.judge=heuristic"], ["judge_adapter=elsewhere",
                                   "judge=self"], ["rlaif.judge-adapter=", "judge=self"], ["reward=paper"]])
def test_words_for_another_judge_leave_the_stage_out(recipe, words):
    cfgs = load_stages(recipe, words, "run")[1]
    judge, rlaif = cfgs.get("judge"), cfgs["rlaif"]
    assert judge is None
    assert rlaif.judge.name == ("self" if "judge=self" in words or words == ["reward=paper"] else "heuristic")


def test_a_recipe_that_asks_a_server_and_trains_a_judge_is_refused_until_words_say_which(recipe, tmp_path):
    sections = yaml.safe_load((tmp_path / "r.yaml").read_text())
    sections["rlaif"] |= {"judge": "openai", "judge_url": "http://127.0.0.1:9/v1", "judge_model": "m"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(sections))
    with pytest.raises(UserError, match=r"r.yaml:\d+: judge: openai, but RLAIF asks the judge that"):
        load_stages(recipe, [], "run")
    assert "judge" not in load_stages(recipe, ["judge=openai"], "run")[1]


def test_an_evaluation_on_what_is_trained_on_is_noticed(recipe):
    for words, same in (([], True), (["eval.data=other.jsonl"], False), (["data=a/b:c:train"], True),
                        (["data=a/b:c"], False), (["data=a/b:c", "split=train"], True)):
        assert run_module.trains_on(load_stages(recipe, words, "run")[1]) == same, words


def test_words_alone_make_the_stage(recipe, tmp_path):
    sections = yaml.safe_load((tmp_path / "r.yaml").read_text())
    del sections["judge_train"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(sections))
    assert "judge" not in load_stages(recipe, [], "run")[1]
    out, cfgs = load_stages(recipe, ["judge_train.lr=0.5", "out=here"], "run")
    judge, rlaif = cfgs["judge"], cfgs["rlaif"]
    assert judge.optimizer.lr == 0.5 and rlaif.judge.adapter == str(out / "judge") == "here/judge"


def test_data_of_its_own_is_taken_as_it_is(recipe):
    words = ["sft.split=test", "sft.limit=3", "rlaif.temperature=0.5"]
    own, taken = (load_stages(recipe, [*words, *more], "run")[1]["judge"]
                  for more in (["judge_train.data=mine.jsonl"], []))
    assert (own.data.source, own.data.split, own.data.limit) == ("mine.jsonl", "train", 10)
    assert (taken.data.split, taken.data.limit, taken.sampling.temperature) == ("test", 10, 0.5)


@pytest.mark.parametrize("word", ["limit=5", "--limit=5"])
def test_a_limit_without_a_section_is_for_the_training_problems_alone(recipe, word):
    cfgs = load_stages(recipe, [word], "run")[1]
    assert [cfgs[name].data.limit for name in ("sft", "rlaif", "eval")] == [5, 5, 2]


@pytest.mark.parametrize("words, said", [
    (["judge_train.lr=fast"], "lr must be a number"), (["judge_train.adaptr=x"], "unknown key"),
    (["judge_train.rubric=nowhere.txt"], "nowhere.txt"), (["judge_train.form=pair", "judge_form=single"], "judge_form"),
    (["judge_train.form=pair", "verifier=majority+judge"], "judge_train.form=single"),
    (["resume=true"], "needs the run folder to go on with: out=")])
def test_what_is_wrong_with_the_judge_is_said_before_anything_runs(recipe, words, said):
    with pytest.raises(UserError, match=said):
        load_stages(recipe, words, "run")


def test_a_suite_in_a_run_is_refused_before_it_trains(recipe, tmp_path):
    with pytest.raises(UserError, match="leave suite= out"):
        load_stages(recipe, ["eval.suite=gsm8k", f"eval.data={tmp_path}"], "run")


def test_a_recipe_in_the_run_folder_is_not_overwritten_by_the_options_of_a_stage(recipe, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/eval.yaml").write_text("limit: 2\n")
    with pytest.raises(UserError, match="eval.yaml is no file of a run"):
        run(recipe, [f"out={tmp_path / 'mine'}"])
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["eval.yaml"]


def test_a_page_that_fails_is_said_and_costs_no_run(capsys):
    run_module.draw("report.html", lambda: 1 / 0, print)
    assert "report.html could not be written, everything else is saved (ZeroDivisionError" in capsys.readouterr().out


def test_minutes_that_a_crash_left_empty_are_said_and_counted_anew(tmp_path, capsys):
    for text, least, said in (("", 0, "minutes is damaged"), ("7.5\n", 7.5, "")):
        (tmp_path / "minutes").write_text(text)
        assert least <= run_module.clock(tmp_path / "minutes", print)() < least + 1
        assert said in capsys.readouterr().out
