"""Run folders with adapters that do something, for the tests of minimath export."""
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from minimath.config.load import config_text
from minimath.config.schema import SFTConfig
from minimath.core.checkpoint import save_adapter
from minimath.data.chat import prompt_ids
from minimath.models.load import load_model

SMALL = ["device=cpu", "drift_problems=2", "drift_tokens=6"]
PLAIN = "{problem}"


def awake_run(folder: Path, base, *, size: float = 0.1, **options) -> Path:
    """A run folder of minimath's with an adapter that does something: B is drawn with deviation `size`."""
    cfg = SFTConfig(model=str(base), device="cpu", dtype="fp32", lora_r=4, lora_alpha=8.0, prompt_template=PLAIN,
                    **options)
    model, _ = load_model(cfg, train=True)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=size)
    save_adapter(model, folder / "adapter")
    (folder / "config.yaml").write_text(config_text(cfg), encoding="utf-8")
    return folder


def live(run: Path, **options):
    options = yaml.safe_load((run / "config.yaml").read_text()) | {"adapter": str(run)} | options
    return load_model(SFTConfig(**options), train=False)


def texts_of(tokenizer, count: int = 3):
    return [(prompt_ids(tokenizer, f"Tom has {n} apples and buys 7 more. How many?", prompt_template=PLAIN),
             list(range(20 + n, 30 + n))) for n in range(count)]


def in_bf16(folder: Path, base) -> Path:
    """The tiny model saved in bf16, as released models are."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder
