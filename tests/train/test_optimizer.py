"""The optimizer: a step with a closure, retry after an out-of-memory, clipping, schedules, and steps that are not
finite and change nothing."""
import math
import random
import sys
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minimath.config.schema import OptimizerOptions, RLAIFConfig, SFTConfig
from minimath.core.errors import UserError
from minimath.train.optimizer import MOST_HALVINGS, LossScale, Optimizer, check_finite, clip_and_step, make_optimizer

NAMES = ["adamw", "adamw8bit", "paged_adamw8bit", "paged_adamw32bit"]


def make_params(dtype=torch.float32):
    """One tensor above bitsandbytes' 8-bit threshold (4,096 elements), one below, one vector."""
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((96, 64), (7, 5), (9,))]


def set_grads(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


def snapshot(params, optimizer):
    states = [optimizer.state[p] for p in params]
    return [p.detach().clone() for p in params] + [
        value.clone() if torch.is_tensor(value) else value for state in states for value in state.values()]


def equal(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(left, right))


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_lowers_a_quadratic(name):
    params = make_params()
    optimizer = make_optimizer(params, OptimizerOptions(name))
    before = sum(p.square().sum().item() for p in params)
    for _ in range(40):
        sum(p.square().sum() for p in params).backward()
        assert clip_and_step(optimizer, params, 0.0, 0.02)[1]
    assert sum(p.square().sum().item() for p in params) < 0.5 * before


@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_changes_neither_weights_nor_state(name, bad):
    params = make_params()
    optimizer = make_optimizer(params, OptimizerOptions(name))
    set_grads(params, 1)
    clip_and_step(optimizer, params, 1.0, 0.1)
    before = snapshot(params, optimizer)
    set_grads(params, 2)
    params[1].grad[3, 2] = bad
    norm, stepped = clip_and_step(optimizer, params, 1.0, 0.1)
    assert not stepped and not math.isfinite(norm)
    assert equal(before, snapshot(params, optimizer))
    assert all(p.grad is None for p in params)
    set_grads(params, 3)
    assert clip_and_step(optimizer, params, 1.0, 0.1)[1]
    assert not equal(before, snapshot(params, optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_the_fp32_norm_and_clipping_scales_to_it(dtype):
    params = make_params(dtype)
    set_grads(params, 1)
    exact = math.sqrt(sum(p.grad.double().square().sum().item() for p in params))
    optimizer = torch.optim.SGD(params, lr=0.0)
    before = [p.detach().clone() for p in params]
    norm, _ = clip_and_step(optimizer, params, 0.5, 1.0)
    assert norm == pytest.approx(exact, rel=1e-5)
    moved = math.sqrt(sum((a - p).double().square().sum().item() for a, p in zip(before, params)))
    assert moved == pytest.approx(0.5, rel=1e-3 if dtype == torch.float32 else 0.1)


def test_no_clipping_below_the_limit_and_none_at_zero():
    for limit in (0.0, 1e6):
        params = make_params()
        before = [p.detach().clone() for p in params]
        set_grads(params, 1)
        grads = [p.grad.clone() for p in params]
        clip_and_step(torch.optim.SGD(params, lr=0.0), params, limit, 1.0)
        for p, start, grad in zip(params, before, grads):
            assert torch.equal(p, start - grad)


def test_without_any_gradient_no_step_is_taken():
    params = make_params()
    optimizer = make_optimizer(params, OptimizerOptions(weight_decay=0.5))
    before = snapshot(params, optimizer)
    assert clip_and_step(optimizer, params, 1.0, 0.1) == (0.0, False)
    assert equal(before, snapshot(params, optimizer))


def test_weight_decay_is_for_matrices_only():
    params = make_params()
    before = [p.detach().clone() for p in params]
    optimizer = make_optimizer(params, OptimizerOptions(weight_decay=0.5))
    for p in params:
        p.grad = torch.zeros_like(p)
    clip_and_step(optimizer, params, 1.0, 0.1)
    torch.testing.assert_close(params[0].detach(), before[0] * 0.95)
    assert torch.equal(params[2], before[2])


def test_frozen_parameters_are_left_out_and_none_at_all_is_an_error():
    params = make_params()
    params[0].requires_grad_(False)
    optimizer = make_optimizer(params, OptimizerOptions())
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    with pytest.raises(UserError, match="nothing to train"):
        make_optimizer(params[:1], OptimizerOptions())


@pytest.mark.parametrize("name", NAMES[1:])
def test_missing_bitsandbytes_names_the_optimizer_to_use(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="optimizer=adamw, or: pip install bitsandbytes"):
        make_optimizer(make_params(), OptimizerOptions(name))


# ---- a step with a closure

class Rows:
    """A batch of rows of the given lengths, cut into micro-batches of at most so many tokens."""

    def __init__(self, lengths=(5, 3, 4, 2)):
        self.lengths, self.asked, self.trained_tokens = list(lengths), [], 2

    def micro_batches(self, most):
        self.asked.append(most)
        left = list(range(len(self.lengths)))
        while left:
            indices = [left.pop(0)]
            while left and sum(self.lengths[i] for i in [*indices, left[0]]) <= most:
                indices.append(left.pop(0))
            yield indices, {"x": torch.tensor([float(self.lengths[i]) for i in indices])}


def optimizer_of(cls=SFTConfig, params=None, said=None, **options):
    """An Optimizer over a few tensors; what it says goes to `said`."""
    params = make_params() if params is None else params
    policy = SimpleNamespace(params=params, model=torch.nn.ParameterList(params))
    return Optimizer(policy, cls(**{"lr": 0.1, "micro_batch_tokens": 8} | options),
                     (said if said is not None else []).append)


def loss_on(optimizer, noise=True, before=lambda indices: None, factor=1.0):
    """A closure: mean over the batch of a loss that draws from all generators, as dropout or a user's code may."""
    def loss_of_micro_batch(indices, micro):
        before(indices)
        drawn = torch.rand(()) + random.random() + np.random.rand() if noise else 1.0
        loss = factor * sum((p * micro["x"].sum()).square().mean() for p in optimizer.params) * drawn / 14
        return loss, {"seen": torch.tensor(len(indices))}
    return loss_of_micro_batch


def seed_all():
    torch.manual_seed(3), random.seed(3), np.random.seed(3)


def test_a_step_adds_up_losses_and_metrics_of_its_micro_batches_and_moves_the_weights():
    optimizer, batch = optimizer_of(max_grad_norm=0.0), Rows()
    before = [p.detach().clone().requires_grad_() for p in optimizer.params]
    seen = optimizer.step(batch, loss_on(optimizer, noise=False))
    loss = sum((p * x).square().mean() for x in (8.0, 6.0) for p in before) / 14  # rows of 5 + 3 and 4 + 2 tokens
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in before])
    assert seen == {"loss": pytest.approx(loss.item(), rel=1e-6), "seen": 2.0, "optim/lr": 0.1, "optim/stepped": 1.0,
                    "optim/grad_norm": pytest.approx(norm.item(), rel=1e-6), "optim/skipped": 0}
    assert all(not torch.equal(p, q) and p.grad is None for p, q in zip(optimizer.params, before))
    optimizer.lr = 0.0  # the trainer follows the schedule
    now = snapshot(optimizer.params, optimizer.inner)[:3]
    optimizer.step(batch, loss_on(optimizer))
    assert all(torch.equal(p, q) for p, q in zip(optimizer.params, now))


class Masked(torch.autograd.Function):
    """A sum whose graph holds on to an object, as attention does to its masks."""

    @staticmethod
    def forward(ctx, values, mask):
        ctx.mask = mask
        return values.sum()

    @staticmethod
    def backward(ctx, grad):
        return grad.expand(9), None


def test_what_hangs_on_a_loss_is_gone_before_the_next_micro_batch():
    optimizer, masks = optimizer_of(), []

    def loss_of_micro_batch(indices, micro):
        assert all(mask() is None for mask in masks)
        mask = threading.Event()  # any object with weak references
        masks.append(weakref.ref(mask))
        return Masked.apply(optimizer.params[2], mask), {}
    optimizer.step(Rows(), loss_of_micro_batch)
    assert len(masks) == 2


def failing(times, kind=torch.OutOfMemoryError):
    """A hook that raises in the second micro-batch of the first `times` passes."""
    left = [times]

    def before(indices):
        if left[0] and 0 not in indices:
            left[0] -= 1
            raise kind("CUDA out of memory. Tried to allocate 2.00 GiB")
    return before


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError])
def test_after_an_out_of_memory_the_step_is_that_of_a_run_which_began_with_fewer_tokens(kind):
    """Bitwise: the gradient of the failed pass is gone, and the random numbers are drawn again."""
    said, steps = [], []
    for options, before in (({"micro_batch_tokens": 12}, failing(1, kind)), ({"micro_batch_tokens": 6}, None)):
        optimizer, batch = optimizer_of(said=said, **options), Rows()
        seed_all()
        metrics = optimizer.step(batch, loss_on(optimizer, before=before or (lambda indices: None)))
        steps.append((metrics, snapshot(optimizer.params, optimizer.inner), torch.rand(1).item()))
    (retried, ours, drawn), (small, theirs, drawn_too) = steps
    assert retried == small and equal(ours, theirs) and drawn == drawn_too
    assert len(said) == 1 and "micro_batch_tokens=6" in said[0] and "same gradient" in said[0]


def test_what_a_run_learned_of_its_memory_is_kept_and_an_option_that_bears_on_it_begins_anew():
    optimizer, batch = optimizer_of(micro_batch_tokens=12), Rows()
    optimizer.step(batch, loss_on(optimizer, before=failing(1)))
    optimizer.step(batch, loss_on(optimizer))
    assert batch.asked == [12, 6, 6]
    for options, tokens in (({}, 6), ({"lora_r": 4}, 12), ({"lr": 0.2, "out": "x"}, 6)):
        again = optimizer_of(**{"micro_batch_tokens": 12} | options)
        again.load_state_dict(optimizer.state_dict())
        assert again.micro_batch_tokens == tokens, options


@pytest.mark.parametrize("lengths, times", [([9, 9], 1), ([1] * 64, MOST_HALVINGS + 1)])
def test_a_step_that_fits_in_no_memory_says_what_to_try(lengths, times):
    optimizer, batch = optimizer_of(micro_batch_tokens=9), Rows(lengths)
    with pytest.raises(UserError, match="out of memory.*gradient_checkpointing=true.*resume=true"):
        optimizer.step(batch, loss_on(optimizer, before=failing(times)))


def test_another_error_of_the_closure_is_not_retried():
    optimizer, batch = optimizer_of(), Rows()
    with pytest.raises(RuntimeError, match="shape"):
        optimizer.step(batch, loss_on(optimizer, before=lambda indices: (_ for _ in ()).throw(RuntimeError("shape"))))
    assert batch.asked == [8]


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_steps_that_are_not_finite_change_nothing_are_said_and_end_the_run_after_three_in_a_row(factor):
    said = []
    optimizer, batch = optimizer_of(said=said), Rows()
    optimizer.step(batch, loss_on(optimizer))
    before = snapshot(optimizer.params, optimizer.inner)
    for _ in range(2):  # a good step in between: the count begins anew
        for n in (1, 2):
            seen = optimizer.step(batch, loss_on(optimizer, factor=factor))
            assert seen["optim/stepped"] == 0 and not math.isfinite(seen["optim/grad_norm"])
            assert f"{n} such in a row; 3 end the run" in said[-1]
            assert equal(before, snapshot(optimizer.params, optimizer.inner))
        optimizer.step(batch, loss_on(optimizer))
        before = snapshot(optimizer.params, optimizer.inner)
    assert optimizer.skipped == 4
    for _ in range(2):
        optimizer.step(batch, loss_on(optimizer, factor=factor))
    again = optimizer_of(params=optimizer.params)  # also when a resume lies between them
    again.load_state_dict(optimizer.state_dict())
    with pytest.raises(UserError, match="3 steps in a row.*lower lr"):
        again.step(batch, loss_on(again, factor=factor))
    assert equal(before[:3], [p.detach() for p in optimizer.params])


def test_a_step_without_a_batch_is_counted_only_when_its_samples_come_from_nan_logits():
    optimizer = optimizer_of(RLAIFConfig)
    assert optimizer.skip_step(finite=True) == {"optim/lr": 0.1, "optim/skipped": 0}
    assert optimizer.skip_step(finite=False)["optim/skipped"] == 1
    optimizer.skip_step(finite=False)
    with pytest.raises(UserError, match="3 steps in a row"):
        optimizer.skip_step(finite=False)


def test_an_overflow_of_the_fp16_loss_scale_is_halved_and_is_no_bad_step():
    params = [torch.nn.Parameter(torch.ones(4, 4))]
    half = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(1, dtype=torch.float16), requires_grad=False)])
    optimizer = Optimizer(SimpleNamespace(params=params, model=half), SFTConfig(), print)
    first = optimizer.scale.value

    def overflows(indices, micro):
        loss = params[0].sum()
        params[0].register_hook(lambda grad: grad * math.inf)
        return loss, {}
    for _ in range(4):
        assert optimizer.step(Rows([1]), overflows)["optim/stepped"] == 0
    assert optimizer.scale.value == first / 16 and optimizer.bad == 0


def test_an_fp16_loss_scale_of_1_grows_again_and_that_of_other_types_stays():
    for dtype, grown in ((torch.float16, 2.0), (torch.float32, 1.0)):
        scale = LossScale(torch.nn.Linear(1, 1, dtype=dtype))
        for stepped in [False] * 14 + [True] * 500:
            scale.update(stepped)
        assert scale.value == grown


def test_two_updates_of_a_rollout_are_rolled_back_together():
    optimizer, batch = optimizer_of(RLAIFConfig, updates_per_rollout=2), Rows()
    optimizer.step(batch, loss_on(optimizer))
    optimizer.commit()
    committed = snapshot(optimizer.params, optimizer.inner)
    for _ in range(2):
        optimizer.step(batch, loss_on(optimizer))
        assert not equal(committed, snapshot(optimizer.params, optimizer.inner))
    assert optimizer.roll_back() and equal(committed, snapshot(optimizer.params, optimizer.inner))
    single = optimizer_of()  # no weights are kept where one step follows a commit: then there is nothing to go back to
    single.commit()
    assert single.roll_back()
    single.step(batch, loss_on(single))
    assert not single.roll_back()


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_what_is_not_finite_is_never_saved(where):
    optimizer, batch = optimizer_of(), Rows()
    optimizer.step(batch, loss_on(optimizer))
    check_finite(optimizer.params, optimizer.inner)
    tensor = optimizer.params[1] if where == "weight" else optimizer.inner.state[optimizer.params[1]]["exp_avg"]
    with torch.no_grad():
        tensor[0, 0] = math.nan
    with pytest.raises(UserError, match="not saved"):
        check_finite(optimizer.params, optimizer.inner)
