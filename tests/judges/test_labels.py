"""Labels of steps: exact arithmetic, what became of other samples, and nothing mends what is wrong."""
import random

import pytest

from minimath.data.examples import Example
from minimath.data.problems import make_problems
from minimath.grading.answer import answer_end
from minimath.judges.base import Asked, asked
from minimath.judges.faults import make_faults
from minimath.judges.lessons import Solved, computed, ends_of, labels_from, step_labels

RIGHT = "6 * 5 = 30 pens.\n30 - 8 = 22 are left.\nSo it is \\boxed{22}."
WRONG = "6 * 5 = 30 pens.\n30 + 8 = 38 are left.\nSo it is \\boxed{38}."
UNSOUND = "6 * 5 = 31 pens.\n30 - 8 = 22 are left.\nSo it is \\boxed{22}."


def written(text):
    return tuple(equation for equation, _ in computed(text))


def ends(samples, finished=True):
    return ends_of(Solved(Example("p"), [{"text": text, "correct": correct, "finished": finished}
                                         for text, correct in samples]))


def labels(text, correct, of_others=None):
    return step_labels(asked("p", text), correct, of_others or {})


def test_every_step_of_a_right_solution_is_right_and_of_a_wrong_one_nothing_is_known():
    assert labels(RIGHT, True) == [True, True, True, True]
    assert labels(WRONG, False) == [None, None, None, False]


@pytest.mark.parametrize("correct", [True, False])
def test_from_the_first_equation_on_that_does_not_hold_all_is_wrong(correct):
    assert labels(UNSOUND, correct) == [False] * 4
    late = RIGHT.replace("= 22 are", "= 21 are")
    assert labels(late, correct) == [True if correct else None, False, False, False]


def test_prefixes_count_what_samples_behind_the_same_equations_became():
    samples = [(RIGHT, True), (WRONG, False), (WRONG.replace("pens", "of them"), False), ("30 / 5 = 6. No", False)]
    told = ends(samples)
    assert told[written("6 * 5 = 30")] is True             # one of three ended right
    assert told[written("6*5=30, 30 + 8 = 38")] is False   # both ended wrong
    assert written("30 / 5 = 6") not in told               # one sample is no evidence
    assert written("7 * 5 = 35") not in told and written("no equation") not in told
    assert labels(WRONG, False, told) == [True, False, False, False]
    assert labels("Let us see.\n" + WRONG, False, told) == [None, True, False, False, False]


def test_samples_that_were_cut_are_no_failures_of_what_they_had_computed():
    begun = RIGHT.partition("So")[0]
    assert ends([(begun, False)] * 2, finished=False) == {}        # they were: its steps would be taught as wrong
    assert labels(begun, False, ends([(begun, False)] * 2, finished=False)) == [None, None, False]
    assert set(ends([(RIGHT, True)], finished=False).values()) == {True}  # cut behind its box


def test_counts_are_those_of_a_plain_count_and_never_rise_along_a_solution():
    rng = random.Random(0)
    lines = ["2 + 3 = 5.", "5 * 2 = 10.", "10 - 4 = 6.", "6 / 2 = 3."]
    samples = [("\n".join(rng.sample(lines, rng.randint(1, 4))), rng.random() < 0.3) for _ in range(80)]
    told = ends(samples)
    for text, _ in samples:
        mine = written(text)
        for k in range(1, len(mine) + 1):
            behind = [ok for other, ok in samples if written(other)[:k] == mine[:k]]
            assert told.get(mine[:k]) is (True if any(behind) else False if len(behind) >= 2 else None)
        own = labels(text, False, told)
        assert own[-1] is False and (False not in own or all(x is False for x in own[own.index(False):]))


def test_nothing_mends_what_is_wrong():
    told = ends([(RIGHT, True)])                                # says of both equations that they lead to a right end
    mended = "6 * 5 = 31 pens.\n6 * 5 = 30 pens.\n30 - 8 = 22 are left.\n\\boxed{22}"
    assert labels(mended, True, told) == [False] * 5
    two_wrong = [("1 + 1 = 2.\nSo.", False)] * 2
    assert labels("1 + 1 = 2.\nWell then.\n9 + 9 = 18.", False, ends(two_wrong)) == [False] * 4


def test_what_stands_behind_the_answer_changes_no_label():
    behind = RIGHT + " And 2 + 2 = 5.\nThe answer to the next one: 3 * 3 = 10."
    assert labels(behind, True)[:3] == [True] * 3 and labels(behind, True)[-1] is True  # it was [..., False, False]
    assert set(labels(behind, True)) == {True}
    assert set(labels(UNSOUND + "\n2 + 2 = 4.", True)) == {False}


def test_an_empty_text_has_the_label_of_its_whole_alone():
    assert labels("", False) == [False] and labels("", True) == [True] and labels_from(asked("p", ""), None) == [True]


def test_labels_from_an_offset_at_the_borders_of_steps():
    question = Asked("p", ("abc", "def", "gh"))
    assert labels_from(question, None) == [True] * 4
    assert labels_from(question, 0) == [False] * 4
    assert labels_from(question, 2) == [False] * 4              # the last character of the first step
    assert labels_from(question, 3) == [True, False, False, False]  # the first character of the second
    assert labels_from(question, 5) == [True, False, False, False]
    assert labels_from(question, 8) == [True, True, True, False]  # at the very end: something is missing there


def test_made_faults_begin_where_a_judge_can_see_them_and_their_labels_fall_once():
    rng = random.Random(1)
    kinds = set()
    for example in make_problems(40, seed=5):
        for fault in make_faults(example.problem, example.solution, example.answer, rng):
            kinds.add(fault.kind)
            own = labels_from(asked(example.problem, fault.text), fault.first_wrong)
            assert own == sorted(own, reverse=True) and own[-1] is (fault.first_wrong is None)
            assert fault.first_wrong is None or fault.first_wrong < answer_end(fault.text), fault
    assert len(kinds) >= 6
