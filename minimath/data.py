"""Examples and where they come from."""
from dataclasses import dataclass, field


@dataclass
class Example:
    """One problem. `messages` replaces problem and solution for multi-turn rows; `where` is file:line for messages."""
    problem: str
    solution: str = ""
    answer: str = ""
    id: str = ""
    messages: list[dict] | None = None
    where: str = ""


@dataclass
class DataReport:
    """What a load kept and skipped. skipped: reason -> count; rows: the first 20 as "file:line: reason; fix"."""
    kept: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)
