"""What every measurement here says of itself and of this process."""
import argparse
import contextlib
import ctypes
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("triton", "liger-kernel", "cut-cross-entropy")


def machine(device: str, packages: tuple[str, ...] = PACKAGES) -> dict:
    """Describe processor, versions, commit and date, to place the numbers."""
    import torch
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    commit = ""
    with contextlib.suppress(OSError):  # a machine without git
        asked = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout
    return {"device": torch.cuda.get_device_name() if device == "cuda" else cpu, "threads": torch.get_num_threads(),
            "load before": os.getloadavg()[0], "versions": versions, "commit": commit.strip(),
            "date": date.today().isoformat(), **({"driver": driver()} if device == "cuda" else {})}


def driver() -> str | None:
    """Return the version of the NVIDIA driver, None where nvidia-smi does not tell."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0] or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def resident_bytes(key: str) -> int:
    """Read VmRSS, VmSize or VmHWM, the highest since its last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def reset_peak(device: str) -> int:
    """Begin to count the most that is held; return the bytes held now: of the allocator, on a CPU resident (Linux)."""
    if device == "cuda":
        import torch
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not hide what comes
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return resident_bytes("VmRSS")


def peak_bytes(device: str) -> int:
    """Measure the most bytes held since reset_peak."""
    if device == "cuda":
        import torch
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resident_bytes("VmHWM")


def positive(text: str) -> int:
    """Parse a whole number above 0, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def new_table(title: str, names, left=()):
    """Make a rich Table: its columns stand right, but the first and those of `left`."""
    from rich.table import Column, Table
    return Table(*(Column(name, justify="left" if name in (names[0], *left) else "right") for name in names),
                 title=title)


def show(table, width: int, always: bool = False) -> None:
    """Print a table: as wide as the terminal, elsewhere or always `width` columns."""
    from rich.console import Console
    Console(width=None if sys.stdout.isatty() and not always else width).print(table)


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write rows as JSON, one a line, so that a change is a line in a diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def told_path(path: Path) -> str:
    """Write a path as short as it is from the current folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
