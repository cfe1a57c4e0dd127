"""Measuring a fresh judge: figures by hand, and whatever the held-out solutions are, judge.json is strict JSON."""
import json
import math

import pytest

from minimath.core.log import RunLog
from minimath.data.examples import Example
from minimath.judges.base import Judge
from minimath.judges.calibrate import Calibration
from minimath.judges.card import JudgeCard, read_card, write_card
from minimath.judges.lessons import Solved
from minimath.judges.measure import grade_figures, measure_judge


class Graded(Judge):
    """Its verdict's log-odds is what `sign` says of a text."""
    name, soft = "graded", True

    def __init__(self, sign, form="single"):
        super().__init__(say=lambda text: None)
        self.sign, self.form, self.card = sign, form, JudgeCard(form="pair" if form == "pair" else "single")

    def signs(self, questions):
        texts = ["".join(question.steps) for question in questions]
        return [None if self.sign(text) is None else [(0.0, 0.0), (self.sign(text), -1.0)] for text in texts]

    def compare(self, pairs):
        return [0.9 if len(p.first.text) < len(p.second.text) else 0.1 for p in pairs]


def record(text, correct, finished=True):
    return {"text": text, "correct": correct, "finished": finished, "answer": text[-1:], "tokens": len(text),
            "correct_steps": 1, "steps": 1}


def problem(n, *records):
    return Solved(Example(f"problem {n}"), list(records))


def mixed(n):
    cut = record(f"right, then cut {n}", True, False)
    return problem(n, record(f"right {n}", True), record(f"wrong {n}", False), cut)


def sign(text):
    return 3.0 if text.startswith("right") else -3.0


@pytest.fixture
def log(tmp_path):
    with_log = RunLog(tmp_path, "test")
    yield with_log
    with_log.close()


HELD_OUT = {
    "mixed": [mixed(k) for k in range(6)],
    "one problem": [mixed(0)],
    "never right": [problem(k, record("wrong a", False), record("wrong b", False)) for k in range(4)],
    "always right": [problem(k, record("right a", True), record("right bb", True)) for k in range(4)],
    "one has texts": [problem(0, record(" ", False)), mixed(1), problem(2)],
    "none sampled": [problem(0), problem(1)],
    "too long": [problem(0, record("long", True)), problem(1, record("long", False))],
    "not a number": [problem(0, record("nan", True)), problem(1, record("nan", False))],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", ["single", "steps", "pair"])
@pytest.mark.parametrize("held_out", HELD_OUT.values(), ids=HELD_OUT)
def test_whatever_is_held_out_the_card_is_strict_json_and_comes_back(held_out, form, log, tmp_path):
    judge = Graded(lambda text: {"long": None, "nan": math.nan}.get(text, sign(text)), form)
    measure_judge(judge, held_out, log)
    write_card(tmp_path, judge.card)

    def refuse(word):
        raise AssertionError(f"{word} in judge.json")
    json.loads((tmp_path / "judge.json").read_text(), parse_constant=refuse)
    card = read_card(tmp_path)
    assert card.calibration == judge.card.calibration and all(map(math.isfinite, card.calibration))
    assert ("grades" in card.figures) == (form != "pair") and card.pairs == judge.card.pairs


def test_grades_are_fitted_to_one_half_of_the_problems_and_measured_on_the_other():
    flipped = [problem(k, record(f"right {k}", k % 2 == 0), record(f"wrong {k}", k % 2 == 1)) for k in range(8)]
    _, figures = grade_figures(Graded(sign), flipped)   # what even problems teach is wrong of the odd ones, whose
    assert figures["brier"] > 0.35 and figures["auc"] < 0.5  # own are then worth nothing
    assert figures["solutions"] == 16 and figures["auc_of_verdict"] == 0.5
    calibration, figures = grade_figures(Graded(sign), [mixed(k) for k in range(4)])
    assert figures["right"] == pytest.approx(2 / 3)     # one that was cut behind its answer is right
    assert figures["auc"] == figures["auc_within"] == 1.0 and figures["brier"] < 0.05 and calibration.temperature < 1
    assert figures["brier_of_the_mean"] == pytest.approx(2 / 9)
    assert sum(count for *_, count in figures["reliability"]) == 12


def test_nothing_to_calibrate_on_leaves_the_grades_as_they_are(log):
    judge = Graded(sign)
    measure_judge(judge, HELD_OUT["none sampled"], log)
    assert judge.card.calibration == Calibration() and judge.card.figures["grades"] == {"solutions": 0}


def test_canary_pairs_are_the_policys_own_wrong_ones_and_not_too_many(log):
    judge = Graded(sign)
    measure_judge(judge, [mixed(k) for k in range(80)], log)
    assert len(judge.card.pairs) == 64 and all(len(pair) == 3 for pair in judge.card.pairs)
    assert judge.card.pairs[0][0] == "problem 0" and judge.card.pairs[0][1:] == ["right 0", "wrong 0"]
