"""Read metrics.jsonl."""
import contextlib
import json
import math
from pathlib import Path


def read_metrics(path: Path) -> list[dict]:
    """Read a metrics.jsonl; what a kill left of a line is skipped. Raises OSError."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # other line ends may be text
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def series(rows: list[dict], name: str, scale: float = 1.0) -> list[tuple]:
    """Collect the finite numbers of one name as points of step and scaled value, by step."""
    values = {}
    for row in rows:
        value = row.get(name)
        if isinstance(value, (int, float)) and math.isfinite(value) and isinstance(row.get("step"), int):
            values[row["step"]] = scale * value
    return sorted(values.items())
