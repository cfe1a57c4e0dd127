"""Training of a judge: end to end, stopped and resumed anywhere to the same bits, and refused before long work."""
import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from toy import before_call, make_config, metrics, same_tensors, without_times

from minimath.core.errors import Interrupted, UserError
from minimath.core.log import RunLog
from minimath.judges.calibrate import Calibration
from minimath.judges.card import read_card
from minimath.judges.known import problem_hash
from minimath.train import judge as judge_file
from minimath.train.judge import JudgeConfig, cut, judge_train


@pytest.fixture
def judge(ending_dir, few, tmp_path):
    """judge(name, **options) -> (summary, run folder) of a judge of the tiny Llama."""
    def run(name="judge", **options):
        options = {"data": few, "steps": 2, "batch_size": 4, "lora_r": 4, "lr": 1e-2, "samples": 4, "held_out": 0.3,
                   "max_new_tokens": 12, "save_every": 0, "warmup": 0.0} | options
        return judge_train(make_config(JudgeConfig, ending_dir, out=str(tmp_path / name), **options)), tmp_path / name
    return run


def left(run: Path) -> tuple:
    """What a run leaves: weights, card, solutions without the clock, metrics."""
    def refuse(word):
        raise AssertionError(f"{word} in judge.json")
    card = json.loads((run / "adapter/judge.json").read_text(), parse_constant=refuse)
    solutions = sorted((run / "rollouts/completions.jsonl").read_text().splitlines())
    return card, solutions, without_times(metrics(run))


def weights(run: Path) -> dict:
    return load_file(run / "adapter/adapter_model.safetensors")


def assert_same(one: Path, two: Path):
    assert left(one) == left(two) and same_tensors(weights(one), weights(two))


def kill(number=signal.SIGINT):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("form", ["single", "pair"])
def test_a_judge_is_trained_measured_and_judges_an_rl_run(judge, rl, form):
    summary, run = judge(form=form)
    card = read_card(run / "adapter")
    assert summary["steps"] == 2 and card.form == form and card.problems and card.figures["pairs"]
    out = rl(judge="self", judge_adapter=str(run), judge_refresh=1, judge_canary_every=1)
    of_steps = metrics(out)
    assert all("judge/comparisons" in m and "canary/worse_wins" in m for m in of_steps)
    assert "judge/refresh_loss" in of_steps[-1]
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (run / "adapter", out / "judge"))
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)


def test_problems_of_the_card_are_those_trained_on_and_none_held_out(judge, few):
    _, run = judge(form="single")
    card, every = read_card(run / "adapter"), {problem_hash(json.loads(line)["problem"]) for line in open(few)}
    held_out = every - set(card.problems)
    assert set(card.problems) < every and held_out
    assert not {problem_hash(problem) for problem, _, _ in card.pairs} & set(card.problems)


# ---- stopped and resumed

def test_stopped_while_it_samples_and_resumed_equals_unbroken(judge, tmp_path, monkeypatch, capsys, one_thread):
    _, whole = judge("whole", steps=3)
    stop_file = tmp_path / "broken" / "stop"
    for number, how in ((3, kill()), (9, stop_file.touch), (20, kill(signal.SIGTERM))):
        with monkeypatch.context() as patch:
            before_call(patch, RunLog, "append", number, how)
            patch.setattr("minimath.core.interrupt.LOOK_S", 0.0)
            with pytest.raises(Interrupted):
                judge("broken", steps=3, resume=(tmp_path / "broken").exists())
        assert "goes on from there with the same words" in capsys.readouterr().out and not stop_file.exists()
        assert not (tmp_path / "broken/adapter").exists()
    judge("broken", steps=3, resume=True)
    assert_same(whole, tmp_path / "broken")


@pytest.mark.parametrize("form", ["single", "pair"])
def test_stopped_in_training_and_resumed_equals_unbroken(judge, tmp_path, monkeypatch, form, one_thread):
    options = {"form": form, "steps": 4, "lora_dropout": 0.2, "attacked": 0.2, "made": 1.0}
    _, whole = judge("whole", **options)
    with monkeypatch.context() as patch:
        before_call(patch, judge_file, "learn", 2, kill())
        summary, broken = judge("broken", **options)
    assert summary["signal"] == signal.SIGINT and summary["steps"] == 2 and "held_out" not in summary
    assert not (broken / "adapter/judge.json").exists()
    with monkeypatch.context() as patch:
        before_call(patch, judge_file, "learn", 1, lambda: (broken / "stop").touch())
        assert judge("broken", resume=True, **options)[0]["steps"] == 3
    summary, _ = judge("broken", resume=True, **options)
    assert summary["steps"] == 4 and summary["signal"] == 0
    assert_same(whole, broken)


def test_a_resume_without_a_folder_is_refused(few):
    with pytest.raises(UserError, match="needs the run folder to go on with"):
        judge_train(JudgeConfig(data=few, resume=True))


def test_stopped_while_it_is_measured_there_is_no_card_until_it_is(judge, monkeypatch, one_thread, capsys):
    _, whole = judge("whole")
    with monkeypatch.context() as patch:
        before_call(patch, judge_file, "measure_judge", 1, kill())
        summary, broken = judge("broken")
    assert summary["signal"] == signal.SIGINT and summary["steps"] == 2
    assert (broken / "adapter").exists() and not (broken / "adapter/judge.json").exists()
    said = capsys.readouterr().out
    assert f"before the judge was measured; go on with out={broken} resume=true" in said and "not counted" not in said
    with pytest.raises(UserError, match="no readable judge.json"):
        read_card(broken / "adapter")
    judge("broken", resume=True)
    assert_same(whole, broken)


def test_a_crash_in_training_and_resumed_equals_unbroken(judge, tmp_path, monkeypatch, one_thread):
    _, whole = judge("whole", steps=3, save_every=1)
    with monkeypatch.context() as patch:
        before_call(patch, judge_file, "learn", 3, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            judge("broken", steps=3, save_every=1)
    judge("broken", steps=3, save_every=1, resume=True)
    assert_same(whole, tmp_path / "broken")


def test_memory_that_runs_out_gives_the_same_judge_but_for_rounding(judge, monkeypatch, one_thread):
    _, whole = judge("whole", steps=1)

    def no_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with monkeypatch.context() as patch:
        patch.setattr("minimath.train.sft.hidden_states", failing_once(no_memory))
        _, small = judge("small", steps=1)
    one, two = weights(whole), weights(small)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-3)


def failing_once(fail):
    from minimath.train.sft import hidden_states
    due = [True]

    def once(*args, **kwargs):
        if due.pop() if due else False:
            fail()
        return hidden_states(*args, **kwargs)
    return once


# ---- refused before long work

@pytest.fixture
def no_sampling(monkeypatch):
    def sampled(cfg):
        raise AssertionError("the policy was asked")
    monkeypatch.setattr(judge_file, "evaluate", sampled)


def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_was(judge, no_sampling, train):
    _, run = train("judge", steps=1)
    before = sorted(path.name for path in run.rglob("*"))
    with pytest.raises(UserError, match="already holds a run; .*choose another out="):
        judge()
    assert sorted(path.name for path in run.rglob("*")) == before  # eval.yaml and rollouts/ were made in it


def test_rollouts_of_another_judge_are_refused(judge):
    judge(steps=1)
    with pytest.raises(UserError, match="already holds a run"):
        judge(steps=1)
    with pytest.raises(UserError, match="samples|completions"):
        judge(steps=1, samples=3, resume=True)


@pytest.mark.parametrize("options, words", [
    ({"held_out": 0.01}, "12 problems leave none to train on or none to hold out with held_out=0.01"),
    ({"held_out": 0.99999}, "leave none to train on"), ({"limit": 1}, "1 problems leave none"),
    ({"rubric": "law"}, "a judge of form=single reads no rubric"), ({"samples": 0, "sampled": 3}, "sampled=3, but"),
    ({"form": "pair", "rubric": "brif"}, "did you mean 'brief'"), ({"data": "nowhere.jsonl"}, "nowhere.jsonl")])
def test_what_cannot_work_is_said_before_the_policy_is_asked(judge, no_sampling, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        judge(**options)
    assert not (tmp_path / "judge").exists()


@pytest.mark.parametrize("options, words", [
    ({"held_out": 0.0}, "held_out must be above 0"), ({"held_out": 1.0}, "none to hold out with held_out=1"),
    ({"attacked": 1.0}, "attacked must be .*below 1"), ({"made": -1.0}, "made must not be negative"),
    ({"samples": -1}, "samples must not be negative"), ({"form": "steps"}, "form must be .*single.*pair"),
    ({"batch_size": 0}, "batch_size must be above 0"), ({"steps": -1}, "steps must not be negative"),
    ({"max_len": 0}, "max_len must be above 0"), ({"epochs": 0.0}, "epochs must be above 0")])
def test_options_out_of_bounds_are_said_by_name(judge, options, words):
    with pytest.raises(UserError, match=words):
        judge(**options)


# ---- batches

def test_every_epoch_takes_each_set_once_whole_and_in_an_order_of_its_own():
    sets = [[f"{k}.{i}" for i in range(k % 4 + 1)] for k in range(11)]  # rows

    def batches(**options):
        return cut(sets, make_config(JudgeConfig, "m", batch_size=6, seed=1, **options))
    one = batches()
    assert sorted(rows for batch in one for rows in batch) == sorted(sets)
    assert all(6 <= sum(map(len, batch)) < 10 for batch in one[:-1]) and one == batches()
    two = batches(epochs=2.0)
    assert two[:len(one)] == one and sorted(r for b in two for r in b) == sorted(sets * 2) and two[len(one):] != one
    assert batches(epochs=0.5) == one[:round(len(one) / 2)] and batches(epochs=0.01) == one[:1]
    assert batches(steps=3) == one[:3] and batches(steps=len(one) + 1)[:len(one)] == one
    assert len(batches(steps=100)) == 100 and batches(steps=100)[:len(two)] == two
    assert batches(steps=2) != cut(sets, make_config(JudgeConfig, "m", batch_size=6, seed=2, steps=2))


def test_only_the_first_problems_are_sampled_and_held_out(judge, few):
    _, run = judge(sampled=6, held_out=0.5, steps=1)
    rows = [json.loads(line) for line in (run / "rollouts/completions.jsonl").read_text().splitlines()]
    problems = [json.loads(line)["problem"] for line in open(few)]
    assert {row["problem"] for row in rows} == set(problems[:6])
    trained = set(read_card(run / "adapter").problems)
    assert {problem_hash(problem) for problem in problems[6:]} <= trained
    assert trained < {problem_hash(problem) for problem in problems}


# ---- odd policies and data

def test_a_policy_that_is_never_right_trains_a_judge_with_a_readable_card(judge):
    summary, run = judge(form="single", made=0.0)
    card, *_ = left(run)
    assert summary["held_out"]["grades"]["right"] == 0.0 and summary["held_out"]["grades"]["auc"] is None
    assert card["figures"]["grades"]["auc_within"] is None and card["pairs"] == []
    assert summary["held_out"] == card["figures"]


@pytest.mark.parametrize("options, words", [({"form": "pair", "made": 0.0}, "form=pair .*samples of which some"),
                                            ({"max_len": 5}, r"raise max_len \(5\)")])
def test_nothing_to_train_on_is_said(judge, options, words):
    with pytest.raises(UserError, match=words):
        judge(**options)


@pytest.mark.parametrize("form", ["single", "pair"])
def test_made_faults_alone_train_a_judge(judge, form, no_sampling):
    summary, run = judge(form=form, samples=0)
    assert summary["steps"] == 2 and not (run / "rollouts").exists()
    assert read_card(run / "adapter").calibration == Calibration()


def test_data_without_solutions_is_enough(judge, tmp_path):
    rows = [{"problem": f"Tom has {k} apples and buys {k + 7} more. How many?", "answer": str(2 * k + 7)}
            for k in range(2, 14)]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert judge(data=str(tmp_path / "bare.jsonl"), steps=1)[0]["steps"] == 1


# ---- the command line

def test_the_command_says_what_it_takes_and_corrects_a_slip(here):
    status, said, _ = here("judge", "train", "--help")
    assert status == 0 and "form=single" in said and "held_out=0.1" in said and "made=0.5" in said
    for words, hint in ((("judge", "train", "held_ot=0.2"), "held_out"), (("judge", "trian"), "judge train"),
                        (("judge", "train", "sampels=3"), "samples")):
        status, said, error = here(*words)
        assert status == 2 and hint in error and "did you mean" in error
    status, _, error = here("judge", "train")
    assert status == 2 and "data=" in error


def test_a_recipe_has_a_section_for_it_that_other_stages_pass_over(here, few, ending_dir, tmp_path):
    shared = {"model": ending_dir, "device": "cpu", "dtype": "fp32", "data": few, "prompt_template": "{problem}",
              "max_new_tokens": 8, "judge_train": {"steps": 1, "samples": 2, "held_out": 0.3, "lora_r": 2}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(shared))
    status, said, error = here("judge", "train", "r.yaml", "out=j", "judge_train.lr=1e-2")
    assert status == 0, error
    saved = yaml.safe_load((tmp_path / "j/config.yaml").read_text())
    assert (saved["samples"], saved["lora_r"], saved["lr"], saved["steps"]) == (2, 2, 0.01, 1)
    shared["judge_train"]["stepz"] = 1
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(shared))
    status, _, error = here("judge", "train", "r.yaml", "out=k")
    assert status == 2 and "stepz" in error and "steps" in error
