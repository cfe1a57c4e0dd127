"""Faults tried, survived and lost: python -m tests.faults [--full] [TOPIC ...] [--out FILE.json]

Without --full, the short part that CI runs. Exit status 1 when anything was lost.
"""
import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "helpers"), str(HERE.parents[1])]  # as pytest has it
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from harness import TOPICS, Tally, tallies_of  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.split("\n")[0])
    parser.add_argument("topics", nargs="*", metavar="TOPIC", help=f"of {', '.join(TOPICS)}; default: all")
    parser.add_argument("--full", action="store_true", help="every case, not the short part that CI runs")
    parser.add_argument("--out", type=Path, help="also write the counts to this json file")
    options = parser.parse_args()
    if unknown := set(options.topics) - set(TOPICS):
        parser.error(f"unknown topics {', '.join(sorted(unknown))}; there are {', '.join(TOPICS)}")
    counts: dict[str, list[Tally]] = {}
    with tempfile.TemporaryDirectory(prefix="minimath-faults-") as cache:
        os.environ["MINIMATH_CACHE"] = cache  # not in the user's home
        for topic in options.topics or TOPICS:
            counts[topic] = run_topic(topic, options.full)
            if options.out:  # after each: hours of counting should not hang on the last topic
                rows = ",\n".join(json.dumps(as_row(topic, t)) for topic, tallies in counts.items() for t in tallies)
                options.out.write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    print_table(counts)
    return 1 if any(t.lost for tallies in counts.values() for t in tallies) else 0


def run_topic(topic: str, full: bool) -> list[Tally]:
    """The counts of one topic; one that raises counts as one thing lost, and the others go on."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"minimath-{topic}-") as folder:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # what the runs say would bury the counts
                tallies = tallies_of(topic, full, Path(folder))
        except Exception as error:
            tallies = [Tally(topic, 1, [f"{type(error).__name__}: {error}"])]
    for tally in tallies:
        print(f"{tally.case}: {tally.survived} of {tally.tried}", *tally.lost[:5], sep="\n    lost: ", flush=True)
    print(f"    {topic}: {time.monotonic() - started:.0f} s", flush=True)
    return tallies


def as_row(topic: str, tally: Tally) -> dict:
    return {"topic": topic, "case": tally.case, "tried": tally.tried, "survived": tally.survived, "lost": tally.lost}


def print_table(counts: dict[str, list[Tally]]) -> None:
    """One row per topic: its cases have been printed as they ended."""
    from rich.console import Console
    from rich.table import Table
    table = Table("topic", "cases")
    for name in ("tried", "survived", "lost"):
        table.add_column(name, justify="right")
    every = [t for tallies in counts.values() for t in tallies]
    for topic, tallies in (counts | {"all": every}).items():
        numbers = (len(tallies), sum(t.tried for t in tallies), sum(t.survived for t in tallies),
                   sum(len(t.lost) for t in tallies))
        table.add_row(topic, *(f"{n:,}" for n in numbers), style="bold" if tallies is every else None)
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())
