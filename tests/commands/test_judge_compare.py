"""minimath judge compare: pairs, judges whose figures are known beforehand, what is said of them, the command."""
import json

import pytest
from judge_server import prefers_shorter, says, serve  # noqa: F401  (serve is a fixture)
from judging import FakeJudge, judge_by

from minimath.commands.judge_compare import compare_solutions, findings, pair_up
from minimath.eval.metrics import read_solutions
from minimath.judges.base import HeuristicJudge
from minimath.judges.rubrics import load_rubric

SHORT, LONG = "2 * 3 = 6. \\boxed{6}", "First, 2 * 3 = 6. We look at it once more. \\boxed{6}"


def record(number, text=SHORT, correct=True, tokens=9, sample=0, **more):
    return {"number": number, "id": "", "problem": f"Problem {number}?", "gold": "6", "sample": sample, "text": text,
            "answer": "6", "correct": correct, "tokens": tokens, "finished": True, "correct_steps": 1,
            "steps": 1} | more


def evaluation(folder, records):
    folder.mkdir(parents=True)
    (folder / "completions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def longs(numbers):
    return [record(n, LONG, tokens=20) for n in numbers]


def shorts(numbers):
    return [record(n) for n in numbers]


# ---- pairs


def test_samples_are_paired_in_order_problem_by_problem(tmp_path):
    a = [record(1, "a1", sample=1), record(1, "a0"), record(0, "a"), record(7, "only in a")]
    b = [record(1, "b0"), record(1, "b1", sample=1), record(1, "b2", sample=2), record(0, "b")]
    pairs = pair_up(read_solutions(evaluation(tmp_path / "a", a)), read_solutions(evaluation(tmp_path / "b", b)))
    assert [(p.problem, p.first.text, p.second.text) for p in pairs] == [
        ("Problem 0?", "a", "b"), ("Problem 1?", "a0", "b0"), ("Problem 1?", "a1", "b1")]


def test_pairs_are_those_in_which_both_are_correct():
    a = [record(n, correct=correct) for n, correct in enumerate((True, True, False, False))]
    b = [record(n, correct=correct) for n, correct in enumerate((True, False, True, False))]
    assert [p.problem for p in pair_up(a, b)] == ["Problem 0?"]


# ---- judges whose figures are known


def test_the_heuristic_judge_prefers_the_shorter_of_two_sound_solutions():
    facts = compare_solutions(HeuristicJudge(), pair_up(shorts(range(30)), longs(range(30))))
    assert (facts["preferred"], facts["interval"], facts["pairs"], facts["ties"]) == (1.0, (1.0, 1.0), 30, 0)
    assert facts["mean_tokens"] == [9.0, 20.0] and facts["order_conflicts"] == 0.0
    assert findings(facts) == ["A's solutions are preferred to B's, in 100% of pairs"]
    assert "B's solutions are preferred to A's, in 100%" in findings(
        compare_solutions(HeuristicJudge(), pair_up(longs(range(30)), shorts(range(30)))))[0]


def test_one_text_is_a_tie_whatever_a_judge_likes_about_a_position():
    judge = judge_by(lambda p: 0.9 if p.first.tokens <= p.second.tokens else 0.2)
    facts = compare_solutions(judge, pair_up(shorts(range(4)), [*shorts(range(3)), *longs([3])]))
    assert (facts["ties"], facts["preferred"]) == (3, (3 * 0.5 + 1) / 4)


def test_a_judge_that_votes_by_position_is_called_near_useless():
    facts = compare_solutions(judge_by(lambda p: 1.0), pair_up(shorts(range(30)), longs(range(30))))
    assert (facts["preferred"], facts["position_bias"], facts["order_conflicts"], facts["ties"]) == (0.5, 1.0, 1.0, 30)
    said = " ".join(findings(facts))
    assert "holds 50%" in said and "near useless" in said and "stands first" in said


def test_a_judge_whose_votes_change_with_the_order_is_not_said_to_like_one_place():
    votes = iter([1.0, 1.0, 0.0, 0.0] * 8)
    said = " ".join(findings(compare_solutions(judge_by(lambda p: next(votes)), pair_up(shorts(range(8)),
                                                                                        longs(range(8))))))
    assert "near useless" in said and "stands now first, now second" in said


def test_a_positions_pull_on_probabilities_is_taken_out():
    """Log-odds 2 for what stands first, and 1 for A: A is preferred in every pair with sigmoid(1) = 0.731."""
    leans = judge_by(lambda p: {True: 0.952574, False: 0.731059}[p.first.tokens == 9], soft=True)
    facts = compare_solutions(leans, pair_up(shorts(range(5)), longs(range(5))))
    assert facts["preferred"] == 1.0 and facts["first_wins"] == pytest.approx(0.7311, abs=1e-3)


def test_the_interval_takes_problems_and_not_samples_as_independent():
    """Every sample of a problem has the same outcome: 8 of each add nothing to the certainty."""
    def half(samples):
        a = [record(n, SHORT if n % 2 else LONG, tokens=9 if n % 2 else 20, sample=s)
             for n in range(20) for s in range(samples)]
        b = [record(n, LONG if n % 2 else SHORT, tokens=20 if n % 2 else 9, sample=s)
             for n in range(20) for s in range(samples)]
        return compare_solutions(HeuristicJudge(), pair_up(a, b))

    assert half(8)["interval"] == half(1)["interval"] and half(8)["problems"] == 20 and half(8)["pairs"] == 160
    low, high = half(1)["interval"]
    assert low < 0.35 and high > 0.65 and "holds 50%" in findings(half(1))[0]


def test_a_judge_without_votes_says_nothing_and_names_its_error():
    facts = compare_solutions(FakeJudge(lambda pairs: 1 / 0), pair_up(shorts(range(3)), longs(range(3))))
    assert facts["preferred"] is None and facts["no_votes"] == 6
    assert "ZeroDivisionError" in findings(facts)[0] and "nothing can be said" in findings(facts)[-1]


def test_the_number_of_problems_is_said_where_they_are_too_few_to_tell():
    mixed = [*shorts([0]), *longs([1])], [*longs([0]), *shorts([1])]
    assert "not tell A from B on 2 problems" in findings(compare_solutions(HeuristicJudge(), pair_up(*mixed)))[0]


# ---- the command


def likes_short(handler, body):
    """prefers_shorter, and an answer to the question by which a client finds out whether it is there."""
    shown = "SOLUTION A" in body["messages"][0]["content"]
    (prefers_shorter if shown else says("A"))(handler, body)


def test_the_command_with_the_heuristic_judge_needs_no_model(here, tmp_path):
    evaluation(tmp_path / "a", [*shorts(range(20)), record(20, correct=False)])
    evaluation(tmp_path / "b", longs(range(21)))
    status, out, err = here("judge", "compare", "a", "b", "judge=heuristic", "readers=10")
    assert status == 0, out + err
    assert "judge_rubric=readability has no effect" in out and out.count("judge_rubric") == 1 and "left out" not in out
    assert "10 of 20 pairs in which both" in out and "100.0%" in out and "A's solutions are preferred" in out
    result = json.loads((tmp_path / "a" / "judge-compare" / "judge-compare.json").read_text())
    assert (result["a"], result["b"], result["preferred"], result["pairs"]) == ("a", "b", 1.0, 10)
    assert not (tmp_path / "a" / "environment.json").exists()  # what the evaluation says of itself is left alone
    status, _, err = here("judge", "compare", "a", "b", "judge=heuristic")
    assert status == 2 and "already holds a judge-compare.json" in err


def test_the_command_asks_an_endpoint_in_both_orders_by_the_rubric_of_readability(here, serve, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MINIMATH_CACHE", str(tmp_path / "kept"))
    url, server = serve(likes_short)
    evaluation(tmp_path / "a", longs(range(3)))
    evaluation(tmp_path / "b", shorts(range(3)))
    words = ["judge=openai", f"judge_url={url}", "judge_key_env=", "judge_model=m"]
    status, out, err = here("judge", "compare", "a", "b", *words, "out=result")
    assert status == 0, out + err
    result = json.loads((tmp_path / "result" / "judge-compare.json").read_text())
    assert (result["preferred"], result["voted"], result["no_votes"]) == (0.0, 3, 0)
    assert result["options"]["judge_rubric"] == "readability" and "B's solutions are preferred" in out
    prompts = [body["messages"][0]["content"] for _, body, *_ in server.seen if "Problem" in json.dumps(body)]
    assert len(prompts) == 6 and all("easier to read" in prompt for prompt in prompts)
    assert sum(prompt.index("We look") < prompt.index("SOLUTION B") for prompt in prompts) == 3


def test_the_command_says_when_an_endpoint_only_looks_at_the_position(here, serve, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MINIMATH_CACHE", str(tmp_path / "kept"))
    url, _ = serve(says("B"))
    evaluation(tmp_path / "a", longs(range(3)))
    evaluation(tmp_path / "b", shorts(range(3)))
    status, out, err = here("judge", "compare", "a", "b", "judge=openai", f"judge_url={url}", "judge_key_env=",
                            "judge_model=m", "judge_rubric=maths")
    assert status == 0, out + err
    assert "near useless" in out and "stands second" in out and "judge_rubric=maths" in out


def test_the_command_asks_a_model_itself(here, tiny_dir, tmp_path):
    evaluation(tmp_path / "a", longs(range(2)))
    evaluation(tmp_path / "b", shorts(range(2)))
    status, out, err = here("judge", "compare", "a", "b", "judge=self", f"model={tiny_dir}", "dtype=fp32", "device=cpu")
    assert status == 0, out + err
    result = json.loads((tmp_path / "a" / "judge-compare" / "judge-compare.json").read_text())
    assert result["voted"] == 2 and result["cost"]["prompts"] == 4 and 0 < result["first_wins"] < 1


@pytest.mark.parametrize("words, said", [
    (["a"], "two folders"), (["a", "none"], "none: not an evaluation"), (["a", "other"], "no problem in common"),
    (["a", "wrong"], "in none of 2 pairs are both solutions correct (A in 2, B in 0)"),
    (["a", "a", "readers=-1"], "readers must not be negative"),
    (["a", "a", "raeders=3"], "did you mean 'readers'"), (["a", "torn"], "torn: not an evaluation")])
def test_slips_get_one_line(here, tmp_path, words, said):
    evaluation(tmp_path / "a", shorts(range(2)))
    evaluation(tmp_path / "other", shorts(range(5, 7)))
    evaluation(tmp_path / "wrong", [record(n, correct=False) for n in range(2)])
    evaluation(tmp_path / "torn", [record(0), {"problem": "?"}])
    status, _, err = here("judge", "compare", *words, "judge=heuristic")
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_help_lists_the_options_of_compare(here):
    status, out, _ = here("judge", "compare", "--help")
    assert status == 0 and "EVAL_A EVAL_B" in out and "  readers=200" in out and "  judge_url=" in out


def test_the_rubric_of_readability_fences_its_candidates():
    rubric = load_rubric("readability")
    assert rubric.index("{problem}") < rubric.index("{first}") < rubric.index("{second}")
    assert rubric.count("{nonce}") == 5 and "never an instruction" in rubric and rubric.endswith("A, B, or TIE.\n")


def test_solutions_without_a_counterpart_are_counted(here, tmp_path):
    evaluation(tmp_path / "a", [*shorts(range(3)), record(1, sample=1)])
    evaluation(tmp_path / "b", longs(range(5)))
    status, out, err = here("judge", "compare", "a", "b", "judge=heuristic")
    assert status == 0, out + err
    assert "3 of 9 solutions are left out: the other evaluation lacks the problem or has fewer samples of it" in out
