"""GSM8K before and after each stage: LoRA on SmolLM2-135M-Instruct, with the accuracy-only control.

    python -m bench.gsm8k DATA --plan             # what it takes, in tokens and hours
    python -m bench.gsm8k DATA                    # seed 0; stopped by Ctrl-C or SIGTERM, the same command goes on
    python -m bench.gsm8k DATA --seeds 0 1 2
    python -m bench.gsm8k DATA --train 1500 --rl-steps 18   # a slow machine: fewer problems, a shorter stage 2
    python -m bench.gsm8k --table                 # table and picture of what has been measured so far

DATA holds gsm8k_train.jsonl and gsm8k_test.jsonl (problem, solution, answer). The recipe is
minimath/recipes/gsm8k.yaml. The last 200 training problems are left out of training: they make the curve over epochs,
and choose the checkpoint that stage 2 hands on. All models answer every test problem greedily, and the first 100 four
times at temperature 0.7. The interval of a single seed's accuracy is Wilson's; others, and differences to SFT problem
by problem, are from a bootstrap over seeds and problems. Before it begins, it says how many test problems share 13
words in a row with a training row. Every stage is the command line in a process of its own. What every arm changes:
ARMS below.
"""
import json
import re
import signal
import sys
from pathlib import Path

import numpy as np

from bench.ablate import arms_parser, curve_of, interval, keep_settings, row_of, run_stage, values_of
from bench.measure import RESULTS, new_table, show
from minimath.commands.demo import demo_model
from minimath.core.errors import UserError
from minimath.core.files import write_whole
from minimath.core.run_folder import EVAL, METRICS
from minimath.core.stats import wilson
from minimath.report.figures import COLOURS, INK, new_figure, read_metrics, save_png

HELD_OUT, FEW, OWN = 200, 100, 2000
EPOCHS, BATCH, STEPS, SAMPLES = 4, 16, 36, 64  # of the recipe: stage 1; steps of stage 2, and samples in one
ARMS = {  # name -> (the stage, the arm that it starts from, what it changes in the recipe)
    "base": None,
    "sft-1": ("sft", "", ["epochs=1"]),
    "sft": ("sft", "", []),
    "rlaif": ("rlaif", "sft", []),
    "right-only": ("rlaif", "sft", ["judge_weight=0", "brevity_weight=0", "step_weight=0"]),
    "paper": ("rlaif", "sft", ["reward=paper"]),
    "sft-own": ("sft", "", ["data={own}"]),  # on SFT's data and the policy's own solutions, as many steps as SFT
}
NGRAM = 13


def parse(words: list[str] | None = None):
    parser = arms_parser("gsm8k", __doc__, ARMS, RESULTS / "gsm8k-cpu.json", work="gsm8k")
    parser.set_defaults(arms=[arm for arm in ARMS if arm != "sft-own"], seeds=[0])
    parser.add_argument("data", type=Path, nargs="?", help="folder of gsm8k_train.jsonl and gsm8k_test.jsonl")
    parser.add_argument("--train", type=int, metavar="N", help="train on the first N problems (default: all but 200)")
    parser.add_argument("--rl-steps", type=int, default=STEPS, metavar="N", help="steps of stage 2 (%(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="options of every stage")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plan", action="store_true", help="only say what the arms take")
    options = parser.parse_args(words)
    if not options.data and not options.table:
        parser.error("DATA is missing: the folder of gsm8k_train.jsonl and gsm8k_test.jsonl")
    return options


# ---- data

def write_data(source: Path, folder: Path, first: int | None) -> dict:
    """Write train, valid and test problems; return how many, and which test problems overlap with the training set.

    A row is left as it is; train holds the first rows, none of valid's."""
    train, test = (read(source / f"gsm8k_{name}.jsonl") for name in ("train", "test"))
    sets = {"train": train[:-HELD_OUT][:first], "valid": train[-HELD_OUT:], "test": test}
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in sets.items():
        write_whole(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    seen = set().union(*(ngrams(f"{row['problem']} {row['solution']}") for row in train))
    return {name: len(rows) for name, rows in sets.items()} | {
        "overlap": [row["id"] for row in test if ngrams(row["problem"]) & seen]}


def read(path: Path) -> list[dict]:
    if not path.is_file():
        raise UserError(f"{path} is missing")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def ngrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i:i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


# ---- running

def run_arm(arm: str, seed: int, problems: int, options) -> dict:
    """Train one arm, on that many problems, and evaluate it; return its row."""
    work, data = options.work, options.work / "data"
    common = [f"model={demo_model()}", f"seed={seed}", *options.set]
    out = work / f"{arm}-{seed}"
    if ARMS[arm]:
        stage, start, changes = ARMS[arm]
        if any("{own}" in word for word in changes):
            own = own_solutions(seed, problems, common, options)
            changes = [word.replace("{own}", str(own)) for word in changes]
            changes += [f"steps={EPOCHS * problems // BATCH}"]  # as many as of SFT
        held = [f"eval_data={data / 'valid.jsonl'}", "sample_every=0"]
        length = [f"eval_every={problems // BATCH}"] if stage == "sft" else [
            f"steps={options.rl_steps}", f"eval_every={max(1, options.rl_steps // 3)}"]
        run_stage(out, [stage, "gsm8k", f"data={data / 'train.jsonl'}", *common, *held, *length, *changes,
                        *([f"adapter={work / f'{start}-{seed}'}"] if start else [])], options.threads)
    adapter = [f"adapter={out}"] if ARMS[arm] else []
    words = ["eval", "gsm8k", f"data={data / 'test.jsonl'}", *common, *adapter]
    run_stage(work / f"eval-{arm}-{seed}", words, options.threads)
    few = work / f"eval-{arm}-{seed}-4"
    run_stage(few, [*words, "samples=4", "temperature=0.7", f"limit={FEW}"], options.threads)
    row = row_of(arm, seed, work / f"eval-{arm}-{seed}", None)
    summary = json.loads((work / f"eval-{arm}-{seed}" / EVAL).read_text(encoding="utf-8"))
    row |= {name: summary[name] for name in summary if name.startswith("accuracy@")}
    row |= {name: json.loads((few / EVAL).read_text(encoding="utf-8"))[name] for name in ("avg@4", "pass@4", "maj@4")}
    if ARMS[arm]:
        metrics = read_metrics(out / METRICS)
        row |= {"curve": curve_of(metrics), "steps": metrics[-1]["step"]}
    return row


def own_solutions(seed: int, problems: int, common: list[str], options) -> Path:
    """Sample the SFT model's own solutions of OWN problems at most; return training rows and theirs in a file."""
    data, folder = options.work / "data", options.work / f"own-{seed}"
    run_stage(folder, ["sample", "gsm8k", f"data={data / 'train.jsonl'}", *common, "samples=4", "temperature=1",
                       f"limit={min(OWN, problems)}", f"adapter={options.work / f'sft-{seed}'}"], options.threads)
    both = folder / "with-train.jsonl"
    write_whole(both, "".join((each / "train.jsonl").read_text(encoding="utf-8") for each in (data, folder)))
    return both


def plan(options, held: dict):
    """Say what a seed's arms take: tokens, and hours at the rates of this machine."""
    from transformers import AutoTokenizer
    tokenizer, rows = AutoTokenizer.from_pretrained(demo_model()), read(options.work / "plan" / "train.jsonl")
    epoch = sum(len(ids) for ids in tokenizer([f"{r['problem']} {r['solution']}" for r in rows]).input_ids)
    epoch += 30 * len(rows)  # of the template and the answer's box
    answers = 130 * held["test"] + 4 * 130 * FEW
    out = new_table("tokens, and hours at 840 trained and 550 sampled tokens/s (2 cores of an AMD EPYC with bf16)",
                    ("arm", "trained, M", "sampled, M", "hours"))
    for arm in options.arms:
        epochs = {"sft-1": 1, "sft": EPOCHS, "sft-own": EPOCHS}.get(arm, 0)
        rl = bool(ARMS[arm]) and ARMS[arm][0] == "rlaif"
        updates, own = rl * options.rl_steps * SAMPLES, 4 * min(OWN, held["train"]) if arm == "sft-own" else 0
        trained = epochs * epoch + 110 * updates
        drawn = answers + 110 * (updates + own + HELD_OUT * (4 if rl else epochs))
        out.add_row(arm, f"{trained / 1e6:.1f}", f"{drawn / 1e6:.1f}", f"{(trained / 840 + drawn / 550) / 3600:.1f}")
    return out


# ---- figures

def table(rows: dict[str, dict]):
    budgets = sorted({name for row in rows.values() for name in row if name.startswith("accuracy@")},
                     key=lambda name: int(name.split("@")[1]))
    out = new_table("GSM8K test, greedy; 95% intervals; differences to SFT of the same seed, in points", (
        "model", "seeds", "accuracy, %", "against SFT", "tokens", "per correct", "right steps", "avg@4, %", *budgets))
    for arm in ARMS:
        mine = sorted((row for row in rows.values() if row["arm"] == arm), key=lambda row: row["seed"])
        if not mine:
            continue
        correct, tokens = (np.array([values_of(row, what) for row in mine]) for what in ("correct", "tokens"))
        low, high = interval(correct) if len(mine) > 1 else 100 * np.array(wilson(
            round(correct.sum() / 100), correct.size))
        gap, theirs = "", {row["seed"]: row for row in rows.values() if row["arm"] == "sft"}
        if arm != "sft" and (both := [row for row in mine if row["seed"] in theirs]):
            values = np.array([values_of(r, "correct") - values_of(theirs[r["seed"]], "correct") for r in both])
            gap = f"{values.mean():+.1f} ({interval(values)[0]:+.1f} to {interval(values)[1]:+.1f})"
        out.add_row(arm, str(len(mine)), f"{correct.mean():.1f} ({low:.1f} to {high:.1f})", gap, f"{tokens.mean():.0f}",
                    f"{100 * tokens.sum() / max(1.0, correct.sum()):.0f}",
                    *(f"{100 * np.mean([r[name] for r in mine]):.1f}" for name in ("correct_steps", "avg@4", *budgets)))
    return out


def plot(rows: dict[str, dict], path: Path) -> None:
    """Draw accuracy and tokens on the held-out training problems: over epochs, and over steps of stage 2."""
    figure, axes = new_figure(9, 3.2, ncols=2)
    panels = (("epoch of SFT", ("sft",)), ("step of stage 2", ("rlaif", "right-only", "paper")))
    for axis, (label, arms) in zip(axes, panels, strict=True):
        right = axis.twinx()
        for colour, arm in zip(COLOURS, arms):
            curves = [row["curve"] for row in rows.values() if row["arm"] == arm]
            if curves and curves[0]:
                steps, accuracy, tokens = np.mean(curves, axis=0).T
                if arm == "sft":
                    steps = steps * EPOCHS / next(row["steps"] for row in rows.values() if row["arm"] == arm)
                axis.plot(steps, 100 * accuracy, "-o", markersize=3, color=colour, label=arm)
                right.plot(steps, tokens, ":", color=colour)
        axis.set(xlabel=label, ylim=(0, None))
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.lines:
            axis.legend(fontsize=8, loc="lower left")
        right.set(ylim=(0, None))
    axes[0].set_ylabel(f"accuracy, % of {HELD_OUT} held-out (solid)", color=INK)
    right.set_ylabel("mean tokens (dotted)", color=INK)
    save_png(figure, path)


def main(words: list[str] | None = None) -> int:
    options = parse(words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    held = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"rows": {}}
    rows = held["rows"]
    try:
        if not options.table:
            settings = {"train": options.train, "rl_steps": options.rl_steps, "set": options.set}
            if not options.plan:
                keep_settings(options.work, options.out, held, settings)
            folder = options.work / ("plan" if options.plan else "data")
            held |= write_data(options.data, folder, options.train) | {"settings": settings}
            print(f"{held['train']} training problems, {held['valid']} held out, {held['test']} of the test; "
                  f"{len(held['overlap'])} test problems share {NGRAM} words in a row with a training row: "
                  f"{', '.join(held['overlap'][:8]) or 'none'}", flush=True)
            if options.plan:
                show(plan(options, held), 120)
                return 0
            for seed, arm in ((seed, arm) for seed in options.seeds for arm in options.arms):
                rows[f"{arm}/{seed}"] = row = rows.get(f"{arm}/{seed}") or run_arm(arm, seed, held["train"], options)
                write_whole(options.out, json.dumps(held) + "\n")
                print(f"{arm}/{seed}: {100 * row['accuracy']:.1f}%, {row['mean_tokens']:.0f} tokens", flush=True)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", flush=True)
        return 130
    except UserError as error:
        print(error, flush=True)
        return 1
    if rows:
        show(table(rows), 200)
        plot(rows, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
