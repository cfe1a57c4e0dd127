"""One process per trainer or engine of a comparison; each takes one step when told to, in turns.

A worker prints one JSON line once all is loaded and one after each step, and goes on when it reads a line
(train_worker.Turns is its side). Steps alternate, and every other round goes in the reverse order, so that a change in
the machine's load hits all alike.
"""
import contextlib
import json
import subprocess
import sys
import tempfile
import time

from bench.measure import ROOT
from minimath.core.errors import UserError

PAUSE_S = 0.3  # between steps: OpenMP threads of the process that just ran spin for 0.2 s


def start_worker(module: str, spec: dict, log, env: dict | None = None) -> subprocess.Popen:
    """Start `python -m module` for one spec; log: the file that takes its stderr."""
    return subprocess.Popen([sys.executable, "-m", module, json.dumps(spec)], cwd=ROOT, text=True, env=env,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)


def answer(worker: subprocess.Popen, name: str, log) -> dict:
    """Read the worker's next line.

    Raises UserError with the end of its log, without the traceback, when it died.
    """
    line = worker.stdout.readline()
    if line:
        return json.loads(line)
    worker.wait()
    log.seek(0)
    said = []
    for text in reversed(log.read().splitlines()):
        if text.startswith(" ") or len(said) == 3:
            break
        said = [text, *said] if text.strip() else said
    hint = " (out of memory? compare fewer at once, or smaller batches)" if worker.returncode == -9 else ""
    raise UserError(f"{name} ended with status {worker.returncode}{hint}: " + " | ".join(said))


def one_step(worker: subprocess.Popen, name: str, log) -> dict:
    with contextlib.suppress(BrokenPipeError):  # it died since its last answer; its log says why
        worker.stdin.write("step\n")
        worker.stdin.flush()
    return answer(worker, name, log)


def take_turns(names: list[str], start, rounds: int, label: str, warm_up: int,
               failed: dict | None = None) -> dict[str, list[dict]]:
    """Measure `rounds` steps of every worker -> {name: what each step told}.

    start(name, log): starts the worker of that name. failed: takes name -> reason of a worker that died, which then
    takes no more part. Raises UserError when it is None, or when the first of `names` dies.
    """
    steps, workers, logs = {name: [] for name in names}, {}, {}

    def drop(name: str, error: UserError) -> None:
        if failed is None or name == names[0]:
            raise error
        failed[name] = str(error)
        print(f"{label}: {error}", flush=True)
        stop(workers.pop(name))
        del steps[name]

    try:
        for name in names:  # one after the other, so that loading does not disturb loading
            logs[name] = tempfile.TemporaryFile("w+", errors="replace")
            workers[name] = start(name, logs[name])
            try:
                answer(workers[name], name, logs[name])
            except UserError as error:
                drop(name, error)
        for turn in range(warm_up + rounds):
            told = {}
            for name in list(workers) if turn % 2 == 0 else list(reversed(workers)):
                time.sleep(PAUSE_S)
                try:
                    told[name] = one_step(workers[name], name, logs[name])
                except UserError as error:
                    drop(name, error)
                    continue
                if turn >= warm_up:
                    steps[name].append(told[name])
            what = "warm-up" if turn < warm_up else f"round {turn + 1 - warm_up} of {rounds}"
            times = ", ".join(f"{name} {told[name]['seconds']:.2f} s" for name in workers)
            print(f"{label} {what}: {times}", flush=True)
    finally:
        for worker in workers.values():
            stop(worker)
        for log in logs.values():
            log.close()
    return steps


def stop(worker: subprocess.Popen) -> None:
    """End a worker by closing its stdin, and by force when that takes more than 20 s."""
    with contextlib.suppress(BrokenPipeError):
        worker.stdin.close()
    try:
        worker.wait(timeout=20)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
    worker.stdout.close()
