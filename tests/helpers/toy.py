"""Toy problems, options and readers of run folders for the tests of the loops."""

import json
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from minimath.config.schema import EvalConfig, SFTConfig
from minimath.models.policy import Policy, load_policy


def write_problems(path: Path, n: int = 24, seed: int = 0) -> str:
    """n sums as problem, solution, answer rows of a jsonl file; short, to be quick."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(n):
            a, b = rng.randint(2, 40), rng.randint(2, 40)
            extra = " So we add them." * rng.randint(0, 2)  # solutions of different lengths
            file.write(
                json.dumps(
                    {
                        "id": f"p{i}",
                        "problem": f"Tom has {a} apples and buys {b} more. How many?",
                        "solution": f"{a} + {b} = {a + b}.{extra} \\boxed{{{a + b}}}",
                        "answer": str(a + b),
                    }
                )
                + "\n"
            )
    return str(path)


def ending_model(base, folder: Path) -> str:
    """A copy of a tiny model that has many end tokens: a random one would hardly ever stop by itself."""
    shutil.copytree(base, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": list(range(20, 60))}))
    return str(folder)


def even(text, example) -> bool:
    """In place of an answer: a random model gives none."""
    return sum(text.encode()) % 2 == 0


def parity(text, example) -> bool:
    """Problems with an odd answer are never solved: no signal there."""
    return int(example.answer) % 2 == 0 and even(text, example)


def never(text, example) -> bool:
    return False


def make_config(cls, model: str, **options):
    """A config for CPU and fp32, where results are exact."""
    return cls(
        **{"model": model, "device": "cpu", "dtype": "fp32", "prompt_template": "{problem}", **options}
    )


def load(folder, cls=None, *, train: bool = False, **options):
    """(model, tokenizer) of a tiny model folder on CPU in fp32; cls: SFTConfig to train, else EvalConfig."""
    policy = policy_of(folder, cls, train=train, **options)
    return policy.model, policy.tokenizer


def policy_of(folder, cls=None, *, train: bool = False, **options) -> Policy:
    """The policy of a tiny model folder on CPU in fp32; cls: SFTConfig to train, else EvalConfig."""
    torch.manual_seed(0)
    return load_policy(make_config(cls or (SFTConfig if train else EvalConfig), str(folder), **options), train=train)


def wake_adapter(model, scale: float = 0.1, seed: int = 1) -> None:
    """Give lora_B random values: at its initial zeros an adapter changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.copy_(scale * torch.randn(param.shape, generator=generator))


def metrics(run_dir, *names: str) -> list[dict]:
    """The records of metrics.jsonl, of the given names if any."""
    records = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    return [{name: record.get(name) for name in names} for record in records] if names else records


def without_times(records: list[dict]) -> list[dict]:
    """The records without what depends on the clock."""
    return [{k: v for k, v in r.items() if not k.startswith("time/") and "seconds" not in k} for r in records]


def adapter(run_dir) -> dict[str, torch.Tensor]:
    """Tensors of the saved adapter."""
    return load_file(Path(run_dir, "adapter", "adapter_model.safetensors"))


def same_tensors(a: dict, b: dict) -> bool:
    """Whether two sets of tensors are bitwise equal."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def before_call(monkeypatch, where, name, number, how):
    """Calls how() once, before the number-th call of where.name."""
    function, calls = getattr(where, name), [0]

    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number:
            how()
        return function(*args, **kwargs)
    monkeypatch.setattr(where, name, counted)
