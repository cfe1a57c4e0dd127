"""Bytes of a model and of its passes, counted before anything is loaded.

The model's own code runs on tensors that have shapes and no data (torch's FakeTensorMode) while storages are counted:
for two and three times the pattern of its layers, as each further one adds the same. Fused layers on a card take flash
attention row by row: a pass costs a constant, its tokens and the keys of prompts that rows copy. Others there need
masks: a constant, the length and its square. Fused layers on a CPU: few rows tell what more cost. What follows PIECE
tokens is told by longer passes. Gradients are there from the micro-batch before."""
import contextlib
import copy
import functools
import math
import warnings
import weakref
from unittest import mock

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from minimath.core.errors import UserError
from minimath.kernels import elementwise
from minimath.models import block_attention, forward, load, offload
from minimath.models.attention import Segment
from minimath.models.block_attention import PackedRows
from minimath.models.fused import fused_layers
from minimath.models.memory import fresh_cache, give_back, keeps_state
from minimath.models.nodes import PIECE
from minimath.models.variants import rank_of

SHORT, LONG = (PIECE // 8, PIECE // 2, PIECE), (2 * PIECE, 4 * PIECE, 8 * PIECE)  # lengths at which passes are followed
ROWS = 4  # and twice as many in a pass foretell more of them
ONE_PASS = {  # what the kernels of a card allocate: their results
    "rms_norm": lambda x, *_: (torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)),
    "apply_norm": lambda x, *_: torch.empty_like(x),
    "rms_norm_backward": lambda dy, x, *_: torch.empty_like(x),
    "rotate": lambda x, cos, sin, *, back=False: None,
    "gated": lambda gate_up, act: gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2),
    "gated_backward": lambda dh, gate_up, act: (torch.empty_like(gate_up), torch.empty_like(dh))}
NO_MASK = "minimath_plan_no_mask"  # sdpa without a mask keeps what flash attention does
AttentionInterface.register(NO_MASK, sdpa_attention_forward)
AttentionMaskInterface.register(NO_MASK, lambda **kwargs: None)


def flash_backward(grad, q, k, v, *_) -> list[torch.Tensor]:
    """Allocate what flash attention 2 does in backward: dq in fp32, dk and dv of every head of q, the results."""
    inside = [q.new_empty(q.shape, dtype=torch.float32)]
    inside += [k.new_empty(len(k), *q.shape[1:]) for _ in range(2 * (k.shape[1] != q.shape[1]))]
    grads = [each.new_empty(each.shape) for each in (q, k, v)]
    del inside
    return grads


FLASH = {"flash_backward": flash_backward, "flash": lambda q, k, v, *_: (
    q.new_empty(q.shape), q.new_empty(q.shape[1], len(q), dtype=torch.float32), q.new_empty(0), q.new_empty(0))}


class Live(TorchDispatchMode):
    """Count inside the bytes of new storages: `now` alive, `peak` the most at once."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.counts = 0, 0, True
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        for key, (owner, size) in storages(out).items() if self.counts else ():
            if key not in given and key not in self.sizes:
                self.sizes[key] = size
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(owner, self.drop, key)
        return out

    def drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)

    def host_memory(self, numbers: int, dtype: torch.dtype, pinned: bool) -> torch.Tensor:
        """Make what is not on the card."""
        with mock.patch.object(self, "counts", False):
            return torch.empty(numbers, dtype=dtype)


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
    return load._new_adapter(model.requires_grad_(False), cfg.replace(
        lora_init="default", lora_r=rank_of(cfg.adapter)))  # PiSSA can't begin without numbers


def fuse(model, cfg):
    """Fuse the layers as load_model does; return them, None if they stay as they are."""
    base = forward.base_causal_lm(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fake weights are all at address 0, and torch warns of it
        return None if cfg.model.shard or cfg.model.compile or load.fuse(base) else fused_layers(base)


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
        with contextlib.suppress(AttributeError):  # some derive it from the number of layers
            text.layer_types = text.layer_types[:layers]
    model = empty_model(short, cfg, dtype).train()
    if cfg.optimizer.gradient_checkpointing:
        load.checkpoint_activations(model, preserve_rng_state=False)
        if cfg.optimizer.offload:
            offload.offload_inputs(model, torch.device("cpu"))
    load.cast_adapters_down(model)
    with fake:  # on the CPU, where autocast works; gradients are there from the second micro-batch on
        model._apply(lambda old: torch.empty(old.shape, dtype=old.dtype))
        for param in [p for p in model.parameters() if p.requires_grad]:
            param.grad = torch.empty_like(param)
        fuse(model, cfg)
    return model


class Model:
    """Count on a model with its adapter; linears: the weights that nf4 quantises."""

    def __init__(self, config, cfg, dtype: torch.dtype, device: str):
        self.empty, self.fake, few = empty_model(config, cfg, dtype), FakeTensorMode(), pattern(config)
        self.head = forward.head_module(self.empty).weight
        self.linears = [m.weight for m in forward.base_causal_lm(self.empty).modules() if isinstance(m, torch.nn.Linear)
                        and m.weight is not self.head and not m.weight.requires_grad]
        fused = fuse(self.empty, cfg)
        self.groups = fused.groups if fused else []
        self.trained = [p for p in self.empty.parameters() if p.requires_grad]
        self.casts = [t.nbytes for g in self.groups for t in (g.active.a, g.active.b) if t is not None]
        self.biases = [g.bias.nbytes for g in self.groups if g.bias is not None]
        self.scratch = max((group.width * group.bases[0].in_features for group in self.groups), default=0)
        self.one_pass, self.pieces = ONE_PASS if device != "cpu" else {}, fused and cfg.optimizer.gradient_checkpointing
        heads = fused.layers[0].heads if fused else None
        self.flash = (fused and device != "cpu" and dtype != torch.float32 and cfg.model.attn != "eager"
                      and not heads.softcap and heads.dim % 8 == 0 and heads.dim <= 256)  # from sm_80 on
        self.by_rows = self.flash or fused and device == "cpu"  # rows do not see each other
        self.layers = config.get_text_config().num_hidden_layers
        least = 2 if few == 1 else few  # the first layer is unlike others
        counts = (self.layers,) if self.layers <= least + few else (least, least + few)
        self.models = {n: traceable(config, cfg, dtype, n, self.fake) for n in counts}
        self.followed = functools.cache(self.followed)

    def passes(self, rows: float, length: int, prompt: int = 0, together: bool = False) -> tuple[int, ...]:
        """Count bytes above what stays: kept for backward, most in forward, in backward.

        Rows of `length` tokens, padded, or together behind one another (a part of a row, too), maybe behind a common
        prompt. Raises UserError."""
        tokens = int(prompt + rows * length)
        short, _, long = lengths = LONG if self.pieces and tokens > PIECE else SHORT
        if self.flash:
            one, more, keys = (self.followed(*what) for what in ((short, 1), (long, 1), (short, 1, short)))
            further, copied = (tokens - short) / (long - short), math.ceil(rows) * prompt / short
            return tuple(int(a + (b - a) * further + (c - a) * copied) for a, b, c in zip(one, more, keys))
        if self.by_rows:
            least = max(ROWS, -(-2 * PIECE // length)) if self.pieces and tokens > PIECE else ROWS
            if (whole := max(1, int(rows))) < least:
                return self.followed(length, whole, prompt, max(0, round((rows - whole) * length)))
            few, more = (self.followed(length, n, prompt) for n in (least, 2 * least))
            return tuple(int(a + (b - a) * (rows / least - 1)) for a, b in zip(few, more))
        if together:
            rows, length = 1, tokens
        square, slope, fixed = np.polyfit(lengths, [self.followed(n, 1, -(prompt > 0)) for n in lengths], 2)
        return tuple(map(int, fixed + rows * length * (slope + square * length)))

    def followed(self, *what: int) -> tuple[int, ...]:
        """Extend what follow counts of a few layers to all.

        Raises UserError where code looks at its numbers, as that of mixtures of experts does."""
        try:
            (least, few), *more = ((n, self.follow(model, *what)) for n, model in self.models.items())
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            raise UserError(f"this model's passes can't be followed without its numbers ({load.first_line(error)}); "
                            "try another attn=, or plan with a model of like size") from None
        return tuple(a + (b - a) * (self.layers - least) // (n - least)
                     for n, other in more for a, b in zip(few, other)) or few

    def follow(self, model, length: int, rows: int, prompt: int = 0, rest: int = 0) -> tuple[int, int, int]:
        """Follow a pass over `rows` rows; none: over a prompt, for a cache.

        prompt: before the rows, all with one mask of ours if below 0; of flash attention keys of prompts that are
        copied. rest: tokens of a further row."""
        tokens, mask, more = max(1, rows) * length + rest + (0 if self.flash else max(0, prompt)), None, {}
        packed = PackedRows([], tokens, torch.device("cpu"))
        give_back()  # buffers of the pass before
        with (self.fake, Live() as live, mock.patch.dict(vars(elementwise), self.one_pass),
              mock.patch.dict(vars(block_attention), FLASH if self.flash else {}),
              mock.patch.dict(vars(offload), {"host_memory": live.host_memory} if self.one_pass else {})):
            ids, places = (torch.empty(1, tokens, dtype=torch.long) for _ in range(2))
            if not rows:
                mask = None if keeps_state(model) else places  # which such a model looks at
                with forward.inference(model):
                    forward.hidden_states(model, ids, attention_mask=mask, past_key_values=fresh_cache(model))
                return 0, live.peak, 0
            if self.by_rows and not self.flash:
                segments = [Segment(at, min(length, tokens - at), range(prompt))
                            for at in range(prompt, tokens, length)]
                segments += [Segment(0, prompt)] if prompt else []
                hidden = forward.hidden_states(model, ids, position_ids=places, rows=segments)
            else:
                if self.flash:
                    packed.places = torch.empty(tokens + prompt, dtype=torch.int) if prompt else None
                    mask, more = forward.not_looked_at(model), {"segments": packed}
                elif prompt:
                    mask = forward.rows_mask(model, [Segment(0, tokens)], ids.shape, places)
                with forward.compute_dtype(model):
                    hidden = forward.base_causal_lm(model).base_model(
                        input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False, **more)[0]
                del mask
            kept, most, live.peak = live.now, live.peak, live.now
            hidden.sum().backward()
        return kept, most, live.peak
