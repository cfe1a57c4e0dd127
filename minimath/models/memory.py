"""What a sequence keeps in memory, and how many fit side by side.

Models with convolution or recurrent state keep that beside keys and values, or in place of them. A token changes the
state of what comes after it, and no mask tells it whose row it is: rows never share a sequence there."""
import inspect
import weakref
from pathlib import Path

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from minimath.models import forward

ATTEND = {"full_attention", "sliding_attention"}  # kinds of layers: keys and values alone
STATE = {"conv", "linear_attention", "hybrid"}  # hybrid: state, and keys and values
NEITHER = {"moe", "mlp"}
MOST_SLOTS = {"cpu": 128, "cuda": 512}  # beyond, a step takes longer in proportion: nothing is gained
EXPECTED = 0.5  # of the tokens that rows may sample, held at a time, before any were seen: all grow to the limit
KEEP = 0.8  # of the free memory that may be needed where a rollout's buffers stay
SHARE = {"cpu": 0.5, "cuda": 0.85}  # of the free memory that a rollout may take
CGROUP = Path("/sys/fs/cgroup")  # of a container
KEEPERS = weakref.WeakSet()  # what holds memory for its next use, and gives it back by close()
_BYTES = weakref.WeakKeyDictionary()  # of a model's state


def has_state(model) -> bool:
    """Tell whether layers keep state that stands in transformers' cache."""
    return not STATE.isdisjoint(forward.layer_kinds(model))


def keeps_state(model) -> bool:
    """Tell whether tokens reach those behind them other than through attention."""
    return has_state(model) or bool(getattr(forward.base_causal_lm(model), "_is_stateful", False))


def cache_argument(model) -> str:
    """Name the decoder's argument for the cache."""
    taken = inspect.signature(forward.base_causal_lm(model).base_model.forward).parameters
    return "cache_params" if "cache_params" in taken else "past_key_values"


def fresh_cache(model) -> DynamicCache:
    """Make an empty cache for a prefill; layers with a window keep the full length in it."""
    if not has_state(model):
        return DynamicCache()  # without a config: full length in every layer
    cache = DynamicCache(config=forward.base_causal_lm(model).config)
    cache.layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers]
    return cache


def states_of(layer) -> list[torch.Tensor]:
    """List the tensors (B, ...) of a layer's convolution and recurrent state."""
    if not isinstance(layer, LinearAttentionLayer):
        return []
    return [each for kept in (layer.conv_states, layer.recurrent_states) for each in kept.values() if each is not None]


def state_bytes(model) -> int:
    """Count the bytes of one sequence's state in all layers, as one token leaves it.

    Works on the meta device too. 0 for a model without, and for one whose state has no place in transformers' cache."""
    base = forward.base_causal_lm(model)
    if not has_state(model):
        return 0
    if base not in _BYTES:
        cache, ids = fresh_cache(model), torch.zeros(1, 1, dtype=torch.long, device=base.device)
        # autocast knows no meta device, and peft asks for it around experts
        cast = forward.adapter_off if base.device.type == "meta" else forward.compute_dtype
        with forward.inference(model), cast(model):
            base.base_model(input_ids=ids, use_cache=True, **{cache_argument(model): cache})
        _BYTES[base] = sum(each.nbytes for layer in cache.layers for each in states_of(layer))
    return _BYTES[base]


def give_back() -> None:
    """Free what is held for later; call it when memory ran out and the traceback is gone."""
    for keeper in list(KEEPERS):
        keeper.close()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        # what files were read is counted as used, and gives way
        return free if limit == "max" else min(free, int(limit) - int(used) + int(counts["inactive_file"]))
    except (OSError, ValueError, KeyError):
        return free


def cache_bytes_per_token(model) -> int:
    """Count the bytes of keys and values of one token in all layers that attend."""
    config, kinds = forward.text_config(model), forward.layer_kinds(model)
    attend = sum(kind not in (STATE | NEITHER) - {"hybrid"} for kind in kinds) if kinds else config.num_hidden_layers
    if not attend:
        return 0
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * attend * heads * dim * forward.base_causal_lm(model).dtype.itemsize


def sampling_bytes(vocab: int, how, device: str) -> int:
    """Count the bytes that choosing a token takes of one row: fp32 rows of the vocabulary.

    how: rollout.sampling.Sampling. A whole softmax takes 3: logits, their padding, probabilities; to cut it by top-k or
    min-p 4, as the logits are kept; by top-p 7, for it sorts values and int64 places, and 3 more to sort on a card."""
    rows = (10 if device == "cuda" else 7) if how.top_p < 1 else 3 if how.full() else 4
    return 4 * rows * vocab


def fitting_rows(model, longest: int, expected: int, wanted: int, how, *, asked: int = 0, free: int | None = None,
                 held: int = 0) -> tuple[int, int]:
    """Find how many sequences decode side by side, from 1 to `wanted`, and the places of the pool for their tokens.

    longest, expected: places that a row takes at most, and at a time (its prompt, a share of its tokens). asked: how
    many, whatever memory there is. The pool holds all at full length where there is room, at least one. free: bytes,
    else what the device has. held: bytes that the last rollout's cache holds, for this one."""
    device = forward.base_causal_lm(model).device
    free = free_bytes(device) if free is None else free
    most = min(wanted, asked or MOST_SLOTS.get(device.type, 64))
    if not free:
        return most, most * longest
    room, token = int((free + held) * SHARE.get(device.type, 0.5)), cache_bytes_per_token(model)
    each = state_bytes(model) + sampling_bytes(forward.head_module(model).weight.shape[0], how, device.type)
    rows = most if asked else max(1, min(most, room // (each + expected * token)))
    places = (room - rows * each) // token if token else rows * longest
    return rows, max(longest, min(places, rows * longest))


def has_room_beside(device: torch.device, held: int, recorded: int) -> bool:
    """Tell whether a rollout's `held` bytes can stay while the model trains; on a CPU they are given back.

    So if the most that the process ever had allocated beyond what it has now without them fits into what is free now,
    with a fifth to spare. recorded: bytes in the memory of CUDA graphs, which is free to nobody else."""
    if device.type != "cuda":
        return False
    needed = torch.cuda.max_memory_allocated(device) - (torch.cuda.memory_allocated(device) - held)
    return needed <= KEEP * (free_bytes(device) - recorded)
