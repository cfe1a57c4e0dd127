"""One training step of minimath against one of TRL's, for both stages: speed and peak memory.

    python -m bench.train                          # CPU: SFT and RLAIF, the demo's model, bf16
    python -m bench.train --device cuda --model Qwen/Qwen2.5-0.5B-Instruct --batch-size 16 --prompts 8
    python -m bench.train --only sft --trainers minimath minimath-packed trl trl-eager

Each trainer runs its own loop in its own process and takes one step when told to, in turns (bench.turns). Both get the
same model, LoRA adapter (peft's default: fp32 over the base's dtype), optimizer (fused AdamW), examples in the same
order, and tokens per forward pass; neither recomputes activations nor packs. An RLAIF step is rollout, rewards and
update: the same prompts, number of completions, limit of new tokens, loss (dapo) and rewards, made so that every
completion has an advantage (train_worker.completion_rewards): dropping groups without signal, which saves minimath work
in real runs, saves none here. minimath tunes malloc as its command line does; TRL runs as installed, and `trl-malloc`
has the same tuning. TRL's fused loss has no fast path on CPUs: `trl-logits` is its SFTTrainer with the model's own.

Medians over rounds. speed: TRL's seconds per token over minimath's, paired by round (SFT: tokens of the batch, prompt
included; RLAIF: sampled tokens). Peak memory: the highest of all steps above what the loaded model took (CPU: resident
size, GPU: allocator). Writes bench/results/train-<device>.json.
"""
import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from pathlib import Path

from bench.measure import PACKAGES, RESULTS, ROOT, machine, new_table, positive, show
from bench.turns import start_worker, take_turns
from minimath.core.errors import UserError

OURS = "minimath"
DEFAULTS = {"attn": "sdpa", "autocast": True, "packing": False, "full_logits": False, "keep_freed_memory": False,
            "split": False}
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
LORA = {"lora_r": 16, "lora_alpha": 32.0, "lora_targets": "all-linear", "optimizer": "adamw (fused)",
        "gradient_checkpointing": False}


def common_parser(module: str, doc: str, *, peers: bool = True) -> argparse.ArgumentParser:
    """Make a parser with the options of every comparison of whole loops.

    peers: with those of a comparison with other packages, on a card too.
    """
    parser = argparse.ArgumentParser(prog=f"python -m bench.{module}", description=doc.split("\n")[0])
    parser.add_argument("--model", default="", help="folder or hub id; default: the demo's SmolLM2-135M-Instruct")
    parser.set_defaults(device="cpu")
    if peers:
        parser.add_argument("--device", choices=("cpu", "cuda"))
        parser.add_argument("--generate-batch", type=positive, default=64, help="rows per call of a peer's generate")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the frozen base")
    parser.add_argument("--micro-batch-tokens", type=positive, default=2048, help="tokens per forward pass")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, to try the benchmark itself")
    parser.add_argument("--out", type=Path, help=f"result file; default: bench/results/{module}-<device>.json")
    return parser


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = common_parser("train", __doc__)
    parser.add_argument("--steps", type=positive, default=5, help=f"measured rounds, after {WARM_UP} to warm up")
    parser.add_argument("--batch-size", type=positive, default=8, help="SFT: examples per step")
    parser.add_argument("--prompts", type=positive, default=4, help="RLAIF: prompts per step")
    parser.add_argument("--group-size", type=positive, default=8, help="RLAIF: completions per prompt")
    parser.add_argument("--max-new-tokens", type=positive, default=96, help="RLAIF: longest completion")
    parser.add_argument("--only", choices=("sft", "rlaif"), help="one stage; default: both")
    parser.add_argument("--trainers", nargs="+", choices=list(TRAINERS), default=[OURS, "trl", "trl-logits"])
    options = parser.parse_args(words)
    if OURS not in options.trainers or len(options.trainers) < 2:
        parser.error(f"--trainers needs {OURS} and at least one other")
    return options


def require_trl(command: str) -> None:
    """Raise UserError with the install line when TRL is missing."""
    if importlib.util.find_spec("trl") is None:
        raise UserError(f"{command} compares with TRL, which is not installed: pip install -e '.[bench]'")


# ---- the trainers' processes

def spec_of(name: str, stage: str, options: argparse.Namespace, model: str, rounds: int) -> dict:
    """Tell bench.train_worker what to run for one trainer; rounds: with the warm-up."""
    taken = ("device", "dtype", "batch_size", "prompts", "group_size", "max_new_tokens", "micro_batch_tokens")
    return {**DEFAULTS, **TRAINERS[name], "stage": stage, "model": model, "total_steps": rounds,
            "max_num_seqs": getattr(options, "step_max_num_seqs", None),
            "rows_per_generation": options.generate_batch if TRAINERS[name].get("split") else None,
            **{key: getattr(options, key) for key in taken}}


def measure(stage: str, options: argparse.Namespace, model: str, warm_up: int = WARM_UP,
            failed: dict | None = None) -> dict[str, list[dict]]:
    """Measure all trainers in turns -> {name: what each measured step told}."""
    absent = RLAIF_ONLY if stage == "sft" else SFT_ONLY
    names = [name for name in options.trainers if name not in absent]

    def start(name: str, log):
        return start_worker("bench.train_worker", spec_of(name, stage, options, model, warm_up + options.steps), log)

    return take_turns(names, start, options.steps, stage, warm_up, failed)


# ---- figures

def compare(ours: list[dict], other: list[dict]) -> dict:
    """Compute medians of the ratios of paired steps.

    Above 1 minimath is better in the speeds, below 1 in memory.
    """
    by_time = [b["seconds"] / a["seconds"] for a, b in zip(ours, other, strict=True)]
    by_token = [ratio * a["tokens"] / b["tokens"] for ratio, a, b in zip(by_time, ours, other, strict=True)]
    mine, theirs = ours[-1]["peak_extra_bytes"], other[-1]["peak_extra_bytes"]
    return {"step speed": statistics.median(by_time), "token speed": statistics.median(by_token),
            "token speed range": [min(by_token), max(by_token)],
            "peak memory": mine / theirs if mine is not None and theirs else None}


def summarise(steps: dict[str, list[dict]], ours: str = OURS) -> list[dict]:
    """Make one row per trainer: medians, and for all but `ours` the ratios to it."""
    rows = []
    for name, taken in steps.items():
        row = {"trainer": name, "seconds": statistics.median(s["seconds"] for s in taken),
               "tokens/s": statistics.median(s["tokens"] / s["seconds"] for s in taken),
               "tokens": statistics.fmean(s["tokens"] for s in taken),
               "peak_extra_bytes": taken[-1]["peak_extra_bytes"]}
        for phase in ("rollout_seconds", "update_seconds"):
            if phase in taken[0]:
                row[phase] = statistics.median(s[phase] for s in taken)
        if name != ours:
            row["minimath against it"] = compare(steps[ours], taken)
        rows.append(row)
    return rows


def table_of(stage: str, rows: list[dict]):
    table = new_table(f"one {stage.upper()} step; speed and memory are minimath's against that trainer", (
        "trainer", "step s", "rollout s", "update s", "tokens/s", "peak MB", "speed", "speed, range", "memory"))
    for row in rows:
        phases = (f"{row[key]:.2f}" if key in row else "" for key in ("seconds", "rollout_seconds", "update_seconds"))
        table.add_row(row["trainer"], *phases, f"{row['tokens/s']:.0f}", megabytes(row["peak_extra_bytes"]),
                      *compared(row), style="bold" if row["trainer"] == OURS else None)
    return table


def compared(row: dict) -> list[str]:
    """Write a row's ratios: speed, its range, memory; empty for minimath's own row."""
    ratios = row.get("minimath against it")
    if not ratios:
        return ["", "", ""]
    low, high = ratios["token speed range"]
    memory = ratios["peak memory"]
    return [f"{ratios['token speed']:.2f}x", f"{low:.2f}-{high:.2f}", "?" if memory is None else f"{memory:.2f}x"]


def megabytes(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e6:.0f}"


def about(options: argparse.Namespace, stage: str, model: str) -> dict:
    """Describe machine, versions, date and settings of one stage's measurement."""
    used = ("batch_size",) if stage == "sft" else ("prompts", "group_size", "max_new_tokens")
    settings = {key: getattr(options, key) for key in ("device", "dtype", "steps", "micro_batch_tokens", *used)}
    return machine(options.device, (*PACKAGES, "transformers", "peft", "trl", "accelerate")) | {
        "settings": settings | {"model": Path(model).name, "warm_up": WARM_UP, **LORA}}


def save(path: Path, key: str, result: dict) -> None:
    """Put one stage's result into the file; those of other stages and dtypes stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**known, key: result}, indent=1) + "\n", encoding="utf-8")


def run(options: argparse.Namespace, model: str) -> None:
    path = options.out or (None if options.tiny else RESULTS / f"train-{options.device}.json")
    for stage in [options.only] if options.only else ["sft", "rlaif"]:
        facts, steps = about(options, stage, model), measure(stage, options, model)
        rows, key = summarise(steps), f"{stage} {options.dtype}"
        show(table_of(key, rows), 130, always=True)
        if path:
            trainers = {name: {**DEFAULTS, **TRAINERS[name]} for name in steps}
            save(path, key, {**facts, "trainers": trainers, "summary": rows, "steps": steps})
            print(f"wrote {path.name}")


def main(words: list[str] | None = None) -> int:
    options = parse(words)
    with_trl = any(TRAINERS[name]["trainer"] == "trl" for name in options.trainers)
    return run_on_model(options, run, "bench.train" if with_trl else "")


def run_on_model(options: argparse.Namespace, run, needs_trl: str) -> int:
    """Call run with the options and --tiny's model, --model, or the demo's.

    needs_trl: the command that compares with TRL, "" for none. Returns the exit status.
    """
    try:
        if needs_trl:
            require_trl(needs_trl)
        if options.device == "cuda":
            from minimath.models.load import pick_device
            pick_device("cuda")
        if options.tiny:
            sys.path.insert(0, str(ROOT / "tests" / "helpers"))
            from tiny import write_tiny
            with tempfile.TemporaryDirectory() as folder:
                run(options, str(write_tiny(folder)))
            return 0
        if not options.model:
            from minimath.commands.demo import demo_model
            options.model = str(demo_model())
        run(options, options.model)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
