"""What minimath does on a card, proven and measured by one command.

    python -m bench.gpu                                  # 8 minutes on a card of H100 class
    python -m bench.gpu --only kernels rollout --minutes 4 --out proof
    python -m bench.gpu --device cpu --tiny              # every line of it on tiny sizes, as CI runs it

Needs torch, triton, transformers and peft with what they install, no download and no file from elsewhere; bitsandbytes,
Liger and cut-cross-entropy take part where they are installed. The parts, what proves correctness first:

    env      card, driver, versions, free memory; the self test of `minimath doctor`
    kernels  every kernel against float64, beside torch's own error in the same dtype, and the same bits twice
    rollout  tokens with CUDA graphs, without, and by `generate`; log-probs against the training forward; tokens/s
    resume   a run that was stopped and resumed, against an unbroken one
    nf4      the gradient of 4-bit layers before and after a rollout; a rollout after training
    train    gradients of fused and other layers; SFT and RLAIF steps: time, memory beside the planner's number
    speed    loss and gradient, forward and decode attention beside peers, as shares of the card's roofline

The model has the shape of Qwen2.5-0.5B with random weights made on the card. Each part is a process of its own with a
time limit, so that an error of the card or a hang ends that part alone; what it had found until then counts. gpu.json
in --out is written anew after each part. A part that the time left does not allow is left out, and said. The exit
status is 1 when something is wrong, whatever the speed.
"""
import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from bench.measure import RESULTS, ROOT, told_path

MINUTES = 8.0
KILL_S = 10.0  # a process that waits for a card that hangs may not even be killed


class Part(NamedTuple):
    """One part: its function, and seconds it may need on a card of H100 class."""
    target: str
    seconds: float


PARTS = {
    "env": Part("bench.gpu.common:env", 30),
    "kernels": Part("bench.gpu.exactness:kernels", 90),
    "rollout": Part("bench.gpu.decoding:rollout", 80),
    "resume": Part("bench.gpu.steps:resume", 60),
    "nf4": Part("bench.gpu.decoding:nf4", 50),
    "train": Part("bench.gpu.steps:train", 80),
    "speed": Part("bench.gpu.speed:speed", 90),
}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=MINUTES, help="all parts together")
    parser.add_argument("--out", type=Path, help="folder of gpu.json; default: bench/results, with --tiny none")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
                        help="of: " + ", ".join(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the command itself")
    return parser.parse_args(words)


# ---- the parent: it imports no torch, so that no error of a card is its own

def run_part(part: Part, limit: float, spec: dict) -> dict:
    """Run a part in a process of its own -> what it found, also where it died or hung."""
    found, log, started = Path(spec["found"]), Path(spec["found"]).with_suffix(".log"), time.monotonic()
    with open(log, "w") as said:
        child = subprocess.Popen([sys.executable, "-m", "bench.gpu", json.dumps(spec | {"target": part.target})],
                                 cwd=ROOT, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
                                 env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
        try:
            fault = fault_of(child.wait(limit))
        except subprocess.TimeoutExpired:
            fault = f"no end within {limit:.0f} s"
        finally:
            stop(child)
    result = json.loads(found.read_text()) if found.exists() else {"failed": []}
    if fault or not result.get("ended"):
        result["failed"].append(fault or "ended before its end")
    if result["failed"]:
        result["log"] = log.read_text(errors="replace")[-4000:]
    return result | {"seconds": round(time.monotonic() - started, 1)}


def fault_of(status: int) -> str:
    """Say how a process died; "" where it ended by itself."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"ended with status {status}" if status else ""


def stop(child: subprocess.Popen) -> None:
    """Kill what a part has started, and wait for it as long as makes sense."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait(KILL_S)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass


def run_parts(options: argparse.Namespace, work: Path, write) -> dict[str, dict]:
    """Run the parts one by one, and write the results after each."""
    results, end = {}, time.monotonic() + 60 * options.minutes
    for name in (name for name in PARTS if name in options.only):
        part, left = PARTS[name], end - time.monotonic()
        if left < part.seconds / 2:
            results[name] = {"failed": [], "left out": f"{left:.0f} s are left, it may need {part.seconds:.0f}"}
        else:
            spec = {"device": options.device, "tiny": options.tiny, "found": str(work / f"{name}.json")}
            longest = 2 * part.seconds * max(1.0, options.minutes / MINUTES)
            results[name] = run_part(part, min(left, longest), spec)
        write(results)
        print(line_of(name, results[name]), flush=True)
        if any("sees no card" in fault for fault in results[name]["failed"]):
            break
    return results


def state_of(result: dict) -> str:
    return "left out" if "left out" in result else "FAILED" if result["failed"] else \
        "skipped" if result.get("skipped") and not result.get("rows") else "ok"


def line_of(name: str, result: dict) -> str:
    """Write a part's row of the table."""
    checks = result.get("checks", 0)
    right = f"{checks - min(checks, result.get('wrong', 0))} of {checks} checks" if checks else ""
    return f"{name:<8} {state_of(result):<8} {right:>20} {result.get('seconds', 0):>7.1f} s"


def show(results: dict[str, dict]) -> None:
    """Print the table: every part with its figures, its faults and what it skipped."""
    where = next((result["machine"] for result in results.values() if "machine" in result), {})
    print("\n" + ", ".join(f"{key} {where[key]}" for key in ("device", "driver", "commit", "date") if where.get(key)))
    for name, result in results.items():
        print(line_of(name, result))
        for line in result.get("figures", []):
            print(f"    {line}")
        for kind in ("skipped", "failed"):
            lines = result.get(kind, [])
            for line in lines[:6]:
                print(f"    {kind}: {line}"[:400])
            if len(lines) > 6:
                print(f"    {kind}: {len(lines) - 6} more in gpu.json")
        if "left out" in result:
            print(f"    {result['left out']}: --only {name}, or more --minutes")


def main(words: list[str] | None = None) -> int:
    options = parse(words)
    path = options.out / "gpu.json" if options.out else None if options.tiny else RESULTS / "gpu.json"

    def write(results: dict) -> None:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".new").write_text(json.dumps(results, indent=1) + "\n")
            path.with_suffix(".new").replace(path)

    write({})  # a folder that can't be written is told now
    with tempfile.TemporaryDirectory() as work:
        results = run_parts(options, Path(work), write)
    show(results)
    wrong = [name for name, result in results.items() if result["failed"]]
    print(f"wrong: {', '.join(wrong)}" if wrong else "all that ran is right")
    if path:
        print(f"wrote {told_path(path)}")
    return 1 if wrong else 0


# ---- the child

def run_child(spec: dict) -> None:
    """Run one part's function on its findings."""
    from bench.gpu.common import Found, has_device
    found = Found(spec)
    try:
        if has_device(found):
            module, _, function = spec["target"].partition(":")
            getattr(importlib.import_module(module), function)(found)
    except Exception as error:
        traceback.print_exc()
        found.fail(f"{type(error).__name__}: {error}"[:600])
    found.end()


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):
        run_child(json.loads(sys.argv[1]))
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `timeout` must leave no process on the card
        sys.exit(main())
