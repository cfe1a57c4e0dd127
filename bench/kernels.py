"""minimath's loss kernel against its peers: speed, memory, and error against float64.

    python -m bench.kernels                  # CPU, SmolLM2's and Qwen2.5-0.5B's heads, fp32 and bf16
    python -m bench.kernels --device cuda    # the same on a GPU, with Liger's and CCE's own kernels
    python -m bench.kernels --shapes 4096x896x151936 --dtypes bf16 --rounds 9

The task is mean NLL of N tokens under a frozen head (V, D), forward, and forward plus the gradient in hidden. All
methods take turns within each round in one process, so that a change in the machine's load hits all alike; speeds are
ratios of medians and of the best of the rounds. A process per method, with empty compiler caches, tells the peak extra
memory (CPU: highest resident size during one warm call above that before it, GPU: the allocator's peak), how long the
first call takes, and the first at another number of tokens. On a GPU that bench/cards.py knows, times are also given as
a share of its roofline. Writes kernels-<device>.json and .png to bench/results, or to the folder named by --out.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from minimath.kernels import linear_cross_entropy, reference

from .cards import Card, card_named, nearest_names
from .measure import RESULTS, ROOT, machine, peak_bytes, positive, reset_peak, told_path
from .work import share_of_roofline

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


def eager(hidden, weight, target):
    return F.cross_entropy((hidden @ weight.t()).float(), target)


def methods(device: str) -> dict:
    """Name every function of hidden, weight, target that runs on this device."""
    found = {OURS: linear_cross_entropy, "eager": eager, "torch.compile": torch.compile(eager)}
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
    """Draw hidden that requires grad, weight, target.

    The logits are of a few units, as a trained head gives.
    """
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


def peak_extra_bytes(method, phase, arguments, device: str) -> int:
    """Measure the highest memory during one warm call above what is held before it."""
    phase(method, *arguments)
    arguments[0].grad = None
    before = reset_peak(device)
    phase(method, *arguments)
    return peak_bytes(device) - before


class Cold(NamedTuple):
    """What a fresh process tells of a method."""
    peak_bytes: int  # extra, during a warm call
    first_s: float  # the first call, compilation and all
    other_n_s: float  # the first call at another number of tokens


def cold(name: str, shape: Shape, dtype: str, phase: str, device: str) -> Cold:
    """Measure one method in this process, which must be fresh."""
    method, arguments = methods(device)[name], inputs(shape, DTYPES[dtype], device)
    first = seconds(PHASES[phase], method, arguments, device)
    peak = peak_extra_bytes(method, PHASES[phase], arguments, device)
    other = inputs(shape._replace(n=max(1, shape.n * 3 // 4 - 5)), DTYPES[dtype], device)
    return Cold(peak, first, seconds(PHASES[phase], method, other, device))


def cold_in_child(name: str, shape: Shape, dtype: str, phase: str, device: str) -> Cold | None:
    """Call `cold` in a process with empty compiler caches; None where it fails."""
    words = ["--device", device, "--shapes", str(shape), "--dtypes", dtype, "--cold", name, phase]
    with tempfile.TemporaryDirectory() as empty:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{empty}/inductor", "TRITON_CACHE_DIR": f"{empty}/triton"}
        done = subprocess.run([sys.executable, "-m", "bench.kernels", *words], cwd=ROOT, env=os.environ | caches,
                              capture_output=True, text=True)
    lines = done.stdout.splitlines()
    return Cold(*json.loads(lines[-1])) if done.returncode == 0 and lines else None


def errors(method, shape: Shape, dtype: torch.dtype, device: str) -> dict:
    """Compute the 2-norm errors of loss and gradient, relative to float64."""
    hidden, weight, target = inputs(shape._replace(n=min(shape.n, ERROR_ROWS)), dtype, device)
    exact_hidden = hidden.detach().double().requires_grad_()
    exact, _ = reference.linear_token_loss(exact_hidden, weight.double(), target,
                                           lambda stats, rows: -stats.logp / len(target))
    exact.backward()
    loss = forward_backward(method, hidden, weight, target)
    difference = (hidden.grad.double() - exact_hidden.grad).norm() / exact_hidden.grad.norm()
    return {"loss_error": abs(loss.item() - exact.item()) / abs(exact.item()), "grad_error": difference.item()}


def measure(shape: Shape, dtype_name: str, device: str, rounds: int, card: Card | None = None) -> list[dict]:
    """Make one row per method that runs.

    Seconds of both phases, what a fresh process tells, errors, and on a known card the share of its roofline.
    """
    torch.compiler.reset()  # else its limit of variants per function sends the later cells of torch.compile to eager
    dtype, arguments, running, rows = DTYPES[dtype_name], inputs(shape, DTYPES[dtype_name], device), {}, []
    for name, method in methods(device).items():
        try:
            for phase in PHASES.values():
                phase(method, *arguments)
            running[name] = method
        except Exception as problem:  # a peer that does not run here is a result, not a failure of the bench
            if name == OURS:
                raise
            print(f"{name} does not run at {shape} {dtype_name}: {str(problem).splitlines()[0][:120]}")
    times = {(name, phase): [] for name in running for phase in PHASES}
    for _ in range(rounds):
        for name, phase in times:
            times[name, phase].append(seconds(PHASES[phase], running[name], arguments, device))
    for name, method in running.items():
        # after the rounds: another number of tokens makes torch.compile go on with a slower variant for any number
        row = {"shape": str(shape), "dtype": dtype_name, "method": name, **errors(method, shape, dtype, device)}
        for phase in PHASES:
            row[f"{phase} median s"] = statistics.median(times[name, phase])
            row[f"{phase} best s"] = min(times[name, phase])
            fresh = cold_in_child(name, shape, dtype_name, phase, device)
            row[f"{phase} peak bytes"] = fresh and fresh.peak_bytes
            row[f"{phase} first call s"] = fresh and round(fresh.first_s, 3)
            row[f"{phase} other N s"] = fresh and round(fresh.other_n_s, 3)
            if card:
                share = share_of_roofline(card, shape, dtype_name, phase != "forward", row[f"{phase} median s"])
                row[f"{phase} share of roofline"] = float(f"{share:.3g}")
        rows.append(row)
    for row in rows:
        for phase in PHASES:
            for kind in ("best", "median"):
                peers = [other[f"{phase} {kind} s"] for other in rows if other["method"] != OURS]
                speed = min(peers) / row[f"{phase} {kind} s"] if peers else None
                row[f"{phase} {kind} speed vs fastest peer"] = speed
    return rows


def show(rows: list[dict]) -> None:
    """Print the table: medians, and of ours the speed against the fastest peer."""
    table = Table(title="mean NLL with a frozen head; speed: ours against the fastest peer, of medians, of the best")
    share = any("forward share of roofline" in row for row in rows)
    names = ["tokens x hidden x vocab", "dtype", "method", "fwd ms", "fwd+bwd ms", "speed fwd", "speed fwd+bwd"]
    names += ["peak MB", "first call s", "other N s", "loss error", "grad error"] + ["roofline"] * share
    for name in names:
        table.add_column(name, justify="left" if name in ("dtype", "method") else "right")
    both = "forward+backward"
    for row in rows:
        cells = [row["shape"], row["dtype"], row["method"]]
        cells += [f"{row[f'{phase} median s'] * 1e3:.1f}" for phase in PHASES]
        for phase in PHASES:
            speeds = [row[f"{phase} {kind} speed vs fastest peer"] for kind in ("median", "best")]
            known = row["method"] == OURS and None not in speeds
            cells.append("{:.2f}x {:.2f}x".format(*speeds) if known else "")
        peak, first, other = (row[f"{both} {name}"] for name in ("peak bytes", "first call s", "other N s"))
        cells += ["?"] * 3 if peak is None else [f"{peak / 1e6:.0f}", f"{first:.1f}", f"{other:.2f}"]
        cells += [f"{row['loss_error']:.1e}", f"{row['grad_error']:.1e}"]
        if share:
            cells.append(" ".join(f"{row[f'{phase} share of roofline']:.0%}" for phase in PHASES))
        table.add_row(*cells, style="bold" if row["method"] == OURS else None)
    Console(width=172).print(table)


def plot(rows: list[dict], path: Path) -> None:
    """Draw time of forward plus backward and peak memory, by shape and dtype."""
    from matplotlib.figure import Figure
    groups = list(dict.fromkeys((row["shape"], row["dtype"]) for row in rows))
    names = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(11, 3.6))
    axes = figure.subplots(1, 2)
    panels = (("forward+backward median s", 1e3, "forward + backward, ms (median)"),
              ("forward+backward peak bytes", 1e-6, "peak extra memory, MB"))
    for axis, (key, factor, label) in zip(axes, panels):
        for place, name in enumerate(names):
            found = {(row["shape"], row["dtype"]): row[key] for row in rows if row["method"] == name}
            axis.bar([index + (place - len(names) / 2) * 0.8 / len(names) for index in range(len(groups))],
                     [(found.get(group) or 0) * factor for group in groups], 0.8 / len(names), label=name)
        labels = [shape.replace("x", "\n") + f"\n{dtype}" for shape, dtype in groups]
        axis.set_xticks(range(len(groups)), labels, fontsize=7)
        axis.set_xlabel("tokens, hidden, vocabulary, dtype", fontsize=7)
        axis.set_yscale("log")
        axis.set_title(label, fontsize=10)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parse_shape(text: str) -> Shape:
    try:
        n, d, v = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected tokens x hidden x vocab, like 4096x576x49152") from None
    return Shape(n, d, v)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", nargs="+", type=parse_shape,
                        default=[Shape(1024, 576, 49152), Shape(4096, 576, 49152), Shape(2048, 896, 151936)])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=positive, default=7, help="turns of each method")
    parser.add_argument("--cold", nargs=2, metavar=("METHOD", "PHASE"),
                        help="print what this fresh process tells of one method")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the json and the plot")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench.kernels: torch sees no GPU here; use --device cpu, or a machine with one", file=sys.stderr)
        return 2
    if options.cold:
        name, phase = options.cold
        print(json.dumps(cold(name, options.shapes[0], options.dtypes[0], phase, options.device)))
        return 0
    about, rows = machine(options.device), []
    card = card_named(about["device"]) if options.device == "cuda" else None
    if options.device == "cuda" and card is None:
        print(f"{about['device']} is not in bench/cards.py: no share of its roofline; nearest there: "
              f"{', '.join(nearest_names(about['device']))}")
    for shape in options.shapes:
        for dtype in options.dtypes:
            rows += measure(shape, dtype, options.device, options.rounds, card)
    show(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"kernels-{options.device}.json"
    path.write_text(json.dumps({**about, "rounds": options.rounds, "rows": rows}, indent=1) + "\n")
    plot(rows, path.with_suffix(".png"))
    print(f"wrote {told_path(path)} and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
