"""When a decode step is recorded, replayed, or called plainly. Recording needs a GPU: a stand-in records here."""

import contextlib

import pytest
import torch

from minimath.rollout.decode import MOST, WARM_UP, StepGraphs


class Recorder:
    """Stands in for torch.cuda.CUDAGraph and torch.cuda.graph: keeps what ran inside, replays it by name."""

    def __init__(self, error: Exception | None = None):
        self.calls, self.error = [], error

    def step(self, n, length, spans):
        self.calls.append(("step", n, length))

    def install(self, monkeypatch):
        recorder = self

        class Graph:
            def replay(self):
                recorder.calls.append(("replay", *self.key))

            def pool(self):
                return "pool"

        @contextlib.contextmanager
        def recording(graph, pool=None):
            if recorder.error:
                raise recorder.error
            yield
            graph.key = recorder.calls.pop()[1:]  # what is recorded does not run

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", recording)
        graphs = StepGraphs(torch.device("cpu"))
        graphs.usable = True
        return graphs


def test_a_step_is_recorded_after_it_has_warmed_up_and_then_replayed(monkeypatch):
    recorder = Recorder()
    graphs = recorder.install(monkeypatch)
    for _ in range(WARM_UP + 3):
        graphs.run(recorder.step, 8, 256, None)
    assert recorder.calls == [("step", 8, 256)] * WARM_UP + [("replay", 8, 256)] * 3
    assert graphs.used


def test_every_size_has_its_own_recording(monkeypatch):
    recorder = Recorder()
    graphs = recorder.install(monkeypatch)
    for n, length in [(8, 256), (4, 256), (8, 512)] * (WARM_UP + 1):
        graphs.run(recorder.step, n, length, None)
    assert recorder.calls[-3:] == [("replay", 8, 256), ("replay", 4, 256), ("replay", 8, 512)]


def test_recordings_are_forgotten_when_tensors_have_moved(monkeypatch):
    recorder = Recorder()
    graphs = recorder.install(monkeypatch)
    for _ in range(WARM_UP + 1):
        graphs.run(recorder.step, 8, 256, None)
    graphs.forget()
    graphs.run(recorder.step, 8, 256, None)
    assert recorder.calls[-1] == ("step", 8, 256)


def test_not_more_sizes_are_recorded_than_memory_should_hold(monkeypatch):
    recorder = Recorder()
    graphs = recorder.install(monkeypatch)
    for n in range(MOST + 5):
        for _ in range(WARM_UP + 1):
            graphs.run(recorder.step, n, 256, None)
    assert len(graphs.recorded) == MOST
    assert recorder.calls[-1] == ("step", MOST + 4, 256)


def test_a_step_that_cannot_be_recorded_runs_plainly_and_is_told_once(monkeypatch):
    recorder = Recorder(RuntimeError("operation not permitted when stream is capturing"))
    graphs = recorder.install(monkeypatch)
    with pytest.warns(UserWarning, match="without CUDA graphs.*not permitted") as told:
        for _ in range(WARM_UP + 3):
            graphs.run(recorder.step, 8, 256, None)
    assert len(told) == 1
    assert recorder.calls == [("step", 8, 256)] * (WARM_UP + 3) and not graphs.used


def test_running_out_of_memory_while_recording_is_not_hidden(monkeypatch):
    recorder = Recorder(torch.OutOfMemoryError("simulated"))
    graphs = recorder.install(monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        for _ in range(WARM_UP + 1):
            graphs.run(recorder.step, 8, 256, None)
    assert graphs.usable


def test_nothing_is_recorded_on_a_cpu():
    assert not StepGraphs(torch.device("cpu")).usable
