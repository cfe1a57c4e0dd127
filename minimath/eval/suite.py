"""Several sets of problems, one model: minimath eval suite=gsm8k,math500,mine=my.jsonl model=... out=FOLDER

    out/NAME/       what a lone evaluation of that set leaves (evaluate.py): eval.json, completions.jsonl, ...
    out/suite.json  {"model", "adapter", "sets": {NAME: summary}, "mean"}: where it is, all sets are complete

The model is loaded once. Problems come from suite_data=FOLDER (NAME.jsonl or NAME_test.jsonl; also csv, parquet, ...),
else from the hub. suite_samples=aime24:64 and suite_temperature=aime24:0.6 are for single sets. Interrupted, the same
command with resume=true goes on: complete sets are read, the unfinished one goes on after its last completion.
"""
import dataclasses
import functools
import json
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

from minimath.config.load import PARSERS, check_value
from minimath.config.schema import EvalConfig
from minimath.core.errors import Interrupted, UserError
from minimath.core.text import comma_list, did_you_mean
from minimath.data.examples import Example, describe_report, load_examples, to_example
from minimath.eval.evaluate import evaluate_examples, load_and_say
from minimath.eval.partial import fingerprint, refuse_changes
from minimath.data.readers import SUFFIXES, BadRow, Row, read_rows
from minimath.core.files import write_whole
from minimath.core.run import held_run, open_run

SUITE = "suite.json"
# name: (hub id, config, split, columns that make the problem, column of the answer, number of problems)
SETS = {
    "gsm8k": ("openai/gsm8k", "main", "test", ("question",), "answer", 1319),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", ("problem",), "answer", 500),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", ("problem",), "answer", 30),
    "aime25": ("math-ai/aime25", None, "test", ("problem",), "answer", 30),
    "svamp": ("ChilleD/SVAMP", None, "test", ("Body", "Question"), "Answer", 300),
}
OWN_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")  # it becomes a folder
AVERAGED = ("accuracy", "mean_tokens", "tokens_per_right", "right_steps", "ended")
SUMMED = ("problems", "checker_timeouts", "bad_gold")

Problems = tuple[EvalConfig, list[Example], str]  # of one set: its options, its problems, what is said of them


def suite(cfg: EvalConfig) -> dict:
    """Evaluate cfg.model.name on each set of cfg.suite -> what suite.json holds. Raises Interrupted; UserError before anything
    is sampled for an unknown set, problems that are nowhere, and a folder that holds something else."""
    sets = read_sets(cfg)
    refuse_folder(cfg, sets)
    with open_run(cfg, "eval") as (log, stop):
        load = functools.cache(lambda: load_and_say(cfg, log))  # called by the first set that is not complete
        summaries: dict[str, dict] = {}
        for name, (set_cfg, examples, note) in sets.items():
            folder = log.run_dir / name
            set_cfg = set_cfg.replace(out=str(folder), resume=cfg.run.resume and bool(held_run(folder)))
            try:
                stop.check()
                log.say(f"{name}, {len(summaries) + 1} of {len(sets)}:")
                summaries[name] = evaluate_examples(set_cfg, examples, note, within=stop, load=lambda *_: load())
            except Interrupted:
                log.say(f"{len(summaries)} of {len(sets)} sets are complete; the same command with out={log.run_dir} "
                        "resume=true goes on")
                raise
        result = {"model": cfg.model.name, "adapter": cfg.adapter.path, "sets": summaries, "mean": mean_of(summaries)}
        write_whole(log.run_dir / SUITE, json.dumps(result, indent=1) + "\n")
        log.table(f"{cfg.adapter.path or cfg.model.name} (in the mean each set counts the same)", *suite_table(result))
    return result


def refuse_folder(cfg: EvalConfig, sets: dict[str, Problems]) -> None:
    """UserError when cfg.run.out can't be filled or gone on with: now, not when the first sets have been evaluated."""
    if not cfg.run.out:
        return
    if held := held_run(Path(cfg.run.out)):
        raise UserError(f"{cfg.run.out} already holds {held} that is no suite; choose another out=")
    for name, (set_cfg, examples, _) in sets.items():
        if not (held := held_run(Path(cfg.run.out) / name)):
            continue
        if not cfg.run.resume:
            raise UserError(f"{cfg.run.out} already holds a suite ({name}: {held}); add resume=true to go on with it, or "
                            "choose another out=")
        refuse_changes(Path(cfg.run.out) / name, fingerprint(set_cfg, examples))


# ---- which sets, and their problems

def read_sets(cfg: EvalConfig) -> dict[str, Problems]:
    """The sets of cfg.suite in its order. Raises UserError as `suite` does."""
    if cfg.data.source:
        raise UserError(f"give data= or suite=, not both; data as a set of its own: suite={cfg.suite},mine={cfg.data.source}")
    chosen = chosen_sets(cfg.suite)
    samples = of_single_sets(cfg, "samples", chosen)
    temperature = of_single_sets(cfg, "temperature", chosen)
    sets = {}
    for name, file in chosen.items():
        k, heat = samples.get(name, cfg.samples), temperature.get(name, cfg.sampling.temperature)
        if k > 1 and heat == 0:
            raise UserError(f"{name}: {k} samples with temperature=0 would repeat one greedy completion; add "
                            f"suite_temperature={name}:0.6, or temperature=0.6 for all sets")
        data, split, examples, note = read_set(name, file, cfg)
        sets[name] = (cfg.replace(data=data, split=split, samples=k, temperature=heat, suite="",
                                          suite_data="", suite_samples="", suite_temperature=""), examples, note)
    return sets


def chosen_sets(text: str) -> dict[str, str]:
    """"gsm8k,mine=my.jsonl" -> {"gsm8k": "", "mine": "my.jsonl"}. UserError for a name that is no set."""
    chosen: dict[str, str] = {}
    for item in comma_list(text):
        name, equals, file = (part.strip() for part in item.partition("="))
        if not equals and name not in SETS:
            raise UserError(f"suite={text}: unknown set {name!r}{did_you_mean(name.lower(), SETS)}; use "
                            f"{', '.join(SETS)}, or NAME=FILE for your own problems")
        if equals and not (file and OWN_NAME.fullmatch(name)):
            raise UserError(f"suite={text}: {item!r} must be NAME=FILE, with a name of letters, digits, _, . and -")
        if name in chosen:
            raise UserError(f"suite={text}: {name!r} occurs twice; leave one out, or give it another name")
        chosen[name] = file
    if not chosen:
        raise UserError(f"suite={text} names no set; use {', '.join(SETS)}, or NAME=FILE for your own problems")
    return chosen


def of_single_sets(cfg: EvalConfig, key: str, chosen: Iterable[str]) -> dict[str, float]:
    """The list cfg.suite_<key>, "aime24:64,aime25:32" -> {"aime24": 64, "aime25": 32}. UserError for what is none."""
    option, kind, values = f"suite_{key}", type(getattr(cfg, key)), {}
    for item in comma_list(getattr(cfg, f"suite_{key}")):
        name, _, number = (part.strip() for part in item.partition(":"))
        if name not in chosen:
            raise UserError(f"{option}: {name!r} is not in suite={cfg.suite}{did_you_mean(name, chosen)}")
        try:
            values[name] = PARSERS[kind](number)
        except ValueError:
            example = {"samples": "aime24:64", "temperature": "aime24:0.6"}[key]
            raise UserError(f"{option}: {item!r} must be NAME:NUMBER, as in {example}") from None
        check_value(key, values[name], f"{option}={item}")
    return values


def read_set(name: str, file: str, cfg: EvalConfig) -> tuple[str, str, list[Example], str]:
    """(data, split, problems, what is to be said of them) of one set; file: of an own set, else "".

    A row that can't be used is an UserError in a set that has a name in the field: without it, it is another set.
    """
    if file:
        examples, report = load_examples(file, split=cfg.data.split, limit=cfg.data.limit, strict=cfg.data.strict, need=("answer",),
                                         data_format=cfg.data_format)
        return file, cfg.data.split, examples, describe_report(report)
    hub, config, split, problem, answer, size = SETS[name]
    path, examples = local_file(name, cfg.data.source), []
    for where, row in read_rows(path) if path else hub_rows(name, cfg.data.source):
        made = row if isinstance(row, BadRow) else to_example(renamed(row, problem, answer), where, ("answer",))
        if isinstance(made, BadRow):
            raise UserError(f"{where}: {made.reason}; {made.fix} ({name} without a row is another set)")
        examples.append(made)
    if not examples:
        raise UserError(f"{path}: no row; {name} has {size} problems")
    note = "" if len(examples) == size else f"{path or hub}: {len(examples)} problems, {name} as published has {size}"
    data = str(path) if path else f"{hub}:{config}" if config else hub
    return data, split, examples[:cfg.data.limit or None], note


def local_file(name: str, folder: str) -> Path | None:
    """NAME or NAME_test with a suffix that readers.py reads, in the folder; None without one. UserError: no folder."""
    if folder and not Path(folder).expanduser().is_dir():
        raise UserError(f"suite_data={folder}: no such folder; it is to hold {name}.jsonl or {name}_test.jsonl")
    places = (Path(folder).expanduser() / f"{stem}{suffix}" for stem in (name, f"{name}_test") for suffix in SUFFIXES)
    return next((path for path in places if path.is_file()), None) if folder else None


def hub_rows(name: str, folder: str) -> Iterable[Row]:
    """Rows of the set from the hub, or from what `datasets` kept of it. UserError that says which file would do."""
    hub, config, split, problem, answer, _ = SETS[name]
    try:
        import datasets  # seconds to import: only when the hub is asked
        rows = datasets.load_dataset(hub, config, split=split)
    except Exception as error:  # errors of hub, network, disk, format and import share no other base
        text = " ".join(str(error).split())[:200]
        columns = " and ".join((*problem, answer)) + (" (or problem and answer)" if problem != ("problem",) else "")
        raise UserError(f"{name}: {hub} can't be loaded from the hub ({type(error).__name__}: {text}). Without a hub, "
                        f"put its {split} split, rows with {columns}, in {Path(folder or 'FOLDER') / name}.jsonl"
                        f"{'' if folder else ' and add suite_data=FOLDER'}") from error
    return ((f"{hub}:{split}:row {number}", row) for number, row in enumerate(rows, 1))


def renamed(row: dict, problem: tuple[str, ...], answer: str) -> dict:
    """The row with the hub's columns as problem and answer; a row that has others is what data.py makes of it."""
    if not all(isinstance(row.get(column), str) for column in problem) or row.get(answer) is None:
        return row
    return row | {"problem": " ".join(row[column].strip() for column in problem), "answer": row[answer]}


# ---- what comes out

def mean_of(summaries: dict[str, dict]) -> dict:
    """The macro average: each set counts the same, whatever its size; figures that a set lacks are left out.

    The interval of the mean accuracy is put together from those of the sets, which are independent (MOVER: Zou, Huang
    and Zhang 2009, "A note on confidence interval estimation for a linear function of binomial proportions").
    """
    rows = list(summaries.values())
    names = [*AVERAGED, *(key for key in rows[0] if "@" in key)]
    mean: dict = {key: sum(row.get(key, 0) for row in rows) for key in SUMMED}
    mean |= {key: statistics.fmean(row[key] for row in rows) for key in names
             if all(row.get(key) is not None for row in rows)}
    below, above = (math.hypot(*(row["interval"][end] - row["accuracy"] for row in rows)) / len(rows) for end in (0, 1))
    return mean | {"interval": (max(0.0, mean["accuracy"] - below), min(1.0, mean["accuracy"] + above))}


def suite_table(result: dict) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of what suite.json holds: a row per set, then the mean."""
    summaries = result["sets"]
    several = any(summary["samples"] > 1 for summary in summaries.values())
    budgets = sorted({int(key.partition("@")[2]) for summary in summaries.values() for key in summary
                      if key.startswith("accuracy@")})
    columns = ["set", "problems", *(["k", "avg@k"] if several else ["accuracy"]), "95% interval",
               *(["pass@k", "maj@k"] if several else []), "mean tokens", "ended", *(f"acc@{n}" for n in budgets)]

    def percent(value) -> str:
        return "-" if value is None else f"{100 * value:.1f}%"

    rows = []
    for name, summary in (*summaries.items(), ("mean", result["mean"])):
        k, (low, high) = summary.get("samples", "-"), summary["interval"]
        rows.append([name, summary["problems"], *([k] if several else []), percent(summary["accuracy"]),
                     f"{100 * low:.1f} to {100 * high:.1f}",
                     *([percent(summary.get(f"{what}@{k}")) for what in ("pass", "maj")] if several else []),
                     f"{summary['mean_tokens']:.1f}", percent(summary["ended"]),
                     *(percent(summary.get(f"accuracy@{n}")) for n in budgets)])
    return columns, [[str(cell) for cell in row] for row in rows]
