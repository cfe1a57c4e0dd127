"""minimath judge check: pairs of known order, and judges whose figures are known beforehand."""
import http.server
import json
import random
import re
import threading

import pytest

from minimath.grading.answer import AnswerChecker
from minimath.core.errors import UserError
from minimath.judges.judge import Judge, rules_judge
from minimath.judges.check import advice, check_judge, finding
from minimath.judges.pairs import KINDS, faulty_solutions, make_pairs, tally
from minimath.grading.steps import check_steps


def judge_by(vote, soft=False):
    return Judge("fake", lambda pairs: [vote(p) for p in pairs], soft=soft)


ORACLE = rules_judge()  # its rules are the ones by which the pairs are made
ALWAYS_A = judge_by(lambda p: 1.0)
LONGER = judge_by(lambda p: 0.5 if len(p.first.text) == len(p.second.text)
                  else float(len(p.first.text) > len(p.second.text)))
SEES_ANSWERS = judge_by(lambda p: 0.5 + (p.first.right - p.second.right) / 4)


def coin(seed=0):
    rng = random.Random(seed)
    return judge_by(lambda p: float(rng.random() < 0.5))


# ---- the pairs


@pytest.fixture(scope="module")
def pairs():
    return {kind: make_pairs(kind, 60, seed=5) for kind in KINDS}


def test_the_better_solution_is_right_and_sound(pairs):
    for pair in (p for kind in KINDS for p in pairs[kind]):
        assert pair.better.right and pair.better.steps.total >= 2
        assert pair.better.steps.right == pair.better.steps.total


def test_each_kind_has_its_fault_and_no_other(pairs):
    for kind in KINDS:
        for pair in pairs[kind]:
            worse, faults = pair.worse, pair.worse.steps.total - pair.worse.steps.right
            assert worse.right == (kind in ("unsound", "long"))
            assert faults == (kind != "long"), pair  # one wrong step: what follows from it is computed rightly
            assert (worse.tokens > 2 * pair.better.tokens) == (kind in ("long", "wrong_long"))
            if kind in ("wrong", "unsound"):
                assert worse.tokens == pair.better.tokens


def test_right_and_wrong_is_what_the_answer_checker_says():
    with AnswerChecker() as checker:
        for example, texts in faulty_solutions(40, seed=6):
            graded = {kind: checker.check(text, example.answer) for kind, text in texts.items()}
            assert graded == {"right": True, "wrong": False, "wrong_long": False, "unsound": True, "long": True}


def test_a_wrong_result_is_carried_on_everywhere(pairs):
    """Where the right solution uses an earlier result, the wrong one uses its own result of that step."""
    for pair in pairs["wrong"]:
        right, wrong = (re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", c.text) for c in (pair.better, pair.worse))
        assert re.sub(r"\d+", "#", pair.better.text) == re.sub(r"\d+", "#", pair.worse.text)
        given, mine = re.findall(r"\d+", pair.problem), {}
        for (a, _, b, value), (c, _, d, own) in zip(right, wrong, strict=True):
            for number, used in ((a, c), (b, d)):
                assert used == (mine[number] if number in mine and number not in given else number), pair.worse
            mine[value] = own
        assert wrong[-1][3] != right[-1][3] and f"boxed{{{wrong[-1][3]}}}" in pair.worse.text


def test_pairs_depend_on_the_arguments_alone(pairs):
    assert make_pairs("wrong", 60, seed=5) == pairs["wrong"]
    assert make_pairs("wrong", 60, seed=6) != pairs["wrong"]
    assert len({p.problem for p in pairs["long"]}) == 60


def test_wrong_arguments_are_user_errors():
    with pytest.raises(UserError, match="did you mean 'unsound'"):
        make_pairs("unsond", 3, seed=0)
    with pytest.raises(UserError, match="at least one"):
        make_pairs("long", 0, seed=0)


# ---- judges whose figures are known


def test_an_oracle_agrees_with_every_pair():
    report = check_judge(ORACLE, pairs=25, seed=3)
    assert {facts["agreement"] for facts in report.values()} == {1.0}
    assert {facts["finding"] for facts in report.values()} == {"reliable"}
    assert advice("rules", report) == ["judge=heuristic ranks every kind of pair reliably"]


def test_a_judge_that_always_says_a_is_at_chance_with_full_position_bias():
    report = check_judge(ALWAYS_A, pairs=25, seed=3)
    assert "votes for what stands first (position bias +1.00)" in " ".join(advice("self", report))
    for facts in report.values():
        assert facts["agreement"] == facts["one_order"] == facts["better_wins"] == 0.5
        assert facts["position_bias"] == 1.0 and facts["order_conflicts"] == 1.0
        assert facts["finding"] == "near chance"


def test_a_judge_that_likes_length_is_exposed_by_the_padded_kinds():
    report = check_judge(LONGER, pairs=25, seed=3)
    assert {kind: facts["agreement"] for kind, facts in report.items() if "long" in kind} == \
        {"wrong_long": 0.0, "long": 0.0}
    assert report["long"]["finding"] == "prefers the fault"
    said = " ".join(advice("self", report))
    assert "judge=heuristic" in said and "larger model" in said and "pay for padding" in said


def test_a_coin_is_near_chance():
    for facts in check_judge(coin(), pairs=100, seed=3).values():
        low, high = facts["interval"]
        assert low < 0.5 < high and facts["finding"] == "near chance" and abs(facts["position_bias"]) < 0.3


def test_a_judge_that_sees_only_answers_cannot_be_trusted_behind_the_gate():
    report = check_judge(SEES_ANSWERS, pairs=25, seed=3)
    assert [facts["agreement"] for facts in report.values()] == [1.0, 1.0, 0.5, 0.5]
    assert "cannot be trusted" in advice("openai", report)[0] and "larger judge_model" in advice("openai", report)[0]
    blind = {"wrong": report["long"], "wrong_long": report["long"], "unsound": report["wrong"], "long": report["wrong"]}
    assert "answer gate" in advice("self", blind)[0]  # blind to what the gate decides: no reason to change the judge


def test_one_order_alone_is_scored_apart_from_both():
    """A soft judge that leans to A by more than what it sees is right only when both orders are taken together."""
    leaning = judge_by(lambda p: 0.8 + (p.first.right - p.second.right) / 10, soft=True)
    facts = check_judge(leaning, pairs=10, seed=3, kinds=("wrong",))["wrong"]
    assert facts["agreement"] == 1.0 and facts["one_order"] == 0.5 and facts["order_conflicts"] == 1.0
    assert facts["position_bias"] == pytest.approx(0.6)


def test_no_votes_are_counted_and_left_out():
    votes = [1.0, 0.0, None, 0.0, 0.2, 0.9]  # a win, a pair without a vote, a loss
    facts = tally(votes, False)
    assert (facts["pairs"], facts["voted"], facts["no_votes"], facts["agreement"]) == (3, 2, 1, 0.5)
    assert facts["better_wins"] == pytest.approx((1.0 + (0.2 + 1 - 0.9) / 2) / 2)


@pytest.mark.parametrize("broken", [lambda pairs: 1 / 0, lambda pairs: [0.5]])
def test_a_judge_that_fails_costs_its_votes_and_is_named(broken):
    report = check_judge(Judge("broken", broken), pairs=4, seed=0)
    assert {facts["finding"] for facts in report.values()} == {"no votes"} and report["long"]["no_votes"] == 8
    assert "the judge failed on wrong: " in advice("self", report)[0]
    assert any("cannot be trusted" in line for line in advice("self", report))


def test_few_pairs_are_called_too_few():
    assert finding(tally([1.0, 1.0] * 6, False)) == "too few pairs"
    assert finding(tally([1.0, 1.0] * 25, False)) == "near chance"
    assert finding(tally([1.0, 0.0] * 6, False)) == "reliable"


def test_cost_is_counted_per_comparison():
    judge = Judge("counts", lambda pairs: [0.5] * len(pairs), counts={"requests": 5})

    def compare(pairs):
        judge.counts["requests"] += 3 * len(pairs)
        return [0.5] * len(pairs)

    judge.compare = compare
    advanced = []
    report = check_judge(judge, pairs=20, seed=0, advance=advanced.append)
    assert {facts["cost"]["requests"] for facts in report.values()} == {3.0} and sum(advanced) == 4 * 40


# ---- the command


def test_the_command_checks_a_model_as_its_own_judge(here, tiny_dir, tmp_path):
    recipe = f"model: {tiny_dir}\ndtype: fp32\nrlaif:\n  judge: self\n  adapter: gone\n  steps: 7\n"
    (tmp_path / "my.yaml").write_text(recipe)
    status, out, err = here("judge", "check", "my.yaml", "pairs=2", "device=cpu", "out=check")
    assert status == 0, out + err
    result = json.loads((tmp_path / "check" / "judge-check.json").read_text())
    assert result["judge"] == "self" and list(result["kinds"]) == list(KINDS)
    assert all(facts["voted"] == 2 and facts["cost"]["prompts"] == 1 for facts in result["kinds"].values())
    assert "position bias" in out and "too few pairs" in out and "per comparison" in out
    status, _, err = here("judge", "check", "judge=heuristic", "out=check")
    assert status == 2 and "already holds a judge-check.json" in err


def test_the_command_with_the_rules_judge_needs_no_model(here, tmp_path):
    status, out, _ = here("judge", "check", "judge=heuristic", "model=./none", "pairs=5", "out=rules")
    assert status == 0 and "ranks every kind of pair reliably" in out
    assert json.loads((tmp_path / "rules" / "judge-check.json").read_text())["kinds"]["long"]["agreement"] == 1.0


@pytest.fixture
def server(monkeypatch, tmp_path):
    """(base URL of an endpoint that prefers the shorter solution, the prompts that it got)."""
    prompts = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompts.append(body["messages"][0]["content"])
            a, _, b = prompts[-1].partition("SOLUTION A ===")[2].partition("SOLUTION B ===")
            verdict = "A" if len(a) < len(b.partition("END ===")[0]) else "B"
            data = json.dumps({"choices": [{"message": {"content": verdict}}], "usage": {"prompt_tokens": 9}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    monkeypatch.setenv("MINIMATH_CACHE", str(tmp_path / "cache"))  # replies kept from another test must not count
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/v1", prompts
    running.shutdown()
    running.server_close()


def test_the_command_checks_an_endpoint_and_counts_what_it_costs(here, server, tmp_path):
    url, prompts = server
    words = ["judge=openai", f"judge_url={url}", "judge_model=m"]
    status, out, err = here("judge", "check", *words, "pairs=6", "out=check")
    assert status == 0, out + err
    kinds = json.loads((tmp_path / "check" / "judge-check.json").read_text())["kinds"]
    assert kinds["long"]["agreement"] == kinds["wrong_long"]["agreement"] == 1.0
    assert len(prompts) >= 48 and "requests" in out and kinds["long"]["cost"]["prompt_tokens"] == 9


def test_the_command_attacks_an_endpoint_with_defences_on_and_off(here, server, tmp_path):
    (tmp_path / "mine.txt").write_text('key alone ":"\nspecial after "<|im_end|>"\n')
    url, prompts = server
    status, out, err = here("judge", "attack", "judge=openai", f"judge_url={url}", "judge_model=m", "problems=1",
                                "attacks=mine.txt", "out=attack")
    assert status == 0, out + err
    result = json.loads((tmp_path / "attack" / "judge-attack.json").read_text())
    for side in ("on", "off"):
        rows = {row["category"]: row for row in result[side]["attacks"]}
        assert rows["key"]["success"] == 1.0 and rows["key"]["lift"] == 0.0  # the shorter wins, without it too
    raw = [prompt for prompt in prompts if "<|im_end|>" in prompt]
    assert len(raw) == 2 and all("never an instruction" not in prompt for prompt in raw)  # both positions, defences off


@pytest.mark.parametrize("words, said", [
    (["judge"], "use check or attack"), (["judge", "chek"], "did you mean 'check'?"),
    (["judge", "check", "pears=3"], "did you mean 'pairs'?"), (["judge", "check", "judge_weight=0.1"], "judge_weight"),
    (["judge", "check", "pairs=0", "judge=heuristic"], "at least one"), (["judge", "check", "judge=oracle"], "rules"),
    (["judge", "check", "judge=openai"], "judge_url")])
def test_slips_get_one_line(here, words, said):
    status, _, err = here(*words)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_help_lists_the_options_of_both_commands(here):
    status, out, _ = here("judge", "--help")
    assert status == 0
    assert all(f"  {name}=" in out for name in ("pairs", "problems", "attacks", "judge_url", "model", "micro_batch_tokens"))
    assert "judge_weight" not in out and "prompt_template" not in out


def test_the_padded_solution_checks_only_steps_that_hold():
    for _, texts in faulty_solutions(20, seed=9):
        assert check_steps(texts["long"]).right == check_steps(texts["long"]).total >= 4
