"""What a training step launches and moves on a card, before the layers were fused and after, by counting.

    python -m bench.step                       # the models below, bf16 and NF4, 4096 tokens in rows of 512
    python -m bench.step --models Qwen/Qwen2.5-0.5B --cards "RTX 3090"

Needs no GPU. The step's own code runs on tensors without data, as the planner runs it (minimath.plan.footprint), with
transformers' and peft's layers under autocast and with ours; the difference between three layers and two is a layer.
Rules of the count:

- An operation that makes or changes numbers is one launch and moves its inputs and outputs once; views are none. One on
  a list is one launch, or one for each tensor where strides are not alike.
- A function of kernels/elementwise.py is one launch: its Triton kernel.
- 4-bit weights are dequantised once for each product with them: one launch, half a byte read and two written a weight.
- Attention is without a mask and causal (flash): one launch each way, half of the products, five in backward.
- A step has the embedding, the last norm and the loss (bench.work's count of ours), too, not the optimizer.

An operation takes at least its flops at the card's full rate, its bytes at the full bandwidth, and 2 microseconds: the
sum is a bound, not a forecast. "kept" is what a layer holds for the backward pass. Writes step.json to bench/results.
"""
import argparse
import functools
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.cards import CARDS, Card, Head
from bench.measure import RESULTS, positive, told_path, write_rows
from bench.roofline import BUILT_IN, parse_card
from bench.work import POLICY_LAUNCHES, Pass, ours
from minimath.config.schema import SFTConfig
from minimath.kernels import elementwise
from minimath.models import linears, load
from minimath.models.forward import base_causal_lm, compute_dtype
from minimath.models.fused import fused_layers
from minimath.plan.footprint import ONE_PASS, Model
from minimath.plan.needs import Planner

MODELS = ("HuggingFaceTB/SmolLM2-135M", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-7B")
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm")
NOTHING = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "lift_fresh")
ROW = 512  # tokens
BYTES_4BIT = 0.5


def tensors_of(tree) -> list[torch.Tensor]:
    return [each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)]


def moved(tensors: list[torch.Tensor]) -> int:
    """Count the bytes of tensors, what is expanded once."""
    return sum(t.itemsize * functools.reduce(lambda n, d: n * (d[0] if d[1] else 1), zip(t.shape, t.stride()), 1)
               for t in tensors)


class Launches(TorchDispatchMode):
    """Count passes by direction; quantised: weights of matrices to dequantise, by storage."""

    def __init__(self, quantised: dict[int, int]):
        super().__init__()
        self.quantised, self.passes, self.backward = quantised, Counter(), False

    def note(self, name: str, hbm: float, flops: float = 0, launches: int = 1) -> None:
        self.passes[self.backward, Pass(name, flops, True, hbm, 0, launches)] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, alias = func._schema.name.removeprefix("aten::"), [each.alias_info for each in func._schema.returns]
        if func.namespace != "aten" or name in NOTHING or any(each and not each.is_write for each in alias):
            return out
        inputs, outputs = tensors_of((args, kwargs)), tensors_of(out)
        flops, launches = 0, 1
        if name in PRODUCTS:  # the factors come last
            a, b = inputs[-2:]
            flops = 2 * a.numel() * b.shape[-1]
            for each in (a, b):
                if weights := self.quantised.get(each.untyped_storage()._cdata):
                    self.dequantise(weights)
        elif "scaled_dot_product" in name:
            q, k, *_ = inputs[1:] if "backward" in name else inputs
            flops = (5 if "backward" in name else 2) * q.numel() * k.shape[-2]  # of 2 q k: half is causal
        elif name.startswith("_foreach"):
            launches = 1 if all(t.is_contiguous() for t in inputs) else len(tensors_of(args[0]))
        self.note(name, moved((inputs[1:] if name == "copy_" else inputs) + outputs), flops, launches)
        return out

    def dequantise(self, weights: int) -> None:
        self.note("dequantise", (BYTES_4BIT + 2) * weights)

    def into(self, base, out: torch.Tensor) -> None:
        """Stand for linears.dequantise."""
        self.dequantise(base.weight.numel())

    def one_pass(self, name: str):
        """Stand for a function of elementwise: what it reads and writes, at once."""
        def call(*args, **kwargs):
            out = ONE_PASS[name](*args, **kwargs)
            self.note(name, moved(tensors_of((args, kwargs, args[0] if out is None else out))))
            return out
        return call


def trace(model: Model, layers: int, tokens: int, nf4: bool) -> Counter:
    """Count a forward and a backward pass of the model with so many layers."""
    traced = model.models[layers]
    base, row = base_causal_lm(traced), min(ROW, tokens)
    fused = fused_layers(base)
    frozen = {m.weight.untyped_storage()._cdata: m.weight.numel() for m in base.base_model.modules()
              if isinstance(m, torch.nn.Linear) and not m.weight.requires_grad} if nf4 and not fused else {}
    for group in fused.groups if fused else ():
        group.quantised = nf4
    counted = Launches(frozen)
    with model.fake, counted, compute_dtype(traced), \
            mock.patch.multiple(linears, dequantise=counted.into, _SCRATCH={}), \
            mock.patch.dict(vars(elementwise), {name: counted.one_pass(name) for name in ONE_PASS}):
        ids = torch.empty(tokens // row, row, dtype=torch.long)
        hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
        counted.backward = True
        hidden.sum().backward()
    return counted.passes


def count(name: str, tokens: int, quant: str, fused: bool) -> tuple[dict, list[tuple[Pass, int]], Model]:
    """Count a layer, and the passes of a step without the loss."""
    cfg = SFTConfig(model=name, quant=quant, dtype="bf16", attn="flash_attention_2", device="cpu")
    with mock.patch.object(load, "fuse", load.fuse if fused else lambda model: "off"):
        model = Planner(name, "cuda").model(cfg)
    few, *_, more = model.models
    kept = [model.follow(model.models[n], tokens, 1)[0] for n in (few, more)]
    whole, layer = (trace(model, n, tokens, quant == "nf4") for n in (few, more))
    layer.subtract(whole)
    layer = {each: times / (more - few) for each, times in layer.items()}
    whole.update({each: times * (model.layers - few) for each, times in layer.items()})
    found = {"kept bytes a token": (kept[1] - kept[0]) / tokens / (more - few)}
    for way, backward in (("forward", False), ("backward", True)):
        mine = [(each, times) for (back, each), times in layer.items() if back == backward]
        for key, of in (("launches", lambda p: p.launches), ("MB", lambda p: p.hbm / 1e6),
                        ("GFLOP", lambda p: p.flops / 1e9)):
            found[f"{way} {key}"] = round(sum(of(each) * times for each, times in mine), 2)
    passes = [(each, times) for (_, each), times in whole.items()]
    return found | {"launches a step": round(sum(p.launches * n for p, n in passes))}, passes, model


def row_of(name: str, quant: str, tokens: int, cards: list[Card]) -> dict:
    """Count a model before and after, and bound the time of a step on each card."""
    row = {"model": name.split("/")[-1], "weights": {"none": "bf16"}.get(quant, quant), "tokens": tokens,
           "row": min(ROW, tokens), "ms": {card.name: {} for card in cards}}
    for when, fused in (("before", False), ("after", True)):
        row[when], passes, model = count(name, tokens, quant, fused)
        for card in cards:
            head = Head(name, *reversed(model.head.shape))
            loss = ours(card, head, tokens, *BUILT_IN, POLICY_LAUNCHES).seconds(card)
            flops = sum(p.flops * n for p, n in passes)
            row["ms"][card.name] |= {key: round(1e3 * seconds, 2) for key, seconds in (
                ("loss", loss), (when, loss + sum(p.seconds(card) * n for p, n in passes)),
                ("products", loss + flops / card.tensor_flops))}
    return row


def show(rows: list[dict], cards: list[Card], console: Console) -> None:
    """Print a layer's counts, then the bounds of a step."""
    keys = [f"{way} {what}" for what in ("launches", "MB") for way in ("forward", "backward")]
    keys += ["kept bytes a token", "launches a step"]
    layers = Table("model", "weights", *keys, title="a layer, before -> after; launches a step: without the loss")
    times = Table("card", *(f"{row['model']} {row['weights']}" for row in rows),
                  title="least ms of a step, before -> after (of it the products and the loss)")
    for row in rows:
        layers.add_row(row["model"], row["weights"], *(
            f"{row['before'][key]:.0f} -> {row['after'][key]:.0f}" for key in keys))
    for card in cards:
        times.add_row(card.name, *(f"{ms['before']:.0f} -> {ms['after']:.0f} ({ms['products']:.0f})"
                                   for ms in (row["ms"][card.name] for row in rows)))
    console.print(layers, times)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="folders, or of shapes.json")
    parser.add_argument("--cards", nargs="+", type=parse_card, default=list(CARDS), metavar="NAME")
    parser.add_argument("--tokens", type=positive, default=4096, help=f"of a pass, in rows of {ROW}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the json")
    options = parser.parse_args(words)
    transformers.utils.logging.set_verbosity_error()
    rows = [row_of(name, quant, options.tokens, options.cards) for name in options.models for quant in ("none", "nf4")]
    show(rows, options.cards, Console(width=172))
    write_rows(options.out / "step.json", rows)
    print(f"wrote {told_path(options.out / 'step.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
