"""Compare what minimath plan predicts with what training and sampling really hold.

    python -m bench.plan                  # all settings, two minutes of a core
    python -m bench.plan --only nf4       # those with the word in their name; of the others the last result stays

Small random models of four families go through minimath's own code (an optimizer step of two micro-batches, or a whole
rollout) while every storage that comes and goes is counted, operations of bitsandbytes from the inside; to
that comes what the loaded model stores. Rows have unlike lengths, so that masks are needed, and fill the micro-batches:
the case that the plan is made for. Predicted is what minimath plan adds up, without its margins for a card. The second
error is of what comes and goes alone, which the weights cannot flatter. A setting's row holds what it was measured on.
"""
import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from bench.measure import RESULTS, machine
from minimath.config.schema import RLAIFConfig, SFTConfig
from minimath.data.chat import Encoded
from minimath.data.examples import Example
from minimath.data.sample import Group, Sample
from minimath.models.forward import base_causal_lm
from minimath.models.fused import fused_layers
from minimath.models.policy import Policy, load_policy
from minimath.plan.footprint import Live
from minimath.plan.needs import Planner
from minimath.rollout.open import open_engine
from minimath.train import rlaif, sft
from minimath.train.optimizer import Optimizer, clip_and_step

MODEL = {"vocab_size": 4000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
         "num_attention_heads": 8, "num_key_value_heads": 2}
FAMILIES = {"llama": {}, "qwen2": {}, "qwen3": {"head_dim": 32},
            "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 512}}
PACKED = {"micro_batch_tokens": 1000, "max_len": 600, "batch_size": 4}
PADDED = {"micro_batch_tokens": 1200, "max_len": 200, "batch_size": 12, "packing": False}
GROUPS = {"prompts_per_step": 2, "group_size": 6, "max_prompt_len": 240, "max_new_tokens": 130,
          "micro_batch_tokens": 1020}
SAMPLING = {"prompts_per_step": 24, "max_prompt_len": 320, "max_new_tokens": 160, "max_num_seqs": 12}
LONG = {"micro_batch_tokens": 2000, "max_len": 1200, "batch_size": 4, "gradient_checkpointing": True}
SETTINGS = {  # name: (family, stage, options)
    "llama rollout fp32": ("llama", "rollout", SAMPLING),
    "llama packed fp32": ("llama", "sft", PACKED),
    "llama packed bf16": ("llama", "sft", PACKED | {"dtype": "bf16"}),
    "llama packed fp32 checkpointing": ("llama", "sft", LONG),
    "llama padded fp32": ("llama", "sft", PADDED),
    "llama padded fp32 checkpointing": ("llama", "sft", PADDED | {
        "gradient_checkpointing": True, "micro_batch_tokens": 2400, "batch_size": 24}),
    "llama padded fp32 nf4": ("llama", "sft", PADDED | {"quant": "nf4"}),
    "llama padded fp32 nf4 checkpointing": ("llama", "sft", PADDED | {
        "quant": "nf4", "gradient_checkpointing": True, "micro_batch_tokens": 2400, "batch_size": 24}),
    "llama padded fp32 offload, MLP by pieces": ("llama", "sft", PADDED | {
        "gradient_checkpointing": True, "offload": True, "micro_batch_tokens": 10000, "batch_size": 100}),
    "qwen2 padded fp32 eager": ("qwen2", "sft", PADDED | {"attn": "eager"}),
    "qwen2 padded fp32 adamw8bit": ("qwen2", "sft", PADDED | {"optimizer": "adamw8bit", "lora_r": 64}),
    "qwen2 packed fp32 dropout": ("qwen2", "sft", PACKED | {"lora_dropout": 0.1}),
    "qwen2 update, shared prompts, checkpointing": ("qwen2", "rlaif", GROUPS | {
        "gradient_checkpointing": True, "group_size": 12, "micro_batch_tokens": 1800}),
    "qwen3 update, short prompts fp32": ("qwen3", "rlaif", GROUPS | {
        "max_prompt_len": 24, "max_new_tokens": 346, "micro_batch_tokens": 1110}),
    "gemma2 padded fp32 eager": ("gemma2", "sft", PADDED | {"attn": "eager"}),
    "qwen3 rollout fp32 top-p": ("qwen3", "rollout", SAMPLING | {"top_p": 0.9}),
    "qwen3 packed fp32 checkpointing": ("qwen3", "sft", LONG),
    "qwen3 padded bf16": ("qwen3", "sft", PADDED | {"dtype": "bf16"}),
    "llama update, shared prompts bf16": ("llama", "rlaif", GROUPS | {"dtype": "bf16"}),
    "gemma2 packed bf16 eager checkpointing": ("gemma2", "sft", LONG | {
        "dtype": "bf16", "attn": "eager", "micro_batch_tokens": 1000, "max_len": 600}),
    "qwen2 rollout nf4": ("qwen2", "rollout", SAMPLING | {"quant": "nf4"}),
}


class SeesInside(Live):
    """Live that also sees the scales and the matrix of bitsandbytes' 4-bit product."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) != "bitsandbytes.gemm_4bit.default":
            return super().__torch_dispatch__(func, types, args, kwargs)
        from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl
        with self:
            return _gemm_4bit_default_impl(*args, **(kwargs or {}))


def write_model(folder: Path, family: str) -> None:
    """Write a random model and a tokenizer that needs no download."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    words = {f"<{i}>": i for i in range(MODEL["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<0>")),
                                        eos_token="<1>", pad_token="<2>", unk_token="<0>")
    config = AutoConfig.for_model(family, **MODEL, **FAMILIES[family], eos_token_id=1, pad_token_id=2,
                                  bos_token_id=None)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def model_bytes(model) -> int:
    """Bytes of the storages of a loaded model, NF4's scales and cast adapters included."""
    tensors, fused = [*model.parameters(), *model.buffers()], fused_layers(base_causal_lm(model))
    for group in fused.groups if fused else ():
        tensors += [t for t in (group.active.a, group.active.b, group.bias) if t is not None]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        for each in (state, getattr(state, "state2", None)):
            tensors += [v for v in vars(each).values() if torch.is_tensor(v)] if each is not None else []
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def optimizer_state(optimizer) -> int:
    """Bytes of an optimizer's state."""
    tensors = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def row(length: int, prompt: int = 1) -> Encoded:
    return Encoded([3 + i % 3000 for i in range(length)], [False] * prompt + [True] * (length - prompt), False)


def one_step(cfg, policy: Policy, update) -> tuple[int, int]:
    """Measure a step that is not the first; update(optimizer) takes it.

    Returns bytes of model, optimizer and gradients; the most that came and went above them.
    """
    model_size = model_bytes(policy.model)
    with SeesInside() as live:
        optimizer = Optimizer(policy, cfg, print)
        for param in optimizer.params:  # the first step makes the optimizer's state; it needs no batch for that
            param.grad = torch.zeros_like(param)
        clip_and_step(optimizer.inner, optimizer.params, 1.0, 1e-4)
        update(optimizer)
    fixed = optimizer_state(optimizer.inner) + sum(p.nbytes for p in optimizer.params)
    return model_size + fixed, live.peak - fixed


def measure_sft(cfg: SFTConfig, policy: Policy) -> tuple[int, int]:
    budget = cfg.optimizer.micro_batch_tokens
    if cfg.packing:
        rows = [row(cfg.max_len), row(budget - cfg.max_len)] * 2
    else:
        count = budget // cfg.max_len  # both micro-batches of (nearly) full length, neither of equal rows
        rows = [row(cfg.max_len - cut) for cut in [0] * (count - 1) + [1] * count + [2]]
    return one_step(cfg, policy, lambda optimizer: sft.update(policy, optimizer, rows, packing=cfg.packing))


def measure_update(cfg: RLAIFConfig, policy: Policy) -> tuple[int, int]:
    unlike = cfg.prompt.max_prompt_len < 100  # then they go padded, and rows of one length would need no mask
    groups = []
    for number in range(cfg.prompts_per_step):
        sizes = [cfg.sampling.max_new_tokens - unlike * (2 * i + number) for i in range(cfg.group_size)]
        prompt = [5 + number, *row(cfg.prompt.max_prompt_len).ids[1:]]
        groups.append(Group(Example("problem"), prompt, [
            Sample(row(size).ids, [-1.0] * size, True, advantage=(-1.0) ** i) for i, size in enumerate(sizes)]))
    return one_step(cfg, policy, lambda optimizer: rlaif.update(cfg, policy, optimizer, groups, groups))


def measure_rollout(cfg: RLAIFConfig, policy: Policy) -> tuple[int, int]:
    prompts = [[5 + i, *row(cfg.prompt.max_prompt_len - 1 - i % 2).ids] for i in range(cfg.prompts_per_step)]
    with SeesInside() as live, open_engine(cfg.engine, cfg.sampling, policy) as engine:
        engine.eos = []  # every completion as long as it may be
        engine.generate(prompts)
    return model_bytes(policy.model), live.peak


MEASURES = {"sft": measure_sft, "rlaif": measure_update, "rollout": measure_rollout}
COME_AND_GO = ("activations", "weights copied for decoding", "keys and values", "prefill, or a step's logits")


def predict(cfg, stage: str) -> tuple[int, int]:
    """Return bytes that stay and the peak above them, as the plan adds them up."""
    planner = Planner(cfg.model.name, "cpu")
    if stage == "rollout":
        rows = planner.rollout(cfg, cfg, cfg.engine.max_num_seqs, card=1 << 40)
        del rows["optimizer state"]  # measured is an engine alone
    else:
        rows = planner.training(cfg)
    above = sum(size for name, size in rows.items() if name in COME_AND_GO)
    return sum(rows.values()) - above, above


def compare(name: str) -> dict:
    """Predict and measure one setting."""
    family, stage, options = SETTINGS[name]
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), family)
        kind = SFTConfig if stage == "sft" else RLAIFConfig
        cfg = kind(**({"dtype": "fp32"} | options), model=folder, device="cpu")
        stays, above = predict(cfg, stage)
        torch.manual_seed(0)
        policy = load_policy(cfg, train=True)
        fixed, moved = MEASURES[stage](cfg, policy)
    assert base_causal_lm(policy.model).config.model_type == family
    return {"setting": name, "predicted_mb": (stays + above) / 1e6, "measured_mb": (fixed + moved) / 1e6,
            "error": (stays + above) / (fixed + moved) - 1, "predicted_stays_mb": stays / 1e6,
            "measured_stays_mb": fixed / 1e6, "error_above": above / moved - 1}


def summary(found: list[dict]) -> dict:
    """Median and worst of both errors, as shares."""
    return {kind: {"median": statistics.median(abs(each[kind]) for each in found),
                   "worst": max(abs(each[kind]) for each in found)} for kind in ("error", "error_above")}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="settings with this word in their name")
    options = parser.parse_args()
    if not any(options.only in name for name in SETTINGS):
        parser.error(f"--only {options.only!r} is in none of: {'; '.join(SETTINGS)}")
    transformers.utils.logging.disable_progress_bar()
    where, path = machine("cpu"), RESULTS / "plan-cpu.json"
    held = json.loads(path.read_text()) if path.exists() else {"settings": []}
    known = {each["setting"]: each for each in held["settings"]}
    for each in known.values():
        each.setdefault("machine", held.get("machine"))  # one for all rows, in a file of before
    for name in SETTINGS:
        if options.only in name:
            known[name] = compare(name)
            print(json.dumps(known[name]), file=sys.stderr, flush=True)
            known[name]["machine"] = where
            found = [known[each] for each in SETTINGS if each in known]
            result = {"model": MODEL, "summary": summary(found), "settings": found}
            path.write_text(json.dumps(result, indent=1) + "\n")
    table = Table("setting", "predicted MB", "measured MB", "error", "of what comes and goes")
    for each in found:
        table.add_row(each["setting"], f"{each['predicted_mb']:.1f}", f"{each['measured_mb']:.1f}",
                      f"{100 * each['error']:+.1f}%", f"{100 * each['error_above']:+.1f}%")
    Console(width=120).print(table)
    print(f"{len(found)} settings: " + "; ".join(
        f"{kind} median {100 * s['median']:.1f}%, worst {100 * s['worst']:.1f}%" for kind, s in summary(found).items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
