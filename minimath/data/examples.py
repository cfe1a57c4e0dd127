"""Turn rows into examples, and say which rows are refused and why.

The shape is read off a row's columns; the first of these that fits counts:
    generations        problem + a list generations or generation (OpenR1-Math): the shortest of those that
                       correctness_math_verify calls right and is_reasoning_complete whole, as in the paper
    messages           messages: [{role, content}, ...] with roles system, user, assistant
    prompt, completion each a text or a list of messages
    question, answer   an answer with "#### 72" (GSM8K) is split in solution and answer, one with \\boxed, a line break
                       or more than 8 words is a worked solution, any other a final answer
    problem, solution  or generation (+ answer; else from "#### x" or \\boxed{x}), as in Fast-Math-R1-SFT and -GRPO
A bad row is skipped, counted and named by its place with the reason and the fix; `strict` makes it fatal. Rows with an
id or a problem seen before are kept and counted as a note.
"""
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import Decimal

from minimath.config.schema import DataOptions
from minimath.core.errors import UserError
from minimath.core.text import did_you_mean
from minimath.data.readers import BadRow, rows_of
from minimath.grading.answer import extract_answer

COLUMNS = {
    "problem": ("problem", "question", "prompt", "instruction"),
    "solution": ("solution", "completion", "response", "output", "generation", "generations"),
    "answer": ("answer", "final_answer", "expected_answer"),
}
VERDICTS, WHOLE = ("correctness_math_verify", "correctness_llama"), ("is_reasoning_complete",)  # first there counts
ROLES = ("system", "user", "assistant")
REPORTED_ROWS, REPORTED_CHARS = 20, 600
ANNOTATION = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator marks


@dataclass
class Example:
    """One problem; `messages` replaces problem and solution for chat rows."""
    problem: str
    solution: str = ""
    answer: str = ""
    id: str = ""
    messages: list[dict] | None = None
    where: str = ""  # the row's place


@dataclass
class DataReport:
    """What a load kept and skipped."""
    kept: int = 0
    skipped: Counter = field(default_factory=Counter)    # by reason
    rows: list[str] = field(default_factory=list)        # the first 20: "place: reason; fix"
    notes: Counter = field(default_factory=Counter)      # what was kept but is worth knowing


def load_examples(options: DataOptions, *, need: Iterable[str] = ()) -> tuple[list[Example], DataReport]:
    """Load the examples of options.source, at most options.limit if that is not 0.

    need: what a row must have besides its problem, of "solution" (SFT) and "answer" (RL, evaluation). Raises UserError:
    nothing there, no row kept, a spoiled file, or with options.strict the first bad row.
    """
    report, examples = DataReport(), []
    seen: set[tuple[str, str]] = set()
    for where, row in rows_of(options.source, options.split):
        made = row if isinstance(row, BadRow) else to_example(row, where, need)
        if isinstance(made, BadRow):
            line = f"{where}: {_shown(f'{made.reason}; {made.fix}')}"
            if options.strict:
                raise UserError(f"{line} (strict=true: a bad row stops the run)")
            report.skipped[made.reason] += 1
            report.rows = [*report.rows, line][:REPORTED_ROWS]
            continue
        for key in ("id", made.id), ("problem", made.problem):
            if key[1] and key in seen:
                report.notes[f"repeated {key[0]}"] += 1
            seen.add(key)
        examples.append(made)
        if len(examples) == options.limit:
            break
    report.kept = len(examples)
    if not examples:
        name = "data" if isinstance(options.source, list) else options.source
        raise UserError(f"{name}: no usable row. " + (describe_report(report) or "The data set is empty; "
                        "give rows with " + " and ".join(("problem", *need))))
    return examples, report


def describe_report(report: DataReport) -> str:
    """Return the report as a few lines of text; "" when there is nothing to tell."""
    lines = []
    if report.skipped:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in report.skipped.most_common())
        lines += [f"{report.kept} rows kept, {report.skipped.total()} skipped: {reasons}"]
        lines += [f"  {row}" for row in report.rows[:5]]
    if report.notes:
        lines.append("kept, but note: " + ", ".join(f"{count} x {note}" for note, count in report.notes.items()))
    return "\n".join(lines)


def _shown(text: str) -> str:
    """Cut a part of a row for a message, and escape what no terminal shows."""
    text = text if len(text) <= REPORTED_CHARS else text[:REPORTED_CHARS] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ---- a row to an example

def to_example(row: dict, where: str, need: Iterable[str]) -> Example | BadRow:
    """Make an example of a row in any accepted shape; BadRow when it can't be used."""
    try:
        row = _with_best_generation(row, "solution" in need)
        chat = _chat_messages(row)
        example = _from_messages(row, chat, where) if chat else _from_columns(row, where)
    except BadRow as bad:
        return bad
    if not example.answer and example.solution:
        example.answer = hashes_answer(example.solution) or extract_answer(example.solution, strict=True) or ""
    if "solution" in need and not example.solution:
        return BadRow("no solution", "add a worked solution (column solution, completion or messages)")
    if "answer" in need and not example.answer:
        return BadRow("no answer", "add a column answer, or end the solution with \\boxed{...} or #### ...")
    return example


def _with_best_generation(row: dict, needed: bool) -> dict:
    """Put the shortest correct one of a list of generations in the place of the list.

    Raises BadRow when there is none and it is needed.
    """
    name = next((n for n in ("generations", "generation") if isinstance(row.get(n), list)), None)
    if name is None:
        return row
    verdicts, whole = ([row[n] for n in names if isinstance(row.get(n), list)] for names in (VERDICTS, WHOLE))
    marked = zip(row[name], *verdicts[:1], *whole)
    right = [text for text, *marks in marked if isinstance(text, str) and all(marks)] if verdicts else []
    if needed and not verdicts:
        raise BadRow(f"{name} without verdicts", f"add {VERDICTS[0]}, a list of true and false, or keep one; minimath "
                     "sample checks answers and keeps the shortest right solution")
    if needed and not right:
        raise BadRow("no right generation", f"none of {len(row[name])} is right and whole: drop it, or sample more")
    others = {column: value for column, value in row.items() if column not in ("messages", *COLUMNS["solution"])}
    return others | {"solution": min(right, key=len, default="")}


def hashes_answer(solution: str) -> str:
    """Return what follows the last "####"; "" where it opened a Markdown heading."""
    final = solution.rsplit("####", 1)[1].strip() if "####" in solution else ""
    return "" if "\n" in final else final


def _text(value, name: str, *, number: bool = False) -> str:
    """Strip a text; None is empty. number: numbers become text, NaN is empty. Raises BadRow for anything else."""
    if value is None or (number and value != value):
        return ""
    if number and isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        if abs(value) == float("inf"):
            raise BadRow(f"{name} is infinite", "write it as text, \\infty")
        return str(int(value)) if abs(value) < 1e22 and value == int(value) else str(value)
    if not isinstance(value, str):
        raise BadRow(f"{name} has the wrong type", f"{type(value).__name__} instead of text")
    if "\0" in value:
        raise BadRow("NUL character", f"remove it from {name}")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise BadRow("half of a surrogate pair", f"{name} was cut inside an emoji; write it again")
    # a text of nothing but zero-width and control characters is empty too
    return "" if all(c.isspace() or unicodedata.category(c) in ("Cf", "Cc") for c in value) else value.strip()


def _pick(row: dict, name: str) -> tuple[str, object]:
    """Return the first column for `name` that the row has, and its value, or None."""
    return next(((c, row[c]) for c in COLUMNS[name] if row.get(c) is not None), (name, None))


def _from_columns(row: dict, where: str) -> Example:
    if not any(c in row for c in COLUMNS["problem"]):
        raise _unknown_columns(row)
    problem, solution, answer = (_text(value, column, number=name == "answer")
                                 for name in COLUMNS for column, value in [_pick(row, name)])
    if not problem:
        raise BadRow("empty problem", "fill it in or delete the row")
    return Example(problem, *_split_answer(solution, answer), _identity(row), where=where)


def _split_answer(solution: str, answer: str) -> tuple[str, str]:
    """Sort out what a column `answer` holds, as the module's docstring says."""
    worked = "####" in answer or "\\boxed" in answer or "\n" in answer or len(answer.split()) > 8
    if not solution and worked:
        solution, answer = answer, ""
    answer = answer.rsplit("####", 1)[-1].strip()
    body, final = solution.rsplit("####", 1)[0].strip(), hashes_answer(solution)
    return (ANNOTATION.sub("", body).strip(), answer or final) if body and final else (solution, answer)


def _identity(row: dict) -> str:
    name = row.get("id")
    return str(name).encode(errors="backslashreplace").decode() if isinstance(name, (str, int)) else ""


def _unknown_columns(row: dict) -> BadRow:
    accepted = [c for names in COLUMNS.values() for c in names] + ["messages"]
    near = {c: did_you_mean(c, accepted) for c in map(str, list(row)[:60]) if len(c) <= 60}
    nested = next((str(k)[:60] for k, v in row.items() if isinstance(v, dict) and set(v) & set(accepted)), None)
    if nested is not None:
        hint = f"the row is nested: move the content of {nested!r} up"
    else:
        hint = ", ".join(c + said for c, said in near.items() if said) or f"accepted are {', '.join(accepted)}"
    names = ", ".join(str(name)[:60] for name in list(row)[:12]) or "none"
    return BadRow("no column with the problem", f"columns are {names}; {hint}")


# ---- chat rows

def _chat_messages(row: dict) -> list[dict] | None:
    """Return the clean messages of a chat row; None when the row has another shape."""
    raw = row.get("messages")
    if raw is None and isinstance(row.get("prompt"), list):
        done = row.get("completion")
        if not isinstance(done, list):
            done = [] if done is None else [{"role": "assistant", "content": done}]
        raw = [*row["prompt"], *done]
    if raw is None:
        return None
    if not isinstance(raw, list) or not raw:
        raise BadRow("malformed messages", 'write a list of {"role": ..., "content": ...}')
    messages: list[dict] = []
    for number, message in enumerate(raw, 1):
        messages.append(_message(message, number, messages[-1]["role"] if messages else "start"))
    return messages


def _message(message, number: int, last: str) -> dict:
    bad = "malformed messages"
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise BadRow(bad, f"message {number} needs role and content")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        role = str(role)[:60]
        raise BadRow(bad, f"message {number} has role {role!r}{did_you_mean(role, ROLES)}; use {', '.join(ROLES)}")
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(p["text"] for p in content)  # the form with parts that hub data sets use
    text = _text(content, f"content of message {number}")
    if not text:
        raise BadRow(bad, f"message {number} is empty")
    if role not in {"start": ("system", "user"), "user": ("assistant",)}.get(last, ("user",)):
        raise BadRow(bad, f"message {number} is from {role} after {last}; system may come first, then user and "
                     "assistant take turns")
    return {"role": role, "content": text}


def _from_messages(row: dict, messages: list[dict], where: str) -> Example:
    users = [m["content"] for m in messages if m["role"] == "user"]
    if not users:
        raise BadRow("malformed messages", "no message from user")
    answer = _text(_pick(row, "answer")[1], "answer", number=True).rsplit("####", 1)[-1].strip()
    solution = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
    return Example(users[-1], solution, answer, _identity(row), messages, where)
