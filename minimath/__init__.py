"""minimath: SFT, then RLAIF, for mathematical language models on one GPU.

    from minimath import SFTConfig, RLAIFConfig, EvalConfig, sft, rlaif, evaluate

Names are loaded when they are asked for: importing minimath alone imports no torch.
"""
import importlib
import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # notes at its import on what no option here uses
_HOME = {"SFTConfig": "config.schema", "RLAIFConfig": "config.schema", "EvalConfig": "config.schema",
         "sft": "train.sft", "rlaif": "train.rlaif", "evaluate": "eval.evaluate"}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
