"""Figures of an evaluation against known values and hand-made records."""

import json

import pytest

from minimath.config.schema import EvalConfig
from minimath.core.stats import wilson
from minimath.eval.metrics import COLUMNS, majority_correct, read_records, summarise, table_row, write_results
from minimath.grading.answer import AnswerChecker


def record(number, correct, answer="1", tokens=10, finished=True, steps=(1, 2)):
    return {"number": number, "sample": 0, "id": "", "problem": "p", "gold": "1", "answer": answer,
            "correct": correct, "tokens": tokens, "finished": finished, "correct_steps": steps[0], "steps": steps[1]}


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker() as checker:
        yield checker


def test_majority_takes_the_most_frequent_answer(checker):
    def group(*answers):
        return [record(0, a == "1", a) for a in answers]

    assert majority_correct(group("2", "1", "1"), checker)
    assert not majority_correct(group("2", "2", "1"), checker)
    assert majority_correct(group("1", "2"), checker)  # the first of a tie
    assert not majority_correct(group("2", "1"), checker)
    assert majority_correct(group(None, None, "1"), checker) and not majority_correct(group(None, None), checker)


@pytest.mark.parametrize("same", [("1,200", "1200"), (r"\frac{1}{2}", "0.5"), ("x+1", "1 + x")])
def test_equal_answers_vote_together(checker, same):
    """Wrong ones too: two ways of writing one wrong answer outvote a correct one, not each other."""
    def group(correct, *answers):
        return [record(0, a in correct, a) for a in answers]

    assert majority_correct(group(same, "7", same[0], "7", same[1], same[0]), checker)
    wrong = group(["7"], "7", same[0], same[1])
    assert not majority_correct(wrong, checker)
    assert not majority_correct([wrong[1], wrong[2], wrong[0]], checker)


def test_a_majority_that_is_decided_compares_nothing():
    def group(*answers):
        return [record(0, a == "1", a) for a in answers]

    assert majority_correct(group("1", "1", "x+1"), None)
    assert not majority_correct(group("x+1", "1 + x", "y"), None)


def test_summary_of_hand_made_records(checker):
    records = [record(0, True, tokens=8), record(0, False, "2", 20), record(1, False, None, 16, finished=False),
               record(1, False, "3", 12)]
    cfg = EvalConfig(samples=2, temperature=1.0, budgets="8,100")
    summary = summarise(records, cfg, checker)
    assert (summary["problems"], summary["samples"]) == (2, 2)
    assert (summary["accuracy"], summary["avg@2"], summary["pass@1"], summary["pass@2"]) == (0.25, 0.25, 0.25, 0.5)
    assert (summary["maj@2"], summary["accuracy@8"], summary["accuracy@100"]) == (0.5, 0.25, 0.25)
    assert (summary["mean_tokens"], summary["median_tokens"], summary["tokens_per_correct"]) == (14, 14, 56)
    assert (summary["correct_steps"], summary["finished"]) == (0.5, 0.75)


@pytest.mark.parametrize("correct", [True, False])
def test_samples_that_are_all_correct_or_all_wrong_leave_an_interval(checker, correct):
    records = [record(n, correct) for n in range(3) for _ in range(4)]
    summary = summarise(records, EvalConfig(samples=4, temperature=1.0), checker)
    assert summary["interval"] == wilson(3 * correct, 3)


def test_a_budget_counts_only_completions_that_finished_within_it(checker):
    records = [record(0, True, tokens=10), record(1, True, tokens=11), record(2, True, tokens=9, finished=False)]
    summary = summarise(records, EvalConfig(budgets="9,10,11"), checker)
    assert [summary[f"accuracy@{n}"] for n in (9, 10, 11)] == pytest.approx([0, 1 / 3, 2 / 3])
    assert summary["interval"] == wilson(3, 3)


def test_a_table_row_without_correct_answers(checker):
    cells = table_row("base", summarise([record(0, False, steps=(0, 0))], EvalConfig(), checker))
    assert len(cells) == len(COLUMNS) and cells[:2] == ["base", "0.0%"] and cells[4] == "-"


def test_records_are_read_back_with_every_kind_of_line_end_in_their_texts(tmp_path):
    records = [record(0, True, "1\u20282\x85"), record(1, False, None)]
    write_results(tmp_path, {"accuracy": 0.5}, records)
    assert read_records(tmp_path) == records
    assert json.loads((tmp_path / "eval.json").read_text()) == {"accuracy": 0.5}
