"""One evaluation end to end: what it grades, counts, says and leaves."""

import contextlib
import json
import statistics

import pytest
from toy import make_config, policy_of, write_problems

import minimath.eval.evaluate as module
from minimath.config.schema import EvalConfig
from minimath.core.errors import UserError
from minimath.core.log import RunLog
from minimath.data.examples import Example
from minimath.data.sample import Sample
from minimath.eval.evaluate import evaluate, evaluate_policy
from minimath.eval.metrics import read_records
from minimath.grading.answer import AnswerChecker
from minimath.grading.sandbox import LATE, BoundedChild


@pytest.fixture
def options(tiny_dir, tmp_path):
    return {"model": tiny_dir, "data": write_problems(tmp_path / "test.jsonl", n=5), "out": str(tmp_path / "eval"),
            "max_new_tokens": 8}


@pytest.fixture
def run(tiny_dir, tmp_path, monkeypatch):
    """run(examples, engine, **options) -> (summary, records) of a tiny model, or of an engine."""
    def run(examples, engine=None, **options):
        policy = policy_of(tiny_dir, max_new_tokens=4, **options)
        cfg = make_config(EvalConfig, tiny_dir, max_new_tokens=4, **options)
        if engine:
            monkeypatch.setattr(module, "open_engine", lambda *args, **options: contextlib.nullcontext(engine))
        with RunLog(tmp_path / "log", "test") as log:
            return evaluate_policy(policy, examples, cfg, log)

    return run


class Writes:
    """An engine whose completions have these texts, the same for each problem."""

    def __init__(self, *texts, finished=True):
        self.samples = [Sample(list(range(1, len(text) + 1)), [], finished, text) for text in texts]

    def stream(self, prompts, n=1, *, keys=None, skip=frozenset()):
        assert n == len(self.samples)
        yield []
        for p in reversed(range(len(prompts))):  # they finish in any order
            yield [(p, s, self.samples[s]) for s in reversed(range(n)) if (p, s) not in skip]


# ---- end to end


def test_greedy_evaluation_end_to_end(options, tmp_path, capsys):
    summary = evaluate(make_config(EvalConfig, **options, budgets="4,8"))
    assert (summary["problems"], summary["samples"]) == (5, 1) and summary["mean_tokens"] <= 8
    assert json.loads((tmp_path / "eval" / "eval.json").read_text()) == json.loads(json.dumps(summary))
    lines = [json.loads(line) for line in (tmp_path / "eval" / "completions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"p{i}" for i in range(5)]
    assert all(len(line["text"]) > 0 and line["gold"] for line in lines)
    assert list(lines[0]) == ["number", "id", "problem", "gold", "sample", "text", "answer", "correct", "tokens",
                              "finished", "correct_steps", "steps"]
    shown = capsys.readouterr().out
    assert "95% interval" in shown and "accuracy@8" in shown


def test_a_budget_above_max_new_tokens_is_said_to_measure_the_cut(options, capsys):
    evaluate(make_config(EvalConfig, **options, budgets="4,4096"))
    assert f"budgets=4096: completions are cut at max_new_tokens={options['max_new_tokens']}" in capsys.readouterr().out


def test_an_existing_evaluation_is_not_overwritten(options):
    evaluate(make_config(EvalConfig, **options))
    with pytest.raises(UserError, match="already holds") as caught:
        evaluate(make_config(EvalConfig, **options))
    assert "resume" not in str(caught.value)  # nothing is left to go on with


def test_sampled_evaluation_reports_pass_and_majority(options):
    summary = evaluate(make_config(EvalConfig, **options, samples=3, temperature=1.0))
    assert {"pass@1", "pass@2", "pass@3", "maj@3"} <= summary.keys() and summary["avg@3"] == summary["accuracy"]
    again = evaluate(make_config(EvalConfig, **{**options, "out": options["out"] + "2"}, samples=3, temperature=1.0))
    assert again | {"tokens_per_s": 0} == summary | {"tokens_per_s": 0}


def test_several_greedy_samples_are_refused(options, tmp_path):
    with pytest.raises(UserError, match="would repeat one text"):
        evaluate(make_config(EvalConfig, **options, samples=3))
    assert not (tmp_path / "eval").exists()


def test_a_complete_evaluation_gets_the_budgets_it_lacks_from_its_completions(options, tmp_path, capsys):
    evaluate(make_config(EvalConfig, **options))
    rows = [row | {"correct": True, "finished": True, "tokens": n}
            for n, row in enumerate(read_records(tmp_path / "eval"), 1)]
    (tmp_path / "eval" / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "warning: budgets" not in capsys.readouterr().out
    summary = evaluate(make_config(EvalConfig, **options, budgets="2,4", resume=True))
    assert (summary["accuracy@2"], summary["accuracy@4"]) == (2 / 5, 4 / 5)
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["accuracy@2"] == 2 / 5
    (tmp_path / "eval" / "completions.jsonl").unlink()
    with pytest.raises(UserError, match="completions.jsonl is gone, and budgets=8 is counted from it"):
        evaluate(make_config(EvalConfig, **options, budgets="8", resume=True))


# ---- what is counted


def test_a_problem_longer_than_max_prompt_len_counts_as_wrong(run):
    examples = [Example("1 + 1 = ?", answer="2"), Example("long " * 200, answer="2")]
    summary, records = run(examples, max_prompt_len=60)
    assert summary["problems"] == 2 and not records[1]["correct"] and records[1]["problem"].startswith("long")
    assert (records[1]["text"], records[1]["tokens"], records[1]["finished"]) == ("", 0, False)
    with pytest.raises(UserError, match="max_prompt_len=2"):
        run(examples, max_prompt_len=2)


def test_a_problem_that_occurs_twice_counts_twice(run):
    """Also when all samples of both are correct, which breaks pass@k if they are merged."""
    examples = [Example("1 + 1 = ?", answer="2")] * 2
    summary, _ = run(examples, Writes("\\boxed{2}", "so 2"), samples=2, temperature=1.0)
    assert (summary["problems"], summary["accuracy"], summary["pass@2"]) == (2, 1.0, 1.0)


def test_grades_follow_the_text(run):
    engine = Writes("2 + 2 = 5, so \\boxed{4}", "1 + 1 = 2. 2 + 2 = 4 \\boxed{3}")
    summary, records = run([Example("2 + 2?", answer="4")], engine, samples=2, temperature=1.0)
    assert [(r["correct"], r["correct_steps"], r["steps"], r["answer"]) for r in records] == [
        (True, 0, 1, "4"), (False, 2, 2, "3")]
    assert summary["accuracy"] == 0.5 and summary["correct_steps"] == pytest.approx(2 / 3)
    assert summary["mean_tokens"] == statistics.fmean(len(record["text"]) for record in records)


def test_what_the_checker_gave_up_on_is_counted_and_said_in_one_line(run, monkeypatch, capsys):
    """Problems without a readable gold answer, not the comparisons with it or those of maj@k."""
    readable = Example("1 + 1 = ?", answer="2", id="fine")
    odd = Example("Which?", answer="}{{", id="odd")
    monkeypatch.setattr(module, "final_answer", lambda *_: "}{")
    summary, _ = run([readable, odd], samples=4, temperature=1.0)
    assert (summary["bad_gold"], summary["checker_timeouts"]) == (1, 0)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "gave up" in line]
    assert "the gold answer of 1 problem," in line and "'}{{' (odd)" in line and "too long" not in line

    monkeypatch.setattr(BoundedChild, "ask", late)
    monkeypatch.setattr(module, "final_answer", lambda *_: "\\sqrt{4}")
    summary, _ = run([readable])
    assert (summary["bad_gold"], summary["checker_timeouts"]) == (0, 1)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "gave up" in line]
    assert "1 comparison of answers took too long" in line and "gold" not in line


def late(child, *_):
    child.timeouts += 1
    return LATE


def test_a_checker_that_read_everything_is_not_mentioned(run, capsys):
    summary, _ = run([Example("1 + 1 = ?", answer="2")])
    assert (summary["bad_gold"], summary["checker_timeouts"]) == (0, 0) and "gave up" not in capsys.readouterr().out


@pytest.mark.parametrize("text, answer", [
    ("2 + 2 = 4", None), ("The answer is 4", None), ("#### 4", None),
    (r"so \boxed{4}", "4"), (r"so \boxed{4}. Now I check: 2 + 3 = 5 and", "4"),
    (r"so \boxed{4", None), (r"so \boxed{4} or rather \boxed{5", "4"),
    (r"so \boxed 4", None),  # of \boxed 40, for all we know
    (r"so \boxed 4 and", "4"), ("", None),
])
def test_a_completion_that_was_cut_counts_only_with_a_closed_box(run, text, answer):
    summary, [record] = run([Example("2 + 2?", answer="4")], Writes(text, finished=False))
    assert (record["answer"], record["correct"]) == (answer, answer == "4")
    assert summary["accuracy"] == (answer == "4") and not record["finished"]


@pytest.mark.parametrize("text", ["2 + 2 = 4", "The answer is 4", "#### 4", r"so \boxed 4"])
def test_a_finished_completion_counts_with_any_last_answer(run, text):
    _, [record] = run([Example("2 + 2?", answer="4")], Writes(text))
    assert (record["answer"], record["correct"]) == ("4", True)


def test_the_checker_is_closed_and_the_gold_answer_decides(run, monkeypatch):
    closed = []
    monkeypatch.setattr(AnswerChecker, "close", lambda self: closed.append(1))
    summary, _ = run([Example("2 + 2?", answer="4"), Example("2 + 3?", answer="5")], Writes("\\boxed{4}"))
    assert summary["accuracy"] == 0.5 and closed
