"""kill -9 at every change that a save makes to the file system, and at random times of a run.

At each write the child is killed before it, and with half of it done. `strace -f` of a save that rotates shows the 52
changes that interpose.py counts (files made, written, flushed, renamed, deleted). fsync says nothing here: a killed
process leaves the page cache whole, unlike a power cut.
"""
import json
import os
import random
import signal
import time
import traceback
from functools import partial
from pathlib import Path

from harness import Tally
from interpose import KILL, TEAR, settle_child, watched
from saved import fresh, make_pair, next_save, save, set_values, unlike, what_is_wrong
from toy import load_file, make_config, same_tensors, write_problems

from minimath.config.schema import SFTConfig
from minimath.core.checkpoint import adapter_tensors, finish_renames, list_checkpoints, save_adapter, verify
from minimath.core.files import write_whole
from minimath.core.log import truncate_metrics
from minimath.core.run_folder import find_adapter
from minimath.train.sft import sft

SAVE_EVERY = 3


def run(full: bool, folder: Path) -> list[Tally]:
    pair = make_pair(folder / "tiny")
    return [*killed_saves(full, folder, pair), killed_adapter(full, folder, pair), killed_texts(folder),
            killed_runs(100 if full else 3, folder)]


def killed(case: str, full: bool, here: Path, prepare, job, check) -> Tally:
    """Prepare the folder `here`, run job() in a child that is killed at one of its changes, check() -> "" or what is
    wrong; for every change when full, else for the renames and a seeded sample of the others, 6 in all."""
    prepare()
    tally, calls = Tally(f"kill_save: {case}"), watched(job, here).calls
    every = [(n, how) for n, call in enumerate(calls, 1) for how in ((KILL, TEAR) if call.name == "write" else (KILL,))]
    chosen = [(n, how) for n, how in every if calls[n - 1].name == "rename"]
    chosen += random.Random(case).sample(sorted(set(every) - set(chosen)), min(len(every), 6) - len(chosen))
    for at, how in every if full else chosen:
        prepare()
        outcome = watched(job, here, lambda n, call: how if n == at else 0)  # noqa: B023
        try:
            wrong = check() if outcome.status == -signal.SIGKILL else f"it was not killed: {outcome}"
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        tally.add(not wrong, f"{'half of' if how == TEAR else 'before'} change {at}, {calls[at - 1]}: {wrong}")
    return tally


def killed_saves(full: bool, folder: Path, pair) -> list[Tally]:
    """A new checkpoint, one in the place of another, and one onto what earlier kills left. After each, the newest
    checkpoint loads bitwise, and the next save works and clears up."""
    template, here = folder / "template", folder / "run"
    for step in (1, 2):
        save(template, step, pair)
    leftovers = fresh(template, folder / "leftovers") / "checkpoints"
    half = fresh(leftovers / "step-000002", leftovers / ".tmp-step-000003")
    (half / "manifest.json").unlink()
    fresh(half, leftovers / ".tmp-gone-step-000000")
    (leftovers / "step-000002").rename(leftovers / ".old-step-000002")
    tallies = []
    for case, start, step, number in (("a new checkpoint", template, 3, 3), ("one saved again", template, 2, 12),
                                      ("onto leftovers", leftovers.parent, 3, 3)):
        def check(number=number) -> str:
            return what_is_wrong(here, pair, {2, number}) or next_save(here, 4, pair)
        tallies.append(killed(case, full, here, partial(fresh, start, here), partial(save, here, step, pair, number),
                              check))
    return tallies


def killed_adapter(full: bool, folder: Path, pair) -> Tally:
    """The final adapter over one of an earlier session, whose last checkpoint is there: the run's adapter is one of the
    two, whole, and it can be saved again."""
    template, here = folder / "adapters", folder / "run"
    save(template, 2, pair)
    known = {}
    for number in (1, 2):
        set_values(pair, number)
        known[number] = {name: tensor.clone() for name, tensor in adapter_tensors(pair[0]).items()}
        if number == 1:
            save_adapter(pair[0], template / "adapter")

    def job() -> None:
        set_values(pair, 2)
        save_adapter(pair[0], here / "adapter")

    def check() -> str:
        found = load_file(find_adapter(here) / "adapter_model.safetensors")
        if not any(same_tensors(found, one) for one in known.values()):
            return "the run's adapter is neither the old one nor the new one"
        job()
        left = sorted(path.name for path in here.iterdir())
        return "" if left == ["adapter", "checkpoints"] and not verify(here / "adapter") else f"saved again: {left}"

    return killed("the final adapter", full, here, partial(fresh, template, here), job, check)


def killed_texts(folder: Path) -> Tally:
    """Text files that are written whole: the old or the new one is there."""
    here = folder / "texts"
    file, tally = here / "metrics.jsonl", Tally("kill_save: text files")
    lines = [f'{{"step": {n}}}\n' for n in range(1, 5)]
    old, new = "".join(lines), "".join(lines[:2])

    def prepare() -> None:
        here.mkdir(exist_ok=True)
        file.write_text(old, encoding="utf-8")

    def check() -> str:
        text = file.read_text(encoding="utf-8")
        return "" if text in (old, new) else f"it holds {text!r}"

    for name, job in (("write_whole", partial(write_whole, file, new)),
                      ("truncate_metrics", partial(truncate_metrics, here, 2))):
        one = killed(name, True, here, prepare, job, check)
        tally.tried += one.tried
        tally.lost += one.lost
    return tally


# ---- at random times of a run

def killed_runs(kills: int, folder: Path) -> Tally:
    """Runs killed at random moments and gone on with, until each has ended: no checkpoint is lost or damaged, at most
    SAVE_EVERY steps are done again, and the end is bitwise that of a run that nothing killed. A kill that won no step
    gives the next life more time, so that a busy machine gets on as well."""
    tally, rng = Tally("kill_save: a run at random times, to the end"), random.Random(6)
    options = {"data": write_problems(folder / "problems.jsonl"), "steps": 120 if kills > 10 else 30, "batch_size": 2,
               "lora_r": 4, "lora_dropout": 0.1, "lr": 1e-2, "save_every": SAVE_EVERY, "resume": True}
    make = partial(make_config, SFTConfig, str(folder / "tiny"), **options)
    whole, here, chain, newest, idle = folder / "whole", folder / "chain-0", 0, 0, 0
    started = time.monotonic()
    live(make(out=str(whole)), None, False)
    reach = (time.monotonic() - started) / (10 if kills > 10 else 3)
    while True:
        delay = rng.uniform(0, reach * 1.3 ** idle) if tally.tried < kills else None
        status, said = live(make(out=str(here)), delay, rng.random() < 0.8)
        if status == -signal.SIGKILL:
            before, newest = newest, newest_step(here)
            idle = 0 if newest > before else idle + 1
            lost = last_logged(here) - newest
            tally.add(before <= newest and lost <= SAVE_EVERY and idle < 20,
                      f"kill {tally.tried + 1}: from step {before} to {newest}, {lost} lost, {idle} kills won none")
            continue
        wrong = f" status {status}: {said[-300:]}" if status else unlike(here, whole)
        tally.add(not wrong, f"run {chain} ended with{wrong}")
        if tally.tried >= kills:
            return tally
        chain += 1
        here, newest = folder / f"chain-{chain}", 0


def live(cfg, delay: float | None, stepping: bool) -> tuple[int, str]:
    """sft(cfg) in a fork, killed `delay` seconds after its start (stepping: after its steps have begun; None: never)
    -> (exit status, what it printed)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            settle_child(writer)
            sft(cfg)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    with open(reader, encoding="utf-8", errors="replace") as output:
        said = ""
        while stepping and (line := output.readline()):
            said += line
            if line.startswith(("resumed after", "no checkpoint yet")):
                break
        if delay is not None:
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
        said += output.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def newest_step(here: Path) -> int:
    """Step of the newest checkpoint, -1 when any folder that passes for one is damaged."""
    finish_renames(here)
    folders = list_checkpoints(here)
    return -1 if any(map(verify, folders)) else int(folders[0].name[5:]) if folders else 0


def last_logged(here: Path) -> int:
    """The last step whose record stands whole in metrics.jsonl."""
    file, last = here / "metrics.jsonl", 0
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []:
        last = json.loads(line)["step"] if line.endswith("}\n") else last
    return last
