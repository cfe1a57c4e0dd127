"""Asking a run to end: signals, stop files, one within another, and a second signal that ends the process."""
import contextlib
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from minimath.core import interrupt
from minimath.core.errors import Interrupted
from minimath.core.interrupt import BY_FILE, interruptible


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch):
    """Every check looks for the stop file."""
    monkeypatch.setattr(interrupt, "LOOK_S", -1.0)


def send(number=signal.SIGINT):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_said_and_raised_at_the_next_check_and_the_handlers_come_back(number):
    said, before = [], signal.getsignal(number)
    with interruptible((), said.append, "the work is kept"):
        interrupt.check()
        assert interrupt.requested() == 0
        send(number)
        with pytest.raises(Interrupted) as stopped:
            interrupt.check()
        assert stopped.value.args == (number,) and interrupt.requested() == number
    assert said == [f"{signal.Signals(number).name}: the work is kept; once more to stop at once"]
    assert interrupt.reason() == signal.Signals(number).name  # also afterwards: the command says how to go on
    assert signal.getsignal(number) is before


def test_outside_of_any_run_nothing_is_noticed_and_a_new_one_begins_unasked():
    with interruptible((), print):
        send()
    interrupt.check()
    with interruptible((), print):
        interrupt.check()
        assert interrupt.requested() == 0 and interrupt.reason() == "max_minutes reached"


def test_a_stop_file_ends_the_run_and_is_taken_away(tmp_path):
    files = (tmp_path / "stage" / "stop", tmp_path / "stop")
    (tmp_path / "stage").mkdir()
    for file in files:
        with interruptible(files, print):
            interrupt.check()
            file.touch()
            with pytest.raises(Interrupted) as stopped:
                interrupt.check()
            assert stopped.value.args == (BY_FILE,) and interrupt.requested() == BY_FILE
            assert interrupt.reason() == "stop file" and not file.exists()
            file.touch()  # asked for already: this one is for the run that goes on, or for nobody
            interrupt.requested()
            assert file.exists()
            file.unlink()


def test_a_check_looks_for_the_file_once_a_second(tmp_path, monkeypatch):
    monkeypatch.setattr(interrupt, "LOOK_S", 1.0)
    now = [1000.0]
    monkeypatch.setattr(interrupt, "_looked", 0.0)
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    with interruptible((tmp_path / "stop",), print):
        interrupt.check()
        (tmp_path / "stop").touch()
        now[0] += 0.9
        interrupt.check()
        now[0] += 0.2
        with pytest.raises(Interrupted):
            interrupt.check()


def test_what_is_asked_of_a_stage_is_asked_of_the_whole_run_too(tmp_path):
    """The innermost says what becomes of its work; files of both count; the outermost alone gives the handlers back."""
    outer, inner, handler = [], [], None
    with interruptible((tmp_path / "whole",), outer.append, "whole"):
        handler = signal.getsignal(signal.SIGINT)
        with interruptible((tmp_path / "stage",), inner.append, "stage"):
            (tmp_path / "whole").touch()
            with pytest.raises(Interrupted):
                interrupt.check()
        assert signal.getsignal(signal.SIGINT) is handler
        with pytest.raises(Interrupted):
            interrupt.check()
        assert interrupt.requested() == BY_FILE
    with interruptible((), outer.append, "whole"):
        with interruptible((tmp_path / "stage",), inner.append, "stage"):
            send()
        assert interrupt.requested() == signal.SIGINT
    with interruptible((tmp_path / "whole",), outer.append, "whole"):
        with interruptible((tmp_path / "stage",), inner.append, "stage"):
            interrupt.check()
        (tmp_path / "stage").touch()  # the stage has ended: its file is nobody's
        assert interrupt.requested() == 0 and (tmp_path / "stage").exists()
    assert inner == ["SIGINT: stage; once more to stop at once"] and outer == []


def test_a_signal_while_a_line_is_printed_is_still_taken():
    def say(text):
        raise RuntimeError("reentrant call")
    with interruptible((), say):
        send()
        assert interrupt.requested() == signal.SIGINT


def test_an_error_inside_leaves_nothing_behind():
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(OSError), interruptible((), print):
        raise OSError
    assert signal.getsignal(signal.SIGTERM) is before
    with interruptible((), print):  # and is the outermost again: it has handlers of its own
        assert signal.getsignal(signal.SIGTERM) is not before


@pytest.mark.parametrize("first, second", [("SIGINT", "SIGINT"), ("SIGTERM", "SIGINT"), ("stop file", "SIGTERM")])
def test_a_second_signal_ends_the_process_at_once_with_its_status(tmp_path, first, second):
    code = textwrap.dedent("""
        import pathlib, time
        from minimath.core import interrupt
        end = time.monotonic() + 60  # of a process whose test is gone
        with interrupt.interruptible((pathlib.Path("stop"),), lambda text: print(text, flush=True)):
            print("begun", flush=True)
            while not interrupt.requested() and time.monotonic() < end:
                time.sleep(0.01)
            print("asked", flush=True)
            while time.monotonic() < end:
                time.sleep(0.01)
    """)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    if first == "stop file":
        (tmp_path / "stop").touch()
    else:
        process.send_signal(getattr(signal, first))
        assert "once more to stop at once" in process.stdout.readline()
    assert process.stdout.readline() == "asked\n"
    process.send_signal(getattr(signal, second))
    assert process.wait(timeout=30) == 128 + getattr(signal, second)
    process.stdout.close()


def test_a_second_signal_under_a_progress_bar_gives_the_cursor_back(tmp_path):
    code = textwrap.dedent("""
        import signal
        from minimath.core.interrupt import interruptible
        from minimath.core.log import RunLog
        log = RunLog(".", "test")
        with interruptible((), log.say), log.progress(2, "training"):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    """)
    ours, theirs = os.openpty()
    terminal = os.environ | {"TERM": "xterm"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=theirs, env=terminal)
    os.close(theirs)
    shown = os.read(ours, 1 << 16)
    os.close(ours)
    assert done.returncode == 130 and shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l") >= 0
