"""Make training data of a model's own correct solutions.

    minimath sample data=problems.jsonl model=... [adapter=...] [samples=8] out=FOLDER

Rejection sampling: of k solutions per problem the shortest correct ones are kept, as in the paper (arXiv 2507.08267,
section 3.1), in train.jsonl, ready for `minimath sft data=`. Sampling is an evaluation: interrupted, the same command
with resume=true goes on."""
import json
import statistics
from pathlib import Path

from minimath.config.schema import Count, DataOptions, EvalConfig, SamplingOptions, Share
from minimath.core.errors import UserError
from minimath.core.files import write_whole
from minimath.core.run_folder import COMPLETIONS, refuse_foreign
from minimath.eval.evaluate import evaluate
from minimath.eval.metrics import by_problem, read_records

TRAIN = "train.jsonl"


class SampleConfig(EvalConfig):
    """Rejection sampling: the options of an evaluation, and what is kept."""
    data: DataOptions  # an evaluation's are of the split test, and greedy
    sampling: SamplingOptions
    samples: Count = 8
    """solutions sampled per problem"""
    keep: Count = 1
    """solutions kept per problem, the shortest correct ones that differ"""
    sound: bool = True
    """leave out correct solutions with a wrong arithmetic step"""
    min_solve_rate: Share = 0.0
    """leave out problems of which a smaller share of the solutions is correct"""
    max_solve_rate: Share = 1.0
    """leave out problems of which a larger share of the solutions is correct: too easy to learn from"""

    def check(self) -> str:
        """What is wrong with options together, or ""."""
        if self.min_solve_rate > self.max_solve_rate:
            return f"min_solve_rate={self.min_solve_rate:g} is above max_solve_rate={self.max_solve_rate:g}"
        if self.suite:
            return "suite= is for `minimath eval`; here the problems come from data="
        if not self.run.out:
            return "minimath sample needs out=FOLDER: train.jsonl is written there"
        return super().check()


def sample(cfg: SampleConfig) -> dict:
    """Sample, grade, keep; writes train.jsonl and returns counts. Interrupted, UserError."""
    refuse_foreign(out := Path(cfg.run.out), TRAIN)
    evaluate(cfg)
    rows, counts = kept_rows(read_records(out), cfg)
    if not rows:
        raise UserError(f"no solution is left to train on ({worded(counts)}); all are in {out / COMPLETIONS}. "
                        "Raise samples or max_new_tokens, widen min_solve_rate and max_solve_rate, or use a better "
                        "model")
    write_whole(out / TRAIN, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{worded(counts)}; kept {len(rows)} solutions, {statistics.fmean(r['tokens'] for r in rows):.0f} tokens on "
          f"average, in {out / TRAIN}")
    return counts | {"kept": len(rows), "data": str(out / TRAIN)}


def kept_rows(records: list[dict], cfg: SampleConfig) -> tuple[list[dict], dict]:
    """Choose training rows from records; returns them, by problem, and counts."""
    problems = by_problem(records)
    counts, rows = {"problems": len(problems), "never_correct": 0, "outside_rates": 0, "unsound": 0, "cut": 0}, []
    for number, group in sorted(problems.items()):
        correct = [r | {"text": r["text"].strip()} for r in group if r["correct"]]
        rate = len(correct) / len(group)
        if not correct or not cfg.min_solve_rate <= rate <= cfg.max_solve_rate:
            counts["outside_rates" if correct else "never_correct"] += 1
            continue
        whole = [r for r in correct if r["finished"] and r["text"]]  # one that was cut would teach not to end
        sound = [r for r in whole if not cfg.sound or r["correct_steps"] == r["steps"]]
        counts["cut"] += len(correct) - len(whole)
        counts["unsound"] += len(whole) - len(sound)
        different: dict[str, dict] = {}
        for r in sorted(sound, key=lambda r: (r["tokens"], r["sample"])):
            different.setdefault(r["text"], r)
        for r in list(different.values())[:cfg.keep]:
            asked = {"problem": r["problem"], "solution": r["text"]} if "messages" not in r else \
                {"messages": [*r["messages"], {"role": "assistant", "content": r["text"]}]}
            rows.append({"id": f"{r['id'] or number}" + (f"-{r['sample']}" if cfg.keep > 1 else ""), **asked,
                         "answer": r["gold"], "tokens": r["tokens"], "solve_rate": round(rate, 4)})
    return rows, counts


def worded(counts: dict) -> str:
    """Say counts in words, without those that are 0."""
    words = {"never_correct": "never solved", "outside_rates": "outside the solve rates",
             "unsound": "correct solutions with a wrong step", "cut": "correct but cut or empty"}
    return ", ".join([f"{counts['problems']} problems", *(f"{counts[k]} {w}" for k, w in words.items() if counts[k])])
