"""Fused linear loss and log-prob kernels for an LM head. Imports torch and triton only; works without triton.

    from minimath.kernels import linear_logp, linear_token_loss, TokenStats
    loss, stats = linear_token_loss(hidden, weight, target, lambda s, rows: -s.logp / n_trained)
"""
from .common import TokenStats
from .linear_logp import linear_logp
from .linear_token_loss import linear_token_loss

__all__ = ["TokenStats", "linear_logp", "linear_token_loss"]
