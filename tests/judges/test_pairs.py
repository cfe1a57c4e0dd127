"""Pairs of known order: each has its fault and no other."""
import re

import pytest

from minimath.grading.answer import AnswerChecker
from minimath.grading.steps import check_steps
from minimath.judges.pairs import KINDS, faulty_solutions, make_pairs


@pytest.fixture(scope="module")
def pairs():
    return {kind: [p for p in make_pairs(60, seed=5) if p.kind == kind] for kind in KINDS}


def test_the_better_solution_is_correct_and_sound(pairs):
    for pair in (p for kind in KINDS for p in pairs[kind]):
        assert pair.first.correct and pair.first.steps.total >= 2
        assert pair.first.steps.right == pair.first.steps.total


def test_each_kind_has_its_fault_and_no_other(pairs):
    for kind in KINDS:
        for pair in pairs[kind]:
            worse, faults = pair.second, pair.second.steps.total - pair.second.steps.right
            assert worse.correct == (kind in ("unsound", "long"))
            assert faults == (kind != "long"), pair  # one wrong step: what follows from it is computed rightly
            assert (worse.tokens > 2 * pair.first.tokens) == (kind in ("long", "wrong_long"))
            if kind in ("wrong", "unsound"):
                assert worse.tokens == pair.first.tokens


def test_correct_and_wrong_is_what_the_answer_checker_says():
    made = faulty_solutions(40, seed=6)
    with AnswerChecker() as checker:
        graded = iter([checker.check(text, example.answer) for example, texts in made for text in texts.values()])
    for _, texts in made:
        assert {kind: next(graded) for kind in texts} == {
            "right": True, "wrong": False, "wrong_long": False, "unsound": True, "long": True}


def test_a_wrong_result_is_carried_on_everywhere(pairs):
    """Where the right solution uses an earlier result, the wrong one uses its own result of that step."""
    for pair in pairs["wrong"]:
        right, wrong = (re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", c.text) for c in (pair.first, pair.second))
        assert re.sub(r"\d+", "#", pair.first.text) == re.sub(r"\d+", "#", pair.second.text)
        given, mine = re.findall(r"\d+", pair.problem), {}
        for (a, _, b, value), (c, _, d, own) in zip(right, wrong, strict=True):
            for number, used in ((a, c), (b, d)):
                assert used == (mine[number] if number in mine and number not in given else number), pair.second
            mine[value] = own
        assert wrong[-1][3] != right[-1][3] and f"boxed{{{wrong[-1][3]}}}" in pair.second.text


def test_pairs_depend_on_the_arguments_alone(pairs):
    again = make_pairs(60, seed=5)
    assert [p for kind in KINDS for p in pairs[kind]] == sorted(again, key=lambda p: KINDS.index(p.kind))
    assert make_pairs(60, seed=6) != make_pairs(60, seed=5)
    assert len({p.problem for p in pairs["long"]}) == 60


def test_the_padded_solution_checks_only_steps_that_hold():
    for _, texts in faulty_solutions(20, seed=9):
        assert check_steps(texts["long"]).right == check_steps(texts["long"]).total >= 4
