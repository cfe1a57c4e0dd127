"""The forward pass of a causal LM: hidden states, masks, the LM head, the model without its adapter.

The reference policy and the self-judge are the model under `adapter_off`; rollouts and updates use the same weights.
The LM head is never called: losses and log-probs go through `minimath.kernels`."""
import contextlib
from typing import NamedTuple

import torch
from peft import PeftModel

from minimath.core.errors import UserError
from minimath.models.attention import Segment, Segments
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
def adapter_off(model):
    """Make the model its frozen base inside; nothing changes without an adapter."""
    trains = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext():
            yield
    finally:
        for p, before in trains:  # peft makes frozen adapters trainable on leaving: peft #3447
            p.requires_grad_(before)


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

    Fused layers cast the adapters themselves."""
    base = base_causal_lm(model)
    wanted = isinstance(model, PeftModel) and base.dtype != torch.float32 and not fused_layers(base)
    return torch.autocast(base.device.type, base.dtype) if wanted else contextlib.nullcontext()


def base_causal_lm(model):
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def hidden_states(model, input_ids: torch.Tensor, *, attention_mask=None, position_ids=None, rows=None,
                  **kwargs) -> torch.Tensor:
    """Compute the final hidden states, after the last norm, without the LM head.

    input_ids (B, T) -> (B, T, D). rows: where the rows of a pass with B = 1 stand, maybe behind a common prompt
    (attention.Segment). Without rows and attention_mask, position_ids that restart at 0 tell packed examples apart."""
    base = base_causal_lm(model)
    if kwargs.get("past_key_values") is None and takes_rows(model):
        rows = rows_of(input_ids.shape, attention_mask, position_ids) if rows is None else rows
        if rows:
            kwargs["segments"] = Segments(rows, input_ids.numel())
            none = torch.zeros(1, 1, 1, 1, device=base.device)
            attention_mask = additive_mask(model, none, none == 0)  # is not looked at
    elif rows is not None and any(row.shared for row in rows):
        attention_mask = shared_mask(model, position_ids[0], rows)
    with compute_dtype(model):
        return base.base_model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                               use_cache=kwargs.get("past_key_values") is not None, **kwargs).last_hidden_state


def takes_rows(model) -> bool:
    """Tell whether attention costs nothing between the rows of a pass."""
    base = base_causal_lm(model)
    return base.device.type == "cpu" and fused_layers(base) is not None


def rows_of(shape, attention_mask, position_ids) -> list[Segment]:
    """Find the rows of a pass (B, T): right-padded, or packed if B is 1; [] if unknown."""
    many, width = shape
    if attention_mask is None:
        restarts = (position_ids[0] == 0).nonzero().flatten().tolist() if many == 1 and position_ids is not None else []
        starts = restarts if restarts[:1] == [0] else range(0, many * width, width)
        return [Segment(start, end - start) for start, end in zip(starts, [*starts[1:], many * width], strict=True)]
    if torch.is_tensor(attention_mask) and attention_mask.dim() == 2:
        lengths = attention_mask.sum(1)
        if torch.equal(torch.arange(width) < lengths[:, None], attention_mask.bool()):
            return [Segment(row * width, length) for row, length in enumerate(lengths.tolist())]
    return []


def shared_mask(model, position: torch.Tensor, rows: list[Segment]):
    """Make the mask of rows behind a prompt: [1, 1, T, T], or a dict by layer type.

    position (T,). A token sees its own row and that row's prompt, both up to itself."""
    segment, prompt = torch.full((2, len(position)), -1, device=position.device)
    for number, row in enumerate(rows):
        segment[row.start:row.start + row.length] = number
        if row.shared:
            prompt[row.start:row.start + row.length] = [each.start for each in rows].index(row.prompt)
    age = position[:, None] - position
    seen = (age >= 0) & ((segment[:, None] == segment) | (prompt[:, None] == segment))
    return additive_mask(model, age[None, None], seen[None, None])


def additive_mask(model, age: torch.Tensor, seen: torch.Tensor):
    """Make the additive mask of what each query sees, as the model takes it.

    age, seen (B, 1, Q, K): positions from key to query; whether the query may see the key, windows left aside. A window
    w holds a token and the w - 1 positions before it. Returns a dict by layer type if layers differ."""
    config, dtype = base_causal_lm(model).config.get_text_config(), base_causal_lm(model).dtype

    def additive(seen):
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)

    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or {"sliding_attention"})
    if not window or getattr(config, "use_sliding_window", True) is False or "sliding_attention" not in kinds:
        return additive(seen)
    sliding = additive(seen & (age < window))
    return {"full_attention": additive(seen), "sliding_attention": sliding} if len(kinds) > 1 else sliding


def head_module(model) -> torch.nn.Module:
    """Find the output embedding of the model, tied or not."""
    module = base_causal_lm(model).get_output_embeddings()
    if module is None:
        raise UserError(f"{type(base_causal_lm(model)).__name__} has no LM head; use a causal LM")
    return module


def head(model) -> Head:
    """Read the LM head off the model, as the kernels take it."""
    config, module = base_causal_lm(model).config.get_text_config(), head_module(model)

    def number(name: str, default: float) -> float:
        return float(getattr(config, name, None) or default)

    scale = number("logit_scale", 1.0) * number("lm_head_multiplier", 1.0) / number("logits_scaling", 1.0)
    softcap = number("final_logit_softcapping", 0.0) or number("logits_soft_cap", 0.0)
    return Head(module.weight, getattr(module, "bias", None), softcap, scale)
