"""Read the sets of problems of a suite, and average over them.

Problems come from the folder data=FOLDER (NAME.jsonl or NAME_test.jsonl; also csv, parquet, ...), and what it lacks
from the hub."""
import math
import re
import statistics
from pathlib import Path
from typing import NamedTuple

from minimath.config.schema import DataOptions, EvalConfig
from minimath.core.errors import UserError
from minimath.core.text import comma_list, did_you_mean
from minimath.data.examples import Example, describe_report, load_examples
from minimath.data.readers import SUFFIXES, rows_of
from minimath.eval.metrics import COLUMNS, table_row


class KnownSet(NamedTuple):
    source: str  # hub id, and its configuration
    split: str
    size: int    # problems, as published
    columns: str = "problem and answer"


SETS = {
    "gsm8k": KnownSet("openai/gsm8k:main", "test", 1319, "question and answer"),
    "math500": KnownSet("HuggingFaceH4/MATH-500", "test", 500),
    "aime24": KnownSet("HuggingFaceH4/aime_2024", "train", 30),
    "aime25": KnownSet("math-ai/aime25", "test", 30),
    "svamp": KnownSet("ChilleD/SVAMP", "test", 300, "Body, Question and Answer"),
}
OWN_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")  # it becomes a folder
AVERAGED = ("accuracy", "mean_tokens", "tokens_per_correct", "correct_steps", "finished", "thinking",
            "mean_thought_tokens", "mean_answer_tokens")
SUMMED = ("problems", "checker_timeouts", "bad_gold")


class Problems(NamedTuple):
    """The problems of one set."""
    cfg: EvalConfig  # of their evaluation
    examples: list[Example]
    note: str        # what is to be said of them


def read_sets(cfg: EvalConfig) -> dict[str, Problems]:
    """Read the sets of cfg.suite, in its order. Raises UserError."""
    chosen, folder = chosen_sets(cfg.suite), cfg.data.source
    if folder and not (isinstance(folder, str) and Path(folder).expanduser().is_dir()):
        raise UserError(f"data={folder}: no such folder; with suite= it is to hold files such as {next(iter(chosen))}"
                        f".jsonl. Problems of your own are a set: suite={cfg.suite},NAME=FILE")
    sets = {}
    for name, file in chosen.items():
        if file:
            own = cfg.replace(suite="", data=file)
            examples, report = load_examples(own.data, need=("answer",))
            sets[name] = Problems(own, examples, describe_report(report))
        else:
            sets[name] = read_known(name, cfg)
    return sets


def chosen_sets(text: str) -> dict[str, str]:
    """Parse "gsm8k,mine=my.jsonl" to {"gsm8k": "", "mine": "my.jsonl"}, or UserError."""
    chosen, known = {}, f"use {', '.join(SETS)}, or NAME=FILE for your own problems"
    for item in comma_list(text):
        name, equals, file = (part.strip() for part in item.partition("="))
        if not equals and name not in SETS:
            raise UserError(f"suite={text}: unknown set {name!r}{did_you_mean(name.lower(), SETS)}; {known}")
        if equals and not (file and OWN_NAME.fullmatch(name)):
            raise UserError(f"suite={text}: {item!r} must be NAME=FILE, with a name of letters, digits, _, . and -")
        if name in chosen:
            raise UserError(f"suite={text}: {name!r} occurs twice; leave one out, or give it another name")
        chosen[name] = file
    if not chosen:
        raise UserError(f"suite={text} names no set; {known}")
    return chosen


def read_known(name: str, cfg: EvalConfig) -> Problems:
    """Read a set that has a name in the field; a row that can't be used is a UserError."""
    known, folder = SETS[name], Path(cfg.data.source or "FOLDER")
    path = local_file(name, folder.expanduser()) if cfg.data.source else None
    source, limit = str(path or known.source), cfg.data.limit
    try:
        rows = svamp_rows(source, known.split) if name == "svamp" else source
        examples, _ = load_examples(DataOptions(rows, known.split, strict=True), need=("answer",))
    except UserError as error:
        if path:
            raise
        raise UserError(f"{name}: {error}. Without a hub, put its {known.split} split, rows with {known.columns}, in "
                        f"{folder / name}.jsonl{'' if cfg.data.source else ' and add data=FOLDER'}") from error
    note = "" if len(examples) == known.size else \
        f"{source}: {len(examples)} problems, {name} as published has {known.size}"
    return Problems(cfg.replace(suite="", data=source, split=known.split), examples[:limit or None], note)


def svamp_rows(source: str, split: str) -> list[dict]:
    """Read SVAMP's rows, Body and Question put together as the problem."""
    rows = [row for _, row in rows_of(source, split)]
    return [row | {"problem": f"{row['Body'].strip()} {row['Question'].strip()}", "answer": row.get("Answer")}
            if isinstance(row, dict) and all(isinstance(row.get(name), str) for name in ("Body", "Question")) else row
            for row in rows]


def local_file(name: str, folder: Path) -> Path | None:
    """Find NAME or NAME_test in the folder, with a suffix that data/readers.py reads."""
    places = (folder / f"{stem}{suffix}" for stem in (name, f"{name}_test") for suffix in SUFFIXES)
    return next((path for path in places if path.is_file()), None)


def mean_of(summaries: dict[str, dict]) -> dict:
    """Average over the sets, each counting the same; figures that a set lacks are left out.

    The interval of the mean accuracy is put together from those of the independent sets (MOVER: Zou, Huang and Zhang
    2009, "A note on confidence interval estimation for a linear function of binomial proportions")."""
    rows = list(summaries.values())
    names = [*AVERAGED, *(key for key in rows[0] if "@" in key)]
    mean: dict = {key: sum(row.get(key, 0) for row in rows) for key in SUMMED}
    mean |= {key: statistics.fmean(row[key] for row in rows) for key in names
             if all(row.get(key) is not None for row in rows)}
    below, above = (math.hypot(*(row["interval"][end] - row["accuracy"] for row in rows)) / len(rows) for end in (0, 1))
    return mean | {"interval": (max(0.0, mean["accuracy"] - below), min(1.0, mean["accuracy"] + above))}


def suite_table(result: dict) -> tuple[list[str], list[list[str]]]:
    """Word what suite.json holds as columns and rows: the sets, then the mean."""
    k = max(summary["samples"] for summary in result["sets"].values())
    more = [key for key in result["mean"] if key in (f"pass@{k}", f"maj@{k}") or key.startswith("accuracy@")]
    rows = [[name, str(one["problems"]), *table_row(name, one)[1:], *(f"{100 * one[key]:.1f}%" for key in more)]
            for name, one in (*result["sets"].items(), ("mean", result["mean"]))]
    return ["set", "problems", *COLUMNS[1:], *more], rows
