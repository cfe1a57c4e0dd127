"""What must not change the numbers does not: the cutting of a step, padding, packing, the order in a batch, the fusion.

Tried on the tiny models, on one thread. A variant survives when its loss and its gradient norm are within rtol 2e-6 of
those of one row a pass, in fp32. The policy loss is a sum of terms of either sign, whose rounding goes by their size
and not by what is left of them: it may be 5e-6 off in fp32. In float64 both must be within 1e-6, which tells
rounding from a mistake (eager attention takes its softmax in fp32 all the same). A fused loss survives when value and
gradient are within 1e-5 of float64, relative to the size of its terms; a trajectory of 50 steps when each loss
is within 1e-3 of that of a run on full logits, and the mean difference within 1e-5.
"""
import random
from unittest import mock

import tiny
import torch
from harness import Tally
from toy import make_config, metrics, policy_of, wake_adapter, write_problems

from minimath.config.schema import LossOptions, RLAIFConfig, SFTConfig
from minimath.data.chat import Encoded
from minimath.data.examples import Example
from minimath.data.sample import Group, Sample
from minimath.kernels import linear_token_loss, reference
from minimath.models import prefix
from minimath.models.policy import Policy
from minimath.train import optimizer as optim
from minimath.train import rlaif as rl
from minimath.train import sft as stage1
from minimath.train.batches import PolicyBatch
from minimath.train.losses import PolicyRows, nll_loss, policy_loss

RTOL = {torch.float32: 2e-6, torch.float64: 1e-6}
RTOL_SIGNED = {torch.float32: 5e-6, torch.float64: 1e-6}
LOSSES = ("dapo", "grpo", "dr_grpo", "cispo", "gspo")
FEW = ("llama", "qwen2")
EXTRAS = [{}, {"kl_coef": 0.05}, {"kl_coef": 0.05, "entropy_coef": 0.01}, {"importance_cap": 1.1},
          {"importance_cap": 0.0, "clip_high": 0.1}]
SHARED = {True: -1.0, False: 2.0}  # LEAST_SAVED of prefix.py: prompts are always shared, or never


def run(full: bool, folder) -> list[Tally]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order
    try:
        return counted(full, folder)
    finally:
        torch.set_num_threads(threads)


def counted(full: bool, folder) -> list[Tally]:
    families = list(tiny.FAMILIES) if full else FEW
    policies = {name: policy_of(tiny.tiny_model(folder / name, name), RLAIFConfig, train=True, attn=attn_of(name),
                                lora_r=4) for name in families}
    for policy in policies.values():
        wake_adapter(policy.model)
    seeds = range(8 if full else 2)
    out, few = [], seeds if full else [0]
    for dtype in RTOL:
        for policy in policies.values():
            policy.model.to(dtype)
        out += [sft_cuts(policies, seeds, dtype), policy_cuts(policies, few, dtype)]
    return [*out, fused_losses(seeds), trajectories(folder, full)]


def attn_of(family: str) -> str:
    return "eager" if family == "gemma2" else "sdpa"  # its capped scores need eager attention


def gradient_of(cfg, policy: Policy, update) -> tuple[float, float]:
    """(loss, gradient norm) of the first step of update(optimizer), whose steps change no weight."""
    losses, norms = [], []

    class Watched(optim.Optimizer):
        def step(self, *args):
            figures = super().step(*args)
            losses.append(figures["loss"])
            return figures

    def no_step(_, params, *__, read, **___):
        norm = torch.cat([p.grad.double().flatten() for p in params if p.grad is not None]).norm()
        norms.append(read(norm))
        for p in params:
            p.grad = None
        return norms[-1], True

    with mock.patch.object(optim, "clip_and_step", no_step):
        update(Watched(policy, cfg, print))
    return losses[0], norms[0]


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


def sft_cuts(policies: dict, seeds, dtype: torch.dtype) -> Tally:
    rtol, kind = RTOL[dtype], str(dtype).removeprefix("torch.")
    tally = Tally(f"SFT: 8x1 = 4x2 = 2x4 = 1x8, padded, packed, shuffled ({kind}, rtol {rtol:.0e})")
    for family, policy in policies.items():
        for seed in seeds:
            rows = rows_of(random.Random(seed))
            longest = max(len(row.ids) for row in rows)
            shuffled = random.Random(seed + 1).sample(rows, len(rows))
            variants = {f"{k} rows a pass": (rows, k * longest, False) for k in (2, 4, 8)}
            variants |= {f"packed to {k * longest}": (rows, k * longest, True) for k in (1, 3, 8)}
            variants |= {"shuffled": (shuffled, 4 * longest, False), "shuffled, packed": (shuffled, 4 * longest, True)}
            want = sft_numbers(policy, rows, 1, False)
            for name, variant in variants.items():
                got = sft_numbers(policy, *variant)
                survived = all(close(a, b, rtol) for a, b in zip(got, want))
                tally.add(survived, f"{family}, seed {seed}, {name}: {got} for {want}")
    return tally


def sft_numbers(policy: Policy, rows: list[Encoded], micro_batch_tokens: int, packing: bool) -> tuple[float, float]:
    cfg = make_config(SFTConfig, "", micro_batch_tokens=micro_batch_tokens, packing=packing)
    return gradient_of(cfg, policy, lambda optimizer: stage1.update(policy, optimizer, rows, packing=cfg.packing))


# ---- stage 2

def groups_of(rng: random.Random, policy: Policy) -> list[Group]:
    """Two groups of four samples each, with advantages, and log-probs of a sampler that is near the policy: a ratio far
    from 1 would multiply the last bits of the log-probs."""
    groups = []
    for _ in range(2):
        prompt = [rng.randrange(10, 300) for _ in range(rng.randint(8, 20))]
        samples = []
        for _ in range(4):
            ids = [rng.randrange(10, 300) for _ in range(rng.randint(1, 20))]
            samples.append(Sample(ids, [0.0] * len(ids), True, advantage=rng.gauss(0, 1)))
        groups.append(Group(Example(problem="p"), prompt, samples))
    cfg = policy_config(4096, "dapo")
    batch = PolicyBatch(policy, cfg, groups)
    logps = rl.logps(cfg, policy, optim.Optimizer(policy, cfg, print), batch)
    for sample, logp in zip(batch.samples, logps, strict=True):
        sample.logp = [x + rng.gauss(0, 0.2) for x in logp.tolist()]
    return groups


def policy_cuts(policies: dict, seeds, dtype: torch.dtype) -> Tally:
    rtol, kind = RTOL_SIGNED[dtype], str(dtype).removeprefix("torch.")
    tally = Tally(f"RLAIF: the cutting, shared prompts, the order, every loss ({kind}, rtol {rtol:.0e})")
    for family, policy in policies.items():
        for seed in seeds:
            rng = random.Random(seed)
            groups = groups_of(rng, policy)
            rows = [Group(g.example, g.prompt, [sample]) for g in groups for sample in g.samples]
            mixed = [Group(g.example, g.prompt, rng.sample(g.samples, len(g.samples))) for g in groups[::-1]]
            variants = {"2 a pass": (groups, 80, False), "8 a pass": (groups, 4096, False),
                        "shared": (groups, 4096, True), "shared, cut": (groups, 60, True),
                        "shuffled": (rng.sample(rows, len(rows)), 160, False), "shuffled, shared": (mixed, 4096, True)}
            for loss in LOSSES:
                want = policy_numbers(policy, loss, groups, 1, False)
                for name, variant in variants.items():
                    got = policy_numbers(policy, loss, *variant)
                    words = f"{family}, seed {seed}, {loss}, {name}: {got} for {want}"
                    tally.add(all(close(a, b, rtol) for a, b in zip(got, want)), words)
    return tally


def policy_config(micro_batch_tokens: int, loss: str) -> RLAIFConfig:
    return make_config(RLAIFConfig, "", micro_batch_tokens=micro_batch_tokens, loss=loss, kl_coef=0.05, attn="eager",
                       max_new_tokens=32, updates_per_rollout=2)


def policy_numbers(policy: Policy, loss: str, groups: list[Group], micro_batch_tokens: int, share: bool):
    """(loss, gradient norm); old log-probs a little off the policy's, so that ratios and clips are at work."""
    cfg = policy_config(micro_batch_tokens, loss)

    def update(optimizer) -> None:
        batch = PolicyBatch(policy, cfg, groups)
        batch.old_logp = batch.ref_logp = batch.sampled_logp
        if loss == "gspo":
            batch.seq_log_ratio = [torch.full_like(now, float((now - old).mean()))
                                   for now, old in zip(rl.logps(cfg, policy, optimizer, batch), batch.old_logp)]
        optimizer.step(batch, rl.policy_loss_of_micro_batch(cfg, policy, batch))

    with mock.patch.object(prefix, "LEAST_SAVED", SHARED[share]):
        return gradient_of(cfg, policy, update)


# ---- the fusion

def fused_losses(seeds) -> Tally:
    tally = Tally("fused loss and gradient = float64 reference, every loss (1e-5)")
    for seed in seeds:
        for loss in LOSSES:
            for extra in EXTRAS:
                options = LossOptions(name=loss, **extra)
                off = fused_error(seed, lambda n, g, o=options: policy_loss(policy_rows(n, g, o.name), o))
                tally.add(off < 1e-5, f"{loss} {extra}, seed {seed}: {off:.1e}")
        off = fused_error(seed, lambda n, g: nll_loss(n))
        tally.add(off < 1e-5, f"nll, seed {seed}: {off:.1e}")
    return tally


def policy_rows(n: int, generator, loss: str) -> PolicyRows:
    draw = lambda: torch.randn(n, generator=generator)
    old = -4 + draw()
    return PolicyRows(draw(), torch.full((n,), 1 / n), old + 0.1 * draw(), old, old + 0.3 * draw(),
                      0.1 * draw() if loss == "gspo" else None)


def fused_error(seed: int, make_loss) -> float:
    """The larger of the errors of loss and gradient against the reference in float64, relative to the sum of the
    terms' sizes and to the gradient's norm."""
    generator = torch.Generator().manual_seed(seed)
    n, d, v = 37, 24, 501  # odd on purpose
    hidden, weight = torch.randn(n, d, generator=generator), torch.randn(v, d, generator=generator)
    target = torch.randint(0, v, (n,), generator=generator)
    loss_fn = make_loss(n, generator)
    out = []
    for kind, kernel in ((torch.float32, linear_token_loss), (torch.float64, reference.linear_token_loss)):
        x = hidden.detach().to(kind, copy=True).requires_grad_()
        loss, _ = kernel(x, weight.to(kind), target, loss_fn)
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
            with mock.patch.object(stage1, "linear_token_loss", kernel):
                stage1.sft(cfg)
            curves[name] = torch.tensor([r["loss"] for r in metrics(folder / f"{family}-{name}")], dtype=torch.float64)
        gap = curves["fused"] - curves["eager"]
        moved = float(curves["eager"][0] - curves["eager"][-5:].mean())
        largest, drift = float(gap.abs().max()), float(gap.mean())
        tally.add(len(gap) == 50 and largest < 1e-3 and abs(drift) < 1e-5 and moved > 0.1,  # it must have trained
                  f"{family}: largest gap {largest:.1e}, drift {drift:.1e}, fell by {moved:.2f}")
    return tally


def eager_loss(hidden, weight, target, loss_fn, *, all_stats=False, rows=None, **options):
    """linear_token_loss on full logits, whose reference computes all statistics anyway."""
    return reference.linear_token_loss(hidden, weight, target, loss_fn, **options)
