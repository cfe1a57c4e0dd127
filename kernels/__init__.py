"""Fused linear loss and log-prob kernels for an LM head. Imports torch and triton only; works without triton.

from minimath.kernels import linear_cross_entropy, linear_logp, linear_token_loss
loss, stats = linear_token_loss(hidden, weight, target, lambda stats, rows: -stats.logp / n_trained)
"""

if __name__ == "kernels":
    # With the repository root on sys.path (`python -m ...` there) this folder passes for the package of Hugging
    # Face of that name, which transformers and bitsandbytes look for: hand over to it where it is installed, else
    # look like a folder without code, which transformers skips. Raising would stop its import.
    import os
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    here = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    elsewhere = [path for path in sys.path if os.path.realpath(path or ".") != here]
    spec = PathFinder.find_spec("kernels", elsewhere)
    if spec and spec.origin:
        sys.modules["kernels"] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules["kernels"])
    else:
        __file__ = None
else:
    from .head import TokenStats
    from .linear_cross_entropy import linear_cross_entropy
    from .linear_kl import linear_kl
    from .linear_logp import linear_logp
    from .linear_token_loss import linear_token_loss

    __all__ = ["TokenStats", "linear_cross_entropy", "linear_kl", "linear_logp", "linear_token_loss"]
