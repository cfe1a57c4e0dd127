"""The number of threads follows what other processes leave free, and only where nobody else has a say."""
import os
import subprocess
import sys

import pytest
import torch

from minimath.core import threads

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """machine.run(seconds, others) -> the threads set; others: cores that other processes use meanwhile."""
    class Machine:
        now, own, others, count, said = 0.0, 0.0, 0.0, 4, []

        def run(self, seconds, others, own=2.0):
            for _ in range(4 * seconds):
                threads.follow_load(CPU, self.said.append)
                self.now, self.own, self.others = self.now + 0.25, self.own + own / 4, self.others + others / 4
            threads.follow_load(CPU, self.said.append)
            return self.count

    here = Machine()
    here.said = []
    for name in threads.FIXED_BY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_load", None)
    monkeypatch.setattr(threads, "own_choices", lambda: {4})
    monkeypatch.setattr(threads, "cpu_limit", lambda: float("inf"))
    monkeypatch.setattr(threads, "cpu_seconds", lambda: (here.own, here.others))
    monkeypatch.setattr(threads.sys, "platform", "linux")
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(threads.time, "monotonic", lambda: here.now)
    monkeypatch.setattr(torch, "get_num_threads", lambda: here.count)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: setattr(here, "count", count))
    return here


def test_threads_go_down_at_once_and_up_when_it_has_been_calm_said_once_each(machine):
    assert machine.run(3, 0.2) == 4 and not machine.said
    assert machine.run(1, 1.0) == 3 and machine.run(1, 2.9) == 1 and machine.run(2, 3.9) == 1
    assert machine.run(5, 0.1) == 1 and machine.run(1, 0.1) == 4
    assert machine.run(1, 1.0) == 3 and machine.run(6, 0.0) == 4
    down, up = machine.said
    assert down.startswith("other processes use 1.0 of 4 cores: going on with 3 of 4 threads, by what others leave")
    assert "(OMP_NUM_THREADS=N fixes the number)" in down
    assert up.startswith("cores are free again: going on with 4 of 4 threads")


def test_what_comes_and_goes_within_seconds_leaves_the_lower_number(machine):
    machine.run(3, 1.0)
    assert {machine.run(3, others) for others in (0.0, 1.0) * 6} == {3}
    assert machine.run(20, 0.6) == 3  # between the two marks nothing changes
    assert machine.run(9, 0.1) == 4


def test_up_to_as_many_as_have_been_free_all_the_time(machine):
    assert machine.run(3, 3.0) == 1 and machine.run(3, 1.0) == 1 and machine.run(3, 0.0) == 3


def test_time_in_which_nothing_was_computed_tells_nothing(machine):
    machine.run(2, 0.0)
    machine.now, machine.others = machine.now + 60, machine.others + 240  # a local judge had all cores
    assert machine.run(3, 0.0) == 4
    machine.now, machine.own, machine.others = machine.now + 60, machine.own + 90, machine.others + 90  # one long step
    assert machine.run(0, 0.0) == 2 and len(machine.said) == 1


def test_a_container_s_limit_counts(machine, monkeypatch):
    monkeypatch.setattr(threads, "cpu_limit", lambda: 2.0)
    assert machine.run(3, 0.0) == 2 and machine.run(20, 0.0) == 2 and machine.run(3, 3.0) == 1
    assert machine.said[0].startswith("this container may use 2 cores: going on with 2 of 4 threads")


@pytest.mark.parametrize("who", ["OMP_NUM_THREADS", "before", "meanwhile", "processes", "device", "no figures"])
def test_nothing_is_changed_where_someone_else_has_a_say(machine, monkeypatch, who):
    if who == "OMP_NUM_THREADS":
        monkeypatch.setenv(who, "4")
    if who == "before":
        machine.count = 3
    if who == "processes":
        monkeypatch.setattr(threads.dist, "world", lambda: 2)
    if who == "device":
        monkeypatch.setattr(sys.modules[__name__], "CPU", torch.device("meta"))
    if who == "no figures":
        monkeypatch.setattr(threads, "cpu_seconds", lambda: None)
    machine.run(1, 0.0)
    if who == "meanwhile":
        machine.count = 2
    before = machine.count
    assert machine.run(5, 3.5) == before and not machine.said


@pytest.mark.parametrize("files, limit", [
    ({"cpu.max": "150000 100000\n"}, 1.5), ({"cpu.max": "max 100000\n"}, float("inf")), ({}, float("inf")),
    ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, float("inf"))])
def test_the_limit_of_a_container_is_read_in_both_forms(monkeypatch, tmp_path, files, limit):
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert threads.cpu_limit() == limit


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_another_process_uses_is_seen_and_not_counted_as_ours():
    import time
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)
        began, (own, others) = time.monotonic(), threads.cpu_seconds()
        while time.monotonic() - began < 1.0:
            time.sleep(0.01)
        own_after, others_after = threads.cpu_seconds()
    finally:
        busy.kill()
        busy.wait()
    assert own_after - own < 0.3 and others_after - others > 0.15  # 1.0 where it has a core of its own
    assert len(os.sched_getaffinity(0)) in threads.own_choices()
