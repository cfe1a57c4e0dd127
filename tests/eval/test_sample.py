"""minimath sample: which solutions are kept, and the command end to end into a training run."""

import json

import pytest
from toy import write_problems

from minimath.core.errors import UserError
from minimath.eval import evaluate as evaluation
from minimath.eval.sample import SampleConfig, kept_rows, sample


def record(number, sample, text, correct=True, tokens=10, steps=(1, 1), finished=True):
    return {"number": number, "id": f"p{number}", "problem": "q", "gold": "4", "sample": sample, "text": text,
            "answer": "4", "correct": correct, "tokens": tokens, "finished": finished, "correct_steps": steps[0],
            "steps": steps[1]}


def test_the_shortest_sound_correct_solution_of_each_problem_is_kept():
    records = [record(0, 0, "long", tokens=20), record(0, 1, "short", tokens=5, steps=(0, 1)),
               record(0, 2, "middle", tokens=9), record(0, 3, "wrong", correct=False, tokens=2),
               record(1, 0, "no", correct=False), record(1, 1, "no", correct=False),
               record(2, 0, "cut", tokens=3, finished=False), record(2, 1, " fine ", tokens=8)]
    rows, counts = kept_rows(records, SampleConfig())
    assert [(r["id"], r["solution"], r["answer"], r["solve_rate"]) for r in rows] == [
        ("p0", "middle", "4", 0.75), ("p2", "fine", "4", 1.0)]
    assert counts == {"problems": 3, "never_correct": 1, "outside_rates": 0, "unsound": 1, "cut": 1}
    assert [r["solution"] for r in kept_rows(records, SampleConfig(sound=False))[0]] == ["short", "fine"]


def test_keep_takes_several_different_ones_the_shortest_first():
    records = [record(0, s, text, tokens=t) for s, (text, t) in enumerate([("b", 7), ("a", 5), ("a ", 5), ("c", 9)])]
    rows, _ = kept_rows(records, SampleConfig(keep=2))
    assert [(r["id"], r["solution"]) for r in rows] == [("p0-1", "a"), ("p0-0", "b")]


def test_problems_outside_the_solve_rates_are_left_out():
    records = [record(0, s, f"t{s}", correct=s < 1) for s in range(4)] + [record(1, s, f"t{s}") for s in range(4)]
    rows, counts = kept_rows(records, SampleConfig(min_solve_rate=0.2, max_solve_rate=0.9))
    assert [r["id"] for r in rows] == ["p0"] and counts["outside_rates"] == 1


def test_the_command_samples_resumes_and_feeds_stage_1(tiny_dir, tmp_path, here, monkeypatch):
    data = write_problems(tmp_path / "problems.jsonl", n=4)
    real = evaluation.grade

    def lenient(*args):  # a random model is never correct; finished texts count as correct, so that something is kept
        graded = real(*args)
        return graded | {"correct": graded["finished"], "steps": 0, "correct_steps": 0}

    monkeypatch.setattr(evaluation, "grade", lenient)
    words = ("sample", f"data={data}", f"model={tiny_dir}", "device=cpu", "dtype=fp32", "samples=4",
             "max_new_tokens=300", "out=samples")
    status, out, _ = here(*words)
    assert status == 0 and "4 problems" in out and "kept" in out
    rows = [json.loads(line) for line in (tmp_path / "samples" / "train.jsonl").read_text().splitlines()]
    assert 1 <= len(rows) <= 4 and all(row["solution"] and row["answer"] for row in rows)
    before = (tmp_path / "samples" / "train.jsonl").read_bytes()
    (tmp_path / "samples" / "train.jsonl").unlink()
    assert here(*words, "resume=true")[0] == 0  # nothing is sampled again
    assert (tmp_path / "samples" / "train.jsonl").read_bytes() == before
    kept = (tmp_path / "samples" / "completions.jsonl").read_bytes()
    for left in (None, b"", kept[:-9]):  # gone, or damaged: what was kept stays
        (tmp_path / "samples" / "completions.jsonl").unlink(missing_ok=True)
        if left is not None:
            (tmp_path / "samples" / "completions.jsonl").write_bytes(left)
        status, _, error = here(*words, "resume=true")
        assert status == 2 and "samples: not an evaluation with its completions.jsonl" in error and "out=" in error
        assert (tmp_path / "samples" / "train.jsonl").read_bytes() == before
    status, out, error = here("sft", "data=samples/train.jsonl", f"model={tiny_dir}", "device=cpu", "dtype=fp32",
                              "steps=1", "batch_size=1", "lora_r=4", "out=sft")
    assert status == 0, error


@pytest.mark.parametrize("options, word", [
    ({"keep": 0}, "keep must be above 0"), ({"min_solve_rate": 0.9, "max_solve_rate": 0.5}, "above"),
    ({"out": ""}, "out=FOLDER"), ({"max_solve_rate": 1.5}, "max_solve_rate must be at most 1"),
    ({"suite": "gsm8k"}, "minimath eval"),
])
def test_options_that_cannot_work_are_refused_before_the_model_loads(options, word):
    with pytest.raises(UserError, match=word):
        sample(SampleConfig(model="missing", **{"out": "x", "data": "x.jsonl", **options}))


def test_nothing_correct_is_an_error_that_says_what_to_do(tiny_dir, tmp_path, here):
    data = write_problems(tmp_path / "problems.jsonl", n=2)
    status, _, error = here("sample", f"data={data}", f"model={tiny_dir}", "device=cpu", "dtype=fp32", "samples=2",
                            "max_new_tokens=4", "out=samples")
    assert status == 2 and "2 never solved" in error and "Raise samples" in error


def test_the_data_sampled_from_is_not_overwritten(here, tmp_path):
    before = open(write_problems(tmp_path / "train.jsonl")).read()
    status, _, error = here("sample", "data=train.jsonl", "model=missing", "out=.")
    assert status == 2 and "train.jsonl is no file of a run" in error
    assert (tmp_path / "train.jsonl").read_text() == before
