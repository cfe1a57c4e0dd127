"""Gates: what decides right or wrong, and the user's own function."""

import pytest

from minimath.grading.answer import AnswerChecker
from minimath.config.schema import RLAIFConfig
from minimath.core.errors import UserError
from minimath.data.examples import Example
from minimath.train.verifier import check_gate, make_gate, needed_columns

TEXTS = [r"so \boxed{Granted, in part}", r"so \boxed{denied}", r"\boxed{denied} no, \boxed{granted}", "nothing", ""]


def judged(gate, answer, texts=TEXTS):
    with AnswerChecker() as checker:
        return make_gate(RLAIFConfig(gate=gate), checker)(texts, Example("Is it?", answer=answer, where="f.jsonl:3"))


def test_exact_compares_answers():
    assert judged("exact", "12", [r"\boxed{12.0}", r"\boxed{13}", "no"]) == [True, False, False]


def test_regex_matches_the_whole_final_answer():
    assert judged("regex", r"granted(, in part)?") == [True, False, True, False, False]
    assert judged("regex", "grant") == [False] * 5


def test_a_pattern_that_never_ends_is_no_match_and_does_not_stop_the_run():
    assert judged("regex", "(a|aa)+$", [r"\boxed{" + "a" * 60 + "b}", r"\boxed{aaa}"]) == [False, True]


def test_none_lets_everything_through():
    assert judged("none", "") == [True] * 5


@pytest.fixture
def my_gates(tmp_path, monkeypatch):
    (tmp_path / "my_gates_for_test.py").write_text(
        "import numpy\n"
        "def yes(text, example): return example.answer in text\n"
        "def score(text, example): return numpy.float32(min(1.0, len(text) / 40))\n"
        "def large(text, example): return 7\n"
        "def word(text, example): return 'right'\n"
        "def nothing(text, example): pass\n"
        "def fails(text, example): return text[1000]\n"
    )
    monkeypatch.chdir(tmp_path)
    return "python:my_gates_for_test."


def test_python_decides_by_bool_or_by_a_score_from_one_half(my_gates):
    assert judged(my_gates + "yes", "denied") == [False, True, True, False, False]
    assert judged(my_gates + "score", "", ["x" * 20, "x" * 19, "x" * 99]) == [True, False, True]


@pytest.mark.parametrize("name, words", [("large", "returned 7"), ("word", "'right'"), ("nothing", "None"),
                                         ("fails", "IndexError")])
def test_a_python_gate_that_returns_nonsense_is_named_with_what_it_returned(my_gates, name, words):
    with pytest.raises(UserError, match=f"my_gates_for_test.{name} .*{words}"):
        judged(my_gates + name, "")


def test_bad_patterns_and_missing_functions_are_refused_before_any_work(my_gates):
    for pattern in "(", "a{9999999999}", "(" * 5000 + ")" * 5000:
        with pytest.raises(UserError, match="f.jsonl:3.*regular expression"):
            check_gate(RLAIFConfig(gate="regex"), [Example("?", answer="a"),
                                                   Example("?", answer=pattern, where="f.jsonl:3")])
    with pytest.raises(UserError, match="has no function other"):
        check_gate(RLAIFConfig(gate=my_gates + "other"), [])


def test_only_gates_that_compare_need_an_answer():
    assert [needed_columns(g) for g in ("exact", "regex", "none", "python:a.b")] == [("answer",)] * 2 + [()] * 2
