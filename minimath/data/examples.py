"""Rows to examples: what a problem, its solution and its answer are called, which rows are refused and why.

Accepted row shapes (`data_format`; "auto" takes the first that fits):
    messages           messages: [{role, content}, ...] with roles system, user, assistant
    prompt_completion  prompt + completion, each a text or a list of messages
    question_answer    question + answer; an answer with "#### 72" (GSM8K) is split in solution and answer,
                       one with \\boxed, a line break or more than 8 words is a worked solution, any other
                       a final answer
    problem_solution   problem + solution or generation (+ answer; else taken from "#### x" or \\boxed{x})
The authors' Fast-Math-R1-SFT and -GRPO have the last. With "auto" a list of generations (OpenR1-Math) goes before all:
the shortest of those that correctness_math_verify calls right and is_reasoning_complete whole, as in the paper.
A bad row is skipped, counted and named as file:line with the reason and the fix; `strict` makes it fatal.
Rows with an id or a problem seen before are kept (resampled sets repeat them) and counted as a note.
"""
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from minimath.core.errors import UserError
from minimath.core.text import did_you_mean
from minimath.data.readers import SUFFIXES, BadRow, Row, read_rows

COLUMNS = {
    "problem": ("problem", "question", "prompt", "instruction"),
    "solution": ("solution", "completion", "response", "output", "generation", "generations"),
    "answer": ("answer", "final_answer", "expected_answer"),
}
VERDICTS, WHOLE = ("correctness_math_verify", "correctness_llama"), ("is_reasoning_complete",)  # first there counts
FORMATS = ("auto", "messages", "prompt_completion", "question_answer", "problem_solution")
ROLES = ("system", "user", "assistant")
REPORTED_ROWS, REPORTED_CHARS = 20, 600
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/\w[\w.-]*(:\w[\w.-]*)?")
ANNOTATION = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator marks


@dataclass
class Example:
    """One problem. `messages` replaces problem and solution for chat rows; `where` is file:line."""
    problem: str
    solution: str = ""
    answer: str = ""
    id: str = ""
    messages: list[dict] | None = None
    where: str = ""


@dataclass
class DataReport:
    """What a load kept and skipped. skipped: reason -> count; rows: the first 20 as "file:line: reason;
    fix"; notes: what was kept but is worth knowing -> count."""
    kept: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)


def load_examples(data: str | Path, *, split: str = "train", limit: int = 0, strict: bool = False,
                  need: tuple[str, ...] = ("solution",), data_format: str = "auto"
                  ) -> tuple[list[Example], DataReport]:
    """Load a file, a folder of files, or a hub data set "owner/name[:config]".

    split: of a hub data set; of a folder, the files with it in their name, if any. limit: stop after this
    many kept rows (0: all). need: what a row must have, of "solution" (SFT) and "answer" (RL, evaluation).
    Raises UserError: nothing there, no row kept, a spoiled file, or with strict the first bad row.
    """
    if data_format not in FORMATS:
        near = did_you_mean(data_format, FORMATS)
        raise UserError(f"data_format={data_format!r}{near}; use {', '.join(FORMATS)}")
    report, examples = DataReport(), []
    ids: set[str] = set()
    problems: set[str] = set()
    for where, row in _rows(str(data), split):
        made = row if isinstance(row, BadRow) else to_example(row, where, need, data_format)
        if isinstance(made, BadRow):
            line = f"{where}: {_shown(f'{made.reason}; {made.fix}')}"
            if strict:
                raise UserError(f"{line} (strict=true: a bad row stops the run)")
            report.skipped[made.reason] = report.skipped.get(made.reason, 0) + 1
            report.rows = [*report.rows, line][:REPORTED_ROWS]
            continue
        for seen, value, note in (ids, made.id, "repeated id"), (problems, made.problem, "repeated problem"):
            if value and value in seen:
                report.notes[note] = report.notes.get(note, 0) + 1
            seen.add(value)
        examples.append(made)
        if limit and len(examples) >= limit:
            break
    report.kept = len(examples)
    if not examples:
        raise UserError(f"{data}: no usable row. " + (describe_report(report) or "The data set is empty; "
                        "give rows with " + " and ".join(("problem", *need))))
    return examples, report


def describe_report(report: DataReport) -> str:
    """The report as text of a few lines; empty when nothing was skipped and there is nothing to note."""
    lines = []
    if report.skipped:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in
                            sorted(report.skipped.items(), key=lambda item: -item[1]))
        lines.append(f"{report.kept} rows kept, {sum(report.skipped.values())} skipped: {reasons}")
        lines += [f"  {row}" for row in report.rows[:5]]
    if report.notes:
        notes = ", ".join(f"{count} x {note}" for note, count in report.notes.items())
        lines.append(f"kept, but note: {notes}")
    return "\n".join(lines)


# ---- where the rows come from

def _rows(data: str, split: str) -> Iterator[Row]:
    path = Path(data).expanduser()
    if not data:
        raise UserError("no data given; set data= to a file, a folder or a data set name owner/name")
    if os.path.isdir(path):  # unlike is_dir, also for a name that is too long
        files = sorted(f for f in path.iterdir() if f.is_file() and f.suffix.lower() in SUFFIXES)
        files = [f for f in files if split in re.split(r"[^a-z0-9]+", f.stem.lower())] or files
        if not files:
            raise UserError(f"{path}: no data files in this folder; expected {', '.join(SUFFIXES)}")
        for file in files:
            yield from read_rows(file)
    elif os.path.exists(path):
        yield from read_rows(path)
    elif HUB_NAME.fullmatch(data) and path.suffix.lower() not in SUFFIXES and not os.path.isdir(path.parent):
        yield from _hub_rows(data, split)
    else:
        raise UserError(_missing(data, path))


def _missing(data: str, path: Path) -> str:
    folder = path.parent
    while not os.path.isdir(folder):
        folder, path = folder.parent, folder  # the first part of the path that does not exist
    there = sorted(p.name for p in folder.iterdir() if p.is_dir() or p.suffix.lower() in SUFFIXES)
    near = did_you_mean(path.name, there)
    listing = f"; {folder} has {', '.join(there[:8])}" if there and not near else ""
    return f"data={data}: {path} does not exist{near}{listing}"


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    try:
        import datasets  # seconds to import: only when a hub name is given
    except ImportError:
        raise UserError(f"data={name}: hub data sets need a package that isn't installed: pip install datasets, or "
                        "download the set's files and give their folder") from None
    repo, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(repo, config or None, split=split)
    except Exception as error:  # hub, network, disk and format errors share no other base
        text = " ".join(str(error).split())[:300]
        raise UserError(f"data={name}: is no file here, and as a hub data set (split {split!r}) it can't be "
                        f"loaded: {type(error).__name__}: {text}. Check the name and the network") from error
    for number, row in enumerate(rows, 1):
        yield f"{name}:{split}:row {number}", row


# ---- a row to an example

def to_example(row: dict, where: str, need: Iterable[str], data_format: str = "auto") -> "Example | BadRow":
    """One row in any accepted shape; BadRow with the reason when it can't be used."""
    best = _best_generation(row) if data_format == "auto" else None
    if isinstance(best, BadRow) and "solution" in need:
        return best
    if best is not None:
        row = {name: value for name, value in row.items() if name not in ("messages", *COLUMNS["solution"])}
        row["solution"] = "" if isinstance(best, BadRow) else best
    chat = _chat_messages(row, data_format)
    if isinstance(chat, BadRow):
        return chat
    example = _from_messages(row, chat, where) if chat else _from_columns(row, where, data_format)
    if isinstance(example, BadRow):
        return example
    if not example.answer and example.solution:
        example.answer = _final_answer(example.solution)
    if "solution" in need and not example.solution:
        return BadRow("no solution", "add a worked solution (column solution, completion or messages)")
    if "answer" in need and not example.answer:
        return BadRow("no answer", "add a column answer, or end the solution with \\boxed{...} or #### ...")
    return example


def _best_generation(row: dict) -> "str | BadRow | None":
    """The shortest right one of a list of generations; None for a row without such a list."""
    name = next((n for n in ("generations", "generation") if isinstance(row.get(n), list)), None)
    if name is None:
        return None
    verdicts, whole = ([row[n] for n in names if isinstance(row.get(n), list)] for names in (VERDICTS, WHOLE))
    if not verdicts:
        return BadRow(f"{name} without verdicts", f"add {VERDICTS[0]}, a list of true and false, or keep one; minimath "
                      "sample checks answers and keeps the shortest right solution")
    right = [text for text, *marks in zip(row[name], verdicts[0], *whole) if isinstance(text, str) and all(marks)]
    no = BadRow("no right generation", f"none of {len(row[name])} is marked right and whole: drop it, or sample more")
    return min(right, key=len) if right else no


def _final_answer(solution: str) -> str:
    final = hashes_answer(solution)
    if final:
        return final
    from minimath.grading.answer import extract_answer  # only here: answer.py is heavier than a reader needs
    return extract_answer(solution, strict=True) or ""


def hashes_answer(solution: str) -> str:
    """What follows the last "####" (GSM8K), "" when that is not the end: then it opened a Markdown heading."""
    final = solution.rsplit("####", 1)[1].strip() if "####" in solution else ""
    return "" if "\n" in final else final


def _text(value, name: str, *, number: bool = False) -> "str | BadRow":
    """A stripped text; None is empty. number: ints and floats (answers often are) become text, NaN is empty."""
    if value is None or (number and value != value):
        return ""
    if number and isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        if abs(value) == float("inf"):
            return BadRow(f"{name} is infinite", "write it as text, \\infty")
        return str(int(value)) if abs(value) < 1e22 and value == int(value) else str(value)
    if not isinstance(value, str):
        return BadRow(f"{name} has the wrong type", f"{type(value).__name__} instead of text")
    if "\0" in value:
        return BadRow("NUL character", f"remove it from {name}")
    if any("\ud800" <= c <= "\udfff" for c in value):
        return BadRow("half of a surrogate pair", f"{name} was cut inside an emoji; write it again")
    # a text of nothing but zero-width and control characters is empty too
    return "" if all(c.isspace() or unicodedata.category(c) in ("Cf", "Cc") for c in value) else value.strip()


def _shown(text: str) -> str:
    """A part of a row as a message can hold it: cut, and what no terminal shows or encodes is escaped."""
    text = text if len(text) <= REPORTED_CHARS else text[:REPORTED_CHARS] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _pick(row: dict, columns: tuple[str, ...]) -> tuple[str, object]:
    """(column, value) of the first of `columns` that the row has; ("", None) without one."""
    return next(((c, row[c]) for c in columns if row.get(c) is not None), ("", None))


def _from_columns(row: dict, where: str, data_format: str) -> "Example | BadRow":
    if data_format == "messages":
        return BadRow("no messages", f"data_format=messages, but the columns are {_names(row)}")
    columns = dict(COLUMNS)
    if data_format != "auto":
        columns["problem"] = (data_format.split("_")[0],)
    if not any(c in row for c in columns["problem"]):
        return _unknown_columns(row)
    values = {}
    for name in columns:
        column, value = _pick(row, columns[name])
        values[name] = _text(value, column, number=name == "answer")
        if isinstance(values[name], BadRow):
            return values[name]
    if not values["problem"]:
        return BadRow("empty problem", "fill it in or delete the row")
    return Example(**_split_answer(values), id=_identity(row), where=where)


def _split_answer(values: dict[str, str]) -> dict[str, str]:
    """Sort out what a column `answer` holds (see the module's docstring)."""
    solution, answer = values["solution"], values["answer"]
    worked = "####" in answer or "\\boxed" in answer or "\n" in answer or len(answer.split()) > 8
    if not solution and worked:
        solution, answer = answer, ""
    if "####" in answer:
        answer = answer.rsplit("####", 1)[1].strip()
    if "####" in solution:
        body, final = solution.rsplit("####", 1)
        if body.strip() and final.strip() and "\n" not in final.strip():
            solution, answer = ANNOTATION.sub("", body).strip(), answer or final.strip()
    return {"problem": values["problem"], "solution": solution, "answer": answer}


def _identity(row: dict) -> str:
    name = row.get("id")
    return str(name).encode(errors="backslashreplace").decode() if isinstance(name, (str, int)) else ""


def _names(row: dict) -> str:
    return ", ".join(str(name)[:60] for name in list(row)[:12]) or "none"


def _unknown_columns(row: dict) -> BadRow:
    accepted = [c for names in COLUMNS.values() for c in names] + ["messages"]
    near = [f"{c}{did_you_mean(c, accepted)}" for c in map(str, list(row)[:60])
            if len(c) <= 60 and did_you_mean(c, accepted)]
    hint = f"; {', '.join(near)}" if near else f"; accepted are {', '.join(accepted)}"
    nested = next((str(k)[:60] for k, v in row.items() if isinstance(v, dict) and set(v) & set(accepted)), None)
    hint = f"; the row is nested: move the content of {nested!r} up" if nested is not None else hint
    return BadRow("no column with the problem", f"columns are {_names(row)}{hint}")


# ---- chat rows

def _chat_messages(row: dict, data_format: str) -> "list[dict] | BadRow | None":
    """Clean messages of a chat row; None when the row has another shape."""
    raw = row.get("messages")
    if raw is None and isinstance(row.get("prompt"), list) and data_format in ("auto", "prompt_completion"):
        done = row.get("completion")
        raw = [*row["prompt"], *(done if isinstance(done, list) else
                                 [{"role": "assistant", "content": done}] if done is not None else [])]
    if raw is None or data_format not in ("auto", "messages", "prompt_completion"):
        return None
    if not isinstance(raw, list) or not raw:
        return BadRow("malformed messages", 'write a list of {"role": ..., "content": ...}')
    messages: list[dict] = []
    for number, message in enumerate(raw, 1):
        clean = _message(message, number, messages)
        if isinstance(clean, BadRow):
            return clean
        messages.append(clean)
    return messages


def _message(message, number: int, before: list[dict]) -> "dict | BadRow":
    bad = "malformed messages"
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        return BadRow(bad, f"message {number} needs role and content")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        role = str(role)[:60]
        return BadRow(bad, f"message {number} has role {role!r}{did_you_mean(role, ROLES)}; use {', '.join(ROLES)}")
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(p["text"] for p in content)  # the form with parts that hub data sets use
    text = _text(content, f"content of message {number}")
    if isinstance(text, BadRow):
        return text
    if not text:
        return BadRow(bad, f"message {number} is empty")
    last = before[-1]["role"] if before else "start"
    allowed = {"start": ("system", "user"), "user": ("assistant",)}.get(last, ("user",))
    if role not in allowed:
        return BadRow(bad, f"message {number} is from {role} after {last}; system may come first, then user "
                           "and assistant take turns")
    return {"role": role, "content": text}


def _from_messages(row: dict, messages: list[dict], where: str) -> Example | BadRow:
    users = [m["content"] for m in messages if m["role"] == "user"]
    if not users:
        return BadRow("malformed messages", "no message from user")
    answer = _text(_pick(row, COLUMNS["answer"])[1], "answer", number=True)
    if isinstance(answer, BadRow):
        return answer
    answer = answer.rsplit("####", 1)[-1].strip()
    if messages[-1]["role"] == "assistant":
        return Example(users[-1], messages[-1]["content"], answer, _identity(row), messages, where)
    return Example(users[-1], "", answer, _identity(row), messages, where)
