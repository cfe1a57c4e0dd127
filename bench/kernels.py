"""minimath's loss kernel against its peers: speed, memory, and error against float64.

    python -m bench.kernels                  # CPU, N = 1024 and 4096 tokens, fp32 and bf16
    python -m bench.kernels --device cuda    # the same on a GPU, with Liger's and CCE's own kernels
    python -m bench.kernels --shapes 4096x896x151936 --dtypes bf16 --rounds 9

The task is mean NLL of N tokens under a frozen head (V, D), forward, and forward plus the gradient in hidden.
All methods take turns within each round in one process, so that a change in the machine's load hits all
alike; times are the best of the rounds, since other work on the machine only adds, and speeds are given of
the best and of the medians. Peak extra memory is measured in a process per method: on the CPU the highest
resident size during one warm call above what was resident before it, on a GPU the allocator's peak. Writes
kernels-<device>.json and .png to bench/results, or to the folder named by --out.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from minimath.kernels import linear_cross_entropy, reference

RESULTS = Path(__file__).parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OURS = "minimath"
ERROR_ROWS = 256  # rows compared with float64


class Shape(NamedTuple):
    """Tokens, hidden size, vocabulary."""

    n: int
    d: int
    v: int

    def __str__(self):
        return "x".join(map(str, self))


def ours(hidden, weight, target):
    return linear_cross_entropy(hidden, weight, target)


def eager(hidden, weight, target):
    return F.cross_entropy((hidden @ weight.t()).float(), target)


def methods(device: str) -> dict:
    """Name -> function(hidden, weight, target) -> mean NLL, for everything that runs on this device."""
    found = {OURS: ours, "eager": eager, "torch.compile": torch.compile(eager)}
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = F.linear_cross_entropy
    try:
        from cut_cross_entropy import linear_cross_entropy as cce

        impl = "cce" if device == "cuda" else "torch_compile"
        found["cut-cross-entropy"] = lambda hidden, weight, target: cce(hidden, weight, target, impl=impl)
    except ImportError:
        pass
    if device == "cuda":  # on the CPU it would run in Triton's interpreter only
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            liger = LigerFusedLinearCrossEntropyLoss()
            found["liger"] = lambda hidden, weight, target: liger(weight, hidden, target)
        except ImportError:
            pass
    return found


def inputs(shape: Shape, dtype: torch.dtype, device: str):
    """hidden (N, D) requiring grad, weight (V, D), target (N,): logits of a few units, as a trained head
    gives."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape.n, shape.d, generator=draw).to(device, dtype).requires_grad_()
    weight = (torch.randn(shape.v, shape.d, generator=draw) * 2 / shape.d**0.5).to(device, dtype)
    return hidden, weight, torch.randint(0, shape.v, (shape.n,), generator=draw).to(device)


def forward(method, hidden, weight, target):
    with torch.no_grad():
        return method(hidden, weight, target)


def forward_backward(method, hidden, weight, target):
    hidden.grad = None
    loss = method(hidden, weight, target)
    loss.backward()
    return loss.detach()


PHASES = {"forward": forward, "forward+backward": forward_backward}


def seconds(phase, method, arguments, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    phase(method, *arguments)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def resident_bytes(key: str) -> int:
    """VmRSS or VmHWM (the highest since it was last reset) of this process, from /proc."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def peak_extra_bytes(method, phase, arguments, device: str) -> int:
    """Highest memory during one warm call above what is held before it."""
    phase(method, *arguments)
    arguments[0].grad = None
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        phase(method, *arguments)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what the warm call freed must not hide what the next one takes
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    phase(method, *arguments)
    return resident_bytes("VmHWM") - before


def peak_in_child(name: str, shape: Shape, dtype: str, phase: str, device: str) -> int | None:
    """peak_extra_bytes of one method in a process of its own; None where it can't be measured."""
    command = [
        sys.executable,
        "-m",
        "bench.kernels",
        "--device",
        device,
        "--shapes",
        str(shape),
        "--dtypes",
        dtype,
        "--memory-of",
        name,
        phase,
    ]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    lines = done.stdout.split()
    return int(lines[-1]) if done.returncode == 0 and lines else None


def errors(method, shape: Shape, dtype: torch.dtype, device: str) -> dict:
    """Relative error of the loss and of the gradient (2-norm) against float64, on ERROR_ROWS rows."""
    hidden, weight, target = inputs(shape._replace(n=min(shape.n, ERROR_ROWS)), dtype, device)
    exact_hidden = hidden.detach().double().requires_grad_()
    exact, _ = reference.linear_token_loss(
        exact_hidden, weight.double(), target, lambda stats, rows: -stats.logp / len(target)
    )
    exact.backward()
    loss = forward_backward(method, hidden, weight, target)
    difference = (hidden.grad.double() - exact_hidden.grad).norm() / exact_hidden.grad.norm()
    return {
        "loss_error": abs(loss.item() - exact.item()) / abs(exact.item()),
        "grad_error": difference.item(),
    }


def measure(shape: Shape, dtype_name: str, device: str, rounds: int) -> list[dict]:
    """One row per method that runs: seconds of both phases, peak extra bytes, errors."""
    dtype, arguments, running, rows = DTYPES[dtype_name], inputs(shape, DTYPES[dtype_name], device), {}, []
    for name, method in methods(device).items():
        try:
            for phase in PHASES.values():
                phase(method, *arguments)
            running[name] = method, errors(method, shape, dtype, device)
        except Exception as problem:  # a peer that does not run here is a result, not a failure of the bench
            if name == OURS:
                raise
            print(f"{name} does not run at {shape} {dtype_name}: {str(problem).splitlines()[0][:120]}")
    times = {(name, phase): [] for name in running for phase in PHASES}
    for _ in range(rounds):
        for name, phase in times:
            times[name, phase].append(seconds(PHASES[phase], running[name][0], arguments, device))
    for name, (_, error) in running.items():
        row = {"shape": str(shape), "dtype": dtype_name, "method": name, **error}
        for phase in PHASES:
            row[f"{phase} median s"] = statistics.median(times[name, phase])
            row[f"{phase} best s"] = min(times[name, phase])
            row[f"{phase} peak bytes"] = peak_in_child(name, shape, dtype_name, phase, device)
        rows.append(row)
    for row in rows:
        for phase in PHASES:
            for kind in ("best", "median"):
                peers = [other[f"{phase} {kind} s"] for other in rows if other["method"] != OURS]
                speed = min(peers) / row[f"{phase} {kind} s"] if peers else None
                row[f"{phase} {kind} speed vs fastest peer"] = speed
    return rows


def machine(device: str) -> dict:
    """What a reader needs to place the numbers: processor, versions, commit."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    for name in ("triton", "liger-kernel", "cut-cross-entropy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "load before": os.getloadavg()[0],
        "versions": versions,
        "commit": commit,
    }


def show(rows: list[dict]) -> None:
    table = Table(
        title="mean NLL with a frozen head: best of the rounds; speed against the fastest peer: best, median"
    )
    for name in (
        "tokens x hidden x vocab",
        "dtype",
        "method",
        "fwd ms",
        "fwd+bwd ms",
        "speed fwd",
        "speed fwd+bwd",
        "peak MB fwd+bwd",
        "loss error",
        "grad error",
    ):
        table.add_column(name, justify="left" if name in ("dtype", "method") else "right")
    for row in rows:
        peak = row["forward+backward peak bytes"]
        cells = [
            row["shape"],
            row["dtype"],
            row["method"],
            f"{row['forward best s'] * 1e3:.1f}",
            f"{row['forward+backward best s'] * 1e3:.1f}",
        ]
        for phase in PHASES:
            speeds = [row[f"{phase} {kind} speed vs fastest peer"] for kind in ("best", "median")]
            known = row["method"] == OURS and None not in speeds
            cells.append("{:.2f}x {:.2f}x".format(*speeds) if known else "")
        cells += [
            "?" if peak is None else f"{peak / 1e6:.0f}",
            f"{row['loss_error']:.1e}",
            f"{row['grad_error']:.1e}",
        ]
        table.add_row(*cells, style="bold" if row["method"] == OURS else None)
    Console(width=150).print(table)


def plot(rows: list[dict], path: Path) -> None:
    """Time of forward plus backward and peak memory, one group of bars per shape and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys((row["shape"], row["dtype"]) for row in rows))
    names = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6))
    for axis, key, factor, label in (
        (axes[0], "forward+backward best s", 1e3, "forward + backward, ms"),
        (axes[1], "forward+backward peak bytes", 1e-6, "peak extra memory, MB"),
    ):
        for place, name in enumerate(names):
            found = {(row["shape"], row["dtype"]): row[key] for row in rows if row["method"] == name}
            axis.bar(
                [index + (place - len(names) / 2) * 0.8 / len(names) for index in range(len(groups))],
                [(found.get(group) or 0) * factor for group in groups],
                0.8 / len(names),
                label=name,
            )
        axis.set_xticks(range(len(groups)), [f"{shape}\n{dtype}" for shape, dtype in groups], fontsize=7)
        axis.set_yscale("log")
        axis.set_title(label, fontsize=10)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_shape(text: str) -> Shape:
    try:
        n, d, v = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected tokens x hidden x vocab, like 4096x576x49152"
        ) from None
    return Shape(n, d, v)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--shapes", nargs="+", type=parse_shape, default=[Shape(1024, 576, 49152), Shape(4096, 576, 49152)]
    )
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--memory-of", nargs=2, metavar=("METHOD", "PHASE"), help="print one method's peak bytes only"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the json and the plot")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "bench.kernels: torch sees no GPU here; use --device cpu, or a machine with one", file=sys.stderr
        )
        return 2
    if options.memory_of:
        name, phase = options.memory_of
        arguments = inputs(options.shapes[0], DTYPES[options.dtypes[0]], options.device)
        print(peak_extra_bytes(methods(options.device)[name], PHASES[phase], arguments, options.device))
        return 0
    about, rows = machine(options.device), []
    for shape in options.shapes:
        for dtype in options.dtypes:
            rows += measure(shape, dtype, options.device, options.rounds)
    show(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"kernels-{options.device}.json"
    path.write_text(json.dumps({**about, "rounds": options.rounds, "rows": rows}, indent=1) + "\n")
    plot(rows, path.with_suffix(".png"))
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path} and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
