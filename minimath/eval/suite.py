"""Read the sets of problems of a suite, and show their figures.

Problems come from the folder data=FOLDER (NAME.jsonl or NAME_test.jsonl; also csv, parquet, ...), and what it lacks
from the hub."""
import re
from pathlib import Path
from typing import NamedTuple

from minimath.config.schema import DataOptions, EvalConfig
from minimath.core.errors import UserError
from minimath.core.run_folder import ADAPTER, CONFIG, ENVIRONMENT, EVAL, REPORT, STOP, SUITE
from minimath.core.text import comma_list, did_you_mean
from minimath.data.examples import Example, describe_report, load_examples
from minimath.data.readers import SUFFIXES
from minimath.eval.metrics import COLUMNS, table_row


class KnownSet(NamedTuple):
    """Where a set is on the hub (id, and its configuration), and how many problems it has as published."""
    source: str
    split: str
    size: int
    columns: str = "problem and answer"


SETS = {
    "gsm8k": KnownSet("openai/gsm8k:main", "test", 1319, "question and answer"),
    "math500": KnownSet("HuggingFaceH4/MATH-500", "test", 500),
    "aime24": KnownSet("HuggingFaceH4/aime_2024", "train", 30),
    "aime25": KnownSet("math-ai/aime25", "test", 30),
    "svamp": KnownSet("ChilleD/SVAMP", "test", 300, "Body, Question and Answer"),
}
OWN_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")  # it becomes a folder, and must not look like what a run keeps there
TAKEN = {ADAPTER, CONFIG, ENVIRONMENT, EVAL, REPORT, STOP, SUITE}


class Problems(NamedTuple):
    """The problems of one set, the options of their evaluation, and what is to be said of them."""
    cfg: EvalConfig
    examples: list[Example]
    note: str


def read_sets(cfg: EvalConfig) -> dict[str, Problems]:
    """Read the sets of cfg.suite, in its order. Raises UserError."""
    chosen, folder = chosen_sets(cfg.suite), cfg.data.source
    if folder and not (isinstance(folder, str) and Path(folder).expanduser().is_dir()):
        raise UserError(f"data={folder}: no such folder; with suite= it is to hold files such as {next(iter(chosen))}"
                        f".jsonl. Problems of your own are a set: suite={cfg.suite},NAME=FILE")
    return {name: read_own(cfg.replace(suite="", data=file)) if file else read_known(name, cfg)
            for name, file in chosen.items()}


def chosen_sets(text: str) -> dict[str, str]:
    """Parse "gsm8k,mine=my.jsonl" to {"gsm8k": "", "mine": "my.jsonl"}, or UserError."""
    chosen, known = {}, f"use {', '.join(SETS)}, or NAME=FILE for your own problems"
    for item in comma_list(text):
        name, equals, file = (part.strip() for part in item.partition("="))
        if not equals and name not in SETS:
            raise UserError(f"suite={text}: unknown set {name!r}{did_you_mean(name.lower(), SETS)}; {known}")
        if equals and not (file and OWN_NAME.fullmatch(name) and name.lower() not in TAKEN):
            raise UserError(f"suite={text}: {item!r} must be NAME=FILE, with a name of letters, digits, _, . and - "
                            f"that is none of {', '.join(sorted(TAKEN))}")
        if name in chosen:
            raise UserError(f"suite={text}: {name!r} occurs twice; leave one out, or give it another name")
        chosen[name] = file
    if not chosen:
        raise UserError(f"suite={text} names no set; {known}")
    return chosen


def read_own(cfg: EvalConfig) -> Problems:
    """Read problems of the user's; a row that can't be used is told."""
    examples, report = load_examples(cfg.data, need=("answer",))
    return Problems(cfg, examples, describe_report(report) or f"{len(examples)} problems")


def read_known(name: str, cfg: EvalConfig) -> Problems:
    """Read a set that has a name in the field; a row that can't be used is a UserError."""
    known, folder = SETS[name], Path(cfg.data.source or "FOLDER")
    places = [folder.expanduser() / f"{stem}{suffix}" for stem in (name, f"{name}_test") for suffix in SUFFIXES]
    local = next((str(path) for path in places if path.is_file()), "") if cfg.data.source else ""
    source = local or known.source
    try:
        examples, _ = load_examples(DataOptions(source, known.split, strict=True), need=("answer",))
    except UserError as error:
        if local:
            raise
        raise UserError(f"{name}: {error}. Without a hub, put its {known.split} split, rows with {known.columns}, in "
                        f"{folder / name}.jsonl{'' if cfg.data.source else ' and add data=FOLDER'}") from error
    note = f"{len(examples)} problems" if len(examples) == known.size else \
        f"{source}: {len(examples)} problems, {name} as published has {known.size}"
    if 0 < cfg.data.limit < len(examples):
        note += f", of which limit={cfg.data.limit} takes the first"
    return Problems(cfg.replace(suite="", data=source, split=known.split), examples[:cfg.data.limit or None], note)


def suite_table(result: dict) -> tuple[list[str], list[list[str]]]:
    """Word what suite.json holds as columns, and a row for each set."""
    first, *others = sets = list(result["sets"].values())
    more = [key for key in first if all(key in one for one in others) and (
        key in (f"pass@{first['samples']}", f"maj@{first['samples']}") or key.startswith("accuracy@"))]
    rows = [[name, str(one["problems"]), *table_row(name, one)[1:], *(f"{100 * one[key]:.1f}%" for key in more)]
            for name, one in zip(result["sets"], sets)]
    return ["set", "problems", *COLUMNS[1:], *more], rows
