"""The forward pass of a causal LM: hidden states, masks, the LM head, the model without its adapter.

The reference policy is the model under `adapter_off`, the judge under `adapter_named`. The LM head is never called:
losses and log-probs go through `minimath.kernels`."""
import contextlib
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from minimath.core.errors import UserError
from minimath.models.attention import Segment, Segments
from minimath.models.block_attention import PackedRows, on_device, takes_flash, with_gaps
from minimath.models.fused import fused_layers


class Head(NamedTuple):
    """Hold the LM head: softcap * tanh(s / softcap) of s = scale * (hidden @ W.T + b)."""
    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None  # (V,)
    softcap: float  # 0.0: none
    logit_scale: float

    def kernel_args(self) -> dict:
        """Give the arguments of the kernels beside hidden, weight and target."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}


@contextlib.contextmanager
def adapter_named(model, name: str | None):
    """Make an adapter the active one inside; None: no adapter, the frozen base.

    What trains stays what trains, inside too. With gradient checkpointing the backward pass belongs inside: layers that
    are not fused are computed again with what is active then. Raises ValueError if the model has no such adapter."""
    if name is not None and name not in getattr(model, "peft_config", {}):
        raise ValueError(f"the model has no adapter {name!r}")
    if not isinstance(model, PeftModel):
        yield
        return
    active, off = active_adapters(model)
    try:
        _activate(model, None if name is None else [name], name is None)
        yield
    finally:
        _activate(model, None if name is None else active, off)


def adapter_off(model):
    """Make the model its frozen base inside; nothing changes without an adapter."""
    return adapter_named(model, None)


def active_adapters(model) -> tuple[list[str], bool]:
    """Name the adapters that peft has chosen in all layers, and tell whether they are switched off."""
    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    return ([], True) if layer is None else (list(layer.active_adapters), bool(layer.disable_adapters))


def _activate(model, names: list[str] | None, off: bool) -> None:
    trains = [(p, p.requires_grad) for p in model.parameters()]
    if names is not None:
        model.base_model.set_adapter(names)
    (model.base_model.disable_adapter_layers if off else model.base_model.enable_adapter_layers)()
    for p, does in trains:  # peft makes frozen adapters trainable, and others frozen: peft #3447, #3487, #3580
        p.requires_grad_(does)


@contextlib.contextmanager
def inference(model):
    """Turn dropout and autograd off inside, and restore the former mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def compute_dtype(model):
    """Autocast to the base's dtype, so that fp32 adapters join 16-bit products.

    Fused layers cast the adapters themselves. A plain model with a judge's adapter stays plain while that is off."""
    base = base_causal_lm(model)
    wanted = (isinstance(model, PeftModel) and base.dtype != torch.float32 and not fused_layers(base)
              and ("default" in model.peft_config or not active_adapters(base)[1]))
    return torch.autocast(base.device.type, base.dtype) if wanted else contextlib.nullcontext()


def base_causal_lm(model):
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def text_config(model):
    return base_causal_lm(model).config.get_text_config()


def layer_kinds(model) -> list[str]:
    """List the kinds of a model's layers in transformers' words; empty if it says none."""
    return list(getattr(text_config(model), "layer_types", None) or ())


def hidden_states(model, input_ids: torch.Tensor, *, attention_mask=None, position_ids=None, rows=None,
                  **kwargs) -> torch.Tensor:
    """Compute the final hidden states, after the last norm, without the LM head.

    input_ids (B, T) -> (B, T, D). rows: where the rows of a pass stand among its B T tokens, a list of Segment or its
    fields; attention_mask is not needed beside it. Without both each line is a row."""
    base, shape = base_causal_lm(model), input_ids.shape
    if kwargs.get("past_key_values") is None:
        by_rows = takes_rows(model)
        if rows is None and attention_mask is None and by_rows:
            rows = [(start, shape[1]) for start in range(0, shape.numel(), shape[1])]
        rows, on_cpu = [Segment(*row) for row in rows or ()], base.device.type == "cpu"
        branches = any(not isinstance(row.before, range) for row in rows)
        if rows and by_rows and not (on_cpu and branches):  # Segments takes no branches
            tokens, attention_mask = shape.numel(), not_looked_at(model)
            kwargs["segments"] = Segments(rows, tokens) if on_cpu else PackedRows(rows, tokens, base.device)
            if position_ids is None:
                position_ids = torch.arange(shape[1], device=base.device).expand(shape)
            input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
        elif is_masked(model, rows, shape):
            attention_mask = rows_mask(model, rows, shape, position_ids)
    with compute_dtype(model):
        return base.base_model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                               use_cache=kwargs.get("past_key_values") is not None,
                               **kwargs).last_hidden_state.view(*shape, -1)


def takes_rows(model) -> bool:
    """Tell whether attention costs nothing between the rows of a pass."""
    base = base_causal_lm(model)
    if (fused := fused_layers(base)) is None or base.device.type == "cpu":
        return fused is not None
    heads = fused.layers[0].heads
    return (text_config(model)._attn_implementation != "eager" and not heads.softcap
            and takes_flash(base.device, base.dtype, heads.dim))


def takes_mask(model) -> bool:
    """Tell whether a mask of ours says what a token sees: no recurrence, no chunks."""
    others = set(layer_kinds(model)) - {"full_attention", "sliding_attention"}
    return (text_config(model)._attn_implementation in ("sdpa", "eager") and not others
            and not getattr(base_causal_lm(model), "_is_stateful", False))


def is_masked(model, rows: list[Segment], shape) -> bool:
    """Tell whether rows need a mask of ours: those behind others, on a card all but whole ones.

    transformers would read there what it makes of positions or padding, and sdpa make numbers of it in every layer."""
    whole = len(rows) == shape[0] and all(row.length == shape[1] for row in rows)
    return any(row.before for row in rows) or (
        bool(rows) and not whole and base_causal_lm(model).device.type == "cuda" and takes_mask(model))


def rows_mask(model, rows: list[Segment], shape, position_ids) -> torch.Tensor | dict:
    """Make the mask of a pass (B, T): [B, 1, T, T], or a dict by layer type.

    A token sees those up to itself in its row and in what the row stands behind: to be seen is to stand before the end
    of all that a token is seen by. So a row follows what it sees, with no other row between that does not see it."""
    (many, width), device = shape, base_causal_lm(model).device
    first = torch.arange(0, many * width, width)[:, None]  # (B, 1)
    end = torch.zeros(many * width, dtype=torch.long)
    for row in with_gaps(rows, len(end)):  # padding is seen by padding
        end[list(row.before)] = end[row.start:row.start + row.length] = row.start + row.length
    end, place = on_device(end.view(many, width) - first, device), torch.arange(width, device=device)
    seen = (place[:, None] >= place) & (place[:, None] < end[:, None])  # (B, T, T)
    age = None
    if sliding_window(model):
        position = place[None] if position_ids is None else position_ids
        age = (position[:, :, None] - position[:, None])[:, None]
    return additive_mask(model, age, seen[:, None])


def not_looked_at(model):
    """Give a mask that keeps transformers from making one; on the CPU, by no launch."""
    none = torch.zeros(1, 1, 1, 1)
    return additive_mask(model, none, none == 0)


def sliding_window(model) -> int | None:
    """Give the window of the layers that have one: a token and those before it."""
    config, kind = text_config(model), "sliding_attention"
    slides = getattr(config, "use_sliding_window", True) is not False and kind in (layer_kinds(model) or {kind})
    return getattr(config, "sliding_window", None) if slides else None


def additive_mask(model, age: torch.Tensor | None, seen: torch.Tensor):
    """Make the additive mask of what each query sees, as the model takes it.

    age, seen (B, 1, Q, K): positions from key to query, needed where there is a window; whether the query may see the
    key, windows left aside. A window w holds a token and the w - 1 positions before it. Returns a dict by layer type if
    layers differ. On a card its rows begin at multiples of 16 bytes: sdpa would copy any other in every layer."""
    dtype = base_causal_lm(model).dtype

    def additive(seen):
        *outer, keys = seen.shape
        mask = torch.zeros(*outer, -(-keys // 8) * 8 if seen.is_cuda else keys, dtype=dtype, device=seen.device)
        return mask[..., :keys].masked_fill_(~seen, torch.finfo(dtype).min)

    if not (window := sliding_window(model)):
        return additive(seen)
    sliding = additive(seen & (age < window))
    several = len(set(layer_kinds(model))) > 1
    return {"full_attention": additive(seen), "sliding_attention": sliding} if several else sliding


def head_module(model) -> torch.nn.Module:
    """Find the output embedding of the model, tied or not."""
    module = base_causal_lm(model).get_output_embeddings()
    if module is None:
        raise UserError(f"{type(base_causal_lm(model)).__name__} has no LM head; use a causal LM")
    return module


def head(model) -> Head:
    """Read the LM head off the model, as the kernels take it."""
    config, module = text_config(model), head_module(model)

    def number(name: str, default: float) -> float:
        return float(getattr(config, name, None) or default)

    scale = number("logit_scale", 1.0) * number("lm_head_multiplier", 1.0) / number("logits_scaling", 1.0)
    softcap = number("final_logit_softcapping", 0.0) or number("logits_soft_cap", 0.0)
    return Head(module.weight, getattr(module, "bias", None), softcap, scale)
