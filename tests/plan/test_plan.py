"""The planner: bytes that stay are exact, passes are within a bound of what is measured, what it proposes fits."""
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny import tiny_model

from bench import plan as bench
from minimath.config.load import RECIPES, load_config
from minimath.config.schema import STAGES, EvalConfig, RLAIFConfig, SFTConfig
from minimath.core.checkpoint import save_adapter
from minimath.core.errors import UserError
from minimath.models import load
from minimath.models.forward import adapter_named, base_causal_lm
from minimath.models.fused import fused_layers
from minimath.models.load import load_model
from minimath.plan import footprint
from minimath.plan import plan as plan_module
from minimath.plan.needs import GIB, Planner, longest_row
from minimath.plan.plan import parse, plan
from minimath.train.optimizer import clip_and_step, make_optimizer

QWEN_14B = {"model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48,
            "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False}
SIZES = {"Qwen/Qwen2.5-0.5B": 0.494e9, "Qwen/Qwen2.5-Math-1.5B": 1.544e9, "Qwen/Qwen2.5-Math-7B": 7.616e9,
         "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": 14.770e9, "meta-llama/Llama-3.2-1B": 1.236e9,
         "HuggingFaceTB/SmolLM2-135M": 0.1345e9, "Qwen/Qwen3-0.6B": 0.596e9, "Qwen/Qwen3-1.7B": 1.7206e9,
         "Qwen/Qwen3.5-0.8B": 0.752e9, "Qwen/Qwen3.5-2B": 1.882e9, "HuggingFaceTB/SmolLM3-3B": 3.075e9,
         "google/gemma-3-1b-it": 0.99989e9, "LiquidAI/LFM2-1.2B": 1.170e9}  # parameters, from the models' cards


@pytest.fixture(scope="module")
def config_dir(tmp_path_factory) -> str:
    """A folder with nothing but the config.json of a small Llama."""
    folder = tmp_path_factory.mktemp("config")
    fields = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5,
              "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400}
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


@pytest.mark.parametrize("options", [
    {}, {"quant": "nf4"}, {"dtype": "bf16", "optimizer": "adamw8bit"},
    {"lora_targets": "q_proj,v_proj", "lora_r": 128, "optimizer": "adamw8bit"}, {"dora": True}, {"lora_init": "pissa"}])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_bytes_that_stay_are_exact(tmp_path, family, options):
    folder = tiny_model(tmp_path, family)
    cfg = SFTConfig(**({"dtype": "fp32"} | options), model=str(folder), device="cpu")
    need = Planner(str(folder), "cpu").training(cfg)
    model, _ = load_model(cfg, train=True)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(params, cfg.optimizer)
    for param in params:
        param.grad = torch.ones_like(param)
    clip_and_step(optimizer, params, 1.0, 1e-4)
    assert need["adapter"] == need["gradients"] == sum(p.nbytes for p in params)
    assert bench.model_bytes(model) == sum(need.get(name, 0) for name in (
        "embeddings, head, norms", "linear layers", "adapter", "adapter, cast"))
    assert ("adapter, cast" in need) == (not options.get("dora"))
    books = 2 * 256 * 4 * any("qmap1" in state for state in optimizer.state.values())  # two KiB are not counted
    assert need["optimizer state"] + books == bench.optimizer_state(optimizer)


def test_an_initialisation_that_no_run_takes_is_refused(config_dir):
    with pytest.raises(UserError, match="lora_init='pisa': use default, gaussian"):
        Planner(config_dir, "cpu").training(SFTConfig(device="cpu", lora_init="pisa"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_bytes_of_a_judges_adapter_are_exact(tmp_path, dtype):
    folder = tiny_model(tmp_path, "llama")
    options = {"model": str(folder), "device": "cpu", "dtype": dtype}
    model, _ = load_model(SFTConfig(**options, lora_r=6), train=True)
    judge = save_adapter(model, tmp_path / "judge")
    model, _ = load_model(cfg := RLAIFConfig(**options, lora_r=4, judge_adapter=str(judge)), train=True)
    model = load.add_adapter(model, judge, "judge")
    params = [p for name, p in model.named_parameters() if ".judge." in name]
    with adapter_named(model, "judge"):
        (layers := fused_layers(base_causal_lm(model))).refresh()
        cast = sum(t.nbytes for group in layers.groups for t in (group.active.a, group.active.b))
    planner = Planner(str(folder), "cpu")
    need = planner.stays(cfg, optimizer=True)
    assert need["judge's adapter"] == sum(p.nbytes for p in params) + cast
    assert "judge's gradients and state" not in need
    refreshed = planner.stays(cfg.replace(judge_refresh=3), optimizer=True)
    optimizer = make_optimizer([p.requires_grad_() for p in params], cfg.optimizer)
    for param in params:
        param.grad = torch.ones_like(param)
    clip_and_step(optimizer, params, 1.0, 1e-4)
    assert refreshed["judge's gradients and state"] == sum(p.nbytes for p in params) + bench.optimizer_state(optimizer)
    missing = planner.stays(cfg.replace(judge_adapter="nowhere"), optimizer=True)
    assert missing["judge's adapter"] == need["adapter"] + need["adapter, cast"]
    assert "judge's adapter" not in planner.stays(cfg.replace(judge_weight=0.0), optimizer=True)


def test_stage_2_counts_with_the_adapter_that_it_goes_on_with(tmp_path, monkeypatch):
    """adapter='s rank, or in a recipe with a section sft that of SFT's; pissa's is twice lora_r."""
    model, _ = load_model(SFTConfig(model=str(tiny_model(tmp_path / "m", "llama")), device="cpu", lora_r=6), train=True)
    adapter = save_adapter(model, tmp_path / "run" / "adapter").parent
    monkeypatch.setattr(plan_module, "Planner", lambda *_: SimpleNamespace(changes=seen))
    recipe, found = tmp_path / "r.yaml", []

    def seen(stages, card):
        found.append([(stages[name].adapter.lora_r, stages[name].adapter.lora_init) for name in ("sft", "rlaif")])
        raise UserError("seen")

    for sft, words, rank in (("sft:\n  lora_r: 64\n", [], 64), ("", ["sft.lora_r=8", "sft.lora_init=pissa"], 16),
                             ("", [f"rlaif.adapter={adapter}"], 6), ("", ["rlaif.adapter=nowhere"], 4), ("", [], 4),
                             ("sft:\n  lora_r: 64\n", ["rlaif.adapter=nowhere"], 64),
                             ("sft:\n  lora_r: 64\n", [f"adapter={adapter}"], 6)):
        recipe.write_text(f"{sft}rlaif:\n  lora_r: 4\n")
        with pytest.raises(UserError, match="seen"):
            plan(str(recipe), ["card=1", *words])
        assert found[-1][1] == (rank, "default"), (sft, words)
    assert found[1][0] == (8, "pissa") and found[-1][0] == (6, "default")


def test_a_teacher_counts_as_what_it_is(tmp_path):
    folder, larger = (tiny_model(tmp_path / name, family) for name, family in (("a", "llama"), ("b", "qwen2")))
    options = {"model": str(folder), "device": "cpu", "dtype": "bf16"}
    model, _ = load_model(SFTConfig(**options, lora_r=6), train=True)
    adapter = save_adapter(model, tmp_path / "run" / "adapter").parent
    cfg = RLAIFConfig(**options, lora_r=4, judge="heuristic")
    planner = Planner(str(folder), "cpu")

    def more(planner=planner, **teacher):
        return {name: size for name, size in planner.stays(cfg.replace(**teacher), optimizer=True).items()
                if "teacher" in name}
    as_judge = planner.stays(cfg.replace(judge="self", judge_adapter=str(adapter)), optimizer=True)["judge's adapter"]
    assert more(teacher=str(adapter)) == {"teacher's adapter": as_judge}
    assert more() == more(teacher="base") == more(teacher="http://x/v1") == {}
    other, _ = load_model(EvalConfig(model=str(larger), device="cpu", dtype="bf16"), train=False)
    assert more(teacher=str(larger)) == {"teacher": bench.model_bytes(other)}
    on_card = more(Planner(str(folder), "cuda"), teacher=str(larger))["teacher"]
    own = Planner(str(larger), "cuda").stays(cfg.replace(model=str(larger), quant="nf4"), optimizer=False)
    assert 0 <= on_card - own["embeddings, head, norms"] - own["linear layers"] < 512  # biases once more
    assert on_card < bench.model_bytes(other)


@pytest.mark.parametrize("name", [
    "llama padded fp32 nf4", "qwen2 update, shared prompts, checkpointing", "llama rollout fp32",
    *(pytest.param(name, marks=pytest.mark.slow) for name in (
        "llama packed fp32", "llama padded fp32 checkpointing", "qwen3 update, short prompts fp32",
        "gemma2 padded fp32 eager", "llama padded fp32 offload, MLP by pieces"))])
def test_predicted_peak_is_within_15_percent_of_the_measured_one(monkeypatch, name):
    monkeypatch.setattr(bench, "MODEL", bench.MODEL | {"num_hidden_layers": 4, "vocab_size": 1600})
    found = bench.compare(name)
    assert abs(found["error"]) < 0.15 and abs(found["error_above"]) < 0.15, found


@pytest.fixture
def not_fused(monkeypatch):
    monkeypatch.setattr(load, "fuse", lambda model: "off")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"attn": "eager"}])
def test_layers_follow_from_a_few_exactly(config_dir, monkeypatch, options, device):
    cfg = SFTConfig(**options, dtype="fp32", device="cpu")
    few = Planner(config_dir, device).model(cfg)
    monkeypatch.setattr(footprint, "pattern", lambda config: 5)
    every = Planner(config_dir, device).model(cfg)
    assert list(few.models) == [2, 3] and list(every.models) == [5]
    for prompt in (0, 60):
        assert few.followed(120, 1, prompt) == every.followed(120, 1, prompt)
    assert few.followed(120, 0)[1] == pytest.approx(every.followed(120, 0)[1], rel=0.01)


def test_three_lengths_foretell_others_on_a_card(config_dir):
    model = Planner(config_dir, "cuda").model(SFTConfig(dtype="fp32", device="cpu"))
    for length in (1500, 3000, 12000):
        assert model.passes(1, length) == pytest.approx(model.followed(length, 1, 0), rel=0.05)


@pytest.mark.parametrize("length, prompt", [(200, 0), (700, 0), (90, 400)])
def test_a_few_rows_foretell_more_on_a_cpu(config_dir, length, prompt):
    model = Planner(config_dir, "cpu").model(SFTConfig(dtype="fp32", device="cpu"))
    assert model.passes(15, length, prompt) == pytest.approx(model.followed(length, 15, prompt), rel=0.03)
    assert model.passes(2.5, length, prompt) == model.followed(length, 2, prompt, length // 2)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}])
def test_rows_add_up_as_padded_ones_do(config_dir, options, not_fused):
    """A padded batch that is followed as it is, masks included, against the same number of single rows."""
    model = Planner(config_dir, "cuda").model(SFTConfig(dtype="fp32", device="cpu", **options))
    whole = next(iter(model.models.values()))
    with model.fake, footprint.Live() as live:
        ids, mask = (torch.empty(3, 2000, dtype=torch.long) for _ in range(2))
        states = footprint.forward.hidden_states(whole, ids, attention_mask=mask, position_ids=ids)
        kept, forward, live.peak = live.now, live.peak, live.now
        states.sum().backward()
    assert pytest.approx((kept, forward, live.peak), rel=0.05) == [3 * size for size in model.follow(whole, 2000, 1)]


def test_a_fused_step_keeps_less(config_dir, request):
    """Of x, x A^T, qkv, the attention's output and sums, x', [g u]; norms and h = act(g) u are made again."""
    cfg, d, f, kv, r, n = SFTConfig(dtype="bf16", device="cpu", attn="flash_attention_2"), 64, 160, 32, 16, 2048
    fused = Planner(config_dir, "cuda").model(cfg)
    first, second = (fused.follow(model, n, 1)[0] for model in fused.models.values())
    numbers = 2 * d + (d + 2 * kv) + d + 2 * f + (3 + 1 + 2 + 1) * r  # and in fp32: two norms' r, attention's sums
    assert second - first == n * (2 * numbers + 4 * (2 + 4))
    request.getfixturevalue("not_fused")
    apart = Planner(config_dir, "cuda").model(cfg)
    assert not apart.groups and fused.passes(1, n)[0] < 0.6 * apart.passes(1, n)[0]


def test_masks_of_packed_rows_are_counted_for_every_layer(config_dir):
    sdpa = SFTConfig(dtype="fp32", device="cpu", micro_batch_tokens=2048, batch_size=4, max_len=1024)
    planner = Planner(config_dir, "cuda")
    needed = [planner.training(cfg)["activations"] for cfg in (sdpa, sdpa.replace(attn="flash_attention_2"))]
    assert needed[0] - needed[1] > 5 * 4 * 2048 ** 2  # fp32 masks of five layers


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


def test_14b_holds_rows_of_24_000_tokens_in_24_gib():
    """In both stages, which without offload=true they do not."""
    recipe = "deepseek-r1-distill-14b-24gb"
    stages = load_config(SFTConfig, recipe, []), load_config(RLAIFConfig, recipe, ["max_new_tokens=23488"])
    planner = Planner(stages[0].model.name, "cuda")
    for cfg in stages:
        assert longest_row(cfg) == cfg.optimizer.micro_batch_tokens == 24000
        assert planner.in_host_memory(cfg) == 48 * 24000 * 5120 * 2
        need = [planner.training(cfg.replace(offload=on)) for on in (True, False)]
        assert sum(need[0].values()) < 18 * GIB < 24 * GIB < sum(need[1].values())
        gone = need[1]["activations"] - need[0]["activations"]
        assert gone == pytest.approx(47 * 24000 * 5120 * 2, rel=0.05)  # the one that is read stays


@pytest.mark.parametrize(("recipe", "card"), [
    ("qwen2.5-0.5b-8gb", 8), ("deepseek-r1-distill-14b-24gb", 24),
    *(pytest.param(*each, marks=pytest.mark.slow) for each in (
        ("llama-3.2-1b", 12), ("qwen2.5-math-1.5b-12gb", 12), ("qwen2.5-math-7b-16gb", 16),
        ("qwen2.5-math-7b-24gb", 24), ("qwen3-0.6b", 8), ("qwen3-1.7b", 8), ("qwen3.5-0.8b", 8), ("qwen3.5-2b", 8),
        ("smollm3-3b", 8), ("gemma-3-1b", 8), ("lfm2-1.2b", 8)))])
def test_recipe_fits_its_card(recipe, card):
    stages = {name: load_config(cls, recipe, []) for name, cls in STAGES.items()}
    planner, rlaif = Planner(stages["sft"].model.name, "cuda"), stages["rlaif"]
    assert planner.changes(stages, card * GIB) == {}
    for name in ("sft", "rlaif"):
        assert sum(planner.training(stages[name]).values()) <= card * GIB, name
    assert planner.most_seqs(rlaif, rlaif, card * GIB) >= 2


def test_14b_in_4_bits_has_the_bytes_of_its_matrices(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_14B))
    cfg = load_config(SFTConfig, "deepseek-r1-distill-14b-24gb", [f"model={tmp_path}"])
    need = Planner(cfg.model.name, "cuda").stays(cfg, optimizer=False)
    matrices = 48 * (2 * 5120 * 5120 + 2 * 5120 * 1024 + 3 * 5120 * 13824)
    assert need["linear layers"] == pytest.approx(matrices * (0.5 + 1 / 64 + 4 / 64 / 256), rel=0.001)
    assert need["embeddings, head, norms"] == pytest.approx(2 * 2 * 152064 * 5120, rel=0.01)


def test_the_largest_settings_fit_and_the_next_do_not(config_dir):
    planner, card = Planner(config_dir, "cuda"), GIB
    for cfg in (SFTConfig(max_len=256, batch_size=100000), RLAIFConfig(max_prompt_len=64, max_new_tokens=64,
                                                                       prompts_per_step=100000, group_size=2)):
        most = planner.most_tokens(cfg, card)
        need = [sum(planner.training(cfg.replace(micro_batch_tokens=n)).values()) for n in (most, most + 256)]
        assert 0 < most < 1 << 17 and need[0] <= card < need[1]
    cfg = cfg.replace(max_new_tokens=8000, max_num_seqs=4096)
    seqs = planner.most_seqs(cfg, cfg, card)
    need = [sum(planner.rollout(cfg, cfg, n, card).values()) for n in (seqs, seqs + 1)]
    assert 0 < seqs < 4096 and need[0] <= card < need[1]


def test_apply_writes_a_recipe_that_fits_and_keeps_the_rest(tmp_path, config_dir):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"# mine\nmodel: {config_dir}   # small\ndtype: bf16\nattn: flash_attention_2\nthinking: off\n"
                      "system: 'Be: brief.'\nsft:\n  micro_batch_tokens: 65536  # too many\n  max_len: 512\n"
                      "  batch_size: 200\n  packing: false\n")
    result = plan(str(recipe), ["card=1", "--apply"])
    [card] = result["cards"]
    assert not card["fits"] and card["changes"]["sft"].keys() >= {"micro_batch_tokens"}
    written = tmp_path / "mine-1gb.yaml"
    text = written.read_text()
    assert text.startswith(f"# {recipe}, changed to fit 1.00 GiB\n")
    before, after = yaml.safe_load(recipe.read_text()), yaml.safe_load(text)
    assert after["sft"].items() >= {"max_len": 512, "batch_size": 200, "packing": False}.items()
    assert all(after[name] == before[name] for name in ("model", "dtype", "attn"))
    stages = {name: load_config(cls, str(written), []) for name, cls in STAGES.items()}
    assert stages["sft"].optimizer.micro_batch_tokens < 65536 and stages["sft"].max_len == 512
    assert (stages["eval"].prompt.thinking, stages["eval"].prompt.system) == ("off", "Be: brief.")
    assert Planner(config_dir, "auto").changes(stages, GIB) == {}


def test_apply_says_with_which_words_its_recipe_is_to_be_run(tmp_path, config_dir, capsys):
    for words, said in (([f"model={config_dir}", "lora_r=8"], True), ([], False)):
        (tmp_path / "mine.yaml").write_text("" if words else f"model: {config_dir}\n")
        plan(str(tmp_path / "mine.yaml"), [*words, "card=4", "--apply", str(tmp_path / f"{said}.yaml")])
        assert (f"with the same words: model={config_dir} lora_r=8" in capsys.readouterr().out) == said


def test_what_costs_least_is_changed_first(config_dir):
    """Tokens of a pass, checkpointing, optimizer, host memory, 4-bit weights; rows are cut last; then nothing is."""
    planner = Planner(config_dir, "cuda")
    stages = {name: cls(model=config_dir) for name, cls in STAGES.items()}
    stages["sft"] = stages["sft"].replace(max_len=8192, micro_batch_tokens=16384)
    sizes = [sum(planner.training(stages["sft"].replace(**options)).values()) for options in (
        {}, {"micro_batch_tokens": 8192}, {"micro_batch_tokens": 8192, "gradient_checkpointing": True})]
    assert planner.changes(stages, sizes[1])["sft"].keys() == {"micro_batch_tokens"}
    assert planner.changes(stages, sizes[2])["sft"].keys() == {"micro_batch_tokens", "gradient_checkpointing"}
    every = planner.changes(stages, int(0.52 * GIB))
    assert every["sft"].keys() == {"micro_batch_tokens", "gradient_checkpointing", "optimizer", "offload", "quant",
                                   "max_len"}
    assert every["eval"] == {"quant": "nf4"}
    assert planner.changes(stages, GIB // 2) is None


def test_apply_never_overwrites(tmp_path):
    recipe, taken = tmp_path / "r.yaml", tmp_path / "taken.yaml"
    recipe.write_text("quant: none\n")
    taken.write_text("mine\n")
    with pytest.raises(UserError, match="not overwritten"):
        plan(str(recipe), ["card=8", "--apply", str(taken)])
    assert taken.read_text() == "mine\n" and recipe.read_text() == "quant: none\n"


def test_words_of_the_command(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("")
    assert parse(None, ["card=24", "lr=1", "--resume"]) == (24 * GIB, None, ["lr=1", "--resume"])
    assert parse(str(recipe), ["card=24", "lr=1", "--apply"]) == (24 * GIB, tmp_path / "r-24gb.yaml", ["lr=1"])
    assert parse(str(recipe), ["--apply", "new.yaml", "card=24"]) == (24 * GIB, Path("new.yaml"), [])
    assert parse("llama-3.2-1b", ["card=12", "apply="])[1] == Path("llama-3.2-1b-12gb.yaml")
    with pytest.raises(UserError, match="card=big"):
        parse(None, ["card=big"])
    with pytest.raises(UserError, match="needs a recipe and a card"):
        parse(None, ["card=24", "--apply"])


def test_unknown_model_is_one_line(here):
    status, _, err = here("plan", "model=nobody/nothing")
    assert status == 2 and err.startswith("error: model='nobody/nothing'") and err.count("\n") == 1


def test_command_prints_stages_and_cards_and_a_judge_that_the_run_trains(here, config_dir):
    words = [f"model={config_dir}", "device=cpu", "card=2"]
    status, out, _ = here("plan", *words)
    assert status == 0 and "RLAIF rollout" in out and "together" in out and "as it is" in out
    assert "judge's adapter" not in out and "shard=true is not counted" not in out
    Path("r.yaml").write_text("judge_train:\n")
    assert "judge's adapter" in here("plan", "r.yaml", *words)[1]


def test_the_memory_asked_is_that_of_the_card_that_trains(monkeypatch, config_dir, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(plan_module, "pick_device", torch.device)
    memory = {torch.device("cuda:1"): SimpleNamespace(total_memory=3 * GIB)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", memory.__getitem__)
    assert [each["card"] for each in plan(None, [f"model={config_dir}", "device=cuda:1"])["cards"]] == [3 * GIB]


def test_a_sharded_base_is_said_not_to_be_counted(here, tiny_dir):
    status, out, err = here("plan", f"model={tiny_dir}", "device=cpu", "card=1", "shard=true", "judge=heuristic")
    assert status == 0 and "shard=true is not counted" in out, out + err
