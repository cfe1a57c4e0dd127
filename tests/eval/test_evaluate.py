"""Evaluation: figures against known values and brute force, and one evaluation end to end."""

import itertools
import json
import statistics

import numpy as np
import pytest
from toy import load, make_config, write_problems

import minimath.eval.evaluate as module
from minimath.rollout import open as engines
from minimath.grading.answer import AnswerChecker
from minimath.grading.sandbox import LATE, BoundedChild
from minimath.config.schema import EvalConfig
from minimath.core.errors import Interrupted, UserError
from minimath.data.examples import Example
from minimath.core.stats import bootstrap, paired, pass_at, wilson
from minimath.eval.evaluate import COLUMNS, evaluate, evaluate_model, majority_right, read_records, row, summarise
from minimath.core.log import RunLog
from minimath.rollout.engine import Completion
from minimath.core.run import Stop


def record(number, right, answer="1", tokens=10, ended=True, steps=(1, 2)):
    return {
        "number": number,
        "id": "",
        "problem": "p",
        "gold": "1",
        "answer": answer,
        "right": right,
        "tokens": tokens,
        "ended": ended,
        "right_steps": steps[0],
        "steps": steps[1],
    }


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker() as checker:
        yield checker


# ---- figures


@pytest.mark.parametrize(
    "right, n, low, high",
    [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_equals_published_values(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-4)


def test_pass_at_k_equals_brute_force():
    k = 6
    for right, n in itertools.product(range(k + 1), range(1, k + 1)):
        picks = list(itertools.combinations([True] * right + [False] * (k - right), n))
        assert pass_at(n, k, right) == pytest.approx(statistics.fmean(any(p) for p in picks))


def test_bootstrap_covers_the_mean_and_narrows_with_more_problems():
    values = np.random.default_rng(0).choice([0.0, 0.5, 1.0], 400).tolist()
    low, high = bootstrap(values, 0)
    half = 1.96 * np.std(values) / 20
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.01)
    few = bootstrap(values[:25], 0)
    assert few[1] - few[0] > 2 * (high - low)
    assert bootstrap([0.5] * 9, 0) == (0.5, 0.5) and bootstrap(values, 0) == bootstrap(values, 0)


def test_majority_takes_the_most_frequent_answer(checker):
    def group(*answers):
        return [record(0, a == "1", a) for a in answers]

    assert majority_right(group("2", "1", "1"), checker)
    assert not majority_right(group("2", "2", "1"), checker)
    assert majority_right(group("1", "2"), checker) and not majority_right(
        group("2", "1"), checker
    )  # first of a tie
    assert majority_right(group(None, None, "1"), checker) and not majority_right(group(None, None), checker)


@pytest.mark.parametrize("same", [("1,200", "1200"), (r"\frac{1}{2}", "0.5"), ("x+1", "1 + x")])
def test_equal_answers_vote_together(checker, same):
    """Wrong ones too: two ways of writing one wrong answer outvote a right one, not each other."""
    def group(right, *answers):
        return [record(0, a in right, a) for a in answers]

    assert majority_right(group(same, "7", same[0], "7", same[1], same[0]), checker)
    wrong = group(["7"], "7", same[0], same[1])
    assert not majority_right(wrong, checker)
    assert not majority_right([wrong[1], wrong[2], wrong[0]], checker)


def test_a_majority_that_is_decided_compares_nothing():
    def group(*answers):
        return [record(0, a == "1", a) for a in answers]

    assert majority_right(group("1", "1", "x+1"), None)
    assert not majority_right(group("x+1", "1 + x", "y"), None)


def test_summary_of_hand_made_records(checker):
    records = [
        record(0, True, tokens=8),
        record(0, False, "2", 20),
        record(1, False, None, 16, ended=False),
        record(1, False, "3", 12),
    ]
    cfg = EvalConfig(samples=2, temperature=1.0, budgets="8,100")
    summary = summarise(records, cfg, checker)
    assert (summary["problems"], summary["accuracy"], summary["pass@1"], summary["pass@2"]) == (
        2,
        0.25,
        0.25,
        0.5,
    )
    assert (summary["maj@2"], summary["accuracy@8"], summary["accuracy@100"]) == (0.5, 0.25, 0.25)
    assert (summary["mean_tokens"], summary["median_tokens"], summary["tokens_per_right"]) == (14, 14, 56)
    assert (summary["right_steps"], summary["ended"]) == (0.5, 0.75)


def test_a_budget_counts_only_completions_that_ended_within_it(checker):
    records = [record(0, True, tokens=10), record(1, True, tokens=11), record(2, True, tokens=9, ended=False)]
    summary = summarise(records, EvalConfig(budgets="9,10,11"), checker)
    assert [summary[f"accuracy@{n}"] for n in (9, 10, 11)] == pytest.approx([0, 1 / 3, 2 / 3])
    assert summary["interval"] == wilson(3, 3)


def test_a_table_row_without_right_answers(checker):
    cells = row("base", summarise([record(0, False, steps=(0, 0))], EvalConfig(), checker))
    assert len(cells) == len(COLUMNS) and cells[:2] == ["base", "0.0%"] and cells[4] == "-"


# ---- end to end


@pytest.fixture
def options(tiny_dir, tmp_path):
    return {
        "model": tiny_dir,
        "data": write_problems(tmp_path / "test.jsonl", n=5),
        "out": str(tmp_path / "eval"),
        "max_new_tokens": 8,
    }


def test_greedy_evaluation_end_to_end(options, tmp_path, capsys):
    summary = evaluate(make_config(EvalConfig, **options, budgets="4,8"))
    assert (summary["problems"], summary["samples"]) == (5, 1) and summary["mean_tokens"] <= 8
    assert json.loads((tmp_path / "eval" / "eval.json").read_text()) == json.loads(json.dumps(summary))
    lines = [json.loads(line) for line in (tmp_path / "eval" / "completions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"p{i}" for i in range(5)]
    assert all(len(line["text"]) > 0 and line["gold"] for line in lines)
    shown = capsys.readouterr().out
    assert "95% interval" in shown and "accuracy@8" in shown


def test_an_existing_evaluation_is_not_overwritten(options):
    evaluate(make_config(EvalConfig, **options))
    with pytest.raises(UserError, match="already holds") as caught:
        evaluate(make_config(EvalConfig, **options))
    assert "resume" not in str(caught.value)  # nothing is left to go on with


def test_sampled_evaluation_reports_pass_and_majority(options):
    summary = evaluate(make_config(EvalConfig, **options, samples=3, temperature=1.0))
    assert {"pass@1", "pass@2", "pass@3", "maj@3"} <= summary.keys() and summary["avg@3"] == summary["accuracy"]
    again = evaluate(
        make_config(EvalConfig, **{**options, "out": options["out"] + "2"}, samples=3, temperature=1.0)
    )
    assert {k: v for k, v in again.items() if "per_s" not in k} == {
        k: v for k, v in summary.items() if "per_s" not in k
    }


def test_a_complete_evaluation_gets_the_budgets_it_lacks_from_its_completions(options, tmp_path):
    evaluate(make_config(EvalConfig, **options))
    path = tmp_path / "eval" / "completions.jsonl"
    rows = [row | {"right": True, "ended": True, "tokens": n} for n, row in enumerate(read_records(path.parent), 1)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = evaluate(make_config(EvalConfig, **options, budgets="2,4", resume=True))
    assert (summary["accuracy@2"], summary["accuracy@4"]) == (2 / 5, 4 / 5)
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["accuracy@2"] == 2 / 5


@pytest.fixture
def evaluate_examples(tiny_dir, tmp_path):
    def run(examples, stop=None, **options):
        model, tokenizer = load(tiny_dir)
        cfg = make_config(EvalConfig, tiny_dir, max_new_tokens=4, **options)
        with RunLog(tmp_path / "log", "test") as log:
            return evaluate_model(model, tokenizer, examples, cfg, log, stop)

    return run


def test_a_problem_longer_than_max_prompt_len_counts_as_wrong(evaluate_examples):
    examples = [Example("1 + 1 = ?", answer="2"), Example("long " * 200, answer="2")]
    summary, records = evaluate_examples(examples, max_prompt_len=60)
    assert summary["problems"] == 2 and not records[1]["right"] and records[1]["problem"].startswith("long")
    with pytest.raises(UserError, match="max_prompt_len=2"):
        evaluate_examples(examples, max_prompt_len=2)


def test_a_problem_that_occurs_twice_counts_twice(evaluate_examples, monkeypatch):
    """Also when all samples of both are right, which breaks pass@k if they are merged."""
    monkeypatch.setattr(AnswerChecker, "equal", lambda *_: True)
    monkeypatch.setattr(module, "boxed_before_cut", lambda _: "2")
    summary, _ = evaluate_examples([Example("1 + 1 = ?", answer="2")] * 2, samples=2, temperature=1.0)
    assert (summary["problems"], summary["accuracy"], summary["pass@2"]) == (2, 1.0, 1.0)


def test_grades_follow_the_text(evaluate_examples, monkeypatch, tiny_tokenizer):
    texts = ["2 + 2 = 5, so \\boxed{4}", "1 + 1 = 2. 2 + 2 = 4 \\boxed{3}"]
    made = [[Completion(tiny_tokenizer(t, add_special_tokens=False)["input_ids"], [], True)] for t in texts]
    monkeypatch.setattr(engines, "generate", lambda *a, **k: made)
    summary, records = evaluate_examples([Example("2 + 2?", answer="4")] * 2)
    assert [(r["right"], r["right_steps"], r["steps"], r["answer"]) for r in records] == [
        (True, 0, 1, "4"),
        (False, 2, 2, "3"),
    ]
    assert summary["accuracy"] == 0.5 and summary["right_steps"] == pytest.approx(2 / 3)


def test_what_the_checker_gave_up_on_is_counted_and_said_in_one_line(evaluate_examples, monkeypatch, capsys):
    """Problems without a readable gold answer, not the comparisons with it or those of maj@k."""
    readable = Example("1 + 1 = ?", answer="2", id="fine")
    monkeypatch.setattr(module, "boxed_before_cut", lambda _: "}{")
    summary, _ = evaluate_examples([readable, Example("Which?", answer="}{{", id="odd")], samples=4, temperature=1.0)
    assert (summary["bad_gold"], summary["checker_timeouts"]) == (1, 0)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "gave up" in line]
    assert "the gold answer of 1 problem," in line and "'}{{' (odd)" in line and "too long" not in line

    monkeypatch.setattr(BoundedChild, "ask", late)
    monkeypatch.setattr(module, "boxed_before_cut", lambda _: "\\sqrt{4}")
    summary, _ = evaluate_examples([readable])
    assert (summary["bad_gold"], summary["checker_timeouts"]) == (0, 1)
    [line] = [line for line in capsys.readouterr().out.splitlines() if "gave up" in line]
    assert "1 comparison of answers took too long" in line and "gold" not in line


def late(child, *_):
    child.timeouts += 1
    return LATE


def test_a_checker_that_read_everything_is_not_mentioned(evaluate_examples, capsys):
    summary, _ = evaluate_examples([Example("1 + 1 = ?", answer="2")])
    assert (summary["bad_gold"], summary["checker_timeouts"]) == (0, 0) and "gave up" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, answer",
    [
        ("2 + 2 = 4", None),
        ("The answer is 4", None),
        ("#### 4", None),
        (r"so \boxed{4}", "4"),
        (r"so \boxed{4}. Now I check: 2 + 3 = 5 and", "4"),
        (r"so \boxed{4", None),
        (r"so \boxed{4} or rather \boxed{5", "4"),
        (r"so \boxed 4", None),  # of \boxed 40, for all we know
        (r"so \boxed 4 and", "4"),
        ("", None),
    ],
)
def test_a_completion_that_was_cut_counts_only_with_a_closed_box(
    evaluate_examples, monkeypatch, tiny_tokenizer, text, answer
):
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(engines, "generate", lambda *a, **k: [[Completion(ids, [], False)]])
    summary, [record] = evaluate_examples([Example("2 + 2?", answer="4")])
    assert (record["answer"], record["right"]) == (answer, answer == "4")
    assert summary["accuracy"] == (answer == "4") and not record["ended"]


def test_a_signal_stops_the_evaluation_and_keeps_its_number(evaluate_examples):
    stop = Stop(0)
    stop.signal = 15
    with pytest.raises(Interrupted) as caught:
        evaluate_examples([Example("1 + 1 = ?", answer="2")], stop)
    assert caught.value.args == (15,)


def test_paired_differences_are_narrower_than_unpaired_ones_and_skip_other_problems():
    def rows(rights):
        return [record(n, right) | {"problem": f"p{n}"} for n, right in enumerate(rights)]

    hard = [n % 2 == 0 for n in range(60)]
    mean, low, high = paired(rows([r or n % 10 == 1 for n, r in enumerate(hard)]), rows(hard))
    assert mean == pytest.approx(0.1) and 0 < low < mean < high < 0.2
    several = [record(0, right) for right in (True, False, False, False)]  # four samples of one problem
    assert paired(several, [record(0, True)])[0] == pytest.approx(-0.75)
    with pytest.raises(UserError, match="no problem in common"):
        paired(rows([True]), [record(0, True) | {"problem": "another"}])
