"""The optimizer: one step takes a batch and a closure, and spares the loops everything that is not the loss.

8-bit and paged optimizers come from bitsandbytes (arXiv 2110.02861, 2305.14314). Tensors below 4,096 elements keep
32-bit state there: with low ranks on a small model `adamw8bit` saves little.
"""
import math
from collections.abc import Callable, Iterable

import torch

from minimath.config.schema import OptimizerOptions
from minimath.core import dist
from minimath.core.errors import UserError, is_out_of_memory
from minimath.core.state import on_cpu, optimizer_state, restore_optimizer, restore_rng, rng_state
from minimath.core.threads import follow_load
from minimath.models.memory import give_back
from minimath.models.policy import Policy

BITSANDBYTES = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit", "paged_adamw32bit": "PagedAdamW32bit"}
BAD_STEPS = 3  # non-finite steps in a row that end a run
MOST_HALVINGS = 3  # of micro_batch_tokens in a run: what does not fit in an eighth needs other settings
BEAR_ON_MEMORY = ("micro_batch_tokens", "model", "device", "dtype", "quant", "attn", "compile", "optimizer", "lora_r",
                  "gradient_checkpointing", "offload", "packing", "max_len", "max_new_tokens", "shard")

INTACT = ("earlier checkpoints are intact: try a lower lr, max_grad_norm=1, a longer warmup, dtype=bf16 or fp32, then "
          "resume=true")

Closure = Callable[[list[int], dict], tuple[torch.Tensor, dict[str, torch.Tensor]]]


class Optimizer:
    """Trains the adapter by AdamW, with loss scale, memory retry and clipping."""

    def __init__(self, policy: Policy, cfg, say: Callable[[str], None]):
        self.cfg, self.say, self.params = cfg, say, policy.params
        self.inner = make_optimizer(self.params, cfg.optimizer)
        self.scale = LossScale(policy.model)
        self.micro_batch_tokens, self.halved = cfg.optimizer.micro_batch_tokens, 0  # of a forward pass; in this run
        self.lr = cfg.optimizer.lr  # of the next step; the trainer follows the schedule
        self.bad = self.skipped = 0  # steps that were not finite: in a row, and of the run
        self.taken = 0  # steps since the last commit
        self.several = getattr(cfg, "updates_per_rollout", 1) > 1  # steps between two commits
        self.before = None  # weights and moments at the last commit, where several steps follow

    def step(self, batch, loss_of_micro_batch: Closure) -> dict:
        """Take one step of the loss summed over micro-batches; return the metrics.

        batch: has `lengths`, the tokens of this process's rows, `trained_tokens` of the whole step, and
        `micro_batches(most)`, which yields (indices, tensors) of at most `most` tokens. loss_of_micro_batch(indices,
        tensors) -> (loss (), already divided by what the whole step is divided by, and figures () by name: sums over
        the trained tokens, whose means are the metrics). Nothing is read from the device before all is launched. A step
        whose loss or gradient is not finite changes no weight; UserError after BAD_STEPS of them in a row."""
        device, totals = self.params[0].device, {}
        wide = torch.float32 if device.type == "mps" else torch.float64  # which has no fp64

        def forward_backward(micro_batch_tokens: int) -> tuple[tuple[str, ...], torch.Tensor | None]:
            names, sums = (), None
            for indices, tensors in batch.micro_batches(micro_batch_tokens):
                follow_load(device, self.say)
                loss, figures = loss_of_micro_batch(indices, tensors)
                (loss * self.scale.value).backward()
                new = torch.stack([loss.detach(), *figures.values()]).to(wide)
                new[1:] /= batch.trained_tokens
                names, sums = ("loss", *figures), new + (0.0 if sums is None else sums)
                del loss  # and with it masks and whatever else hangs on its graph, before the next forward pass
            return names, sums

        def read(norm: torch.Tensor) -> float:
            """Take totals and norm off the device; NaN where the loss is not: a finite gradient means nothing then."""
            if sums is not None:
                *values, norm = torch.cat([sums, norm.to(sums)[None]]).tolist()  # all in one copy
                totals.update(zip(names, values, strict=True))
            totals.update(dist.all_reduce_sum(totals))
            return float(norm) if math.isfinite(totals.get("loss", 0.0)) else math.nan

        names, sums = self.retry_on_oom(forward_backward, batch.lengths)
        dist.all_reduce_gradients(self.params)
        norm, stepped = clip_and_step(self.inner, self.params, self.cfg.optimizer.max_grad_norm, self.lr,
                                      scale=self.scale.value, read=read)
        self.taken += 1
        return totals | self._count(norm, stepped, totals["loss"])

    def skip_step(self, *, finite: bool) -> dict:
        """Count a step without a batch: not finite if samples come from NaN logits."""
        same = {"optim/lr": self.lr, "optim/skipped": self.skipped}
        return same if finite else self._count(math.nan, False, math.nan)

    def _count(self, norm: float, stepped: bool, loss: float) -> dict:
        """Count a step and return its metrics; overflow of the fp16 scale is no fault."""
        overflow = math.isfinite(loss) and self.scale.update(stepped)
        self.bad = 0 if overflow or math.isfinite(norm) else self.bad + 1
        self.skipped += not stepped
        if self.bad >= BAD_STEPS:
            raise UserError(f"loss or gradient was not finite in {self.bad} steps in a row; they changed no weight and "
                            f"{INTACT}")
        if self.bad:
            self.say(f"loss or gradient is not finite, no weight was changed ({self.bad} such in a row; {BAD_STEPS} "
                     "end the run)")
        return {"optim/lr": self.lr, "optim/grad_norm": norm, "optim/stepped": float(stepped),
                "optim/skipped": self.skipped}

    def retry_on_oom(self, work: Callable[[int], object], lengths: list[int]):
        """Call work with micro_batch_tokens, and again with half of them, for good, when memory runs out.

        The gradient is cleared and the random generators are set back: the result is that of a step which
        began with fewer tokens. lengths: tokens of each row. Raises UserError, with the settings to try, after
        MOST_HALVINGS in a run, or when a single row does not fit."""
        generators = rng_state()
        while True:
            try:
                return work(self.micro_batch_tokens)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # only here, where the exception no longer holds the activations of the failed pass
            if self.cfg.model.shard:  # the others are in the midst of a pass that needs this process's weights
                raise UserError(f"out of memory: try {settings_to_try(self.cfg)}, then resume=true")
            for param in self.params:
                param.grad = None
            restore_rng(*generators)
            give_back()
            most = min(self.micro_batch_tokens, sum(lengths))  # a pass that held the whole step held no more
            if self.halved >= MOST_HALVINGS or most <= max(lengths):
                raise UserError(f"out of memory with micro_batch_tokens={self.micro_batch_tokens}, after {self.halved} "
                                f"halvings; the longest row has {max(lengths)} tokens. Try "
                                f"{settings_to_try(self.cfg)}, then resume=true")
            self.micro_batch_tokens, self.halved = most // 2, self.halved + 1
            self.say(f"out of memory with {most} tokens in a forward pass: going on with "
                     f"micro_batch_tokens={most // 2}, which gives the same gradient in smaller pieces")

    # ---- weights and moments

    def snapshot(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Copy weights and moments: tensors on the CPU, and what `restore` needs besides."""
        moments, numbers = optimizer_state(self.inner)
        weights = on_cpu({f"weight.{i}": p for i, p in enumerate(self.params)})
        return weights | {f"moment.{name}": value for name, value in moments.items()}, numbers

    @torch.no_grad()
    def restore(self, tensors: dict[str, torch.Tensor], numbers: dict, where: str) -> None:
        """Invert `snapshot`. UserError, naming `where`, for that of another optimizer."""
        for i, p in enumerate(self.params):
            p.copy_(tensors[f"weight.{i}"])
        moments = {name.removeprefix("moment."): value for name, value in tensors.items() if name.startswith("moment.")}
        restore_optimizer(self.inner, moments, numbers, where=where)

    def commit(self) -> None:
        """Take the weights as they are: what roll_back goes back to."""
        self.taken, self.before = 0, self.snapshot() if self.several else None

    def roll_back(self) -> bool:
        """Go back to the last commit; whether the weights are those of it."""
        if self.taken and self.before:
            self.restore(*self.before, where="the last step")
            self.taken = 0
        return self.taken == 0

    def state_dict(self) -> dict:
        """Counts, scales and what was learned of the memory; the checkpoint has weights and moments besides."""
        budget = {"micro_batch_tokens": self.micro_batch_tokens, "halved": self.halved, "options": self._of_memory()}
        return {"bad": self.bad, "skipped": self.skipped, "scale": self.scale.value, "good": self.scale.good,
                "budget": budget}

    def load_state_dict(self, state: dict) -> None:
        self.bad, self.skipped, budget = state["bad"], state["skipped"], state["budget"]
        self.scale.value, self.scale.good = state["scale"], state["good"]
        if budget["options"] == self._of_memory():  # else it may fit
            self.micro_batch_tokens, self.halved = budget["micro_batch_tokens"], budget["halved"]

    def _of_memory(self) -> dict:
        return {name: value for name, value in self.cfg.to_dict().items() if name in BEAR_ON_MEMORY}


def make_optimizer(params: Iterable[torch.nn.Parameter], options: OptimizerOptions) -> torch.optim.Optimizer:
    """Make AdamW over what requires a gradient; vectors get no weight decay.

    Raises UserError when nothing is trainable or bitsandbytes is needed and missing."""
    trained = [p for p in params if p.requires_grad]
    if not trained:
        raise UserError("no parameter requires a gradient: nothing to train; check lora_targets")
    groups = [{"params": [p for p in trained if p.dim() > 1], "weight_decay": options.weight_decay},
              {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if options.name == "adamw":  # over 420 small tensors a step takes 0.24 s in the default loop, 0.003 s fused
        return torch.optim.AdamW(groups, options.lr, fused=all(p.device.type in ("cpu", "cuda") for p in trained))
    try:
        from bitsandbytes import optim
    except (ImportError, OSError, RuntimeError) as error:  # without its native library: the latter
        raise UserError(f"optimizer={options.name} needs bitsandbytes, which can't be imported ({error}); use "
                        "optimizer=adamw, or: pip install bitsandbytes") from None
    return getattr(optim, BITSANDBYTES[options.name])(groups, options.lr)


@torch.no_grad()
def clip_and_step(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], max_grad_norm: float, lr: float,
                  scale: float = 1.0, read: Callable[[torch.Tensor], float] = float) -> tuple[float, bool]:
    """Clip the gradients to max_grad_norm > 0, step with lr, and clear them.

    scale: what the loss was multiplied by (LossScale); the gradients are divided by it first. read: takes the norm ()
    off the device, the one read of a step. Returns (fp32 gradient norm before clipping, as read; whether a step was
    taken): with a non-finite norm, or no gradient, weights and optimiser state stay bitwise as they were. Raises
    UserError when memory is too small for the optimiser's state."""
    grads = [p.grad for p in params if p.grad is not None]
    if scale != 1.0 and grads:
        torch._foreach_div_(grads, scale)
    norm = torch.nn.utils.get_total_norm([g.float() for g in grads])  # () fp32; no copy if fp32
    grad_norm = read(norm)
    stepped = bool(grads) and math.isfinite(grad_norm)
    if stepped:
        if max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(params, max_grad_norm, norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        try:
            optimizer.step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError("memory is too small for the optimiser's state; try optimizer=paged_adamw8bit, a lower "
                            "lora_r or fewer lora_targets") from error
    for p in params:
        p.grad = None
    return grad_norm, stepped


def settings_to_try(cfg) -> str:
    """List the options that shrink a step and are not used yet, the cheapest first."""
    tries = [] if cfg.optimizer.gradient_checkpointing else ["gradient_checkpointing=true"]
    tries += ["offload=true"] if torch.cuda.is_available() and not (cfg.optimizer.offload or cfg.model.compile) else []
    tries += ["attn=sdpa"] if cfg.model.attn == "eager" else []
    tries += ["quant=nf4"] if cfg.model.quant == "none" else []
    longest = "max_len" if hasattr(cfg, "max_len") else "max_new_tokens"
    tries += [f"a lower {name} (now {cfg.value(name)})" for name in (longest, "micro_batch_tokens")]
    return ", ".join(tries) + ", or a smaller model"


class LossScale:
    """Scales the loss for fp16, dynamically; by 1 for every other dtype.

    Activation gradients below 6e-8 vanish in fp16, so the loss is multiplied by `value` before backward. A step that
    overflows halves it; 500 good steps in a row double it. Micikevicius et al. 2017, arXiv 1710.03740."""

    def __init__(self, model: torch.nn.Module):
        self.fp16 = any(p.dtype == torch.float16 for p in model.parameters())
        self.value, self.good = (2.0 ** 14 if self.fp16 else 1.0), 0

    def update(self, stepped: bool) -> bool:
        """Adapt to a step; True when the scale overflowed, not the model."""
        if stepped:
            self.good = self.good + 1 if self.fp16 else 0
            if self.good == 500:
                self.value, self.good = self.value * 2, 0
            return False
        overflow, self.value, self.good = self.value > 1, max(1.0, self.value / 2), 0
        return overflow


@torch.no_grad()
def check_finite(params: Iterable[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError for a NaN or infinity that a checkpoint would hold."""
    tensors = [*params, *(value for state in optimizer.state.values() for value in state.values()
                          if torch.is_tensor(value) and value.is_floating_point())]
    if not math.isfinite(float(torch.nn.utils.get_total_norm([t for t in tensors if t.numel()], math.inf))):
        raise UserError("the adapter's weights or the optimiser's state hold NaN or infinities, so they are not "
                        f"saved; {INTACT}")
