"""The planner: bytes that stay are exact, passes are within a bound of what is measured, what it proposes fits."""
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import tiny_model

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import plan as bench
from minimath.plan import footprint
from minimath.plan import needs
from minimath.config.load import RECIPES, load_config
from minimath.config.schema import RLAIFConfig, SFTConfig
from minimath.core.errors import UserError
from minimath.plan.edit import apply, set_value
from minimath.plan.footprint import Shape
from minimath.models.load import load_model
from minimath.plan.needs import GIB, Subject
from minimath.train.optimizer import clip_and_step, make_optimizer
from minimath.plan.plan import parse, plan

QWEN_14B = {"model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48,
            "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False}
SIZES = {"Qwen/Qwen2.5-0.5B": 0.494e9, "Qwen/Qwen2.5-Math-1.5B": 1.544e9, "Qwen/Qwen2.5-Math-7B": 7.616e9,
         "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": 14.770e9, "meta-llama/Llama-3.2-1B": 1.236e9,
         "HuggingFaceTB/SmolLM2-135M": 0.1345e9}  # parameters, from the models' cards


@pytest.fixture(scope="module")
def config_dir(tmp_path_factory) -> str:
    """A folder with nothing but the config.json of a small Llama."""
    folder = tmp_path_factory.mktemp("config")
    fields = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5,
              "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400}
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


@pytest.mark.parametrize("options", [
    {}, {"quant": "nf4"}, {"quant": "nf4", "double_quant": False}, {"dtype": "bf16", "optimizer": "adamw8bit"},
    {"lora_targets": "q_proj,v_proj", "lora_r": 128, "optimizer": "adamw8bit"}, {"dora": True}])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_bytes_that_stay_are_exact(tmp_path, family, options):
    folder = tiny_model(tmp_path, family)
    cfg = SFTConfig(**({"dtype": "fp32"} | options), model=str(folder), device="cpu")
    subject = Subject(str(folder), "cpu")
    stays = subject.statics(cfg)
    model, _ = load_model(cfg, train=True)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(params, cfg)
    for param in params:
        param.grad = torch.ones_like(param)
    clip_and_step(optimizer, params, 1.0, 1e-4)
    assert stays.adapter == stays.gradients == sum(map(footprint.stored, params))
    assert stays.outside + stays.layers + stays.adapter == bench.model_bytes(model)
    assert stays.optimizer == bench.optimizer_state(optimizer)


@pytest.mark.parametrize("name", [
    "llama packed fp32", "llama padded fp32 checkpointing", "llama padded fp32 nf4",
    "qwen2 update, shared prompts, checkpointing", "llama rollout fp32"])
def test_predicted_peak_is_within_15_percent_of_the_measured_one(monkeypatch, name):
    monkeypatch.setattr(bench, "MODEL", bench.MODEL | {"num_hidden_layers": 4, "vocab_size": 1600})
    found = bench.compare(name)
    assert abs(found["error"]) < 0.15 and abs(found["error_above"]) < 0.15, found


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"quant": "nf4"}, {"attn": "eager"}])
def test_layers_follow_from_a_few_exactly(config_dir, options):
    cfg = SFTConfig(**options, dtype="fp32", device="cpu")
    config = Subject(config_dir, "cpu").config
    shape = Shape("padded", 3, 40)
    every = footprint.tracer(config, cfg, torch.float32, 5, "cpu")
    few = footprint.layer_tracer(config, cfg, torch.float32, "cpu")
    assert few[0](shape) == every[0](shape)
    assert few[1](shape) == pytest.approx(every[1](shape), rel=0.01)


def test_probes_foretell_other_lengths_and_rows(config_dir):
    cfg = SFTConfig(dtype="fp32", device="cpu")
    subject = Subject(config_dir, "cpu")
    for shape in (Shape("packed", 1, 3000), Shape("padded", 3, 2000)):
        assert subject.estimate(cfg, shape) == pytest.approx(subject.follow(cfg, shape), rel=0.05)


def test_masks_of_packed_rows_are_counted_for_every_layer(config_dir):
    sdpa = SFTConfig(dtype="fp32", device="cpu", micro_batch_tokens=2048, batch_size=4, max_len=1024)
    flash = dataclasses.replace(sdpa, attn="flash_attention_2")
    subject = Subject(config_dir, "cuda")
    kept = [needs.training_need(subject, cfg)[1].kept for cfg in (sdpa, flash)]
    assert kept[0] - kept[1] > 5 * 4 * 2048 ** 2  # fp32 masks of five layers


def test_pattern_of_layers_is_found():
    class Config:
        layer_types = ["a", "a", "b"] * 3

        def get_text_config(self):
            return self

    assert footprint.pattern(Config()) == 3


@pytest.mark.parametrize("name", SIZES)
def test_shipped_shapes_have_the_parameters_of_the_model(name):
    from transformers import AutoConfig, AutoModelForCausalLM
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(
            (RECIPES / "shapes.json").read_text())[name]))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(SIZES[name], rel=0.002)


@pytest.mark.parametrize(("recipe", "card"), [
    ("qwen2.5-0.5b-8gb", 8), ("deepseek-r1-distill-14b-24gb", 24),
    *(pytest.param(*each, marks=pytest.mark.slow) for each in (
        ("llama-3.2-1b", 12), ("qwen2.5-math-1.5b-12gb", 12), ("qwen2.5-math-7b-16gb", 16),
        ("qwen2.5-math-7b-24gb", 24)))])
def test_recipe_fits_its_card(recipe, card):
    stages = {n: load_config(c, recipe, []) for n, c in (("sft", SFTConfig), ("rlaif", RLAIFConfig))}
    subject, room = Subject(stages["sft"].model, "cuda"), needs.room_in(card * GIB, "cuda")
    for name, cfg in stages.items():
        assert needs.fits(subject, cfg, room), name
    rows, slots = needs.rollout_need(subject, stages["rlaif"], stages["rlaif"], room, state=True)
    assert sum(rows.values()) <= room and slots >= 2


def test_14b_in_4_bits_has_the_bytes_of_its_matrices(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_14B))
    cfg = load_config(SFTConfig, "deepseek-r1-distill-14b-24gb", [f"model={tmp_path}"])
    stays = Subject(cfg.model.name, "cuda").statics(cfg)
    matrices = 48 * (2 * 5120 * 5120 + 2 * 5120 * 1024 + 3 * 5120 * 13824)
    assert stays.layers == pytest.approx(matrices * (0.5 + 1 / 64 + 4 / 64 / 256), rel=0.001)
    assert stays.outside == pytest.approx(2 * 2 * 152064 * 5120, rel=0.01)


def test_apply_writes_a_recipe_that_fits_and_keeps_comments(tmp_path, config_dir):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"# mine\nmodel: {config_dir}   # small\ndtype: bf16\nattn: flash_attention_2\nsft:\n"
                      "  micro_batch_tokens: 65536  # too many\n  max_len: 512\n  batch_size: 200\n  packing: false\n")
    result = plan(str(recipe), ["card=1", "--apply"])
    written = Path(result["written"])
    text = written.read_text()
    assert written.name == "mine-1gb.yaml" and "# mine" in text and "# too many" in text and "# small" in text
    stages = {n: load_config(c, str(written), []) for n, c in (("sft", SFTConfig), ("rlaif", RLAIFConfig))}
    assert stages["sft"].micro_batch_tokens < 65536 and stages["sft"].max_len == 512
    assert all(needs.fits(Subject(config_dir, "auto"), c, needs.room_in(GIB, "cuda")) for c in stages.values())


def test_edit_sets_values_anywhere():
    text = "# head\nquant: none  # why\nsft:\n  lr: 1e-4\n  quant: none\nrlaif:\n"
    text = set_value(text, "", "quant", "nf4")
    text = set_value(text, "", "attn", "sdpa")
    text = set_value(text, "sft", "max_len", "256")
    text = set_value(text, "rlaif", "max_new_tokens", "64")
    assert yaml.safe_load(text) == {"attn": "sdpa", "quant": "nf4", "rlaif": {"max_new_tokens": 64},
                                    "sft": {"lr": "1e-4", "quant": "nf4", "max_len": 256}}
    assert "# head" in text and "# why" in text
    assert yaml.safe_load(set_value("", "", "quant", "nf4")) == {"quant": "nf4"}


def test_apply_never_overwrites(tmp_path):
    recipe, taken = tmp_path / "r.yaml", tmp_path / "taken.yaml"
    recipe.write_text("quant: none\n")
    taken.write_text("mine\n")
    with pytest.raises(UserError, match="not overwritten"):
        plan(str(recipe), ["card=8", "--apply", str(taken)])
    with pytest.raises(UserError, match="File exists"):
        apply(str(recipe), {"": {"quant": "nf4"}}, taken)
    assert taken.read_text() == "mine\n" and recipe.read_text() == "quant: none\n"


def test_words_of_the_command():
    assert parse(["card=24", "lr=1", "--apply"]) == (24 * GIB, "", ["lr=1"])
    assert parse(["card=25769803776", "--apply", "new.yaml"]) == (24 * GIB, "new.yaml", [])
    with pytest.raises(UserError, match="card=big"):
        parse(["card=big"])


def test_unknown_model_is_one_line(here):
    status, _, err = here("plan", "model=nobody/nothing")
    assert status == 2 and err.startswith("error: model='nobody/nothing'") and err.count("\n") == 1


def test_command_prints_stages_and_cards(here, config_dir):
    status, out, _ = here("plan", f"model={config_dir}", "device=cpu", "card=2")
    assert status == 0 and "RLAIF rollout" in out and "together" in out and "On 2.00 GiB: it fits as it is." in out


def test_a_sharded_base_is_said_not_to_be_counted(here, tiny_dir):
    words = ["plan", f"model={tiny_dir}", "device=cpu", "card=1"]
    assert "shard=true is not counted" not in here(*words)[1]
    status, out, err = here(*words, "shard=true")
    assert status == 0 and "shard=true is not counted" in out, out + err
