"""Options: precedence, types, and errors that name the place and the nearest right name."""
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import yaml

from minimath.config.load import RECIPES, config_of_words, config_text, load_config, plain_values
from minimath.config.options import RENAMED, RENAMED_VALUES, Bound, Main, Stage, options_of
from minimath.config.schema import STAGES, EvalConfig, LossOptions, RLAIFConfig, SFTConfig
from minimath.core.errors import UserError


def recipe(tmp_path, text, name="recipe.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_each_layer_overrides_the_one_before(tmp_path):
    text = "lr: 0.1\nseed: 1\nbatch_size: 2\nsft:\n  lr: 0.2\n  seed: 2\nrlaif:\n  lr: 0.9\n"
    path = recipe(tmp_path, text)
    assert load_config(SFTConfig, None, []).optimizer.lr == 2e-4
    assert load_config(SFTConfig, path, []).batch_size == 2
    assert load_config(SFTConfig, path, []).optimizer.lr == 0.2
    assert load_config(RLAIFConfig, path, []).optimizer.lr == 0.9
    assert load_config(EvalConfig, path, []).run.seed == 1
    cfg = load_config(SFTConfig, path, ["sft.seed=4", "seed=3", "lr=0.3", "rlaif.lr=0.7"])
    assert (cfg.optimizer.lr, cfg.run.seed) == (0.3, 4)


@pytest.mark.parametrize("text,value", [("1e-4", 1e-4), ("1E-4", 1e-4), ("3", 3.0), (".5", 0.5)])
def test_floats_are_read_alike_from_recipe_and_command_line(tmp_path, text, value):
    for cfg in (load_config(SFTConfig, recipe(tmp_path, f"lr: {text}\n"), []),
                load_config(SFTConfig, None, [f"lr={text}"])):
        assert cfg.optimizer.lr == value and type(cfg.optimizer.lr) is float


def test_bools_ints_and_strings_take_the_type_of_the_field(tmp_path):
    path = recipe(tmp_path, "packing: no\nsteps: 1e3\nbudgets: 256\nadapter: null\nsystem: 'null'\n"
                            "model: 12:30\n")
    sft, evaluation = load_config(SFTConfig, path, []), load_config(EvalConfig, path, [])
    assert sft.packing is False and sft.steps == 1000 and type(sft.steps) is int
    assert (evaluation.budgets, evaluation.adapter.path, evaluation.prompt.system) == ("256", "", "null")
    assert evaluation.model.name == "12:30"
    assert load_config(SFTConfig, None, ["--resume"]).run.resume is True
    cfg = load_config(SFTConfig, None, ["--save-every=7", "data=a=b"])
    assert (cfg.run.save_every, cfg.data.source) == (7, "a=b")


@pytest.mark.parametrize("word,says", [
    ("learning_rat=1", "learning_rat"), ("epoch=1", "did you mean 'epochs'"), ("lr=fast", "must be a number"),
    ("steps=1.5", "whole number"), ("steps=inf", "whole number"), ("lr=nan", "must be a number"),
    ("lr=0", "above 0"), ("steps=-1", "negative"), ("lora_dropout=1", "below 1"), ("packing=maybe", "true or false"),
    ("optimizer=adamw8bits", "did you mean 'adamw8bit'"), ("rlai.lr=1", "did you mean 'rlaif'"),
    ("lr", "key=value"),
    ("group_size=4", "option of rlaif"), ("trackers=wandb,tensorbord", "did you mean 'tensorboard'"),
    ("prompt_template=solve it", "{problem}"), ("prompt_template={problem} \\boxed{}", "{problem}"),
    ("prompt_template={problem[x]}", "{problem}"),
    ("thinking=maybe", "one of auto, on, off"), ("template_args=effort", "NAME=VALUE"),
    ("template_args=a=[", "NAME=VALUE"), ("template_args=date=soon", "YYYY-MM-DD"),
    ("rlaif.lr=fast", "must be a number"), ("eval.top_p=1.5", "at most 1"),
    ("seed=1764446985123456789", "seed must be below"), ("seed=", "whole number"),
])
def test_a_wrong_word_names_itself_and_the_reason(word, says):
    with pytest.raises(UserError) as error:
        load_config(SFTConfig, None, [word])
    assert word.split("=")[0] in str(error.value) and says in str(error.value)


@pytest.mark.parametrize("text,line,says", [
    ("seed: 1\nlearning_rate: 1\n", 2, "learning_rate"),
    ("seed: 1\nsft:\n  epoch: 1\n", 3, "did you mean 'epochs'"), ("seed: 1\nseed: 2\n", 2, "twice"),
    ("lr: [1, 2]\n", 1, "one value"), ("lora_targets: [q_proj]\n", 1, "comma list"),
    ("seed: 1\nsft: 3\n", 2, "section"), ("seed: 1\nrlaif:\n  group_size: x\n", 3, "whole number"),
    ("seed: 1\n  lr: 2\n", 2, "YAML"), ("- 1\n", 1, "key: value"),
    ("eval:\n  lora_r: 8\n", 2, "option of sft, rlaif"),
    ("a: 'b\n", 2, "YAML"), ("? [1]\n: 2\n", 1, "plain word"), ("group_size: 1\n", 1, "at least 2"),
])
def test_a_wrong_recipe_names_file_and_line(tmp_path, text, line, says):
    path = recipe(tmp_path, text)
    with pytest.raises(UserError) as error:
        load_config(SFTConfig, path, [])
    assert f"{path}:{line}:" in str(error.value) and says in str(error.value)


def test_a_missing_or_unreadable_recipe_is_a_user_error(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"system: \xff\xfe\n")
    for name in (str(tmp_path / "none.yaml"), str(tmp_path), str(tmp_path / "latin.yaml")):
        with pytest.raises(UserError, match="recipe"):
            load_config(SFTConfig, name, [])
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(SFTConfig, str(tmp_path / "empty.yaml"), []) == SFTConfig()


def test_run_accepts_words_of_other_stages_only_when_asked():
    assert load_config(SFTConfig, None, ["group_size=4"], allow_other=True) == SFTConfig()
    assert load_config(RLAIFConfig, None, ["group_size=4", "epochs=2"], allow_other=True).group_size == 4
    with pytest.raises(UserError, match="did you mean 'group_size'"):
        load_config(RLAIFConfig, None, ["group_siz=4"], allow_other=True)
    with pytest.raises(UserError, match="whole number"):
        load_config(SFTConfig, None, ["group_size=x"], allow_other=True)


def test_a_home_folder_is_meant_in_every_path(tmp_path, monkeypatch):
    """As in data=: out: ~/runs/x made a folder named ~ in the current one."""
    monkeypatch.setenv("HOME", "/home/someone")
    cfg = load_config(SFTConfig, recipe(tmp_path, "out: ~/runs/x\n"), ["adapter=~/runs/y"])
    assert (cfg.run.out, cfg.adapter.path) == ("/home/someone/runs/x", "/home/someone/runs/y")
    assert SFTConfig(out="~/runs/x").run.out == "/home/someone/runs/x"


def test_a_class_of_its_own_reads_its_section(tmp_path):
    class Demo(SFTConfig):
        minutes: float = 15.0
        """time there is"""
    path = recipe(tmp_path, "seed: 5\ndemo:\n  minutes: 3\nsft:\n  seed: 6\n")
    cfg = load_config(Demo, path, ["demo.lr=0.5"], "demo")
    assert (cfg.minutes, cfg.run.seed, cfg.optimizer.lr) == (3.0, 5, 0.5)
    assert load_config(SFTConfig, path, []).run.seed == 6
    with pytest.raises(UserError, match="did you mean 'minutes'"):
        load_config(Demo, None, ["demo.minute=3"], "demo")


@pytest.mark.parametrize("cls,words,says", [
    (RLAIFConfig, ["judge_weight=0.4", "brevity_weight=0.3", "brevity_scale=together"], "correct answer always beats"),
    (RLAIFConfig, ["group_size=1"], "at least 2"), (RLAIFConfig, ["temperature=0"], "temperature"),
    (RLAIFConfig, ["judge=openai"], "judge_url"), (RLAIFConfig, ["majority_share=0.7"], "not for verifier=exact"),
    (RLAIFConfig, ["judge_url=http://127.0.0.1:9/v1", "judge_model=m"], "judge_url= and judge_model= would do nothing: "
                                                                        "judge=self asks no server; use judge=openai"),
    (EvalConfig, ["samples=4"], "temperature"),
    (EvalConfig, ["budgets=128,x"], "comma list"),
])
def test_options_that_contradict_each_other_are_refused(cls, words, says):
    with pytest.raises(UserError, match=says):
        load_config(cls, None, words)


def test_a_key_given_instead_of_its_name_is_refused_and_not_repeated(tmp_path):
    for args in ((None, ["judge_key_env=sk-abc-123"]), (recipe(tmp_path, "judge_key_env: sk-abc-123\n"), [])):
        with pytest.raises(UserError) as error:
            load_config(RLAIFConfig, *args)
        assert "abc" not in str(error.value) and "environment variable" in str(error.value)


@pytest.mark.parametrize("cls", STAGES.values())
def test_a_saved_config_loads_back_equal(tmp_path, cls):
    words = ["system=line one\nline: two # three \u00e9", "model=null", "seed=7", "thinking=on",
             "template_args=date=2026-02-03"]
    cfg = load_config(cls, None, words + (["lr=1e-5"] if cls is not EvalConfig else ["budgets=0128"]))
    assert load_config(cls, recipe(tmp_path, config_text(cfg)), []) == cfg
    saved = yaml.safe_load(config_text(cfg))
    assert list(saved) == list(options_of(cls)) == list(cfg.to_dict())


@pytest.mark.parametrize("cls", STAGES.values())
def test_every_option_has_a_one_line_help_and_a_valid_default(cls):
    for name, option in options_of(cls).items():
        assert option.doc and "\n" not in option.doc and option.doc.isascii(), name
        assert type(option.default) is option.kind, name
        assert option.check(option.default, "") == option.default, name
    words = [f"{name}={value}" for name, value in cls().to_dict().items()]
    assert load_config(cls, None, words) == cls()


def test_the_three_stages_have_at_most_113_options():
    assert len({name for cls in STAGES.values() for name in options_of(cls)}) <= 113


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_shipped_recipes_are_read(recipe):
    for cls in STAGES.values():
        assert load_config(cls, recipe, []).check() == ""


def test_a_recipe_takes_over_what_it_does_not_set_from_the_one_it_is_like(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("lora_r: 4\nsft:\n  lr: 1e-3\n  steps: 7\nrlaif:\n  steps: 3\n")
    second.write_text(f"like: {first}\nlora_r: 8\nsft:\n  steps: 9\n")
    recipe(tmp_path, f"sft:\n  batch_size: 5\nlike: {second}\n")
    cfg = load_config(SFTConfig, str(tmp_path / "recipe.yaml"), [])
    assert (cfg.adapter.lora_r, cfg.optimizer.lr, cfg.steps, cfg.batch_size) == (8, 1e-3, 9, 5)
    assert load_config(RLAIFConfig, str(tmp_path / "recipe.yaml"), []).steps == 3
    assert load_config(SFTConfig, recipe(tmp_path, "like: answers\n"), []).batch_size == 32
    # what it sets for all stages holds against a section of the other, as a word does
    assert load_config(SFTConfig, recipe(tmp_path, "like: answers\nlr: 3e-3\n"), []).optimizer.lr == 3e-3
    first.write_text(f"like: {second}\n")
    for text in (f"like: {second}\n", "like:\n", "like: [a]\n"):
        with pytest.raises(UserError, match="yaml:1: like names another recipe"):
            load_config(SFTConfig, recipe(tmp_path, text), [])


# ---- an option is declared in one place

@dataclass
class DummyLoss(LossOptions):
    dummy_tau: Annotated[float, Bound(above=0, most=2)] = 0.5
    """temperature of the dummy loss"""
    dummy_form: Literal["soft", "hard"] = "soft"
    """form of the dummy loss"""


@dataclass
class Dummies:
    prefix = "dummy_"
    name: Annotated[str, Main] = "none"
    """which dummy"""
    size: int = 3
    """how large it is"""


class DummyConfig(RLAIFConfig):
    """Stage 2 with options of a test."""
    loss: DummyLoss = field(default_factory=lambda: DummyLoss(clip_low=0.1))
    dummy: Dummies


def test_an_option_declared_in_one_place_is_known_to_recipe_words_help_and_python(tmp_path):
    path = recipe(tmp_path, "rlaif:\n  dummy_tau: 1e-1\n  dummy_form: hard\n  dummy_size: 4\n")
    cfg = config_of_words(DummyConfig, [path, "dummy_size=5", "dummy=one"], "rlaif")
    assert (cfg.loss.dummy_tau, cfg.loss.dummy_form, cfg.dummy.size, cfg.dummy.name) == (0.1, "hard", 5, "one")
    in_python = DummyConfig(dummy_tau=0.1, dummy_form="hard", dummy_size=5, dummy="one")
    assert in_python == cfg and in_python.value("dummy_size") == 5
    assert in_python.replace(dummy_size=6).dummy.size == 6 and in_python.dummy.size == 5
    assert "dummy_tau: 0.1\n" in config_text(cfg) and "dummy_tau=0.1" in repr(cfg)
    option = options_of(DummyConfig)["dummy_tau"]
    assert (option.group, option.default, option.doc) == ("loss", 0.5, "temperature of the dummy loss")
    assert options_of(DummyConfig)["clip_low"].default == 0.1 and "dummy_tau" not in options_of(RLAIFConfig)
    for word, says in (("dummy_tau=0", "above 0"), ("dummy_tau=3", "at most 2"), ("dummy_tua=1", "'dummy_tau'"),
                       ("dummy_form=sofd", "did you mean 'soft'"), ("dummy_size=-1", "negative")):
        with pytest.raises(UserError, match=says):
            config_of_words(DummyConfig, [word], "rlaif")


def test_two_configs_share_no_group():
    one, two = RLAIFConfig(), RLAIFConfig()
    one.optimizer.lr = 0.5
    assert two.optimizer.lr == RLAIFConfig().optimizer.lr == 1e-5


# ---- names of earlier versions

def stage_of(name):
    return next((cls for cls in STAGES.values() if name in options_of(cls)), SFTConfig)


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_an_old_name_answers_with_the_new_one(tmp_path, old, new):
    cls, says = stage_of(new), f"{old!r} is now called {new!r}"
    section = next(name for name, stage in STAGES.items() if stage is cls)
    shared = recipe(tmp_path, f"{old}: 1\n", "shared.yaml")
    inside = recipe(tmp_path, f"seed: 1\n{section}:\n  {old}: 1\n", "inside.yaml")
    for path, words, where in ((None, [f"{old}=1"], f"'{old}=1'"), (shared, [], f"{shared}:1"),
                               (inside, [], f"{inside}:3")):
        with pytest.raises(UserError) as error:
            load_config(cls, path, words)
        assert says in str(error.value) and where in str(error.value)
    with pytest.raises(UserError, match=says):
        cls(**{old: 1})
    assert old not in options_of(cls) and new in options_of(cls)


@pytest.mark.parametrize("name, old", RENAMED_VALUES)
def test_an_old_value_answers_with_the_new_one(name, old):
    with pytest.raises(UserError, match=f"{name}={old} is now called {name}={RENAMED_VALUES[name, old]}"):
        load_config(RLAIFConfig, None, [f"{name}={old}"])


# ---- what only Python gives

def shortest(samples, example):
    return [-float(sample.tokens) for sample in samples]


def test_reward_and_verifier_take_a_callable_and_data_a_list_of_dicts(tmp_path):
    rows = [{"problem": "1 + 1?", "answer": "2"}]
    cfg = RLAIFConfig(reward=shortest, verifier=shortest, data=rows, eval_data=rows)
    assert cfg.reward.name is shortest and cfg.verifier is shortest and not cfg.uses_judge()
    assert cfg.data.source is rows and cfg.evaluation.eval_data is rows
    assert cfg.replace(lr=1e-3).reward.name is shortest
    saved = yaml.safe_load(config_text(cfg))  # of what only Python can give, its name
    assert saved == plain_values(cfg)
    assert saved["reward"] == saved["verifier"] == f"python:{__name__}.shortest"
    assert saved["data"] == "1 rows given in Python"
    for options in ({"loss": shortest}, {"lr": rows}, {"judge": shortest}, {"reward": 3}, {"out": rows}):
        with pytest.raises(UserError, match="must be"):
            RLAIFConfig(**options)


@pytest.mark.parametrize("options, says", [
    ({"lrr": 1.0}, "did you mean 'lr'"), ({"lr": "0.1"}, "of type float"), ({"lr": 0}, "above 0"),
    ({"steps": True}, "of type int"), ({"steps": 1.5}, "of type int"), ({"loss": "ppo"}, "one of dapo"),
    ({"group_size": 1}, "at least 2"), ({"gate": "none"}, "now called 'verifier'"),
    ({"reward": "python:fn"}, "python:module.function"), ({"top_p": 1.5}, "at most 1"),
])
def test_python_options_are_checked_as_words_are(options, says):
    with pytest.raises(UserError, match=says):
        RLAIFConfig(**options)
    assert type(RLAIFConfig(lr=1).optimizer.lr) is float


def test_importing_minimath_and_its_options_imports_no_torch():
    code = ("import sys; from minimath import SFTConfig, RLAIFConfig, EvalConfig; import minimath.config.load; "
            "assert 'torch' not in sys.modules, 'torch'; "
            "assert {'sft', 'rlaif', 'evaluate'} <= set(dir(__import__('minimath')))")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_stage_of_its_own_needs_no_list():
    class Own(Stage):
        """Options of a command."""
        size: Annotated[int, Bound(above=0)] = 2
        """how large"""
    assert load_config(Own, None, ["size=3"], "own").size == 3
    with pytest.raises(UserError, match="above 0"):
        load_config(Own, None, ["size=0"], "own")
