"""Checkpoints: written whole or not at all, verified before they are read, and never a pickle.

    run/checkpoints/step-000050/
        adapter_config.json  adapter_model.safetensors     the adapter, as peft writes it
        optimizer.safetensors  optimizer.json              "<param index>.<name>" -> tensor, or number
        rng.safetensors  rng.json                          torch and CUDA; Python and numpy
        state.json                                         what the loop wants back (step, data cursor, ...)
        manifest.json                                      bytes and sha256 of each file, and its own; written last

A checkpoint is built in a hidden folder beside its final place, flushed to disk, then renamed: a reader sees the old
one or the new one. The manifest also says whether it was the best so far: this fact is as atomic as the rest.
"""
import contextlib
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minimath import ranks
from minimath.config import UserError
from minimath.train_state import optimizer_state, restore_optimizer, restore_rng, rng_state

try:
    import fcntl
except ImportError:  # Windows has no flock: two writers are not noticed there
    fcntl = None

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def save_checkpoint(run_dir, step: int, *, model, optimizer, state: dict, keep: int, best: bool = False) -> Path:
    """Write run_dir/checkpoints/step-<step> and remove all but the `keep` newest and the best one.

    state must be json-able; `step` is added to it. Random states are saved as well. Raises UserError with the path and
    the bytes needed when the disk is full or not writable; earlier checkpoints are intact then. Of several processes
    the first one writes.
    """
    target = Path(run_dir) / "checkpoints" / f"step-{step:06d}"
    if not ranks.is_main():
        return target
    tensors, numbers = optimizer_state(optimizer)
    rng_tensors, rng_numbers = rng_state()
    texts = {"optimizer.json": numbers, "rng.json": rng_numbers, "state.json": state | {"step": step}}
    texts = {name: json.dumps(content) for name, content in texts.items()}  # fails before anything is written

    def write(folder: Path) -> None:
        write_adapter(model, folder)
        save_file(tensors, folder / "optimizer.safetensors")
        save_file(rng_tensors, folder / "rng.safetensors")
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")

    finish_renames(run_dir)
    size = bytes_on_disk(adapter_tensors(model), tensors, rng_tensors) + sum(map(len, texts.values()))
    write_atomically(target, write, {"step": step, "best": best}, bytes_needed=size)
    # newer ones are damaged (load_checkpoint went past them): they don't count, and their steps come again
    folders = [folder for folder in list_checkpoints(run_dir) if step_of(folder) <= step]
    kept = {*folders[:keep], best_checkpoint(run_dir), target}
    for folder in folders:
        if folder not in kept:
            discard(folder)
    return target


def load_checkpoint(run_dir, *, model, optimizer=None) -> dict | None:
    """Restore adapter, optimizer and random states from the newest valid checkpoint, bitwise -> its state.

    None when the run has no checkpoint. A damaged one is skipped with a warning; UserError when all are
    damaged, or when a sound one belongs to another adapter or optimizer (nothing is changed then).
    """
    if ranks.is_main():
        finish_renames(run_dir)
    ranks.wait()
    folders = list_checkpoints(run_dir)
    for folder in folders:
        problems = verify(folder)
        if problems:
            warnings.warn(f"checkpoint {folder} is damaged ({problems[0]}); trying the one before",
                          stacklevel=2)
            continue
        try:
            restore(folder, model, optimizer)
            return read_json(folder / "state.json")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder} is whole, but not what minimath writes ({type(error).__name__}: "
                            f"{str(error)[:100]}); only safetensors and JSON are read. Start again with another "
                            "out=") from None
    if folders:
        raise UserError(f"none of the {len(folders)} checkpoints of {run_dir} is intact; start again with "
                        "another out=, or copy one back from a backup")
    return None


def verify(folder) -> list[str]:
    """What is wrong with a checkpoint or saved adapter, against its manifest; [] when it is whole."""
    folder = Path(folder)
    try:
        files = read_manifest(folder)["files"]
        expected = [(name, entry["bytes"], entry["sha256"]) for name, entry in files.items()]
    except OSError as error:
        return [f"manifest.json: {error.strerror}"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return ["manifest.json: not the JSON that was written"]
    problems = [f"{name}: not in the manifest" for name in ADAPTER_FILES if name not in files]
    for name, size, digest in expected:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            problems.append(f"{name}: missing")
        elif path.stat().st_size != size:
            problems.append(f"{name}: {path.stat().st_size} bytes instead of {size}")
        elif sha256(path) != digest:
            problems.append(f"{name}: content differs from its hash")
    return problems


def read_manifest(folder: Path) -> dict:
    """manifest.json of a checkpoint or saved adapter. Raises OSError when it is missing, ValueError when damaged."""
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict):
        raise ValueError("not an object")
    digest = manifest.pop("sha256", None)  # None: saved before manifests held their own hash
    if not manifest.keys() <= {"step", "best", "files"} or digest not in (None, manifest_digest(manifest)):
        raise ValueError("content differs from its hash")
    return manifest


def manifest_digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def list_checkpoints(run_dir) -> list[Path]:
    """Checkpoint folders, newest first."""
    folder = Path(run_dir) / "checkpoints"
    found = [path for path in folder.glob("step-*") if path.name[5:].isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    return int(folder.name[5:])


def finish_renames(run_dir) -> None:
    """Put back checkpoints that a crash between the two renames of write_atomically left set aside."""
    for old in (Path(run_dir) / "checkpoints").glob(".old-step-*"):
        try:
            finish_rename(old.with_name(old.name.removeprefix(".old-")))
        except OSError as error:
            raise UserError(f"cannot rename {old} to {old.name[5:]} ({error.strerror}), which an interrupted save left "
                            "undone; check the permissions") from None


def finish_rename(target: Path) -> None:
    """Put back what stood at `target`, or delete it where the new one stands there."""
    old = target.with_name(f".old-{target.name}")
    if target.exists() and old.exists():
        discard(old)
    elif old.exists():
        os.replace(old, target)


def discard(folder: Path) -> None:
    """Delete a folder; renamed first, so that a crash leaves no half of it under its name."""
    with contextlib.suppress(OSError):  # what stays costs space only, and the next save tries again
        gone = folder.with_name(f".tmp-gone-{folder.name}")
        os.replace(folder, gone)
        remove(gone)


def remove(path: Path) -> None:
    """Delete a folder and what is in it; of a link the link, never what it leads to."""
    path.unlink() if path.is_symlink() else shutil.rmtree(path)


def best_checkpoint(run_dir) -> Path | None:
    """The newest checkpoint that was saved as the best so far."""
    for folder in list_checkpoints(run_dir):
        with contextlib.suppress(OSError, ValueError):
            if read_manifest(folder).get("best"):
                return folder
    return None


def save_adapter(model, path) -> Path:
    """Write the adapter alone, atomically, as a folder that peft reads. UserError as in save_checkpoint."""
    if ranks.is_main():
        write_atomically(Path(path), lambda folder: write_adapter(model, folder), {},
                         bytes_needed=bytes_on_disk(adapter_tensors(model)))
    return Path(path)


@contextlib.contextmanager
def lock_run(run_dir):
    """Hold the run folder for this process, or for those started together. UserError when another one writes there, or
    it can't be made."""
    if not ranks.is_main():
        yield
        return
    path = Path(run_dir) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to the run folder {run_dir}: {error.strerror}; choose another out=") from None
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "unknown"
                raise UserError(f"{run_dir} is in use by process {owner}; wait for it, or choose another "
                                "out=") from None
            except OSError as error:  # some network file systems have no locks
                warnings.warn(f"{run_dir} can't be locked ({error.strerror}); start one writer only", stacklevel=3)
        with contextlib.suppress(OSError):  # on a full disk only the name of the owner is lost
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), f"{os.getpid()}\n".encode())
        yield


def write_atomically(target: Path, write, facts: dict, *, bytes_needed: int) -> None:
    """write(folder) fills a hidden folder; it gets its manifest (with `facts`), is flushed and renamed to target."""
    temp, old = target.with_name(f".tmp-{target.name}"), target.with_name(f".old-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # of a killed process; lock_run keeps other writers out. Other hidden folders may be the user's
        for leftover in target.parent.glob(f".tmp-*{target.name.rstrip('0123456789')}*"):
            with contextlib.suppress(OSError):
                remove(leftover)
        finish_rename(target)
        temp.mkdir()
        write(temp)
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(temp.iterdir())}
        manifest = {**facts, "files": files}
        manifest["sha256"] = manifest_digest(manifest)
        (temp / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (*temp.iterdir(), temp):
            flush_to_disk(path)
        if target.exists():  # a folder can't be renamed over a filled one
            os.replace(target, old)
        os.replace(temp, target)
        flush_to_disk(target.parent)
        if old.exists():
            discard(old)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temp, ignore_errors=True)
        with contextlib.suppress(OSError):  # where this fails too, the next load or save does it
            if not target.exists():
                finish_rename(target)
        raise UserError(f"cannot write {target} ({error}): it needs {bytes_needed:,} bytes, {free_bytes(target):,} are "
                        "free; free some space or quota, or check the permissions; what was saved before is "
                        "intact") from error


def free_bytes(path: Path) -> int:
    """Bytes free on the disk where `path` is or would be."""
    return shutil.disk_usage(next(folder for folder in path.absolute().parents if os.path.isdir(folder))).free


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder (the latter where the system can)."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_adapter(model, folder: Path) -> None:
    """Adapter files as peft writes them, without its empty model card."""
    # "auto" would ask the hub whether the vocabulary was resized; trained embeddings are in modules_to_save
    # anyway
    model.save_pretrained(folder, safe_serialization=True, selected_adapters=["default"],
                          save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def adapter_tensors(model) -> dict[str, torch.Tensor]:
    return peft.get_peft_model_state_dict(model, save_embedding_layers=False)


def bytes_on_disk(*groups: dict[str, torch.Tensor]) -> int:
    """What these tensors take as safetensors files: an upper estimate, with room for the small files beside them."""
    return (1 << 16) + sum(len(name) + 128 + tensor.nbytes for group in groups for name, tensor in group.items())


def restore(folder: Path, model, optimizer) -> None:
    """Copy a verified checkpoint into model, optimizer and random generators; UserError when it doesn't fit."""
    saved, own = load_file(folder / "adapter_model.safetensors"), adapter_tensors(model)
    differing = [name for name in {**saved, **own} if name not in saved or name not in own
                 or (saved[name].shape, saved[name].dtype) != (own[name].shape, own[name].dtype)]
    if differing:
        raise UserError(f"{folder} was saved by another adapter ({len(differing)} tensors differ, first "
                        f"{differing[0]}); use its model, dtype and lora_* options, or a new out=")
    if optimizer is not None:
        restore_optimizer(optimizer, load_file(folder / "optimizer.safetensors"),
                          read_json(folder / "optimizer.json"), where=folder)
    peft.set_peft_model_state_dict(model, saved)
    restore_rng(load_file(folder / "rng.safetensors"), read_json(folder / "rng.json"))
