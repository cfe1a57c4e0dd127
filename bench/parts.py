"""Where the time of an SFT step goes, and how far it is from the bound that its matrix products set.

    python -m bench.parts                 # SmolLM2-135M, bf16, 8 made problems a step, this machine's CPU
    python -m bench.parts --data FILE     # other problems, as minimath sft reads them

Two variants take turns, each a whole `update` of train.sft: `fused` is what runs; `plain` has transformers' layers with
peft's, padded, as minimath was before them. By torch's profiler, the operators' own time in groups; `rest` is Python,
autograd and what waits. bound: flops of the frozen layers' products (forward, and the gradient of their input) and of
the head (4 V D a trained token) at the rate that one 2048-cubed product of the same type reached just before. share:
bound against the step's time without the profiler. Medians; writes bench/results/parts-cpu.json.
"""
import json
import statistics
import sys
import time
from pathlib import Path

import minimath.core.entry  # noqa: F401  before torch: it sets how long threads spin
from bench import train
from bench.measure import RESULTS, machine, positive

GROUPS = {"products": ("aten::mm", "aten::addmm", "mkldnn"), "attention": ("aten::bmm", "aten::baddbmm", "softmax"),
          "mul, add": ("aten::mul", "aten::add", "aten::sub", "aten::div", "aten::pow", "aten::neg", "aten::sum",
                       "aten::mean", "aten::rsqrt"),
          "activation, norm": ("silu", "sigmoid", "aten::linalg_vector_norm", "aten::exp"),
          "copies, casts": ("aten::copy_", "aten::cat", "aten::fill_", "aten::stack", "aten::index", "aten::zero")}


def parse(words: list[str] | None = None):
    parser = train.common_parser("parts", __doc__, peers=False)
    parser.add_argument("--data", default="", help="problems with solutions; default: made ones")
    parser.add_argument("--batch-size", type=positive, default=8)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--steps", type=positive, default=2, help="of each variant in a round")
    return parser.parse_args(words)


def product_rate(dtype) -> float:
    """Measure the flops a second of one large product."""
    import torch
    x = torch.randn(2048, 2048).to(dtype)
    best = 1e9
    for _ in range(5):
        started = time.perf_counter()
        _ = x @ x
        best = min(best, time.perf_counter() - started)
    return 2 * 2048 ** 3 / best


class Variant:
    """An SFT policy whose decoder layers are fused, or those of transformers and peft."""

    def __init__(self, options, model: str, examples, *, fused: bool):
        from minimath.config.schema import SFTConfig
        from minimath.core.state import seed_rng
        from minimath.models import load
        from minimath.models.policy import load_policy
        from minimath.train.optimizer import Optimizer
        from minimath.train.sft import encode_examples
        self.cfg = SFTConfig(model=model, data=[{}], device="cpu", dtype=options.dtype, packing=fused,
                             batch_size=options.batch_size, micro_batch_tokens=options.micro_batch_tokens)
        fuse = load.fuse
        load.fuse = fuse if fused else lambda model: "for the comparison"
        seed_rng(0)
        self.policy, load.fuse = load_policy(self.cfg, train=True), fuse
        self.optimizer, self.taken = Optimizer(self.policy, self.cfg, print), 0
        self.rows = encode_examples(self.cfg, self.policy, examples, lambda text: None)

    def step(self) -> tuple[float, int, int]:
        """Take a step; return its seconds, tokens and trained tokens."""
        from minimath.train.sft import update
        size = self.cfg.batch_size
        batch = [self.rows[(self.taken * size + i) % len(self.rows)] for i in range(size)]
        self.taken += 1
        started = time.perf_counter()
        tokens = update(self.policy, self.optimizer, batch, packing=self.cfg.packing)["data/tokens"]
        return time.perf_counter() - started, tokens, sum(sum(row.loss_mask[1:]) for row in batch)

    def flops(self, tokens: int, trained: int) -> float:
        from minimath.models.forward import base_causal_lm, head
        from minimath.models.linears import is_linear
        base, weight = base_causal_lm(self.policy.model), head(self.policy.model).weight
        layers = sum(m.weight.numel() for m in base.base_model.modules()
                     if is_linear(m) and not m.weight.requires_grad)
        return 4 * layers * tokens + 4 * weight.numel() * trained

    def shares(self) -> dict[str, float]:
        """Profile a step: the share of its time by group."""
        import torch
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            self.step()
        events, found = profiler.key_averages(), dict.fromkeys([*GROUPS, "rest"], 0.0)
        for event in events:
            name = next((g for g, words in GROUPS.items() if any(word in event.key for word in words)), "rest")
            found[name] += event.self_cpu_time_total
        return {name: value / sum(found.values()) for name, value in found.items()}


def run(options, model: str) -> None:
    from minimath.config.schema import DataOptions
    from minimath.data.examples import load_examples
    from minimath.data.problems import make_problems
    from minimath.models.load import DTYPES
    examples = load_examples(DataOptions(source=options.data, limit=400), need=("solution",))[0] if options.data else \
        make_problems(400, seed=0)
    facts = machine("cpu", ("transformers", "peft")) | {"data": Path(options.data).name or "made problems"}
    variants = {name: Variant(options, model, examples, fused=name == "fused") for name in ("fused", "plain")}
    taken, rates = {name: [] for name in variants}, []
    for number in range(1 + options.rounds):
        rates.append(product_rate(DTYPES[options.dtype]))
        for name, variant in variants.items():
            steps = [variant.step() for _ in range(options.steps)]
            taken[name] += steps if number else []  # the first round warms up
    rows = []
    for name, variant in variants.items():
        per_token = statistics.median(seconds / tokens for seconds, tokens, _ in taken[name])
        flops = sum(variant.flops(tokens, trained) for _, tokens, trained in taken[name])
        bound = flops / sum(tokens for _, tokens, _ in taken[name]) / statistics.median(rates)  # seconds a token
        rows.append({"step": name, "tokens/s": 1 / per_token, "bound tokens/s": 1 / bound, "share": bound / per_token,
                     "by group": variant.shares()})
        print(f"{name}: {1 / per_token:.0f} tokens/s, {bound / per_token:.0%} of the bound; "
              + ", ".join(f"{group} {share:.0%}" for group, share in rows[-1]["by group"].items()))
    print(f"fused is {rows[0]['tokens/s'] / rows[1]['tokens/s']:.2f} times as fast; one large product: "
          f"{statistics.median(rates) / 1e9:.0f} GFLOP/s")
    path = options.out or (None if options.tiny else RESULTS / "parts-cpu.json")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        result = facts | {"product GFLOP/s": [rate / 1e9 for rate in rates], "steps": taken, "summary": rows}
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main(words: list[str] | None = None) -> int:
    return train.run_on_model(parse(words), run, "")


if __name__ == "__main__":
    sys.exit(main())
