"""Rollouts of minimath against generate, continuous batching and TRL, and whole RL steps against TRL's.

    python -m bench.rollout                               # CPU: the demo's model, 64 prompts x 8 samples
    python -m bench.rollout --slots 64 128 --only rollout
    python -m bench.rollout --device cuda --model Qwen/Qwen2.5-0.5B-Instruct --slots 256 --generate-batch 256

Every engine runs in its own process with the same model and LoRA adapter (fp32 over the base's dtype, as in
training), prompts, temperature and limit of new tokens, nothing cut off the distribution; new prompts each
round. Rounds alternate, every other one in reverse order. Lengths are the model's own: each engine samples
its own completions, and tokens count up to and including the one that ends a completion. Engines:

    minimath             minimath.rollout.engine.generate, malloc tuned as its command line does; one per --slots
    generate             transformers' generate on a peft model, --generate-batch left-padded rows a call
    generate-malloc      the same with malloc tuned as minimath's
    generate-autocast    generate under bf16 autocast, as in a bf16 trainer
    continuous           transformers' continuous batching (generate_batch), --slots requests at a time
    trl                  GRPOTrainer's _generate inside its train(): all rows in one call, TRL's default
    trl-split            the same, --generate-batch rows a call (generation_batch_size)
    trl-malloc           trl with malloc tuned as minimath's

On CPUs, generate ends its prefill with the LM head on a strided slice of the hidden states, for which torch
copies the head once per row (57 MB each for SmolLM2-135M): most of its peak, and of that of TRL. Where the
system is slow to hand out memory, malloc tuned to keep it makes these two much faster: compare both.

The second table is a whole RL step (rollout, rewards, update) of minimath and TRL by bench.train, in the same
shape, without a warm-up round: the first step pays for what is compiled and allocated then, minimath's too.

Reported are medians over rounds. speed: tokens per second of minimath (at the first --slots) over the
engine's, paired by round; memory: minimath's peak over the engine's, above what the loaded model takes (CPU:
resident size, GPU: allocator). slot fill: share of decoded rows that were still running, "while waiting" the
same while completions wait for a slot; "?" for engines that do not tell. An engine that fails is shown with
its reason. Writes bench/results/rollout-<device>.json.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import train
from bench.measure import RESULTS
from bench.roofline import positive
from bench.turns import start_worker, take_turns
from minimath.core.errors import UserError

OURS = "minimath"
PEERS = {
    "generate": {"engine": "generate"},
    "generate-autocast": {"engine": "generate", "autocast": True},
    "generate-malloc": {"engine": "generate", "keep_freed_memory": True},
    "continuous": {"engine": "continuous"},
    "trl": {"engine": "trl", "autocast": True},  # GRPOConfig's default for a bf16 model
    "trl-split": {"engine": "trl", "autocast": True, "split": True},
    "trl-malloc": {"engine": "trl", "autocast": True, "keep_freed_memory": True},
}
DEFAULTS = {"attn": "sdpa", "autocast": False, "keep_freed_memory": False, "split": False, "temperature": 1.0}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.rollout", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model", default="", help="folder or hub id; default: the demo's SmolLM2-135M-Instruct"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the frozen base")
    parser.add_argument("--prompts", type=positive, default=64, help="prompts per round")
    parser.add_argument("--samples", type=positive, default=8, help="completions per prompt")
    parser.add_argument("--max-new-tokens", type=positive, default=256, help="longest completion")
    parser.add_argument("--rounds", type=positive, default=2, help="measured rounds")
    parser.add_argument(
        "--slots",
        type=slot_count,
        nargs="+",
        default=[64],
        help="a minimath engine each; 0: as many as memory allows, its default",
    )
    parser.add_argument("--generate-batch", type=positive, default=64, help="rows per call of generate")
    parser.add_argument("--micro-tokens", type=positive, default=2048, help="whole step: tokens per forward")
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=[OURS, *PEERS],
        metavar="ENGINE",
        default=[OURS, "generate", "generate-malloc", "continuous", "trl"],
        help=f"of {OURS}, {', '.join(PEERS)}",
    )
    parser.add_argument("--only", choices=("rollout", "step"), help="one table; default: both")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny random model, to try the benchmark itself"
    )
    parser.add_argument("--out", type=Path, help="result file; default: bench/results/rollout-<device>.json")
    options = parser.parse_args(words)
    if OURS not in options.engines or len(options.engines) < 2:
        parser.error(f"--engines needs {OURS} and at least one other")
    if options.only != "rollout" and options.samples < 2:
        parser.error("a whole step needs --samples of at least 2: rewards are compared within a group")
    return options


def slot_count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def engines_of(options: argparse.Namespace) -> dict[str, dict]:
    """Name -> what tells it apart; minimath first, at one or several numbers of slots."""
    ours = {"engine": OURS, "keep_freed_memory": True}
    found = {f"{OURS}-{slots or 'auto'}": {**ours, "slots": slots} for slots in dict.fromkeys(options.slots)}
    return found | {name: PEERS[name] for name in dict.fromkeys(options.engines) if name != OURS}


def spec_of(engine: dict, options: argparse.Namespace, model: str) -> dict:
    """What bench.rollout_worker is told; what it takes from train_worker sees an RL step of this shape."""
    requests = next((slots for slots in options.slots if slots), 64)  # at a time, of continuous batching
    spec = {**DEFAULTS, "slots": requests, **engine}
    return {
        **spec,
        "trainer": "trl" if engine["engine"] == "trl" else "minimath",
        "stage": "rlaif",
        "model": model,
        "rounds": options.rounds,
        "total_steps": options.rounds,
        "group_size": options.samples,
        "rows_per_generation": None,  # of TRL's trainer, which makes no step here; the worker splits itself
        "split_rows": options.generate_batch if spec["split"] else None,
        **{
            key: getattr(options, key)
            for key in (
                "device",
                "dtype",
                "prompts",
                "samples",
                "max_new_tokens",
                "micro_batch_tokens",
                "generate_batch",
            )
        },
    }


# ---- figures


def summarise(steps: dict[str, list[dict]]) -> list[dict]:
    """One row per engine that ran: medians over rounds, and for all but the first its ratios to the first."""
    rows = train.summarise(steps, ours=next(iter(steps)))
    for row in rows:
        taken = steps[row["trainer"]]
        row["engine"] = row.pop("trainer")
        for key in ("mean_length", "ended", "slot_fill", "slot_fill_full"):
            known = [facts[key] for facts in taken if facts.get(key) is not None]
            row[key] = statistics.fmean(known) if known else None
    return rows


def table_of(title: str, rows: list[dict], failed: dict[str, str]) -> Table:
    table = Table(title=title)
    for name in (
        "engine",
        "seconds",
        "tokens/s",
        "speed",
        "speed, range",
        "peak MB",
        "memory",
        "slot fill",
        "while waiting",
        "mean length",
        "ended",
    ):
        table.add_column(name, justify="left" if name == "engine" else "right")
    for row in rows:
        ratios = row.get("minimath against it")
        compared = ["", "", ""]
        if ratios:
            low, high = ratios["token speed range"]
            memory = ratios["peak memory"]
            compared = [
                f"{ratios['token speed']:.2f}x",
                f"{low:.2f}-{high:.2f}",
                "?" if memory is None else f"{memory:.2f}x",
            ]
        table.add_row(
            row["engine"],
            f"{row['seconds']:.1f}",
            f"{row['tokens/s']:.0f}",
            *compared[:2],
            train.megabytes(row["peak_extra_bytes"]),
            compared[2],
            percent(row["slot_fill"]),
            percent(row["slot_fill_full"]),
            f"{row['mean_length']:.0f}",
            percent(row["ended"]),
            style="bold" if not ratios else None,
        )
    for name in failed:
        table.add_row(name, "failed")
    return table


def percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.0f}%"


def report(failed: dict[str, str]) -> None:
    for name, reason in failed.items():
        print(f"{name} does not run here: {reason}")


# ---- the two measurements


def about(options: argparse.Namespace, model: str) -> dict:
    """Machine, versions, commit, date and settings."""
    facts = train.about(train_options(options), "rlaif", model)
    del facts["settings"]["steps"]
    facts["settings"] |= {
        key: getattr(options, key) for key in ("samples", "rounds", "slots", "generate_batch")
    } | {"temperature": DEFAULTS["temperature"]}
    return facts


def train_options(options: argparse.Namespace) -> argparse.Namespace:
    """The options of bench.train for whole RL steps of this shape; of TRL, the engines asked for."""
    peers = [name for name in dict.fromkeys(options.engines) if PEERS.get(name, {}).get("engine") == "trl"]
    return argparse.Namespace(
        **vars(options),
        steps=options.rounds,
        group_size=options.samples,
        batch_size=1,
        trainers=[OURS, *peers],
        step_slots=options.slots[0],
    )


def measure_rollouts(options: argparse.Namespace, model: str) -> dict:
    facts, engines, failed = about(options, model), engines_of(options), {}

    def start(name: str, log) -> subprocess.Popen:
        return start_worker("bench.rollout_worker", spec_of(engines[name], options, model), log)

    steps = take_turns(list(engines), start, options.rounds, "rollout", 1, failed)
    rows = summarise(steps)
    shape = f"{options.prompts} prompts x {options.samples} samples, at most {options.max_new_tokens} tokens"
    title = (
        f"rollouts {options.dtype}: {shape}; speed and memory are {rows[0]['engine']}'s against that engine"
    )
    Console(width=140).print(table_of(title, rows, failed))
    report(failed)
    return {
        **facts,
        "engines": {name: {**DEFAULTS, **engine} for name, engine in engines.items()},
        "summary": rows,
        "failed": failed,
        "rounds": steps,
    }


def measure_steps(options: argparse.Namespace, model: str) -> dict:
    facts, asked, failed = about(options, model), train_options(options), {}
    steps = train.measure("rlaif", asked, model, warm_up=0, failed=failed)
    rows = train.summarise(steps)
    Console(width=130).print(train.table_of(f"whole rlaif {options.dtype}", rows))
    for row in rows[1:]:
        print(
            f"{row['trainer']}: its step takes {row['minimath against it']['step speed']:.2f} times as long"
        )
    report(failed)
    return {
        **facts,
        "trainers": {name: {**train.DEFAULTS, **train.TRAINERS[name]} for name in asked.trainers},
        "summary": rows,
        "failed": failed,
        "steps": steps,
    }


def run(options: argparse.Namespace, model: str) -> None:
    path = options.out or (None if options.tiny else RESULTS / f"rollout-{options.device}.json")
    parts = {"rollout": measure_rollouts, "step": measure_steps}
    for part in [options.only] if options.only else parts:
        if part == "step" and len(train_options(options).trainers) < 2:
            print("whole steps are compared with TRL, which is not among --engines: left out")
            continue
        result = parts[part](options, model)
        if path:
            train.save(path, f"{part} {options.dtype}", result)
            print(f"wrote {path.name}")


def main(words: list[str] | None = None) -> int:
    options = parse(words)
    try:
        if any(PEERS.get(name, {}).get("engine") == "trl" for name in options.engines):
            train.require_trl("bench.rollout")
        train.run_on_model(options, run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
