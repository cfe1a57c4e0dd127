"""Ask a run to end, and find out that it was asked to. One state per process.

Three ways to stop a run cleanly; the exit status tells which it was: SIGINT (Ctrl-C), 130; SIGTERM, 143; a file named
`stop` in the run folder, or in that of the whole run that a stage belongs to, 144. The file is taken away when it is
obeyed. A signal that comes after any of them ends the process at once.

    with interruptible((run_dir / "stop",), say):      # whoever is outermost installs the handlers
        for finished in engine.stream(...):
            interrupt.check()                          # raises Interrupted
"""
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from minimath.core import dist
from minimath.core.errors import Interrupted

LOOK_S = 1.0  # least seconds between looks for a stop file: a step has many, and a network drive is slow
BY_FILE = 16  # in place of a signal's number; the one that Linux has there is not used

_signal = 0  # what asked for the end
_looked = 0.0
_runs: list[tuple[tuple[Path, ...], Callable[[str], None], str]] = []  # files, say and kept; the innermost last


@contextlib.contextmanager
def interruptible(files: tuple[Path, ...], say: Callable[[str], None], kept: str = "stopping") -> Iterator[None]:
    """Notice SIGINT, SIGTERM and the stop files inside.

    kept: what becomes of the work, said at a signal. Within another one, its files count too, and what was asked inside
    stays asked for it."""
    global _signal
    before = {}
    if not _runs:  # the outermost
        _signal = 0
        with contextlib.suppress(ValueError):  # not in the main thread: the caller handles signals
            before = {number: signal.signal(number, _handle) for number in (signal.SIGINT, signal.SIGTERM)}
    _runs.append((files, say, kept))
    try:
        yield
    finally:
        _runs.pop()
        for number, old in before.items():
            signal.signal(number, old)


def _handle(number: int, _frame) -> None:
    global _signal
    if _signal:
        if dist.world() > 1:  # the launcher hands on what the terminal has sent already
            return
        with contextlib.suppress(AttributeError, ValueError, OSError):  # no standard output
            if os.isatty(sys.stdout.fileno()):
                os.write(sys.stdout.fileno(), b"\x1b[?25h")  # the cursor, which a progress bar hides
        os._exit(128 + number)
    _signal = number
    _, say, kept = _runs[-1]
    with contextlib.suppress(RuntimeError):  # it came while a line was being printed
        say(f"{signal.Signals(number).name}: {kept}; once more to stop at once")


def requested() -> int:
    """Return the signal that asked for the end, or 0; all processes call it."""
    global _signal
    _look()
    _signal = max(dist.of_all(_signal))  # one that reached one process stops all
    return _signal


def check() -> None:
    """Raise Interrupted if a signal or a stop file came."""
    if dist.world() > 1 or not _runs:  # one that left a step alone would leave the others waiting
        return
    if time.monotonic() - _looked > LOOK_S:
        _look()
    if _signal:
        raise Interrupted(_signal)


def reason() -> str:
    """What asked for the end, in words."""
    if _signal == BY_FILE:
        return "stop file"
    return signal.Signals(_signal).name if _signal else "max_minutes reached"


def _look() -> None:
    """Obey a stop file, and take it away: the run that goes on must not find it."""
    global _signal, _looked
    _looked = time.monotonic()
    if not dist.is_main():  # one of them would take it away before the others saw it
        return
    for file in [file for files, *_ in _runs for file in files]:
        if not _signal and file.exists():
            _signal = BY_FILE
            with contextlib.suppress(OSError):
                file.unlink()
