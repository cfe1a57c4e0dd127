"""Bytes that each stage of a recipe needs, the largest setting that a card holds, and what to change so that one does.
"""
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from minimath.plan import footprint
from minimath.config.load import RECIPES
from minimath.config.schema import RLAIFConfig, SFTConfig
from minimath.core.errors import UserError
from minimath.core.text import did_you_mean
from minimath.rollout.decode import PREFILL_TOKENS
from minimath.plan.footprint import Live, Passes, Shape
from minimath.models.memory import cache_bytes_per_token, fitting_slots
from minimath.models.load import DTYPES, head_module
from minimath.rollout.sampling import Sampling, sample_tokens
from minimath.rollout.kv_cache import ALIGN

GIB = 1 << 30
CONTEXT = GIB // 2  # CUDA's context, cuBLAS's workspace and kernels, outside torch's allocator: an assumption
FRAGMENTATION = 0.06  # of what torch allocates, lost between its blocks: an assumption
UNIT = 256  # micro_batch_tokens and lengths that are proposed are multiples of it
MOST_TOKENS = 1 << 17
PROBES = (1024, 4096, 16384)  # lengths at which passes are followed; between them they grow as length and its square
BEAR_ON_SHAPES = ("dtype", "lora_r", "lora_targets", "dora")
BEAR_ON_STATICS = (*BEAR_ON_SHAPES, "quant", "double_quant", "optimizer")
BEAR_ON_PASSES = (*BEAR_ON_SHAPES, "quant", "attn", "gradient_checkpointing", "lora_dropout")


# ---- the model

def model_config(name: str) -> tuple[object, str]:
    """(transformers config, where it is from) of a folder, a config.json or a hub id; no weights are touched. Where the
    hub can't be asked, the shapes of a few models that ship with minimath. Raises UserError."""
    on_disk = Path(name).expanduser()
    try:
        found = AutoConfig.from_pretrained(str(on_disk) if on_disk.exists() else name)
        return found, "its config" if on_disk.exists() else "the hub's config"
    except (OSError, ValueError, KeyError) as error:
        shapes = json.loads((RECIPES / "shapes.json").read_text(encoding="utf-8"))
        if name in shapes:
            fields = shapes[name] if isinstance(shapes[name], dict) else shapes[shapes[name]]
            return AutoConfig.for_model(**fields), "shapes that ship with minimath (the hub could not be asked)"
        first = str(error).strip().splitlines()[0][:200]
        raise UserError(f"model={name!r}: its config can't be read ({first}); give a folder or a config.json, or check "
                        f"the name and the network{did_you_mean(name, shapes)}") from None


class Subject:
    """A model to plan for. Passes are followed once for options that they depend on, and kept."""

    def __init__(self, name: str, device: str):
        self.config, self.source = model_config(name)
        self.device = "cpu" if device == "cpu" else "cuda"
        self.kept: dict[tuple, object] = {}

    def dtype(self, cfg) -> torch.dtype:
        return DTYPES["fp32" if self.device == "cpu" else "bf16"] if cfg.model.dtype == "auto" else DTYPES[cfg.model.dtype]

    def once(self, what: str, cfg, names: tuple[str, ...], make: Callable, *extra):
        """make(), or what it gave before for the same values of the options `names`."""
        key = (what, *extra, *(getattr(cfg, name) for name in names))
        if key not in self.kept:
            try:
                self.kept[key] = make()
            except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
                first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                raise UserError(f"this model's passes can't be followed without its numbers ({first}); try another "
                                "attn=, or plan with a model of like size") from None
        return self.kept[key]

    def empty(self, cfg):
        return self.once("model", cfg, BEAR_ON_SHAPES,
                         lambda: footprint.empty_model(self.config, cfg, self.dtype(cfg)))

    def statics(self, cfg) -> footprint.Statics:
        return self.once("statics", cfg, BEAR_ON_STATICS, lambda: footprint.statics(self.empty(cfg), cfg))

    def tracers(self, cfg):
        return self.once("tracers", cfg, BEAR_ON_PASSES,
                         lambda: footprint.layer_tracer(self.config, cfg, self.dtype(cfg), self.device))

    def follow(self, cfg, shape: Shape) -> tuple[int, ...]:
        return self.once("pass", cfg, BEAR_ON_PASSES, lambda: self.tracers(cfg)[0](shape), shape[:3])

    def prefill(self, cfg, shape: Shape) -> int:
        return self.once("prefill", cfg, BEAR_ON_PASSES, lambda: self.tracers(cfg)[1](shape), shape)

    def estimate(self, cfg, shape: Shape) -> tuple[int, ...]:
        """follow, from the parabola through PROBES: a row costs a length and its square, rows add up. A padded row is
        like a packed one."""
        a, b, c = PROBES
        kind = "packed" if shape.kind == "padded" else shape.kind
        found = [self.follow(cfg, Shape(kind, 1, n)) for n in PROBES]

        def at(ya: int, yb: int, yc: int) -> int:
            slope = (yb - ya) / (b - a)
            square = ((yc - yb) / (c - b) - slope) / (c - a)
            fixed = ya - slope * a + square * a * b
            each = (slope - square * (a + b)) * shape.length + square * shape.length ** 2
            return int(fixed + shape.rows * each)
        return tuple(map(at, *found))


# ---- what a stage needs

def training_need(subject: Subject, cfg, *, exact: bool = True) -> tuple[dict[str, int], Passes]:
    """(bytes by row of the table, the pass with the highest peak) of a training stage."""
    stays, dtype = subject.statics(cfg), subject.dtype(cfg)
    shapes = footprint.sft_shapes(cfg) if isinstance(cfg, SFTConfig) else footprint.rlaif_shapes(cfg)
    follow = subject.follow if exact else subject.estimate
    most = footprint.passes(subject.config, lambda shape: follow(cfg, shape), shapes, dtype, subject.device)
    return {**fixed_rows(stays), "gradients": stays.gradients, "optimiser state": stays.optimizer,
            "activations kept for backward": most.kept, "a layer's passes, or the loss": most.peak() - most.kept}, most


def fixed_rows(stays: footprint.Statics) -> dict[str, int]:
    return {"embeddings, head, norms": stays.outside, "linear layers": stays.layers, "adapter (fp32)": stays.adapter}


class Rollout(NamedTuple):
    """Bytes of sampling above the statics."""
    cache: int  # keys and values of all slots
    state: int  # tokens, random numbers and log-probs of all slots
    step: int  # the most at a moment: logits and what sampling makes of them, or a prefill

    def peak(self) -> int:
        return sum(self)


def rollout(model, prefill: Callable, cfg, slots: int, prompts: int) -> Rollout:
    """Of `slots` sequences of up to max_prompt_len + max_new_tokens, when new prompts come in while the others run.
    model: empty; prefill: of footprint.layer_tracer; prompts: different ones that can wait together."""
    longest = cfg.prompt.max_prompt_len + cfg.sampling.max_new_tokens
    places = -(-longest // ALIGN) * ALIGN
    rows = max(1, min(PREFILL_TOKENS // cfg.prompt.max_prompt_len, prompts, slots))
    how = Sampling(cfg.sampling.temperature, cfg.sampling.top_p, cfg.sampling.min_p, cfg.sampling.top_k, cfg.repetition_penalty)
    with FakeTensorMode(), Live() as live:
        seen = torch.empty(slots, longest, dtype=torch.long) if how.repetition_penalty != 1 else None
        sample_tokens(torch.empty(slots, head_module(model).weight.shape[0]), torch.empty(slots), how, seen)
    state = slots * (12 * cfg.sampling.max_new_tokens + 8 * (longest + 1))
    return Rollout(slots * places * cache_bytes_per_token(model), state,
                   max(live.peak, prefill(Shape("padded", rows, cfg.prompt.max_prompt_len))))


def copies_bytes(model, dtype: torch.dtype) -> int:
    """Of the copies of the linear layers' weights that a rollout makes on a CPU, and of NF4 weights: see linears.py."""
    return sum(m.weight.numel() for m in [*footprint.quantised(model), head_module(model)]) * dtype.itemsize


def rollout_need(subject: Subject, base, cfg, room: int, *, state: bool) -> tuple[dict[str, int], int]:
    """(bytes by row, slots) of sampling with the options cfg in `room` bytes. base: of the training stage whose model
    it is; state: its optimiser's state is there too. slots=0 takes what the engine would, less where that is too much.
    """
    stays, model = subject.statics(base), subject.empty(base)
    rows = fixed_rows(stays) | ({"optimiser state": stays.optimizer} if state else {})
    free = room - sum(rows.values())
    train = isinstance(cfg, RLAIFConfig)
    prompts = cfg.prompts_per_step if train else cfg.data.limit or 1000
    wanted = prompts * (cfg.group_size if train else cfg.samples)
    copies = copies_bytes(model, subject.dtype(base))
    if (subject.device == "cpu" or base.quant == "nf4") and 3 * copies < free:
        rows["weights copied for decoding"] = copies
        free -= copies
    longest = cfg.prompt.max_prompt_len + cfg.sampling.max_new_tokens
    slots = min(cfg.engine.max_num_seqs, wanted) or fitting_slots(model, longest, min(wanted, 512), free=max(1, free))
    while True:
        need = rollout(model, lambda shape: subject.prefill(base, shape), cfg, slots, prompts)
        if need.peak() <= free or cfg.engine.max_num_seqs or slots == 1:
            break
        slots = max(1, min(slots - 1, slots * max(0, free) // need.peak()))
    return rows | {"keys and values of all slots": need.cache, "prefill, or a step's logits": need.step,
                   "tokens and log-probs of slots": need.state}, slots


def margin(total: int, device: str) -> int:
    """What a card needs beside what torch allocates; nothing on a CPU."""
    return 0 if device == "cpu" else CONTEXT + int(FRAGMENTATION * total)


def room_in(card: int, device: str) -> int:
    """Bytes that torch may allocate on a card."""
    return card if device == "cpu" else int((card - CONTEXT) / (1 + FRAGMENTATION))


def longest_row(cfg) -> int:
    return cfg.max_len if isinstance(cfg, SFTConfig) else cfg.prompt.max_prompt_len + cfg.sampling.max_new_tokens


def with_tokens(cfg, tokens: int):
    """cfg with micro_batch_tokens=tokens and no row that is longer; None where no completion is left."""
    if isinstance(cfg, SFTConfig):
        return cfg.replace(micro_batch_tokens=tokens, max_len=min(cfg.max_len, tokens))
    new = min(cfg.sampling.max_new_tokens, tokens - cfg.prompt.max_prompt_len)
    return cfg.replace(micro_batch_tokens=tokens, max_new_tokens=new) if new >= 16 else None


def fits(subject: Subject, cfg, room: int, *, exact: bool = True) -> bool:
    return cfg is not None and sum(training_need(subject, cfg, exact=exact)[0].values()) <= room


def largest(subject: Subject, cfg, room: int, most: int = MOST_TOKENS) -> int:
    """The most micro_batch_tokens up to `most`, in UNITs, with which a training stage fits, by estimates; 0: none."""
    if subject.statics(cfg).total() > room:
        return 0
    low, high = 0, max(1, most // UNIT)
    while low < high:  # low fits, above high nothing does
        middle = (low + high + 1) // 2
        if fits(subject, with_tokens(cfg, middle * UNIT), room, exact=False):
            low = middle
        else:
            high = middle - 1
    return low * UNIT


# ---- what to change

def remedies(stages: dict) -> list[tuple[dict, str]]:
    """(options of all training stages, why), the cheapest first, each on top of the ones before."""
    steps = [({}, "")]
    for key, now, value, why in (
            ("attn", "eager", "sdpa", "no scores are kept"),
            ("gradient_checkpointing", False, True, "about a third slower, the same result"),
            ("optimizer", "adamw", "adamw8bit", "a quarter of the optimiser's state"),
            ("quant", "none", "nf4", "the frozen weights in 4 bits: slower, a little less exact")):
        if any(getattr(stages[name], key) == now for name in ("sft", "rlaif")):
            steps.append(({**steps[-1][0], key: value}, f"{key}={str(value).lower()} ({why})"))
    return steps


def recommend(subject: Subject, stages: dict, card: int) -> tuple[dict[str, dict], list[str], bool]:
    """(changed options by section, "" for shared ones; in words; whether it then fits) for a card of `card` bytes.

    micro_batch_tokens changes no result, so it is lowered first; rows are cut only when every remedy is used."""
    room, tried = room_in(card, subject.device), remedies(stages)
    for options, _ in tried:
        changes, short = {"": dict(options)}, False
        for name in ("sft", "rlaif"):
            cfg = dataclasses.replace(stages[name], **options)
            if fits(subject, cfg, room, exact=not options):
                continue
            most = largest(subject, cfg, room, cfg.optimizer.micro_batch_tokens)
            short = short or most < longest_row(cfg)
            changes[name] = changed(cfg, most)
        if not short or options is tried[-1][0]:
            break
    for name in ("sft", "rlaif"):  # what estimates found is followed once
        cfg = dataclasses.replace(stages[name], **options, **(changes.get(name) or {}))
        while changes.get(name, {}) is not None and not fits(subject, cfg, room):
            fewer = cfg.optimizer.micro_batch_tokens * 15 // 16 // UNIT * UNIT
            changes[name] = changed(dataclasses.replace(stages[name], **options), fewer)
            cfg = cfg.replace(**(changes[name] or {}))
    words = [why for other, why in tried[1:] if other.items() <= options.items()]
    words += [f"{name}.{key}={value}" for name in ("sft", "rlaif") for key, value in (changes.get(name) or {}).items()]
    last = dataclasses.replace(stages["rlaif"], **options, **(changes.get("rlaif") or {}))
    rows, _ = rollout_need(subject, last, dataclasses.replace(last, slots=0), room, state=True)
    possible = None not in changes.values() and sum(rows.values()) <= room
    return changes, words, possible


def changed(cfg, tokens: int) -> dict | None:
    """The options that with_tokens changes; None where nothing fits."""
    new = with_tokens(cfg, tokens) if tokens else None
    if new is None:
        return None
    return {name: getattr(new, name) for name in ("micro_batch_tokens", "max_len", "max_new_tokens")
            if hasattr(cfg, name) and getattr(new, name) != getattr(cfg, name)}
