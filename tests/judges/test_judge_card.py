"""judge.json: what is written comes back, what can't be read is said, and no form is asked that was not trained."""
import json

import pytest

from minimath.config.schema import PromptOptions
from minimath.core.errors import UserError
from minimath.judges.base import HeuristicJudge
from minimath.judges.calibrate import Calibration
from minimath.judges.card import CARD, JudgeCard, read_card, write_card
from minimath.judges.pairs import HELD_OUT, Canary

FULL = JudgeCard(form="single", system="s", prompt_template="{problem}!", rubric="", calibration=Calibration(2.0, -0.5),
                 problems=["ab"], pairs=[["p", "r \ud800 \u2028", "w"]], figures={"pairs": {"all": {"voted": 0}}})


def test_a_card_comes_back_as_it_was_written(tmp_path):
    write_card(tmp_path, FULL)
    assert read_card(tmp_path) == FULL and isinstance(read_card(tmp_path).calibration, Calibration)
    write_card(tmp_path, JudgeCard(form="pair"))
    assert read_card(tmp_path).form == "pair" and read_card(tmp_path).calibration == Calibration()


@pytest.mark.parametrize("change", [
    {"form": "steps"}, {"form": ""}, {"form": None}, {"calibration": [1.0, "x"]}, {"calibration": None},
    {"calibration": list(range(9))}, {"something": 1}, {"calibration": [0.0, 0.0]}, {"calibration": [-1.0, 0.0]},
    {"calibration": [1.0, float("nan")]}])
def test_a_card_that_is_none_is_said_with_what_to_give(tmp_path, change):
    write_card(tmp_path, FULL)
    values = json.loads((tmp_path / CARD).read_text()) | change
    (tmp_path / CARD).write_text(json.dumps(values))
    with pytest.raises(UserError, match="has no readable judge.json .*give the run folder of `minimath judge train`"):
        read_card(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\x00", "{}"])
def test_a_file_that_is_no_card_is_said(tmp_path, text):
    (tmp_path / CARD).write_text(text)
    with pytest.raises(UserError, match="no readable judge.json"):
        read_card(tmp_path)
    with pytest.raises(UserError, match="no readable judge.json"):
        read_card(tmp_path / "nowhere")


@pytest.mark.parametrize("trained, wanted, form", [
    ("", "auto", "pair"), ("", "single", "single"), ("", "steps", "steps"), ("", "pair", "pair"),
    ("single", "auto", "single"), ("single", "steps", "steps"), ("single", "single", "single"),
    ("single", "pair", None), ("pair", "auto", "pair"), ("pair", "pair", "pair"), ("pair", "single", None),
    ("pair", "steps", None)])
def test_the_form_is_the_one_asked_for_where_it_was_trained(trained, wanted, form):
    if form is None:
        with pytest.raises(UserError, match=f"judge_form={wanted}, but judge_adapter was trained for {trained}"):
            JudgeCard(form=trained).form_of(wanted)
    else:
        assert JudgeCard(form=trained).form_of(wanted) == form


def test_problems_are_put_as_in_the_training_of_the_judge_and_an_untrained_one_has_the_policys():
    own = PromptOptions("mine", "{problem}?", 77)
    assert JudgeCard().prompt_options(own) is own
    assert FULL.prompt_options(own) == PromptOptions("s", "{problem}!", 77)
    assert JudgeCard(form="single", system="", prompt_template="{problem}").prompt_options(own).system == ""


def test_the_canary_asks_a_trained_judge_about_its_held_out_pairs():
    judge = HeuristicJudge()
    assert {pair.kind for pair in Canary(0, judge, problems=2).pairs} == {"unsound", "long"}
    many = [[f"p{k}", f"{k} \\boxed{{{k}}}", f"\\boxed{{{k + 1}}}"] for k in range(40)]
    judge.card = JudgeCard(form="single", pairs=many)
    pairs = [pair for pair in Canary(0, judge, problems=2).pairs if pair.kind == "held_out"]
    assert len(pairs) == HELD_OUT and all(pair.first.correct and not pair.second.correct for pair in pairs)
    judge.card.pairs = [["p", "no box, 3", "none, 4"]]
    [pair] = [pair for pair in Canary(0, judge, problems=2).pairs if pair.kind == "held_out"]
    assert pair.first.correct and not pair.second.correct
