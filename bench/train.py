"""One training step of minimath against one of TRL's, for both stages: speed and peak memory.

    python -m bench.train                          # CPU: SFT and RLAIF, the demo's model, bf16
    python -m bench.train --device cuda --model Qwen/Qwen2.5-0.5B-Instruct --batch-size 16 --prompts 8
    python -m bench.train --only sft --trainers minimath minimath-packed trl trl-eager

Each trainer runs its own real loop in its own process and takes one step when told to; steps alternate, and
every other round goes in the reverse order, so that a change in the machine's load hits all alike. Both get
the same model, LoRA adapter (peft's default: fp32 over the base's dtype), optimiser (fused AdamW), examples
in the same order, and tokens per forward pass; neither recomputes activations nor packs. An RLAIF step is
rollout, rewards and update: the same prompts, number of completions, limit of new tokens, loss (dapo) and
rewards, which are made so that every completion has an advantage (train_worker.completion_rewards): dropping
groups without signal, which saves minimath work in real runs, saves none here. minimath tunes malloc as its
command line does; TRL runs as installed, and `trl-malloc` shows what the same tuning does for it. TRL's
fused loss has no fast path on CPUs; `trl-logits` is its SFTTrainer with the model's own loss over full
logits instead.

Reported are medians over rounds. speed: TRL's seconds per token over minimath's, paired by round (SFT:
tokens of the batch, prompt included; RLAIF: sampled tokens). Peak memory: the highest of all steps above
what was held once the model was loaded (CPU: resident size, GPU: allocator). Writes
bench/results/train-<device>.json.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.measure import RESULTS, machine
from bench.roofline import positive
from bench.turns import ROOT, start_worker, take_turns
from minimath.core.errors import UserError

OURS = "minimath"
DEFAULTS = {
    "attn": "sdpa",
    "autocast": True,
    "packing": False,
    "full_logits": False,
    "keep_freed_memory": False,
    "split": False,
}
TRAINERS = {
    OURS: {"trainer": "minimath", "keep_freed_memory": True},
    "minimath-packed": {"trainer": "minimath", "keep_freed_memory": True, "packing": True},  # SFT's default
    "trl": {"trainer": "trl"},
    "trl-eager": {"trainer": "trl", "attn": "eager"},
    "trl-noautocast": {"trainer": "trl", "autocast": False},  # bf16=False over a bf16 base
    "trl-logits": {"trainer": "trl", "full_logits": True},  # the model's own loss, in place of TRL's chunks
    "trl-malloc": {"trainer": "trl", "keep_freed_memory": True},
    "trl-split": {"trainer": "trl", "split": True},  # completions of --generate-batch rows at a time
}
RLAIF_ONLY = {"trl-split"}
SFT_ONLY = {"minimath-packed", "trl-logits"}
WARM_UP = 1  # rounds that are not counted: compilation, first allocation


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", default="", help="folder or hub id; default: the demo's SmolLM2-135M-Instruct"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the frozen base")
    parser.add_argument(
        "--steps", type=positive, default=5, help=f"measured rounds, after {WARM_UP} to warm up"
    )
    parser.add_argument("--batch-size", type=positive, default=8, help="SFT: examples per step")
    parser.add_argument("--prompts", type=positive, default=4, help="RLAIF: prompts per step")
    parser.add_argument("--group-size", type=positive, default=8, help="RLAIF: completions per prompt")
    parser.add_argument("--max-new-tokens", type=positive, default=96, help="RLAIF: longest completion")
    parser.add_argument("--generate-batch", type=positive, default=64, help="RLAIF: rows per call, trl-split")
    parser.add_argument("--micro-tokens", type=positive, default=2048, help="tokens per forward pass")
    parser.add_argument("--only", choices=("sft", "rlaif"), help="one stage; default: both")
    parser.add_argument("--trainers", nargs="+", choices=list(TRAINERS), default=[OURS, "trl", "trl-logits"])
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny random model, to try the benchmark itself"
    )
    parser.add_argument("--out", type=Path, help="result file; default: bench/results/train-<device>.json")
    options = parser.parse_args(words)
    if OURS not in options.trainers or len(options.trainers) < 2:
        parser.error(f"--trainers needs {OURS} and at least one other")
    return options


def require_peer(names: list[str]) -> None:
    """Raises UserError with the install line when a trainer of `names` needs TRL and it is missing."""
    if any(TRAINERS[name]["trainer"] == "trl" for name in names):
        require_trl("bench.train")


def require_trl(command: str) -> None:
    """Raises UserError with the install line when TRL, with which `command` compares, is missing."""
    if importlib.util.find_spec("trl") is None:
        raise UserError(f"{command} compares with TRL, which is not installed: pip install -e '.[bench]'")


# ---- the trainers' processes


def spec_of(name: str, stage: str, options: argparse.Namespace, model: str, rounds: int) -> dict:
    """What bench.train_worker is told for one trainer; rounds: with the warm-up."""
    return {
        **DEFAULTS,
        **TRAINERS[name],
        "stage": stage,
        "model": model,
        "total_steps": rounds,
        "slots": getattr(options, "step_slots", None),
        "rows_per_generation": options.generate_batch if TRAINERS[name].get("split") else None,
        **{
            key: getattr(options, key)
            for key in (
                "device",
                "dtype",
                "batch_size",
                "prompts",
                "group_size",
                "max_new_tokens",
                "micro_batch_tokens",
            )
        },
    }


def measure(
    stage: str, options: argparse.Namespace, model: str, warm_up: int = WARM_UP, failed: dict | None = None
) -> dict[str, list[dict]]:
    """Name -> the facts of each measured step, of all trainers, taken in turns."""
    absent = RLAIF_ONLY if stage == "sft" else SFT_ONLY
    names = [name for name in options.trainers if name not in absent]

    def start(name: str, log) -> subprocess.Popen:
        spec = spec_of(name, stage, options, model, warm_up + options.steps)
        return start_worker("bench.train_worker", spec, log)

    return take_turns(names, start, options.steps, stage, warm_up, failed)


# ---- figures


def compare(ours: list[dict], other: list[dict]) -> dict:
    """Medians of the ratios of paired steps; above 1 minimath is better in the speeds, below 1 in memory."""
    by_time = [b["seconds"] / a["seconds"] for a, b in zip(ours, other, strict=True)]
    by_token = [
        (b["seconds"] / b["tokens"]) / (a["seconds"] / a["tokens"]) for a, b in zip(ours, other, strict=True)
    ]
    mine, theirs = ours[-1]["peak_extra_bytes"], other[-1]["peak_extra_bytes"]
    return {
        "step speed": statistics.median(by_time),
        "token speed": statistics.median(by_token),
        "token speed range": [min(by_token), max(by_token)],
        "peak memory": mine / theirs if mine is not None and theirs else None,
    }


def summarise(steps: dict[str, list[dict]], ours: str = OURS) -> list[dict]:
    """One row per trainer: medians, and for all but `ours` the ratios to it."""
    rows = []
    for name, taken in steps.items():
        row = {
            "trainer": name,
            "seconds": statistics.median(s["seconds"] for s in taken),
            "tokens/s": statistics.median(s["tokens"] / s["seconds"] for s in taken),
            "tokens": statistics.fmean(s["tokens"] for s in taken),
            "peak_extra_bytes": taken[-1]["peak_extra_bytes"],
        }
        for phase in ("rollout_seconds", "update_seconds"):
            if phase in taken[0]:
                row[phase] = statistics.median(s[phase] for s in taken)
        if name != ours:
            row["minimath against it"] = compare(steps[ours], taken)
        rows.append(row)
    return rows


def table_of(stage: str, rows: list[dict]) -> Table:
    table = Table(title=f"one {stage.upper()} step; speed and memory are minimath's against that trainer")
    for name in (
        "trainer",
        "step s",
        "rollout s",
        "update s",
        "tokens/s",
        "peak MB",
        "speed",
        "speed, range",
        "memory",
    ):
        table.add_column(name, justify="left" if name == "trainer" else "right")
    for row in rows:
        ratios, phases = row.get("minimath against it"), ("seconds", "rollout_seconds", "update_seconds")
        cells = [
            row["trainer"],
            *(f"{row[key]:.2f}" if key in row else "" for key in phases),
            f"{row['tokens/s']:.0f}",
            megabytes(row["peak_extra_bytes"]),
        ]
        if ratios:
            low, high = ratios["token speed range"]
            memory = ratios["peak memory"]
            cells += [
                f"{ratios['token speed']:.2f}x",
                f"{low:.2f}-{high:.2f}",
                "?" if memory is None else f"{memory:.2f}x",
            ]
        table.add_row(*cells, style="bold" if row["trainer"] == OURS else None)
    return table


def megabytes(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e6:.0f}"


def about(options: argparse.Namespace, stage: str, model: str) -> dict:
    """Machine, versions, commit, date and settings of one stage's measurement."""
    facts = machine(options.device)
    for name in ("transformers", "peft", "trl", "accelerate"):
        try:
            facts["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts["versions"][name] = None
    used = ("batch_size",) if stage == "sft" else ("prompts", "group_size", "max_new_tokens")
    settings = {key: getattr(options, key) for key in ("device", "dtype", "steps", "micro_batch_tokens", *used)}
    settings |= {
        "model": Path(model).name,
        "warm_up": WARM_UP,
        "lora_r": 16,
        "lora_alpha": 32.0,
        "lora_targets": "all-linear",
        "optimizer": "adamw (fused)",
        "gradient_checkpointing": False,
    }
    return {
        **facts,
        "date": datetime.date.today().isoformat(),
        "settings": settings,
    }


def save(path: Path, key: str, result: dict) -> None:
    """Put one stage's result into the file; the results of other stages and dtypes stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**known, key: result}, indent=1) + "\n", encoding="utf-8")


def run(options: argparse.Namespace, model: str) -> None:
    path = options.out or (None if options.tiny else RESULTS / f"train-{options.device}.json")
    for stage in [options.only] if options.only else ["sft", "rlaif"]:
        facts = about(options, stage, model)
        steps = measure(stage, options, model)
        rows = summarise(steps)
        Console(width=130).print(table_of(f"{stage} {options.dtype}", rows))
        if path:
            trainers = {name: {**DEFAULTS, **TRAINERS[name]} for name in steps}
            save(
                path,
                f"{stage} {options.dtype}",
                {**facts, "trainers": trainers, "summary": rows, "steps": steps},
            )
            print(f"wrote {path.name}")


def main(words: list[str] | None = None) -> int:
    options = parse(words)
    try:
        require_peer(options.trainers)
        run_on_model(options, run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run_on_model(options: argparse.Namespace, run) -> None:
    """run(options, model folder) with --tiny's model, --model, or the demo's, after a look at the device."""
    if options.device == "cuda":
        from minimath.models.load import pick_device

        pick_device("cuda")
    if options.tiny:
        sys.path.insert(0, str(ROOT / "tests"))
        from tiny import write_tiny

        with tempfile.TemporaryDirectory() as folder:
            run(options, str(write_tiny(folder)))
        return
    if not options.model:
        from minimath.commands.demo import demo_model

        options.model = str(demo_model())
    run(options, options.model)


if __name__ == "__main__":
    sys.exit(main())
