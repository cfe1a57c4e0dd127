"""Optimisers: names, schedule shapes, clipping, and steps that a non-finite gradient leaves without
effect."""
import math
import sys

import pytest
import torch

from minimath.config.schema import SFTConfig
from minimath.core.errors import UserError
from minimath.train.optimizer import clip_and_step, count_bad_steps, lr_at, make_optimizer

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
    optimizer = make_optimizer(params, SFTConfig(optimizer=name))
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
    optimizer = make_optimizer(params, SFTConfig(optimizer=name))
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
    optimizer = make_optimizer(params, SFTConfig(weight_decay=0.5))
    before = snapshot(params, optimizer)
    assert clip_and_step(optimizer, params, 1.0, 0.1) == (0.0, False)
    assert equal(before, snapshot(params, optimizer))


def test_weight_decay_is_for_matrices_only():
    params = make_params()
    before = [p.detach().clone() for p in params]
    optimizer = make_optimizer(params, SFTConfig(weight_decay=0.5))
    for p in params:
        p.grad = torch.zeros_like(p)
    clip_and_step(optimizer, params, 1.0, 0.1)
    torch.testing.assert_close(params[0].detach(), before[0] * 0.95)
    assert torch.equal(params[2], before[2])


def test_frozen_parameters_are_left_out_and_none_at_all_is_an_error():
    params = make_params()
    params[0].requires_grad_(False)
    optimizer = make_optimizer(params, SFTConfig())
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    with pytest.raises(UserError, match="nothing to train"):
        make_optimizer(params[:1], SFTConfig())


@pytest.mark.parametrize("name", NAMES[1:])
def test_missing_bitsandbytes_names_the_optimizer_to_use(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="optimizer=adamw, or: pip install bitsandbytes"):
        make_optimizer(make_params(), SFTConfig(optimizer=name))


def schedule(name, steps, **changes):
    options = {"lr": 1.0, "schedule": name, "warmup": 0.0, "min_lr_ratio": 0.0} | changes
    return [lr_at(step, steps, **options) for step in range(steps)]


def test_schedules_have_the_stated_shapes():
    assert schedule("constant", 4) == [1.0] * 4
    assert schedule("linear", 4) == [1.0, 0.75, 0.5, 0.25]
    assert schedule("cosine", 4)[::2] == pytest.approx([1.0, 0.5])
    assert schedule("linear", 4, min_lr_ratio=0.5) == [1.0, 0.875, 0.75, 0.625]
    assert lr_at(400, 4, lr=1.0, schedule="cosine", warmup=0, min_lr_ratio=0.1) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="cosin"):
        schedule("cosin", 4)


def test_warmup_is_a_share_below_one_and_a_count_from_one():
    assert schedule("constant", 10, warmup=0.2) == schedule("constant", 10, warmup=2) == [0.5] + [1.0] * 9
    assert schedule("constant", 100, warmup=0.07)[5:8] == pytest.approx([6 / 7, 1.0, 1.0])
    assert schedule("cosine", 3, warmup=50) == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert schedule("cosine", 1, warmup=0.03) == [1.0]


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_no_step_runs_at_rate_zero(name):
    for steps in (1, 2, 7, 100):
        assert min(schedule(name, steps, warmup=0.1)) > 0


def test_three_non_finite_steps_in_a_row_stop_the_run():
    streak = count_bad_steps(count_bad_steps(0, math.nan), math.inf)
    assert streak == 2 and count_bad_steps(streak, 1.0) == 0
    with pytest.raises(UserError, match="lower lr"):
        count_bad_steps(streak, math.nan)
