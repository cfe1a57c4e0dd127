"""minimath judge check data=: the tables, what is recommended, what was in the judge's training."""
import json
from types import SimpleNamespace

import pytest
from awake import awake_run
from judging import FakeJudge, judge_by

from minimath.commands import judge_check as command
from minimath.commands.judge_check import certificate
from minimath.core.errors import UserError
from minimath.judges.known import HIDDEN, problem_hash


def row(n: int, label: int, words: int) -> dict:
    """A made row of ProcessBench's form; a wrong step says so, `words` make it longer."""
    steps = [f"We begin with {n}.", "Then we add 2" + " very" * words + " carefully.", f"The answer is {n + 2}."]
    steps[label] += " wrong" * (label >= 0)
    return {"problem": f"What is {n} plus 2?", "steps": steps, "label": label, "final_answer_correct": True}


ROWS = [made for n in range(25) for made in (row(n, -1, n), row(n, n % 3, 25 - n))]


class Trained(FakeJudge):
    """A judge of form single as judge_adapter gives one, with the hashes of its problems."""
    name, form = "self", "single"

    def __init__(self, grade, problems=()):
        super().__init__(lambda pairs: 1 / 0)
        self.of, self.card, self.reader = grade, SimpleNamespace(problems=list(problems)), None

    def grade_all(self, questions):
        self.counts.update(prompts=len(questions), prompt_tokens=50 * len(questions))
        return [(self.of("".join(q.steps)), [self.of("".join(q.steps[:k + 1])) for k in range(len(q.steps))])
                for q in questions]


def perfect(text: str) -> float:
    return 0.1 if "wrong" in text else 0.9


@pytest.fixture
def check(here, tmp_path, monkeypatch):
    """check(JUDGE, rows, *words) -> (output, judge-check.json), with the judge in the place of judge_adapter=x."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def run(judge, *words):
        plain = Trained(lambda text: 0.5)
        monkeypatch.setattr(command, "as_trained", lambda cfg: cfg)
        monkeypatch.setattr(command, "load_and_say", lambda cfg, log: None)
        monkeypatch.setattr(command, "make_judge", lambda options, *_, **__: judge if options.adapter else plain)
        judge.reader = object()
        status, out, err = here("judge", "check", "judge=self", "judge_adapter=x", "data=rows.jsonl", "probes=data",
                                "out=check", *words)
        assert status == 0, out + err
        assert (plain.reader is judge.reader) == ("untrained" in out)  # asked with the same prompts
        return out, json.loads((tmp_path / "check" / "judge-check.json").read_text())

    return run


def test_a_judge_is_checked_on_the_base_that_it_was_trained_on(here, tmp_path, tiny_dir, monkeypatch):
    awake_run(tmp_path / "judge", tiny_dir)
    seen = []

    def load(cfg, log):
        seen.append((cfg.model.name, cfg.adapter.path))
        raise UserError("enough")

    monkeypatch.setattr(command, "load_and_say", load)
    assert here("judge", "check", "judge_adapter=judge", "probes=pairs")[0] == 2 and seen == [(tiny_dir, "")]


def test_a_perfect_judge_is_recommended_with_its_figures(check):
    out, result = check(Trained(perfect, [problem_hash("another problem")]))
    assert "judge=self is recommended: on right answers with a wrong step (25 rows) its AUC is 100%" in out
    assert list(result["data"]["judges"]) == ["self", "length alone", "heuristic", "untrained"]
    lines = [line for line in out.splitlines() if line.startswith(HIDDEN)]
    assert [sum(name in line for line in lines) for name in result["data"]["judges"]] == [2] * 4  # in both tables
    assert "none of the 25 problems was in the judge's training (by hashes)" in out
    assert result["data"]["held_out"].startswith("none of the 25")
    assert "self: cost per question: " in out and "50 prompt_tokens" in out  # one forward gives a grade and its steps
    assert result["data"]["judges"]["self"]["cost"]["prompt_tokens"] == 50
    assert "Brier score 0.010, 0.250 for always saying 0.50" in out
    assert result["data"]["judges"]["self"]["process"]["rows"]["f1"] == 1.0
    assert result["advice"][-1] in out and result["options"]["data"] == "rows.jsonl"


@pytest.mark.parametrize("judge", [Trained(lambda text: 1 / len(text)), Trained(lambda text: 0.5),
                                   judge_by(lambda p: float(len(p.first.text) < len(p.second.text)))])
def test_a_judge_that_knows_length_or_nothing_is_not_recommended(check, judge):
    judge.card = SimpleNamespace(problems=[])
    out, _ = check(judge)
    assert "is not recommended, it does not surely beat length alone: on right answers with a wrong step (25" in out
    assert "judge.json names no problems" in out


def test_problems_of_the_training_are_left_out_and_counted(check):
    out, result = check(Trained(perfect, [problem_hash(made["problem"]) for made in ROWS[:20]]))
    assert "20 of 50 rows left out: their problems were in the judge's training" in out
    assert result["data"]["left_out"] == 20 and result["data"]["kinds"] == {"sound": 15, HIDDEN: 15}
    assert result["data"]["held_out"] in out
    assert "not enough rows to recommend judge=self: 15 of a right answer with a wrong step, and 20 are needed" in out


def test_a_limit_is_drawn_and_said_and_baselines_can_be_left_out(check):
    out, result = check(Trained(perfect), "limit=30", "seed=3", "baselines=heuristic")
    assert "data: 30 rows of 50, drawn by seed=3" in out and result["data"]["drawn"] == 30
    assert list(result["data"]["judges"]) == ["self", "length alone", "heuristic"]


def test_a_judge_of_pairs_says_how_many_solutions_have_a_pair(check, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, row(99, 1, 0), {"a": 1}]))
    judge = judge_by(lambda p: float("wrong" not in p.first.text))
    judge.card = SimpleNamespace(problems=[])
    out, result = check(judge)
    assert "25 pairs within a problem, of 50 of 51 solutions" in out and "51 rows kept, 1 skipped" in out
    assert "rows.jsonl:52: no solutions to judge" in out
    assert "its agreement is 100%" in out and "AUC" not in out
    assert "auc" not in result["data"]["judges"]["fake"]


def test_a_judge_that_fails_is_named(check):
    out, _ = check(Trained(lambda text: 1 / 0))
    assert "the judge failed on data: ZeroDivisionError" in out and "not enough rows" in out


def test_few_rows_are_called_too_few_and_a_lack_of_pairs_is_no_error():
    figures = {"judges": {"self": {"error": "", "pairs": {}}}}
    assert "not enough rows to recommend judge=self: 0 of" in certificate("self", figures)[0]


def test_of_too_few_rows_the_kind_that_is_missing_is_named():
    auc = {HIDDEN: {"sound": 5, "faulty": 100, "auc": 0.7, "length": 0.6, "gain": [0.1, 0.01, 0.2]}}
    [said] = certificate("self", {"judges": {"self": {"error": "", "pairs": {}, "auc": auc}}})
    assert "5 sound ones" in said and "5 of a right answer" not in said


@pytest.mark.parametrize("low, said", [(0.001, "judge=self is recommended"), (0.0, "is not recommended"),
                                       (-0.01, "is not recommended")])
def test_a_gain_that_may_be_none_recommends_nobody(low, said):
    auc = {HIDDEN: {"sound": 99, "faulty": 50, "auc": 0.7, "length": 0.6, "gain": [0.1, low, 0.2]}}
    assert said in certificate("self", {"judges": {"self": {"error": "", "pairs": {}, "auc": auc}}})[0]


# ---- the command itself


def test_the_data_of_a_recipe_are_not_those_of_a_check(here, tmp_path):
    (tmp_path / "my.yaml").write_text("data: gone.jsonl\nlimit: 3\nrlaif:\n  judge: heuristic\n")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    status, out, err = here("judge", "check", "my.yaml", "pairs=1", "problems=1", "out=one")
    assert status == 0, out + err
    assert "data" not in json.loads((tmp_path / "one" / "judge-check.json").read_text())
    status, out, err = here("judge", "check", "my.yaml", "pairs=1", "probes=pairs,data", "data=rows.jsonl", "out=two")
    result = json.loads((tmp_path / "two" / "judge-check.json").read_text())
    assert status == 0 and result["data"]["drawn"] == 50 and {"pairs", "data"} <= set(result), out + err
    assert list(result["data"]["judges"]) == ["heuristic", "length alone"] and result["data"]["held_out"] == ""


@pytest.mark.parametrize("form", ["pair", "single", "steps"])
def test_a_model_judges_the_data_in_each_form(here, tiny_dir, tmp_path, form):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:8]))
    status, out, err = here("judge", "check", f"model={tiny_dir}", "judge=self", f"judge_form={form}", "dtype=fp32",
                            "device=cpu", "probes=data", "data=rows.jsonl", "out=check")
    assert status == 0, out + err
    own = json.loads((tmp_path / "check" / "judge-check.json").read_text())["data"]["judges"]["self"]
    assert own["pairs"][HIDDEN]["voted"] == 4 and ("auc" in own) == ("process" in own) == (form != "pair")
    assert own["cost"]["prompt_tokens"] > 10 and "not enough rows" in out


@pytest.mark.parametrize("words", [["probes=data"], ["limit=3"], ["baselines=heuristic"]])
def test_options_that_would_do_nothing_are_refused(here, words):
    status, _, err = here("judge", "check", "judge=heuristic", *words)
    assert status == 2 and "the probe data needs data=FILE" in err


def test_help_explains_the_data(here):
    status, out, _ = here("judge", "check", "--help")
    assert status == 0 and "error_steps" in out and all(f"  {name}=" in out for name in ("data", "limit", "baselines"))
    _, out, _ = here("judge", "compare", "--help")
    assert "  limit=" not in out
