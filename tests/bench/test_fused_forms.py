"""The two fully fused forms of bench/fused_kernels.py: right under Triton's interpreter, compiled for a chip.

The interpreter must be switched on before triton is imported and replaces every kernel of the process, so the
first test here runs this file once more in a process of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRET, reason="run by test_both_forms_under_the_interpreter")
compiled = pytest.mark.skipif(INTERPRET, reason="the interpreter replaces the compiler")
HERE = Path(__file__).parent
# (rows, hidden size, vocabulary): several ragged blocks along every axis; one row and fewer columns than a
# block; multiples of everything, which takes the unmasked loads
SHAPES = [(37, 45, 203), (1, 19, 7), (32, 64, 96)]
TILE = {"BLOCK_N": 16, "BLOCK_V": 32, "BLOCK_D": 16}
SCALE = 1.7


@compiled
def test_both_forms_under_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        cwd=HERE.parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed.group(1)) == 22, done.stdout[-8000:]


@compiled
def test_on_a_small_chip_the_online_form_holds_its_operands_at_1536_and_not_at_2048():
    """Part of what the choice of the workspace form rests on; `python -m bench.fused_forms` has all of it."""
    from bench.fused_forms import CHOSEN, CHOSEN_SMALL, NAMES, fused_cases, measure

    names = {case.variant for case in fused_cases("sm_86")}
    assert names == {"any D", "D=576 hold", "D=896 hold", "D=1536 hold", "D=2048 stream"}

    def row(width, values):
        return measure("online", "sm_86", width, dict(zip(("HOLD", *NAMES), values)))

    assert row(1536, CHOSEN_SMALL[1536])["fits"]
    held = row(2048, CHOSEN[2048])  # 16 rows and 16 columns are the least that a tensor core takes
    assert held["shared"] > held["shared_limit"] and not held["fits"]
    assert row(2048, CHOSEN_SMALL[2048])["fits"]


def problem(rows, width, vocab, spread=1.0):
    """hidden, weight, target, coef in fp32, and the float64 reference's (lse, logp, gradient in hidden).

    Also asserts that the first and the last column are some row's target, where more than one row is given.
    """
    from minimath.kernels import reference

    torch.manual_seed(rows * width + vocab)
    hidden, weight = torch.randn(rows, width) * spread, torch.randn(vocab, width)
    target = torch.randint(vocab, (rows,))
    target[0] = vocab - 1
    target[-1] = vocab - 1 if rows == 1 else 0
    coef = torch.randn(rows)
    coef[rows // 2] *= 100.0  # rows differ in size
    exact = hidden.double().requires_grad_()
    stats = reference.linear_logp(exact, weight.double(), target, temperature=1 / SCALE, return_stats=True)
    (gradient,) = torch.autograd.grad((stats.logp * coef.double()).sum(), exact)
    return hidden, weight, target, coef, stats.lse.detach(), stats.logp.detach(), gradient


def close(got, want, relative):
    """Row by row, so that a row with a large coefficient can't hide the error of another."""
    error, size = (got.double() - want).norm(dim=1), want.norm(dim=1)
    assert (error <= relative * size + 1e-7).all(), (error / size).max()


@interpreted
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_recomputed_tiles_give_the_reference_gradient(shape, splits):
    from bench.fused_kernels import recompute_gradient

    hidden, weight, target, coef, lse, _, want = problem(*shape)
    got = recompute_gradient(
        hidden, weight, target, lse.float(), coef, scale=SCALE, splits=splits, config=TILE
    )
    close(got, want, 2e-5)


@interpreted
@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_online_sweep_gives_the_reference_statistics_and_gradient(shape, splits, hold):
    from bench.fused_kernels import online_gradient, online_sweep

    hidden, weight, target, coef, lse, logp, want = problem(*shape)
    config = TILE | {"HOLD": hold}
    got_lse, got_target, mean = online_sweep(
        hidden, weight, target, scale=SCALE, splits=splits, config=config
    )
    torch.testing.assert_close(got_lse.double(), lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((got_target - got_lse).double(), logp, rtol=1e-5, atol=2e-5)
    close(online_gradient(weight, target, coef, mean, scale=SCALE), want, 2e-5)


@interpreted
@pytest.mark.parametrize("hold", [False, True])
def test_the_running_maximum_survives_logits_that_overflow_exp(hold):
    """Logits up to several hundred that grow along the vocabulary: every tile rescales the sums before it."""
    from bench.fused_kernels import online_gradient, online_sweep

    hidden, weight, target, coef, lse, logp, want = problem(18, 23, 130, spread=30.0)
    assert lse.max() > 200
    order = (weight @ hidden.mean(0)).argsort()
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    got_lse, got_target, mean = online_sweep(
        hidden, weight[order], back[target], scale=SCALE, config=TILE | {"HOLD": hold}
    )
    torch.testing.assert_close(got_lse.double(), lse, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close((got_target - got_lse).double(), logp, rtol=1e-5, atol=1e-4)
    got = online_gradient(weight[order], back[target], coef, mean, scale=SCALE).double()
    assert (got - want).norm() <= 1e-4 * want.norm()


@interpreted
def test_strided_operands_are_read_right_and_the_same_input_gives_the_same_bits():
    from bench.fused_kernels import online_sweep, recompute_gradient

    hidden, weight, target, coef, lse, *_ = problem(37, 45, 203)
    padded = [torch.full((len(each), 64), torch.nan) for each in (hidden, weight)]
    for wide, each in zip(padded, (hidden, weight)):
        wide[:, :45] = each
    sliced = [wide[:, :45] for wide in padded]
    options = {"scale": SCALE, "splits": 2, "config": TILE}
    once = recompute_gradient(hidden, weight, target, lse.float(), coef, **options)
    assert torch.equal(once, recompute_gradient(*sliced, target, lse.float(), coef, **options))
    options["config"] = TILE | {"HOLD": True}
    for one, other in zip(
        online_sweep(hidden, weight, target, **options), online_sweep(*sliced, target, **options)
    ):
        assert torch.equal(one, other)


@interpreted
def test_the_reference_check_can_fail():
    """A gradient that forgets the target, or takes a row's coefficient from its neighbour, is not close."""
    hidden, weight, target, coef, lse, _, want = problem(37, 45, 203)
    probs = (SCALE * hidden.double() @ weight.double().t() - lse[:, None]).exp()
    right = (coef.double() * SCALE)[:, None] * (weight.double()[target] - probs @ weight.double())
    close(right, want, 1e-12)
    wrong = (coef.double() * SCALE)[:, None] * (-probs @ weight.double())
    for bad in (wrong, right.roll(1, 0), right * (1 + 1e-3)):
        with pytest.raises(AssertionError):
            close(bad, want, 2e-5)
