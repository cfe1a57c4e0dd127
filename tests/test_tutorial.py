"""The commands of minimath/TUTORIAL.md are commands, and their options exist."""

import json
import re
import shlex
from pathlib import Path

import pytest

from minimath.cli import COMMANDS, config_class
from minimath.commands.doctor import DoctorConfig
from minimath.commands.judge_check import JudgeCheckConfig, load_options
from minimath.config.load import load_config
from minimath.config.options import options_of
from minimath.config.schema import STAGES, DataOptions, SFTConfig
from minimath.data.examples import load_examples
from minimath.plan.plan import parse

TUTORIAL = (Path(__file__).parents[1] / "minimath" / "TUTORIAL.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TUTORIAL, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """The words of each `minimath ...` line in the shell blocks, without comments and redirections."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("minimath ")]


def test_the_tutorial_goes_through_every_step():
    assert [words[1] for words in commands() if words[1] != "eval"] == [
        "doctor", "plan", "sft", "sample", "sft", "judge", "rlaif", "report", "solve", "export"]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_each_command_has_options_that_exist_and_values_that_are_taken(words):
    command, rest = words[1], words[2:]
    options = [word for word in rest if re.match(r"[a-z_.0-9]+=", word)]
    others = [word for word in rest if word not in options]
    if command == "judge":
        assert f"judge {others[0]}" in COMMANDS and len(others) == 1
        load_options(JudgeCheckConfig, None, options)
    elif command == "report":
        assert options == [] and others
    elif command == "plan":
        assert others == ["mine.yaml"]
        card, _, stages = parse(None, options)
        assert card == 8 << 30
        for cls in STAGES.values():
            load_config(cls, None, stages, allow_other=True)
    else:
        load_config(DoctorConfig if command == "doctor" else config_class(command), None, options, command)
        assert len(others) == (command == "solve")


def test_the_options_in_its_text_exist():
    known = {name for cls in (*STAGES.values(), JudgeCheckConfig, *map(config_class, ("export", "sample")))
             for name in options_of(cls)}
    named = {name for code in re.findall(r"`([^`\n]+)`", TUTORIAL) for name in re.findall(r"\b([a-z_]+)=", code)}
    assert len(named) > 10 and named <= known | {"card"}


def test_its_recipe_is_one(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(blocks("yaml")[0])
    for cls in STAGES.values():
        cfg = load_config(cls, str(recipe), [], allow_other=True)
        assert cfg.data.source and cfg.model.name.endswith("SmolLM2-135M-Instruct")


def test_the_data_that_its_script_makes_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [script] = blocks("python")
    exec(script, {})
    for name, need in (("train.jsonl", ("solution", "answer")), ("test.jsonl", ("answer",))):
        examples, report = load_examples(DataOptions(name), need=need)
        assert len(examples) == len(Path(name).read_text().splitlines()) and not report.skipped


def test_its_bad_rows_are_bad_for_the_reasons_that_it_prints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [line for block in blocks("json") for line in block.splitlines()]
    Path("train.jsonl").write_text("\n".join([json.dumps({"problem": "p", "solution": "s"}), *rows]) + "\n")
    _, report = load_examples(SFTConfig(data="train.jsonl").data, need=("solution",))
    assert report.skipped and all(reason in TUTORIAL for reason in report.skipped)
