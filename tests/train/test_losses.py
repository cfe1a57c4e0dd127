"""Losses: values against a few lines of numpy, gradients against what the formulas say by hand."""

import numpy as np
import pytest
import torch

from minimath.config.schema import LossOptions, RLAIFConfig
from minimath.kernels import TokenStats, linear_token_loss
from minimath.train.losses import PolicyRows, clip_hint, nll_loss, policy_loss, token_weights

TYPES = ("dapo", "grpo", "dr_grpo", "cispo", "gspo")
LENGTHS = [5, 3, 7]


def make_rows(seed=0, drift=0.5):
    """(logp (N,) with grad, entropy, PolicyRows) of three completions; ratios spread beyond the clips."""
    rng = np.random.default_rng(seed)
    n = sum(LENGTHS)
    logp = -rng.uniform(0.1, 3, n)
    old, ref, sampled = logp + drift * rng.normal(size=n), logp + 0.4 * rng.normal(size=n), None
    sampled = old + 0.5 * rng.normal(size=n)
    sequence = np.repeat([part.mean() for part in np.split(logp - old, np.cumsum(LENGTHS)[:-1])], LENGTHS)
    advantage = np.repeat([1.3, -0.8, 0.4], LENGTHS)
    weight = rng.uniform(0.01, 0.1, n)
    to = lambda x: torch.tensor(x, dtype=torch.float32)
    rows = PolicyRows(to(advantage), to(weight), to(sampled), to(old), to(ref), to(sequence))
    return to(logp).requires_grad_(), to(rng.uniform(0.5, 2, n)), rows


def evaluate(logp, entropy, rows, **options):
    """(per-token losses, gradient in logp) of the rows taken in two chunks, as the kernel would."""
    loss_fn = policy_loss(rows, LossOptions(**options))
    parts = []
    for chunk in torch.arange(len(logp)).split(6):
        zeros = torch.zeros(len(chunk))
        parts.append(loss_fn(TokenStats(logp[chunk], entropy[chunk], zeros, zeros), chunk))
    losses = torch.cat(parts)
    (gradient,) = torch.autograd.grad(losses.sum(), logp)
    return losses.detach().numpy(), gradient.numpy()


def numpy_loss(loss, logp, entropy, rows, *, low, high, kl_coef, entropy_coef, cap):
    """The per-token loss, written from the papers, with the clip in PPO's case form."""
    a, w, sampled, old, ref, seq = (np.asarray(x, dtype=np.float64) for x in rows)
    ratio = np.exp(seq) if loss == "gspo" else np.exp(logp - old)
    if loss == "cispo":
        gain = np.where(ratio > 1 + high, 1 + high, ratio) * a * logp
    else:
        gain = np.where(a > 0, np.where(ratio > 1 + high, 1 + high, ratio) * a,
                        np.where(ratio < 1 - low, 1 - low, ratio) * a)
    iw = np.exp(old - sampled)
    iw = np.where(iw > cap, cap, iw) if cap else np.ones_like(iw)
    k3 = np.exp(ref - logp) - (ref - logp) - 1
    return w * (-iw * gain + kl_coef * iw * np.exp(logp - old) * k3 - entropy_coef * entropy)


@pytest.mark.parametrize("loss", TYPES)
@pytest.mark.parametrize("cap", [0.0, 1.5])
def test_policy_loss_equals_numpy(loss, cap):
    logp, entropy, rows = make_rows()
    shared = {"kl_coef": 0.1, "entropy_coef": 0.02}
    ours, _ = evaluate(logp, entropy, rows, name=loss, importance_cap=cap, clip_low=0.2, **shared)
    now = logp.detach().numpy().astype(np.float64)
    wanted = numpy_loss(loss, now, entropy.numpy(), rows, low=0.2, high=0.28, cap=cap, **shared)
    np.testing.assert_allclose(ours, wanted, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("loss", TYPES)
def test_on_policy_gradient_is_reinforce(loss):
    """With the policy that sampled, d loss / d logp = -A w at every token, whatever the loss type and clips."""
    logp, entropy, rows = make_rows()
    rows = rows._replace(old_logp=None, seq_log_ratio=None, sampled_logp=logp.detach())
    _, gradient = evaluate(logp, entropy, rows, name=loss, clip_low=0.0, clip_high=0.01)
    np.testing.assert_allclose(gradient, (-rows.advantage * rows.weight).numpy(), rtol=1e-5)


def one_token(ratio, advantage, **options):
    """d loss / d logp of one token with weight 1 and the given ratio to the old policy."""
    logp = torch.tensor([-1.0], requires_grad=True)
    old = logp.detach() - np.log(ratio)
    rows = PolicyRows(
        torch.tensor([advantage]), torch.ones(1), old, old, None, torch.full((1,), float(np.log(ratio)))
    )
    return float(evaluate(logp, torch.zeros(1), rows, clip_low=0.2, clip_high=0.28, **options)[1][0])


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo", "gspo"])
def test_clip_stops_the_gradient_only_where_the_policy_already_moved(loss):
    assert one_token(1.3, 1.0, name=loss) == 0  # better and already above 1.28
    assert one_token(0.7, -1.0, name=loss) == 0  # worse and already below 0.8
    assert one_token(1.3, -1.0, name=loss) == pytest.approx(1.3, rel=1e-5)
    assert one_token(0.7, 1.0, name=loss) == pytest.approx(-0.7, rel=1e-5)
    assert one_token(1.25, 1.0, name=loss) == pytest.approx(
        -1.25, rel=1e-5
    )  # clip-higher: inside
    assert one_token(0.78, -1.0, name=loss) == 0  # the bounds are not symmetric


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    assert one_token(3.0, 1.0, name="cispo") == pytest.approx(-1.28, rel=1e-5)
    assert one_token(0.1, -1.0, name="cispo") == pytest.approx(0.1, rel=1e-5)


def test_gspo_weighs_all_tokens_of_a_completion_by_one_ratio():
    logp, entropy, rows = make_rows(drift=0.1)
    _, gradient = evaluate(
        logp, entropy, rows, name="gspo", clip_low=0.9, clip_high=9.0, importance_cap=0
    )
    shares = gradient / (-rows.advantage * rows.weight).numpy()
    for part, old, new in zip(
        *(
            np.split(x, np.cumsum(LENGTHS)[:-1])
            for x in (shares, rows.old_logp.numpy(), logp.detach().numpy())
        ),
        strict=True,
    ):
        np.testing.assert_allclose(part, np.exp((new - old).mean()), rtol=1e-5)


def expected_kl_gradient(logits, old, ref):
    """(value, gradient in logits) of the loss at kl_coef = 1, in expectation over the old policy's tokens."""
    logits = torch.tensor(logits, requires_grad=True)
    logp, n = torch.log_softmax(logits, -1), len(logits)
    old, ref = torch.tensor(old, dtype=torch.float32), torch.tensor(ref, dtype=torch.float32)
    rows = PolicyRows(torch.zeros(n), old.exp(), old, old, ref)
    zeros = torch.zeros(n)
    loss_fn = policy_loss(rows, LossOptions(kl_coef=1.0))
    loss = loss_fn(TokenStats(logp, zeros, zeros, zeros), torch.arange(n)).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.item(), gradient.numpy()


@pytest.mark.parametrize("on_policy", [True, False])
def test_the_kl_has_the_value_and_the_gradient_of_the_kl(on_policy):
    """Against KL and its gradient p (log p/ref - KL) from whole distributions."""
    rng = np.random.default_rng(1)
    log_softmax = lambda x: x - np.log(np.exp(x).sum())
    x = rng.normal(size=6).astype(np.float32)
    logp, ref = log_softmax(x.astype(np.float64)), log_softmax(rng.normal(size=6))
    old = logp if on_policy else log_softmax(x + 0.5 * rng.normal(size=6))
    p, divergence = np.exp(logp), (np.exp(logp) * (logp - ref)).sum()
    value, gradient = expected_kl_gradient(x, old, ref)
    assert value == pytest.approx(divergence, rel=1e-4)
    np.testing.assert_allclose(gradient, p * (logp - ref - divergence), rtol=1e-3, atol=1e-5)


def test_a_clip_that_cannot_bite_on_sequence_ratios_is_told():
    def hint(**options):
        return clip_hint(RLAIFConfig(**options))

    assert "clip_low=0.0003 clip_high=0.0004" in hint(loss="gspo", updates_per_rollout=2)
    assert not hint(loss="gspo") and not hint(updates_per_rollout=2)  # on-policy nothing is ever clipped
    assert not hint(loss="gspo", updates_per_rollout=2, clip_low=3e-4, clip_high=4e-4)


def test_importance_weight_is_truncated_and_carries_no_gradient():
    logp = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    sampled = torch.tensor([-1.5, -4.0, 0.0]) - 0.0  # weights e^0.5, e^3 cut to 2, e^-1
    rows = PolicyRows(torch.ones(3), torch.ones(3), sampled)
    _, gradient = evaluate(logp, torch.zeros(3), rows, importance_cap=2.0)
    np.testing.assert_allclose(gradient, [-np.exp(0.5), -2.0, -np.exp(-1.0)], rtol=1e-5)
    _, off = evaluate(logp, torch.zeros(3), rows, importance_cap=0)
    np.testing.assert_allclose(off, [-1, -1, -1], rtol=1e-6)


def test_entropy_bonus_lowers_the_loss():
    logp, entropy, rows = make_rows()
    with_bonus, _ = evaluate(logp, entropy, rows, entropy_coef=0.5)
    without, _ = evaluate(logp, entropy, rows)
    np.testing.assert_allclose(without - with_bonus, 0.5 * (entropy * rows.weight).numpy(), rtol=1e-4)


def test_token_weights():
    assert token_weights("dapo", [2, 6, 0], 10) == token_weights("cispo", [2, 6, 0], 10) == [1 / 8] * 3
    for name in ("grpo", "gspo"):
        assert token_weights(name, [2, 6, 0], 10)[:2] == [
            1 / (2 * 2),
            1 / (2 * 6),
        ]  # completions weigh the same
    assert token_weights("dr_grpo", [2, 6, 0], 10) == [1 / (2 * 10)] * 3  # does not depend on the lengths
    with pytest.raises(ValueError, match="ppo"):
        token_weights("ppo", [1], 1)


def test_nll_equals_cross_entropy():
    torch.manual_seed(0)
    hidden = torch.randn(23, 16, requires_grad=True)
    weight, target = torch.randn(101, 16), torch.randint(0, 101, (23,))
    target[::3] = -100
    kept = int((target != -100).sum())
    loss, _ = linear_token_loss(hidden, weight, target, nll_loss(kept))
    (gradient,) = torch.autograd.grad(loss, hidden)
    wanted = torch.nn.functional.cross_entropy(hidden @ weight.T, target)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, hidden)[0], rtol=1e-4, atol=1e-6)
