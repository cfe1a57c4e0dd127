"""Files that are written whole or not at all, and read again only when they are what was written."""
import contextlib
import glob
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

from safetensors import SafetensorError

from minimath.core import dist
from minimath.core.errors import UserError

LEFT_S = 3600.0  # after which a hidden file is no longer being written


def cache_home() -> Path:
    """Find $MINIMATH_CACHE, else minimath/ in $XDG_CACHE_HOME or ~/.cache."""
    given, home = os.environ.get("MINIMATH_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(given or Path(home or Path.home() / ".cache") / "minimath")


def write_whole(path: Path, text: str) -> None:
    """Write a text file, in process 0: whole, or the old file stays.

    Of two processes that write it at once the last one wins. Raises UserError when the disk is full or not writable."""
    if not dist.is_main():
        return
    temp = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        for leftover in path.parent.glob(f".tmp-[0-9]*-{glob.escape(path.name)}"):  # of killed processes
            with contextlib.suppress(OSError):
                if time.time() - leftover.stat().st_mtime > LEFT_S:
                    leftover.unlink()
        temp.write_text(text, encoding="utf-8")
        flush_to_disk(temp)
        os.replace(temp, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; free some space or check the permissions, then go on "
                        "with resume=true") from None


def write_atomically(target: Path, write, facts: dict, *, bytes_needed: int) -> None:
    """Let write fill a hidden folder, add a manifest, flush and rename it."""
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
        (temp / "manifest.json").write_text(json.dumps(manifest | {"sha256": manifest_digest(manifest)}, indent=1))
        for path in (*temp.iterdir(), temp):
            flush_to_disk(path)
        if target.exists():  # a folder can't be renamed over a filled one
            os.replace(target, old)
        os.replace(temp, target)
        flush_to_disk(target.parent)
        finish_rename(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temp, ignore_errors=True)
        with contextlib.suppress(OSError):  # where this fails too, the next load or save does it
            if not target.exists():
                finish_rename(target)
        raise UserError(f"cannot write {target} ({error}): it needs {bytes_needed:,} bytes, {free_bytes(target):,} are "
                        "free; free some space or quota, or check the permissions; what was saved before is "
                        "intact") from error


def finish_rename(target: Path) -> None:
    """Put back what stood at `target`, or delete it where the new one stands there."""
    old = target.with_name(f".old-{target.name}")
    if target.exists() and old.exists():
        discard(old)
    elif old.exists():
        os.replace(old, target)


def discard(folder: Path) -> None:
    """Delete a folder; renamed first, so that a crash leaves no half of it."""
    with contextlib.suppress(OSError):  # what stays costs space only, and the next save tries again
        remove(folder.replace(folder.with_name(f".tmp-gone-{folder.name}")))


def remove(path: Path) -> None:
    """Delete a folder and what is in it; of a link the link, never what it leads to."""
    path.unlink() if path.is_symlink() else shutil.rmtree(path)


def free_bytes(path: Path) -> int:
    """Bytes free on the disk where `path` is or would be."""
    return shutil.disk_usage(next(folder for folder in path.absolute().parents if os.path.isdir(folder))).free


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
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


def manifest_digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def read_manifest(folder: Path) -> dict:
    """Read manifest.json: OSError when it is missing, ValueError when damaged."""
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict):
        raise ValueError("not an object")
    digest = manifest.pop("sha256", None)  # None: saved before manifests held their own hash
    if not manifest.keys() <= {"step", "best", "files"} or digest not in (None, manifest_digest(manifest)):
        raise ValueError("content differs from its hash")
    return manifest
