"""What fits into memory: sequences side by side, from the bytes of their keys and values against what is free."""
from pathlib import Path

import torch

from minimath.models.forward import base_causal_lm, head_module

MOST_SLOTS = {"cpu": 128, "cuda": 512}  # beyond, a step takes longer in proportion: nothing is gained
SHARE = {"cpu": 0.5, "cuda": 0.85}  # of the free memory that a rollout may take
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out; a CPU's allocator says so in a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY))


def free_bytes(device: torch.device) -> int:
    """Count the bytes that can still be allocated, also by a control group; 0 if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by torch, unused
    if device.type != "cpu":
        return 0
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in ("memory.max", "memory.current"))
        return free if limit == "max" else min(free, int(limit) - int(used))
    except (OSError, ValueError):
        return free


def cache_bytes_per_token(model) -> int:
    """Count the bytes of keys and values of one token in all layers."""
    config = base_causal_lm(model).config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * dim * base_causal_lm(model).dtype.itemsize


def slot_bytes(model, length: int) -> int:
    """Count the bytes of one sequence: keys and values, and three fp32 rows of logits."""
    return length * cache_bytes_per_token(model) + 12 * head_module(model).weight.shape[0]


def fitting_slots(model, length: int, wanted: int, free: int | None = None) -> int:
    """Find how many sequences of `length` tokens decode side by side: from 1 to `wanted`."""
    device = base_causal_lm(model).device
    free = free_bytes(device) if free is None else free
    most = min(wanted, MOST_SLOTS.get(device.type, 64))
    fits = int(free * SHARE.get(device.type, 0.5)) // slot_bytes(model, length) if free else most
    return max(1, min(most, fits))
