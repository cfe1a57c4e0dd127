"""Compute the figures of an evaluation from its records.

A record is one completion, a line of completions.jsonl: number (the problem's place in the data), id, problem, gold,
sample, text, answer, correct, tokens, finished, correct_steps, steps, and of one that thinks thought_tokens. Step
consistency (every `a op b = c`) is a tripwire, not a quality score: most wrong solutions pass it too."""
import json
import statistics
from collections import Counter, defaultdict
from pathlib import Path

from minimath.config.schema import EvalConfig
from minimath.core.errors import UserError
from minimath.core.files import write_whole
from minimath.core.run_folder import COMPLETIONS, EVAL
from minimath.core.stats import bootstrap, pass_at, wilson
from minimath.core.text import comma_list
from minimath.data.template import behind_thought
from minimath.grading.answer import AnswerChecker

COLUMNS = ["model", "accuracy", "95% interval", "mean tokens", "tokens per correct", "correct steps", "finished"]


def summarise(records: list[dict], cfg: EvalConfig, checker: AnswerChecker) -> dict:
    """Summarise records; intervals take problems, not samples, as independent."""
    groups, k = list(by_problem(records).values()), cfg.samples
    counts, tokens = [sum(r["correct"] for r in group) for group in groups], [r["tokens"] for r in records]
    rates, correct = [count / k for count in counts], sum(counts)
    steps = sum(r["steps"] for r in records)
    summary = {
        "problems": len(groups), "samples": k, "accuracy": statistics.fmean(rates),
        "interval": bootstrap(rates, cfg.run.seed) if k > 1 and 0 < correct < len(records)  # else no draw differs
        else wilson(correct // k, len(groups)),
        "mean_tokens": statistics.fmean(tokens), "median_tokens": statistics.median(tokens),
        "tokens_per_correct": sum(tokens) / correct if correct else None,
        "correct_steps": sum(r["correct_steps"] for r in records) / max(1, steps), "checked_steps": steps,
        "finished": statistics.fmean(r["finished"] for r in records),
    }
    if thoughts := [r["thought_tokens"] for r in records if "thought_tokens" in r]:
        summary |= {"thinking": len(thoughts) / len(records), "mean_thought_tokens": sum(thoughts) / len(records),
                    "mean_answer_tokens": (sum(tokens) - sum(thoughts)) / len(records)}
        if cfg.thinking_budget:
            summary["forced"] = sum(n > cfg.thinking_budget for n in thoughts) / len(records)
    if k > 1:
        summary[f"avg@{k}"] = summary["accuracy"]
        for n in sorted({2 ** i for i in range(k.bit_length())} | {k}):
            summary[f"pass@{n}"] = statistics.fmean(pass_at(n, k, count) for count in counts)
        summary[f"maj@{k}"] = statistics.fmean(majority_correct(group, checker) for group in groups)
    return summary | at_budgets(records, cfg.budgets)


def by_problem(records: list[dict]) -> dict[int, list[dict]]:
    """Group records by their problem's place in the data, not by its text."""
    problems = defaultdict(list)
    for record in records:
        problems[record["number"]].append(record)
    return problems


def at_budgets(records: list[dict], budgets: str) -> dict[str, float]:
    """Compute accuracy@N for a list of N: what did not finish by then is wrong."""
    return {f"accuracy@{budget}": statistics.fmean(
        sum(r["correct"] and r["finished"] and r["tokens"] <= budget for r in group) / len(group)
        for group in by_problem(records).values()) for budget in map(int, comma_list(budgets))}


def majority_correct(group: list[dict], checker: AnswerChecker) -> bool:
    """Tell whether the most frequent answer is correct; the first wins a tie.

    Answers count as one when they are equal as mathematics: 1,200 and 1200. The correct ones all equal the gold answer,
    so only wrong ones are compared, and only where the outcome can depend on it."""
    answered = [r for r in group if r["answer"] is not None]
    correct = sum(r["correct"] for r in answered)
    if correct == 0 or 2 * correct > len(answered):
        return correct > 0
    votes = Counter()  # by the wording that came first, None for the correct ones
    for r in answered:
        same = (other for other in votes if other is not None
                and (other == r["answer"] or checker.equal(r["answer"], other)))
        votes[None if r["correct"] else next(same, r["answer"])] += 1
    return votes.most_common(1)[0][0] is None  # of several the first


def table_row(name: str, summary: dict) -> list[str]:
    """Word one row of the table whose columns are COLUMNS."""
    low, high = summary["interval"]
    per_correct = f"{summary['tokens_per_correct']:.1f}" if summary.get("tokens_per_correct") else "-"
    return [name, f"{100 * summary['accuracy']:.1f}%", f"{100 * low:.1f} to {100 * high:.1f}",
            f"{summary['mean_tokens']:.1f}", per_correct, f"{100 * summary['correct_steps']:.1f}%",
            f"{100 * summary['finished']:.1f}%"]


def write_results(folder: Path, summary: dict, records: list[dict]) -> None:
    """Write completions.jsonl, then eval.json: where that is, both are whole."""
    write_whole(folder / COMPLETIONS, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    write_whole(folder / EVAL, json.dumps(summary, indent=1) + "\n")


def read_records(folder: Path) -> list[dict]:
    """Read the records of a complete evaluation, sorted. UserError: none, or damaged."""
    path = folder / COMPLETIONS
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # other line ends may be text
        if records := sorted(map(json.loads, filter(None, lines)), key=lambda r: (r["number"], r["sample"])):
            return records
        fault = "it is empty"
    except (OSError, ValueError, KeyError, TypeError) as error:
        fault = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    raise UserError(f"{folder}: not an evaluation with its {COMPLETIONS} ({fault}); give a folder that minimath eval "
                    "has finished, or evaluate again with another out=")


def read_solutions(folder: Path) -> list[dict]:
    """Read the records as judges see them: their text is what stands behind the thought. UserError as above."""
    return [record | {"text": record["text"][thought_chars(record):]} for record in read_records(folder)]


def thought_chars(record: dict) -> int:
    """Count the characters of a record's text up to the end of its thought."""
    text = record["text"]
    return len(text) - len(behind_thought(text, record.get("thought_tokens") == record["tokens"]))
