"""What fits into memory: sequences side by side in a rollout, from the bytes of their keys and values against what is
free; and tokens of a training step's forward pass, halved when memory runs out. What that taught is kept with the run.
"""
import dataclasses
from pathlib import Path

import torch

from minimath.core.errors import UserError
from minimath.models.load import base_causal_lm, head_module
from minimath.core.state import restore_rng, rng_state

MOST_SLOTS = {"cpu": 128, "cuda": 512}  # beyond, a step takes longer in proportion: nothing is gained
SHARE = {"cpu": 0.5, "cuda": 0.85}  # of the free memory that a rollout may take
MOST_HALVINGS = 3  # of micro_batch_tokens in a run: what does not fit in an eighth needs other settings
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
BEAR_ON_MEMORY = ("micro_batch_tokens", "slots", "model", "device", "dtype", "quant", "attn", "liger", "optimizer", "lora_r",
                  "gradient_checkpointing", "packing", "max_len", "max_new_tokens", "shared_prefix", "shard")


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: of the card, what torch holds unused included; of a CPU, also within the
    limit of its control group. 0 if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
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
    """Bytes of keys and values of one token in all layers."""
    config = base_causal_lm(model).config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * dim * base_causal_lm(model).dtype.itemsize


def slot_bytes(model, length: int) -> int:
    """Bytes of one slot: keys and values of `length` tokens, and the logits that its next token is sampled from
    (three fp32 rows of the vocabulary at the worst moment)."""
    return length * cache_bytes_per_token(model) + 12 * head_module(model).weight.shape[0]


def fitting_slots(model, length: int, wanted: int, free: int | None = None) -> int:
    """Sequences of up to `length` tokens to decode side by side: at least 1, at most `wanted`."""
    device = base_causal_lm(model).device
    free = free_bytes(device) if free is None else free
    most = min(wanted, MOST_SLOTS.get(device.type, 64))
    if not free:
        return most
    return max(1, min(most, int(free * SHARE.get(device.type, 0.5)) // slot_bytes(model, length)))


# ---- a training step in the memory there is

def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; a CPU's allocator says so in a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY))


def new_memory(cfg, before: dict | None = None) -> dict:
    """What a run has learned about its memory: micro_batch_tokens and slots (0: not known) to use, and how often
    micro_batch_tokens was halved. before: the state of a checkpoint, whose lessons hold while no option that bears on
    memory has changed."""
    now = dataclasses.asdict(cfg)
    if before and "memory" in before and all(before["config"].get(k) == now.get(k) for k in BEAR_ON_MEMORY):
        return before["memory"]
    return {"micro_batch_tokens": cfg.optimizer.micro_batch_tokens, "slots": getattr(cfg, "slots", 0), "halved": 0}


def in_memory(work, cfg, *args, memory: dict, params, lengths: list[int], say, **options):
    """work(cfg, *args, **options) with memory["micro_batch_tokens"]; when memory runs out, all of it again with half of them.

    The gradient of what was done is cleared and the random generators are set back, so the result is that of a step
    which began with fewer micro_batch_tokens: the same, as losses are divided by the tokens of the whole step. memory: of
    new_memory, changed in place for the steps to come. lengths: tokens of each row. Raises UserError, with the settings
    to try, after MOST_HALVINGS in a run, or when a single row does not fit.
    """
    generators = rng_state()
    while True:
        try:
            return work(cfg.replace(micro_batch_tokens=memory["micro_batch_tokens"]), *args, **options)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if cfg.model.shard:  # the others are in the midst of a pass that needs this process's weights
                tries = settings_to_try(cfg)
                raise UserError(f"out of memory, with shard=true: try {tries}, then resume=true") from error
        # only here, where the exception no longer holds the activations of the failed pass
        for param in params:
            param.grad = None
        restore_rng(*generators)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        halve_micro_tokens(cfg, memory, lengths, say)


def halve_micro_tokens(cfg, memory: dict, lengths: list[int], say) -> None:
    most = min(memory["micro_batch_tokens"], sum(lengths))  # a pass that held the whole step held no more than its tokens
    if memory["halved"] >= MOST_HALVINGS or most <= max(lengths):
        tried = f"{memory['halved']} halvings of micro_batch_tokens" if memory["halved"] else "no halving of micro_batch_tokens"
        raise UserError(f"out of memory: {tried} made a step fit (now {memory['micro_batch_tokens']}; the longest of its "
                        f"rows has {max(lengths)} tokens). Try {settings_to_try(cfg)}, then resume=true")
    memory["micro_batch_tokens"], memory["halved"] = most // 2, memory["halved"] + 1
    say(f"out of memory with {most} tokens in a forward pass: going on with micro_batch_tokens={most // 2}, which gives the "
        "same gradient in smaller pieces")


def settings_to_try(cfg) -> str:
    """The options that make a training step smaller and are not used yet, the cheapest first."""
    tries = [] if cfg.optimizer.gradient_checkpointing else ["gradient_checkpointing=true"]
    tries += ["attn=sdpa"] if cfg.model.attn == "eager" else []
    tries += ["quant=nf4"] if cfg.model.quant == "none" else []
    longest = "max_len" if hasattr(cfg, "max_len") else "max_new_tokens"
    tries += [f"a lower {longest} (now {getattr(cfg, longest)})", f"a lower micro_batch_tokens (now {cfg.optimizer.micro_batch_tokens})"]
    return ", ".join(tries) + ", or a smaller model"


def learning_slots(sample, cfg, memory: dict):
    """sample of engines.open_engine(cfg, ...), whose later calls begin with the slots that an earlier one came down to
    when memory ran out. cfg: the engine's own copy of the options; memory: of new_memory; both changed in place."""
    def learning(*args, facts: dict, **options):
        completions = sample(*args, facts=facts, **options)
        if facts.get("halved"):
            cfg.engine.max_num_seqs = memory["slots"] = facts["slots"]
        return completions
    return learning
