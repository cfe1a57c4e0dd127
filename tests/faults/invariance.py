"""What must not change the numbers does not: the cutting of a step, padding, packing, the order in a batch, the fusion.

Tried on the tiny models, on one thread. A variant survives when its loss and its gradient norm are within rtol 2e-6 of
those of one row a pass, in fp32. The policy loss is a sum of terms of either sign, whose rounding goes by their size
and not by what is left of them: it may be 5e-6 off in fp32. In float64 both must be within 1e-6, which tells
rounding from a mistake (eager attention takes its softmax in fp32 all the same). A fused loss survives when value and
gradient are within 1e-5 of float64, relative to the size of its terms; a trajectory of 50 steps when each loss
is within 1e-3 of that of a run on full logits, and the mean difference within 1e-5.
"""
import random

import tiny
import torch
from harness import Tally
from toy import load, make_config, metrics, wake_adapter, write_problems

from minimath.train import rlaif as rl
from minimath.train import sft as stage1
from minimath.data.chat import Encoded
from minimath.config.schema import RLAIFConfig, SFTConfig
from minimath.kernels import linear_token_loss, reference
from minimath.train.losses import PolicyRows, nll_loss, policy_loss
from minimath.rollout.engine import Completion

RTOL = {torch.float32: 2e-6, torch.float64: 1e-6}
RTOL_SIGNED = {torch.float32: 5e-6, torch.float64: 1e-6}
LOSS_TYPES = ("dapo", "grpo", "dr_grpo", "cispo", "gspo")
FEW = ("llama", "qwen2")
EXTRAS = [{}, {"beta": 0.05}, {"beta": 0.05, "kl": "k3", "entropy_coef": 0.01}, {"clip_dual": 3.0},
          {"importance": "mask", "importance_cap": 1.1}]


def run(full: bool, folder) -> list[Tally]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order
    try:
        return counted(full, folder)
    finally:
        torch.set_num_threads(threads)


def counted(full: bool, folder) -> list[Tally]:
    families = list(tiny.FAMILIES) if full else FEW
    models = {name: load(tiny.tiny_model(folder / name, name), RLAIFConfig, train=True, attn=attn_of(name), lora_r=4)
              for name in families}
    for model, _ in models.values():
        wake_adapter(model)
    seeds = range(8 if full else 2)
    out, few = [], seeds if full else [0]
    for dtype in RTOL:
        for model, _ in models.values():
            model.to(dtype)
        out += [sft_cuts(models, seeds, dtype), policy_cuts(models, few, dtype)]
    return [*out, fused_losses(seeds), trajectories(folder, full)]


def attn_of(family: str) -> str:
    return "eager" if family == "gemma2" else "sdpa"  # its capped scores need eager attention


def norm_of(model) -> float:
    return float(torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]).norm())


def close(a: float, b: float, rtol: float) -> bool:
    return abs(a - b) <= rtol * max(abs(a), abs(b))


# ---- stage 1

def rows_of(rng: random.Random, count: int = 8) -> list[Encoded]:
    """Rows of other lengths, prompt masked."""
    rows = []
    for _ in range(count):
        prompt, answer = rng.randint(4, 12), rng.randint(1, 30)
        ids = [rng.randrange(10, 300) for _ in range(prompt + answer)]
        rows.append(Encoded(ids, [False] * prompt + [True] * answer, False))
    return rows


def sft_cuts(models: dict, seeds, dtype: torch.dtype) -> Tally:
    rtol, kind = RTOL[dtype], str(dtype).removeprefix("torch.")
    tally = Tally(f"SFT: 8x1 = 4x2 = 2x4 = 1x8, padded, packed, shuffled ({kind}, rtol {rtol:.0e})")
    for family, (model, tokenizer) in models.items():
        for seed in seeds:
            rows = rows_of(random.Random(seed))
            longest = max(len(row.ids) for row in rows)
            shuffled = random.Random(seed + 1).sample(rows, len(rows))
            variants = {f"{k} rows a pass": (rows, k * longest, False) for k in (2, 4, 8)}
            variants |= {f"packed to {k * longest}": (rows, k * longest, True) for k in (1, 3, 8)}
            variants |= {"shuffled": (shuffled, 4 * longest, False), "shuffled, packed": (shuffled, 4 * longest, True)}
            want = sft_numbers(model, tokenizer, rows, 1, False)
            for name, (batch, micro_batch_tokens, packing) in variants.items():
                got = sft_numbers(model, tokenizer, batch, micro_batch_tokens, packing)
                survived = all(close(a, b, rtol) for a, b in zip(got, want))
                tally.add(survived, f"{family}, seed {seed}, {name}: {got} for {want}")
    return tally


def sft_numbers(model, tokenizer, rows, micro_batch_tokens: int, packing: bool) -> tuple[float, float]:
    model.zero_grad()
    cfg = make_config(SFTConfig, "", micro_batch_tokens=micro_batch_tokens, packing=packing)
    loss, _ = stage1.loss_and_gradient(cfg, model, tokenizer, rows, 1.0)
    return loss, norm_of(model)


# ---- stage 2

def groups_of(rng: random.Random, model, tokenizer) -> tuple[list[Encoded], list]:
    """Two groups of four completions each, with advantages, and log-probs of a sampler that is near the policy: a ratio
    far from 1 would multiply the last bits of the log-probs."""
    rows, samples = [], []
    for _ in range(2):
        prompt = [rng.randrange(10, 300) for _ in range(rng.randint(8, 20))]
        for _ in range(4):
            ids = [rng.randrange(10, 300) for _ in range(rng.randint(1, 20))]
            rows.append(Encoded(prompt + ids, [False] * len(prompt) + [True] * len(ids), False))
    logps = rl.logps(policy_config(4096, "dapo", False), model, tokenizer, rows, range(len(rows)))
    for logp, row in zip([logps[i] for i in range(len(rows))], rows, strict=True):
        ids = row.ids[-len(logp):]
        samples.append((Completion(ids, [x + rng.gauss(0, 0.2) for x in logp.tolist()], True), rng.gauss(0, 1)))
    return rows, samples


def policy_cuts(models: dict, seeds, dtype: torch.dtype) -> Tally:
    rtol, kind = RTOL_SIGNED[dtype], str(dtype).removeprefix("torch.")
    tally = Tally(f"RLAIF: the cutting, shared prompts, the order, every loss type ({kind}, rtol {rtol:.0e})")
    for family, (model, tokenizer) in models.items():
        for seed in seeds:
            rng = random.Random(seed)
            rows, samples = groups_of(rng, model, tokenizer)
            order = rng.sample(range(len(rows)), len(rows))
            for loss_type in LOSS_TYPES:
                want = policy_numbers(model, tokenizer, rows, samples, loss_type, 1, False)
                mixed = [rows[i] for i in order], [samples[i] for i in order]
                variants = {"2 a pass": (rows, samples, 80, False), "8 a pass": (rows, samples, 4096, False),
                            "shared": (rows, samples, 4096, True), "shuffled": (*mixed, 160, False),
                            "shuffled, shared": (*mixed, 4096, True)}
                for name, (r, s, micro_batch_tokens, share) in variants.items():
                    got = policy_numbers(model, tokenizer, r, s, loss_type, micro_batch_tokens, share)
                    words = f"{family}, seed {seed}, {loss_type}, {name}: {got} for {want}"
                    tally.add(all(close(a, b, rtol) for a, b in zip(got, want)), words)
    return tally


def policy_config(micro_batch_tokens: int, loss_type: str, share: bool) -> RLAIFConfig:
    return make_config(RLAIFConfig, "", micro_batch_tokens=micro_batch_tokens, loss_type=loss_type, shared_prefix=share, beta=0.05,
                       attn="eager", max_new_tokens=32)


def policy_numbers(model, tokenizer, rows, samples, loss_type: str, micro_batch_tokens: int, share: bool):
    """(loss, gradient norm); old log-probs a little off the policy's, so that ratios and clips are at work."""
    model.zero_grad()
    cfg = policy_config(micro_batch_tokens, loss_type, share)
    old = [torch.tensor(c.logp) for c, _ in samples]
    facts = rl.policy_gradient(cfg, model, tokenizer, rows=rows, samples=samples, old=old, ref=old, scale=1.0)
    return facts["loss"], norm_of(model)


# ---- the fusion

def fused_losses(seeds) -> Tally:
    tally = Tally("fused loss and gradient = float64 reference, every loss type (1e-5)")
    for seed in seeds:
        for loss_type in LOSS_TYPES:
            for extra in EXTRAS if loss_type != "cispo" else EXTRAS[:3]:
                make = lambda n, g, t=loss_type, e=extra: policy_loss(policy_rows(n, g, t), loss=t, **e)
                off = fused_error(seed, make)
                tally.add(off < 1e-5, f"{loss_type} {extra}, seed {seed}: {off:.1e}")
        for extra in ({}, {"label_smoothing": 0.1}, {"z_loss": 1e-3}):
            off = fused_error(seed, lambda n, g, e=extra: nll_loss(n, **e), all_stats="label_smoothing" in extra)
            tally.add(off < 1e-5, f"nll {extra}, seed {seed}: {off:.1e}")
    return tally


def policy_rows(n: int, generator, loss_type: str) -> PolicyRows:
    draw = lambda: torch.randn(n, generator=generator)
    old = -4 + draw()
    return PolicyRows(draw(), torch.full((n,), 1 / n), old + 0.1 * draw(), old, old + 0.3 * draw(),
                      0.1 * draw() if loss_type == "gspo" else None)


def fused_error(seed: int, make_loss, **options) -> float:
    """The larger of the errors of loss and gradient against the reference in float64, relative to the sum of the
    terms' sizes and to the gradient's norm."""
    generator = torch.Generator().manual_seed(seed)
    n, d, v = 37, 24, 501  # odd on purpose
    hidden, weight = torch.randn(n, d, generator=generator), torch.randn(v, d, generator=generator)
    target = torch.randint(0, v, (n,), generator=generator)
    loss_fn = make_loss(n, generator)
    out = []
    kernels = ((torch.float32, linear_token_loss, options), (torch.float64, reference.linear_token_loss, {}))
    for kind, kernel, more in kernels:
        x = hidden.detach().to(kind, copy=True).requires_grad_()
        loss, _ = kernel(x, weight.to(kind), target, loss_fn, **more)
        loss.backward()
        out.append((loss.detach().double(), x.grad.double()))
    (loss, grad), (exact, exact_grad) = out
    sizes, _ = reference.linear_token_loss(hidden.double(), weight.double(), target, lambda *a: loss_fn(*a).abs())
    return max(float((loss - exact).abs() / sizes), float((grad - exact_grad).norm() / exact_grad.norm()))


def trajectories(folder, full: bool) -> Tally:
    """50 steps of stage 1 with the fused kernel and on full logits, from the same start."""
    tally = Tally("50 steps fused = eager: each loss (1e-3), mean drift (1e-5)")
    data = write_problems(folder / "problems.jsonl", n=40)
    for family in ("llama", "qwen2", "gemma2", "llama-untied") if full else ("llama",):
        where, curves = tiny.tiny_model(folder / f"{family}-trajectory", family), {}
        for name, kernel in (("fused", linear_token_loss), ("eager", eager_loss)):
            cfg = make_config(SFTConfig, str(where), out=str(folder / f"{family}-{name}"), data=data, steps=50,
                              lora_r=4, batch_size=4, lr=1e-3, save_every=0, attn=attn_of(family))
            real, stage1.linear_token_loss = stage1.linear_token_loss, kernel
            try:
                stage1.sft(cfg)
            finally:
                stage1.linear_token_loss = real
            curves[name] = torch.tensor([r["loss"] for r in metrics(folder / f"{family}-{name}")], dtype=torch.float64)
        gap = curves["fused"] - curves["eager"]
        moved = float(curves["eager"][0] - curves["eager"][-5:].mean())
        largest, drift = float(gap.abs().max()), float(gap.mean())
        tally.add(len(gap) == 50 and largest < 1e-3 and abs(drift) < 1e-5 and moved > 0.1,  # it must have trained
                  f"{family}: largest gap {largest:.1e}, drift {drift:.1e}, fell by {moved:.2f}")
    return tally


def eager_loss(hidden, weight, target, loss_fn, *, all_stats=False, **options):
    """linear_token_loss on full logits, whose reference computes all statistics anyway."""
    return reference.linear_token_loss(hidden, weight, target, loss_fn, **options)
