"""What a run leaves behind while it goes: metrics.jsonl, samples.jsonl, environment.json, and lines for the reader.

On a terminal rich draws a live progress bar; elsewhere it comes as plain lines. All else is the same text on both.
"""
import contextlib
import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from minimath.core import dist
from minimath.core.errors import UserError
from minimath.core.files import write_whole
from minimath.core.run_folder import ENVIRONMENT, METRICS, SAMPLES, TRACKED_AS
from minimath.core.text import comma_list, mask

PLAIN_SECONDS = 10.0  # pause between progress lines where there is no terminal
SHOWN_CHARS = 2000  # of a completion; samples.jsonl has it whole
PACKAGES = ("minimath", "torch", "triton", "numpy", "transformers", "peft", "bitsandbytes", "tokenizers",
            "safetensors", "datasets", "math-verify")


class RunLog(contextlib.AbstractContextManager):
    """Logs one run: a context manager, or close it."""

    def __init__(self, run_dir, title: str, trackers: str = "", *, stream=None):
        """Make the run folder, write environment.json and start the trackers.

        stream: where lines go, default standard output. UserError: not writable, tracker missing."""
        self.run_dir, self.stream, self.trackers, self.console = Path(run_dir), stream or sys.stdout, {}, None
        self.silent = not dist.is_main()  # of several processes the first one writes and prints
        if self.silent:
            return
        with contextlib.suppress(AttributeError, ValueError):
            self.stream.reconfigure(errors="replace")  # an ASCII terminal must not stop a run
        self.console = Console(file=self.stream, emoji=False) if self.stream.isatty() else None
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"title": title, **environment()}, indent=1)
            (self.run_dir / ENVIRONMENT).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write to {run_dir}: {error.strerror}; choose another out=") from None
        self.trackers = {name: start_tracker(name, self.run_dir) for name in comma_list(trackers)}
        self.say(f"{title} -> {self.run_dir}")

    def say(self, text: str) -> None:
        """Print a text, with control characters as '?'."""
        if self.console:
            self.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
        elif not self.silent:
            print(printable(text), file=self.stream, flush=True)

    def show(self, title: str, text: str) -> None:
        """Print a long text, such as a completion, set apart and without its middle."""
        half, left_out = SHOWN_CHARS // 2, len(text) - SHOWN_CHARS
        if left_out > 0:
            text = f"{text[:half]}\n... {left_out} characters ...\n{text[-half:]}"
        self.say(f"{title}:\n{textwrap.indent(text, '    ')}")

    def metrics(self, step: int, **numbers) -> None:
        """Append one record to metrics.jsonl and hand its numbers to the trackers."""
        record = clean(numbers)
        self.append(METRICS, {"step": step, **record})
        shown = {key: value for key, value in record.items() if isinstance(value, (int, float))}
        for name, (log, _) in list(self.trackers.items()):
            self.try_tracker(name, log, step, shown)

    def sample(self, record: dict) -> None:
        """Append one record, which holds its `step`, to samples.jsonl."""
        self.append(SAMPLES, clean(record))

    def append(self, name: str, record: dict) -> None:
        if self.silent:
            return
        # Opened each time: truncate_metrics replaces the file, and an open handle would go on in the old one.
        try:
            with open(self.run_dir / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.run_dir / name}: {error.strerror}; free some space, then go on with "
                            "resume=true") from None

    def table(self, title: str, columns: list[str], rows: list[list]) -> None:
        """Print a table; columns of numbers are set right."""
        cells = [[name, *map(fmt, column)] for name, column in zip(columns, zip(*rows))]
        for column, values in zip(cells, zip(*rows)):
            width = max(map(len, column))
            right = all(isinstance(value, (int, float)) for value in values)
            column[:] = [cell.rjust(width) if right else cell.ljust(width) for cell in column]
            column.insert(1, "-" * width)
        self.say("\n".join([title, *("  ".join(line).rstrip() for line in zip(*cells))]))

    @contextlib.contextmanager
    def progress(self, total: int, what: str, done: int = 0) -> Iterator:
        """Yield advance, which counts n more of `total` and shows the time left.

        done: what an earlier process did, which says nothing of this one's speed. On a terminal a bar, elsewhere a line
        every PLAIN_SECONDS."""
        start = said = time.monotonic()
        before, reported, last = done, done, {}
        bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                       TextColumn("{task.fields[note]}", markup=False), console=self.console, disable=not self.console,
                       speed_estimate_period=0)  # of which rich would keep up to 1,000 samples; the note has our own
        with bar:
            task = bar.add_task(what, total=total, completed=done, note="")

            def advance(n: int = 1, /, **shown) -> None:
                nonlocal done, said, reported
                done += n
                last.update(shown)  # a loop may count every step and measure only some
                now = time.monotonic()
                note = progress_note(now - start, done - before, total - before, last)
                bar.update(task, completed=done, note=note)
                if not self.console and (now - said >= PLAIN_SECONDS or reported < done >= total):
                    said, reported = now, done
                    self.say(f"{what} {done}/{total}, {note}")
            yield advance

    def try_tracker(self, name: str, action, *args) -> None:
        """Call a tracker; one that fails is given up with a warning."""
        try:
            action(*args)
        except Exception as error:
            self.trackers.pop(name, None)
            warnings.warn(f"{name} failed and is switched off for the rest of the run: {error}", stacklevel=3)

    def close(self, *_) -> None:
        for name, (_, finish) in list(self.trackers.items()):
            self.try_tracker(name, finish)
        self.trackers = {}

    __exit__ = close


def start_tracker(name: str, run_dir: Path):
    """Start a tracker: its log and finish functions, or UserError with the pip line."""
    try:
        tracker = importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError:
        raise UserError(f"trackers={name} needs a package that isn't installed: pip install {name}, or leave it out: "
                        "metrics.jsonl is written in any case") from None
    if name == "tensorboard":
        writer = tracker.SummaryWriter(str(run_dir / name))
        return lambda step, numbers: [writer.add_scalar(*item, step) for item in numbers.items()], writer.close
    path = run_dir / TRACKED_AS
    if not path.exists():  # other runs have folders of the same name: runs/a/sft, runs/b/sft
        write_whole(path, f"{run_dir.absolute().name}-{secrets.token_hex(4)}")
    own = path.read_text(encoding="utf-8")
    options = {"id": own, "dir": str(run_dir)} if name == "wandb" else {}  # after a resume the same curve
    try:
        run = tracker.init(project="minimath", name=own, resume="allow", **options)
    except Exception as error:  # nobody has logged in, say
        raise UserError(f"trackers={name} does not start ({type(error).__name__}: {error}); put that right, or leave "
                        "it out: metrics.jsonl is written in any case") from error
    return lambda step, numbers: run.log(numbers, step=step), run.finish


def truncate_metrics(run_dir, step: int) -> None:
    """Drop the records after `step`, and a line that a kill left unfinished.

    The files of a run that goes on equal those of an unbroken one then. UserError when they can't be written."""
    for path in (Path(run_dir) / METRICS, Path(run_dir) / SAMPLES):
        if not dist.is_main() or not path.is_file():
            continue
        kept = []
        # not splitlines: a text that a model wrote may hold U+2028 and other things that it takes for line ends
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError, AttributeError, TypeError):
                if json.loads(line).get("step", 0) <= step:
                    kept.append(line + "\n")
        write_whole(path, "".join(kept))


def clean(value):
    """Copy for json: tensors and numpy become numbers, NaN and infinities None."""
    text = json.dumps(value, default=lambda each: each.tolist() if hasattr(each, "tolist") else str(each))
    return json.loads(text, parse_constant=lambda _: None)


def environment() -> dict:
    """Versions, device, code commit and command line of this process, without secrets."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": [mask(word) for word in sys.argv],
            "commit": code_commit(), "python": platform.python_version(), "versions": versions,
            "platform": platform.platform(), "cpus": os.cpu_count(), "torch_threads": torch.get_num_threads(),
            "gpus": gpus, "cuda": torch.version.cuda, "hip": torch.version.hip}


def code_commit() -> str | None:
    """Find the commit of this source tree, "+changes" if any; None from a wheel."""
    root = Path(__file__).resolve().parents[2]
    words = ["git", "-C", root, "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if (root / ".git").exists():
            return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return None


def progress_note(elapsed_s: float, done: int, total: int, shown: dict) -> str:
    """"1 min 20 s, 4 min left, 1.3 GiB, loss=0.52"."""
    parts = [fmt_duration(elapsed_s)]
    if 0 < done < total:
        parts.append(f"{fmt_duration(elapsed_s / done * (total - done))} left")
    if taken := memory_taken():
        parts.append(f"{taken / 2**30:.1f} GiB")
    return ", ".join(parts + [f"{key}={fmt(value)}" for key, value in shown.items()])


def memory_taken() -> int:
    """Count bytes: a used card's peak, else the resident set; 0 when unknown."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 0


def printable(text: str) -> str:
    """Control characters, which a model may have written, as '?'."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "?", text)


def fmt(value) -> str:
    """Shorten a number or cell: 3 to 4 significant digits, NaN as '-'."""
    if hasattr(value, "item"):
        value = value.item()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"
    return str(value)


def fmt_duration(seconds: float) -> str:
    """"7 s", "3 min 20 s", "1 h 05 min"."""
    minutes, s = divmod(round(seconds), 60)
    hours, min_of_hour = divmod(minutes, 60)
    if hours:
        return f"{hours} h {min_of_hour:02d} min"
    return f"{minutes} min {s:02d} s" if minutes else f"{s} s"
