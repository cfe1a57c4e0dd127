"""The run folder: what lies where. Its layout is spelt out here and nowhere else.

    RUN/config.yaml            the resolved options, a recipe that repeats the run
    RUN/environment.json       versions, machine, command line
    RUN/metrics.jsonl          one record per step        RUN/samples.jsonl   completions shown while training
    RUN/checkpoints/step-N/    see checkpoint.py          RUN/adapter/        the adapter, as peft reads it
    RUN/adapter/judge.json     it is a judge (judges/card.py), trained on RUN/rollouts/, an evaluation's completions
    RUN/judge/                 of RLAIF: the judge that it refreshed
    RUN/tracked-as             with trackers=: the run's name there, the same after a resume
    RUN/summary.json           the stage, or the whole run, is complete
    RUN/minutes                of the whole run: what its parts took so far, in all processes that did some
    RUN/eval.json, completions.jsonl                      a complete evaluation
    RUN/fingerprint.json, completions.part.jsonl          one that can go on
    RUN/stop                   made by the user: end cleanly

A run of the whole recipe (`minimath run`, `minimath demo`) has such a folder for each of its ARMS, and its evaluation;
for the judge that it trains none.
"""
import contextlib
import enum
import functools
import os
import sys
import time
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open

from minimath.core import dist
from minimath.core.checkpoint import ADAPTER_FILES, list_checkpoints, newest_sound, verify
from minimath.core.errors import UserError
from minimath.core.files import read_json
from minimath.core.text import did_you_mean

CONFIG, ENVIRONMENT, SUMMARY, STOP = "config.yaml", "environment.json", "summary.json", "stop"
METRICS, SAMPLES, ADAPTER, REPORT = "metrics.jsonl", "samples.jsonl", "adapter", "report.html"
TRACKED_AS, MINUTES = "tracked-as", "minutes"
EVAL, COMPLETIONS, SUITE = "eval.json", "completions.jsonl", "suite.json"
PART, FINGERPRINT = "completions.part.jsonl", "fingerprint.json"
STAGE_FOLDERS = ("rlaif", "sft")  # of a run of the whole recipe that leave the policy's adapter, the best first
EVAL_CONFIG = "eval.yaml"  # in the folder of a whole run: the options of its evaluations
ARMS = {"base": "base", "sft": "SFT", "judge": "judge", "rlaif": "SFT + RLAIF", "rlaif-only": "RL only",
        "paper": "SFT + RL (paper's rewards)"}  # parts of a run of the whole recipe, in the order shown


class Held(enum.Enum):
    """What a run folder holds already, in words."""
    RUN = "a run"
    EVALUATION = "a complete evaluation"
    PART = "an unfinished evaluation"
    SUITE = "the evaluations of a suite"
    WHOLE = "a run of the whole recipe"

    def evaluates(self) -> bool:
        return self in (Held.EVALUATION, Held.PART, Held.SUITE)


def evaluation_folder(whole: Path, arm: str) -> Path:
    """Where a run of the whole recipe evaluates one of its ARMS."""
    return whole / f"eval-{arm}"


def new_run_folder(out: str, command: str, *, resume: bool = False) -> Path:
    """Choose `out` or a new runs/<command>-<timestamp>, for all processes. UserError: a new one, to go on with."""
    if resume and not out:
        raise UserError("resume=true needs the run folder to go on with: out=runs/...")
    return Path(out) if out else dist.broadcast(Path("runs") / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}")


def stop_files(run_dir: Path) -> tuple[Path, ...]:
    """List the files that ask for an end: of the folder, and of the whole run."""
    whole = run_dir.parent if (run_dir.parent / EVAL_CONFIG).exists() else run_dir
    return tuple(dict.fromkeys((run_dir / STOP, whole / STOP)))


def held_run(run_dir: Path) -> Held | None:
    """Find what a run folder holds already; None: it is free."""
    if (run_dir / ADAPTER).exists() or list_checkpoints(run_dir):
        return Held.RUN
    if (run_dir / EVAL).exists():
        return Held.EVALUATION
    if (run_dir / SUITE).exists():
        return Held.SUITE
    if (run_dir / EVAL_CONFIG).exists() and any((run_dir / stage / CONFIG).exists() for stage in STAGE_FOLDERS):
        return Held.WHOLE
    part = run_dir / PART
    return Held.PART if part.is_file() and part.stat().st_size else None


def refuse_held(run_dir: Path, *, evaluation: bool, resume: bool) -> None:
    """Raise UserError when the folder holds a run that can't be gone on with."""
    held = held_run(run_dir)
    own = held and held.evaluates() == evaluation and held != Held.WHOLE
    if held and not (own and resume):
        go_on = "add resume=true to go on with it, or " if own and held != Held.EVALUATION else ""
        raise UserError(f"{run_dir} already holds {held.value}; {go_on}choose another out=")


def refuse_foreign(run_dir: Path, *names: str) -> None:
    """Raise UserError for files of these names that no run wrote: one would write over them."""
    found = [run_dir / name for name in names if (run_dir / name).exists()]
    if found and not (run_dir / ENVIRONMENT).exists() and not held_run(run_dir):  # one may have been copied in part
        raise UserError(f"{found[0]} is no file of a run, and would be overwritten; choose another out=")


def refuse_links(run_dir: Path) -> None:
    """Raise UserError for a link out of the folder: what it leads to is not ours."""
    root = os.path.realpath(run_dir)
    for path in run_dir.glob("*"):
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
            raise UserError(f"{path} is a link that leads out of the run folder; remove it, or choose another out=")


@contextlib.contextmanager
def lock_run(run_dir):
    """Hold the run folder for this process and its group, or raise UserError."""
    if not dist.is_main():
        yield
        return
    import fcntl  # Windows has none, and runs minimath in WSL
    path = Path(run_dir) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {run_dir}: {error.strerror}; choose another out=") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{run_dir} is in use by process {file.read().strip()}; wait for it, or choose another "
                            "out=") from None
        except OSError as error:  # some network file systems have no locks
            warnings.warn(f"{run_dir} can't be locked ({error.strerror}); start one writer only", stacklevel=3)
        with contextlib.suppress(OSError):  # on a full disk only the name of the owner is lost
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), f"{os.getpid()}\n".encode())
        yield


def find_adapter(path) -> Path:
    """Find the adapter of a path: an adapter, checkpoint, run or whole recipe.

    Of a run its adapter/, else its newest sound checkpoint; of a whole recipe that of the last complete stage, which is
    said. UserError says what was looked for, or why the adapter found can't be read."""
    path = Path(path)
    if not os.path.isdir(path):  # unlike is_dir, also for a name that is too long
        near = did_you_mean(path.name, [other.name for other in path.parent.glob("*")])
        raise UserError(f"no adapter folder {path}{near}")
    if any((path / name).exists() for name in (*ADAPTER_FILES, "adapter_model.bin")):
        return check_adapter(path)
    if (path / ADAPTER).is_dir():
        return check_adapter(path / ADAPTER)
    if newest := newest_sound(path):
        return newest
    begun = [path / stage for stage in STAGE_FOLDERS if (path / stage).is_dir()]
    for stage in begun:
        if (stage / SUMMARY).exists():
            folder = find_adapter(stage)
            say_once(f"adapter={path}: taking {folder}"
                     + ("" if stage == begun[0] else f"; {begun[0].name} is not complete"))
            return folder
    if begun:
        raise UserError(f"{path} is a run of the whole recipe, and no stage of it is complete: let it go on with "
                        f"resume=true, or take what there is with adapter={begun[0]}")
    raise UserError(f"{path} holds no adapter: looked for {' and '.join(ADAPTER_FILES)}, a folder adapter/, "
                    f"sound folders checkpoints/step-*, and complete stages {' and '.join(STAGE_FOLDERS)}")


@functools.cache
def say_once(text: str) -> None:
    if dist.is_main():
        print(text, file=sys.stderr)  # what a command prints may be read by another


def check_adapter(folder: Path) -> Path:
    """Return a folder whose adapter can be read without running code, or UserError."""
    if (folder / "adapter_model.bin").exists() and not (folder / "adapter_model.safetensors").exists():
        raise UserError(f"{folder / 'adapter_model.bin'} is a pickle, which can run code when it is read: "
                        "refused; save it again with safe_serialization=True where it was made")
    if (folder / "manifest.json").exists() and (problems := verify(folder)):
        raise UserError(f"the adapter in {folder} is damaged: {problems[0]}")
    try:
        read_json(folder / "adapter_config.json")
        with safe_open(folder / "adapter_model.safetensors", framework="pt"):
            return folder
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the adapter in {folder} can't be read: {error}; it needs "
                        f"{' and '.join(ADAPTER_FILES)}") from None
