"""bench.graders with a stand-in for Qwen2.5-Math's evaluation: cases, verdicts, time limit, figures, messages."""

import json
import re
import sys

import pytest

from bench import grader_cases, graders
from minimath.grading.answer import AnswerChecker

GRADER = r'''
import time

def math_equal(prediction, reference, *_):
    if prediction == "hang":
        time.sleep(60)
    if prediction == "raise":
        raise ValueError("no")
    return prediction == reference

class Tests:
    def test(self):
        self.assertTrue(math_equal("10", "10", True, True))
        self.assertFalse(math_equal("10", "20", True, True))
        self.assertTrue(math_equal("hang", "11", True, True))
        self.assertTrue(math_equal("raise", "12", True, True))
        self.assertTrue(math_equal("13", "13.0", True, True))

    # pred = '\\frac{1}{2}'
    # gt = '0.5'
'''
PARSER = "def extract_answer(text, data):\n    return text.split('boxed{')[-1].rstrip('}')\n"
TESTS = '''
@pytest.mark.parametrize("gold,pred,expected", [("$5$", "So it is $5$", 1), ("$5$", "$6$", 0), (made(), "1", 1)])
def test_one(): pass
@pytest.mark.parametrize("gold,pred,expected,precision", [("$7$", "$7$", 1, 6), ("$8$", "$8.1$", 1, 1)])
def test_two(): pass
@pytest.mark.parametrize("gold,pred,expected", [("We add, and get $5$", "5", 1)])
def test_three(): pass
'''


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "qwen"
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation" / "grader.py").write_text(GRADER)
    (folder / "evaluation" / "parser.py").write_text(PARSER)
    return folder


def test_the_command_counts_who_is_right_and_lists_every_disagreement(checkout, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(graders, "TIMEOUT_S", 3.0)
    out = tmp_path / "graders.json"
    assert graders.main(["--qwen", str(checkout), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "left out: lighteval (not given)" in said and "agree" in said
    [result] = json.loads(out.read_text())["sets"].values()
    facts = result["peers"]["qwen"]
    # we say: equal, different, different twice (words are no number), equal, equal
    assert (facts["cases"], facts["agree"], facts["known"], facts["no_verdict"]) == (6, 4, 5, 2)
    assert (facts["we_right"], facts["they_right"], facts["only_we_right"], facts["only_they_right"]) == (3, 2, 1, 0)
    assert facts["disagreements"] == [["math_equal", "13", "13.0", True, True, False],
                                      ["_test_math_equal", r"\frac{1}{2}", "0.5", None, True, False]]
    assert [row[1] for row in result["we_wrong"]] == ["hang", "raise"]


def test_rows_of_pytest_files_are_read_without_running_them(tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS)
    cases = [case[:4] for case in grader_cases.test_cases(tmp_path)]
    assert cases == [("text", "So it is $5$", "5", True), ("answer", "6", "5", False), ("answer", "7", "7", True)]


def test_variants_of_a_gold_answer_are_equal_to_it_or_not_as_they_say():
    golds = ["18", "1234", "-3", r"\frac{3}{4}", "(3,4)", r"\text{Evelyn}", "[2,5)", r"\text{(C)}", r"90^\circ",
             "3, 5, 7"]
    cases = grader_cases.generated_cases(golds, "math")
    assert {"thousands", "decimal", "tuple order", "bracket", "list order", "percent"} <= {case.kind for case in cases}
    with AnswerChecker(timeout_s=20.0) as checker:
        assert [case for case in cases if checker.equal(case.answer, case.gold) != case.expected] == []


@pytest.mark.parametrize("words, said", [
    ([], "nothing to compare"), (["--qwen", "."], "evaluation/grader.py"),
    (["--lighteval-python", sys.executable, "--tests", "."], "no test_"),
    (["--lighteval-python", sys.executable, "--data", "."], "no math500.jsonl")])
def test_slips_get_one_line(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert graders.main(words) == 2
    assert re.fullmatch(rf"error: [^\n]*{re.escape(said)}[^\n]*\n", capsys.readouterr().err)


def test_a_peer_that_does_not_start_is_named_with_its_reason(tmp_path, capsys, checkout):
    (checkout / "evaluation" / "parser.py").write_text("import nothing_of_this_name\n")
    assert graders.main(["--qwen", str(checkout), "--out", str(tmp_path / "out.json")]) == 2
    assert "qwen does not start: ModuleNotFoundError: No module named 'nothing_of_this_name'" in capsys.readouterr().err
