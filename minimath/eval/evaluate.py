"""Evaluate a model on problems with known answers: python -m minimath.eval.evaluate data=... model=... adapter=...

Completions are kept as they end: after an interrupt, a crash or kill -9 the same command with resume=true goes on.

Greedy (temperature=0) or k samples per problem. Reports accuracy with a 95% interval, avg@k, pass@k, maj@k, tokens,
tokens per right answer, accuracy at token budgets, the share of right steps, and the share of completions that ended.
Several sets of problems in one go: suite.py.
Step consistency (every `a op b = c`) is a tripwire, not a quality score: most wrong solutions pass it too.
"""
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from minimath.core import dist
from minimath.grading.answer import AnswerChecker, extract_answer
from minimath.data.chat import prompt_ids
from minimath.config.schema import EvalConfig
from minimath.core.errors import Interrupted, UserError
from minimath.core.text import comma_list
from minimath.data.examples import Example, describe_report, load_examples
from minimath.rollout.open import open_engine
from minimath.core.log import RunLog
from minimath.models.load import describe, load_model
from minimath.eval.partial import PartFile, fingerprint, holds_part, model_hash, open_part, refuse_changes
from minimath.rollout.engine import Completion
from minimath.core.files import write_whole
from minimath.core.run import PART, Stop, open_run
from minimath.grading.steps import check_steps

COLUMNS = ["model", "accuracy", "95% interval", "mean tokens", "tokens per right", "right steps", "ended"]


def evaluate(cfg: EvalConfig, *, within: Stop | None = None) -> dict:
    """Evaluate cfg.model (with cfg.adapter.path) on cfg.data.source -> the summary; writes eval.json and completions.jsonl.

    Interrupted by a signal, it says what is done and how to go on. With cfg.run.resume, a complete evaluation in cfg.run.out is
    returned as it is. within: as in evaluate_examples. Raises Interrupted, and UserError also when what decides the
    completions is not what the evaluation to go on with was begun with.
    """
    if cfg.suite or cfg.data.source or cfg.suite_samples or cfg.suite_temperature:
        raise UserError("suite= is for `minimath eval suite=gsm8k,math500`, and suite_data, suite_samples and "
                        "suite_temperature only go with it; here the problems come from data=")
    examples, report = load_examples(cfg.data.source, split=cfg.data.split, limit=cfg.data.limit, strict=cfg.data.strict,
                                     need=("answer",), data_format=cfg.data_format)
    return evaluate_examples(cfg, examples, describe_report(report), within=within)


def load_and_say(cfg: EvalConfig, log: RunLog) -> tuple:
    """(model, tokenizer) of cfg; what was loaded is said."""
    model, tokenizer = load_model(cfg, train=False)
    log.say(describe(model, cfg))
    return model, tokenizer


def evaluate_examples(cfg: EvalConfig, examples: list[Example], note: str = "", *, load=load_and_say,
                      within: Stop | None = None) -> dict:
    """`evaluate` on examples that are loaded; note: what is said of them.

    load(cfg, log) gives (model, tokenizer). within: the Stop of the suite or pipeline that this is a part of, and
    that says how to go on. Its files stop this evaluation too, and a signal that came too late to stop this one is
    left in it.
    """
    decides = fingerprint(cfg, examples)
    if cfg.run.resume and cfg.run.out and (Path(cfg.run.out) / "eval.json").exists():
        return complete(Path(cfg.run.out), decides, cfg)
    if cfg.run.resume and cfg.run.out and holds_part(cfg.run.out):
        refuse_changes(Path(cfg.run.out), decides)  # now, not after a large model has loaded
    with open_run(cfg, "eval") as (log, stop):
        stop.files += within.files if within else ()
        log.say(note or f"{len(examples)} problems")
        model, tokenizer = load(cfg, log)
        decides["model files"] = model_hash(model, tokenizer)
        with open_part(log, decides, len(examples), cfg) as part:
            try:
                summary, records = evaluate_model(model, tokenizer, examples, cfg, log, stop, part)
            except Interrupted:
                go_on = f"; the same command with out={log.run_dir} resume=true goes on" if within is None else ""
                log.say(f"{stop.reason()}: stopped, {len(part.done)} of {part.total} completions are done{go_on}")
                raise
            if dist.is_main():
                write_results(log.run_dir, summary, records)
                part.remove()
        name = cfg.adapter.path or cfg.model.name
        log.table(f"{name} on {len(examples)} problems", COLUMNS, [row(name, summary)])
        for name, value in summary.items():
            if name.startswith(("avg@", "pass@", "maj@", "accuracy@")):
                log.say(f"{name}: {value:.3f}")
        if within:
            within.signal = within.signal or int(dist.all_reduce_max(stop.signal))
        return summary


def complete(folder: Path, decides: dict, cfg: EvalConfig) -> dict:
    """The summary of a complete evaluation; UserError if it was made with other options than `decides`. Budgets that
    it lacks are added to it."""
    refuse_changes(folder, decides)
    summary = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    if not dist.is_main():
        return summary
    (folder / PART).unlink(missing_ok=True)  # killed just before it would have been removed
    if any(f"accuracy@{budget}" not in summary for budget in map(int, comma_list(cfg.budgets))):
        summary |= at_budgets(list(by_problem(read_records(folder)).values()), cfg.budgets)
        write_whole(folder / "eval.json", json.dumps(summary, indent=1) + "\n")
    print(f"{folder} holds the complete evaluation, nothing is left to do: accuracy {summary['accuracy']:.3f} "
          f"on {summary['problems']} problems")
    return summary


def evaluate_model(model, tokenizer, examples: list[Example], cfg: EvalConfig, log: RunLog, stop=None,
                   part: PartFile | None = None):
    """Generate and grade. Returns (summary, records): one record per completion. Raises runs.Interrupted on a signal.
    Several processes take a share of the problems each, and all return the whole.

    part: where completions are kept as they end, and those that an earlier process left; None (an evaluation
    within a training): nowhere.
    """
    prompts = [prompt_ids(tokenizer, e.problem, system=cfg.prompt.system, prompt_template=cfg.prompt.prompt_template)
               for e in examples]
    fits = [i for i, prompt in enumerate(prompts) if len(prompt) <= cfg.prompt.max_prompt_len]
    if not fits:
        raise UserError(f"no prompt fits max_prompt_len={cfg.prompt.max_prompt_len}; raise it")
    if len(fits) < len(prompts):
        log.say(f"{len(prompts) - len(fits)} problems are longer than max_prompt_len={cfg.prompt.max_prompt_len} "
                "and count as wrong")
    started = time.perf_counter()
    mine = dist.shard(fits)
    groups, new_tokens = sample_completions(model, tokenizer, prompts, mine, cfg, log, stop, part)
    seconds = time.perf_counter() - started
    with AnswerChecker() as checker:
        graded, unreadable = [], []
        for i, group in zip(mine, groups, strict=True):
            if stop is not None:
                stop.check()
            before = checker.bad_gold
            graded.append([{"number": i} | grade(examples[i], c, tokenizer, checker, s) for s, c in enumerate(group)])
            unreadable += [examples[i]] if checker.bad_gold > before else []
        records, unreadable = list(itertools.chain(*dist.gather(graded))), dist.gather(unreadable)
        counts = dist.all_reduce_sum({"timeouts": checker.timeouts, "tokens": new_tokens})
        # before the summary: maj@k has comparisons too
        given_up = {"checker_timeouts": int(counts["timeouts"]), "bad_gold": len(unreadable)}
        skipped = [{"number": i, "id": e.id, "problem": e.problem, "gold": e.answer, "sample": s, "text": "",
                    "answer": None, "right": False, "tokens": 0, "ended": False, "right_steps": 0, "steps": 0}
                   for i, e in enumerate(examples) if len(prompts[i]) > cfg.prompt.max_prompt_len for s in range(cfg.samples)]
        summary = summarise(records + skipped, cfg, checker) | given_up
    if any(given_up.values()):
        log.say(worded_given_up(given_up["checker_timeouts"], unreadable))
    summary["tokens_per_s"] = counts["tokens"] / seconds  # of this process, when an earlier one left completions
    return summary, records + skipped


def worded_given_up(timeouts: int, unreadable: list[Example]) -> str:
    """One line about comparisons that ran out of time, and about gold answers that no one can read."""
    parts = []
    if timeouts:
        parts.append(f"{timeouts} comparison{'s' * (timeouts > 1)} of answers took too long and counted as wrong")
    if unreadable:
        shown = ", ".join(f"{e.answer[:40]!r} ({e.id or e.where or e.problem[:40]})" for e in unreadable[:3])
        more = ", ..." if len(unreadable) > 3 else ""
        parts.append(f"no one can read the gold answer of {len(unreadable)} problem{'s' * (len(unreadable) > 1)}, so "
                     f"that no answer is right; correct it in the data: {shown}{more}")
    return "the answer checker gave up: " + "; ".join(parts)


def sample_completions(model, tokenizer, prompts: list[list[int]], fits: list[int], cfg: EvalConfig, log: RunLog,
                       stop, part: PartFile | None) -> tuple[list[list[Completion]], int]:
    """The completions of prompts[i] for i in fits, and the tokens sampled now: those in `part` are not again."""
    before = part.done if part else {}
    done = {(p, s): before[i, s] for p, i in enumerate(fits) for s in range(cfg.samples) if (i, s) in before}
    if part:
        part.total = len(fits) * cfg.samples
    tokens, count, new_tokens = sum(len(c.ids) for c in done.values()), len(done), 0
    started = time.perf_counter()

    def on_done(prompt, sample, completion):
        nonlocal tokens, count, new_tokens
        if part:
            part.add(fits[prompt], sample, completion)
        n = len(completion.ids)
        tokens, new_tokens, count = tokens + n, new_tokens + n, count + 1
        advance(1, tok_s=new_tokens / (time.perf_counter() - started), mean_tokens=tokens / count)

    what = f"evaluating ({count} done before)" if count else "evaluating"  # not in the bar: they took no time now
    with (log.progress(len(fits) * cfg.samples - count, what) as advance,
          open_engine(cfg, model, tokenizer, say=log.say, run_dir=log.run_dir) as sample):
        groups = sample([prompts[i] for i in fits], samples=cfg.samples, keys=fits, done=done, on_done=on_done,
                        on_step=stop and stop.check)
    return groups, new_tokens


def grade(example: Example, completion: Completion, tokenizer, checker: AnswerChecker, sample: int) -> dict:
    """The record of one completion: text, answer, right or wrong, tokens, steps."""
    text = tokenizer.decode(completion.ids, skip_special_tokens=True)
    answer = extract_answer(text) if completion.ended else boxed_before_cut(text)
    steps = check_steps(text)
    return {"id": example.id, "problem": example.problem, "gold": example.answer, "sample": sample, "text": text,
            "answer": answer, "right": answer is not None and checker.equal(answer, example.answer),
            "tokens": len(completion.ids), "ended": completion.ended, "right_steps": steps.right,
            "steps": steps.total}


def boxed_before_cut(text: str) -> str | None:
    """The final answer of a completion that was cut at max_new_tokens: only one in a \\boxed{...} that was closed.

    lighteval and Qwen2.5-Math's grader do not look at why a completion ended: they take the last box, and else any
    last number. A box is the answer that the prompt asks for, so it counts here too; the last number of a solution
    that was cut is a place in it, and as an answer it would pay for luck.
    """
    # what stands after the last of these may lack its end: \boxed 12 of \boxed 120
    end = max(text.rfind(mark) for mark in " \n}") + 1
    return extract_answer(text[:end], strict=True)


def summarise(records: list[dict], cfg: EvalConfig, checker: AnswerChecker) -> dict:
    """All figures from the records of one evaluation; intervals treat problems, not samples, as independent."""
    groups, k = list(by_problem(records).values()), cfg.samples
    rates = [sum(r["right"] for r in group) / len(group) for group in groups]
    right, tokens = sum(r["right"] for r in records), [r["tokens"] for r in records]
    summary = {
        "problems": len(groups), "samples": k, "accuracy": statistics.fmean(rates),
        "interval": wilson(right, len(records)) if k == 1 else bootstrap(rates, cfg.run.seed),
        "mean_tokens": statistics.fmean(tokens), "median_tokens": statistics.median(tokens),
        "tokens_per_right": sum(tokens) / right if right else None,
        "right_steps": sum(r["right_steps"] for r in records) / max(1, sum(r["steps"] for r in records)),
        "checked_steps": sum(r["steps"] for r in records), "ended": statistics.fmean(r["ended"] for r in records),
    }
    if k > 1:
        summary[f"avg@{k}"] = summary["accuracy"]
        counts = [sum(r["right"] for r in group) for group in groups]
        for n in sorted({2 ** i for i in range(k.bit_length()) if 2 ** i <= k} | {k}):
            summary[f"pass@{n}"] = statistics.fmean(pass_at(n, k, c) for c in counts)
        summary[f"maj@{k}"] = statistics.fmean(majority_right(group, checker) for group in groups)
    return summary | at_budgets(groups, cfg.budgets)


def by_problem(records: list[dict]) -> dict[int, list[dict]]:
    """Place in the data -> records of that problem: one that occurs twice there counts twice."""
    problems: dict[int, list[dict]] = {}
    for record in records:
        problems.setdefault(record["number"], []).append(record)
    return problems


def at_budgets(groups: list[list[dict]], budgets: str) -> dict[str, float]:
    """accuracy@N for each N of the comma list: a completion that did not end within N tokens counts as wrong."""
    return {f"accuracy@{budget}": statistics.fmean(
        sum(r["right"] and r["ended"] and r["tokens"] <= budget for r in group) / len(group) for group in groups)
        for budget in map(int, comma_list(budgets))}


def majority_right(group: list[dict], checker: AnswerChecker) -> bool:
    """Whether the most frequent answer is right; the answer seen first wins a tie.

    Answers count as one when they are equal as mathematics: 1,200 and 1200, 1/2 and \\frac{1}{2}. The right ones
    all equal the gold answer, so only wrong ones are compared, and only where the outcome can depend on it.
    """
    answered = [r for r in group if r["answer"] is not None]
    right = sum(r["right"] for r in answered)
    if right == 0 or 2 * right > len(answered):
        return right > 0
    votes: list[list] = []  # [answer, right, count] in the order seen first
    for r in answered:
        vote = next((v for v in votes if (r["right"] and v[1]) or (not r["right"] and not v[1] and (
            r["answer"] == v[0] or checker.equal(r["answer"], v[0])))), None)
        if vote is None:
            votes.append(vote := [r["answer"], r["right"], 0])
        vote[2] += 1
    return max(votes, key=lambda vote: vote[2])[1]


def row(name: str, summary: dict) -> list:
    """One row of the table whose columns are COLUMNS."""
    low, high = summary["interval"]
    per_right = summary["tokens_per_right"]
    return [name, f"{100 * summary['accuracy']:.1f}%", f"{100 * low:.1f} to {100 * high:.1f}",
            f"{summary['mean_tokens']:.1f}", f"{per_right:.1f}" if per_right else "-",
            f"{100 * summary['right_steps']:.1f}%", f"{100 * summary['ended']:.1f}%"]


def write_results(folder: Path, summary: dict, records: list[dict]) -> None:
    """completions.jsonl (one line per completion), then eval.json (the summary): where it is, both are whole."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_whole(folder / "completions.jsonl", lines)
    write_whole(folder / "eval.json", json.dumps(summary, indent=1) + "\n")


def read_records(folder: Path) -> list[dict]:
    """The records of a complete evaluation. OSError when there are none."""
    lines = (folder / "completions.jsonl").read_text(encoding="utf-8").split("\n")  # other line ends may be text
    return [json.loads(line) for line in lines if line]


if __name__ == "__main__":
    from minimath.cli import dispatch, run_command
    sys.exit(run_command(lambda: dispatch("eval", sys.argv[1:])))
