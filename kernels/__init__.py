"""Fused linear loss and log-prob kernels for an LM head. Imports torch and triton only; works without triton.

from minimath.kernels import linear_logp, linear_token_loss
loss, stats = linear_token_loss(hidden, weight, target, lambda stats, rows: -stats.logp / n_trained)
"""

if __name__ == "kernels":
    # With the repository root on sys.path this folder would pass for Hugging Face's package of that name,
    # which transformers and bitsandbytes look for.
    raise ImportError("this folder is minimath.kernels, not the package `kernels`")

from .common import TokenStats
from .linear_logp import linear_logp
from .linear_token_loss import linear_token_loss

__all__ = ["TokenStats", "linear_logp", "linear_token_loss"]
