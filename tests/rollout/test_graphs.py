"""When a decode step is recorded, replayed, or called plainly. Recording needs a GPU: a stand-in records here."""

import contextlib
import gc
import weakref
from types import SimpleNamespace

import pytest
import tiny
import torch
from engines import engine_of
from test_rollout import prompts_of
from torch._subclasses.fake_tensor import FakeTensorMode
from toy import load, wake_adapter
from transformers import AutoConfig, AutoModelForCausalLM

from minimath.models.forward import adapter_named, base_causal_lm, hidden_states
from minimath.models.fused import fused_layers
from minimath.rollout import decode as decoding
from minimath.rollout import graphs as recording
from minimath.rollout import kv_cache
from minimath.rollout import open as own_engine
from minimath.rollout.graphs import WARM_UP, StepGraphs, addresses, reads_back

CPU = SimpleNamespace(device=torch.device("cpu"), modules=list)  # a model, as far as StepGraphs looks at it
MAIN = "the current stream"


class Card:
    """Stands in for what torch.cuda records with: keeps the step that ran inside, and replays it by a call.

    Inside, tensors are fake: what is recorded changes nothing, and reading a value back raises."""

    def __init__(self, monkeypatch, error: Exception | None = None):
        self.calls, self.error, self.stream, self.undone, self.graph = [], error, MAIN, [], None
        card = self

        class Graph:
            ended = False

            def replay(self):
                card.calls.append("replay")
                self.step()

            def pool(self):
                if not self.ended:
                    raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")

        @contextlib.contextmanager
        def graph(graph, pool=None, stream=None, capture_error_mode="global"):
            assert pool == "pool" and capture_error_mode == "thread_local"
            card.calls.append("record")
            card.graph, card.stream = graph, stream
            with FakeTensorMode(allow_non_fake_inputs=True):
                yield
            if card.error:
                raise card.error  # as torch does when a capture cannot be ended: its stream stays the current one
            card.stream, graph.ended = "before", True

        @contextlib.contextmanager
        def stream(stream):
            before, card.stream = card.stream, stream
            try:
                yield
            finally:
                card.stream, card.graph = before, None

        class Generator:
            def clone_state(self):
                return "fresh"

            def graphsafe_set_state(self, state):
                card.undone.append(f"generator {state}")

        for name, stub in {"CUDAGraph": Graph, "graph": graph, "stream": stream, "Stream": lambda index: object(),
                           "graph_pool_handle": lambda: "pool", "current_device": lambda: 0,
                           "default_generators": (Generator(),)}.items():
            monkeypatch.setattr(torch.cuda, name, stub)
        recording.capture_stream.cache_clear()
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda *args, name=name: self.undone.append((name, *args)),
                                raising=False)

    def step(self, width):
        """A step of nothing."""
        if self.graph:
            self.graph.step = lambda: None
        else:
            self.calls.append(width)

    def graphs(self) -> StepGraphs:
        graphs = StepGraphs(CPU)
        graphs.usable = True
        return graphs

    def install(self, monkeypatch):
        """Let rollouts on the CPU think that they run here; an update always has room beside their buffers."""
        run_step, card, init = decoding.Decode.run_step, self, StepGraphs.__init__

        def step(self, width):
            if card.graph:
                card.graph.step = lambda: run_step(self, width)
            run_step(self, width)

        def usable(self, model):
            init(self, model)
            self.usable = True

        monkeypatch.setattr(decoding.Decode, "run_step", step)
        monkeypatch.setattr(StepGraphs, "__init__", usable)
        monkeypatch.setattr(kv_cache, "FIXED_SHAPES", ("cpu",))
        monkeypatch.setattr(own_engine, "copied_bytes", lambda *_: 1 << 60)  # a card has no copy of 16-bit weights
        monkeypatch.setattr(own_engine, "has_room_beside", lambda *_: True)
        return self

    def count(self, what) -> int:
        return self.calls.count(what)


# ---- by itself


def test_a_step_is_recorded_once_for_each_width_after_it_has_warmed_up_and_then_replayed(monkeypatch):
    card = Card(monkeypatch)
    graphs = card.graphs()
    for width in [8, 4, 8, 4] + [8, 4] * WARM_UP:
        graphs.run(card.step, width)
    assert card.calls == [8, 4] * WARM_UP + ["record", "replay"] * 2 + ["replay"] * 2
    assert graphs.replays == 2 * WARM_UP and card.stream == MAIN and not card.undone


def test_forgotten_graphs_and_their_memory_are_let_go_and_recorded_anew(monkeypatch):
    card = Card(monkeypatch)
    graphs = card.graphs()
    for _ in range(WARM_UP + 1):
        graphs.run(card.step, 8)
    held = weakref.ref(graphs.recorded[8])
    graphs.forget()
    gc.collect()
    assert held() is None and graphs.pool is None
    for _ in range(WARM_UP + 1):
        graphs.run(card.step, 8)
    assert card.calls == 2 * ([8] * WARM_UP + ["record", "replay"])


def test_a_step_that_cannot_be_recorded_runs_plainly_is_told_once_and_leaves_nothing_behind(monkeypatch):
    card = Card(monkeypatch, RuntimeError("operation not permitted when stream is capturing"))
    graphs = card.graphs()
    with pytest.warns(UserWarning, match="without CUDA graphs.*not permitted") as told:
        for _ in range(WARM_UP + 3):
            graphs.run(card.step, 8)
    assert len(told) == 1 and card.calls == [8] * WARM_UP + ["record"] + [8] * 3
    assert graphs.replays == 0 and graphs.pool is None and card.stream == MAIN
    assert card.undone == [("_cuda_endAllocateToPool", 0, "pool"), ("_cuda_releasePool", 0, "pool"), "generator fresh"]


def test_a_capture_that_ended_before_the_failure_gives_its_memory_back_itself(monkeypatch):
    card = Card(monkeypatch)
    graph = torch.cuda.CUDAGraph()
    graph.ended = True
    recording.end_capture(graph, "pool")
    assert card.undone == ["generator fresh"]


def test_running_out_of_memory_while_recording_is_not_hidden(monkeypatch):
    card = Card(monkeypatch, torch.OutOfMemoryError("simulated"))
    graphs = card.graphs()
    with pytest.raises(torch.OutOfMemoryError):
        for _ in range(WARM_UP + 1):
            graphs.run(card.step, 8)
    assert graphs.usable and card.stream == MAIN and len(card.undone) == 3


def test_nothing_is_recorded_on_a_cpu():
    assert not StepGraphs(CPU).usable


@pytest.mark.parametrize(("rope", "reads"), [("default", False), ("linear", False), ("llama3", False),
                                             ("dynamic", True), ("longrope", True)])
def test_rope_types_that_read_back_are_known(rope, reads):
    scaling = {"rope_type": rope, "rope_theta": 10_000.0, "factor": 2.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64, "short_factor": [1.0] * 4,
               "long_factor": [2.0] * 4}
    config = AutoConfig.for_model("llama", vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=1,
                                  num_attention_heads=4, rope_parameters=scaling)
    assert reads_back(AutoModelForCausalLM.from_config(config)) == reads


# ---- in rollouts


@pytest.fixture
def llama(tmp_path):
    model, tokenizer = load(tiny.write_tiny(tmp_path), train=True)
    wake_adapter(model)
    return model, tokenizer


OPTIONS = {"max_new_tokens": 24, "seed": 7, "eos": list(range(20, 50)), "max_num_seqs": 8}


def rollout(engine, prompts=None):
    groups = engine.generate(prompts or prompts_of(), 4)
    return [[sample.ids for sample in group] for group in groups], engine.metrics()


def train(model, seed: int = 2) -> None:
    """Change the adapter in place, as an optimiser does."""
    wake_adapter(model, seed=seed)


def judge(model) -> None:
    """Read with the judge's adapter, which was made as the policy's, and with none."""
    if "judge" not in model.peft_config:
        model.add_adapter("judge", model.peft_config["default"])
        wake_adapter(model, 0.4, seed=9)
    for name in ("judge", None):
        with adapter_named(model, name), torch.no_grad():
            hidden_states(model, torch.tensor([[5, 6, 7]]))


def test_a_rollout_records_each_width_once_and_samples_the_same(llama, monkeypatch):
    wanted, metrics = rollout(engine_of(*llama, **OPTIONS))
    assert metrics["graph_replays"] == 0 and metrics["plain_steps"] > 0
    card, widths = Card(monkeypatch).install(monkeypatch), set()
    run = StepGraphs.run
    monkeypatch.setattr(StepGraphs, "run", lambda self, step, width: (widths.add(width), run(self, step, width)))
    ids, metrics = rollout(engine_of(*llama, **OPTIONS))
    assert ids == wanted and widths <= {8, 4, 2, 1}
    assert 0 < card.count("record") <= len(widths)
    assert metrics["graph_replays"] == card.count("replay") > metrics["plain_steps"] > 0


def test_a_failed_capture_is_survived(llama, monkeypatch):
    wanted, _ = rollout(engine_of(*llama, **OPTIONS))
    card = Card(monkeypatch, RuntimeError("operation not permitted")).install(monkeypatch)
    engine = engine_of(*llama, **OPTIONS)
    with pytest.warns(UserWarning, match="without CUDA graphs") as told:
        for _ in range(2):
            ids, metrics = rollout(engine)
            assert ids == wanted and metrics["graph_replays"] == 0
    assert card.count("record") == len(told) == 1


def test_memory_that_runs_out_in_a_capture_halves_the_batch(llama, monkeypatch):
    wanted, _ = rollout(engine_of(*llama, **OPTIONS))
    card = Card(monkeypatch, torch.OutOfMemoryError("simulated")).install(monkeypatch)
    recover = decoding.Decode.halve
    monkeypatch.setattr(decoding.Decode, "halve", lambda self: (setattr(card, "error", None), recover(self))[1])
    ids, metrics = rollout(engine_of(*llama, **OPTIONS, say=lambda text: None))
    assert ids == wanted and metrics["halved"] == 1 and metrics["graph_replays"] > 0


def test_the_next_rollouts_replay_what_an_earlier_one_recorded_with_the_weights_of_now(llama, monkeypatch):
    """From the third on: what an update takes is known after the first."""
    model, _ = llama
    card = Card(monkeypatch).install(monkeypatch)
    engine, recorded, kept = engine_of(*llama, **OPTIONS), [], []
    for seed in range(2, 6):
        train(model, seed)
        judge(model)
        wanted, _ = rollout(engine_of(*llama, **OPTIONS))
        card.calls.clear()
        ids, _ = rollout(engine)
        assert ids == wanted
        recorded.append(card.count("record"))
        kept.append(engine._kept is not None)
    assert recorded[0] > 1 and recorded[1] > 1 and kept == [False, True, True, True]
    assert sum(recorded[1:]) == len(engine._kept.graphs.recorded)  # each width once, when it has warmed up
    engine.close()
    assert engine._kept is None


def test_the_adapters_of_each_rollout_stand_in_the_same_tensors(llama, monkeypatch):
    model, _ = llama
    found, group = [], fused_layers(base_causal_lm(model)).layers[0].qkv
    for seed in (2, 3):
        train(model, seed)
        judge(model)
        with own_engine.fast_decoding(model, 4, False):
            found.append((addresses(model), group.active.b.clone()))
    assert found[0][0] == found[1][0] and not torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("change", ["longer prompts", "weights elsewhere", "out of memory"])
def test_what_was_recorded_is_forgotten_when_a_tensor_has_moved(llama, monkeypatch, change):
    model, _ = llama
    Card(monkeypatch).install(monkeypatch)
    engine, prompts = engine_of(*llama, **OPTIONS, say=lambda text: None), prompts_of()
    for seed in (2, 3):
        train(model, seed)
        rollout(engine)
    recorded = [weakref.ref(graph) for graph in engine._kept.graphs.recorded.values()]
    if change == "longer prompts":
        prompts = prompts_of((5, 200))
    elif change == "weights elsewhere":
        norm = base_causal_lm(model).base_model.norm
        norm.weight.data = norm.weight.data.clone()
    else:
        step, fails = decoding.Decode.step, iter([True])
        monkeypatch.setattr(decoding.Decode, "step",
                            lambda self: full() if next(fails, False) else step(self))

    def full():
        raise torch.OutOfMemoryError("simulated")

    ids, _ = rollout(engine, prompts)
    gc.collect()
    assert recorded and not any(graph() for graph in recorded)
    assert ids == rollout(engine_of(*llama, **OPTIONS), prompts)[0]


def test_what_stays_goes_before_a_rollout_of_other_lengths_takes_memory(llama, monkeypatch):
    """brevity=truncate lowers max_new_tokens at every step: two caches side by side have no room."""
    Card(monkeypatch).install(monkeypatch)
    engine, model = engine_of(*llama, **OPTIONS), llama[0]
    for seed in (2, 3):
        train(model, seed)
        rollout(engine)
    held, engine.max_new_tokens = weakref.ref(engine._kept), engine.max_new_tokens - 1
    parts = engine.stream(prompts_of(), 4)
    next(parts)
    gc.collect()
    assert held() is None
    parts.close()


def test_copies_of_weights_are_no_part_of_what_stays(llama, monkeypatch):
    """A copy is made anew for every rollout: steps that read it are recorded anew."""
    card = Card(monkeypatch).install(monkeypatch)
    monkeypatch.setattr(own_engine, "copied_bytes", lambda *_: 0)
    engine, model = engine_of(*llama, **OPTIONS), llama[0]
    for seed in (2, 3, 4):
        train(model, seed)
        card.calls.clear()
        ids, _ = rollout(engine)
        assert card.count("record") > 0 and ids == rollout(engine_of(*llama, **OPTIONS))[0]
        assert engine._kept is None or not engine._kept.graphs.recorded


def test_a_cpu_keeps_nothing_between_rollouts(llama):
    engine = engine_of(*llama, **OPTIONS)
    for seed in (2, 3, 4):
        train(llama[0], seed)
        rollout(engine)
        assert engine._kept is None


def test_a_second_stream_of_an_engine_has_state_of_its_own(llama, monkeypatch):
    Card(monkeypatch).install(monkeypatch)
    engine = engine_of(*llama, **OPTIONS)
    wanted, _ = rollout(engine)
    train(llama[0])
    wake_adapter(llama[0])
    rollout(engine)
    assert engine._kept
    first = engine.stream(prompts_of(), 4)
    next(first)
    assert engine._kept is None and rollout(engine)[0] == wanted
    first.close()
