"""Checkpoints: written whole or not at all, verified before they are read, and never a pickle.

    run/checkpoints/step-000050/
        adapter_config.json  adapter_model.safetensors     the adapter, as peft writes it
        optimizer.safetensors  optimizer.json              "<param index>.<name>" -> tensor, or number
        rng.safetensors  rng.json                          torch and CUDA; Python and numpy
        state.json                                         what the loop wants back (step, data cursor, ...)
        tracked.safetensors                                "<name>.<key>": the "tensors" of tracked states, if any
        manifest.json                                      bytes and sha256 of each file; whether it was the best so far
"""
import contextlib
import json
import math
import shutil
import warnings
from pathlib import Path

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minimath.core import dist
from minimath.core.errors import UserError
from minimath.core.files import discard, finish_rename, read_json, read_manifest, sha256, write_atomically
from minimath.core.state import on_cpu, optimizer_state, restore_optimizer, restore_rng, rng_state

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def save_checkpoint(run_dir, step: int, *, model, optimizer, state: dict, keep: int, best: bool = False) -> Path:
    """Write a checkpoint; remove all but the `keep` newest and the best one.

    state must be json-able, but for the dict "tensors" of each of state["tracked"]; `step` is added to it, and the
    random states. Process 0 writes. Raises UserError with the path and the bytes needed; earlier checkpoints are intact
    then."""
    target = checkpoint_folder(run_dir, step)
    if not dist.is_main():
        return target
    tensors, numbers, state = {"tracked": {}}, {}, state | {"step": step}
    tensors["optimizer"], numbers["optimizer"] = optimizer_state(optimizer)
    tensors["rng"], numbers["rng"] = rng_state()
    for name, each in state.get("tracked", {}).items():
        if "tensors" in each:  # names in their place: safetensors keeps no order
            tensors["tracked"] |= on_cpu({f"{name}.{key}": tensor for key, tensor in each["tensors"].items()})
            state["tracked"] = state["tracked"] | {name: each | {"tensors": list(each["tensors"])}}

    def write(folder: Path) -> None:
        write_adapter(model, folder)
        for name, group in tensors.items():
            if group:
                save_file(group, folder / f"{name}.safetensors")
        for name, content in (numbers | {"state": state}).items():
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")

    finish_renames(run_dir)
    write_atomically(target, write, {"step": step, "best": best},
                     bytes_needed=bytes_of(adapter_tensors(model), *tensors.values()))
    # newer ones are damaged (load_checkpoint went past them): they don't count, and their steps come again
    folders = [folder for folder in list_checkpoints(run_dir) if step_of(folder) <= step]
    for folder in {*folders} - {*folders[:keep], best_checkpoint(run_dir, step), target}:
        discard(folder)
    return target


def load_checkpoint(run_dir, *, model, optimizer=None) -> dict | None:
    """Restore the newest valid checkpoint, bitwise, and return its state.

    None without a checkpoint. A damaged one is skipped with a warning. UserError when all are damaged, or when a sound
    one belongs to another adapter or optimizer; nothing is changed then."""
    if dist.is_main():
        finish_renames(run_dir)
    dist.barrier()
    folder, folders = newest_sound(run_dir), list_checkpoints(run_dir)
    if folders and not folder:
        raise UserError(f"none of the {len(folders)} checkpoints of {run_dir} is intact; start again with another "
                        "out=, or copy one back from a backup")
    try:
        return restore(folder, model, optimizer) if folder else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} is whole, but not what minimath writes ({type(error).__name__}: "
                        f"{str(error)[:100]}). Start again with another out=") from None


def restore(folder: Path, model, optimizer) -> dict:
    """Copy a verified checkpoint into model, optimizer and generators; return its state."""
    def tensors_of(name: str) -> dict[str, torch.Tensor]:
        path = folder / f"{name}.safetensors"
        return load_file(path) if path.is_file() else {}

    state, tracked = read_json(folder / "state.json"), tensors_of("tracked")
    for name, each in state.get("tracked", {}).items():
        if "tensors" in each:
            each["tensors"] = {key: tracked[f"{name}.{key}"] for key in each["tensors"]}
    saved, own = load_file(folder / "adapter_model.safetensors"), adapter_tensors(model)
    left, right = ({name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (saved, own))
    differing = [name for name in {**left, **right} if left.get(name) != right.get(name)]
    if differing:
        raise UserError(f"{folder} was saved by another adapter ({len(differing)} tensors differ, first "
                        f"{differing[0]}); use its model, dtype and lora_* options, or a new out=")
    if optimizer is not None:
        restore_optimizer(optimizer, tensors_of("optimizer"), read_json(folder / "optimizer.json"), where=folder)
    peft.set_peft_model_state_dict(model, saved)
    restore_rng(tensors_of("rng"), read_json(folder / "rng.json"))
    return state


def newest_sound(run_dir) -> Path | None:
    """The newest whole checkpoint; a damaged one is skipped with a warning."""
    for folder in list_checkpoints(run_dir):
        if not (problems := verify(folder)):
            return folder
        warnings.warn(f"checkpoint {folder} is damaged ({problems[0]}); trying the one before", stacklevel=3)
    return None


def verify(folder) -> list[str]:
    """Say what is wrong against the manifest; [] for a whole folder."""
    folder = Path(folder)
    try:
        files = read_manifest(folder)["files"]
        expected = [(folder / name, name, entry["bytes"], entry["sha256"]) for name, entry in files.items()]
    except OSError as error:
        return [f"manifest.json: {error.strerror}"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return ["manifest.json: not the JSON that was written"]
    problems = [f"{name}: not in the manifest" for name in ADAPTER_FILES if name not in files]
    for path, name, size, digest in expected:
        if path.name != name or not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != size:
            problems.append(f"{name}: {path.stat().st_size} bytes instead of {size}")
        elif sha256(path) != digest:
            problems.append(f"{name}: content differs from its hash")
    return problems


def checkpoint_folder(run_dir, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    return int(folder.name[5:])


def list_checkpoints(run_dir) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = Path(run_dir).glob("checkpoints/step-*")
    return sorted((path for path in found if path.name[5:].isdecimal()), key=step_of, reverse=True)


def best_checkpoint(run_dir, most: float = math.inf) -> Path | None:
    """The newest checkpoint up to step `most` that was saved as the best so far."""
    for folder in list_checkpoints(run_dir):
        with contextlib.suppress(OSError, ValueError):
            if step_of(folder) <= most and read_manifest(folder).get("best"):
                return folder
    return None


def finish_renames(run_dir) -> None:
    """Put back checkpoints that a crash within write_atomically set aside."""
    for old in (Path(run_dir) / "checkpoints").glob(".old-step-*"):
        try:
            finish_rename(old.with_name(old.name.removeprefix(".old-")))
        except OSError as error:
            raise UserError(f"cannot rename {old} to {old.name[5:]} ({error.strerror}), which an interrupted save left "
                            "undone; check the permissions") from None


def save_adapter(model, path, name: str = "default") -> Path:
    """Write an adapter alone, atomically, as a folder that peft reads."""
    if dist.is_main():
        write_atomically(Path(path), lambda folder: write_adapter(model, folder, name), {},
                         bytes_needed=bytes_of(adapter_tensors(model, name)))
    return Path(path)


def copy_adapter(checkpoint: Path, path: Path) -> Path:
    """Write the adapter of a checkpoint as save_adapter writes one."""
    if dist.is_main():
        files = [checkpoint / name for name in ADAPTER_FILES]
        write_atomically(path, lambda folder: [shutil.copy(file, folder) for file in files], {},
                         bytes_needed=sum(file.stat().st_size for file in files))
    return path


def write_adapter(model, folder: Path, name: str = "default") -> None:
    """Adapter files as peft writes them, without its empty model card."""
    # "auto" would ask the hub whether the vocabulary was resized; trained embeddings are in modules_to_save anyway
    model.save_pretrained(folder, safe_serialization=True, selected_adapters=[name], save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    if (inner := folder / name).is_dir():  # peft's place for all but "default"
        for path in inner.iterdir():
            path.rename(folder / path.name)
        inner.rmdir()


def adapter_tensors(model, name: str = "default") -> dict[str, torch.Tensor]:
    return peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def bytes_of(*groups: dict[str, torch.Tensor]) -> int:
    """Bound the size of these tensors' files, with room for the small ones."""
    return (1 << 18) + sum(tensor.nbytes for group in groups for tensor in group.values())
