"""The canary: judges whose figures are known, and the pairs of a rollout."""
from judging import FakeJudge, Fixed, group, judge_by

from minimath.judges.base import HeuristicJudge
from minimath.judges.pairs import Canary, canary_figures, rollout_pairs


def test_the_fixed_pairs_all_pass_the_verifier_and_depend_on_the_seed_alone():
    pairs = Canary(4, None).pairs
    assert pairs == Canary(4, None).pairs != Canary(5, None).pairs
    assert [p.kind for p in pairs[:3]] == ["unsound", "long", "unsound"] and len(pairs) == 24
    assert all(p.first.correct and p.second.correct and p.first.text != p.second.text for p in pairs)


def test_the_canary_tells_an_oracle_a_coin_and_a_fooled_judge_apart():
    pairs = Canary(0, None, 15).pairs
    assert canary_figures(HeuristicJudge(), pairs)["worse_wins"] == 0.0
    always_a = canary_figures(judge_by(lambda p: 1.0), pairs)
    assert always_a["worse_wins"] == always_a["agreement"] == 0.5 and always_a["position_bias"] == 1.0
    longer = canary_figures(judge_by(lambda p: 0.5 + 0.5 * ((len(p.first.text) > len(p.second.text))
                                                          - (len(p.first.text) < len(p.second.text)))), pairs)
    assert longer["worse_wins_long"] == 1.0
    assert longer["worse_wins_unsound"] < 0.8 and longer["agreement"] < 0.4 and longer["pairs"] == 30


def test_the_canary_never_raises_and_names_what_failed():
    facts = canary_figures(FakeJudge(lambda pairs: 1 / 0), Canary(0, None, 3).pairs)
    assert facts["worse_wins"] is None and facts["no_votes"] == 12 and "ZeroDivisionError" in facts["error"]
    assert canary_figures(HeuristicJudge(), [])["agreement"] is None


def test_rollout_pairs_take_a_correct_and_a_wrong_sample_of_similar_length_per_group():
    def one(text, correct, tokens):
        return Fixed(text, correct, tokens=tokens)

    groups = [group("p", [one("a", True, 30), one("b", False, 5), one("c", False, 29), one(" ", False, 30)]),
              group("all correct", [one("d", True, 9)]), group("q", [one("e", False, 4), one("f", True, 40)])]
    pairs = rollout_pairs(groups)
    assert [(p.problem, p.first.text, p.second.text) for p in pairs] == [("p", "a", "c"), ("q", "f", "e")]
    assert rollout_pairs(groups, limit=1) == pairs[:1]
    assert canary_figures(HeuristicJudge(), pairs)["worse_wins_rollout"] == 0.0


def test_the_metrics_of_a_step_have_both_sets_of_pairs():
    groups = [group("p", [Fixed("a", True), Fixed("b", False)])]
    canary = Canary(3, HeuristicJudge(), problems=3)
    metrics = canary.metrics(groups)
    assert (metrics["canary/pairs"], metrics["canary/rollout_pairs"]) == (6, 1)
    wins = [metrics[f"canary/{name}"] for name in ("worse_wins", "rollout_worse_wins", "worse_wins_unsound")]
    assert wins == [0.0, 0.0, 0.0]
    assert metrics["canary/agreement"] == 1.0 and metrics["canary/error"] == "" and metrics["canary/no_votes"] == 0
    assert canary.metrics([])["canary/rollout_worse_wins"] is None
