"""Training runs that kill themselves with SIGKILL at a chosen moment, and what a resume must leave equal.

Every run writes a trace beside its folder: what each step trained on, what was sampled, paid and judged.
"""
import contextlib
import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import forks
import numpy as np
from forks import beside, last_line, words_of, wrap
from harness import Tally, model_and_data

OWN_OPTIONS = ("out", "resume")  # that differ between two equal runs
PAID = {f"judge/{name}" for name in ("requests", "retries", "cache_hits", "prompt_tokens", "completion_tokens",
                                     "no_usage", "cut_off")}
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

    hash_seed: of Python's sets; two processes that agree only under the same one are not equal. Replies of judges are
    kept in run.cache, beside the run folder.
    """
    with forks.open_forks(folder, "killing", PYTHONHASHSEED=str(hash_seed)) as fork:

        def train(name: str, run: Path, kill: Kill | None, **options) -> int:
            return fork(words_of(name, options | {"out": run}), run, kill and asdict(kill),
                        MINIMATH_CACHE=str(beside(run, "cache")))

        yield train


def second_forks(full: bool, folder: Path, train):
    """What trains from the first resume on: in the short part the same as before, to be quick."""
    return open_forks(folder, hash_seed=2) if full else contextlib.nullcontext(train)


def one_variant(tally: Tally, forks, command: str, folder: Path, cases: list[list[Kill]], options: dict,
                watch=lambda run, kills: contextlib.nullcontext(lambda: None)) -> Tally:
    """One unbroken run, and one run for each list of kills.

    forks: what trains from the start, and from the first resume on. watch(run, kills): a context around the starts of
    a run, that yields what is called after each kill.
    """
    whole = folder / f"{tally.case} whole"
    with watch(whole, []):
        status = forks[0](command, whole, None, **options)
    if status:
        tally.add(False, f"the unbroken run ended with status {status}: {last_line(whole)}")
        return tally
    for number, kills in enumerate(cases):
        run = folder / f"{tally.case} {number}"
        with watch(run, kills) as died:
            words = resume_differs(forks, command, whole, run, kills, died, options)
        tally.add(not words, f"killed at {' and '.join(map(str, kills))}: {words}")
    return tally


def resume_differs(forks, command: str, whole: Path, run: Path, kills: list[Kill], died, options: dict) -> str:
    """Train into `run`, killed at each of `kills` and resumed after each; in words what differs from the run `whole`
    that was never killed, "" for nothing."""
    for number, kill in enumerate([*kills, None]):
        resume = {"resume": "true"} if number else {}
        status = forks[number > 0](command, run, kill, **options, **resume)
        if status != (-signal.SIGKILL if kill else 0):
            what = f"was not killed at {kill}" if kill and status == 0 else f"ended with status {status}"
            return f"start {number + 1} {what}: {last_line(run)}"
        if kill:
            died()
    found = differences(whole, run)
    return "; ".join([*found[:8], *([f"and {len(found) - 8} more"] if len(found) > 8 else [])])


def fixed_options(folder: Path) -> dict:
    """The tiny Llama with many end tokens and its first layer only, since these runs are many; toy problems with a
    character in each that ends a line for str.splitlines, and for nobody else."""
    model, problems = map(Path, model_and_data(folder))
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 1}))
    problems.write_text(problems.read_text().replace("Tom has", "Tom\\u2028has"))
    return {"model": model, "data": problems, "device": "cpu", "dtype": "fp32",
            "prompt_template": "{problem}"}


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
    text = path.read_text(encoding="utf-8").strip("\n") if path.exists() else ""
    return [{key: value for key, value in json.loads(line).items()
             if not key.startswith("time/") and "seconds" not in key and key not in PAID}
            for line in (text.split("\n") if text else [])]


def record_differences(whole: list[dict], run: list[dict]) -> list[str]:
    steps = [[record["step"] for record in some] for some in (whole, run)]
    if steps[0] != steps[1]:
        return [f"has steps {steps[1]}, not {steps[0]}"]
    pairs = [(one, two, key) for one, two in zip(whole, run, strict=True) for key in one.keys() | two.keys()]
    return [f"step {one['step']} {key}: {one.get(key)!r}, {two.get(key)!r}"[:200]
            for one, two, key in pairs if one.get(key) != two.get(key)]


def loop_state(checkpoint: Path) -> dict:
    """state.json without the options that differ between equal runs, and whether it was the best."""
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


def set_hooks(run: Path, given: dict | None) -> None:
    """Trace what this process trains on, and let it die at the given kill. All checkpoints are kept."""
    from minimath.train import trainer
    kill = Kill(**given) if given else None
    trace = os.open(beside(run, "trace"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    trainer.KEPT = 99

    def comes(moment: str) -> None:
        with lock:
            if kill and moment == kill.moment and at["step"] >= kill.step:
                at["times"] += 1
                if at["times"] == kill.nth:
                    os.kill(os.getpid(), signal.SIGKILL)
                    signal.pause()

    def note(what: str, *place, value) -> None:  # one write: whole or not at all
        os.write(trace, (json.dumps([[at["step"], what, *place], value]) + "\n").encode())

    hook_trainer(comes)
    hook_optimizer(comes, note)
    hook_rlaif(comes, note)
    hook_judge(comes, note)


def hook_trainer(comes) -> None:
    """Moments: half a line (of metrics), logged, half a checkpoint, flushing, saved, ending, evaluation, evaluated."""
    from minimath.core import checkpoint, files, log
    from minimath.train import trainer

    def begin(done, *_, **__):
        at.update(step=done + 1, round=0, votes=0)

    def torn(run_log, name, record):
        if name == "metrics.jsonl":
            path = run_log.run_dir / name
            size = path.stat().st_size if path.exists() else 0
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record)[:25])
            comes("half a line")
            os.truncate(path, size)

    wrap(trainer, "lr_at", before=begin)
    wrap(log.RunLog, "append", before=torn)
    wrap(log.RunLog, "metrics", after=lambda *_, **__: comes("logged"))
    wrap(checkpoint, "write_adapter", after=lambda *_: comes("half a checkpoint"))
    wrap(files, "flush_to_disk", before=lambda *_: comes("flushing"))
    wrap(checkpoint, "save_checkpoint", after=lambda *_, **__: comes("saved"))
    wrap(checkpoint, "save_adapter", before=lambda *_: comes("ending"))
    wrap(trainer.Trainer, "_evaluate", before=lambda *_: comes("evaluation"), after=lambda *_: comes("evaluated"))


def hook_optimizer(comes, note) -> None:
    """Moments: gradient (it is there, no step is taken), stepped (not logged)."""
    from minimath.train import optimizer
    from minimath.train.batches import SolutionBatch

    def batch(_, rows, *__):
        if isinstance(rows, SolutionBatch):
            ids = [(row.ids, row.loss_mask) for row in rows.rows]
            note("batch", value=sha256(json.dumps(ids).encode()).hexdigest())

    wrap(optimizer.Optimizer, "step", before=batch)
    wrap(optimizer, "clip_and_step", before=lambda *_, **__: comes("gradient"),
         after=lambda *_, **__: comes("stepped"))


def hook_rlaif(comes, note) -> None:
    """Moments: rollout (after a token), refill (the same in a further round), sampled, judged, updated."""
    from minimath.rollout.decode import Decode
    from minimath.train import rlaif
    from minimath.train.rewards import Reward

    def scored(_, groups, *__):
        note("groups", at["round"], value=[
            {"problem": group.example.id, "samples": [[s.ids, s.logp, s.full_logp, s.finished, s.correct, s.win,
                                                       s.reward, s.advantage, s.parts] for s in group.samples]}
            for group in groups])
        at["round"] += 1
        comes("judged")

    wrap(Decode, "step", after=lambda *_: comes("refill" if at["round"] else "rollout"))
    wrap(Reward, "score", before=lambda *_: comes("sampled"))
    wrap(rlaif, "set_advantages", after=scored)
    wrap(rlaif, "update", after=lambda *_: comes("updated"))


def hook_judge(comes, note) -> None:
    """Moments: judging (a batch of votes is there), reply (from the endpoint, not yet in the cache), reply kept."""
    from minimath.judges.cache import ReplyCache
    from minimath.train import rewards

    def votes(values, *_):
        note("votes", at["votes"], value=values)
        at["votes"] += 1
        comes("judging")

    wrap(rewards, "make_judge", after=lambda judge, *_, **__: wrap(judge, "compare", after=votes))
    wrap(ReplyCache, "put", before=lambda *_: comes("reply"), after=lambda *_: comes("reply kept"))


def even(text: str, example) -> bool:
    """Verify for a model that never answers: a little less than half of all texts are correct. It throws dice, as a
    user's function may: a resume must go on where their state was."""
    lucky = random.random() < 0.95 and np.random.random() < 0.95
    return sum(text.encode()) % 2 == 0 and lucky


def even_of_even(text: str, example) -> bool:
    """As `even`, but problems with an odd answer are never solved: no signal there, so that groups are refilled."""
    return int(example.answer) % 2 == 0 and even(text, example)
