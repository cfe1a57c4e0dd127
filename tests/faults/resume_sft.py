"""Issue 6, 1: SFT killed with SIGKILL and resumed is bitwise the run that was never killed (CPU, fp32, one thread).

Compared are losses, gradient norms, rates and samples, the adapter, every checkpoint (adapter, optimiser, random
states, loop state) and the tokens of every batch, also those of the steps that the kill lost.
"""
from pathlib import Path

from harness import Tally
from killing import Kill, fixed_options, one_variant, open_forks, second_forks

STEPS = 20
KILLS = (1, 7, 10, 13, 19)
MOMENTS = ("gradient", "stepped", "half a line", "logged", "half a checkpoint", "flushing", "saved")
BASE = {"steps": STEPS, "batch_size": 5, "lora_r": 4, "lr": 0.01, "warmup": 0.2, "lora_dropout": 0.1, "save_every": 4,
        "packing": "false", "sample_every": 3, "eval_max_new_tokens": 4}
WIDE = {"lora_r": 160}  # bitsandbytes keeps 32-bit state for tensors below 4,096 elements
TOGETHER = {"packing": "true", "micro_batch_tokens": 120, "optimizer": "adamw8bit", "quant": "nf4", **WIDE}
VARIANTS = {
    "plain": {},
    "packing": {"packing": "true"},
    "accumulation": {"micro_batch_tokens": 60},
    "8-bit Adam": {"optimizer": "adamw8bit", **WIDE},
    "paged 8-bit Adam": {"optimizer": "paged_adamw8bit", **WIDE},
    "NF4": {"quant": "nf4"},
    "packing, accumulation, 8-bit Adam and NF4": TOGETHER,
    "evaluation and samples": {"eval_every": 3, "eval_limit": 2, "sample_every": 1},
    "fp16 with its loss scale": {"dtype": "fp16"},
}
FAST = {"plain": [[Kill("stepped", 7)]], "packing, accumulation, 8-bit Adam and NF4": [[Kill("half a checkpoint", 7)]]}


def run(full: bool, folder: Path) -> list[Tally]:
    fixed = fixed_options(folder)
    with open_forks(folder, hash_seed=1) as train, second_forks(full, folder, train) as again:
        cases = FAST if not full else {name: kills_of(number) for number, name in enumerate(VARIANTS)}
        return [resumed((train, again), folder, fixed, name, kills) for name, kills in cases.items()]


def kills_of(number: int) -> list[list[Kill]]:
    """The kills of the n-th variant: the first dies at every step in every moment, the others at every step in moments
    that take turns; then one run that dies at all the steps, one after another, and one that dies at its very end."""
    if number == 0:
        alone = [[Kill(moment, step)] for step in KILLS for moment in MOMENTS]
    else:
        alone = [[Kill(MOMENTS[(number + 2 * i) % len(MOMENTS)], step)] for i, step in enumerate(KILLS)]
    chain = [Kill(MOMENTS[(number + i) % 4], step) for i, step in enumerate(KILLS)]
    evaluated = [[Kill("evaluation", 7)], [Kill("evaluated", 13)]] if number == list(VARIANTS).index(
        "evaluation and samples") else []
    return [*alone, chain, [Kill("ending", 1)], *evaluated]


def resumed(forks, folder: Path, fixed: dict, name: str, cases: list[list[Kill]]) -> Tally:
    """The tally of one variant."""
    options = fixed | BASE | VARIANTS[name]
    if "eval_every" in options:
        options["eval_data"] = fixed["data"]
    tally = one_variant(Tally(f"resume SFT, {name}"), forks, "sft", folder, cases, options)
    saved = folder / f"{tally.case} whole" / "checkpoints" / f"step-{STEPS:06d}" / "optimizer.safetensors"
    if "8bit" in options.get("optimizer", "") and b'"U8"' not in saved.read_bytes():
        tally.add(False, "the state of the 8-bit optimiser is not in 8 bits: nothing is tried here")
    return tally
