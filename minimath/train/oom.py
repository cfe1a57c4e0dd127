"""A training step in the memory there is: after an out-of-memory it is done again in smaller forward passes."""
from collections.abc import Callable

import torch

from minimath.core.errors import UserError
from minimath.core.state import restore_rng, rng_state
from minimath.models.memory import is_out_of_memory

MOST_HALVINGS = 3  # of micro_batch_tokens in a run: what does not fit in an eighth needs other settings
BEAR_ON_MEMORY = ("micro_batch_tokens", "model", "device", "dtype", "quant", "attn", "liger", "optimizer", "lora_r",
                  "gradient_checkpointing", "packing", "max_len", "max_new_tokens", "shard")


class MicroBatchBudget:
    """Bounds the tokens of a forward pass: halved when memory runs out, for good."""

    def __init__(self, cfg, params, say: Callable[[str], None]):
        self.cfg, self.params, self.say = cfg, params, say
        self.micro_batch_tokens, self.halved = cfg.optimizer.micro_batch_tokens, 0

    def retry_on_oom(self, work: Callable[[int], object], lengths: list[int]):
        """Call work, and again with half of micro_batch_tokens when memory runs out.

        The gradient is cleared and the random generators are set back: the result is that of a step which
        began with fewer tokens. lengths: tokens of each row. Raises UserError, with the settings to try, after
        MOST_HALVINGS in a run, or when a single row does not fit.
        """
        generators = rng_state()
        while True:
            try:
                return work(self.micro_batch_tokens)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.cfg.model.shard:  # the others are in the midst of a pass that needs this process's weights
                    raise UserError(f"out of memory: try {settings_to_try(self.cfg)}, then resume=true") from error
            # only here, where the exception no longer holds the activations of the failed pass
            for param in self.params:
                param.grad = None
            restore_rng(*generators)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._halve(lengths)

    def _halve(self, lengths: list[int]) -> None:
        most = min(self.micro_batch_tokens, sum(lengths))  # a pass that held the whole step held no more
        if self.halved >= MOST_HALVINGS or most <= max(lengths):
            raise UserError(f"out of memory with micro_batch_tokens={self.micro_batch_tokens}, after {self.halved} "
                            f"halvings; the longest row has {max(lengths)} tokens. Try {settings_to_try(self.cfg)}, "
                            "then resume=true")
        self.micro_batch_tokens, self.halved = most // 2, self.halved + 1
        self.say(f"out of memory with {most} tokens in a forward pass: going on with micro_batch_tokens={most // 2}, "
                 "which gives the same gradient in smaller pieces")

    def state_dict(self) -> dict:
        return {"micro_batch_tokens": self.micro_batch_tokens, "halved": self.halved, "options": self._options()}

    def load_state_dict(self, state: dict) -> None:
        """Take over what was learned, unless options that bear on memory changed."""
        if state["options"] == self._options():
            self.micro_batch_tokens, self.halved = state["micro_batch_tokens"], state["halved"]

    def _options(self) -> dict:
        return {name: value for name, value in self.cfg.to_dict().items() if name in BEAR_ON_MEMORY}


def settings_to_try(cfg) -> str:
    """List the options that shrink a step and are not used yet, the cheapest first."""
    tries = [] if cfg.optimizer.gradient_checkpointing else ["gradient_checkpointing=true"]
    tries += ["attn=sdpa"] if cfg.model.attn == "eager" else []
    tries += ["quant=nf4"] if cfg.model.quant == "none" else []
    longest = "max_len" if hasattr(cfg, "max_len") else "max_new_tokens"
    tries += [f"a lower {name} (now {cfg.value(name)})" for name in (longest, "micro_batch_tokens")]
    return ", ".join(tries) + ", or a smaller model"
