"""Gradients at sure targets in 16 bits: p - 1 of a rounded p is lost (a peer of ours lost 20% and all of it)."""
import math

import pytest
import torch

from minimath.kernels import linear_logp, linear_token_loss, reference

N, D, V = 16, 64, 301


def sure(p: float, dtype, seed: int):
    """hidden (N, D), weight (V, D) in dtype, target (N,): each target has a probability near p."""
    draw = torch.Generator().manual_seed(seed)
    weight = (0.3 * torch.randn(V, D, generator=draw)).to(dtype).double()
    hidden = torch.randn(N, D, generator=draw).double()
    target = torch.randint(0, V, (N,), generator=draw)
    wanted = math.log(p) - math.log1p(-p)  # of the target's logit above the log-sum-exp of the others
    for _ in range(60):
        logits = hidden @ weight.T
        own = logits.gather(1, target[:, None])
        others = logits.scatter(1, target[:, None], -math.inf).logsumexp(1, keepdim=True)
        hidden += 0.3 * (wanted - (own - others)) * weight[target] / weight[target].square().sum(1, keepdim=True)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target


def nll(stats, rows):
    return -stats.logp


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("function", ["linear_token_loss", "linear_logp"])
def test_the_gradient_of_a_sure_target_is_within_torchs_own_error(function, p, dtype):
    """Against float64 on the same rounded inputs, beside logits in dtype with a log-softmax in fp32."""
    errors = []
    for seed in range(6):
        hidden, weight, target = sure(p, dtype, seed)
        exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]
        want_loss, stats = reference.linear_token_loss(*exact, target, nll)
        assert abs(stats.logp.exp().mean() - p) < 0.3 * (1 - p)  # rounding the states moves it a little
        theirs = -torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, target[:, None]).sum()
        ours = linear_token_loss(hidden, weight, target, nll)[0] if function == "linear_token_loss" else \
            -linear_logp(hidden, weight, target).sum()
        want, torchs, own = (torch.autograd.grad(loss, inputs) for loss, inputs in
                             ((want_loss, exact), (theirs, (hidden, weight)), (ours, (hidden, weight))))
        errors.append([[float((got.double() - w).norm() / w.norm()) for got, w in zip(each, want)]
                       for each in (own, torchs)])
    mine, other = torch.tensor(errors).mean(0)  # (2,): of hidden and weight
    assert (mine <= 1.1 * other + 1e-3).all(), (mine, other)
