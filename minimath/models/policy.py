"""The one model in memory with its tokenizer: policy, reference, judge and evaluated model are all this."""
from dataclasses import dataclass

import torch

from minimath.config.schema import ModelOptions, PromptOptions
from minimath.data.chat import eos_ids, prompt_ids
from minimath.models.load import base_causal_lm, load_model


@dataclass(eq=False)
class Policy:
    """A causal LM, with or without an adapter, and how problems are put to it."""
    model: torch.nn.Module
    tokenizer: object
    options: ModelOptions
    prompt: PromptOptions

    @property
    def device(self) -> torch.device:
        return base_causal_lm(self.model).device

    @property
    def params(self) -> list[torch.nn.Parameter]:
        """The parameters that train."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def eos(self) -> list[int]:
        """Ids that end a completion."""
        return eos_ids(self.tokenizer, self.model)

    def prompt_ids(self, problem: str) -> list[int]:
        """Encode the prompt of a problem, up to where the solution begins."""
        return prompt_ids(self.tokenizer, problem, system=self.prompt.system,
                          prompt_template=self.prompt.prompt_template)

    def decode(self, ids: list[int]) -> str:
        """Decode tokens to text without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def load_policy(cfg, *, train: bool) -> Policy:
    """Load model, adapter and tokenizer of a stage's config. Raises UserError."""
    model, tokenizer = load_model(cfg, train=train)
    return Policy(model, tokenizer, cfg.model, cfg.prompt)
