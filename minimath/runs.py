"""What every stage does around its loop: choose and lock the run folder, save the options, stop on a signal.

Three ways to stop a run cleanly; it says how to go on, and its exit status tells which it was: SIGINT (Ctrl-C), 130;
SIGTERM, 143; a file named stop in the run folder (`touch runs/mine/stop`; with `minimath run` in the folder of the
stage or of the whole run), 144. The file is taken away when it is obeyed. A signal that comes after any of them ends
the process at once.
"""
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from minimath import ranks
from minimath.checkpoint import best_checkpoint, list_checkpoints, lock_run, read_json, verify
from minimath.config import Stopped, UserError, save_config
from minimath.log import RunLog, refuse_links

STOP_FILE = "stop"
LOOK_S = 1.0  # least seconds between looks for it within a step: a step has many, and a network drive is slow
BY_FILE = 16  # in place of a signal's number; the one that Linux has there is not used
PART = "completions.part.jsonl"  # in a run folder: completions of an evaluation that is not complete


def keep_freed_memory() -> None:
    """On Linux CPUs, keep freed memory in the process and use huge pages; a fifth faster training on 2 cores.

    Every layer allocates and frees activations of megabytes; glibc would give each back to the system and fault it
    in again. Must run before torch allocates its first tensor to have the second effect.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another libc
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            for option, value in ((-3, 1 << 25), (-1, (1 << 31) - 1), (-2, 1 << 26)):  # mmap and trim threshold, pad
                mallopt(option, value)


class Stop:
    """Whether the run should end early: a signal came, one of `files` is there, or the minutes are used up.

    Several processes end together, between two steps: one that left a step alone would leave the others waiting.
    """

    def __init__(self, max_minutes: float, files: tuple[Path, ...] = ()):
        self.signal = 0  # number of the signal that asked for it, or BY_FILE
        self.files, self.looked = files, time.monotonic()
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")

    def requested(self) -> bool:
        self.look()
        self.signal = int(ranks.largest(self.signal))
        return bool(self.signal) or ranks.largest(time.monotonic() - self.deadline) > 0

    def check(self) -> None:
        """Raise Stopped after a signal or a stop file; time running out lets the step finish, and so do several
        processes."""
        if ranks.world() > 1:
            return
        if time.monotonic() - self.looked > LOOK_S:
            self.look()
        if self.signal:
            raise Stopped(self.signal)

    def look(self) -> None:
        """Obey a stop file, and take it away: the run that goes on must not find it."""
        self.looked = time.monotonic()
        if not ranks.is_main():  # one of them would take it away before the others saw it
            return
        for file in self.files:
            if not self.signal and file.exists():
                self.signal = BY_FILE
                with contextlib.suppress(OSError):
                    file.unlink()

    def reason(self) -> str:
        if self.signal == BY_FILE:
            return "stop file"
        return signal.Signals(self.signal).name if self.signal else "max_minutes reached"


def new_run_folder(out: str, command: str) -> Path:
    """The folder `out`, or a new runs/<command>-<timestamp>."""
    return Path(out) if out else ranks.from_main(Path("runs") / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}")


@contextlib.contextmanager
def open_run(cfg, command: str) -> Iterator[tuple[RunLog, Stop]]:
    """Lock the run folder, save the resolved options as config.yaml, start the log and the signal handlers.

    Raises UserError when the folder already holds a run that is not being resumed: nothing is ever overwritten.
    """
    keep_freed_memory()
    if cfg.resume and not cfg.out:
        raise UserError("resume=true needs the run folder to go on with: out=runs/...")
    run_dir = new_run_folder(cfg.out, command)
    ranks.wait()  # until all have chosen the same folder, the first must not begin to fill it
    if ranks.is_main():
        refuse_links(run_dir)
        refuse_held(run_dir, command, cfg.resume)
    with lock_run(run_dir), RunLog(run_dir, f"minimath {command}", getattr(cfg, "trackers", "")) as log:
        if ranks.is_main():
            new = run_dir / ".tmp-config.yaml"  # a full disk must not cost the old one
            save_config(cfg, new)
            os.replace(new, run_dir / "config.yaml")
        if ranks.world() > 1:
            log.say(f"{ranks.world()} processes share every step")
        ranks.wait()
        whole = run_dir.parent if (run_dir.parent / "eval.yaml").exists() else run_dir  # of the pipeline
        stop = Stop(getattr(cfg, "max_minutes", 0.0), (run_dir / STOP_FILE, whole / STOP_FILE))
        log.say(f"to stop it cleanly: Ctrl-C, or touch {run_dir / STOP_FILE}")
        kept = "stopping; the completions that have ended are kept" if command == "eval" else \
            "stopping after this step with a checkpoint"
        with signals(stop, log, kept):
            yield log, stop


def refuse_held(run_dir: Path, command: str, resume: bool) -> None:
    """UserError when the folder holds a run that this command may not go on with."""
    held = held_run(run_dir)
    own = ("evaluation" in held) == (command == "eval")
    if held and not (own and resume):
        go_on = "add resume=true to go on with it, or " if own and "complete evaluation" not in held else ""
        raise UserError(f"{run_dir} already holds {held}; {go_on}choose another out=")


def held_run(run_dir: Path) -> str:
    """What a run folder holds already, in words; "" when it is free."""
    if (run_dir / "adapter").exists() or list_checkpoints(run_dir):
        return "a run"
    if (run_dir / "eval.json").exists():
        return "a complete evaluation"
    part = run_dir / PART
    return "an unfinished evaluation" if part.is_file() and part.stat().st_size else ""


@contextlib.contextmanager
def save_errors(cfg, log: RunLog, state: dict) -> Iterator[None]:
    """Around a save in the middle of a run, so that hours of training need not end where the next save may work.

    on_save_error=stop: its UserError ends the run. continue: it is said, and what is best so far is again what stands
    on the disk.
    """
    try:
        yield
    except UserError as error:
        if cfg.on_save_error == "stop":
            raise UserError(f"{error}; then go on with resume=true") from error
        best = best_checkpoint(log.run_dir)
        state["best"] = -1.0 if best is None or verify(best) else read_json(best / "state.json")["best"]
        log.say(f"step {state['done']} is not saved; the run goes on, and tries again at the next save: {error}")


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically: a reader, or who comes after a crash, finds the old file or the new one.

    Of several processes the first one writes. Raises UserError when the disk is full or not writable; the old file is
    intact then.
    """
    if not ranks.is_main():
        return
    temp = path.with_name(f".tmp-{path.name}")
    try:
        with open(temp, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; free some space or check the permissions, then "
                        "go on with resume=true") from None


@contextlib.contextmanager
def signals(stop: Stop, log: RunLog, kept: str):
    """SIGINT and SIGTERM ask for a clean stop, told in the words `kept`; a second one ends the process at once."""
    def handler(number, _frame):
        if stop.signal and ranks.world() > 1:  # the launcher hands on what the terminal has sent already
            return
        if stop.signal:
            os._exit(128 + number)
        stop.signal = number
        with contextlib.suppress(RuntimeError):  # it came while a line was being printed
            log.say(f"{signal.Signals(number).name}: {kept}; once more to stop at once")

    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread: the caller handles signals
        before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
