"""Run folders that are taken, signals, files that are written whole."""

import os
import signal

import pytest

import minimath.core.run as module
from minimath.config.schema import EvalConfig, SFTConfig
from minimath.core.errors import Interrupted, UserError
from minimath.core.files import write_whole
from minimath.core.run import PART, Stop, held_run, open_run, signals


class Ended(BaseException):
    """In place of os._exit."""


class Log:
    def __init__(self, error=None):
        self.lines, self.error = [], error

    def say(self, text):
        self.lines.append(text)
        if self.error:
            raise self.error


def fill(folder, held):
    folder.mkdir()
    if held == "a run":
        (folder / "adapter").mkdir()
    elif held:
        (folder / {"a complete evaluation": "eval.json", "an unfinished evaluation": PART}[held]).write_text("{}\n")


@pytest.mark.parametrize("cls, command", [(EvalConfig, "eval"), (SFTConfig, "sft")])
@pytest.mark.parametrize("held", ["a run", "a complete evaluation", "an unfinished evaluation"])
def test_a_taken_folder_is_refused_and_resumed_by_its_own_command_only(tmp_path, cls, command, held):
    out = tmp_path / "run"
    fill(out, held)
    assert held_run(out) == held
    own = ("evaluation" in held) == (command == "eval")
    with pytest.raises(UserError, match=f"already holds {held}; ") as caught, open_run(cls(out=str(out)), command):
        pass
    assert ("add resume=true" in str(caught.value)) == (own and held != "a complete evaluation")
    if not own:
        with pytest.raises(UserError, match="choose another out="), open_run(cls(out=str(out), resume=True), command):
            pass
        assert not (out / "config.yaml").exists()
    else:
        with open_run(cls(out=str(out), resume=True), command):
            assert (out / "config.yaml").exists()


def test_an_empty_part_file_holds_nothing(tmp_path):
    (tmp_path / PART).touch()
    assert held_run(tmp_path) == ""


def test_resume_needs_a_folder():
    with pytest.raises(UserError, match="out="), open_run(EvalConfig(resume=True), "eval"):
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_ends(monkeypatch, number):
    def end(status):
        raise Ended(status)

    monkeypatch.setattr(module.os, "_exit", end)
    stop, log, before = Stop(0), Log(), signal.getsignal(number)
    with signals(stop, log, "stopping"):
        os.kill(os.getpid(), number)
        assert stop.requested() and stop.reason() == signal.Signals(number).name
        assert log.lines == [f"{stop.reason()}: stopping; once more to stop at once"]
        with pytest.raises(Interrupted) as stopped:
            stop.check()
        assert stopped.value.args == (number,)
        with pytest.raises(Ended) as ended:
            os.kill(os.getpid(), number)
        assert ended.value.args == (128 + number,)
    assert signal.getsignal(number) is before


def test_a_signal_while_a_line_is_printed_is_still_taken():
    stop = Stop(0)
    with signals(stop, Log(RuntimeError("reentrant call")), "stopping"):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "eval.json"
    write_whole(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(UserError, match="No space left"):
        write_whole(path, "new and longer")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write_whole(path, "new")
    assert path.read_text() == "new"
