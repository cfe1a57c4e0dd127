"""Solutions whose faults people have marked: pairs, and solutions step by step; README.md has the shapes of rows."""
import hashlib
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from minimath.config.schema import DataOptions
from minimath.core.errors import UserError
from minimath.core.text import comma_list, did_you_mean
from minimath.data.examples import DataReport, describe_report
from minimath.data.problems import canonical
from minimath.data.readers import BadRow, rows_of
from minimath.data.rows import COLUMNS, Columns, plain_text
from minimath.grading.answer import extract_answer
from minimath.judges.base import Asked, Solution, split_steps
from minimath.judges.faults import same
from minimath.judges.pairs import length

SOUND, WRONG, HIDDEN, NEEDLESS = "sound", "wrong answer", "right answer, wrong step", "needless"
UNREAD = "wrong step, answer not known"
PAIR = "pair"  # of the user's, without a kind
SHAPES = {"better": "worse", "chosen": "rejected", "steps": "label", "original": "modified",
          "original_process": "modified_process"}


def problem_hash(problem: str) -> str:
    """Hash a problem's words and numbers, names apart: 16 hex digits of a sha256.

    Of one without Latin words, or with few, the whole text: its numbers are also those of others."""
    letters = [c for c in problem if c.isalpha()]
    text = canonical(problem) if 2 * sum(c.isascii() for c in letters) > len(letters) else problem
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


@dataclass(frozen=True)
class Known:
    """A solution; wrong_step: the index of its first wrong one, -1: none, None: not said."""
    problem: str
    steps: tuple[str, ...]
    kind: str
    wrong_step: int | None = None
    source: str = ""

    @cached_property
    def solution(self) -> Solution:
        """What a judge compares, which is not told whether the answer is right."""
        text = "".join(self.steps)
        return Solution(text, True, length(text))

    @property
    def question(self) -> Asked:
        return Asked(self.problem, self.steps)


@dataclass
class KnownRows:
    """What a check asks about.

    pairs: (kind, index of the better solution, of the worse one). rows, problems: how many were read; left_out: rows
    whose problem the judge was trained on; drawn: rows that are used."""
    solutions: list[Known]
    pairs: list[tuple[str, int, int]]
    report: DataReport
    rows: int
    problems: int
    left_out: int
    drawn: int

    def kinds(self) -> Counter:
        """Count the solutions of each kind, pairs of the user's apart."""
        return Counter(known.kind for known in self.solutions if known.kind)


def read_known(data: DataOptions, seed: int = 0, trained_on: set[str] = frozenset()) -> KnownRows:
    """Read files, a comma list of them; at most data.limit rows, drawn by the seed.

    trained_on: hashes of problems whose rows are left out. Raises UserError as load_examples does, and when no row is
    left."""
    rows, report = [], DataReport()
    listed = isinstance(data.source, list) or os.path.exists(data.source)
    sources = [data.source] if listed else comma_list(data.source) or [""]
    stems = ["rows" if isinstance(source, list) else Path(source).stem for source in sources]
    for source, stem in zip(sources, stems):
        name = stem if stems.count(stem) == 1 else source  # gsm8k/test.jsonl and math/test.jsonl are two sources
        for where, row in rows_of(source, data.split):
            try:
                rows.append(solutions_of(Columns(row), name))
            except BadRow as bad:
                report.refuse(where, bad, data.strict)
    report.kept = len(rows)
    if not rows:
        raise UserError(f"data={data.source}: no usable row. {describe_report(report) or 'It is empty'}")
    kept = [row for row in rows if not trained_on or problem_hash(row[0].problem) not in trained_on]
    if not kept:
        raise UserError(f"data={data.source}: the judge was trained on the problems of all {len(rows)} rows; check it "
                        "on others")
    drawn = min(data.limit or len(kept), len(kept))
    chosen = random.Random(f"minimath judge check {seed}").sample(range(len(kept)), drawn)
    used = [kept[i] for i in sorted(chosen)]
    place = {known: n for n, known in enumerate(dict.fromkeys(known for row in used for known in row))}
    pairs = dict.fromkeys((kind, place[good], place[bad]) for kind, good, bad in pairs_of(used))
    return KnownRows(list(place), list(pairs), report, len(rows), len({row[0].problem for row in rows}),
                     len(rows) - len(kept), drawn)


def pairs_of(rows: list[list[Known]]) -> Iterator[tuple[str, Known, Known]]:
    """Pair the solutions of a row, or sound with faulty ones of a problem: (kind, better, worse)."""
    single: dict[tuple[str, str], list[Known]] = {}
    for known, *worse in rows:
        if not worse:
            single.setdefault((known.source, known.problem), []).append(known)
        elif worse[0].kind != SOUND:
            yield worse[0].kind or worse[0].source, known, worse[0]
    for of_one in single.values():
        for good in (known for known in of_one if known.kind == SOUND):
            yield from ((bad.kind, good, bad) for bad in of_one if bad.kind != SOUND)


# ---- rows; all raise BadRow

def solutions_of(row: Columns, source: str) -> list[Known]:
    """Read one row: a labelled solution, or a better and a worse one."""
    values = row.values
    first = next((name for name, second in SHAPES.items() if values.get(name) is not None
                  and values.get(second) is not None), "")
    if not first:
        near = "; ".join(f"{name[:60]}{said}" for name in list(values)[:12]
                         if (said := did_you_mean(name[:60], [*SHAPES, *SHAPES.values()])))
        raise BadRow("no solutions to judge", "give problem with better and worse, with steps and label, or with "
                     f"original, modified and error_steps{near and '; '}{near}")
    name, value = row.take(COLUMNS["problem"])
    if value is None and isinstance(values[first], list):  # a chat that holds the question
        value = values[first][:-1]
    problem, second = written(value, name), SHAPES[first]
    if first == "steps":
        return [labelled(problem, steps_of(values, first), values, source)]
    stepwise = second.startswith("modified")
    good, bad = (steps_of(values, name) if stepwise else written(values[name], name) for name in (first, second))
    if good == bad:
        raise BadRow("both solutions are the same", f"{first} and {second} must differ")
    if stepwise:
        return [Known(problem, good, SOUND, -1, source), modified(problem, good, bad, values, source)]
    kind = plain_text(values.get("kind"), "kind") or PAIR
    return [Known(problem, split_steps(text), "", source=kind) for text in (good, bad)]


def written(value, name: str) -> str:
    """Read a text, or the last message of a chat."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not (text := plain_text(value, name)):
        raise BadRow(f"empty {name}", "fill it in or delete the row")
    return text


def steps_of(values: dict, name: str) -> tuple[str, ...]:
    """Read a list of steps, a line each."""
    steps = values[name]
    if not isinstance(steps, list) or not steps:
        raise BadRow(f"{name} is no list of steps", 'write ["first step", "second step"]')
    texts = [plain_text(step, f"a step of {name}") for step in steps]
    if "" in texts:
        raise BadRow(f"an empty step in {name}", f"step {texts.index('') + 1} of {len(texts)}: fill it in or leave it "
                     "out, and count the label again")
    return *(text + "\n" for text in texts[:-1]), texts[-1]


def place_of(value, name: str, least: int, most: int) -> int:
    """Read a step's number."""
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    if type(value) is not int:
        raise BadRow(f"{name} is no whole number", f"{type(value).__name__} instead of {least} to {most}")
    if not least <= value <= most:
        raise BadRow(f"{name} out of range", f"{str(value)[:20]}, and the steps go from {least} to {most}")
    return value


def labelled(problem: str, steps: tuple[str, ...], values: dict, source: str) -> Known:
    """Make a solution of ProcessBench's columns; arXiv 2412.06559."""
    label, right = place_of(values["label"], "label", -1, len(steps) - 1), values.get("final_answer_correct")
    if right is not None and not isinstance(right, bool):
        raise BadRow("final_answer_correct has the wrong type", f"{type(right).__name__} instead of true or false")
    if label == -1 and right is False:
        raise BadRow("label -1 with a wrong answer", "a wrong answer comes of a wrong step: give its index")
    kind = SOUND if label == -1 else {True: HIDDEN, False: WRONG, None: UNREAD}[right]
    return Known(problem, steps, kind, label, source)


def modified(problem: str, original: tuple[str, ...], steps: tuple[str, ...], values: dict, source: str) -> Known:
    """Make the second solution of PRMBench's columns; arXiv 2501.03124.

    Without error_steps it is sound, as in its class of multiple solutions."""
    marks = values.get("error_steps")
    if not isinstance(marks, list):
        raise BadRow("error_steps is no list", "give the numbers of the wrong steps of modified, from 1")
    marks = [place_of(mark, "error_steps", 1, len(steps)) for mark in marks]
    fault = plain_text(values.get("class") or values.get("classification"), "class")
    answers = [extract_answer("".join(each)) for each in (original, steps)]
    kind = SOUND if not marks else NEEDLESS if fault.startswith("redund") else UNREAD if None in answers else \
        HIDDEN if same(*answers) else WRONG
    return Known(problem, steps, kind, {SOUND: -1, NEEDLESS: None}.get(kind, min(marks, default=0) - 1), source)
