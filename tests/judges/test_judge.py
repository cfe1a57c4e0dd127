"""The heuristic judge, the comparison of groups, judges that fail, and the judge that options name."""
import math
import sys

import pytest
from judging import FakeJudge, Fixed, group, judge_by, judge_one, rewards_of, sample
from toy import policy_of

from minimath.config.load import load_config
from minimath.config.schema import JudgeOptions, RLAIFConfig, SFTConfig
from minimath.core.errors import Interrupted, UserError
from minimath.grading.steps import StepCount
from minimath.judges.base import HeuristicJudge, Pair, Solution
from minimath.judges.compare import MOST_FAILURES, ask
from minimath.judges.judge import judge_groups, make_judge
from minimath.judges.rubrics import judge_prompt, load_rubric

GOOD = Fixed(r"5*3=15. \boxed{15}", tokens=8)
LONG = Fixed(r"Let us restate the problem. 5*3=15. We check it. \boxed{15}", tokens=20)
UNSOUND = Fixed(r"5*3=14. \boxed{15}", steps=StepCount(0, 1), tokens=8)
ABC = [Fixed("a"), Fixed("b"), Fixed("c")]
WRONG = Fixed(r"\boxed{14}", correct=False, tokens=3)

# ---- heuristic judge and the tally


@pytest.mark.parametrize("first, second, vote", [
    (GOOD, WRONG, 1.0), (WRONG, GOOD, 0.0),                          # correct beats wrong, however short
    (LONG, UNSOUND, 1.0), (UNSOUND, LONG, 0.0),                      # then sound steps, however long
    (GOOD, LONG, 1.0), (LONG, GOOD, 0.0),                            # then brevity
    (GOOD, Fixed("other words", tokens=8), 0.5),
    (GOOD, Fixed(r"\boxed{15}", steps=StepCount(0, 0), tokens=2), 1.0),   # no checkable step is not sound steps
])
def test_the_heuristic_judge_orders_by_answer_then_steps_then_length(first, second, vote):
    assert HeuristicJudge().compare([Pair("p", first, second)]) == [vote]


def test_a_solution_counts_its_steps_once():
    solution = Solution(r"5*3=14. 2+2=4. \boxed{15}", True, 9)
    assert solution.steps == (1, 2) and solution.steps is solution.steps


def test_win_probabilities_are_means_over_the_other_correct_samples():
    wins, stats = judge_one(HeuristicJudge(), [GOOD, WRONG, LONG, UNSOUND])
    assert wins == [1.0, None, 0.5, 0.0]
    assert stats["comparisons"] == 6 and stats["position_bias"] == 0.0 and stats["no_votes"] == 0


def fixed_judge(function):
    return judge_by(lambda p: function(p.first.text, p.second.text))


def test_both_orders_cancel_a_pure_position_preference():
    wins, stats = judge_one(fixed_judge(lambda a, b: 0.9), [GOOD, LONG, UNSOUND])
    assert wins == pytest.approx([0.5] * 3)
    assert stats["position_bias"] == pytest.approx(0.8) and stats["order_conflicts"] == 1.0


def test_win_probability_follows_the_formula_over_both_orders():
    table = {"ab": 0.8, "ba": 0.3, "ac": 0.6, "ca": 0.6, "bc": 0.1, "cb": 0.7}
    wins, _ = judge_one(fixed_judge(lambda a, b: table[a + b]), ABC)
    ab, ac, bc = (0.8 + 1 - 0.3) / 2, (0.6 + 1 - 0.6) / 2, (0.1 + 1 - 0.7) / 2
    assert wins == pytest.approx([(ab + ac) / 2, (1 - ab + bc) / 2, (1 - ac + 1 - bc) / 2])


def spy(vote):
    """(judge, the pairs that it was asked about)."""
    asked = []
    return FakeJudge(lambda pairs: asked.extend(pairs) or [vote(p) for p in pairs]), asked


def test_identical_texts_tie_and_are_asked_once():
    judge, asked = spy(lambda p: float(p.first.text == "a"))
    wins, stats = judge_one(judge, [Fixed("a"), Fixed("a"), Fixed("b")])
    assert len(asked) == 2
    assert wins == [0.75, 0.75, 0.0]


def test_a_group_of_one_text_is_not_judged():
    judge = FakeJudge(lambda pairs: pytest.fail("asked"))
    wins, stats = judge_groups(judge, [group("p", [GOOD, WRONG, GOOD._replace(text=GOOD.text + "\n")]),
                                       group("q", [GOOD])])
    assert wins == [[0.5, None, 0.5], [None]]
    assert (stats["comparisons"], stats["skipped"]) == (0, 2)


def test_groups_with_fewer_than_two_correct_samples_are_not_judged():
    judge = FakeJudge(lambda pairs: pytest.fail("asked"))
    wins, stats = judge_groups(judge, [group("p", [GOOD, WRONG]), group("q", [WRONG]), group("r", [])])
    assert wins == [[None, None], [None], []] and stats["skipped"] == 3 and stats["comparisons"] == 0
    assert judge_groups(judge, [])[0] == [] and judge.heard == []


def test_questions_of_a_group_share_a_mark_that_depends_on_all_its_texts():
    judge, asked = spy(lambda p: 0.5)
    judge_groups(judge, [group("p", ABC), group("p", [*ABC, Fixed("d")]), group("q", ABC)])
    marks = [{pair.nonce for pair in part} for part in (asked[:6], asked[6:18], asked[18:])]
    assert [len(each) for each in marks] == [1, 1, 1] and len(set.union(*marks)) == 3
    assert f"=== {asked[0].nonce} END ===" in judge_prompt(load_rubric(), asked[0])


# ---- part of the pairs


def graded(n):
    """n correct samples, of which the first is best, in a scrambled order."""
    return [Fixed(f"c{(7 * k + 3) % n:02d}") for k in range(n)]


def grade_judge(k=0, soft=True, bias=0.0):
    """Log-odds of 0.4 per place between two of `graded`; (judge, questions of each call)."""
    calls = []

    def compare(pairs):
        calls.append(len(pairs))
        votes = [1 / (1 + math.exp(0.4 * (int(p.first.text[1:]) - int(p.second.text[1:])) - bias)) for p in pairs]
        return votes if soft else [float(v > 0.5) for v in votes]
    return FakeJudge(compare, soft=soft, pairs=k), calls


@pytest.mark.parametrize("soft", [True, False])
def test_part_of_the_pairs_ranks_like_all_of_them(soft):
    samples = graded(16)
    full, full_stats = judge_one(grade_judge(0, soft)[0], samples)
    judge, calls = grade_judge(5, soft)
    wins, stats = judge_one(judge, samples)
    assert full_stats["comparisons"] == 2 * 120
    assert calls == [2 * 5 * 8] == [stats["comparisons"]]  # one batch
    order = sorted(range(16), key=lambda i: samples[i].text)
    means = [sum(x) / 16 for x in (full, wins)]
    dots = [sum((a - m) * (b - n) for a, b in zip(x, y)) for x, y, m, n in
            ((full, wins, *means), (full, full, means[0], means[0]), (wins, wins, means[1], means[1]))]
    assert dots[0] / math.sqrt(dots[1] * dots[2]) > (0.97 if soft else 0.9)   # verdicts say less than probabilities
    if soft:
        assert wins[order[0]] == max(wins) and wins[order[-1]] == min(wins)
    assert judge_one(grade_judge(5, soft)[0], samples)[0] == wins             # the same pairs each time


def test_part_of_the_pairs_of_groups_of_different_sizes_in_one_batch():
    judge, calls = grade_judge(3)
    groups = [group("p", graded(n)) for n in (2, 8, 0, 4)] + [group("p", [GOOD, GOOD, WRONG])]
    wins, stats = judge_groups(judge, groups)
    assert calls == [2 * (1 + 12 + 6)]
    assert all(w is not None for of_group in wins[:4] for w in of_group) and wins[4] == [0.5, 0.5, None]
    assert stats["skipped"] == 2


@pytest.mark.parametrize("soft", [True, False])
def test_as_many_pairs_as_there_are_give_the_wins_of_all_pairs_to_the_last_bit(soft):
    assert judge_one(grade_judge(7, soft)[0], graded(8))[0] == judge_one(grade_judge(0, soft)[0], graded(8))[0]


def test_a_position_preference_is_taken_out_of_the_log_odds():
    biased, stats = judge_one(grade_judge(bias=2.5)[0], graded(6))
    plain, none = judge_one(grade_judge()[0], graded(6))
    assert biased == pytest.approx(plain) and none["position_bias"] == pytest.approx(0)
    assert stats["position_bias"] > 0.7                                       # as found, not as corrected


# ---- votes that are missing, judges that fail


def test_no_vote_in_one_order_is_no_vote_for_the_pair():
    votes = {"ab": 1.0, "ba": None, "ac": 1.0, "ca": 0.0, "bc": None, "cb": None}
    wins, stats = judge_one(fixed_judge(lambda a, b: votes[a + b]), ABC)
    assert wins == [1.0, None, 0.0] and stats["no_votes"] == 3
    judge = fixed_judge(lambda a, b: votes[a + b])
    assert rewards_of(judge, [sample(text) for text in "abc"]) == [1.25, 1.0, 0.75]
    judge = fixed_judge(lambda a, b: votes[a + b])
    judge.fallback = "heuristic"                                              # ab and bc: ties, all are alike
    wins, stats = judge_one(judge, ABC)
    assert wins == [0.75, 0.5, 0.25] and stats["fallbacks"] == 2


@pytest.mark.parametrize("broken", [lambda pairs: 1 / 0, lambda pairs: [0.5] * 7])
def test_a_failing_judge_costs_its_votes_not_the_run_and_is_said_once(broken):
    judge = FakeJudge(broken)
    for _ in range(3):
        wins, stats = judge_one(judge, [GOOD, LONG, UNSOUND])
        assert wins == [None] * 3 and stats["error"] and stats["no_votes"] == 6
    assert len(judge.heard) == 2
    assert stats["error"].partition(":")[0] in judge.heard[0] and "judge_fallback=heuristic" in judge.heard[1]


def test_a_question_that_a_judge_cannot_take_costs_its_own_vote_alone():
    calls = []

    def compare(pairs):
        calls.append(len(pairs))
        if any(p.first.text == "c03" for p in pairs):
            raise RuntimeError("poison")
        return [0.75] * len(pairs)

    judge = FakeJudge(compare)
    questions = [Pair("p", Fixed(f"c{k:02d}"), GOOD) for k in range(64)]
    votes, error = ask(judge, questions)
    assert votes == [None if k == 3 else 0.75 for k in range(64)] and "poison" in error
    assert len(judge.heard) == 1 and calls[:7] == [64, 32, 16, 8, 4, 2, 2] and len(calls) == 1 + 2 * 6


def test_a_judge_that_always_fails_is_given_up_soon_and_asked_again_next_time():
    calls = []
    judge = FakeJudge(lambda pairs: calls.append(len(pairs)) or 1 / 0)
    advanced = []
    questions = [Pair("p", GOOD, LONG)] * 500
    assert ask(judge, questions, advanced.append)[0] == [None] * 500
    assert len(calls) == MOST_FAILURES and sum(advanced) == 500
    assert ask(judge, questions, chunk=100)[0] == [None] * 500 and calls[MOST_FAILURES] == 100


def test_a_stop_is_not_taken_for_a_failing_judge():
    def stop(pairs):
        raise Interrupted(2)
    with pytest.raises(Interrupted):
        judge_one(FakeJudge(stop), ABC)


def test_a_judge_that_is_down_ends_the_run_where_that_is_wanted():
    judge = FakeJudge(lambda pairs: [None] * len(pairs), fallback="stop")
    with pytest.raises(UserError, match="is down: 6 of 6.*unreadable.*judge_fallback=heuristic"):
        judge_one(judge, ABC)
    votes = {"ab": 1.0, "ba": None, "ac": 1.0, "ca": 0.0, "bc": 1.0, "cb": 0.0}
    some = judge_by(lambda p: votes[p.first.text + p.second.text], fallback="stop")
    assert judge_one(some, ABC)[1]["no_votes"] == 1                           # a vote or two are no reason


def test_questions_beyond_a_models_context_are_called_so():
    judge = judge_by(lambda pair: judge.counts.update(too_long=1))
    judge_one(judge, ABC)
    assert "no vote on 100% of 6 questions (6 x too_long)" in judge.heard[0]


# ---- the judge that options name


def test_make_judge_follows_the_options(tiny_dir):
    policy = policy_of(tiny_dir, SFTConfig, train=True, lora_r=4)
    cfg = RLAIFConfig(judge="heuristic", judge_pairs=3, judge_fallback="heuristic")
    judge = make_judge(cfg.judge)
    assert (judge.name, judge.soft, judge.pairs, judge.fallback) == ("heuristic", False, 3, "heuristic")
    judge = make_judge(RLAIFConfig(judge="self").judge, policy, micro_batch_tokens=77)
    assert (judge.name, judge.soft, judge.micro_batch_tokens) == ("self", True, 77)
    cfg = RLAIFConfig(judge="openai", judge_url="http://127.0.0.1:9/v1", judge_model="m")
    assert make_judge(cfg.judge).name == "openai:m"


def test_judge_rubric_picks_by_name_or_path(tiny_dir, tmp_path):
    policy = policy_of(tiny_dir)
    path = tmp_path / "mine.txt"
    path.write_text("{problem} {first} {second} {nonce} my own rubric")
    seen = []
    for rubric in ("law", str(path)):
        cfg = load_config(RLAIFConfig, None, [f"judge_rubric={rubric}", "judge=self"])
        judge = make_judge(cfg.judge, policy)
        judge.prompt = lambda rubric, *rest: seen.append(rubric) or "x"
        judge.compare([Pair("p", GOOD, LONG)])
        assert seen[-1] == load_rubric(rubric)
    assert "senior lawyer" in seen[0] and seen[1].endswith("my own rubric")
    with pytest.raises(UserError, match="judge_rubric"):
        make_judge(JudgeOptions(name="self", rubric="poetry"), policy)
    with pytest.raises(UserError, match="judge_pairs"):
        load_config(RLAIFConfig, None, ["judge_plan=listwise"])


def test_a_missing_sdk_is_said_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[judge\]'"):
        make_judge(JudgeOptions(name="openai", url="http://127.0.0.1:9/v1", model="m"))
