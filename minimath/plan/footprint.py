"""Bytes that a stage needs, before anything is loaded: the model is built without storage, its passes are followed.

Weights, adapter, gradients and optimiser are counted from shapes. Activations are not guessed by a formula: forward and
backward of the model's own code run on tensors that have shapes and no data (torch's FakeTensorMode), for two and for
three times the pattern of its layers, while every storage that comes and goes is counted; all layers follow, since each
further one adds the same. So it holds for every architecture whose code does not look at its numbers (which a mixture
of experts may), masks and their copies included. Counted is the worst case: rows of full length, packed or padded so
that they need a mask, and the micro-batch before not yet let go.
"""
import copy
import dataclasses
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from minimath.kernels.common import tile_shape
from minimath.models.load import (
    _new_adapter,
    base_causal_lm,
    cast_adapters_down,
    checkpoint_activations,
    head_module,
    hidden_states,
    inference,
)
from minimath.models.prefix import EAGER_TOKENS, shared_mask
from minimath.rollout.kv_cache import decoding_attention

NO_MASK = "minimath_plan_no_mask"
BLOCK, NESTED = 64, 256  # weights per scale of NF4; scales per second scale, and numbers per scale of 8-bit state
SMALL_STATE = 4096  # 8-bit optimisers keep the state of smaller tensors in fp32
LOSS_SCRATCH = 6 << 20  # of the fused loss beside its tile: picked rows of the head (GATHER_BYTES), a pass's block


class Statics(NamedTuple):
    """Bytes that stay through a stage."""
    outside: int  # weights that are never quantised: embeddings, head, norms, biases
    layers: int  # weights of the linear layers, with NF4's scales
    adapter: int
    gradients: int
    optimizer: int

    def total(self) -> int:
        return sum(self)


class Passes(NamedTuple):
    """Bytes of a forward and backward pass above the statics."""
    kept: int  # activations, for the backward
    forward: int  # the most during forward, kept ones and the micro-batch before included
    backward: int  # the most during backward, kept ones included
    loss: int  # of the fused loss, above the kept ones

    def peak(self) -> int:
        return max(self.forward, self.kept + self.loss, self.backward)


class Shape(NamedTuple):
    """The input of a forward pass: packed (examples behind one another in one row), padded, or shared (completions
    behind their prompt)."""
    kind: str
    rows: int
    length: int
    trained: int = 0  # tokens with a loss; 0: all


# ---- what stays

def empty_model(config, cfg, dtype: torch.dtype):
    """The model of `config` on the meta device, as cfg trains it: shapes, no storage. cfg: options of a training stage;
    a DoRA or PiSSA start makes no other shapes than LoRA's."""
    attention = {"flash_attention_2": NO_MASK}.get(cfg.model.attn, cfg.model.attn)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.config.use_cache = False
    return _new_adapter(model.requires_grad_(False), cfg.replace(lora_init="default"))


def quantised(model) -> list[torch.nn.Linear]:
    """The layers that quant=nf4 quantises: every linear layer but the head and the adapter's own."""
    lm_head = head_module(model)
    return [m for m in base_causal_lm(model).modules() if isinstance(m, torch.nn.Linear) and m is not lm_head
            and not any(p.requires_grad for p in m.parameters())]


def nf4_bytes(weights: int, double_quant: bool) -> int:
    """Bytes of one NF4 matrix: half a byte a weight, a scale per BLOCK (fp32; with double quantisation one byte, and
    an fp32 per NESTED of them, its code book of 256 and an offset), and its code book of 16."""
    scales = -(-weights // BLOCK)
    size = -(-weights // 2) + 16 * 4
    return size + (scales + 4 * -(-scales // NESTED) + 256 * 4 + 4 if double_quant else 4 * scales)


def statics(model, cfg) -> Statics:
    """Of an empty model with its adapter. cfg: options of a training stage."""
    lean = {id(m.weight): m.weight.numel() for m in quantised(model)}
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    if cfg.model.quant == "nf4":
        layers = sum(nf4_bytes(numel, cfg.double_quant) for numel in lean.values())
    else:
        layers = sum(stored(frozen[key]) for key in lean)
    outside = sum(stored(p) for key, p in frozen.items() if key not in lean) + sum(map(stored, model.buffers()))
    trained = [p for p in model.parameters() if p.requires_grad]
    adapter = sum(map(stored, trained))
    return Statics(outside, layers, adapter, adapter, optimizer_bytes([p.numel() for p in trained], cfg.optimizer.name))


def stored(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def optimizer_bytes(sizes: list[int], optimizer: str) -> int:
    """Of Adam's two moments of tensors of these sizes: fp32 (torch counts its steps in one more number a tensor), or a
    byte each with an fp32 scale per NESTED, and two code books. Paged state is counted like other state."""
    if optimizer == "adamw":
        return sum(8 * n + 4 for n in sizes)
    if "8bit" not in optimizer:
        return 8 * sum(sizes)
    large = [n for n in sizes if n >= SMALL_STATE]
    return (8 * (sum(sizes) - sum(large)) + sum(2 * (n + 4 * -(-n // NESTED)) for n in large)
            + (2 * 256 * 4 if large else 0))


# ---- counting what comes and goes

class Live(TorchDispatchMode):
    """Inside: `now`, bytes of the storages made since and still alive, and `peak`, the most of them at once."""

    def __init__(self, device: str = "cpu"):
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}
        self.cuda = device == "cuda"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "prim":  # asks for a tensor's device
            return func(*args, **(kwargs or {}))
        given = {key_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and key_of(tensor) not in given:
                self.add(tensor)
        if self.cuda and func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
            # what CUDA's kernels hold inside: an fp32 sum of the queries' gradient, and without repeated keys those of
            # every head's keys and values
            query, key = args[1], args[2]
            extra = 4 * query.numel() + (2 * stored(query) if query.shape[1] != key.shape[1] else 0)
            self.peak = max(self.peak, self.now + extra)
        return out

    def add(self, tensor: torch.Tensor) -> None:
        key, owner = key_of(tensor), tensor.untyped_storage() if strided(tensor) else tensor
        if key in self.sizes:
            return
        self.sizes[key] = owner.nbytes() if strided(tensor) else stored(tensor)
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(owner, self.drop, key)

    def drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def strided(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided  # oneDNN's own layout has no storage to ask


def key_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata if strided(tensor) else id(tensor)


# ---- the model as it is followed

AttentionInterface.register(NO_MASK, sdpa_attention_forward)  # without a mask it keeps what flash attention does
AttentionMaskInterface.register(NO_MASK, lambda **kwargs: None)


class _FrozenProduct(torch.autograd.Function):
    """x W^T of an NF4 matrix: its scales and W are made for the product, and again in backward; x is not kept."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ dequantised(weight).t()

    @staticmethod
    def backward(ctx, grad):
        return grad @ dequantised(ctx.saved_tensors[0]), None


class _Loss(torch.autograd.Function):
    """What backward sees of linear_token_loss: the gradient is there already, and is scaled."""

    @staticmethod
    def forward(ctx, hidden):
        ctx.save_for_backward(torch.empty_like(hidden))
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(ctx.saved_tensors[0])


def dequantised(weight: torch.Tensor) -> torch.Tensor:
    scales = weight.new_empty(-(-weight.numel() // BLOCK), dtype=torch.float32)
    scales = scales + 1  # the offset of double quantisation
    return torch.empty_like(weight)


def nf4_forward(module: torch.nn.Linear):
    def forward(x):
        out = _FrozenProduct.apply(x.to(module.weight.dtype), module.weight)
        return (out if module.bias is None else out + module.bias).clone()  # peft's 4-bit layer clones it
    return forward


def pattern(config) -> int:
    """The number of layers after which their kinds repeat."""
    kinds = list(getattr(config.get_text_config(), "layer_types", None) or [None])
    return next((p for p in range(1, len(kinds)) if all(a == b for a, b in zip(kinds, kinds[p:]))), len(kinds))


def shortened(config, layers: int):
    """The config with `layers` layers and a small vocabulary, which no hidden state depends on."""
    short = copy.deepcopy(config)
    text = short.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = layers, 512, None
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return short


def give_shapes_only(model) -> None:
    """Turn meta parameters and buffers into fake tensors of the CPU, where autocast works, with gradients made: they
    are there from the second micro-batch of a step on."""
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                fake = torch.nn.Parameter(torch.empty(param.shape, dtype=param.dtype), param.requires_grad)
                fake.grad = torch.empty_like(fake) if param.requires_grad else None
                module._parameters[name] = fake
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def tracer(config, cfg, dtype: torch.dtype, layers: int, device: str) -> tuple[Callable, Callable]:
    """follow(shape) -> (kept, forward, backward), and prefill(shape) -> peak of a forward that fills a cache, of
    `layers` layers."""
    model = empty_model(shortened(config, layers), cfg, dtype)
    if cfg.optimizer.gradient_checkpointing:
        checkpoint_activations(model, preserve_rng_state=False)
    cast_adapters_down(model)
    model.train()
    if cfg.model.quant == "nf4":
        for module in quantised(model):
            module.forward = nf4_forward(module)
    fake = FakeTensorMode(allow_non_fake_inputs=False)
    with fake:
        give_shapes_only(model)

    def follow(shape: Shape) -> tuple[int, int, int]:
        with fake, Live(device) as live:
            batch = batch_of(model, shape)
            masks = live.now  # in the loop, the batch before lives until the next is made
            hidden = hidden_states(model, **batch)
            kept, forward, live.peak = live.now, live.peak, live.now
            _Loss.apply(hidden).backward()
        return kept, forward + stored(hidden) + masks, live.peak

    def prefill(shape: Shape) -> int:
        with fake, inference(model), decoding_attention(model), Live(device) as live:
            hidden_states(model, **batch_of(model, shape), past_key_values=DynamicCache())
        return live.peak

    return follow, prefill


def batch_of(model, shape: Shape) -> dict:
    """What model.hidden_states is called with, without data: a forward sees to its masks itself, as there."""
    batch = {"input_ids": torch.empty(shape.rows, shape.length, dtype=torch.long),
             "position_ids": torch.empty(shape.rows, shape.length, dtype=torch.long)}
    if shape.kind == "padded":
        batch["attention_mask"] = torch.empty(shape.rows, shape.length, dtype=torch.long)
    if shape.kind == "shared":
        position, segment = (torch.empty(shape.length, dtype=torch.long) for _ in range(2))
        batch["attention_mask"] = shared_mask(model, position, segment)
    return batch


def layer_tracer(config, cfg, dtype: torch.dtype, device: str) -> tuple[Callable, Callable]:
    """As tracer, for all layers of the model. Two patterns of layers and a third: the first layer's input needs no
    gradient, so it is no measure of the others."""
    every, few = config.get_text_config().num_hidden_layers, pattern(config)
    if every <= 3 * few:
        return tracer(config, cfg, dtype, every, device)
    two, three = (tracer(config, cfg, dtype, n * few, device) for n in (2, 3))

    def extended(a: int, b: int) -> int:
        return a + (b - a) * (every - 2 * few) // few

    return (lambda shape: tuple(map(extended, two[0](shape), three[0](shape))),
            lambda shape: extended(two[1](shape), three[1](shape)))


def loss_bytes(tokens: int, config, dtype: torch.dtype, device: str) -> int:
    """Of linear_token_loss: the logits of a tile; of a chunk of rows its fp32 sums and the copies made of them, where
    there are several also that of the chunk before; statistics and gradient of all hidden states; scratch."""
    text = config.get_text_config()
    sizes, columns = tile_shape(tokens, text.vocab_size, dtype.itemsize, None, device)
    rows, copies = max(sizes), (1 if dtype.itemsize == 4 else 2) + (len(sizes) > 1)
    grad = 4 if dtype == torch.float16 else dtype.itemsize
    return (rows * columns * dtype.itemsize + rows * text.hidden_size * (4 + copies * dtype.itemsize)
            + tokens * (text.hidden_size * grad + 32) + LOSS_SCRATCH)


# ---- the passes of each stage

def sft_shapes(cfg) -> list[Shape]:
    """The largest forward pass of a step: of micro_batch_tokens, or of one longer row."""
    if cfg.packing:
        return [Shape("packed", 1, min(max(cfg.optimizer.micro_batch_tokens, cfg.max_len), cfg.batch_size * cfg.max_len))]
    return [Shape("padded", max(1, min(cfg.optimizer.micro_batch_tokens // cfg.max_len, cfg.batch_size)), cfg.max_len)]


def rlaif_shapes(cfg) -> list[Shape]:
    """The same for an update: completions padded, or behind their prompt, as prefix.forward_batches decides."""
    longest = cfg.prompt.max_prompt_len + cfg.sampling.max_new_tokens
    rows = -(-cfg.prompts_per_step * cfg.group_size // cfg.minibatches)
    rows = max(1, min(cfg.optimizer.micro_batch_tokens // longest, rows))
    shapes = [Shape("padded", rows, longest, rows * cfg.sampling.max_new_tokens)]
    if cfg.shared_prefix and cfg.model.attn != "flash_attention_2":
        most = min(cfg.optimizer.micro_batch_tokens, EAGER_TOKENS) if cfg.model.attn == "eager" else cfg.optimizer.micro_batch_tokens
        shapes.append(Shape("shared", 1, min(max(most, longest), longest + (cfg.group_size - 1) * cfg.sampling.max_new_tokens)))
    return shapes


def passes(config, follow: Callable, shapes: list[Shape], dtype: torch.dtype, device: str) -> Passes:
    """The pass with the highest peak. follow: of layer_tracer."""
    found = [Passes(*follow(s), loss_bytes(s.trained or s.rows * s.length, config, dtype, device)) for s in shapes]
    return max(found, key=Passes.peak)
