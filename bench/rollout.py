"""Rollouts of minimath against generate, continuous batching and TRL, and whole RL steps against TRL's.

    python -m bench.rollout                               # CPU: the demo's model, 64 prompts x 8 samples
    python -m bench.rollout --max-num-seqs 64 128 --only rollout
    python -m bench.rollout --only pool --max-new-tokens 1024     # blocks of a pool against rows of full length
    python -m bench.rollout --device cuda --model Qwen/Qwen2.5-0.5B-Instruct --max-num-seqs 256 --generate-batch 256

Every engine runs in its own process with the same model and LoRA adapter (fp32 over the base's dtype, as in training),
prompts, temperature and limit of new tokens, nothing cut off the distribution; new prompts each round, in turns
(bench.turns). Lengths are the model's own, and tokens count up to and including the one that ends a completion.

    minimath             minimath.rollout, malloc tuned as its command line does; one engine per --max-num-seqs
    generate             transformers' generate on a peft model, --generate-batch left-padded rows a call
    generate-malloc      the same with malloc tuned as minimath's
    generate-autocast    generate under bf16 autocast, as in a bf16 trainer
    continuous           transformers' continuous batching (generate_batch), --max-num-seqs requests at a time
    trl                  GRPOTrainer's _generate inside its train(): all rows in one call, TRL's default
    trl-split            the same, --generate-batch rows a call (generation_batch_size)
    trl-malloc           trl with malloc tuned as minimath's

On CPUs generate ends its prefill with the LM head on a strided slice, for which torch copies the head once per row
(57 MB each for SmolLM2-135M): most of its peak, and of TRL's. Where the system is slow to hand out memory, malloc tuned
to keep it makes these two much faster: compare both. The second table is a whole RL step (rollout, rewards, update) by
bench.train in the same shape, without a warm-up: the first step pays for what is compiled and allocated then.

With --only pool two engines of minimath get the memory of --max-num-seqs rows of full length: "rows" counts each row as
that long, as before there was a pool, "pool" by what it holds. Once with the model's own lengths and as many rows in
both, and once ("tail") with lengths given, 1 in 20 ten times the mean, and as many rows as fit; "rows" is how many ran
side by side while others waited.

Medians over rounds. speed: tokens per second of minimath (at the first --max-num-seqs) over the engine's, paired by
round; memory: minimath's peak over the engine's, above what the loaded model takes (CPU: resident size, GPU:
allocator). seq fill: share of decoded rows that were still running; "?" for engines that do not tell. Writes
bench/results/rollout-<device>.json.
"""
import argparse
import statistics
import sys

from bench import train
from bench.measure import RESULTS, new_table, positive, show
from bench.turns import start_worker, take_turns

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
DEFAULTS = {"attn": "sdpa", "autocast": False, "keep_freed_memory": False, "split": False, "temperature": 1.0,
            "full": 0, "rectangle": False, "tail": False}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = train.common_parser("rollout", __doc__)
    parser.add_argument("--prompts", type=positive, default=64, help="prompts per round")
    parser.add_argument("--samples", type=positive, default=8, help="completions per prompt")
    parser.add_argument("--max-new-tokens", type=positive, default=256, help="longest completion")
    parser.add_argument("--rounds", type=positive, default=2, help="measured rounds")
    parser.add_argument("--max-num-seqs", type=lambda text: 0 if text == "0" else positive(text), nargs="+",
                        default=[64], help="a minimath engine each; 0: as many as memory allows, its default")
    parser.add_argument("--engines", nargs="+", choices=[OURS, *PEERS], metavar="ENGINE",
                        default=[OURS, "generate", "generate-malloc", "continuous", "trl"],
                        help=f"of {OURS}, {', '.join(PEERS)}")
    parser.add_argument("--only", choices=("rollout", "step", "pool"), help="one table; default: the first two")
    options = parser.parse_args(words)
    if OURS not in options.engines or len(options.engines) < 2:
        parser.error(f"--engines needs {OURS} and at least one other")
    if options.only in (None, "step") and options.samples < 2:
        parser.error("a whole step needs --samples of at least 2: rewards are compared within a group")
    return options


def engines_of(options: argparse.Namespace) -> dict[str, dict]:
    """Name every engine with what tells it apart, minimath first."""
    ours = {"engine": OURS, "keep_freed_memory": True}
    if options.only == "pool":
        ours |= {"max_num_seqs": 0, "full": options.max_num_seqs[0]}
        return {f"{name}{', tail' * tail}": {**ours, "rectangle": name == "rows", "tail": tail}
                for tail in (False, True) for name in ("pool", "rows")}
    found = {f"{OURS}-{count or 'auto'}": {**ours, "max_num_seqs": count}
             for count in dict.fromkeys(options.max_num_seqs)}
    return found | {name: PEERS[name] for name in dict.fromkeys(options.engines) if name != OURS}


def spec_of(engine: dict, options: argparse.Namespace, model: str) -> dict:
    """Tell bench.rollout_worker what to run; train_worker sees an RL step."""
    requests = next((count for count in options.max_num_seqs if count), 64)  # at a time, of continuous batching
    spec = {**DEFAULTS, "max_num_seqs": requests, **engine}
    taken = ("device", "dtype", "prompts", "samples", "max_new_tokens", "micro_batch_tokens", "generate_batch")
    return {**spec, "trainer": "trl" if engine["engine"] == "trl" else "minimath", "stage": "rlaif", "model": model,
            "rounds": options.rounds, "total_steps": options.rounds, "group_size": options.samples,
            "rows_per_generation": None,  # of TRL's trainer, which makes no step here; the worker splits itself
            "split_rows": options.generate_batch if spec["split"] else None,
            **{key: getattr(options, key) for key in taken}}


# ---- figures

def summarise(steps: dict[str, list[dict]]) -> list[dict]:
    """Make one row per engine: medians over rounds, and ratios to the first."""
    rows = train.summarise(steps, ours=next(iter(steps)))
    for row in rows:
        taken = steps[row["trainer"]]
        row["engine"] = row.pop("trainer")
        for key in ("mean_length", "finished", "seq_fill", "rows_beside"):
            known = [facts[key] for facts in taken if facts.get(key) is not None]
            row[key] = statistics.fmean(known) if known else None
    return rows


def table_of(title: str, rows: list[dict], failed: dict[str, str]):
    table = new_table(title, ("engine", "seconds", "tokens/s", "speed", "speed, range", "peak MB", "memory", "seq fill",
                              "rows", "mean length", "finished"))
    for row in rows:
        speed, spread, memory = train.compared(row)
        table.add_row(row["engine"], f"{row['seconds']:.1f}", f"{row['tokens/s']:.0f}", speed, spread,
                      train.megabytes(row["peak_extra_bytes"]), memory, percent(row["seq_fill"]),
                      f"{row['rows_beside']:.0f}" if row["rows_beside"] else "?",
                      f"{row['mean_length']:.0f}", percent(row["finished"]),
                      style=None if speed else "bold")
    for name in failed:
        table.add_row(name, "failed")
    return table


def percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.0f}%"


# ---- the two measurements

def about(options: argparse.Namespace, model: str) -> dict:
    """Describe machine, versions, commit, date and settings."""
    facts = train.about(train_options(options), "rlaif", model)
    del facts["settings"]["steps"]
    taken = ("samples", "rounds", "max_num_seqs", "generate_batch")
    facts["settings"] |= {key: getattr(options, key) for key in taken} | {"temperature": DEFAULTS["temperature"]}
    return facts


def train_options(options: argparse.Namespace) -> argparse.Namespace:
    """Make the options of bench.train for whole RL steps of this shape."""
    peers = [name for name in dict.fromkeys(options.engines) if PEERS.get(name, {}).get("engine") == "trl"]
    return argparse.Namespace(**vars(options), steps=options.rounds, group_size=options.samples, batch_size=1,
                              trainers=[OURS, *peers], step_max_num_seqs=options.max_num_seqs[0])


def measure_rollouts(options: argparse.Namespace, model: str, failed: dict[str, str]) -> dict:
    facts, engines = about(options, model), engines_of(options)

    def start(name: str, log):
        return start_worker("bench.rollout_worker", spec_of(engines[name], options, model), log)

    steps = take_turns(list(engines), start, options.rounds, "rollout", 1, failed)
    rows = summarise(steps)
    shape = f"{options.prompts} prompts x {options.samples} samples, at most {options.max_new_tokens} tokens"
    title = f"rollouts {options.dtype}: {shape}; speed and memory are {rows[0]['engine']}'s against that engine"
    show(table_of(title, rows, failed), 140, always=True)
    return {**facts, "engines": {name: {**DEFAULTS, **engine} for name, engine in engines.items()}, "summary": rows,
            "failed": failed, "rounds": steps}


def measure_steps(options: argparse.Namespace, model: str, failed: dict[str, str]) -> dict:
    facts, asked = about(options, model), train_options(options)
    steps = train.measure("rlaif", asked, model, warm_up=0, failed=failed)
    rows = train.summarise(steps)
    show(train.table_of(f"whole rlaif {options.dtype}", rows), 130, always=True)
    for row in rows[1:]:
        print(f"{row['trainer']}: its step takes {row['minimath against it']['step speed']:.2f} times as long")
    return {**facts, "trainers": {name: {**train.DEFAULTS, **train.TRAINERS[name]} for name in asked.trainers},
            "summary": rows, "failed": failed, "steps": steps}


def run(options: argparse.Namespace, model: str) -> None:
    path = options.out or (None if options.tiny else RESULTS / f"rollout-{options.device}.json")
    parts = {"rollout": measure_rollouts, "step": measure_steps, "pool": measure_rollouts}
    for part in [options.only] if options.only else ("rollout", "step"):
        if part == "step" and len(train_options(options).trainers) < 2:
            print("whole steps are compared with TRL, which is not among --engines: left out")
            continue
        failed: dict[str, str] = {}
        result = parts[part](options, model, failed)
        for name, reason in failed.items():
            print(f"{name} does not run here: {reason}")
        if path:
            train.save(path, f"{part} {options.dtype}", result)
            print(f"wrote {path.name}")


def main(words: list[str] | None = None) -> int:
    options = parse(words)
    with_trl = options.only != "pool" and any(PEERS.get(name, {}).get("engine") == "trl" for name in options.engines)
    return train.run_on_model(options, run, "bench.rollout" if with_trl else "")


if __name__ == "__main__":
    sys.exit(main())
