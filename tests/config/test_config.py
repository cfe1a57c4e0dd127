"""Options: precedence, types, and errors that name the place and the nearest right name."""
import dataclasses

import pytest
import yaml

from minimath.config.load import CHOICES, config_dict, describe_config, load_config, save_config
from minimath.config.schema import STAGES, EvalConfig, RLAIFConfig, SFTConfig
from minimath.core.errors import UserError
from minimath.config.schema import AT_MOST_ONE, BELOW_ONE, POSITIVE


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_each_layer_overrides_the_one_before(tmp_path):
    text = "lr: 0.1\nseed: 1\nbatch_size: 2\nsft:\n  lr: 0.2\n  seed: 2\nrlaif:\n  lr: 0.9\n"
    path = recipe(tmp_path, text)
    assert load_config(SFTConfig, None, []).lr == 2e-4
    assert load_config(SFTConfig, path, []).batch_size == 2
    assert load_config(SFTConfig, path, []).lr == 0.2
    assert load_config(RLAIFConfig, path, []).lr == 0.9
    assert load_config(EvalConfig, path, []).seed == 1
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
    assert (evaluation.budgets, evaluation.adapter, evaluation.system) == ("256", "", "null")
    assert evaluation.model == "12:30"
    assert load_config(SFTConfig, None, ["--resume"]).resume is True
    assert load_config(SFTConfig, None, ["--save-every=7", "data=a=b"]).data == "a=b"


@pytest.mark.parametrize("word,says", [
    ("learning_rat=1", "learning_rat"), ("epoch=1", "did you mean 'epochs'"), ("lr=fast", "must be a number"),
    ("steps=1.5", "whole number"), ("steps=inf", "whole number"), ("lr=nan", "must be a number"),
    ("lr=0", "above 0"), ("steps=-1", "negative"), ("beta1=1", "below 1"), ("packing=maybe", "true or false"),
    ("optimizer=adamw8bits", "did you mean 'adamw8bit'"), ("rlai.lr=1", "did you mean 'rlaif'"),
    ("lr", "key=value"),
    ("group_size=4", "option of rlaif"), ("trackers=wandb,tensorbord", "did you mean 'tensorboard'"),
    ("prompt_template=solve it", "{problem}"), ("prompt_template={problem} \\boxed{}", "{problem}"),
    ("rlaif.lr=fast", "must be a number"), ("eval.top_p=1.5", "at most 1"), ("seed=", "whole number"),
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
    ("a: 'b\n", 2, "YAML"), ("? [1]\n: 2\n", 1, "plain word"), ("group_size: 0\n", 1, "above 0"),
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


def test_a_class_of_its_own_reads_its_section(tmp_path):
    @dataclasses.dataclass
    class Demo(SFTConfig):
        minutes: float = 15.0
    path = recipe(tmp_path, "seed: 5\ndemo:\n  minutes: 3\nsft:\n  seed: 6\n")
    cfg = load_config(Demo, path, ["demo.lr=0.5"], "demo")
    assert (cfg.minutes, cfg.run.seed, cfg.optimizer.lr) == (3.0, 5, 0.5)
    assert load_config(SFTConfig, path, []).seed == 6
    with pytest.raises(UserError, match="did you mean 'minutes'"):
        load_config(Demo, None, ["demo.minute=3"], "demo")


@pytest.mark.parametrize("cls,words,says", [
    (RLAIFConfig, ["judge_weight=0.4", "brevity_weight=0.3"], "right answer always beats"),
    (RLAIFConfig, ["group_size=1"], "at least 2"), (RLAIFConfig, ["temperature=0"], "temperature"),
    (RLAIFConfig, ["judge=openai"], "judge_url"), (EvalConfig, ["samples=4"], "temperature"),
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
    words = ["system=line one\nline: two # three \u00e9", "model=null", "seed=7"]
    cfg = load_config(cls, None, words + (["lr=1e-5"] if cls is not EvalConfig else ["budgets=0128"]))
    save_config(cfg, tmp_path / "saved.yaml")
    assert load_config(cls, str(tmp_path / "saved.yaml"), []) == cfg
    saved = yaml.safe_load((tmp_path / "saved.yaml").read_text(encoding="utf-8"))
    assert list(saved) == list(config_dict(cfg))


@pytest.mark.parametrize("cls", STAGES.values())
def test_every_option_has_a_one_line_docstring_and_a_valid_default(cls):
    rows = describe_config(cls)
    assert [row[0] for row in rows] == list(config_dict(cls()))
    for name, kind, default, doc in rows:
        assert doc and "\n" not in doc and doc.isascii(), name
        assert type(default).__name__ == kind, name
    words = [f"{name}={value}" for name, value in config_dict(cls()).items()]
    assert load_config(cls, None, words) == cls()


def test_the_tables_of_allowed_values_name_real_options():
    known = {name for cls in STAGES.values() for name in config_dict(cls())}
    assert set(CHOICES) | POSITIVE | AT_MOST_ONE | BELOW_ONE <= known
