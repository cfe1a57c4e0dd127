"""What a run leaves behind while it goes: metrics.jsonl, samples.jsonl, environment.json, and lines for the
reader.

On a terminal rich draws tables and a live progress bar; elsewhere the same facts come as plain lines. The
files are written in both cases, one whole line per record, with NaN and infinities as null. After a resume,
`truncate_metrics` drops what the lost steps had written, so that the files equal those of an unbroken run.
"""
import contextlib
import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import torch

from minimath.core import dist
from minimath.core.credentials import mask
from minimath.core.errors import UserError
from minimath.core.run_folder import ENVIRONMENT, METRICS, SAMPLES
from minimath.core.text import comma_list

PLAIN_SECONDS = 10.0  # pause between progress lines where there is no terminal
SHOWN_CHARS = 2000  # of a completion; samples.jsonl has it whole
PACKAGES = ("minimath", "torch", "triton", "numpy", "transformers", "peft", "bitsandbytes", "tokenizers",
            "safetensors", "datasets", "math-verify")


class RunLog:
    """Log of one run. Usable in `with`; needs close() otherwise."""

    def __init__(self, run_dir, title: str, trackers: str = "", *, stream=None):
        """Make the run folder, write environment.json and start the trackers (comma list of wandb,
        tensorboard, trackio). stream: where lines go, default standard output. UserError: not writable,
        tracker missing."""
        self.run_dir, self.stream, self.trackers, self.console = Path(run_dir), stream or sys.stdout, {}, None
        self.silent = not dist.is_main()  # of several processes the first one writes and prints
        if self.silent:
            return
        with contextlib.suppress(AttributeError, ValueError):
            self.stream.reconfigure(errors="replace")  # an ASCII terminal must not stop a run
        if self.stream.isatty():
            from rich.console import Console
            self.console = Console(file=self.stream)
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"title": title, **environment()}, indent=1)
            (self.run_dir / ENVIRONMENT).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write to the run folder {run_dir}: {error.strerror}; "
                            "choose another out=") from None
        self.trackers = {name: start_tracker(name, self.run_dir) for name in comma_list(trackers)}
        self.say(f"{title} -> {self.run_dir}")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def say(self, text: str) -> None:
        """Print a text. Control characters, which a model may have written, are shown as '?'."""
        if self.silent:
            return
        text = printable(text)
        if self.console:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def show(self, title: str, text: str) -> None:
        """Print a text of several lines, such as a completion, set apart: a panel on a terminal, else an indented
        block. Of a long one the middle is left out."""
        if len(text) > SHOWN_CHARS:
            left_out = len(text) - SHOWN_CHARS
            text = f"{text[:SHOWN_CHARS // 2]}\n... {left_out} characters ...\n{text[-SHOWN_CHARS // 2:]}"
        if not self.console:
            return self.say(f"{title}:\n{textwrap.indent(printable(text), '    ')}")
        from rich.panel import Panel
        from rich.text import Text
        self.console.print(Panel(Text(printable(text)), title=Text(printable(title)), title_align="left"))

    def metrics(self, step: int, **numbers) -> None:
        """Append one record to metrics.jsonl and hand its numbers to the trackers."""
        record = clean({"step": step, **numbers})
        self.append(METRICS, record)
        shown = {key: value for key, value in record.items() if isinstance(value, (int, float))}
        shown.pop("step")
        for name, (log, _) in list(self.trackers.items()):
            self.try_tracker(name, lambda log=log: log(step, shown))

    def sample(self, record: dict) -> None:
        """Append one record (give it a `step`) to samples.jsonl."""
        self.append(SAMPLES, clean(record))

    def append(self, name: str, record: dict) -> None:
        if self.silent:
            return
        # Opened each time: truncate_metrics replaces the file, and an open handle would go on in the old one.
        try:
            with open(self.run_dir / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.run_dir / name}: {error.strerror}; free some space, then go "
                            "on with resume=true") from None

    def table(self, title: str, columns: list[str], rows: list[list]) -> None:
        """Print a table; numbers are set right."""
        cells = [[fmt(value) for value in row] for row in rows]
        right = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(columns))]
        if not self.console:
            return self.say(plain_table(title, columns, cells, right))
        from rich.table import Table
        from rich.text import Text
        table = Table(title=Text(title), title_justify="left")
        for name, is_right in zip(columns, right):
            table.add_column(Text(name), justify="right" if is_right else "left")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        self.console.print(table)

    @contextlib.contextmanager
    def progress(self, total: int, what: str, done: int = 0):
        """Yield advance(n=1, **shown): counts n more of `total` done and shows numbers beside the time left and the
        memory taken. done: what an earlier process did, which says nothing of this one's speed."""
        draw = self.draw_bar if self.console else self.draw_lines
        with draw(total, what, done) as advance:
            yield advance

    @contextlib.contextmanager
    def draw_bar(self, total: int, what: str, before: int):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                   TextColumn("{task.fields[note]}", markup=False))
        start, done, last = time.monotonic(), before, {}
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(what, total=total, completed=done, note="")

            def advance(n: int = 1, **shown) -> None:
                nonlocal done
                done += n
                last.update(shown)  # a loop may count every step and measure only some
                bar.update(task, completed=done, note=progress_note(start, done - before, total - before, last))
            yield advance

    @contextlib.contextmanager
    def draw_lines(self, total: int, what: str, before: int):
        start = said = time.monotonic()
        done, reported, last = before, before, {}

        def advance(n: int = 1, **shown) -> None:
            nonlocal done, said, reported
            done += n
            last.update(shown)
            now = time.monotonic()
            if now - said >= PLAIN_SECONDS or (done >= total and reported < done):
                said, reported = now, done
                self.say(f"{what} {done}/{total}, {progress_note(start, done - before, total - before, last)}")
        yield advance

    def try_tracker(self, name: str, action) -> None:
        """A tracker that fails (network, quota) is given up with a warning: the run goes on."""
        try:
            action()
        except Exception as error:
            self.trackers.pop(name, None)
            warnings.warn(f"{name} failed and is switched off for the rest of the run: {error}", stacklevel=3)

    def close(self) -> None:
        for name, (_, finish) in list(self.trackers.items()):
            self.try_tracker(name, finish)
        self.trackers = {}


def start_tracker(name: str, run_dir: Path):
    """(log(step, numbers), finish()) of a tracker; UserError with the pip line when it isn't installed."""
    module = {"tensorboard": "torch.utils.tensorboard"}.get(name, name)
    try:
        tracker = importlib.import_module(module)
    except ImportError:
        raise UserError(f"trackers={name} needs a package that isn't installed: pip install {name}, or leave "
                        "it out: metrics.jsonl is written in any case") from None
    if name == "tensorboard":
        writer = tracker.SummaryWriter(str(run_dir / "tensorboard"))
        return (lambda step, numbers: [writer.add_scalar(key, value, step) for key, value in numbers.items()],
                writer.close)
    if name == "wandb":  # the same id after a resume: one curve
        run = tracker.init(project="minimath", name=run_dir.name, id=run_dir.name, dir=str(run_dir),
                           resume="allow")
        return lambda step, numbers: run.log(numbers, step=step), run.finish
    run = tracker.init(project="minimath", name=run_dir.name, resume="allow")
    return lambda step, numbers: run.log(numbers, step=step), run.finish


def truncate_metrics(run_dir, step: int) -> None:
    """Drop the records of metrics.jsonl and samples.jsonl after `step`, and a line that a kill left
    unfinished. UserError when the files can't be written; they are as before then."""
    if not dist.is_main():
        return
    for name in (METRICS, SAMPLES):
        path = Path(run_dir) / name
        if not path.is_file():
            continue
        kept, temp = [], path.with_name(f".tmp-{name}")
        try:
            # not splitlines: a text that a model wrote may hold U+2028 and other things that it takes for line ends
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                with contextlib.suppress(ValueError, AttributeError, TypeError):
                    if json.loads(line).get("step", 0) <= step:
                        kept.append(line + "\n")
            temp.write_text("".join(kept), encoding="utf-8")
            os.replace(temp, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temp.unlink(missing_ok=True)
            raise UserError(f"cannot write {path}: {error.strerror}; free some space or check the permissions, then "
                            "go on with resume=true") from None


def clean(value):
    """A json-able copy: 0-d tensors and numpy numbers become numbers, NaN and infinities None."""
    if isinstance(value, dict):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    if hasattr(value, "tolist"):
        return clean(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


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
    """Commit of this source tree ("+changes" when it has any), None when installed from a wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit, status = (subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True,
                                         timeout=10, check=True).stdout.strip()
                          for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"]))
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if status else "")


def progress_note(start: float, done: int, total: int, shown: dict) -> str:
    """"1 min 20 s, 4 min left, 1.3 GiB, loss=0.52"; start: time.monotonic() at 0 done."""
    elapsed_s = time.monotonic() - start
    parts = [fmt_duration(elapsed_s)]
    if 0 < done < total:
        parts.append(f"{fmt_duration(elapsed_s / done * (total - done))} left")
    if taken := memory_taken():
        parts.append(f"{taken / 2**30:.1f} GiB")
    return ", ".join(parts + [f"{key}={fmt(value)}" for key, value in shown.items()])


def memory_taken() -> int:
    """Bytes: the most that tensors took on the card, as far as one is in use, else this process's resident set; 0 where
    that is not known."""
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
    """Short text of a table cell or shown number: floats to 3-4 significant digits, NaN as '-'."""
    if hasattr(value, "item"):
        value = value.item()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"
    return str(value)


def fmt_duration(seconds: float) -> str:
    """"7 s", "3 min 20 s", "1 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def plain_table(title: str, columns: list[str], cells: list[list[str]], right: list[bool]) -> str:
    widths = [max(len(row[i]) for row in [columns, *cells]) for i in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) if is_right else cell.ljust(width)
                       for cell, width, is_right in zip(row, widths, right)).rstrip()
             for row in [columns, *cells]]
    return "\n".join([title, lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
