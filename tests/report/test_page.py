"""report.html: it holds what the run folder holds, needs nothing else, and runs no script from a model's text."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from minimath.config.schema import EvalConfig
from minimath.core.errors import UserError
from minimath.eval.metrics import summarise
from minimath.grading.answer import AnswerChecker
from minimath.report.page import report, side_by_side, spread, write_page

EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def record(number, correct, text, tokens):
    return {"number": number, "id": f"p{number}", "problem": f"How many, case {number}?", "gold": "4", "sample": 0,
            "text": text, "answer": "4", "correct": correct, "tokens": tokens, "finished": True,
            "correct_steps": 1, "steps": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder as minimath run leaves it, small."""
    out = tmp_path_factory.mktemp("runs") / "my-run"
    with AnswerChecker() as checker:
        for name, wrong, size in (("base", 6, 90), ("sft", 3, 80), ("rlaif", 2, 30)):
            rows = [record(n, n >= wrong, f"2 + 2 = {4 if n >= wrong else 5}.\n{EVIL}\nThe answer is 4.", size + n)
                    for n in range(8)]
            at = out / f"eval-{name}"
            at.mkdir(parents=True)
            (at / "completions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
            (at / "eval.json").write_text(json.dumps(summarise(rows, EvalConfig(), checker)))
    for stage in ("sft", "rlaif"):
        (out / stage).mkdir()
        metrics = [{"step": s, "loss": 1 / s, "optim/grad_norm": 0.1} if stage == "sft" else
                   {"step": s, "reward/mean": 0.1 * s, "rollout/correct": 0.5, "rollout/tokens": 90 - s,
                    "canary/worse_wins": 0.1 * s, "canary/pairs": 24,
                    "judge/comparisons": 10, "judge/no_votes": 1, "judge/position_bias": 0.25,
                    "judge/error": "<b>late</b>"} for s in (1, 2, 3)]
        cut = '{"step": 4, "los'  # as a kill leaves it
        (out / stage / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics) + cut)
        (out / stage / "config.yaml").write_text("lr: 0.001\n")
    made = {"command": ["/x/minimath", "run", "mine.yaml"], "started": "2026"}
    (out / "environment.json").write_text(json.dumps(made))
    return out


@pytest.fixture(scope="module")
def page(folder):
    return write_page([folder], folder).read_text(encoding="utf-8")


def test_the_page_holds_evaluations_curves_solutions_judge_settings_and_the_command(page, folder):
    for words in ("SFT + RLAIF", "75.0%", "Training: SFT", "Training: RLAIF", "position bias", "0.25", "case 0?",
                  "lr: 0.001", "minimath run mine.yaml", "Accuracy 25.0% to 75.0%"):
        assert words in page, words
    assert page.count("<svg") == 5
    pictures = sorted(p.name for p in (folder / "plots").iterdir())
    assert pictures == ["judge-rlaif.png", "lengths.png", "tradeoff.png", "training-rlaif.png",
                        "training-sft.png"]
    assert all((folder / "plots" / name).stat().st_size > 5000 for name in pictures)


def test_differences_are_paired_by_problem(page):
    assert "against base" in page and "+50.0 (+12.5 to +87.5)" in page  # RLAIF: 6 of 8 for 2 of 8
    assert "-60.0 (-60.0 to -60.0)" in page  # the same number of tokens fewer on every problem


def test_every_step_is_marked_correct_or_wrong(page):
    assert "2 + 2 = 5. <span class=\"wrong\">" in page and "2 + 2 = 4. <span class=\"correct\">" in page


def test_texts_are_escaped_and_no_address_is_left(page):
    body = page[page.index("<body>"):]
    assert "<script" not in page and "<img" not in page and "&lt;script&gt;" in page and "&lt;b&gt;late" in page
    assert "default-src 'none'" in page
    assert not re.search(r'(?:src|href)="(?!#|data:)', body)  # the ids of the SVGs, and pictures in the page


def test_ids_of_one_picture_do_not_occur_in_another(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert ids and len(ids) == len(set(ids))


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_script_in_a_completion_does_not_run_in_a_browser(folder, page, tmp_path):
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path}"]
    dom = subprocess.run([*words, "--dump-dom", f"file://{folder}/report.html"], capture_output=True, text=True,
                         timeout=120).stdout
    assert "<title>my-run: minimath report</title>" in dom and "SFT + RLAIF" in dom
    unsafe = tmp_path / "unsafe.html"  # the same without escapes: the browser would have run it
    unsafe.write_text(f"<title>safe</title><body>{EVIL}")
    dom = subprocess.run([*words, "--dump-dom", f"file://{unsafe}"], capture_output=True, text=True, timeout=120).stdout
    assert "<title>owned</title>" in dom


def test_several_runs_stand_beside_each_other(folder, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    result = report([str(folder), str(other), f"out={tmp_path / 'both'}"])
    both = (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
    assert result["page"].endswith("report.html") and "my-run: base" in both and "other: SFT + RLAIF" in both
    one = write_page([folder / "eval-sft", other / "eval-rlaif", other / "sft"], tmp_path / "parts")
    page = one.read_text(encoding="utf-8")
    assert "<td>eval-sft</td>" in page and "<td>eval-rlaif</td>" in page and "Training: sft<" in page


def test_runs_of_one_name_are_told_apart_and_each_keeps_its_settings(folder, tmp_path):
    runs = [folder, Path(shutil.copytree(folder, tmp_path / folder.name))]
    (runs[1] / "sft" / "config.yaml").write_text("lr: 0.002\n")
    page = write_page(runs, tmp_path / "both").read_text(encoding="utf-8")
    for words in (*(f"<td>{run}: base</td>" for run in runs), "lr: 0.001", "lr: 0.002"):
        assert words in page, words


def test_a_single_stage_and_a_single_evaluation_are_runs_too(folder, tmp_path):
    for part, words in (("rlaif", "Training: rlaif"), ("eval-sft", "62.5%")):
        assert words in write_page([folder / part], tmp_path / part).read_text(encoding="utf-8")


def test_the_folder_that_one_stands_in_is_reported_by_its_name(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder / "eval-sft")
    assert "<h1>eval-sft</h1>" in write_page([Path(".")], tmp_path).read_text(encoding="utf-8")


def test_the_judges_means_are_of_the_steps_that_had_a_vote(tmp_path):
    rows = [{"step": 1, "judge/comparisons": 4, "judge/no_votes": 4, "judge/error": "down"},
            {"step": 2, "judge/comparisons": 8, "judge/no_votes": 0, "judge/position_bias": 0.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "<td>6</td><td>2</td><td>0.25</td>" in write_page([tmp_path], tmp_path).read_text(encoding="utf-8")


def test_a_damaged_evaluation_is_said(folder, tmp_path):
    shutil.copytree(folder / "eval-rlaif", tmp_path / "evaluation")
    (tmp_path / "evaluation" / "eval.json").write_text('{"accuracy": 0.')
    with pytest.raises(UserError, match="evaluation: a record is damaged .*; evaluate or train again"):
        write_page([tmp_path / "evaluation"], tmp_path)
    shutil.copy(folder / "eval-sft" / "eval.json", tmp_path / "evaluation")
    (tmp_path / "evaluation" / "environment.json").write_text("")
    with pytest.raises(UserError, match="evaluation: a record is damaged .*; evaluate or train again"):
        write_page([tmp_path / "evaluation"], tmp_path)
    (tmp_path / "suite.json").write_text(json.dumps({"sets": {"x": json.loads(
        (folder / "eval-sft" / "eval.json").read_text())}}))
    with pytest.raises(UserError, match="or gone .*x/eval.json"):
        write_page([tmp_path], tmp_path)


@pytest.mark.parametrize("file, content, said", [
    ("rlaif/config.yaml", b"lr: [1", "rlaif/config.yaml:1: not valid YAML"),
    ("rlaif/config.yaml", b"lr: \xff\n", "rlaif/config.yaml: 'utf-8' codec"),
    ("rlaif/config.yaml", b"- 3\n", "rlaif/config.yaml:1: expected lines"), ("rlaif/config.yaml", b"", ""),
    ("run.yaml", b"lr: \xff\n", ""), ("eval-sft/completions.jsonl", b"", "eval-sft: not an evaluation .*empty"),
    ("eval-sft/completions.jsonl", b"3\n", "eval-sft: not an evaluation"),
    ("eval-sft/completions.jsonl", b"\xff", "eval-sft: not an evaluation"),
    ("eval-sft/eval.json", b"\xff", "a record is damaged"), ("eval-sft/eval.json", b"[]", "a record is damaged"),
    ("environment.json", b"3", "a record is damaged"), ("environment.json", b'{"started": "2026"}', "is damaged")])
def test_a_damaged_file_is_one_line_or_does_no_harm(folder, tmp_path, file, content, said):
    run = Path(shutil.copytree(folder, tmp_path / "run"))
    (run / file).write_bytes(content)
    if not said:
        write_page([run], tmp_path)
        return
    with pytest.raises(UserError, match=said) as caught:
        write_page([run], tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_with_an_equals_sign_is_a_run(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "lr=1e-4")
    monkeypatch.chdir(tmp_path)
    for words in (["lr=1e-4"], [str(tmp_path / "lr=1e-4"), f"out={tmp_path / 'a=b'}"]):
        assert "lr=1e-4: base" in Path(report([*words, str(folder)])["page"]).read_text(encoding="utf-8")
    assert (tmp_path / "a=b" / "report.html").is_file()


@pytest.mark.parametrize("words, error", [([], "takes run folders"), (["nowhere"], "no evaluation and no training"),
                                          (["x", "format=pdf"], "format"), (["lr=3"], "lr=3")])
def test_what_cannot_be_reported_is_said(words, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=error):
        report(words)


def test_solutions_side_by_side_are_of_one_problem_wherever_it_stands_in_the_data():
    one, other = [record(n, n != 1, "4", 9) for n in range(3)], [record(n, True, "5", 9) for n in (2, 1, 7)]
    for number, row in enumerate(other):
        row["number"] = number
    shown = side_by_side({"one": one, "other": other})
    assert [{r["problem"] for r in each.values()} for each in shown] == [
        {"How many, case 1?"}, {"How many, case 2?"}] and all(len(each) == 2 for each in shown)
    assert side_by_side({"one": one[:1], "other": other}) == []


def test_problems_shown_are_the_first_and_some_of_the_others():
    assert spread(list(range(20)), 6) == [0, 1, 2, 3, 8, 13] and spread([1, 2], 6) == [1, 2]


def test_a_trained_judge_is_shown_with_the_run_that_asked_it_and_labels_without_answers_as_curves(tmp_path):
    adapter, run = tmp_path / "judge" / "adapter", tmp_path / "run"
    adapter.mkdir(parents=True)
    run.mkdir()
    (adapter / "judge.json").write_text(json.dumps({"figures": {
        "grades": {"auc_within": 0.6125, "brier": 0.2, "brier_of_the_mean": 0.25},
        "pairs": {"own wrong": {"agreement": 0.55, "order_conflicts": 0.25},
                  "own long": {"agreement": None, "order_conflicts": None}}}}))
    metrics = [{"step": s, "verifier/agrees": 0.8, "verifier/decided": 0.9, "verifier/share": 0.1 * s} for s in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    for asked in (tmp_path / "judge", adapter):
        (run / "config.yaml").write_text(f"judge_adapter: {asked}\n")
        page = write_page([run], run).read_text(encoding="utf-8")
        for words in ("AUC within a problem", "<td>0.613</td>", "order conflicts, own wrong", "<td>25%</td>",
                      "verifier/agrees", "verifier/share"):
            assert words in page, words
    (run / "config.yaml").write_text("judge_adapter: ''\n")
    assert "AUC" not in write_page([run], run).read_text(encoding="utf-8")
