"""The real command line, in processes of their own: each costs seconds of imports, so there are few."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy import write_problems

from minimath.config.options import options_of
from minimath.config.schema import STAGES

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["device=cpu", "dtype=fp32", "prompt_template={problem}", "max_new_tokens=6"]
TRAIN = ["lora_r=4", "lr=0.01", "steps=2", "save_every=0"]


def minimath(*words, cwd, module="minimath"):
    """python -m minimath WORDS -> CompletedProcess; no traceback, whatever happens."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done


@pytest.fixture
def data(tmp_path):
    return write_problems(tmp_path / "problems.jsonl", n=8)


def assert_one_line(status, out, err, *parts):
    """Status 2 and one line on stderr that starts with error: and contains the parts."""
    assert status == 2, out + err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for part in parts:
        assert part in err


# ---- help and slips: answered at once, without loading torch


def test_help_names_every_command(tmp_path):
    done = minimath("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert all(f"minimath {name}" in done.stdout for name in ("demo", "run", "sft", "rlaif", "eval", "solve"))
    assert minimath(cwd=tmp_path).stdout == done.stdout


@pytest.mark.parametrize("command", STAGES)
def test_help_of_a_stage_names_every_option_with_its_default_choices_and_meaning_under_its_group(here, command):
    status, out, _ = here(command, "--help")
    assert status == 0
    flat = " ".join(out.split())
    heading, under = "", {}
    for line in out.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            heading = line[:-1]
        elif line.startswith("  ") and "=" in line and line[2] != " ":
            under[line.strip().partition("=")[0]] = heading
    options = options_of(STAGES[command])
    assert under == {name: option.group or command for name, option in options.items()}
    for name, option in options.items():
        default = str(option.default).lower() if option.kind is bool else str(option.default).replace("\n", "\\n")
        choices = [*option.choices, *(["python:module.fn"] if option.hook else [])]
        shown = f"{option.doc} [{' | '.join(choices)}]" if choices else option.doc
        assert " ".join(f"{name}={default} {shown}".split()) in flat


def test_help_and_the_configs_come_without_torch(tmp_path):
    script = """
import sys
import minimath
from minimath import SFTConfig, RLAIFConfig, EvalConfig
from minimath.cli import main
RLAIFConfig(model="x", lr=1e-4, judge="heuristic").replace(steps=2)
for command in ("demo", "run", "sft", "rlaif", "eval", "solve", "plan", "report", "doctor"):
    sys.argv = ["minimath", command, "--help"]
    assert main() == 0, command
print("torch" in sys.modules, "transformers" in sys.modules, "matplotlib" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False False False"


def test_the_names_of_the_package_are_the_functions_and_configs_themselves():
    import minimath
    from minimath.config.schema import EvalConfig, RLAIFConfig, SFTConfig
    from minimath.eval.evaluate import evaluate
    from minimath.train.rlaif import rlaif
    from minimath.train.sft import sft
    here = {"SFTConfig": SFTConfig, "RLAIFConfig": RLAIFConfig, "EvalConfig": EvalConfig, "sft": sft, "rlaif": rlaif,
            "evaluate": evaluate}
    assert {name: getattr(minimath, name) for name in minimath.__all__} == here and set(here) <= set(dir(minimath))
    with pytest.raises(AttributeError, match="no attribute 'rlhf'"):
        minimath.rlhf  # noqa: B018


@pytest.mark.parametrize(
    "command, option",
    [
        ("sft", "packing"),
        ("rlaif", "updates_per_rollout"),
        ("eval", "budgets"),
        ("solve", "temperature"),
        ("run", "RECIPE"),
        ("demo", "minutes"),
        ("sample", "keep"),
        ("judge", "judge_url"),
        ("judge check", "judge_url"),
        ("judge compare", "judge_url"),
        ("plan", "card="),
        ("report", "out="),
        ("doctor", "device"),
        ("export", "adapter"),
    ],
)
def test_help_of_a_command_lists_its_options(here, command, option):
    status, out, _ = here(*command.split(), "--help")
    assert status == 0 and option in out


def test_help_shows_default_and_meaning_of_each_option(here):
    _, out, _ = here("rlaif", "--help")
    [line] = [line for line in out.splitlines() if "group_size" in line]
    assert line.split()[:4] == ["group_size=8", "completions", "per", "problem;"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["sfft"], "did you mean 'sft'?"),
        (["sft", "learning_rte=1"], "learning_rte"),
        (["rlaif", "grup_size=4"], "did you mean 'group_size'?"),
        (["eval", "samples=many"], "samples"),
        (["run"], "needs a recipe"),
        (["judge"], "did you mean 'judge "),
        (["judge", "chek"], "did you mean 'judge "),
        (["judge", "attack"], "did you mean 'judge "),
        (["rlaif", "loss_type=grpo"], "is now called 'loss'"),
    ],
)
def test_slips_get_one_line_with_the_nearest_name(here, words, said):
    assert_one_line(*here(*words), said)


def test_a_slip_is_the_exit_status_of_the_process(tmp_path):
    done = minimath("sfft", cwd=tmp_path)
    assert_one_line(done.returncode, done.stdout, done.stderr, "did you mean 'sft'?")


@pytest.mark.parametrize(
    "words, said",
    [
        (["run", "nowhere.yaml"], "nowhere.yaml"),
        (["solve"], "problem"),
        (["solve", "adapter=runs/x"], "problem"),
    ],
)
def test_a_missing_recipe_or_problem_is_asked_for(here, words, said, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert_one_line(*here(*words), said)


def test_it_runs_from_the_root_of_the_repository(tiny_dir):
    """There the folder kernels/ would pass for the package of that name, which transformers looks for."""
    done = minimath("solve", "x=3. What is x?", f"model={tiny_dir}", *SMALL, cwd=ROOT)
    assert done.returncode == 0 and "answer:" in done.stdout, done.stderr


# ---- bad input


def test_a_missing_model_is_named(here, data):
    assert_one_line(*here("sft", f"data={data}", "model=./no-model", "out=run"), "./no-model", "config.json")


def test_missing_empty_and_unusable_data_are_named(here, tiny_dir, tmp_path):
    assert_one_line(*here("sft", f"model={tiny_dir}", "data=problms.jsonl"), "problms.jsonl")
    assert_one_line(*here("sft", f"model={tiny_dir}"), "data")
    (tmp_path / "empty.jsonl").write_text("")
    assert_one_line(*here("rlaif", f"model={tiny_dir}", "data=empty.jsonl"), "empty.jsonl")


def test_a_bad_row_is_skipped_and_counted_or_with_strict_fatal(here, tiny_dir, tmp_path, data):
    rows = Path(data).read_text().splitlines()
    rows[2] = '{"problem": "no solution here"}'
    (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    words = ["sft", f"model={tiny_dir}", "data=bad.jsonl", *SMALL[:3], *TRAIN]
    assert_one_line(*here(*words, "strict=true", "out=strict"), "bad.jsonl:3", "strict")
    assert not (tmp_path / "strict" / "metrics.jsonl").exists()
    status, out, _ = here(*words, "out=lenient")
    assert status == 0 and "bad.jsonl:3" in out


def test_an_unreadable_adapter_is_named(here, tiny_dir, tmp_path, data):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{}")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"not a tensor")
    for command in ("eval", "rlaif"):
        said = here(command, f"model={tiny_dir}", f"data={data}", "adapter=broken", *SMALL, "out=run")
        assert_one_line(*said, "broken")


def test_evaluation_during_training_needs_its_data(here, tiny_dir, data):
    assert_one_line(*here("sft", f"model={tiny_dir}", f"data={data}", "eval_every=2"), "eval_data")


# ---- the stages


def test_the_stages_one_after_another(here, tiny_dir, tmp_path, data):
    base = [f"model={tiny_dir}", f"data={data}", *SMALL]
    own = [w for w in base if "max_new" not in w]
    done = minimath(*own, *TRAIN, "out=sft", cwd=tmp_path, module="minimath.train.sft")
    assert done.returncode == 0, done.stderr  # each stage is a script of its own too
    status, out, err = here(
        "rlaif", *base, *TRAIN, "adapter=sft", "out=rl", "judge=heuristic", "group_size=2", "prompts_per_step=2"
    )
    assert status == 0, out + err
    status, out, err = here("eval", *base, "adapter=rl", "out=eval", "limit=3")
    assert status == 0 and "95% interval" in out, out + err
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["problems"] == 3
    status, out, err = here("solve", "Tom has 3 apples and buys 4 more.", *base[:1], *SMALL, "adapter=rl")
    assert status == 0 and "answer:" in out and "adapter rl" in out, out + err
    assert_one_line(*here("sft", *own, "out=sft"), "resume=true")
    for folder in ("sft", "rl"):
        assert (tmp_path / folder / "adapter" / "adapter_model.safetensors").is_file()
        assert (tmp_path / folder / "environment.json").is_file() and (
            tmp_path / folder / "config.yaml"
        ).is_file()


@pytest.fixture
def recipe(tiny_dir, tmp_path, data):
    text = f"""
model: {tiny_dir}
device: cpu
dtype: fp32
prompt_template: "{{problem}}"
lora_r: 4
data: {data}
sft:
  steps: 2
  batch_size: 4
rlaif:
  steps: 1
  prompts_per_step: 2
  group_size: 2
  max_new_tokens: 6
  judge: heuristic
eval:
  limit: 3
  max_new_tokens: 6
"""
    (tmp_path / "small.yaml").write_text(text)
    return "small.yaml"


def test_run_does_both_stages_and_resume_skips_what_is_finished(here, recipe, tmp_path):
    status, out, err = here("run", recipe, "out=whole")
    assert status == 0, out + err
    assert all(name in out for name in ("base", "SFT", "SFT + RLAIF (heuristic judge)"))
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert list(summary["rows"]) == ["base", "SFT", "SFT + RLAIF (heuristic judge)"] and summary["problems"] == 3
    assert (tmp_path / "whole" / "plots" / "tradeoff.png").stat().st_size > 1000

    assert_one_line(*here("run", recipe, "out=whole"), "resume=true")
    for word in ("seed=1", "resume=true"):
        assert_one_line(*here("run", recipe, "out=whole/sft", word), "already holds a run of its own")

    (tmp_path / "whole" / "eval-rlaif" / "eval.json").unlink()
    finished = [p for name in ("sft", "rlaif", "eval-base") for p in (tmp_path / "whole" / name).rglob("*")]
    times = {p: p.stat().st_mtime_ns for p in finished}
    before = (tmp_path / "whole" / "sft.yaml").read_text()
    status, out, err = here("run", recipe, "out=whole", "resume=true", "sft.lr=0.5")
    assert status == 0, out + err
    assert "sft is complete, and not run again with lr: 0.5: for that" in out and "rlaif is complete" not in out
    assert (tmp_path / "whole" / "sft.yaml").read_text() == before
    assert times == {p: p.stat().st_mtime_ns for p in times}  # finished stages were not touched
    again = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert [r["accuracy"] for r in again["rows"].values()] == [
        r["accuracy"] for r in summary["rows"].values()
    ]


def test_run_needs_data_of_every_stage(here, recipe, tmp_path):
    text = (tmp_path / recipe).read_text()
    (tmp_path / recipe).write_text(
        "\n".join(line for line in text.splitlines() if not line.startswith("data"))
    )
    assert_one_line(*here("run", recipe), "rlaif.data=")
