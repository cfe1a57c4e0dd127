"""A suite: every set as a lone evaluation would be, one model for all, and what a stop leaves goes on."""

import csv
import json
import os
import signal

import pytest
from toy import make_config, write_problems

from minimath.config.schema import EvalConfig
from minimath.core import interrupt
from minimath.core.errors import Interrupted, UserError
from minimath.core.log import RunLog
from minimath.core.run_folder import PART, SUITE
from minimath.eval import evaluate as evaluation
from minimath.eval.evaluate import evaluate
from minimath.eval.metrics import read_records
from minimath.eval.suite import SETS, chosen_sets, read_sets
from minimath.grading.answer import AnswerChecker
from minimath.report.page import report


@pytest.fixture
def folder(tmp_path):
    """A folder with three sets, small."""
    at = tmp_path / "data"
    at.mkdir()
    write_problems(at / "gsm8k_test.jsonl", n=4)
    write_problems(at / "math500.jsonl", n=3, seed=1)
    with open(at / "svamp.csv", "w", encoding="utf-8", newline="") as file:  # as the hub has it
        rows = [("ID", "Body", "Question", "Answer"), ("chal-1", "Tom has 8 pens.", "How many are 8 and 7?", "15.0")]
        csv.writer(file).writerows(rows)
    return at


@pytest.fixture
def options(tiny_dir, folder):
    return {"model": tiny_dir, "data": str(folder), "max_new_tokens": 8, "max_num_seqs": 2}


@pytest.fixture
def config(options, tmp_path):
    def make(sets="gsm8k,math500", out="suite", **changed):
        return make_config(EvalConfig, **{**options, "suite": sets, "out": str(tmp_path / out), **changed})

    return make


def files(out):
    """The files of a suite that may not depend on interrupts, without the speed."""
    found = {path.name: json.loads((path / "eval.json").read_text()) for path in out.iterdir() if path.is_dir()}
    total = json.loads((out / SUITE).read_text())
    for summary in (*found.values(), *total["sets"].values()):
        del summary["tokens_per_s"]
    return found, total, {name: (out / name / "completions.jsonl").read_bytes() for name in found}


# ---- which sets


def test_an_unknown_set_is_named_with_the_nearest(config):
    for name, near in (("gsm8", "gsm8k"), ("MATH-500", "math500"), ("aime2025", "aime25")):
        with pytest.raises(UserError, match=f"unknown set '{name}'.*did you mean '{near}'"):
            evaluate(config(name))


@pytest.mark.parametrize("words, error", [
    ({"sets": ","}, "names no set"), ({"sets": "gsm8k,gsm8k"}, "occurs twice"),
    ({"sets": "a/b=x.jsonl"}, "NAME=FILE"), ({"sets": "mine="}, "NAME=FILE"),
    ({"sets": "gsm8k,stop=x.jsonl"}, "'stop=x.jsonl' must be .* none of adapter"), ({"sets": "Eval.json=x"}, "none of"),
    ({"data": "x.jsonl"}, "data=x.jsonl: no such folder; .* gsm8k.jsonl.* suite=gsm8k,math500,NAME=FILE"),
    ({"data": "/nowhere"}, "no such folder"), ({"samples": 4}, "would repeat one text"),
])
def test_what_makes_no_suite_is_said_before_anything_is_loaded(config, words, error, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation, "load_and_say", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=error):
        evaluate(config(**words))
    assert not (tmp_path / "suite").exists()


# ---- where problems come from


def test_the_columns_of_the_hub_become_problem_and_answer(monkeypatch, config):
    hub = {
        "gsm8k": {"question": "2 and 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
        "math500": {"problem": "x?", "solution": "\\boxed{\\frac12}", "answer": "\\frac12", "unique_id": "t/1.json"},
        "aime24": {"id": 60, "problem": "m+n?", "solution": "\\boxed{025}", "answer": "025", "url": ""},
        "aime25": {"problem": "b?", "answer": "70", "id": "0"},
        "svamp": {"ID": "c", "Body": "Tom has 8 pens. ", "Question": "And 7 more?", "Answer": "15.0"},
    }
    asked = []

    def load_dataset(name, part, *, split, **_):
        asked.append((name + (f":{part}" if part else ""), split))
        return [hub[next(key for key, known in SETS.items() if known.source == asked[-1][0])]]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    sets = read_sets(config(",".join(SETS), data=""))
    got = {name: (one.examples[0].problem, one.examples[0].answer) for name, one in sets.items()}
    assert got == {"gsm8k": ("2 and 3?", "5"), "math500": ("x?", "\\frac12"), "aime24": ("m+n?", "025"),
                   "aime25": ("b?", "70"), "svamp": ("Tom has 8 pens. And 7 more?", "15.0")}
    assert asked == [(known.source, known.split) for known in SETS.values()]
    with AnswerChecker() as checker:
        assert all(checker.equal(*pair) for pair in (("15", "15.0"), ("25", "025")))


def test_a_file_of_the_folder_needs_no_hub_and_another_size_is_said(monkeypatch, config):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    sets = read_sets(config("svamp,gsm8k", limit=3))
    assert [len(one.examples) for one in sets.values()] == [1, 3]
    _, [example], note = sets["svamp"]
    assert (example.problem, example.answer) == ("Tom has 8 pens. How many are 8 and 7?", "15.0")
    assert "1 problems, svamp as published has 300" in note
    assert sets["gsm8k"].cfg.data.source.endswith("gsm8k_test.jsonl") and "limit=3 takes" in sets["gsm8k"].note


def test_without_hub_and_file_the_file_to_make_is_named(config, monkeypatch, folder):
    def offline(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(UserError) as caught:
        evaluate(config("gsm8k,aime25"))
    assert str(folder / "aime25.jsonl") in str(caught.value) and "problem and answer" in str(caught.value)
    with pytest.raises(UserError, match="Body, Question and Answer, .*FOLDER/svamp.jsonl and add data=FOLDER"):
        evaluate(config("svamp", data=""))


def test_a_bad_row_of_a_named_set_is_refused(config, folder):
    with open(folder / "gsm8k_test.jsonl", "a", encoding="utf-8") as file:
        file.write('{"problem": "1 + 1 = ?"}\n')
    with pytest.raises(UserError, match="gsm8k_test.jsonl:5: no answer"):
        evaluate(config())


def test_own_problems_are_a_set_and_unreadable_gold_answers_are_counted(config, tmp_path, capsys, monkeypatch):
    rows = [{"id": "good", "problem": "1 + 1 = ?", "answer": "2"}, {"id": "bad", "problem": "Which?", "answer": "}{"}]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(evaluation, "final_answer", lambda *_: "2")
    result = evaluate(config(f"mine={tmp_path / 'my.jsonl'},math500"))
    assert list(result["sets"]) == ["mine", "math500"]
    assert [result["sets"][name]["bad_gold"] for name in ("mine", "math500")] == [1, 0]
    [line] = [line for line in capsys.readouterr().out.splitlines() if "gave up" in line]
    assert "the gold answer of 1 problem" in line and "'}{' (bad)" in line


# ---- what comes out


def test_each_set_is_what_a_lone_evaluation_leaves_and_the_model_is_loaded_once(config, tmp_path, monkeypatch, folder):
    loads, load = [], evaluation.load_and_say
    monkeypatch.setattr(evaluation, "load_and_say", lambda *a: loads.append(1) or load(*a))
    result = evaluate(config(budgets="4,8"))
    assert loads == [1]
    lone = config("", "lone", data=str(folder / "math500.jsonl"), budgets="4,8")
    assert result["sets"]["math500"] | {"tokens_per_s": 0} == evaluate(lone) | {"tokens_per_s": 0}
    for name in ("completions.jsonl", "fingerprint.json"):
        assert (tmp_path / "lone" / name).read_bytes() == (tmp_path / "suite" / "math500" / name).read_bytes()


def test_samples_and_budgets_have_columns_of_their_own(config, capsys):
    result = evaluate(config(samples=4, temperature=0.9, budgets="8000,16000"))
    assert all(one["avg@4"] == one["accuracy"] and {"pass@4", "maj@4"} <= set(one) for one in result["sets"].values())
    *_, header, _, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ("set problems accuracy 95% interval mean tokens tokens per correct correct steps "
                              "finished pass@4 maj@4 accuracy@8000 accuracy@16000").split()
    assert [line.split()[:2] for line in (first, second)] == [["gsm8k", "4"], ["math500", "3"]]


def test_a_completion_beyond_the_budget_is_wrong_in_the_table_too(config, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(evaluation, "final_answer", lambda *_: "12")
    monkeypatch.setattr(AnswerChecker, "equal", lambda *_: True)
    lengths = {"gsm8k": [3, 4, 5, 8], "math500": [4, 8, 8]}
    evaluate(config())
    for name, sizes in lengths.items():  # the same records, of known lengths
        at = tmp_path / "suite" / name
        rows = [row | {"tokens": n, "finished": True, "correct": True} for row, n in zip(read_records(at), sizes)]
        (at / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    capsys.readouterr()
    result = evaluate(config(budgets="4,5", resume=True))  # complete, and asked for budgets that it lacks
    assert [result["sets"][name]["accuracy@4"] for name in lengths] == pytest.approx([1 / 2, 1 / 3])
    *_, header, _, first, second = capsys.readouterr().out.splitlines()
    assert header.split()[-2:] == ["accuracy@4", "accuracy@5"]
    assert [line.split()[-2:] for line in (first, second)] == [["50.0%", "75.0%"], ["33.3%", "33.3%"]]


# ---- interrupts


@pytest.mark.parametrize("within", [2, 8, 11])
def test_stopped_within_and_between_sets_and_resumed_equals_unbroken(config, tmp_path, monkeypatch, capsys, within):
    """Two interrupts: while the nth completion is kept, and when the results of the first set are being written."""
    more = {"samples": 2, "temperature": 1.0}
    evaluate(config(out="unbroken", **more))
    add, write, count = RunLog.append, evaluation.write_results, [0, 0]

    def interrupted_add(self, *completion):
        add(self, *completion)
        count[0] += 1
        if count[0] == within:
            os.kill(os.getpid(), signal.SIGINT)

    def interrupted_write(*results):
        write(*results)
        count[1] += 1
        if count[1] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunLog, "append", interrupted_add)
    monkeypatch.setattr(evaluation, "write_results", interrupted_write)
    stops = []
    for attempt in range(4):
        try:
            evaluate(config(resume=attempt > 0, **more))
            break
        except Interrupted as stopped:
            stops.append(stopped.args[0])
            said = capsys.readouterr().out.splitlines()[-1]
            assert f"of 2 sets are complete; the same command with out={tmp_path / 'suite'} resume=true" in said
            assert not (tmp_path / "suite" / SUITE).exists()
    assert sorted(stops) == [signal.SIGINT, signal.SIGTERM]
    assert files(tmp_path / "suite") == files(tmp_path / "unbroken")
    assert not list((tmp_path / "suite").rglob(PART))


def test_a_stop_file_in_the_folder_of_the_suite_stops_the_set(config, tmp_path, monkeypatch):
    add = RunLog.append

    def touch(self, *completion):
        add(self, *completion)
        (tmp_path / "suite" / "stop").touch()

    monkeypatch.setattr(interrupt, "LOOK_S", 0)
    monkeypatch.setattr(RunLog, "append", touch)
    with pytest.raises(Interrupted):
        evaluate(config())
    assert (tmp_path / "suite" / "gsm8k" / PART).exists() and not (tmp_path / "suite" / "math500").exists()


def test_a_complete_suite_is_read_without_its_model_and_grows_by_a_set(config, tmp_path, monkeypatch):
    evaluate(config("gsm8k"))
    with pytest.raises(UserError, match="already holds a suite .*resume=true"):
        evaluate(config("gsm8k"))
    first = evaluate(config("gsm8k,math500", resume=True))
    monkeypatch.setattr(evaluation, "load_and_say", lambda *_: pytest.fail("a model was loaded"))
    assert evaluate(config("gsm8k,math500", resume=True)) == json.loads(json.dumps(first))


def test_a_changed_option_is_refused_before_other_sets_are_sampled(config, tmp_path):
    evaluate(config("math500"))
    with pytest.raises(UserError, match="suite/math500 was begun with something else: max_new_tokens was 8"):
        evaluate(config("gsm8k,math500", resume=True, max_new_tokens=9))
    assert not (tmp_path / "suite" / "gsm8k").exists()


def test_a_folder_with_a_lone_evaluation_is_not_filled_with_a_evaluate(config, folder):
    evaluate(config("", data=str(folder / "math500.jsonl")))
    with pytest.raises(UserError, match="no suite"):
        evaluate(config("gsm8k", resume=True))


# ---- the command, and the report


def test_the_command_writes_what_the_report_compares(here, options, folder, tmp_path):
    words = [f"{name}={value}" for name, value in options.items()] + ["device=cpu", "dtype=fp32", "suite=gsm8k,math500"]
    for seed in (1, 2):
        status, out, err = here("eval", *words, "temperature=1", f"seed={seed}", f"out=runs/model{seed}")
        assert status == 0, err
        assert out.splitlines()[-1].startswith("math500 ")
    result = report(["runs/model1", "runs/model2", "out=both"])
    page = (tmp_path / result["page"]).read_text(encoding="utf-8")
    assert page.count("<h2>Suite: model") == 2 and page.count("against model1") == 2  # a set each
    assert page.index("<h2>gsm8k</h2>") < page.index("<h2>math500</h2>")
    assert {"tradeoff-gsm8k.png", "lengths-math500.png"} <= {path.name for path in (tmp_path / "both/plots").iterdir()}
    status, _, err = here("eval", "suite=gsm")
    assert status == 2 and "did you mean 'gsm8k'" in err


def test_chosen_sets_keep_their_order_and_files():
    assert chosen_sets("svamp, mine=a=b.jsonl,gsm8k,") == {"svamp": "", "mine": "a=b.jsonl", "gsm8k": ""}
