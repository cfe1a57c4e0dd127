"""Solutions of known faults: rows of each shape, hostile ones, judges whose figures are known beforehand."""
import json

import pytest
from judging import FakeJudge, judge_by

from minimath.config.schema import DataOptions
from minimath.core.errors import UserError
from minimath.judges.certify import ask_known, auc_draws, figures_of, heuristic, length_alone, np, questions_of
from minimath.judges.known import HIDDEN, NEEDLESS, PAIR, SOUND, UNREAD, WRONG, problem_hash, read_known

# one row of PRMBench (ssmisya/PRMBench, Apache-2.0), class redundancy and class counterfactual
PRM = {"problem": "How many seconds are in 7.8 minutes?", "original": [
    "7.8 minutes is the same as 7 minutes and 0.8 minutes.",
    "Right, and since there are 60 seconds in a minute, then there are 60 * 7 = 420 seconds in 7 minutes.",
    "And since there are 60 seconds in a minute, then there are 60 * 0.8 = 48 seconds in 0.8 minutes.",
    "So, in total, there are 420 + 48 = 468 seconds in 7.8 minutes."]}
REDUNDANT = PRM | {"modified": [*PRM["original"][:3], "Knowing there are 48 seconds in 0.8 minutes, let's calculate "
                                "0.8 * 60 once more to ensure it equals 48 seconds.", PRM["original"][3]],
                   "error_steps": [4], "class": "redundancy"}
COUNTERFACTUAL = PRM | {"modified": [*PRM["original"][:2], "And since there are 60 seconds in a minute, then we "
                                     "calculate 0.8 minutes as 0.8 hours first, and there are 60 * 0.8 = 48 seconds in "
                                     "0.8 hours.", PRM["original"][3]], "error_steps": [3], "class": "counterfactual"}


def marked(n: int, label: int, right: bool | None = True, words: int = 0, **more) -> dict:
    """A row of ProcessBench's form; a wrong step says so, `words` make the solution longer."""
    steps = [f"We begin with {n}.", "Then we add 2" + " very" * words + " carefully.", f"The answer is {n + 2}."]
    if label >= 0:
        steps[label] += " wrong"
    return {"problem": f"What is {n} plus 2?", "steps": steps, "label": label, "final_answer_correct": right} | more


def read(*rows, **options):
    return read_known(DataOptions(source=list(rows), **options))


class Grader(FakeJudge):
    """A judge of form single: grade(text of the solution so far) is the function given."""
    form = "single"

    def __init__(self, grade):
        super().__init__(lambda pairs: 1 / 0)
        self.of, self.asked = grade, []

    def grade_all(self, questions):
        self.asked += questions
        return [(self.of("".join(q.steps)), [self.of("".join(q.steps[:k + 1])) for k in range(len(q.steps))])
                for q in questions]


PERFECT = Grader(lambda text: 0.1 if "wrong" in text else 0.9)
ROWS = [row for n in range(30) for row in (marked(n, -1, words=n), marked(n, n % 3, words=30 - n))]


# ---- rows


def test_the_three_shapes_give_their_kinds():
    known = read(marked(1, -1), marked(2, 0, False), marked(3, 1), marked(4, 2, None), REDUNDANT, COUNTERFACTUAL,
                 {"problem": "p", "better": "a b. c d.", "worse": "e f", "kind": "mine"},
                 {"prompt": "p", "chosen": "x", "rejected": "y"})
    assert known.kinds() == {SOUND: 2, WRONG: 1, HIDDEN: 2, UNREAD: 1, NEEDLESS: 1}  # PRMBench's original once
    assert [kind for kind, _, _ in known.pairs] == [NEEDLESS, HIDDEN, "mine", PAIR]
    assert known.rows == known.drawn == 8 and known.problems == 6
    steps = {each.kind: each.wrong_step for each in known.solutions}
    assert steps[WRONG] == 0 and steps[HIDDEN] == 2 and steps[NEEDLESS] is None and steps[SOUND] == -1
    better = known.solutions[known.pairs[2][1]]
    assert better.steps == ("a b.", " c d.") and better.solution.text == "a b. c d."


def test_an_answer_that_changes_or_is_not_there_is_told_from_one_that_stays():
    changed = COUNTERFACTUAL | {"modified": [*COUNTERFACTUAL["modified"][:3], "In total, 470 seconds."]}
    none = COUNTERFACTUAL | {"original": ["We look."], "modified": ["We guess."], "error_steps": [1]}
    two_ways = COUNTERFACTUAL | {"error_steps": [], "class": "multi_solutions"}
    assert [read(row).solutions[1].kind for row in (changed, none, two_ways)] == [WRONG, UNREAD, SOUND]
    assert not read(two_ways).pairs


def test_no_judge_is_told_which_answer_is_right():
    assert {each.solution.correct for each in read(marked(1, 0, False), marked(1, -1)).solutions} == {True}


def test_sound_and_faulty_solutions_of_one_problem_become_pairs():
    known = read(marked(1, -1), marked(1, 0), marked(1, 1, False), marked(2, -1), marked(3, 0))
    assert known.pairs == [(HIDDEN, 0, 1), (WRONG, 0, 2)]


def test_chats_of_preference_data_are_read():
    chat = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
    known = read({"chosen": chat, "rejected": [chat[0], {"role": "assistant", "content": "It is 5."}]})
    assert [each.problem for each in known.solutions] == ["2 + 2?"] * 2
    assert [each.solution.text for each in known.solutions] == ["It is 4.", "It is 5."]


GOOD, STEPS = marked(0, -1), {"problem": "p", "steps": ["a", "b"], "label": 0}


@pytest.mark.parametrize("row, said", [
    ({"problem": "p"}, "no solutions to judge"),
    ({"problem": "p", "beter": "a", "worse": "b"}, "did you mean 'better'"),
    ({"better": "a", "worse": "b"}, "empty problem"), ({"problem": 3, "better": "a", "worse": "b"}, "wrong type"),
    ({"problem": "p", "better": ["a"], "worse": "b"}, "better has the wrong type"),
    ({"problem": "p", "better": " a", "worse": "a"}, "both solutions are the same"),
    ({"problem": "p", "chosen": [{}], "rejected": "b"}, "empty chosen"),
    ({"problem": "p", "better": "a\0", "worse": "b"}, "NUL"),
    ({"problem": "p", "better": "a\ud800", "worse": "b"}, "surrogate"),
    ({"problem": "p", "better": "a", "worse": "b", "kind": {}}, "kind has the wrong type"),
    (STEPS | {"steps": []}, "steps is no list of steps"), (STEPS | {"steps": "a"}, "steps is no list of steps"),
    (STEPS | {"steps": ["a", " "]}, "an empty step in steps; step 2 of 2"),
    (STEPS | {"steps": ["a", 1]}, "a step of steps has the wrong type"), (STEPS | {"steps": [["a"]]}, "wrong type"),
    (STEPS | {"label": 2}, "label out of range; 2, and the steps go from -1 to 1"),
    (STEPS | {"label": -2}, "label out of range"), (STEPS | {"label": 1e300}, "label out of range"),
    (STEPS | {"label": True}, "label is no whole number"), (STEPS | {"label": "0"}, "label is no whole number"),
    (STEPS | {"label": 0.5}, "label is no whole number"), (STEPS | {"label": float("nan")}, "label is no whole number"),
    (STEPS | {"final_answer_correct": "yes"}, "final_answer_correct has the wrong type"),
    (STEPS | {"label": -1, "final_answer_correct": False}, "label -1 with a wrong answer"),
    (REDUNDANT | {"error_steps": [0]}, "error_steps out of range"),
    (REDUNDANT | {"error_steps": [6]}, "error_steps out of range; 6, and the steps go from 1 to 5"),
    (REDUNDANT | {"error_steps": 4}, "error_steps is no list"), (REDUNDANT | {"error_steps": ["4"]}, "no whole number"),
    (REDUNDANT | {"modified": {}}, "modified is no list of steps"), (REDUNDANT | {"class": 3}, "class has the wrong"),
    (PRM | {"modified": PRM["original"], "error_steps": [1]}, "both solutions are the same"),
    (STEPS | {"steps": ["a" * 1_000_001]}, "longer than 1 MB")])
def test_a_bad_row_is_named_counted_and_skipped(row, said):
    known = read(row, GOOD)
    assert known.rows == 1 and known.report.skipped.total() == 1 and len(known.solutions) == 1
    assert known.report.rows[0].startswith("row 1: ") and said in known.report.rows[0]
    with pytest.raises(UserError, match="stops the run"):
        read(row, GOOD, strict=True)
    with pytest.raises(UserError, match="no usable row"):
        read(row)


def test_texts_of_a_million_characters_are_read():
    texts = ["a" * 900_000, "1. " * 300_000, "\n\n1" * 150_000]  # a row is measured as it is written, \n as two
    known = read(*({"problem": "p", "better": text, "worse": "b"} for text in texts),
                 *(STEPS | {"steps": [text, "x"]} for text in texts))
    length = length_alone(known)
    assert not known.report.skipped and figures_of(length, length, known)["pairs"][PAIR]["voted"] == 3


def test_several_files_and_a_place_of_each_bad_row(tmp_path):
    for name, rows in {"a": [GOOD, {"label": 1}], "b": [REDUNDANT]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = read_known(DataOptions(source=f"{tmp_path}/a.jsonl, {tmp_path}/b.jsonl"))
    assert {each.source for each in known.solutions} == {"a", "b"}
    assert known.report.rows[0].startswith(f"{tmp_path}/a.jsonl:2: no solutions to judge")
    with pytest.raises(UserError, match="no data given"):
        read_known(DataOptions())


def test_a_limit_draws_by_the_seed():
    some = [read_known(DataOptions(source=ROWS, limit=10), seed) for seed in (1, 1, 2)]
    assert some[0].drawn == len(some[0].solutions) == 10 and some[0].rows == 60
    assert some[0].solutions == some[1].solutions != some[2].solutions


def test_problems_of_the_judges_training_are_left_out_whatever_their_case():
    trained_on = {problem_hash("what is 4 PLUS 2 ?"), problem_hash("another")}
    known = read_known(DataOptions(source=ROWS), trained_on=trained_on)
    assert known.left_out == 2 and len(known.solutions) == 58
    assert "What is 4 plus 2?" not in {each.problem for each in known.solutions}
    with pytest.raises(UserError, match="trained on the problems of all 2 rows"):
        read_known(DataOptions(source=ROWS[:2]), trained_on={problem_hash("What is 0 plus 2?")})


@pytest.mark.parametrize("one, other", [
    ("\u5c0f\u660e\u67093\u4e2a\u82f9\u679c", "\u5c0f\u7ea2\u67093\u652f\u7b14"), ("3 + 5", "3 - 5"),
    ("\u0420\u0435\u0448\u0438 x", "\u041d\u0430\u0439\u0434\u0438 x"), ("\ud800\u4e00 1", "\ud800\u4e8c 1")])
def test_problems_without_latin_words_are_not_one_for_their_numbers(one, other):
    assert problem_hash(one) != problem_hash(other)


def test_a_hash_is_16_digits_and_problems_without_latin_words_keep_their_own():
    assert len(problem_hash("p")) == 16 and problem_hash("Anna has 3") == problem_hash("Ben has 3")
    assert problem_hash("\u4e00") != problem_hash("\u4e8c")


# ---- figures


def ask_all(judge, known):
    length = length_alone(known)
    return figures_of(ask_known(judge, known, "fake"), length, known), figures_of(length, length, known)


def test_a_perfect_grader_beats_length_in_every_figure():
    known = read(*ROWS)
    mine, length = ask_all(PERFECT, known)
    auc, pairs = mine["auc"][HIDDEN], mine["pairs"][HIDDEN]
    assert auc["auc"] == 1.0 and auc["interval"] == (1.0, 1.0) and auc["sound"] == auc["faulty"] == 30
    assert auc["gain"][0] == pytest.approx(1.0 - auc["length"]) and auc["gain"][1] > 0.1
    assert pairs["even"]["share"] == 1.0 and 0 < pairs["even"]["pairs"] < 30
    assert mine["process"]["rows"] == {"faulty_rows": 30, "erroneous": 1.0, "sound_rows": 30, "correct": 1.0, "f1": 1.0}
    assert mine["calibration"]["brier"] == pytest.approx(0.01) and mine["calibration"]["constant"] == 0.25
    assert [tuple(row) for row in mine["calibration"]["reliability"]] == [(pytest.approx(0.1), 0.0, 30),
                                                                        (pytest.approx(0.9), 1.0, 30)]
    assert length["auc"][HIDDEN]["gain"] is None and "process" not in length and "calibration" not in length


def test_a_judge_that_loves_length_gains_nothing_on_length():
    """Whether it likes shorter or longer ones: length alone is taken in the better sense."""
    known = read(*[row for n in range(30) for row in (marked(n, -1, words=2), marked(n, 0, words=8 + n))])
    shorter = judge_by(lambda p: float(len(p.first.text) < len(p.second.text)))
    for judge in (Grader(lambda text: 1 / len(text)), shorter):
        mine, length = ask_all(judge, known)
        assert mine["pairs"][HIDDEN]["agreement"] == length["pairs"][HIDDEN]["agreement"] == 1.0
        assert mine["pairs"][HIDDEN]["gain"] == [0.0, 0.0, 0.0]
    longer, _ = ask_all(Grader(lambda text: 1 - 1 / len(text)), known)
    assert longer["auc"][HIDDEN]["auc"] == 0.0 and longer["auc"][HIDDEN]["gain"][2] < 0
    turned = read(*[row for n in range(30) for row in (marked(n, -1, words=8 + n), marked(n, 0, words=2))])
    longer, length = ask_all(Grader(lambda text: 1 - 1 / len(text)), turned)
    assert longer["auc"][HIDDEN]["auc"] == 1.0 and length["auc"][HIDDEN]["auc"] == 0.0
    assert longer["auc"][HIDDEN]["gain"] == [0.0, 0.0, 0.0]
    lover = judge_by(lambda p: float(len(p.first.text) > len(p.second.text)))
    assert ask_all(lover, turned)[0]["pairs"][HIDDEN]["gain"] == [0.0, 0.0, 0.0]


def test_a_constant_judge_is_worth_nothing():
    known = read(*ROWS)
    mine, length = ask_all(Grader(lambda text: 0.5), known)
    assert mine["auc"][HIDDEN]["auc"] == mine["auc"][HIDDEN]["interval"][0] == 0.5
    assert mine["pairs"][HIDDEN]["even"]["share"] == 0.5
    assert mine["pairs"][HIDDEN]["agreement"] == length["pairs"][HIDDEN]["agreement"]  # equal grades: the shorter
    assert mine["process"]["rows"]["f1"] == 0.0 and mine["process"]["rows"]["correct"] == 1.0
    assert mine["calibration"]["brier"] == 0.25
    first, _ = ask_all(judge_by(lambda p: 1.0), known)
    assert first["pairs"][HIDDEN]["position_bias"] == first["pairs"][HIDDEN]["order_conflicts"] == 1.0
    assert "auc" not in first and "calibration" not in first


def test_solutions_in_several_files_are_asked_about_once(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(REDUNDANT | {"class": name}))
    known = read_known(DataOptions(source=f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl"))
    judge = Grader(lambda text: 0.5)
    answers = ask_known(judge, known, "fake")
    assert len(known.solutions) == 4 and len(judge.asked) == 2 and questions_of(judge, known) == 2
    assert answers.scores == [0.5] * 4


def test_only_solutions_of_one_file_are_held_against_each_other(tmp_path):
    """Sound ones of a long-winded file against faulty ones of a terse one would measure the file."""
    files = {"long": [marked(n, -1, words=50) for n in range(9)] + [marked(0, 0, words=50)],
             "short": [marked(20 + n, 0) for n in range(9)] + [marked(20, -1)]}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = read_known(DataOptions(source=",".join(f"{tmp_path}/{name}.jsonl" for name in files)))
    judge = Grader(lambda text: 0.9 if len(text) > 200 else 0.1)
    assert ask_all(judge, known)[0]["auc"][HIDDEN]["auc"] == 0.5


def test_the_auc_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    scores, sound, strata = rng.integers(0, 9, 60).tolist(), rng.random(60) < 0.5, rng.integers(0, 2, 60)
    wins = [(scores[i] > scores[j]) + (scores[i] == scores[j]) / 2 for i in range(60) for j in range(60)
            if sound[i] and not sound[j] and strata[i] == strata[j]]
    assert auc_draws(scores, sound, strata, np.arange(60), 0)[0] == pytest.approx(np.mean(wins))


def test_a_wide_interval_comes_of_few_problems():
    """Twenty solutions of two problems are no twenty rows."""
    of_two = [marked(n, label, words=w) for w in range(10) for n, label in ((0, -1), (1, 0))]
    known = read(*of_two)
    draws = auc_draws([n % 7 for n in range(20)], np.array([row["label"] < 0 for row in of_two]), np.zeros(20, int),
                      np.array([row["label"] + 1 for row in of_two]), 0)
    assert np.isnan(draws).any() and len(known.solutions) == 20


def test_missing_answers_cost_their_own_rows():
    known = read(*ROWS)
    mine, _ = ask_all(Grader(lambda text: float("nan") if "begin with 3." in text else PERFECT.of(text)), known)
    assert mine["auc"][HIDDEN]["sound"] == 29 and mine["auc"][HIDDEN]["auc"] == 1.0
    assert mine["pairs"][HIDDEN]["voted"] == 29 and mine["pairs"][HIDDEN]["no_votes"] == 2
    broken, _ = ask_all(Grader(lambda text: 1 / 0), known)
    assert "ZeroDivisionError" in broken["error"] and broken["auc"] == {} and broken["calibration"] is None
    assert broken["process"]["rows"]["erroneous"] == broken["process"]["rows"]["correct"] == 0.0
    assert broken["pairs"][HIDDEN]["voted"] == 0 and broken["pairs"][HIDDEN]["gain"] is None


def test_the_heuristic_finds_the_step_with_the_wrong_sum():
    wrong = {"problem": "p", "steps": ["1 + 1 = 2.", "2 + 3 = 6.", "The answer is 5."], "label": 1,
             "final_answer_correct": True}
    known = read(wrong, wrong | {"steps": ["1 + 1 = 2.", "2 + 3 = 5.", "The answer is 5."], "label": -1})
    figures = figures_of(heuristic(known), length_alone(known), known)
    assert figures["process"]["rows"]["f1"] == 1.0 and figures["auc"][HIDDEN]["auc"] == 1.0
    assert figures["pairs"][HIDDEN]["agreement"] == 1.0


def test_an_answer_in_another_dress_is_the_same_answer():
    dressed = [*COUNTERFACTUAL["modified"][:3], "So, in total, there are \\$468."]
    rows = read(PRM | {"original": [*PRM["original"][:3], "The answer is 468."], "modified": dressed,
                       "error_steps": [3], "class": "counterfactual"})
    assert [known.kind for known in rows.solutions] == [SOUND, HIDDEN]


def test_two_files_of_one_name_are_two_sources(tmp_path):
    for n, folder in enumerate(("one", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").write_text(json.dumps(marked(n, -1)))
    files = [str(tmp_path / folder / "test.jsonl") for folder in ("one", "two")]
    assert [known.source for known in read_known(DataOptions(source=",".join(files))).solutions] == files
