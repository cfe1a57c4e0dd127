"""What each part of the recipe is worth: one thing changed at a time, several seeds each.

    python -m bench.ablate                          # every arm, seeds 0 1 2; hours, and goes on where it was stopped
    python -m bench.ablate --arms heuristic no-judge --seeds 0
    python -m bench.ablate --table                  # table and picture of what has been measured so far

The demo's model, made word problems and settings, stage 2 as it was before length control (BEGUN below). A seed has one
SFT run, from which its arms start, and decides the order of data and samples. Every stage is the command line in a
process of its own. All models answer the same held-out problems, greedily. What every arm changes: ARMS below.

Accuracy and tokens are means over seeds; the 95% intervals come from a bootstrap over seeds and problems, and the
differences to `heuristic` from one over the same draws of both. readable: how often a judge held out of training finds
the arm's solution easier to read than that of its SFT model, both being correct, with the position taken out (--readers
0 leaves it out). The default reader is the base model itself; --reader names a better one, as the judge options of
`minimath judge check`. judging: the judge's time, of the rollouts'; labels: of a verifier without answers, how many are
those of the exact answer, over all steps. Writes bench/results/ablate-<device>.json, a row at a time, and a picture of
it; runs of another --model or --set want another --work and --out. A stage that was done with other options, an arm
having changed, is not gone on with, and of a row that was it is said.
"""
import argparse
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from bench.llama_server import serve
from bench.measure import RESULTS, ROOT, machine, new_table, positive, show
from minimath.commands.demo import DemoConfig, demo_model, write_problems
from minimath.config.load import load_config
from minimath.config.schema import RLAIFConfig
from minimath.core.errors import UserError
from minimath.core.files import write_whole
from minimath.core.run_folder import EVAL, METRICS
from minimath.eval.metrics import read_records
from minimath.judges.base import Pair, Solution
from minimath.judges.compare import both_orders
from minimath.judges.judge import make_judge
from minimath.models.policy import load_policy
from minimath.report.figures import COLOURS, INK, new_figure, read_metrics, save_png

REFERENCE = "heuristic"
JUDGES = {  # judges trained beside each seed's SFT model: name -> what it changes in the recipe's judge_train section
    "single": [],
    "pair": ["form=pair"],
    "made": ["sampled=30", "held_out=1", "made=0.75"],  # the policy's own are held out: made faults alone teach
}
BEGUN = ["lr=3e-4", "steps=6", "brevity=minmax", "brevity_weight=0.2", "brevity_scale=together",
         "brevity_control=none", "step_weight=0", "eval_every=0"]  # the demo's stage 2 when this was first measured
AS_IT_IS = {"model": "", "set": []}  # settings of the demo's model and options
READ_BY = {"reader": ["judge=self"], "readers": 48}  # of rows from before that was kept
TWO = ["updates_per_rollout=2"]
ARMS = {  # name -> (the model it starts from, what it changes in the recipe); None: no training
    "base": ("", None),
    "sft": ("sft", None),
    "heuristic": ("sft", []),  # what the arms begin from: SFT + RLAIF with the heuristic judge
    "self": ("sft", ["judge=self", "judge_pairs=4"]),  # judged by the model itself, adapter off
    "endpoint": ("sft", ["judge=openai", "judge_model=SmolLM2-135M-Instruct", "judge_key_env=", "judge_pairs=4",
                         "judge_timeout_s=600"]),  # by SmolLM2 behind llama.cpp's server
    "trained": ("sft", ["judge=self", "judge_adapter={single}"]),  # by an adapter that grades single solutions
    "trained-pair": ("sft", ["judge=self", "judge_adapter={pair}"]),  # by one that compares two
    "trained-made": ("sft", ["judge=self", "judge_adapter={made}"]),  # by one that saw made faults alone
    "no-judge": ("sft", ["judge_weight=0"]),  # correct or wrong, and brevity
    "majority": ("sft", ["judge_weight=0", "verifier=majority"]),  # no answers: right is what most of a group answers
    "majority+judge": ("sft", ["judge_weight=0", "verifier=majority+judge", "judge=self", "judge_adapter={single}"]),
    "judge-verifier": ("sft", ["judge_weight=0", "verifier=judge", "judge=self", "judge_adapter={single}"]),
    "no-brevity": ("sft", ["brevity_weight=0"]),  # correct or wrong, and the judge
    "correct-only": ("sft", ["judge_weight=0", "brevity_weight=0"]),
    "no-verifier": ("sft", ["verifier=none"]),  # nothing says which answers are correct
    "grpo": ("sft", ["loss=grpo"]),  # with one update per rollout gspo has the same gradient
    "dapo-2": ("sft", TWO),  # two updates per rollout
    "grpo-2": ("sft", ["loss=grpo", *TWO]),
    "gspo-2": ("sft", ["loss=gspo", *TWO]),
    "gspo-clip": ("sft", ["loss=gspo", "clip_low=0.0003", "clip_high=0.0004", *TWO]),  # the clip of its paper
    "lr-third": ("sft", ["lr=1e-4"]),  # instead of 3e-4
    "steps-12": ("sft", ["lr=1e-4", "steps=12"]),  # the same with twice the steps
    "group-16": ("sft", ["group_size=16"]),  # instead of 8
    "paper": ("sft", ["reward=paper"]),  # the paper's own stage 2, without a judge
    "rl": ("", []),  # RLAIF on the base: no SFT
    "rl-paper": ("", ["reward=paper"]),
}

JUDGE_TRAINING, SAVING = threading.Lock(), threading.Lock()


def arms_parser(module: str, doc: str, arms, out: Path, *, work: str = "ablate") -> argparse.ArgumentParser:
    """Make a parser with the options of every comparison of arms."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{module}", description=doc.split("\n")[0])
    parser.add_argument("--arms", nargs="+", choices=arms, default=list(arms), metavar="ARM",
                        help="default: %(default)s")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=lambda text: Path(text).resolve(),  # stages run in the root of the checkout
                        default=ROOT.resolve() / "runs" / work, help="folder of the runs")
    parser.add_argument("--out", type=Path, default=out, help="result file; default: bench/results/" + out.name)
    parser.add_argument("--table", action="store_true", help="only the table and picture of what the result file holds")
    return parser


def parse(words: list[str] | None = None) -> argparse.Namespace:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = arms_parser("ablate", __doc__, ARMS, RESULTS / f"ablate-{device}.json")
    parser.add_argument("--jobs", type=positive, default=1, help="arms side by side; the threads are shared out")
    parser.add_argument("--model", default="", help="folder or hub id; default: the demo's SmolLM2-135M-Instruct")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE",
                        help="options of every arm, such as rlaif.steps=12 or eval.limit=64")
    parser.add_argument("--readers", type=int, default=READ_BY["readers"], help="pairs read per arm and seed; 0: none")
    parser.add_argument("--reader", nargs="+", default=READ_BY["reader"], metavar="KEY=VALUE", help="who reads them")
    parser.add_argument("--reference", choices=ARMS, default=REFERENCE, metavar="ARM",
                        help=f"the arm that the others are held against; default: {REFERENCE}")
    return parser.parse_args(words)


# ---- running

def keep_settings(work: Path, out: Path, held: dict, settings: dict) -> None:
    """Note what the runs of a work folder and the rows of a result file are made with.

    held: what the file holds. Raises UserError when they were made with other settings.
    """
    work.mkdir(parents=True, exist_ok=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = work / "settings.json"
    folder = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else settings
    file = held.get("settings", AS_IT_IS if held.get("rows") else settings)
    for where, before, option in ((work, folder, "--work"), (out, file, "--out")):
        if before != settings:
            raise UserError(f"{where} has runs with {json.dumps(before)}, asked now: {json.dumps(settings)}; not to be "
                            f"compared with one another: give those again, or another {option}")
    write_whole(beside, json.dumps(settings) + "\n")


def run_stage(out: Path, words: list[str], threads: int) -> None:
    """Run one stage by the command line, unless it is done; a stopped one goes on.

    The file `done` holds its words. Raises UserError when it fails, or was done with other words.
    """
    done, asked = out / "done", lasting(out.parent, words)
    if done.exists():
        before = json.loads(done.read_text(encoding="utf-8") or "null")  # null: from before words were kept
        if before not in (None, asked):
            raise UserError(f"{out} was made with other options ({difference(before, asked)}): remove that folder and "
                            "those of what starts from it, or give another --work")
        return
    resume = ["resume=true"] if out.exists() and any(out.iterdir()) else []
    out.mkdir(parents=True, exist_ok=True)
    with open(out.with_name(out.name + ".log"), "a", encoding="utf-8") as log:
        status = run_words([*words, f"out={out}", *resume], threads, log)
    if status:
        raise UserError(f"{' '.join(words[:2])} ended with status {status}; see {log.name}")
    write_whole(done, json.dumps(asked) + "\n")


def difference(before: list[str], asked: list[str]) -> str:
    """Say what two lists of words do not have in common."""
    then, now = ([word for word in some if word not in others] for some, others in ((before, asked), (asked, before)))
    return f"then {' '.join(then) or 'without these'}; now {' '.join(now) or 'without those'}"


def say_changed(rows: dict[str, dict], words: dict[str, list[str]], out: Path) -> None:
    """Say which rows are of an arm that has other words now; rows of before these were kept are taken as they are."""
    for name, row in rows.items():
        if (now := words.get(row["arm"])) != (then := row.get("words", now)):
            print(f"{name}: measured with other options ({difference(then, now or [])}), and not again; for that take "
                  f"this row out of {out}", flush=True)


def words_of(arm: str) -> list[str]:
    """List what makes an arm: the model it starts from, its options, those of the judge that is trained for it."""
    start, changes = ARMS[arm]
    judges = [f"judge_train.{word}" for name, words in JUDGES.items() if f"{{{name}}}" in " ".join(changes or [])
              for word in words]
    return [f"from={start}", *judges, *([] if changes is None else [*BEGUN, *changes])]


def run_words(words: list[str], threads: int, log: TextIO) -> int:
    """Run the command line in a process of its own; return its exit status."""
    return subprocess.run([sys.executable, "-m", "minimath", *words], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log,
                          stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": str(threads)}).returncode


def lasting(work: Path, words: list[str]) -> list[str]:
    """Leave out of a stage's words where this machine has folders, and the port of a server of this start."""
    return [f"model={Path(word[6:]).name}" if word.startswith("model=") else word.replace(f"={work}/", "=")
            for word in words if not word.startswith("judge_url=")]


def run_arm(arm: str, seed: int, options, url: str, threads: int) -> dict:
    """Train and evaluate one arm with one seed, and the judge that it asks; return its row."""
    start, changes = ARMS[arm]
    work, data = options.work, options.work / "data"
    common = [f"model={options.model}", f"seed={seed}"]
    adapter = [f"adapter={work / f'sft-{seed}'}"] if start else []
    if changes is not None:
        out = work / f"{arm}-{seed}"
        served = [f"judge_url={url}"] if arm == "endpoint" else []
        for name, of_judge in JUDGES.items():
            if any(f"{{{name}}}" in word for word in changes):
                judge = train_judge(work, name, seed, [*common, *adapter, *options.set, *of_judge], threads)
                changes = [word.replace(f"{{{name}}}", str(judge)) for word in changes]
        words = ["rlaif", "demo", *common, f"data={data / 'rl.jsonl'}", *adapter, *BEGUN, *options.set, *changes,
                 *served]
        run_stage(out, words, threads)
        adapter = [f"adapter={out}"]
    folder = work / f"eval-{arm}-{seed}"
    run_stage(folder, ["eval", "demo", *common, f"data={data / 'test.jsonl'}", *adapter, *options.set], threads)
    return row_of(arm, seed, folder, work / f"{arm}-{seed}" / METRICS if changes is not None else None)


def stage_1(work: Path, name: str, common: list[str], changes: list[str], threads: int) -> Path:
    """Run SFT unless that is done; return its folder. common: model= and seed=."""
    out = work / f"{name}-{common[1].removeprefix('seed=')}"
    run_stage(out, ["sft", "demo", *common, f"data={work / 'data' / 'train.jsonl'}", *changes], threads)
    return out


def train_judge(work: Path, name: str, seed: int, words: list[str], threads: int) -> Path:
    """Train a judge on stage 1's problems, unless that is done; return its folder."""
    judge = work / f"judge-{name}-{seed}"
    with JUDGE_TRAINING:  # arms side by side ask for the same one
        run_stage(judge, ["judge", "train", "demo", f"data={work / 'data' / 'train.jsonl'}", *words], threads)
    return judge


def row_of(arm: str, seed: int, folder: Path, metrics: Path | None) -> dict:
    """Collect the figures of one evaluation, and what the judge of its training cost."""
    summary = json.loads((folder / EVAL).read_text(encoding="utf-8"))
    kept = ("problems", "accuracy", "mean_tokens", "correct_steps", "checked_steps", "finished")
    records = read_records(folder)
    row = {"arm": arm, "seed": seed} | {name: summary[name] for name in kept}
    row |= {"correct": "".join(str(int(r["correct"])) for r in records), "tokens": [r["tokens"] for r in records]}
    here = machine("cuda" if torch.cuda.is_available() else "cpu")
    row["measured"] = {name: here.get(name) for name in ("device", "driver", "commit", "date") if here.get(name)}
    if metrics is not None:
        steps = read_metrics(metrics)
        judged = [s for s in steps if s.get("judge/comparisons")]
        asking = sum(s.get("judge/seconds", 0) + s.get("verifier/seconds", 0) for s in steps)
        row["judging"] = asking / max(1e-9, sum(s["time/rollout"] for s in steps) - asking)  # of the rollouts' time
        row |= labels_of(steps)
        asked = sum(s["judge/comparisons"] for s in judged)
        row["judge"] = {"comparisons": asked, "no_votes": sum(s["judge/no_votes"] for s in judged)} | {
            name: sum(s[f"judge/{name}"] * s["judge/comparisons"] for s in judged) / max(1, asked)
            for name in ("position_bias", "order_conflicts")}
    return row


def labels_of(steps: list[dict]) -> dict:
    """Average over all steps what a verifier without answers tells of its labels.

    verifier/agrees weighs a step by its decided groups, whose labels it is a share of.
    """
    out = {}
    for name in ("verifier/decided", "verifier/share", "verifier/agrees"):
        told = [(s[name], s["verifier/decided"] if name == "verifier/agrees" else 1.0) for s in steps if name in s]
        if told:
            out[name] = sum(value * weight for value, weight in told) / sum(weight for _, weight in told)
    return out


def run_all(options, rows: dict[str, dict], save) -> list[str]:
    """Run what is missing, seed by seed; return what failed, in words."""
    made = load_config(DemoConfig, "demo", [word for word in options.set if word.startswith("demo.")], "demo")
    options.set = [word for word in options.set if not word.startswith("demo.")]
    options.model = options.model or str(demo_model())
    write_problems(made, options.work / "data", 1.0)
    threads, failed = max(1, (os.cpu_count() or 1) // options.jobs), []
    due = [(arm, seed) for seed in options.seeds for arm in options.arms if key(arm, seed) not in rows]

    def one(job: tuple[str, int]) -> None:
        try:
            rows[key(*job)] = run_arm(*job, options, url, threads) | {"words": words_of(job[0])}
            save()
            print(f"{key(*job)}: {100 * rows[key(*job)]['accuracy']:.1f}%, {rows[key(*job)]['mean_tokens']:.1f} tokens",
                  flush=True)
        except (UserError, OSError, ValueError, KeyError) as error:  # the others go on
            failed.append(f"{key(*job)}: {error}")
            print(failed[-1], flush=True)

    with ExitStack() as stack:
        url = ""
        if any(arm == "endpoint" for arm, _ in due):
            url = stack.enter_context(serve("--threads", str(threads)))
        pool = stack.enter_context(ThreadPoolExecutor(options.jobs))
        sft = sorted({seed for arm, seed in due if ARMS[arm][0]})
        for seed in [seed for seed in options.seeds if seed in sft]:
            common = [f"model={options.model}", f"seed={seed}"]
            stage_1(options.work, "sft", common, options.set, os.cpu_count() or 1)
            list(pool.map(one, [job for job in due if job[1] == seed]))
        list(pool.map(one, [job for job in due if job[1] not in sft]))
    return failed


# ---- readability

def read_all(options, rows: dict[str, dict], save) -> None:
    """Add `readable` to the rows of arms that start from SFT; say which have it of another reader."""
    asked = {"reader": options.reader, "readers": options.readers}
    kept = sorted(name for name, row in rows.items() if "readable" in row and row.get("read_by", READ_BY) != asked)
    if kept and options.readers:
        print(f"{', '.join(kept)}: read before, with another --reader or --readers, and not again; for that take "
              f"`readable` out of these rows of {options.out}", flush=True)
    due = [row for row in rows.values() if ARMS[row["arm"]][0] and row["arm"] != "sft" and "readable" not in row
           and all((options.work / f"eval-{arm}-{row['seed']}").exists() for arm in (row["arm"], "sft"))]
    if not due or not options.readers:
        return
    words = [f"model={options.model or demo_model()}", "judge_rubric=readability"]
    cfg = load_config(RLAIFConfig, None, [*words, *options.reader])
    policy = load_policy(cfg, train=False) if cfg.judge.name == "self" else None
    judge = make_judge(cfg.judge, policy, micro_batch_tokens=cfg.optimizer.micro_batch_tokens, say=print)
    judge.ping()
    for row in due:
        pairs = readable_pairs(options.work, row)[:options.readers]
        votes = judge.compare([each for pair in pairs for each in pair.both()])
        both = [pair for pair in zip(votes[::2], votes[1::2], strict=True) if None not in pair]
        row["reader"] = f"{judge.name}, {Path(cfg.model.name).name}" if cfg.judge.name == "self" else judge.name
        row["read_by"] = asked
        row["readable"] = [round(both_orders(*pair, judge.soft), 4) for pair in both]
        save()


def readable_pairs(work: Path, row: dict) -> list[Pair]:
    """Pair the correct solutions of an arm with those of its SFT model, if they differ."""
    ours, sft = (read_records(work / f"eval-{arm}-{row['seed']}") for arm in (row["arm"], "sft"))
    return [Pair(a["problem"], *(Solution(r["text"], True, r["tokens"]) for r in (a, b)))
            for a, b in zip(ours, sft, strict=True)
            if a["correct"] and b["correct"] and a["text"].strip() != b["text"].strip()]


# ---- figures

def interval(values: np.ndarray, draws: int = 4000) -> tuple[float, float]:
    """Compute a 95% bootstrap interval of a mean over seeds and problems at once."""
    rng = np.random.default_rng(0)
    seeds, problems = values.shape
    means = [values[rng.integers(0, seeds, seeds)][:, rng.integers(0, problems, problems)].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def figures(rows: dict[str, dict], arm: str, reference: str = REFERENCE) -> dict | None:
    """Compute means of an arm over its seeds, with intervals, in percent or tokens.

    Shares are in percent; the differences to the reference are over the seeds that both have. None without a row.
    """
    mine = {row["seed"]: row for row in rows.values() if row["arm"] == arm}
    theirs = {row["seed"]: row for row in rows.values() if row["arm"] == reference}
    if not mine:
        return None
    out = {"seeds": len(mine)}
    for name in ("correct", "tokens"):
        values = np.array([values_of(row, name) for row in mine.values()])  # (S, P)
        out[name], out[f"{name}_interval"] = float(values.mean()), interval(values)
        both = [seed for seed in mine if seed in theirs]
        if both and arm != reference:
            gap = np.array([values_of(mine[s], name) - values_of(theirs[s], name) for s in both])
            out[f"{name}_gap"], out[f"{name}_gap_interval"] = float(gap.mean()), interval(gap)
    out["correct_steps"] = 100 * float(np.mean([row["correct_steps"] for row in mine.values()]))
    for name in ("judging", "verifier/agrees"):
        if found := [row[name] for row in mine.values() if row.get(name)]:
            out[name] = f"{100 * float(np.mean(found)):.0f}%"
    read = np.array([p for row in mine.values() for p in row.get("readable", [])])
    if len(read):
        out["readable"], out["readable_interval"] = 100 * float(read.mean()), interval(100 * read[None])
    return out


def curve_of(metrics: list[dict]) -> list[list[float]]:
    """Take steps, accuracies and tokens out of the evaluations within a training."""
    return [[m["step"], m["eval/accuracy"], m["eval/tokens"]] for m in metrics if "eval/accuracy" in m]


def values_of(row: dict, name: str) -> np.ndarray:
    """List 100 or 0 per problem, or the tokens."""
    return np.array([100.0 * int(c) for c in row["correct"]] if name == "correct" else row["tokens"], dtype=float)


def table(rows: dict[str, dict], reference: str):
    problems = next(iter(rows.values()))["problems"]
    names = ("arm", "seeds", "accuracy, %", "difference", "tokens", "difference", "correct steps", "readable, %",
             "judging", "labels")
    out = new_table(f"{problems} held-out problems; 95% intervals; differences to {reference}", names)
    for arm in ARMS:
        if facts := figures(rows, arm, reference):
            shown = ("correct", "correct_gap", "tokens", "tokens_gap", "readable")
            cells = [with_interval(facts, name) for name in shown]
            out.add_row(arm, str(facts["seeds"]), *cells[:4], f"{facts['correct_steps']:.1f}%", cells[4],
                        facts.get("judging", ""), facts.get("verifier/agrees", ""))
    return out


def with_interval(facts: dict, name: str) -> str:
    if name not in facts:
        return ""
    low, high = facts[f"{name}_interval"]
    sign = "+" if name.endswith("gap") else ""
    return f"{facts[name]:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def plot(rows: dict[str, dict], path: Path, reference: str) -> None:
    """Draw accuracy, tokens and difference of each arm: beside the base it is too small."""
    facts = {arm: found for arm in ARMS if (found := figures(rows, arm, reference))}
    figure, axes = new_figure(10, 0.3 * len(facts) + 1.1, ncols=3, sharey=True)
    panels = (("correct", "accuracy, %"), ("tokens", "mean tokens"),
              ("correct_gap", f"accuracy, points above {reference}"))
    for axis, (name, label) in zip(axes, panels, strict=True):
        for place, (arm, found) in enumerate(facts.items()):
            if name in found and (name != "correct_gap" or ARMS[arm][0]):
                low, high = found[f"{name}_interval"]
                axis.plot([low, high], [place, place], color=COLOURS[0], linewidth=2)
                axis.plot([found[name]], [place], "o", markersize=5, color=COLOURS[2 if arm == reference else 1])
        line = 0 if name == "correct_gap" else facts.get(reference, {}).get(name)
        if line is not None:
            axis.axvline(line, color=INK, linewidth=0.8, linestyle=":")
        axis.set_xlabel(label)
    axes[0].set_yticks(range(len(facts)), facts)
    axes[0].invert_yaxis()
    save_png(figure, path)


def key(arm: str, seed: int) -> str:
    return f"{arm}/{seed}"


def main(words: list[str] | None = None) -> int:
    options = parse(words)
    held = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {"rows": {}}
    rows, failed = held.pop("rows"), []
    say_changed(rows, {arm: words_of(arm) for arm in ARMS}, options.out)

    def save() -> None:
        with SAVING:  # of two arms that end at once
            lines = ",\n".join(f'  "{name}": {json.dumps(rows[name])}' for name in sorted(rows))
            write_whole(options.out, json.dumps(held)[:-1] + ", " * bool(held) + f'"rows": {{\n{lines}\n}}}}\n')

    if not options.table:
        try:
            settings = {"model": Path(options.model).name, "set": list(options.set)}
            keep_settings(options.work, options.out, held | {"rows": rows}, settings)
            held["settings"] = settings
            failed = run_all(options, rows, save)
            read_all(options, rows, save)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    if rows:
        show(table(rows, options.reference), 160)
        plot(rows, options.out.with_suffix(".png"), options.reference)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
