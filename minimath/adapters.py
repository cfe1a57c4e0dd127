"""Which adapter a path means: that of a run, a checkpoint, an adapter folder as peft writes it, or a whole run."""
import functools
import os
import sys
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open

from minimath import ranks
from minimath.checkpoint import ADAPTER_FILES, list_checkpoints, read_json, verify
from minimath.config import UserError, did_you_mean

STAGES = ("rlaif", "sft")  # their folders in a run of the whole recipe, best first (pipeline.py)
COMPLETE = "summary.json"  # in a stage's folder when it is complete


def find_adapter(path) -> Path:
    """The adapter folder meant by a run folder (its adapter/, else its newest sound checkpoint), a checkpoint, an
    adapter folder, or a run of the whole recipe (the adapter of its last complete stage, which is said). UserError says
    what was looked for, or why the adapter found can't be read."""
    path = Path(path)
    if not os.path.isdir(path):  # unlike is_dir, also for a name that is too long
        near = did_you_mean(path.name, [other.name for other in path.parent.glob("*")])
        raise UserError(f"no adapter folder {path}{near}")
    if any((path / name).exists() for name in (*ADAPTER_FILES, "adapter_model.bin")):
        check_adapter(path)
        return path
    if (path / "adapter").is_dir():
        check_adapter(path / "adapter")
        return path / "adapter"
    for folder in list_checkpoints(path):
        try:
            check_adapter(folder)
            return folder
        except UserError as error:
            warnings.warn(f"{error}; trying the checkpoint before", stacklevel=2)
    begun = [stage for stage in STAGES if (path / stage).is_dir()]
    for stage in begun:
        if (path / stage / COMPLETE).exists():
            folder = find_adapter(path / stage)
            but = "" if stage == begun[0] else f"; {begun[0]} is not complete"
            say_once(f"adapter={path}: taking {folder}{but}")
            return folder
    if begun:
        raise UserError(f"{path} is a run of the whole recipe, and no stage of it is complete: let it go on with "
                        f"resume=true, or take what there is with adapter={path / begun[0]}")
    raise UserError(f"{path} holds no adapter: looked for {' and '.join(ADAPTER_FILES)}, a folder adapter/, "
                    f"sound folders checkpoints/step-*, and complete stages {' and '.join(STAGES)}")


@functools.cache
def say_once(text: str) -> None:
    """To standard error, since what a command prints may be read by another."""
    if ranks.is_main():
        print(text, file=sys.stderr)


def check_adapter(folder: Path) -> None:
    """Raise UserError unless the folder holds an adapter that can be read without running code."""
    if (folder / "adapter_model.bin").exists() and not (folder / "adapter_model.safetensors").exists():
        raise UserError(f"{folder / 'adapter_model.bin'} is a pickle, which can run code when it is read: "
                        "refused; save it again with safe_serialization=True where it was made")
    problems = verify(folder) if (folder / "manifest.json").exists() else []
    if problems:
        raise UserError(f"the adapter in {folder} is damaged: {problems[0]}")
    try:
        read_json(folder / "adapter_config.json")
        with safe_open(folder / "adapter_model.safetensors", framework="pt"):
            pass
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the adapter in {folder} can't be read: {error}; it needs "
                        f"{' and '.join(ADAPTER_FILES)}") from None
