"""Evaluate a model on problems with known answers: python -m minimath.evaluate data=... model=... adapter=...

Greedy (temperature=0) or k samples per problem. Reports accuracy with a 95% interval, pass@k, maj@k, tokens, tokens
per right answer, accuracy at token budgets, the share of right steps, and the share of completions that ended.
Step consistency (every `a op b = c`) is a tripwire, not a quality score: most wrong solutions pass it too.
"""
import collections
import json
import math
import statistics
import sys
import time

import numpy as np

from minimath.answer import AnswerChecker, extract_answer
from minimath.chat import eos_ids, prompt_ids
from minimath.config import EvalConfig, UserError, comma_list
from minimath.data import Example, describe_report, load_examples
from minimath.log import RunLog
from minimath.model import describe, load_model
from minimath.rollout import generate
from minimath.runs import open_run
from minimath.steps import check_steps

COLUMNS = ["model", "accuracy", "95% interval", "mean tokens", "tokens per right", "right steps", "ended"]


def evaluate(cfg: EvalConfig) -> dict:
    """Evaluate cfg.model (with cfg.adapter) on cfg.data; writes eval.json and completions.jsonl; returns the summary."""
    examples, report = load_examples(cfg.data, split=cfg.split, limit=cfg.limit, strict=cfg.strict, need=("answer",),
                                     data_format=cfg.data_format)
    with open_run(cfg, "eval") as (log, stop):
        log.say(describe_report(report) or f"{len(examples)} problems")
        model, tokenizer = load_model(cfg, train=False)
        log.say(describe(model, cfg))
        summary, records = evaluate_model(model, tokenizer, examples, cfg, log, stop)
        write_results(log.run_dir, summary, records)
        log.table(f"{cfg.adapter or cfg.model} on {len(examples)} problems", COLUMNS, [row(cfg.adapter or cfg.model, summary)])
        for name, value in summary.items():
            if name.startswith(("pass@", "maj@", "accuracy@")):
                log.say(f"{name}: {value:.3f}")
        return summary


def evaluate_model(model, tokenizer, examples: list[Example], cfg: EvalConfig, log: RunLog, stop=None):
    """Generate and grade. Returns (summary, records): one record per completion. Raises runs.Stopped on a signal."""
    prompts = [prompt_ids(tokenizer, e.problem, system=cfg.system, prompt_template=cfg.prompt_template) for e in examples]
    fits = [i for i, prompt in enumerate(prompts) if len(prompt) <= cfg.max_prompt_len]
    if not fits:
        raise UserError(f"no prompt fits max_prompt_len={cfg.max_prompt_len}; raise it")
    if len(fits) < len(prompts):
        log.say(f"{len(prompts) - len(fits)} problems are longer than max_prompt_len={cfg.max_prompt_len} "
                "and count as wrong")
    started = time.perf_counter()
    with log.progress(len(fits) * cfg.samples, "evaluating") as advance:
        def on_done(prompt, sample, completion):
            advance(1)
            if stop is not None:
                stop.check()
        groups = generate(model, tokenizer, [prompts[i] for i in fits], samples=cfg.samples, keys=fits,
                          max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_p=cfg.top_p,
                          min_p=cfg.min_p, top_k=cfg.top_k, eos=eos_ids(tokenizer, model), seed=cfg.seed,
                          slots=cfg.slots, on_done=on_done)
    seconds = time.perf_counter() - started
    with AnswerChecker() as checker:
        records = [{"number": i} | grade(examples[i], completion, tokenizer, checker, s)
                   for i, group in zip(fits, groups, strict=True) for s, completion in enumerate(group)]
        skipped = [{"number": i, "id": e.id, "problem": e.problem, "gold": e.answer, "sample": s, "text": "",
                    "answer": None, "right": False, "tokens": 0, "ended": False, "right_steps": 0, "steps": 0}
                   for i, e in enumerate(examples) if len(prompts[i]) > cfg.max_prompt_len for s in range(cfg.samples)]
        summary = summarise(records + skipped, cfg, checker)
    summary["tokens_per_s"] = sum(r["tokens"] for r in records) / seconds
    return summary, records + skipped


def grade(example: Example, completion, tokenizer, checker: AnswerChecker, sample: int) -> dict:
    """The record of one completion: text, answer, right or wrong, tokens, steps."""
    text = tokenizer.decode(completion.ids, skip_special_tokens=True)
    steps = check_steps(text)
    return {"id": example.id, "problem": example.problem, "gold": example.answer, "sample": sample, "text": text,
            "answer": extract_answer(text), "right": checker.check(text, example.answer),
            "tokens": len(completion.ids), "ended": completion.ended, "right_steps": steps.right, "steps": steps.total}


def summarise(records: list[dict], cfg: EvalConfig, checker: AnswerChecker) -> dict:
    """All figures from the records of one evaluation; intervals treat problems, not samples, as independent."""
    problems: dict[int, list[dict]] = {}
    for record in records:  # by place in the data: a problem that occurs twice there counts twice
        problems.setdefault(record["number"], []).append(record)
    groups, k = list(problems.values()), cfg.samples
    rates = [sum(r["right"] for r in group) / len(group) for group in groups]
    right, tokens = sum(r["right"] for r in records), [r["tokens"] for r in records]
    summary = {
        "problems": len(groups), "samples": k, "accuracy": statistics.fmean(rates),
        "interval": wilson(right, len(records)) if k == 1 else bootstrap(rates, cfg.seed),
        "mean_tokens": statistics.fmean(tokens), "median_tokens": statistics.median(tokens),
        "tokens_per_right": sum(tokens) / right if right else None,
        "right_steps": sum(r["right_steps"] for r in records) / max(1, sum(r["steps"] for r in records)),
        "checked_steps": sum(r["steps"] for r in records), "ended": statistics.fmean(r["ended"] for r in records),
    }
    if k > 1:
        counts = [sum(r["right"] for r in group) for group in groups]
        for n in sorted({2 ** i for i in range(k.bit_length()) if 2 ** i <= k} | {k}):
            summary[f"pass@{n}"] = statistics.fmean(pass_at(n, k, c) for c in counts)
        summary[f"maj@{k}"] = statistics.fmean(majority_right(group, checker) for group in groups)
    for budget in map(int, comma_list(cfg.budgets)):
        summary[f"accuracy@{budget}"] = statistics.fmean(
            sum(r["right"] and r["ended"] and r["tokens"] <= budget for r in group) / len(group) for group in groups)
    return summary


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927): (low, high), 95% for z = 1.96."""
    p, spread = right / n, z * z / n
    centre = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: list[float], seed: int, draws: int = 2000) -> tuple[float, float]:
    """Percentile bootstrap 95% interval of the mean of per-problem values."""
    array = np.asarray(values)
    picks = np.random.default_rng(seed).integers(0, len(array), (draws, len(array)))
    low, high = np.percentile(array[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


def pass_at(n: int, k: int, right: int) -> float:
    """Unbiased estimate that at least one of n samples is right, from `right` of k (Chen et al. 2021, eq. 1)."""
    return 1.0 - math.comb(k - right, n) / math.comb(k, n)


def majority_right(group: list[dict], checker: AnswerChecker) -> bool:
    """Whether the most frequent answer is right; the answer seen first wins a tie."""
    answers = collections.Counter(r["answer"] for r in group if r["answer"] is not None)
    return bool(answers) and checker.equal(answers.most_common(1)[0][0], group[0]["gold"])


def row(name: str, summary: dict) -> list:
    """One row of the table whose columns are COLUMNS."""
    low, high = summary["interval"]
    per_right = summary["tokens_per_right"]
    return [name, f"{100 * summary['accuracy']:.1f}%", f"{100 * low:.1f} to {100 * high:.1f}",
            f"{summary['mean_tokens']:.1f}", f"{per_right:.1f}" if per_right else "-",
            f"{100 * summary['right_steps']:.1f}%", f"{100 * summary['ended']:.1f}%"]


def write_results(folder, summary: dict, records: list[dict]) -> None:
    """eval.json (the summary) and completions.jsonl (one line per completion)."""
    with open(folder / "completions.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "eval.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from minimath.__main__ import dispatch, run_command
    sys.exit(run_command(lambda: dispatch("eval", sys.argv[1:])))
