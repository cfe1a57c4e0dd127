"""Read metrics.jsonl."""
import contextlib
import json
from pathlib import Path


def read_metrics(path: Path) -> list[dict]:
    """Read a metrics.jsonl; what a kill left of a line is skipped. Raises OSError."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # other line ends may be text
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def series(rows: list[dict], name: str) -> list[tuple]:
    """Collect the numbers of one name as points of step and value, by step."""
    return sorted({row["step"]: row[name] for row in rows if isinstance(row.get(name), (int, float))}.items())
