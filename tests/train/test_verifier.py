"""The verifier: what decides correct or wrong, alike in training and in an evaluation, and the user's own function."""
import pytest

from minimath.core.errors import UserError
from minimath.data.examples import Example
from minimath.data.sample import Group, Sample
from minimath.eval.evaluate import grade
from minimath.grading.answer import AnswerChecker
from minimath.train.verifier import Verifier, verifier_columns

TEXTS = [r"so \boxed{Granted, in part}", r"so \boxed{denied}", r"\boxed{denied} no, \boxed{granted}", "nothing", ""]


def samples_of(texts, finished=True):
    return [Sample([1, 2, 3], [-1.0] * 3, finished, text) for text in texts]


def judged(verifier, answer, texts=TEXTS, finished=True):
    group = Group(Example("Is it?", answer=answer, where="f.jsonl:3"), [1], samples_of(texts, finished))
    with Verifier(verifier) as marks:
        marks.mark([group])
    return [sample.correct for sample in group.samples]


def test_exact_compares_answers():
    assert judged("exact", "12", [r"\boxed{12.0}", r"\boxed{13}", "no"]) == [True, False, False]


CUT = [(r"so \boxed{12} and then", True), (r"so \boxed{13} and then", False), (r"so \boxed{12", False),
       ("3 * 4 = 12", False), ("12", False)]


@pytest.mark.parametrize("text, correct", CUT)
def test_a_cut_completion_with_a_closed_correct_box_is_correct_in_training_and_in_evaluation_alike(text, correct):
    example = Example("3 * 4?", answer="12")
    [sample] = samples_of([text], finished=False)
    with AnswerChecker() as checker:
        assert grade(0, 0, example, sample, checker)["correct"] == correct
    assert judged("exact", "12", [text], finished=False) == [correct]
    assert judged("regex", "12", [text], finished=False) == [correct]


@pytest.mark.parametrize("verifier", ["none", lambda text, example: True])
def test_without_an_answer_to_compare_a_cut_completion_has_not_answered(verifier):
    assert judged(verifier, "", finished=False) == [False] * 5 and judged(verifier, "") == [True] * 5


def test_regex_matches_the_whole_final_answer():
    assert judged("regex", r"granted(, in part)?") == [True, False, True, False, False]
    assert judged("regex", "grant") == [False] * 5


def test_a_pattern_that_never_ends_is_no_match_and_does_not_stop_the_run():
    assert judged("regex", "(a|aa)+$", [r"\boxed{" + "a" * 60 + "b}", r"\boxed{aaa}"]) == [False, True]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_verifiers_for_test.py").write_text(
        "import numpy\n"
        "def yes(text, example): return example.answer in text\n"
        "def score(text, example): return numpy.float32(min(1.0, len(text) / 40))\n"
        "def large(text, example): return 7\n"
        "def word(text, example): return 'right'\n"
        "def nothing(text, example): pass\n"
        "def fails(text, example): return text[1000]\n"
    )
    monkeypatch.chdir(tmp_path)
    return "python:my_verifiers_for_test."


def test_python_decides_by_bool_or_by_a_score_from_one_half(mine):
    assert judged(mine + "yes", "denied") == [False, True, True, False, False]
    assert judged(mine + "score", "", ["x" * 20, "x" * 19, "x" * 99]) == [True, False, True]


@pytest.mark.parametrize("name, words", [("large", "returned 7"), ("word", "'right'"), ("nothing", "None"),
                                         ("fails", "IndexError")])
def test_a_python_verifier_that_returns_nonsense_is_named_with_what_it_returned(mine, name, words):
    with pytest.raises(UserError, match=f"my_verifiers_for_test.{name} .*{words}"):
        judged(mine + name, "")


def test_a_callable_is_taken_as_it_is_and_named_when_it_fails():
    assert judged(lambda text, example: example.answer in text, "denied") == [False, True, True, False, False]

    def picky(text, example):
        raise OSError("no sandbox")
    with pytest.raises(UserError, match="verifier=picky raised OSError: no sandbox"):
        judged(picky, "")


def test_bad_patterns_and_missing_functions_are_refused_before_any_work(mine):
    for pattern in "(", "a{9999999999}", "(" * 5000 + ")" * 5000:
        with pytest.raises(UserError, match="f.jsonl:3.*regular expression"):
            Verifier("regex", [Example("?", answer="a"), Example("?", answer=pattern, where="f.jsonl:3")])
    with pytest.raises(UserError, match="has no function other"):
        Verifier(mine + "other")


def test_only_verifiers_that_compare_need_an_answer():
    assert [verifier_columns(v) for v in ("exact", "regex", "none", "python:a.b", len)] == [("answer",)] * 2 + [()] * 3
