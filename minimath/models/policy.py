"""The one model in memory with its tokenizer: policy, reference, judge and evaluated model are all this."""
import bisect
import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from minimath.config.schema import ModelOptions, PromptOptions
from minimath.config.trained import base_of, same_place
from minimath.core.errors import UserError
from minimath.core.hub import without_network
from minimath.core.run_folder import find_adapter, say_once
from minimath.data.chat import control_tokens, eos_ids, prompt_ids
from minimath.data.rows import Example
from minimath.data.template import CLOSE, OPEN, opens_thought
from minimath.models.forward import base_causal_lm
from minimath.models.load import add_adapter, load_model

SHAPES = {"hidden_size": "hidden size", "intermediate_size": "intermediate size", "num_hidden_layers": "layers",
          "num_attention_heads": "heads", "num_key_value_heads": "key heads", "vocab_size": "vocabulary"}


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
        return [p for p in self.model.parameters() if p.requires_grad]

    def trainable(self) -> set[str]:
        """Name the tensors that train."""
        return {name for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def eos(self) -> list[int]:
        """Ids that end a completion."""
        return eos_ids(self.tokenizer, self.model)

    def prompt_ids(self, problem: str | Example) -> list[int]:
        """Encode the prompt of a problem, up to where the solution begins."""
        return self.known(prompt_ids(self.tokenizer, problem, **self.prompt.asked()))

    def known(self, ids: list[int]) -> list[int]:
        """Return ids; UserError where the embedding has no row for one."""
        if max(ids, default=0) >= self.model.get_input_embeddings().weight.shape[0]:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(f"token {token!r} has no row in the embedding of {self.options.name}: its tokenizer was "
                            "changed after the model was saved; take the old one, or resize and train the embedding")
        return ids

    def decode(self, ids: list[int]) -> str:
        """Decode tokens to text without special tokens and what ends the turn."""
        ids = ids[:-1] if ids and ids[-1] in self.eos else ids  # not every token that ends a turn is called special
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def thought_tokens(self, ids: list[int], text: str) -> int:
        """Count the tokens of a completion up to the end of its thought.

        text: what `decode` makes of them. All, where the thought does not end; 0 where there is none."""
        close, _ = control_tokens(self.tokenizer).get(CLOSE, (None, False))
        if close in ids:
            return ids.index(close) + 1
        if CLOSE not in text:
            begun = opens_thought(self.tokenizer, self.prompt.thinking, self.prompt.template_args)
            return len(ids) if begun or text.lstrip().startswith(OPEN) else 0
        return bisect.bisect_left(range(len(ids)), True, key=lambda n: CLOSE in self.decode(ids[:n]))

    def add_adapter(self, folder: Path, name: str) -> None:
        """Load a saved LoRA adapter, frozen and not active, beside the policy's. Raises UserError."""
        refuse_other_base(base_of(folder), self.options.name, f"the adapter in {folder}")
        self.model = add_adapter(self.model, folder, name)


def refuse_other_base(trained_on: str, given: str, adapter: str) -> None:
    """Raise UserError when an adapter's base has other shapes; warn of another name."""
    shapes, differing = [], []
    if trained_on in ("", given) or same_place(trained_on, given):
        return
    with contextlib.suppress(Exception):  # moved away, needs the model's own code, or is refused
        for name in (trained_on, given):
            _ = os.path.isdir(name) or without_network()
            config = AutoConfig.from_pretrained(name).get_text_config()
            shapes.append({name: getattr(config, name, None) for name in SHAPES})
        differing = [name for name in SHAPES if shapes[0][name] != shapes[1][name]]
    if differing:
        its, others = (", ".join(f"{SHAPES[name]} {shape[name]}" for name in differing) for shape in shapes)
        raise UserError(f"{adapter} was trained on {trained_on} ({its}) and can't fit model={given} ({others}): leave "
                        "model= out, or give that base")
    say_once(f"warning: model={given}, but {adapter} was trained on {trained_on}")


def load_policy(cfg, *, train: bool) -> Policy:
    """Load model, adapter and tokenizer of a stage's config. Raises UserError."""
    if cfg.adapter.path:
        refuse_other_base(base_of(find_adapter(cfg.adapter.path)), cfg.model.name, f"adapter={cfg.adapter.path}")
    model, tokenizer = load_model(cfg, train=train)
    return Policy(model, tokenizer, cfg.model, cfg.prompt)
