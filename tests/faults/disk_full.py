"""Disk full, quota used up, read-only, no permission: at every change of a save, on a real small disk, and in a run.

Whatever fails, the last checkpoint stays, bitwise; the message says the path, the bytes needed and free, and what to
do; what is left of the failed save is not taken for a checkpoint, and the next save works.
"""
import contextlib
import ctypes
import errno
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import yaml
from harness import Tally, heard
from interpose import LIBC, Call, watched
from saved import fresh, make_pair, next_save, save, unlike, what_is_wrong
from toy import even, make_config, write_problems

from minimath.config.schema import RLAIFConfig, SFTConfig
from minimath.core.checkpoint import list_checkpoints, verify
from minimath.core.errors import UserError
from minimath.train.rlaif import rlaif
from minimath.train.sft import sft

# calls that need room; with a read-only folder or without permission every change fails
GROWS = {"write", "pwrite64", "writev", "open", "openat", "creat", "mkdir", "mkdirat", "ftruncate", "fallocate"}
FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
MESSAGE = re.compile(r"cannot write (/\S+) .*: it needs ([\d,]+) bytes, ([\d,]+) are free; free some space or "
                     "quota, or check the permissions")
NEW_NAMES, NEW_USERS = 0x20000, 0x10000000  # CLONE_NEWNS, CLONE_NEWUSER
PRIVATE, REMOUNT, READ_ONLY = 0x44000, 32, 1  # MS_REC | MS_PRIVATE, MS_REMOUNT, MS_RDONLY


def run(full: bool, folder: Path) -> list[Tally]:
    pair = make_pair(folder / "tiny")
    template = folder / "template"
    for step in (1, 2):
        save(template, step, pair)
    faults = [failed_saves(full, folder, template, pair, number) for number in FAULTS]
    return [*faults, *small_disks(full, folder, template, pair), failed_runs(full, folder),
            full_resumes(full, folder)]


def complaint(error: str, words: str, target: Path) -> str:
    """"" when a failed save said all that it should."""
    match = MESSAGE.search(words)
    if error != "UserError" or not match or match[1] != str(target):
        return f"it said {error}: {words}"
    return ""


# ---- injected at each change

def failed_saves(full: bool, folder: Path, template: Path, pair, number: int) -> Tally:
    """One errno, once or from then on, at every change of a save of a new checkpoint and of one saved again; not full:
    at four of them."""
    tally, here = Tally(f"disk_full: {errno.errorcode[number]} at a change of a save"), folder / "run"
    for step, value in ((3, 3), (2, 12)):
        job = partial(save, here, step, pair, value)
        calls = watched(job, fresh(template, here)).calls
        every = [(n, lasting) for n in range(1, len(calls) + 1) for lasting in (False, True)]
        for at, lasting in every if full else random.Random(number + step).sample(every, 2):
            fresh(template, here)
            outcome = watched(job, here, partial(failing, number, at, lasting))
            target = here / "checkpoints" / f"step-{step:06d}"
            wrong = complaint(outcome.error, outcome.words, target) if outcome.error else ""
            wrong = wrong or what_is_wrong(here, pair, {2, value} if outcome.error else {value})
            tally.add(not (wrong := wrong or next_save(here, 4, pair)),
                      f"{'from' if lasting else 'at'} change {at}, {calls[at - 1]}: {wrong}")
    return tally


def failing(number: int, at: int, lasting: bool, n: int, call: Call) -> int:
    """The verdict: errno at change `at`, and when lasting at all later ones that the fault concerns."""
    concerned = call.name in GROWS or number in (errno.EROFS, errno.EACCES)
    return number if n == at or (lasting and n > at and concerned) else 0


# ---- a real disk that is too small, and one that is read-only

def small_disks(full: bool, folder: Path, template: Path, pair) -> list[Tally]:
    """In a child with mounts of its own: a tmpfs with room for a part of the next checkpoint."""
    outcome = watched(partial(on_small_disks, 20 if full else 3, folder / "disk", template, pair), folder / "nowhere")
    if outcome.error == "PermissionError":
        print(f"    disk_full: no real disk tried, mounting is not allowed here ({outcome.words.splitlines()[0]})")
        return []
    if outcome.error or outcome.status:
        raise RuntimeError(f"the child ended with {outcome}")
    return [Tally(**row) for row in outcome.value]


def on_small_disks(parts: int, disk: Path, template: Path, pair) -> list[dict]:
    small, barred = Tally("disk_full: a tmpfs too small for the next save"), Tally("disk_full: a read-only mount")
    disk.mkdir()
    own_mounts()
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in template.rglob("*") if path.is_file())
    for part in range(parts):
        room = used // 2 * part // parts
        with mounted(disk, f"size={(used + room) // 4096 * 4096}"):
            small.add(not (wrong := on_full_disk(disk, template, pair)), f"{room} bytes of room: {wrong}")
    with mounted(disk, "size=8m,nr_inodes=25"):  # bytes are left, but files can't be made
        small.add(not (wrong := on_full_disk(disk, template, pair)), f"no more files: {wrong}")
    with mounted(disk, "size=8m"):
        here = fresh(template, disk / "run")
        mount(disk, "size=8m", REMOUNT | READ_ONLY)
        wrong = failed_save(here, pair) or what_is_wrong(here, pair, {2})
        mount(disk, "size=8m", REMOUNT)
        barred.add(not (wrong := wrong or next_save(here, 3, pair)), wrong)
    return [asdict(small), asdict(barred)]


def on_full_disk(disk: Path, template: Path, pair) -> str:
    """A save fails and leaves nothing behind; with the room that its message asked for, it works."""
    here = fresh(template, disk / "run")
    free = shutil.disk_usage(disk).free
    words = failed_save(here, pair)
    if words or (words := what_is_wrong(here, pair, {2})):
        return words
    if shutil.disk_usage(disk).free != free:
        return f"{shutil.disk_usage(disk).free} instead of {free} bytes are free after the failed save"
    needed = int(MESSAGE.search(said(here, pair))[2].replace(",", ""))
    mount(disk, f"size={shutil.disk_usage(disk).used + needed},nr_inodes=100", REMOUNT)
    return next_save(here, 3, pair)


def failed_save(here: Path, pair) -> str:
    """What is wrong with how a save fails."""
    words = said(here, pair)
    return complaint("UserError", words, here / "checkpoints" / "step-000003") if words else "the save did not fail"


def said(here: Path, pair) -> str:
    """The message of a save that fails."""
    try:
        save(here, 3, pair)
    except UserError as error:
        return str(error)
    return ""


def own_mounts() -> None:
    """Mounts of this process from here on are its own. Raises PermissionError where that is not allowed."""
    user, group = os.getuid(), os.getgid()
    if LIBC.unshare(NEW_NAMES):
        if LIBC.unshare(NEW_NAMES | NEW_USERS):
            raise PermissionError("unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if LIBC.mount(b"none", b"/", None, PRIVATE, None):
        raise PermissionError("mount")


def mount(disk: Path, options: str, flags: int = 0) -> None:
    if LIBC.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", flags, options.encode()):
        raise PermissionError(f"mount: {os.strerror(ctypes.get_errno())}")


@contextlib.contextmanager
def mounted(disk: Path, options: str):
    mount(disk, options)
    try:
        yield
    finally:
        LIBC.umount2(os.fsencode(disk), 2)  # MNT_DETACH


# ---- a run whose checkpoint can't be saved

def failed_runs(full: bool, folder: Path) -> Tally:
    """No room for the checkpoint of step 4 of 6: the run says so, goes on, and saves step 6. No room for the last one:
    it ends with an error, and the newest before stays. Resumed, the end is bitwise that of a run without a fault."""
    tally = Tally("disk_full: checkpoints of a run that can't be saved")
    options = {"data": write_problems(folder / "problems.jsonl"), "steps": 6, "save_every": 2, "lora_r": 4, "lr": 1e-2,
               "resume": True}
    drawn = {"prompts_per_step": 1, "group_size": 4, "max_new_tokens": 8, "max_refill": 0, "reward": "paper",
             "verifier": even, "overlong": "none"}
    for loop, cls, more in ((sft, SFTConfig, {"batch_size": 2}), (rlaif, RLAIFConfig, drawn))[:2 if full else 1]:
        make = partial(make_config, cls, str(folder / "tiny"), **options, **more)
        whole = folder / f"{loop.__name__}-whole"
        outcome = watched(partial(printed, loop, make(out=str(whole))), whole)
        tally.add(not outcome.error, f"{loop.__name__}: {outcome.error}: {outcome.words}")
        for steps in ((4,), (6,), (2, 4), (4, 6), (2, 4, 6))[:5 if full else 2]:
            here = folder / f"{loop.__name__}-{'-'.join(map(str, steps))}"
            cfg = make(out=str(here))
            outcome = watched(partial(printed, loop, cfg), here, partial(no_room_at, steps))
            wrong = not_gone_on_with(outcome, steps, here)
            again = watched(partial(printed, loop, cfg), here)
            wrong += f" resumed: {again.error} {again.words}" * bool(again.error) or unlike(here, whole)
            tally.add(not wrong, f"{loop.__name__}, no room at {steps}: {wrong}")
    return tally


def full_resumes(full: bool, folder: Path) -> Tally:
    """A run stopped after step 2 of 4 and gone on with on a disk that is full from its n-th change on, for every n (two
    of them when not full): a UserError, and what was there stays; on a disk with room it then ends as it should."""
    tally, part, whole, here = Tally("disk_full: a resume"), folder / "part", folder / "whole", folder / "run"
    make = partial(make_config, SFTConfig, str(folder / "tiny"), data=str(folder / "problems.jsonl"), batch_size=2,
                   save_every=2, lora_r=4, lr=1e-2, lr_schedule="constant", resume=True)
    watched(partial(printed, sft, make(out=str(part), steps=2)), part)
    job = partial(printed, sft, make(out=str(here), steps=4))
    calls = watched(partial(printed, sft, make(out=str(whole), steps=4)), fresh(part, whole)).calls
    every = [n for n, call in enumerate(calls, 1) if call.name in GROWS]
    for at in every if full else random.Random(1).sample(every, 2):
        outcome = watched(job, fresh(part, here), partial(failing, errno.ENOSPC, at, True))
        wrong = "" if outcome.error in ("", "UserError") else f"{outcome.error}: {outcome.words}"
        damaged = [problems for path in (here / "adapter", *list_checkpoints(here)) if (problems := verify(path))]
        config = yaml.safe_load((here / "config.yaml").read_text())
        if damaged or not config or config["steps"] not in (2, 4):
            wrong += f" adapter or checkpoints: {damaged}, config.yaml: {config}"
        again = watched(job, here)
        wrong += f" resumed: {again.error} {again.words}" * bool(again.error) or unlike(here, whole)
        tally.add(not wrong, f"full from change {at}, {calls[at - 1]}: {wrong}")
    return tally


def printed(loop: Callable, cfg) -> str:
    """What a run prints. Raises as it does."""
    return heard(partial(loop, cfg))[0]


def no_room_at(steps: tuple[int, ...], _, call: Call) -> int:
    """The verdict: a disk without room for the checkpoints of these steps."""
    missing = any(f"step-{step:06d}" in call.path for step in steps)
    return errno.ENOSPC if missing and call.name in GROWS else 0


def not_gone_on_with(outcome, steps: tuple[int, ...], here: Path) -> str:
    """What is wrong with a run of 6 steps that had no room for the checkpoints of `steps`."""
    kept = [int(folder.name[5:]) for folder in list_checkpoints(here)]
    expected = [step for step in (6, 4, 2) if step not in steps]
    if kept != expected:
        return f"it has {kept} instead of {expected}"
    if 6 in steps:
        return complaint(outcome.error, outcome.words, here / "checkpoints" / "step-000006")
    unsaid = [step for step in steps if f"step {step} is not saved; the run goes on" not in outcome.value]
    return f"raised {outcome.error} {outcome.words}, did not say {unsaid}" if outcome.error or unsaid else ""
