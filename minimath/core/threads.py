"""Follow the machine: no more threads than cores that others leave free.

OpenMP's threads meet thousands of times in a decode step. If one has no core the others spin there for it, and spinning
they hold the cores. So `follow_load`, asked between decode steps and micro-batches, looks at what other processes use
of this one's cores, on Linux (time stolen from a virtual machine counts, a container's limit too), and sets torch's
number of threads. core.entry shortens the spinning.

Who sets OMP_NUM_THREADS, or calls torch.set_num_threads, decides: nothing is changed then, nor with several processes.
With another number of threads some sums are added in another order: runs that must agree bit by bit need a fixed one.
"""
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from minimath.core import dist

LOOK_S = 1.0  # between looks; the clocks of /proc have ticks of 10 ms
CALM_S = 5.0  # that cores must have been free before they are used again
WAITED_S = 10.0  # after so long without computing, for a judge say, what others did meanwhile tells nothing
FIXED_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")
CGROUP = Path("/sys/fs/cgroup")


class Load:
    """What others use, and the threads that are left to us. One per process."""

    def __init__(self):
        self.most = self.now = torch.get_num_threads()  # most: those that torch began with
        self.limit = cpu_limit()
        self.on = sys.platform == "linux" and self.most > 1 and self.most in own_choices() and dist.world() == 1 and \
            not any(name in os.environ for name in FIXED_BY)
        self.said: set[bool] = set()
        self.looked, self.before, self.calm = time.monotonic(), cpu_seconds() if self.on else None, None

    def look(self, say: Callable[[str], None]) -> None:
        """Measure since the last look, and change the number of threads."""
        now, used = time.monotonic(), cpu_seconds()
        elapsed, before = now - self.looked, self.before
        self.looked, self.before = now, used
        if torch.get_num_threads() != self.now or not used or not before:  # someone else has a say; no figures
            self.on = False
            return
        own, others = ((after - start) / elapsed for start, after in zip(before, used, strict=True))  # in cores
        if own <= 0.25 and elapsed >= WAITED_S:
            return
        cores = len(os.sched_getaffinity(0))
        free = min(self.limit, cores - others)
        threads = max(1, int(free + 0.4))
        if threads < self.now:
            self.set(threads, f"this container may use {free:g} cores" if free == self.limit else
                     f"other processes use {others:.1f} of {cores} cores", say)
        elif self.now == self.most or free < self.now + 0.75:
            self.calm = None
        else:
            since, fewest = self.calm or (now, free)
            self.calm = since, min(fewest, free)
            if now - since >= CALM_S:
                self.set(min(self.most, int(self.calm[1] + 0.25)), "cores are free again", say)

    def set(self, threads: int, why: str, say) -> None:
        up, self.now, self.calm = threads > self.now, threads, None
        torch.set_num_threads(threads)
        if up not in self.said:  # once per direction
            self.said.add(up)
            say(f"{why}: going on with {threads} of {self.most} threads, by what others leave free (OMP_NUM_THREADS=N "
                "fixes the number)")


_load: Load | None = None


def follow_load(device: torch.device, say: Callable[[str], None]) -> None:
    """Set the number of threads for what comes next; cheap enough for every step."""
    global _load
    if device.type == "cpu":
        _load = _load or Load()
        if _load.on and time.monotonic() - _load.looked >= LOOK_S:
            _load.look(say)


def own_choices() -> set[int]:
    """What torch may begin with by itself: logical or physical cores."""
    cores = os.sched_getaffinity(0)
    siblings = [Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list") for core in cores]
    return {len(cores), len({path.read_text() for path in siblings if path.exists()})}


def cpu_seconds() -> tuple[float, float] | None:
    """Seconds of our cores used so far, by this process and by others; None if unknown."""
    times, names = os.times(), {f"cpu{core}" for core in os.sched_getaffinity(0)}
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    except OSError:
        return None
    rows = [list(map(int, fields[1:9])) for fields in lines if fields[0] in names]
    busy = sum(user + nice + system + irq + softirq + steal
               for user, nice, system, _, _, irq, softirq, steal in rows) / os.sysconf("SC_CLK_TCK")
    own = times.user + times.system
    return (own, busy - own) if len(rows) == len(names) else None


def cpu_limit() -> float:
    """Cores that this container may use at a time; inf: all."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((CGROUP / name).read_text() for name in files).split()
            return int(quota) / int(period) if int(quota) > 0 else float("inf")
        except (OSError, ValueError):  # "max": no limit
            continue
    return float("inf")
