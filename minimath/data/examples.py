"""Load examples, and say which rows are refused and why.

A bad row is skipped, counted and named by its place with the reason and the fix; `strict` makes it fatal. Rows with an
id or a problem seen before are kept and counted as a note. So are columns that hold something and are not read."""
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from minimath.config.schema import DataOptions
from minimath.core.errors import UserError
from minimath.data.readers import BadRow, rows_of
from minimath.data.rows import Columns, Example, to_example

REPORTED_ROWS, REPORTED_CHARS = 20, 600


@dataclass
class DataReport:
    """What a load kept and skipped."""
    kept: int = 0
    skipped: Counter = field(default_factory=Counter)    # by reason
    rows: list[str] = field(default_factory=list)        # the first 20: "place: reason; fix"
    notes: Counter = field(default_factory=Counter)      # what was kept but is worth knowing
    unread: Counter = field(default_factory=Counter)     # columns that hold something, in rows that were kept

    def refuse(self, where: str, bad: BadRow, strict: bool) -> None:
        """Count a row that is skipped, or under strict raise UserError."""
        line = f"{where}: {_shown(f'{bad.reason}; {bad.fix}')}"
        if strict:
            raise UserError(f"{line} (strict=true: a bad row stops the run)")
        self.skipped[bad.reason] += 1
        self.rows = [*self.rows, line][:REPORTED_ROWS]


def load_examples(options: DataOptions | str | Path | list, *,
                  need: Iterable[str] = ()) -> tuple[list[Example], DataReport]:
    """Load the examples of options.source, or of a source alone; at most options.limit, 0: all.

    need: what a row must have besides its problem, of "solution" (SFT) and "answer" (RL, evaluation). Raises UserError:
    nothing there, no row kept, a spoiled file, or with options.strict the first bad row."""
    if not isinstance(options, DataOptions):
        options = DataOptions(source=options if isinstance(options, list) else str(options))
    report, examples, seen = DataReport(), [], set()
    for where, row in rows_of(options.source, options.split):
        try:
            made = to_example(columns := Columns(row), where, need)
        except BadRow as bad:
            report.refuse(where, bad, options.strict)
            continue
        for key in ("id", made.id), ("problem", made.problem):
            if key[1] and key in seen:
                report.notes[f"repeated {key[0]}"] += 1
            seen.add(key)
        report.unread.update(columns.unread())
        examples.append(made)
        if len(examples) == options.limit:
            break
    report.kept = len(examples)
    if not examples:
        name = "data" if isinstance(options.source, list) else options.source
        raise UserError(f"{name}: no usable row. " + (describe_report(report) or "The data set is empty; "
                        "give rows with " + " and ".join(("problem", *need))))
    return examples, report


def hash_of(examples: list[Example]) -> str:
    """Hash what examples teach and ask, wherever they stand; "" without one."""
    digest = hashlib.sha256()
    for each in examples:
        digest.update(json.dumps([each.problem, each.solution, each.answer, each.messages], default=str).encode())
    return digest.hexdigest() if examples else ""


def describe_report(report: DataReport) -> str:
    """Return the report as a few lines of text; "" when there is nothing to tell."""
    skipped = ", ".join(f"{count} x {reason}" for reason, count in report.skipped.most_common())
    notes = ", ".join(f"{count} x {note}" for note, count in report.notes.items())
    unread = ", ".join(f"{_shown(name)} ({count} rows)" for name, count in report.unread.most_common(20))
    lines = [skipped and f"{report.kept} rows kept, {report.skipped.total()} skipped: {skipped}",
             *(f"  {row}" for row in report.rows[:5]), notes and f"kept, but note: {notes}",
             unread and f"columns that are not read: {unread}"]
    return "\n".join(filter(None, lines))


def _shown(text: str) -> str:
    """Cut a part of a row for a message, and escape what no terminal shows."""
    text = text if len(text) <= REPORTED_CHARS else text[:REPORTED_CHARS] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
