"""An adapter is used under the prompt and on the base that it was trained with, or a warning shows both."""
import json
import re

import pytest
import yaml
from tiny import tiny_model
from toy import write_problems

from minimath.core.run_folder import say_once
from minimath.export.merge import export

TEMPLATE, SYSTEM = "Q: {problem}", "Be short."
SMALL = ("device=cpu", "dtype=fp32")


@pytest.fixture
def trained(here, tiny_dir, tmp_path):
    """A run of SFT with a prompt of its own, and problems; the words that name them."""
    data = write_problems(tmp_path / "p.jsonl", n=4)
    say_once.cache_clear()
    assert here("sft", f"model={tiny_dir}", f"data={data}", "steps=1", "batch_size=2", f"prompt_template={TEMPLATE}",
                f"system={SYSTEM}", "thinking=off", "out=sft", *SMALL)[0] == 0
    return f"data={data}"


def options(folder):
    return yaml.safe_load(open(f"{folder}/config.yaml", encoding="utf-8"))


def test_every_command_takes_over_what_its_adapter_was_trained_with(here, trained, tiny_dir, monkeypatch):
    small = (*SMALL, "max_new_tokens=4")
    for words in (("rlaif", trained, "steps=1", "group_size=2", "prompts_per_step=1", "verifier=none",
                   "judge=heuristic", "max_refill=0", "adapter=sft", "out=two", *small),
                  ("sft", trained, "steps=1", "batch_size=2", "adapter=sft", "out=again", *SMALL),
                  ("eval", trained, "adapter=two", "out=three", *small),       # of the second stage too
                  ("sample", trained, "adapter=sft", "samples=2", "temperature=1", "out=four", *small)):
        say_once.cache_clear()
        status, _, err = here(*words)
        assert status == 0 or "no solution is left" in err, err
        assert err.count("taking over") == 1 and "warning" not in err
        for part in (f"system={SYSTEM!r}", "thinking='off'", f"prompt_template={TEMPLATE!r}", f"model={tiny_dir!r}"):
            assert part in err
    for folder in ("two", "again", "three", "four"):
        found = options(folder)
        assert (found["model"], found["prompt_template"], found["system"]) == (tiny_dir, TEMPLATE, SYSTEM)
    say_once.cache_clear()
    asked = []
    monkeypatch.setattr("minimath.models.policy.prompt_ids", lambda tokenizer, problem, **prompt:
                        asked.append(prompt) or [1, 2])
    status, _, err = here("solve", "1+1?", "adapter=sft", *small)
    assert (status, asked) == (0, [{"system": SYSTEM, "prompt_template": TEMPLATE, "thinking": "off",
                                     "template_args": ""}]) and "taking over" in err


def test_another_prompt_is_a_warning_that_shows_both(here, trained, tiny_dir):
    say_once.cache_clear()
    status, _, err = here("eval", trained, f"model={tiny_dir}", "adapter=sft", "prompt_template=A: {problem}",
                          "max_new_tokens=4", "out=eval", *SMALL)
    assert status == 0 and options("eval")["prompt_template"] == "A: {problem}" and options("eval")["system"] == SYSTEM
    line = next(line for line in err.splitlines() if "warning" in line)
    assert "'A: {problem}'" in line and repr(TEMPLATE) in line
    say_once.cache_clear()
    same = here("eval", trained, f"model={tiny_dir}/.", "adapter=sft", f"prompt_template={TEMPLATE}",
                f"system={SYSTEM}", "thinking=off", "max_new_tokens=4", "out=same", *SMALL)
    assert same[0] == 0 and "warning" not in same[2] and "taking over" not in same[2]


def test_a_rank_that_the_adapter_does_not_have_is_said_to_have_no_effect(here, trained):
    words = ("sft", trained, "steps=1", "batch_size=2", "adapter=sft", *SMALL)
    for rank, said in (("lora_r=8", True), ("lora_r=16", False)):
        say_once.cache_clear()
        status, _, err = here(*words, rank, f"out={rank[-2:]}")
        assert status == 0
        assert ("lora_r=8 has no effect: adapter=sft goes on as it was made, with lora_r=16" in err) == said


def test_another_base_is_a_warning_and_one_that_cannot_fit_an_error(here, trained, tiny_dir, tmp_path):
    say_once.cache_clear()
    twin = tiny_model(tmp_path / "twin", seed=1)
    status, _, err = here("eval", trained, f"model={twin}", "adapter=sft", "max_new_tokens=4", "out=eval", *SMALL)
    assert status == 0 and re.search(f"warning: model={twin}, .* trained on {tiny_dir}", err)
    wide = tmp_path / "wide"
    wide.mkdir()
    config = json.loads((twin / "config.json").read_text()) | {"vocab_size": 999}
    (wide / "config.json").write_text(json.dumps(config))
    for words in (("eval", trained, "out=no"), ("rlaif", trained, "out=no", "judge=heuristic"), ("solve", "1+1?"),
                  ("export", "out=merged")):
        status, _, err = here(*words, f"model={wide}", "adapter=sft", "device=cpu")
        assert status == 2 and "vocabulary 999" in err and f"trained on {tiny_dir}" in err


def test_a_base_that_is_gone_is_no_default(here, trained, tiny_dir):
    config = options("sft") | {"model": "/nowhere/tiny"}
    with open("sft/config.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump(config, file)
    say_once.cache_clear()
    status, _, err = here("eval", trained, f"model={tiny_dir}", "adapter=sft", "max_new_tokens=4", "out=eval", *SMALL)
    assert status == 0 and "warning: model=" in err and "/nowhere/tiny" in err
    assert export(["adapter=sft", f"model={tiny_dir}", "out=merged", "device=cpu", "drift_problems=1", "max_drift=9"])
