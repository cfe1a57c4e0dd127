"""What a step makes a card do, counted without one: what the host waits for, copies, launches."""
import pytest
import torch
from device_work import CARD, on_a_card, policy_on_card
from toy import make_config

from minimath.config.schema import RLAIFConfig, SFTConfig
from minimath.data.chat import Encoded
from minimath.data.sample import Group, Sample
from minimath.train import rlaif, sft
from minimath.train.optimizer import Optimizer

ROWS = [Encoded(list(range(10, 40)), [False] * 10 + [True] * 20, False) for _ in range(4)]


def groups() -> list[Group]:
    """Two groups of four completions of 20 tokens behind a prompt of 30."""
    def sample(advantage):
        return Sample(list(range(10, 30)), [-1.0] * 20, True, advantage=advantage)
    return [Group(None, list(range(5, 35)), [sample(a) for a in (1.5, 0.5, -0.5, -1.5)]) for _ in range(2)]


def counted(cls, model, update, **options):
    """The Work of the second update of a model on a card: the first makes the optimizer's state."""
    cfg = make_config(cls, model, dtype="bf16", **options)
    with on_a_card() as work:
        policy = policy_on_card(cfg)
        optimizer = Optimizer(policy, cfg, print)
        for _ in range(2):
            work.clear()
            seen = update(cfg, policy, optimizer)
        assert seen["optim/stepped"] == 1
    return work


@pytest.fixture(scope="module", params=[True, False], ids=["packed", "padded"])
def sft_work(request, tiny_dir):
    """Of an SFT step of two micro-batches."""
    return counted(SFTConfig, tiny_dir, lambda cfg, *each: sft.update(*each, ROWS, packing=cfg.packing),
                   micro_batch_tokens=64, packing=request.param)


@pytest.fixture(scope="module")
def rl_work(tiny_dir):
    """Of an update of two micro-batches."""
    return counted(RLAIFConfig, tiny_dir, lambda *each: rlaif.update(*each, groups(), groups()), micro_batch_tokens=128,
                   max_new_tokens=32)


def test_the_host_waits_for_the_card_once_in_an_sft_step(sft_work):
    """It waited three times a micro-batch and once for the norm: 7."""
    assert len(sft_work.reads) == 1, sft_work.reads


def test_a_micro_batch_of_sft_goes_over_in_two_copies_that_nothing_waits_for(sft_work):
    """Tokens and places, and what attention must know of the rows; it was 3, and nothing was pinned."""
    assert len(sft_work.copies) <= 4 and not sft_work.waits, sft_work.copies


def test_the_host_waits_for_the_card_once_in_an_update(rl_work):
    """It waited 15 times a micro-batch and once for the norm: 31."""
    assert len(rl_work.reads) == 1, rl_work.reads


def test_a_micro_batch_of_an_update_goes_over_in_three_copies_that_nothing_waits_for(rl_work):
    """Tokens and places, what the loss knows of each token, the rows; it was 9, and nothing was pinned."""
    assert len(rl_work.copies) == 6 and not rl_work.waits, rl_work.copies


def test_an_old_policy_and_a_reference_cost_one_read_each(tiny_dir):
    """Old log-probs, those of the reference, those of each of two sequence ratios, two steps; it was 130 reads."""
    work = counted(RLAIFConfig, tiny_dir, lambda *each: rlaif.update(*each, groups(), groups()), micro_batch_tokens=128,
                   max_new_tokens=32, kl_coef=0.1, updates_per_rollout=2, loss="gspo")
    assert len(work.reads) == 6, work.reads


def test_launches_of_a_step_do_not_creep_up(sft_work, rl_work):
    """Two micro-batches of two layers, adapters on all linear layers; attention counts as one launch each way."""
    assert 300 < sft_work.counts()["launches"] <= 700 and 300 < rl_work.counts()["launches"] <= 800


# ---- the counter

def test_what_the_host_waits_for_is_counted():
    with on_a_card() as work:
        x = torch.empty(3, 4, device=CARD)
        assert x.is_cuda and (x + 1).device == CARD
        for wait in (lambda: float(x.sum()), lambda: bool((x > 0).any()), lambda: x.tolist(), lambda: x.cpu(),
                     lambda: x.nonzero(), lambda: x[x > 0], lambda: torch.equal(x, x), lambda: x.to("cpu").sum(),
                     lambda: torch.empty(3, 4).copy_(x)):
            work.clear()
            wait()
            assert len(work.reads) == 1, work.reads
        work.clear()
        x[:, torch.arange(2, device=CARD)].mul(2).to(torch.bfloat16).t()[1:]
        assert work.counts() == {"reads": 0, "copies": 0, "waits": 0, "launches": 4}


def test_a_copy_is_waited_for_unless_its_source_is_pinned_and_it_may_run_on():
    with on_a_card() as work:
        values = torch.arange(4)
        values.to(CARD), values.pin_memory().to(CARD), values.to(CARD, non_blocking=True)
        torch.tensor([1, 2], device=CARD)
        assert work.counts() == {"reads": 0, "copies": 4, "waits": 4, "launches": 0}
        work.clear()
        assert values.pin_memory().tolist() == [0, 1, 2, 3] and values.pin_memory().is_pinned()
        values.pin_memory().to(CARD, non_blocking=True)
        assert work.counts() == {"reads": 0, "copies": 1, "waits": 0, "launches": 0}


def test_after_the_count_all_is_as_it_was():
    with on_a_card():
        pass
    x = torch.ones(2, requires_grad=True)
    (x.to(torch.float64) * 2).sum().backward()
    assert x.grad.tolist() == [2, 2] and not x.is_cuda and not isinstance(x, torch._subclasses.FakeTensor)
