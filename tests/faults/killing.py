"""Training runs in children that kill themselves with SIGKILL at a chosen moment, and what a resume must leave equal.

`python -m killing` imports minimath once and forks a child for each run it is told of, which spares the seconds of
the import; a child runs the real command line. It has a single thread, so forking is safe. Every child writes a trace
beside its run: what each step trained on, what was sampled, paid and judged.
"""
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from harness import child_env
from tiny import write_tiny
from toy import write_problems

LIMIT_S = 240  # a child that takes longer ends by SIGALRM, status -14
OWN_OPTIONS = ("out", "resume", "judge_cache")  # that differ between two equal runs
PAID = {f"judge_{name}" for name in ("requests", "retries", "cache_hits", "prompt_tokens", "completion_tokens", "cost")}
BYTES = ("adapter_model.safetensors", "optimizer.safetensors", "optimizer.json", "rng.safetensors", "rng.json")


@dataclass(frozen=True)
class Kill:
    """Die the nth time that `moment` comes in step `step` (from 1) or later."""
    moment: str
    step: int
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.moment}, step {self.step}" + (f", time {self.nth}" if self.nth > 1 else "")


# ---- the parent's side


@contextlib.contextmanager
def open_forks(folder: Path, hash_seed: int = 0) -> Iterator[Callable[..., int]]:
    """Yield train(command, run, kill, **options) -> exit status, -9 when it was killed.

    The run folder is `run`; beside it grow run.log (what was printed) and run.trace. hash_seed: of Python's sets; two
    processes that agree only under the same one are not equal.
    """
    command = [sys.executable, "-m", "killing"]
    with subprocess.Popen(command, cwd=folder, env=child_env(PYTHONHASHSEED=str(hash_seed)), text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:

        def train(name: str, run: Path, kill: Kill | None, **options) -> int:
            words = [name, *(f"{key}={value}" for key, value in options.items()), f"out={run}"]
            job = {"words": words, "run": str(run), "kill": kill and [kill.moment, kill.step, kill.nth]}
            parent.stdin.write(json.dumps(job) + "\n")
            parent.stdin.flush()
            return int(parent.stdout.readline())  # "" when the parent died: a ValueError

        yield train
        parent.stdin.close()


def resume_differs(train, again, command: str, whole: Path, run: Path, kills: list[Kill], *, died=lambda: None,
                   **options) -> str:
    """Train into `run`, killed at each of `kills` and resumed after each, `again` from the first resume on; in words
    what differs from the run `whole` that was never killed, "" for nothing. died() is called after each kill."""
    for number, kill in enumerate([*kills, None]):
        resume = {"resume": "true"} if number else {}
        status = (again if number else train)(command, run, kill, **options, **resume)
        if status != (-signal.SIGKILL if kill else 0):
            what = f"was not killed at {kill}" if kill and status == 0 else f"ended with status {status}"
            return f"start {number + 1} {what}: {last_line(run)}"
        if kill:
            died()
    found = differences(whole, run)
    return "; ".join([*found[:8], *([f"and {len(found) - 8} more"] if len(found) > 8 else [])])


def small_model(folder: Path) -> Path:
    """The tiny Llama with its first layer only: these runs are many."""
    config = write_tiny(folder) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 1}))
    return folder


def odd_problems(folder: Path) -> str:
    """Toy problems with a character in each that ends a line for str.splitlines, and for nobody else."""
    path = Path(write_problems(folder / "problems.jsonl"))
    path.write_text(path.read_text().replace("Tom has", "Tom\\u2028has"))
    return str(path)


def beside(run: Path, ending: str) -> Path:
    return run.with_name(f"{run.name}.{ending}")


def last_line(run: Path) -> str:
    lines = beside(run, "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def differences(whole: Path, run: Path) -> list[str]:
    """What is not bitwise equal between two finished runs, clocks aside."""
    out = []
    for name in ("metrics.jsonl", "samples.jsonl"):
        out += [f"{name} {words}" for words in record_differences(records(whole / name), records(run / name))[:5]]
    if not records(run / "metrics.jsonl"):
        out.append("no metrics")
    file = Path("adapter", "adapter_model.safetensors")
    if (whole / file).read_bytes() != (run / file).read_bytes():
        out.append(str(file))
    names = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (whole, run)]
    if names[0] != names[1]:
        return [*out, f"checkpoints {names[0]}, {names[1]}"]
    for name in names[0]:
        one, two = whole / "checkpoints" / name, run / "checkpoints" / name
        out += [f"{name}/{file}" for file in BYTES if (one / file).read_bytes() != (two / file).read_bytes()]
        states = [loop_state(one), loop_state(two)]
        out += [f"{name}/state.json {key}" for key in states[0].keys() | states[1].keys()
                if states[0].get(key) != states[1].get(key)]
    return out + trace_differences(beside(whole, "trace"), beside(run, "trace"))


def records(path: Path) -> list[dict]:
    """The records of a file of json lines without what depends on the clock, and without what was paid to a judge (its
    replies are in the cache when a step is done again); [] when there is no file."""
    lines = path.read_text(encoding="utf-8").strip("\n").split("\n") if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if "seconds" not in k and "per_s" not in k and k not in PAID}
            for line in lines]


def record_differences(whole: list[dict], run: list[dict]) -> list[str]:
    steps = [[record["step"] for record in some] for some in (whole, run)]
    if steps[0] != steps[1]:
        return [f"has steps {steps[1]}, not {steps[0]}"]
    pairs = [(one, two, key) for one, two in zip(whole, run, strict=True) for key in one.keys() | two.keys()]
    return [f"step {one['step']} {key}: {one.get(key)!r}, {two.get(key)!r}"[:200]
            for one, two, key in pairs if one.get(key) != two.get(key)]


def loop_state(checkpoint: Path) -> dict:
    state = json.loads((checkpoint / "state.json").read_text())
    config = {key: value for key, value in state.pop("config").items() if key not in OWN_OPTIONS}
    return state | {"config": config, "best flag": json.loads((checkpoint / "manifest.json").read_text())["best"]}


def trace_differences(whole: Path, run: Path) -> list[str]:
    """A step done again after a kill is in the trace of the run once more: every time it must be what `whole` has."""
    expected, seen = {}, set()
    for line in whole.read_text().splitlines():
        key, value = json.loads(line)
        expected[tuple(key)] = value
    wrong = []
    for line in run.read_text().splitlines():
        key, value = json.loads(line)
        seen.add(tuple(key))
        if tuple(key) not in expected or expected[tuple(key)] != value:
            wrong.append("trace: " + " ".join(map(str, key)))
    return wrong[:5] + [f"trace: no {key}" for key in list(expected.keys() - seen)[:5]]


# ---- the child's side

at = {"step": 0, "round": 0, "times": 0, "votes": 0}  # where this process is; a fork has its own
lock = threading.Lock()


def serve() -> None:
    """Fork a child for each json line of stdin; answer with its exit status, negative for a signal."""
    import bitsandbytes  # noqa: F401  so that no child has to
    import peft

    import minimath.train.rlaif
    import minimath.train.sft  # noqa: F401
    peft.PeftModel.create_or_update_model_card = lambda *_: None  # half of a save's time, for a file that is not kept
    if Path("/proc/self/task").exists() and len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("an import has started a thread: forking is not safe")
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if not pid:
            run_job(job)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def run_job(job: dict) -> None:
    """In the child: the command line with the hooks set; never returns."""
    status = 99
    try:
        signal.alarm(LIMIT_S)
        run = Path(job["run"])
        log = os.open(beside(run, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(source, number)
        trace = os.open(beside(run, "trace"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        set_hooks(Kill(*job["kill"]) if job["kill"] else None, trace)
        sys.argv = ["minimath", *job["words"]]
        from minimath.cli import main
        status = main()
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def set_hooks(kill: Kill | None, trace: int) -> None:
    """Trace what this process trains on, and let it die at `kill`."""
    def comes(moment: str) -> None:
        with lock:
            if kill and moment == kill.moment and at["step"] >= kill.step:
                at["times"] += 1
                if at["times"] == kill.nth:
                    os.kill(os.getpid(), signal.SIGKILL)
                    signal.pause()

    def note(what: str, *place, value) -> None:  # one write: whole or not at all
        os.write(trace, (json.dumps([[at["step"], what, *place], value]) + "\n").encode())

    hook_saves(comes)
    hook_sft(comes, note)
    hook_rlaif(comes, note)
    hook_judge(comes, note)


def wrap(owner, name: str, before=None, after=None) -> None:
    """Replace owner.name by itself with before(*args, **kwargs) and after(value, *args, **kwargs) around it."""
    real = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if before:
            before(*args, **kwargs)
        value = real(*args, **kwargs)
        if after:
            after(value, *args, **kwargs)
        return value

    setattr(owner, name, wrapped)


def hook_saves(comes) -> None:
    """Moments: half a line of metrics.jsonl, logged, half a checkpoint, renaming, saved, ending."""
    from minimath.core import checkpoint
    from minimath.core import log
    from minimath.train import rlaif
    from minimath.train import sft

    def torn(run_log, name, record):
        if name == "metrics.jsonl":
            path = run_log.run_dir / name
            size = path.stat().st_size if path.exists() else 0
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record)[:25])
            comes("half a line")
            os.truncate(path, size)

    wrap(log.RunLog, "append", before=torn)
    wrap(log.RunLog, "metrics", after=lambda *_, **__: comes("logged"))
    wrap(checkpoint, "write_adapter", after=lambda *_: comes("half a checkpoint"))
    wrap(checkpoint, "flush_to_disk", before=lambda *_: comes("flushing"))
    for loop in (sft, rlaif):
        wrap(loop, "save_checkpoint", after=lambda *_, **__: comes("saved"))
    wrap(sft, "save_adapter", before=lambda *_: comes("ending"))


def hook_sft(comes, note) -> None:
    """Moments: gradient (it is there, no step is taken), stepped (not logged), evaluation, after it."""
    from minimath.train import rlaif
    from minimath.train import sft

    def batch(_, cfg, model, tokenizer, rows, scale):
        note("batch", value=sha256(json.dumps([(row.ids, row.mask) for row in rows]).encode()).hexdigest())
        comes("gradient")

    def step(number, *_, **__):
        at["step"] = number + 1

    wrap(sft, "lr_at", before=step)
    wrap(sft, "loss_and_gradient", after=batch)
    for loop in (sft, rlaif):
        wrap(loop, "clip_and_step", after=lambda *_, **__: comes("stepped"))
        wrap(loop, "evaluate_step", before=lambda *_: comes("evaluation"), after=lambda *_: comes("evaluated"))


def hook_rlaif(comes, note) -> None:
    """Moments: rollout (after a token), refill (the same in a further round), sampled, judged, gradient, updated."""
    from minimath.rollout import open as engines
    from minimath.train import rlaif

    def begin(cfg, sample, tokenizer, problems, judge, gate, state, stop):
        at.update(step=state["done"] + 1, round=0, votes=0)

    def scored(_, cfg, groups, judge):
        note("groups", at["round"], value=[
            {"problem": g.example.id, "ids": [c.ids for c in g.completions], "logp": [c.logp for c in g.completions],
             "right": g.right, "valid": g.valid, "rewards": g.rewards, "advantage": g.advantage} for g in groups])
        at["round"] += 1
        comes("judged")

    real = engines.generate

    def generate(*args, on_step=None, **options):
        def told():
            comes("refill" if at["round"] else "rollout")
            if on_step:
                on_step()
        return real(*args, on_step=told, **options)

    engines.generate = generate
    # many end tokens: a random model would hardly ever stop by itself
    engines.eos_ids = lambda tokenizer, model=None: list(range(20, 60))
    wrap(rlaif, "collect_groups", before=begin)
    wrap(rlaif, "score_groups", before=lambda *_: comes("sampled"), after=scored)
    wrap(rlaif, "policy_gradient", after=lambda *_, **__: comes("gradient"))
    wrap(rlaif, "update", after=lambda *_: comes("updated"))


def hook_judge(comes, note) -> None:
    """Moments: judging (a batch of votes is there), reply (from the endpoint, not yet in the cache), reply kept."""
    from minimath.train import rlaif
    from minimath.judges.cache import ReplyCache

    def traced(judge, *_, **__):
        def votes(values, *_):
            note("votes", at["votes"], value=values)
            at["votes"] += 1
            comes("judging")
        wrap(judge, "compare", after=votes)
        wrap(judge, "choose", after=votes)

    wrap(rlaif, "make_judge", after=traced)
    wrap(ReplyCache, "put", before=lambda *_: comes("reply"), after=lambda *_: comes("reply kept"))


def even(text: str, example) -> bool:
    """A gate for a model that never answers: a little less than half of all texts are right. It throws dice, as a
    user's function may: a resume must go on where their state was."""
    lucky = random.random() < 0.95 and np.random.random() < 0.95
    return sum(text.encode()) % 2 == 0 and lucky


def even_of_even(text: str, example) -> bool:
    """As `even`, but problems with an odd answer are never solved: no signal there, so that groups are refilled."""
    return int(example.answer) % 2 == 0 and even(text, example)


if __name__ == "__main__":
    serve()
