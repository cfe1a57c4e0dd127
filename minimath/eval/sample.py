"""Own training data by rejection: minimath sample data=problems.jsonl model=... [adapter=...] [samples=8] out=FOLDER

Samples k solutions of each problem from the model and keeps the shortest right ones, as the paper keeps the shortest
right trace of each problem (arXiv 2507.08267, section 3.1): a model fine-tuned on its own right solutions loses less
than on another's, and the problems that it never or always solves can be left out. The solutions are in
train.jsonl, ready for `minimath sft data=`. Sampling is an evaluation (evaluate.py) with samples: interrupted, the same
command with resume=true goes on.
"""
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from minimath.config.schema import EvalConfig
from minimath.core.errors import UserError
from minimath.eval.evaluate import evaluate, read_records
from minimath.core.files import write_whole

SAMPLES = "train.jsonl"


@dataclass
class SampleConfig(EvalConfig):
    """Options of `minimath sample`: those of an evaluation, and what is kept."""
    split: str = "train"
    """split of a datasets name"""
    samples: int = 8
    """solutions sampled per problem"""
    temperature: float = 1.0
    """sampling temperature"""
    keep: int = 1
    """solutions kept per problem, the shortest right ones that differ"""
    sound: bool = True
    """leave out right solutions with a wrong arithmetic step"""
    min_solve_rate: float = 0.0
    """leave out problems of which a smaller share of the solutions is right"""
    max_solve_rate: float = 1.0
    """leave out problems of which a larger share of the solutions is right: too easy to learn from"""


def sample(cfg: SampleConfig) -> dict:
    """Sample, grade, keep; writes train.jsonl beside the evaluation's files. Returns counts. Raises Interrupted, and
    UserError also when nothing is left."""
    if cfg.keep < 1:
        raise UserError(f"keep={cfg.keep}: keep at least 1 solution per problem")
    if cfg.min_solve_rate > cfg.max_solve_rate:
        raise UserError(f"min_solve_rate={cfg.min_solve_rate:g} is above max_solve_rate={cfg.max_solve_rate:g}")
    if not cfg.run.out:
        raise UserError("minimath sample needs out=FOLDER: train.jsonl is written there")
    evaluate(cfg)
    out = Path(cfg.run.out)
    rows, counts = kept_rows(read_records(out), cfg)
    if not rows:
        raise UserError(f"no solution is left to train on ({worded(counts)}); all are in {out}/completions.jsonl. "
                        "Raise samples or max_new_tokens, widen min_solve_rate and max_solve_rate, or use a better "
                        "model")
    write_whole(out / SAMPLES, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{worded(counts)}; kept {len(rows)} solutions, {statistics.fmean(r['tokens'] for r in rows):.0f} tokens on "
          f"average, in {out / SAMPLES}")
    return counts | {"kept": len(rows), "data": str(out / SAMPLES)}


def kept_rows(records: list[dict], cfg: SampleConfig) -> tuple[list[dict], dict]:
    """(training rows, counts) from the records of an evaluation, in the order of the problems."""
    problems: dict[int, list[dict]] = {}
    for record in records:
        problems.setdefault(record["number"], []).append(record)
    counts = {"problems": len(problems), "never_right": 0, "outside_rates": 0, "unsound": 0, "cut": 0}
    rows = []
    for number in sorted(problems):
        group = problems[number]
        rate = sum(r["right"] for r in group) / len(group)
        if rate == 0:
            counts["never_right"] += 1
            continue
        if not cfg.min_solve_rate <= rate <= cfg.max_solve_rate:
            counts["outside_rates"] += 1
            continue
        # one that was cut would teach not to end
        right = [r for r in group if r["right"] and r["ended"] and r["text"].strip()]
        sound = [r for r in right if not cfg.sound or r["right_steps"] == r["steps"]]
        counts["cut"] += sum(r["right"] for r in group) - len(right)
        counts["unsound"] += len(right) - len(sound)
        shortest = {r["text"].strip(): r for r in sorted(sound, key=lambda r: (-r["tokens"], -r["sample"]))}
        for r in sorted(shortest.values(), key=lambda r: (r["tokens"], r["sample"]))[:cfg.keep]:
            rows.append({"id": f"{r['id'] or number}" + (f"-{r['sample']}" if cfg.keep > 1 else ""),
                         "problem": r["problem"], "solution": r["text"].strip(), "answer": r["gold"],
                         "tokens": r["tokens"], "solve_rate": round(rate, 4)})
    return rows, counts


def worded(counts: dict) -> str:
    names = {"never_right": "never solved", "outside_rates": "outside the solve rates"}
    more = {"unsound": "right solutions with a wrong step", "cut": "right but cut or empty"}
    parts = [f"{counts[k]} {words}" for k, words in (names | more).items() if counts[k]]
    return ", ".join([f"{counts['problems']} problems", *parts])


if __name__ == "__main__":
    from minimath.cli import dispatch, run_command
    sys.exit(run_command(lambda: dispatch("sample", sys.argv[1:])))
