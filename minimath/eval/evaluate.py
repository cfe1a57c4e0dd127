"""Evaluate a model on problems with known answers.

    minimath eval data=problems.jsonl model=... [adapter=...] [samples=8 temperature=0.6]

Several sets of problems (suite.py) share the model, which is loaded once:

    minimath eval suite=gsm8k,math500,mine=my.jsonl model=... [data=FOLDER] out=FOLDER

Completions are kept as they finish: after an interrupt, a crash or kill -9 the same command with resume=true goes on.
A set is complete where eval.json (metrics.py) stands in its folder beside completions.jsonl, a suite where suite.json
does: {"model", "adapter", "sets": {NAME: summary}}, with the folder of each set below it."""
import contextlib
import functools
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

from minimath.config.load import config_text
from minimath.config.schema import EvalConfig
from minimath.config.trained import as_trained
from minimath.core import dist, interrupt
from minimath.core.errors import Interrupted, UserError
from minimath.core.files import read_json, write_whole
from minimath.core.log import RunLog
from minimath.core.run import open_run
from minimath.core.run_folder import COMPLETIONS, EVAL, PART, SUITE, held_run, stop_files
from minimath.core.text import comma_list
from minimath.data.examples import Example
from minimath.data.sample import Sample
from minimath.eval.budget import limited_stream
from minimath.eval.metrics import COLUMNS, at_budgets, read_records, summarise, table_row, write_results
from minimath.eval.partial import Job, fingerprint, model_hash, open_part, part_record, refuse_changes
from minimath.eval.suite import Problems, read_own, read_sets, suite_table
from minimath.grading.answer import AnswerChecker, final_answer
from minimath.models.load import describe
from minimath.models.policy import Policy, load_policy
from minimath.rollout.open import open_engine


def evaluate(cfg: EvalConfig) -> dict:
    """Evaluate a model on problems with known answers, or on a suite of them.

    Returns what eval.json or suite.json holds; with resume, of a complete evaluation as it is. Raises Interrupted,
    after it has said what is done and how to go on, and UserError also when what decides the completions is not what
    the evaluation to go on with was begun with."""
    if fault := cfg.check():
        raise UserError(fault)
    cfg = as_trained(cfg)
    return evaluate_suite(cfg) if cfg.suite else evaluate_set(read_own(cfg))


def load_and_say(cfg: EvalConfig, log: RunLog) -> Policy:
    """Load the model of an evaluation and say what was loaded."""
    policy = load_policy(cfg, train=False)
    log.say(describe(policy.model, cfg))
    return policy


def evaluate_set(problems: Problems, load: Callable[[], Policy] | None = None) -> dict:
    """Evaluate on one set; load gives the model within a suite, which says how to go on."""
    cfg, examples, note = problems
    decides, out = fingerprint(cfg, examples), Path(cfg.run.out)
    if cfg.run.resume and cfg.run.out and (held := held_run(out)) and held.evaluates():
        refuse_changes(out, decides)  # now, not after a large model has loaded
        if (out / EVAL).exists():
            return complete(out, cfg, examples)
    with open_run(cfg.run.out, "eval", config=config_text(cfg), resume=cfg.run.resume,
                  deterministic=cfg.run.deterministic) as log:
        log.say(note)
        if above := [n for n in comma_list(cfg.budgets) if int(n) > (longest := cfg.sampling.max_new_tokens)]:
            log.say(f"warning: budgets={','.join(above)}: completions are cut at max_new_tokens={longest}, and what is "
                    "cut counts as wrong there too")
        policy = load() if load else load_and_say(cfg, log)
        done = open_part(log, decides | {"model files": model_hash(policy)}, len(examples), cfg, policy)
        try:
            summary, records = evaluate_policy(policy, examples, cfg, log, done)
        except Interrupted:
            part_of_more = load or len(stop_files(log.run_dir)) > 1  # a suite, or a run of the whole recipe
            go_on = "" if part_of_more else f"; the same command with out={log.run_dir} resume=true goes on"
            log.say(f"{interrupt.reason()}: stopped, {len(done)} of {len(examples) * cfg.samples} completions are "
                    f"done{go_on}")
            raise
        if dist.is_main():
            write_results(log.run_dir, summary, records)
            (log.run_dir / PART).unlink(missing_ok=True)
        name = cfg.adapter.path or cfg.model.name
        log.table(f"{name} on {len(examples)} problems", COLUMNS, [table_row(name, summary)])
        if "thinking" in summary:
            log.say(f"{100 * summary['thinking']:.0f}% of the completions think; on average "
                    f"{summary['mean_thought_tokens']:.1f} tokens of thought, {summary['mean_answer_tokens']:.1f} of "
                    "answer" + (f"; {100 * summary['forced']:.0f}% reached thinking_budget={cfg.thinking_budget}"
                                if "forced" in summary else ""))
        for name, value in summary.items():
            if "@" in name:
                log.say(f"{name}: {value:.3f}")
        return summary


def complete(folder: Path, cfg: EvalConfig, examples: list[Example]) -> dict:
    """Read the summary of a complete evaluation, and add budgets that it lacks.

    UserError where the data has other answers now: what is correct would be that of the old ones."""
    summary = read_json(folder / EVAL)
    records = read_records(folder) if (folder / COMPLETIONS).exists() else []
    if other := {r["number"] + 1 for r in records if r["gold"] != examples[r["number"]].answer}:
        raise UserError(f"{folder} holds a complete evaluation, and the data has other answers now (of {len(other)} "
                        f"problems, first of number {min(other)}): start anew with another out=")
    if dist.is_main():
        (folder / PART).unlink(missing_ok=True)  # killed just before it would have been removed
        if any(f"accuracy@{budget}" not in summary for budget in comma_list(cfg.budgets)):
            if not records:
                raise UserError(f"{folder / COMPLETIONS} is gone, and budgets={cfg.budgets} is counted from it: leave "
                                "budgets= as it was, or start anew with another out=")
            summary |= at_budgets(records, cfg.budgets)
            write_whole(folder / EVAL, json.dumps(summary, indent=1) + "\n")
        print(f"{folder} holds the complete evaluation, nothing is left to do: accuracy {summary['accuracy']:.3f} "
              f"on {summary['problems']} problems")
    return summary


def evaluate_suite(cfg: EvalConfig) -> dict:
    """Evaluate a model on each set of cfg.suite; returns what suite.json holds.

    UserError, before anything is sampled: an unknown set, problems that are nowhere, a folder with something else."""
    sets = read_sets(cfg)
    out = Path(cfg.run.out)
    if cfg.run.out and (held := held_run(out)) and not (out / SUITE).exists():
        raise UserError(f"{out} already holds {held.value} that is no suite; choose another out=")
    for name, problems in sets.items() if cfg.run.out else ():
        if not (held := held_run(out / name)):
            continue
        if not cfg.run.resume:
            raise UserError(f"{out} already holds a suite ({name}: {held.value}); add resume=true to go on with it, or "
                            "choose another out=")
        refuse_changes(out / name, fingerprint(problems.cfg, problems.examples))
    with open_run(cfg.run.out, "eval", config=config_text(cfg), resume=cfg.run.resume,
                  deterministic=cfg.run.deterministic) as log:
        load = functools.cache(lambda: load_and_say(cfg, log))  # called by the first set that is not complete
        summaries: dict[str, dict] = {}
        for name, problems in sets.items():
            folder = log.run_dir / name
            set_cfg = problems.cfg.replace(out=str(folder), resume=cfg.run.resume and bool(held_run(folder)))
            try:
                if number := interrupt.requested():
                    raise Interrupted(number)
                log.say(f"{name}, {len(summaries) + 1} of {len(sets)}:")
                summaries[name] = evaluate_set(problems._replace(cfg=set_cfg), load)
            except Interrupted:
                log.say(f"{len(summaries)} of {len(sets)} sets are complete; the same command with out={log.run_dir} "
                        "resume=true goes on")
                raise
        result = {"model": cfg.model.name, "adapter": cfg.adapter.path, "sets": summaries}
        write_whole(log.run_dir / SUITE, json.dumps(result, indent=1) + "\n")
        log.table(cfg.adapter.path or cfg.model.name, *suite_table(result))
    return result


def evaluate_policy(policy: Policy, examples: list[Example], cfg: EvalConfig, log: RunLog,
                    done: dict[Job, Sample] | None = None) -> tuple[dict, list[dict]]:
    """Sample and grade; returns the summary, and a record per completion.

    Several processes take a share of the problems each, and all return the whole. done: completions that an earlier
    process left, to which those that finish are added, in the part file too; None, within a training: nowhere. Raises
    Interrupted, and UserError when no prompt fits."""
    keep, done, longest = done is not None, {} if done is None else done, cfg.prompt.max_prompt_len
    prompts = [policy.prompt_ids(example) for example in examples]
    fits = [i for i, prompt in enumerate(prompts) if len(prompt) <= longest]
    if not fits:
        raise UserError(f"no prompt fits max_prompt_len={longest}; raise it")
    if len(fits) < len(prompts):
        log.say(f"{len(prompts) - len(fits)} problems are longer than max_prompt_len={longest} and count as wrong")
    mine, started = dist.shard(fits), time.perf_counter()
    new_tokens = sample_completions(policy, {i: prompts[i] for i in mine}, cfg, log, done, keep)
    seconds = time.perf_counter() - started
    with AnswerChecker() as checker:
        graded, unreadable = [], []
        for i in mine:
            interrupt.check()
            before = checker.bad_gold
            graded.append([grade(i, s, examples[i], done[i, s], checker) for s in range(cfg.samples)])
            unreadable += [examples[i]] if checker.bad_gold > before else []
        records, unreadable = list(itertools.chain(*dist.gather(graded))), dist.gather(unreadable)
        counts = dist.all_reduce_sum({"timeouts": checker.timeouts, "tokens": new_tokens})  # before those of maj@k
        records += [grade(i, s, examples[i], Sample([], [], False), checker)
                    for i, prompt in enumerate(prompts) if len(prompt) > longest for s in range(cfg.samples)]
        summary = summarise(records, cfg, checker)
    summary |= {"checker_timeouts": int(counts["timeouts"]), "bad_gold": len(unreadable),
                "tokens_per_s": counts["tokens"] / seconds}  # of this process, when an earlier one left completions
    if said := given_up(summary["checker_timeouts"], unreadable):
        log.say(f"the answer checker gave up: {'; '.join(said)}")
    return summary, records


def sample_completions(policy: Policy, prompts: dict[int, list[int]], cfg: EvalConfig, log: RunLog,
                       done: dict[Job, Sample], keep: bool) -> int:
    """Add to done what it lacks of prompts, by the problem's place in the data; count the tokens."""
    numbers, started = list(prompts), time.perf_counter()
    skip = {(p, s) for p, i in enumerate(numbers) for s in range(cfg.samples) if (i, s) in done}
    old_tokens, new_tokens, count = sum(done[numbers[p], s].tokens for p, s in skip), 0, len(skip)
    with open_engine(cfg.engine, cfg.sampling, policy, seed=cfg.run.seed, run_dir=log.run_dir, say=log.say) as engine, \
            log.progress(len(prompts) * cfg.samples, "evaluating", done=count) as advance, \
            contextlib.closing(limited_stream(engine, cfg.thinking_budget, list(prompts.values()), cfg.samples,
                                              keys=numbers, skip=skip)) as stream:
        for finished in stream:
            for p, s, sample in finished:
                done[numbers[p], s] = sample
                if keep:  # what other processes sample is sampled again after an interrupt
                    log.append(PART, part_record((numbers[p], s), sample))
                new_tokens, count = new_tokens + sample.tokens, count + 1
                advance(1, tok_s=new_tokens / (time.perf_counter() - started),
                        mean_tokens=(old_tokens + new_tokens) / count)
            interrupt.check()
    return new_tokens


def grade(number: int, s: int, example: Example, sample: Sample, checker: AnswerChecker) -> dict:
    """Make the record of one completion."""
    answer = None if sample.cut_thinking else final_answer(sample.text, sample.finished)
    return {"number": number, "id": example.id, "problem": example.problem, "gold": example.answer, "sample": s,
            "text": sample.text, "answer": answer,
            "correct": answer is not None and checker.equal(answer, example.answer), "tokens": sample.tokens,
            "finished": sample.finished, "correct_steps": sample.steps.right, "steps": sample.steps.total,
            **({"thought_tokens": sample.thought} if sample.thought else {}),
            **({"messages": example.asked()} if example.messages else {})}


def given_up(timeouts: int, unreadable: list[Example]) -> list[str]:
    """Say what was not compared in time, and which gold answers no one can read."""
    late = f"{timeouts} comparison{'s' * (timeouts > 1)} of answers took too long and counted as wrong"
    said = [late] if timeouts else []
    if unreadable:
        shown = ", ".join(f"{e.answer[:40]!r} ({e.id or e.where or e.problem[:40]})" for e in unreadable[:3])
        said.append(f"no one can read the gold answer of {len(unreadable)} problem{'s' * (len(unreadable) > 1)}, so "
                    f"that no answer is correct; mend it in the data: {shown}{', ...' * (len(unreadable) > 3)}")
    return said
