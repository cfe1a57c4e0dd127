"""Verifiers that need no answers: the group's votes, a judge's grades, and both."""
import pytest
from judging import FakeJudge

from minimath.config.schema import RLAIFConfig
from minimath.core import dist
from minimath.core.errors import UserError
from minimath.data.examples import Example
from minimath.data.sample import Group, Sample
from minimath.train import verifier as module
from minimath.train.advantages import set_advantages
from minimath.train.batches import in_loss
from minimath.train.rewards import make_reward
from minimath.train.verifier import LABEL_FREE, Verifier, verifier_columns


def group_of(texts, answer="", cut=(), **example):
    samples = [Sample([1, 2, 3], [-1.0] * 3, i not in cut, text) for i, text in enumerate(texts)]
    return Group(Example("What is it?", answer=answer, **example), [1], samples)


def boxes(answers):
    return [rf"so \boxed{{{answer}}}" if answer else "so it goes" for answer in answers]


class Grader(FakeJudge):
    """Grades by the text; `asked` is what it was asked, call by call."""
    form = "single"

    def __init__(self, grades: dict, **options):
        super().__init__(None, **options)
        self.asked, self.grades = [], grades

    def grade(self, questions):
        self.asked.append(questions)
        return [self.grades["".join(question.steps)] for question in questions]


def marked(kind, group, judge=None, share=0.5):
    """The labels of one group, whether it is decided, and the metrics."""
    with Verifier(kind, judge=judge, majority_share=share) as marks:
        marks.mark([group])
        return [int(sample.correct) for sample in group.samples], group.decided, marks.metrics()


def voted(answers, **options):
    return marked("majority", group_of(boxes(answers)), **options)[:2]


def graded(kind, answers, grades, group=None, **options):
    """As marked, by a judge that gives these grades; answers of one text must have one grade."""
    texts = [f"{chr(97 + n)} {text}" for n, text in enumerate(boxes(answers))]
    return marked(kind, group or group_of(texts), Grader(dict(zip(texts, grades, strict=True)), **options))


# ---- majority

def test_majority_takes_the_answer_of_most_samples_in_whatever_form():
    answers = ["3", "1/2", "0.5", r"\frac{1}{2}", "", "50\\%", "4", r"\dfrac12"]
    assert voted(answers) == ([0, 1, 1, 1, 0, 1, 0, 1], True)
    assert voted(answers[::-1]) == ([1, 0, 1, 0, 1, 1, 1, 0], True)


def test_below_the_share_nothing_is_decided_and_nothing_correct():
    assert voted(["7", "7", "8", "9", ""]) == ([0] * 5, False)  # 2 of 5 samples, though of 4 answers
    assert voted(["7", "7", "8", "9"]) == ([1, 1, 0, 0], True)
    assert voted(["7", "7", "8", "9", ""], share=0.4) == ([1, 1, 0, 0, 0], True)
    assert voted(["7", "7", "7", "8", "9"], share=0.6) == ([1, 1, 1, 0, 0], True)


def test_a_tie_is_not_decided():
    assert voted(["7", "8", "8", "7"]) == ([0] * 4, False)
    assert voted(["7", "8", "8.0", "7", "3"], share=0.1) == ([0] * 5, False)


def test_a_group_without_any_answer_is_not_decided():
    assert voted([""] * 4) == ([0] * 4, False) and voted([""] * 4, share=0.0) == ([0] * 4, False)
    for none in "$ $", "1" * 500:  # nothing is equal to these
        assert voted(["", none, none]) == ([0] * 3, False)


def test_a_cut_sample_votes_by_a_closed_box_alone():
    texts = [r"so \boxed{12} and", "3 * 4 = 12", r"so \boxed{12", "the answer is 12", r"\boxed{5}"]
    assert marked("majority", group_of(texts, cut=[0, 1, 2]), share=0.4)[0] == [1, 0, 0, 1, 0]


def test_chat_rows_are_marked_as_others():
    chat = [{"role": "user", "content": "What is it?"}]
    assert marked("majority", group_of(boxes(["7", "7", "8"]), messages=chat))[0] == [1, 1, 0]
    judge = Grader(dict.fromkeys(boxes("78"), 0.75))
    assert marked("majority+judge", group_of(boxes("778"), messages=chat), judge)[0] == [1, 1, 0]
    assert [question.problem for question in judge.asked[0]] == ["What is it?"] * 2


def test_wordings_are_compared_with_the_largest_answers_alone(monkeypatch):
    compared = []
    with Verifier("majority") as marks:
        monkeypatch.setattr(marks.checker, "equal", lambda *pair: compared.append(pair))
        marks.mark([group_of(boxes([str(n) for n in range(1, 65)] + ["0"] * 64))])
    assert len(compared) < 64 * module.MOST_COMPARED and compared[0] == ("1", "0")


def test_after_some_that_run_out_of_time_only_the_wording_counts(monkeypatch):
    def late(answer, gold):
        marks.checker.timeouts += 1

    with Verifier("majority") as marks:
        monkeypatch.setattr(marks.checker, "equal", late)
        groups = [group_of(boxes(["1", "2", "3", "4", "6", "$5$", "5", "5", "5", "5"])) for _ in range(2)]
        marks.mark(groups)
        assert marks.checker.timeouts == 2 * module.MOST_LATE and all(group.decided for group in groups)


# ---- a judge

def test_the_judge_alone_wants_an_end_an_answer_and_one_half():
    texts = [f"{chr(97 + n)} {text}" for n, text in enumerate(boxes(["7", "8", "9", "", "7"]))]
    judge = Grader(dict(zip(texts, [0.5, 0.49, 0.9, 0.9, 0.9], strict=True)))
    assert marked("judge", group_of(texts, cut=[4]), judge)[:2] == ([1, 0, 1, 0, 0], True)
    assert ["".join(question.steps) for question in judge.asked[0]] == texts[:3]  # the others cost nothing


def test_of_a_group_that_lacks_a_grade_the_judge_alone_decides_nothing():
    for missing in None, float("nan"), 7:
        labels, decided, metrics = graded("judge", ["7", "8", ""], [0.9, missing, None])
        assert (labels, decided, metrics["verifier/no_grades"]) == ([0] * 3, False, 1)
    assert graded("judge", ["", ""], [None] * 2)[:2] == ([0] * 2, True)


def test_grades_are_weights_of_votes():
    answers = ["7", "7", "7", "8", "8.0"]
    assert marked("majority", group_of(boxes(answers)))[0] == [1, 1, 1, 0, 0]
    labels, decided, metrics = graded("majority+judge", answers, [0.25, 0.25, 0.25, 1.0, 0.75])
    assert (labels, decided, metrics["verifier/share"]) == ([0, 0, 0, 1, 1], True, 0.7)
    # a sample without an answer adds to all: 1.75 of 3.5, and of 3.75
    assert graded("majority+judge", [*answers, ""], [0.25] * 3 + [1, 0.75, 1])[:2] == ([0, 0, 0, 1, 1, 0], True)
    assert graded("majority+judge", [*answers, "", ""], [0.25] * 3 + [1, 0.75, 1, 0.25])[:2] == ([0] * 7, False)


def test_with_steps_only_those_vote_whose_equations_hold():
    texts = [f"{equation} The answer is \\boxed{{{answer}}}." for equation, answer in (
        ("2 + 2 = 5.", 7), ("3 + 3 = 7.", 7), ("1 + 6 = 8.", 7), ("4 + 4 = 8.", 8), ("", 8), ("9 - 1 = 8.", 9))]
    assert marked("majority", group_of(texts))[:2] == ([1, 1, 1, 0, 0, 0], True)
    labels, decided, metrics = marked("majority+steps", group_of(texts))
    assert (labels, decided, metrics["verifier/share"]) == ([0, 0, 0, 1, 1, 0], True, 2 / 3)
    assert marked("majority+steps", group_of([*texts, "1 + 1 = 3, so \\boxed{8}"]))[0] == [0, 0, 0, 1, 1, 0, 1]
    assert marked("majority+steps", group_of(texts[:3]))[:2] == ([0] * 3, False)  # none votes


def test_grades_that_tie_or_are_all_zero_decide_nothing():
    assert graded("majority+judge", ["7", "7", "8"], [0.25, 0.5, 0.75])[:2] == ([0] * 3, False)
    assert graded("majority+judge", ["7", "7", "8"], [0.0] * 3)[:2] == ([0] * 3, False)


def test_a_missing_grade_votes_with_one_half():
    assert graded("majority+judge", ["7", "8", "8"], [0.9, None, None])[0] == [0, 1, 1]
    assert graded("majority+judge", ["7", "8"], [0.6, None])[0] == [1, 0]


def test_equal_texts_are_asked_about_once_and_all_groups_together():
    judge, groups = Grader(dict.fromkeys(boxes("789"), 0.9)), [group_of(boxes("7787")), group_of(boxes("989"))]
    with Verifier("majority+judge", judge=judge) as marks:
        marks.mark(groups)
    assert [len(questions) for questions in judge.asked] == [3] and all(group.decided for group in groups)


def test_grades_that_could_change_no_label_are_not_asked_for():
    for answers, labels in ((["7", "7", "7"], [1] * 3), (["", ""], [0] * 2)):
        judge = Grader({})  # KeyError where it is asked
        assert marked("majority+judge", group_of(boxes(answers)), judge)[:2] == (labels, any(labels))
        assert judge.asked == []
    judge = Grader(dict(zip(boxes(["7", ""]), [0.2, 0.9])))
    assert marked("majority+judge", group_of(boxes(["7", "7", ""])), judge)[:2] == ([0] * 3, False)  # 0.4 of 1.3


def test_a_judge_that_raises_is_said_once_and_costs_its_own_grades_alone():
    class Picky(Grader):
        def grade(self, questions):
            return [1.0 if "odd" not in "".join(q.steps) else 1 / 0 for q in questions]

    judge = Picky({})
    group = group_of([r"\boxed{7}", r"\boxed{7.0}", r"odd \boxed{8}", r"odd \boxed{9}"])
    labels, _, metrics = marked("majority+judge", group, judge)
    assert labels == [1, 1, 0, 0] and metrics["verifier/no_grades"] == 2 and metrics["verifier/share"] == 2 / 3
    assert len(judge.heard) == 1 and "ZeroDivisionError" in judge.heard[0]


def test_a_judge_that_is_down_is_said_and_stops_the_run_only_if_asked_to():
    for kind, words in ("judge", "nothing is learnt from their groups"), ("majority+judge", "votes with 1/2"):
        judge = Grader(dict.fromkeys(boxes("78")))
        for _ in range(2):
            marked(kind, group_of(boxes("788")), judge)
        assert len(judge.heard) == 1 and words in judge.heard[0] and "2 of 2 solutions" in judge.heard[0]
        with pytest.raises(UserError, match="the judge fake is down: 2 of 2 .*judge_fallback=none"):
            marked(kind, group_of(boxes("788")), Grader(dict.fromkeys(boxes("78")), fallback="stop"))


def test_a_verifier_that_asks_a_judge_wants_one_that_grades_solutions():
    pairs = FakeJudge(None)
    for kind in "judge", "majority+judge":
        Verifier(kind)  # before a run, where there is no model yet
        for judge, words in (None, "there is none"), (pairs, "judge=fake compares pairs"):
            with pytest.raises(UserError, match=f"{words}.*minimath judge train.*judge=self judge_adapter=RUN "
                                                "judge_form=single"), Verifier(kind, judge=judge):
                pass
    with Verifier("majority", judge=pairs), Verifier("judge", judge=Grader({})):
        pass
    assert [verifier_columns(kind) for kind in LABEL_FREE] == [()] * len(LABEL_FREE)


# ---- what it says, and what it pays

def test_where_the_data_has_answers_metrics_say_how_often_the_labels_are_right():
    groups = [group_of(boxes(["7", "7", "7.0", "8"]), answer="7"),        # 4 of 4
              group_of(boxes(["0.5", "0.5", "3", "4", ""]), answer="3"),  # 2 of 5 votes: not decided
              group_of(boxes(["5", "1/2", "5", ""]), answer="0.5"),       # half of the votes, and wrong: 1 of 4
              group_of(boxes(["1", "1", "1"]))]                           # without an answer
    with Verifier("majority") as marks:
        marks.mark(groups[:2])
        marks.mark(groups[2:])
        assert marks.metrics() == {"verifier/decided": 0.75, "verifier/share": (0.75 + 0.4 + 0.5 + 1) / 4,
                                   "verifier/agrees": 5 / 8}
        marks.mark(groups[3:])
        assert marks.metrics() == {"verifier/decided": 1.0, "verifier/share": 1.0}
    with Verifier("exact") as marks:
        marks.mark(groups[:1])
        assert marks.metrics() == {} and groups[0].decided
    metrics = graded("judge", ["7", "8", ""], [0.9] * 3, group_of(
        [f"{chr(97 + n)} {text}" for n, text in enumerate(boxes(["7", "8", ""]))], answer="7"))[2]
    assert metrics.pop("verifier/seconds") < 60
    assert metrics == {"verifier/decided": 1.0, "verifier/agrees": 2 / 3, "verifier/no_grades": 0}


def test_metrics_are_of_the_groups_of_all_processes(monkeypatch):
    mine, other = Verifier("majority"), Verifier("majority")
    with mine, other:
        mine.mark([group_of(boxes("7788"))])
        other.mark([group_of(boxes("7777"), answer="7"), group_of(boxes("7778"))])
        parts = [dict(mine.sums), dict(other.sums)]
        monkeypatch.setattr(dist, "state", lambda: True)
        monkeypatch.setattr(dist, "of_all", lambda value: parts)
        assert mine.metrics() == other.metrics() == {"verifier/decided": 2 / 3, "verifier/share": 2.25 / 3,
                                                     "verifier/agrees": 1.0}


@pytest.mark.parametrize("reward", ["judge", "paper", lambda samples, example: [1.0 * len(s.text) for s in samples]])
def test_an_undecided_group_has_no_signal_whatever_else_the_reward_pays(reward):
    cfg = RLAIFConfig(verifier="majority", reward=reward, format_weight=0.25, judge_weight=0.0)
    texts = [r"\boxed{7}", "it is 8", r"now \boxed{9}", "no"]
    groups = [group_of(texts), group_of([*texts, r"\boxed{7}", "I think that it is 7", r"\boxed{7} it is"])]
    with Verifier(cfg.verifier) as marks:
        marks.mark(groups)
    make_reward(cfg, None).score(groups)
    set_advantages(groups, cfg.loss.scale_advantage, lambda sample: in_loss(sample, cfg))
    assert [(group.decided, group.has_signal()) for group in groups] == [(False, False), (True, True)]
    assert len({sample.reward for sample in groups[0].samples}) > 1  # decided, this one would have a signal
