"""Run folders: what they hold, who may go on with them, one writer, no way out of them; files written whole."""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import minimath
from minimath.core import files, run_folder
from minimath.core.errors import UserError
from minimath.core.files import write_whole
from minimath.core.run import open_run
from minimath.core.run_folder import EVAL, EVAL_CONFIG, PART, held_run, lock_run, stop_files


def fill(folder, held):
    folder.mkdir()
    if held == "a run":
        (folder / "adapter").mkdir()
    elif held:
        (folder / {"a complete evaluation": EVAL, "an unfinished evaluation": PART}[held]).write_text("{}\n")


def opened(out, command="sft", resume=False):
    return open_run(str(out) if out else "", command, config="seed: 1\n", resume=resume)


@pytest.mark.parametrize("command", ["eval", "sft"])
@pytest.mark.parametrize("held", ["a run", "a complete evaluation", "an unfinished evaluation"])
def test_a_taken_folder_is_refused_and_resumed_by_its_own_command_only(tmp_path, command, held):
    out = tmp_path / "run"
    fill(out, held)
    assert held_run(out).value == held
    own = ("evaluation" in held) == (command == "eval")
    with pytest.raises(UserError, match=f"already holds {held}; ") as caught, opened(out, command):
        pass
    assert ("add resume=true" in str(caught.value)) == (own and held != "a complete evaluation")
    if not own:
        with pytest.raises(UserError, match="choose another out="), opened(out, command, resume=True):
            pass
        assert not (out / "config.yaml").exists()
    else:
        with opened(out, command, resume=True):
            assert (out / "config.yaml").read_text() == "seed: 1\n"


@pytest.mark.parametrize("files, held", [(["suite.json", "gsm8k/eval.json"], "the evaluations of a suite"),
                                         (["eval.yaml", "sft/config.yaml"], "a run of the whole recipe")])
@pytest.mark.parametrize("command, resume", [("sft", False), ("sft", True), ("eval", False)])
def test_a_folder_of_several_runs_is_not_filled_with_another(tmp_path, files, held, command, resume):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(UserError, match=f"already holds {held}; .*choose another out="):
        with opened(tmp_path, command, resume):
            pass
    assert not (tmp_path / "config.yaml").exists()


@pytest.mark.parametrize("name", ["config.yaml", "completions.jsonl"])
def test_a_file_of_the_user_s_is_not_overwritten_and_one_of_a_run_that_got_nowhere_is(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} is no file of a run"), opened(tmp_path, "eval"):
        pass
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(name, "mine")]
    for _ in range(2):
        with opened(tmp_path / "run"):
            pass
    (tmp_path / "run/adapter").mkdir()
    (tmp_path / "run/environment.json").unlink()  # a run that was copied in part
    with opened(tmp_path / "run", resume=True):
        pass


def test_an_empty_part_file_holds_nothing(tmp_path):
    (tmp_path / PART).touch()
    assert held_run(tmp_path) is None


def test_resume_needs_a_folder():
    with pytest.raises(UserError, match="out="), opened("", "eval", resume=True):
        pass


def test_without_out_a_new_folder_is_named_after_the_command_and_how_to_stop_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with opened("", "rlaif") as log:
        assert log.run_dir.parent == Path("runs") and log.run_dir.name.startswith("rlaif-")
        assert f"touch {log.run_dir / 'stop'}" in capsys.readouterr().out


def test_the_stop_file_of_a_whole_run_stops_its_stages(tmp_path):
    stage = tmp_path / "sft"
    assert stop_files(stage) == (stage / "stop",)
    (tmp_path / EVAL_CONFIG).touch()
    assert stop_files(stage) == (stage / "stop", tmp_path / "stop")


def test_a_second_writer_is_refused_until_the_first_has_left(tmp_path):
    # flock belongs to the open file, so a second opening in this process stands for another process
    for _ in range(2):
        with lock_run(tmp_path / "run"):
            with pytest.raises(UserError, match=f"in use by process {os.getpid()}"), lock_run(tmp_path / "run"):
                pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another out="), lock_run(tmp_path / "file" / "run"):
        pass


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints"])
def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path, name):
    out = tmp_path / "run"
    out.mkdir()
    (out / "own").symlink_to(out / "elsewhere in it")
    with opened(out):
        pass
    (out / name).unlink(missing_ok=True)
    (out / name).symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match=f"{name} is a link"), opened(out):
        pass


def test_the_layout_is_spelt_out_in_one_file():
    """Constants of run_folder.py that are names of files, in quotes in any other file of minimath."""
    names = {value for name, value in vars(run_folder).items() if name.isupper() and isinstance(value, str)
             and value.endswith((".json", ".jsonl", ".yaml"))}
    root = Path(minimath.__file__).parent
    found = [f"{path.relative_to(root)}: {name}" for path in root.rglob("*.py") if path != Path(run_folder.__file__)
             for name in names if f'"{name}"' in path.read_text(encoding="utf-8")]
    assert found == [] and len(names) > 7


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "eval.json"
    write_whole(path, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(UserError, match="No space left"):
        write_whole(path, "new and longer")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write_whole(path, "new")
    assert path.read_text() == "new"


def test_processes_that_write_one_file_at_once_all_succeed(tmp_path):
    path = tmp_path / "report.html"
    code = ("import sys\nfrom pathlib import Path\nfrom minimath.core.files import write_whole\n"
            "for i in range(200): write_whole(Path(sys.argv[1]), sys.argv[2] * 1000)")
    writers = [subprocess.Popen([sys.executable, "-c", code, path, letter], stderr=subprocess.PIPE, text=True)
               for letter in "ab"]
    assert [writer.communicate()[1] for writer in writers] == ["", ""]
    assert path.read_text() in ("a" * 1000, "b" * 1000) and list(tmp_path.iterdir()) == [path]


def test_what_killed_writers_left_is_removed_by_a_later_one(tmp_path):
    path, old, new = tmp_path / "a[1].json", tmp_path / ".tmp-1-a[1].json", tmp_path / ".tmp-2-a[1].json"
    for leftover in (old, new):
        leftover.write_text("half")
    os.utime(old, (0, time.time() - 2 * files.LEFT_S))
    write_whole(path, "whole")
    assert sorted(tmp_path.iterdir()) == [new, path]  # that process may still be at work
