"""Optimisers by name, the learning-rate schedule, and a step that a non-finite gradient can't spoil.

8-bit and paged optimisers come from bitsandbytes (8-bit block-wise states: Dettmers et al. 2021, arXiv
2110.02861; paging: QLoRA, arXiv 2305.14314). Tensors below 4,096 elements keep 32-bit state there, so with
low ranks on a small model `adamw8bit` saves little.
"""
import math
from collections.abc import Iterable

import torch

from minimath.config.schema import AdapterConfig
from minimath.core.errors import UserError

BITSANDBYTES = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit",
                "paged_adamw32bit": "PagedAdamW32bit"}
BAD_STEPS = 3  # non-finite steps in a row that end a run


def make_optimizer(params: Iterable[torch.nn.Parameter], cfg: AdapterConfig) -> torch.optim.Optimizer:
    """AdamW over the parameters that require a gradient; vectors (biases, DoRA magnitudes) get no weight
    decay.

    Raises UserError when nothing is trainable or bitsandbytes is needed and missing.
    """
    trained = [p for p in params if p.requires_grad]
    if not trained:
        raise UserError("no parameter requires a gradient: nothing to train; check lora_targets")
    matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    groups = [{"params": group, "weight_decay": decay}
              for group, decay in ((matrices, cfg.optimizer.weight_decay), (vectors, 0.0)) if group]
    options = {"lr": cfg.optimizer.lr, "betas": (cfg.beta1, cfg.beta2), "eps": 1e-8}
    if cfg.optimizer.name == "adamw":
        # An adapter is hundreds of small tensors: a step over 420 of them took 0.24 s in the default loop and
        # 0.003 s fused (2 CPU cores).
        fused = all(p.device.type in ("cpu", "cuda") for p in trained)
        return torch.optim.AdamW(groups, fused=fused, **options)
    return getattr(import_bitsandbytes(cfg.optimizer.name).optim, BITSANDBYTES[cfg.optimizer.name])(groups, **options)


def import_bitsandbytes(optimizer: str):
    """The bitsandbytes module, or UserError that says what to use instead."""
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:  # without its native library: the latter
        raise UserError(f"optimizer={optimizer} needs bitsandbytes, which can't be imported ({error}); "
                        "use optimizer=adamw, or: pip install bitsandbytes") from None
    return bitsandbytes


def lr_at(step: int, total_steps: int, *, lr: float, schedule: str, warmup: float,
          min_lr_ratio: float) -> float:
    """Learning rate of step 0 .. total_steps - 1.

    warmup below 1 is a share of the steps, from 1 on a number of them. Warm-up starts at lr / steps, not at
    0, and the decay reaches lr * min_lr_ratio one step after the last, so that no step is spent at rate 0.
    """
    warmup_steps = math.ceil(warmup * total_steps - 1e-9) if warmup < 1 else round(warmup)
    warmup_steps = min(warmup_steps, total_steps)
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))  # 0 .. 1
    if schedule == "linear":
        shape = 1 - progress
    elif schedule == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        raise ValueError(f"unknown schedule {schedule!r}")
    return lr * (min_lr_ratio + (1 - min_lr_ratio) * shape)


@torch.no_grad()
def clip_and_step(optimizer: torch.optim.Optimizer, params: Iterable[torch.nn.Parameter],
                  max_grad_norm: float, lr: float, scale: float = 1.0, loss: float = 0.0) -> tuple[float, bool]:
    """Clip the gradients to max_grad_norm (0: no clipping), step with rate lr, and clear the gradients.

    scale: what the loss was multiplied by (LossScale); the gradients are divided by it first. loss: its value, since
    one that is not finite can have a finite gradient, which means nothing.

    Returns (gradient norm before clipping, NaN when the loss is not finite; whether a step was taken). With a
    non-finite norm, or no gradient at all, weights and optimiser state stay bitwise as they were; the gradients are
    cleared all the same, since NaN added to would stay NaN. The norm is accumulated in fp32. Raises UserError when
    memory is too small for the optimiser's state.
    """
    params = list(params)
    grads = [p.grad for p in params if p.grad is not None]
    if scale != 1.0 and grads:
        torch._foreach_div_(grads, scale)
    norm = torch.nn.utils.get_total_norm([g.float() for g in grads])  # () fp32; no copy if fp32
    grad_norm = float(norm) if math.isfinite(loss) else math.nan
    stepped = bool(grads) and math.isfinite(grad_norm)
    if stepped:
        if max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(params, max_grad_norm, norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        try:
            optimizer.step()
        except torch.OutOfMemoryError as error:
            raise UserError("memory is too small for the optimiser's state; try optimizer=paged_adamw8bit, a lower "
                            "lora_r or fewer lora_targets") from error
    for p in params:
        p.grad = None
    return grad_norm, stepped


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2017, arXiv 1710.03740); 1 for every other dtype.

    Activation gradients below 6e-8 vanish in fp16, so the loss is multiplied by `value` before backward. A
    step that overflows halves it; 500 good steps in a row double it.
    """

    def __init__(self, model: torch.nn.Module):
        fp16 = any(p.dtype == torch.float16 for p in model.parameters())
        self.value, self.good = (2.0 ** 14 if fp16 else 1.0), 0

    def update(self, stepped: bool) -> bool:
        """Adapt to a step's outcome; True when it failed by overflow of the scale, not of the model."""
        if stepped:
            self.good = self.good + 1 if self.value > 1 else 0
            if self.good == 500:
                self.value, self.good = self.value * 2, 0
            return False
        overflow, self.value, self.good = self.value > 1, max(1.0, self.value / 2), 0
        return overflow


def count_bad_steps(streak: int, grad_norm: float, *, limit: int = BAD_STEPS) -> int:
    """Number of non-finite steps in a row, given the number before this step. UserError when it reaches
    limit."""
    if math.isfinite(grad_norm):
        return 0
    if streak + 1 >= limit:
        raise UserError(f"loss or gradient was not finite in {streak + 1} steps in a row; they "
                        "changed no weight and earlier checkpoints are intact: try a lower lr, dtype=bf16 "
                        "or fp32 instead of fp16, a longer warmup, then resume=true")
    return streak + 1


def count_step(state: dict, scale: LossScale, stepped: bool, grad_norm: float, loss: float, say) -> None:
    """Count an optimiser step in the loop's state: `skipped` ones of the run, `bad` ones in a row, which are said.
    UserError as in count_bad_steps. An overflow of the fp16 loss scale is no bad step; it can't spoil the loss."""
    overflow = math.isfinite(loss) and scale.update(stepped)
    state["bad"] = 0 if overflow else count_bad_steps(state["bad"], grad_norm)
    state["skipped"] += not stepped
    if state["bad"]:
        say(f"step {state['done'] + 1}: loss or gradient is not finite, no weight was changed ({state['bad']} such in "
            f"a row; {BAD_STEPS} end the run)")


@torch.no_grad()
def check_finite(params: Iterable[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError when a weight or a number of the optimiser's state is NaN or infinite: called before a
    checkpoint, so that none that can't be gone on with takes the place of a good one."""
    tensors = [*params, *(value for state in optimizer.state.values() for value in state.values()
                          if torch.is_tensor(value) and value.is_floating_point())]
    if not math.isfinite(float(torch.nn.utils.get_total_norm([t for t in tensors if t.numel()], math.inf))):
        raise UserError("the adapter's weights or the optimiser's state hold NaN or infinities, so they are not saved; "
                        "checkpoints from before are intact: try a lower lr, max_grad_norm=1, dtype=bf16 or fp32, then "
                        "resume=true, which goes on from the newest of them")
