"""Segments of a card's memory that grow, in place of new ones beside those that are too small.

Batches of many sizes leave torch's allocator with blocks that fit nothing: memory runs out though much is free. Torch
reads the setting when it first uses a card. It warns where it has no such segments (ROCm, Windows); under WSL some
drivers fail at them, and torch does not test them on Jetson: there nothing is set."""
import importlib.util
import os
import runpy
import sys
from pathlib import Path

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
GROWING = "expandable_segments:True"
NOT_THERE = ("microsoft", "tegra")  # in the kernel's release: WSL, Jetson


def grow_segments() -> None:
    """Ask for growing segments on an NVIDIA card, before torch is imported.

    Who sets one of NAMES decides. Its first one is read since torch 2.9, which warns of the second."""
    if sys.platform != "linux" or any(word in os.uname().release.lower() for word in NOT_THERE) or \
            any(name in os.environ for name in NAMES):
        return
    build = torch_build()
    if build.get("cuda"):
        major, minor = map(int, build["__version__"].split(".")[:2])
        os.environ[NAMES[0] if (major, minor) >= (2, 9) else NAMES[1]] = GROWING


def fix_segments() -> None:
    """Take it back from here on, for vLLM: its memory pool takes no growing segments (pytorch #147851)."""
    import torch
    if growing := [name for name in NAMES if os.environ.get(name) == GROWING]:
        for name in growing:
            del os.environ[name]
        if torch.cuda.is_available():
            torch.cuda.memory._set_allocator_settings("expandable_segments:False")


def torch_build() -> dict:
    """Read the versions that torch was built with, without importing it; {} without torch."""
    spec = importlib.util.find_spec("torch")
    return runpy.run_path(str(Path(spec.origin).with_name("version.py"))) if spec else {}
