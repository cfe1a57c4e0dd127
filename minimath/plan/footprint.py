"""Bytes of a model and of its passes, counted before anything is loaded.

The model's own code runs on tensors that have shapes and no data (torch's FakeTensorMode) while storages are counted:
for two and three times the pattern of its layers, as each further one adds the same, and for three lengths, as a row
costs a constant, its length and its square. Rows need masks, and gradients are there from the micro-batch before."""
import copy
import functools
import weakref

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from minimath.core.errors import UserError
from minimath.models import load
from minimath.models.forward import base_causal_lm, head_module, hidden_states, inference, shared_mask

LENGTHS = (512, 2048, 8192)  # at which passes are followed
NO_MASK = "minimath_plan_no_mask"  # sdpa without a mask keeps what flash attention does
AttentionInterface.register(NO_MASK, sdpa_attention_forward)
AttentionMaskInterface.register(NO_MASK, lambda **kwargs: None)


class Live(TorchDispatchMode):
    """Count inside the bytes of new storages: `now` alive, `peak` the most at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        for key, (owner, size) in storages(out).items():
            if key not in given and key not in self.sizes:
                self.sizes[key] = size
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(owner, self.drop, key)
        return out

    def drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def storages(tree) -> dict[int, tuple]:
    """Find what holds the numbers of the tensors in a tree, with its bytes, by key."""
    tensors = [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
    owners = [t.untyped_storage() if t.layout == torch.strided else t for t in tensors]  # else it is oneDNN's
    return {o._cdata: (o, o.nbytes if isinstance(o, torch.Tensor) else o.nbytes()) for o in owners}


def empty_model(config, cfg, dtype: torch.dtype):
    """Make the model with its adapter on the meta device: shapes without storage."""
    attention = {"flash_attention_2": NO_MASK}.get(cfg.model.attn, cfg.model.attn)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.config.use_cache = False
    return load._new_adapter(model.requires_grad_(False), cfg.replace(lora_init="default"))  # PiSSA makes no others


def pattern(config) -> int:
    """Find the number of layers after which their kinds repeat."""
    kinds = list(getattr(config.get_text_config(), "layer_types", None) or [None])
    return next((p for p in range(1, len(kinds)) if all(a == b for a, b in zip(kinds, kinds[p:]))), len(kinds))


def traceable(config, cfg, dtype: torch.dtype, layers: int, fake: FakeTensorMode):
    """Make the model with `layers` layers and a small vocabulary, of fake tensors."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = layers, 512, None
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    model = empty_model(short, cfg, dtype).train()
    if cfg.optimizer.gradient_checkpointing:
        load.checkpoint_activations(model, preserve_rng_state=False)
    load.cast_adapters_down(model)
    with fake:  # on the CPU, where autocast works; gradients are there from the second micro-batch on
        for held in [held for m in model.modules() for held in (m._parameters, m._buffers)]:
            for name, old in held.items():
                if old is not None:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    held[name] = type(old)(new, old.requires_grad) if isinstance(old, torch.nn.Parameter) else new
        for param in [p for p in model.parameters() if p.requires_grad]:
            param.grad = torch.empty_like(param)
    return model


class Model:
    """Count on a model with its adapter; linears: the weights that nf4 quantises."""

    def __init__(self, config, cfg, dtype: torch.dtype):
        self.empty, self.fake, few = empty_model(config, cfg, dtype), FakeTensorMode(), pattern(config)
        self.head = head_module(self.empty).weight
        self.linears = [m.weight for m in base_causal_lm(self.empty).modules() if isinstance(m, torch.nn.Linear)
                        and m.weight is not self.head and not m.weight.requires_grad]
        self.layers = config.get_text_config().num_hidden_layers
        counts = (self.layers,) if self.layers <= 3 * few else (2 * few, 3 * few)  # the first layer is unlike others
        self.models = {n: traceable(config, cfg, dtype, n, self.fake) for n in counts}
        self.followed = functools.cache(self.followed)

    def passes(self, kind: str, rows: int, length: int) -> tuple[int, ...]:
        """Count bytes above what stays: kept for backward, most in forward, in backward.

        kind: row (masked as packed or padded), shared (completions behind their prompt) or prefill (fills a cache).
        Raises UserError where code looks at its numbers, as that of mixtures of experts does."""
        try:
            if kind == "prefill":  # its length is always the same
                return tuple(rows * size for size in self.followed(kind, length))
            square, slope, fixed = np.polyfit(LENGTHS, [self.followed(kind, n) for n in LENGTHS], 2)
            return tuple(map(int, fixed + rows * length * (slope + square * length)))
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            raise UserError(f"this model's passes can't be followed without its numbers ({load.first_line(error)}); "
                            "try another attn=, or plan with a model of like size") from None

    def followed(self, kind: str, length: int) -> tuple[int, ...]:
        """Extend what follow counts of a few layers to all."""
        (least, few), *more = ((n, self.follow(model, kind, length)) for n, model in self.models.items())
        return tuple(a + (b - a) * (self.layers - least) // (n - least)
                     for n, other in more for a, b in zip(few, other)) or few

    def follow(self, model, kind: str, length: int) -> tuple[int, int, int]:
        with self.fake, Live() as live:
            ids, places, mask = (torch.empty(1, length, dtype=torch.long) for _ in range(3))
            if kind == "prefill":
                with inference(model):
                    hidden_states(model, ids, attention_mask=mask, past_key_values=DynamicCache())
                return 0, live.peak, 0
            mask = shared_mask(model, places[0], places[0]) if kind == "shared" else None
            masks = live.now  # in the loop, the batch before lives until the next is made
            hidden = hidden_states(model, ids, attention_mask=mask, position_ids=places)
            kept, forward, live.peak = live.now, live.peak, live.now
            hidden.sum().backward()
        return kept, forward + masks, live.peak
