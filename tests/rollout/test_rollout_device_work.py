"""What a rollout makes a card do, counted without one: what the host waits for, copies, launches."""
import contextlib
from types import SimpleNamespace
from unittest import mock

import pytest
import tiny
import torch
from device_work import on_a_card, policy_on_card
from toy import make_config

from minimath.config.schema import EngineOptions, SamplingOptions, SFTConfig
from minimath.data.sample import Sample
from minimath.models.forward import inference
from minimath.rollout.blocks import Row
from minimath.rollout.decode import Decode
from minimath.rollout.open import OwnEngine, fast_decoding
from minimath.rollout.transformers_engine import logp_difference

PROMPTS = [list(range(4, 20)), list(range(4, 30)), list(range(4, 15))]


class Event:
    """An event of a stream: who waits for one does not wait for the steps behind it."""

    waited = 0

    def record(self):
        pass

    def synchronize(self):
        Event.waited += 1


@contextlib.contextmanager
def rollout_on_card(folder, **engine):
    """(work, running batch) of 3 prompts x 4 samples in 8 slots, 2 layers, a plain step in place of a recorded one."""
    free = {"mem_get_info": lambda *_: (8 << 30, 8 << 30), "memory_reserved": lambda *_: 0,
            "memory_allocated": lambda *_: 0, "Event": Event}
    with mock.patch.multiple(torch.cuda, **free), on_a_card() as work, torch.no_grad():
        policy = policy_on_card(make_config(SFTConfig, str(folder), dtype="bf16"))
        engine = OwnEngine(EngineOptions(**engine), SamplingOptions(max_new_tokens=32), policy)
        with inference(policy.model), fast_decoding(policy.model, 8, False) as fast:
            batch = Decode(engine)
            batch.graphs.usable = False
            batch.start([Row(job) for job in engine.jobs(PROMPTS, 4, None, ())], 8, 8 * 64, fast)
            work.clear()
            yield work, batch


def copies(work) -> list[str]:
    """Copies to the card, those of transformers' empty caches left out: of nothing."""
    return [line for line in work.copies if not line.startswith("(0,)")]


def waits(work) -> list[str]:
    return work.reads + [line for line in work.waits if not line.startswith("(0,)")]


@pytest.fixture(scope="module")
def done(tiny_dir):
    """What each act of a rollout does: (copies, waits, launches)."""
    found = {}
    with rollout_on_card(tiny_dir) as (work, batch):
        def act(name, call):
            call()
            found[name] = SimpleNamespace(copies=copies(work), waits=waits(work), launches=work.launches.total())
            work.clear()

        act("refill", batch.admit)
        act("step", batch.step)
        act("first look", batch.look)
        act("look", batch.collect)
        act("read", lambda: batch.read([1, 5, 7]))
        act("arrange", lambda: batch.arrange([0, 2, 3, 4, 6]))
        act("second refill", batch.admit)
    return found


def test_a_step_waits_for_nothing_and_copies_nothing(done):
    assert not done["step"].waits and not done["step"].copies


@pytest.mark.parametrize("refill", ["refill", "second refill"])
def test_a_refill_is_two_copies_that_nothing_waits_for(done, refill):
    """Tokens and numbers of two prompts, and the noise of all rows; it was 69, of one prompt 32."""
    assert len(done[refill].copies) == 2 and not done[refill].waits, done[refill].copies


def test_rows_that_ended_are_read_in_one_copy(done):
    """It was four for each row."""
    assert len(done["read"].waits) == len(done["read"].copies) == 1, done["read"].waits


def test_rows_are_moved_by_one_index(done):
    """It was 24 copies for two layers, four more for each other one."""
    assert len(done["arrange"].copies) == 1 and not done["arrange"].waits


def test_the_look_at_a_rollout_s_log_probs_reads_one_number(tiny_dir):
    """It was three: the kernel was not told which rows count."""
    with on_a_card() as work, torch.no_grad():
        policy = policy_on_card(make_config(SFTConfig, str(tiny_dir), dtype="bf16"))
        work.clear()
        with inference(policy.model):
            logp_difference(policy.model, [4, 5, 6], Sample([7, 8], [-1.0, -1.0], True), 1.0)
    assert len(work.reads) == 1, work.reads


def test_who_goes_on_is_known_from_the_look_before(done):
    """The host waits for an event behind which steps are under way already, not for those."""
    assert not done["first look"].waits and not done["look"].waits and not done["look"].copies
    assert Event.waited == 1


def test_launches_of_a_step_do_not_creep_up(done):
    """Two layers and a choice from the whole softmax; it was 123."""
    assert 60 < done["step"].launches <= 116
    assert done["look"].launches == 1


@pytest.mark.parametrize("family", ["qwen2-window", "qwen3", "gemma3_text", "phi3", "granite", "cohere"])
def test_no_family_waits_in_a_step_or_a_refill(tmp_path, family):
    """Windows by layer, norms of heads, layers that are not fused. Gemma-2's eager prefill the stand-in cannot run."""
    with rollout_on_card(tiny.tiny_model(tmp_path, family)) as (work, batch):
        batch.admit()
        assert not waits(work) and len(copies(work)) == 2
        work.clear()
        batch.step()
        assert batch.fixed and not waits(work) and not copies(work)


def test_early_ends_cost_no_wait(tiny_dir):
    """A row's newest tokens come with the look."""
    with rollout_on_card(tiny_dir, loop_guard=32, stop_boxed=True) as (work, batch):
        batch.admit()
        batch.step()
        batch.collect()
        work.clear()
        batch.step()
        batch.collect()
        assert not waits(work) and not copies(work)


def test_the_check_can_fail(tiny_dir):
    with rollout_on_card(tiny_dir) as (work, batch):
        batch.alive[[0, 1]] = False
        batch.alive.tolist()
        assert len(copies(work)) == 2 and len(waits(work)) == 3
