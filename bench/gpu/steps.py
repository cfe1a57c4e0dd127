"""Training on the card: gradients, steps of both stages, a resumed run."""
import functools
import json
import statistics
import time
from typing import NamedTuple
from unittest import mock

import torch

from bench.gpu.common import Found, config_of, drawn_ids, peak_into, policy_of, sync
from minimath.config.options import options_of
from minimath.config.schema import RLAIFConfig, SFTConfig
from minimath.data.chat import Encoded
from minimath.data.examples import Example
from minimath.data.problems import make_problems
from minimath.data.sample import Group
from minimath.models import prefix
from minimath.models.load import pick_dtype
from minimath.plan.needs import Planner
from minimath.rollout.open import open_engine
from minimath.rollout.transformers_engine import LOGP_TOLERANCE, logp_difference
from minimath.train import rlaif, sft
from minimath.train.optimizer import LossScale, Optimizer

STEPS = 6
ASSUMED = "context and fragmentation (assumed)"  # the planner's row for what torch does not allocate
NO_WORSE = 1.25  # times the error of transformers' and peft's layers in the same dtype
RESUMED = 3.0  # times as far from the first run as a second one: some backward passes on a card add up in any order


class Gradient(NamedTuple):
    """Loss and gradient of a step."""
    loss: float
    flat: torch.Tensor  # fp32

    def off(self, other: "Gradient") -> float:
        """Relative distance of the gradients, in the 2-norm."""
        return float((self.flat - other.flat).norm() / other.flat.norm())


class Taker:
    """Stands for an optimizer: takes loss and gradient, changes no weight."""
    skipped = 0

    def __init__(self, policy, most: int):
        self.policy, self.most, self.scale = policy, most, LossScale(policy.model).value

    def step(self, batch, loss_of_micro_batch) -> dict:
        total = 0.0
        for indices, micro in batch.micro_batches(self.most):
            loss, _ = loss_of_micro_batch(indices, micro)
            (loss * self.scale).backward()
            total += float(loss.detach())
        params = self.policy.params
        self.taken = Gradient(total, torch.cat([p.grad.flatten().float() for p in params]) / self.scale)
        for p in params:
            p.grad = None
        return {"loss": total}


def rows_of(count: int, prompt: int, longest: int, seed: int = 0) -> list[Encoded]:
    """Draw rows of which all but the prompt is trained."""
    return [Encoded(ids, [False] * prompt + [True] * (len(ids) - prompt), False)
            for ids in drawn_ids(count, (prompt + longest) // 2, longest, seed)]


def sft_gradient(found: Found, rows, *, fused: bool = True, **options) -> Gradient:
    cfg = config_of(found, SFTConfig, **options)
    policy = policy_of(cfg, fused=fused)
    taker = Taker(policy, cfg.optimizer.micro_batch_tokens)
    sft.update(policy, taker, rows, packing=cfg.packing)
    return taker.taken


def floor_of(found: Found) -> float:
    """What a relative distance from fp32 may be in any case."""
    device = torch.device(found.device)
    return 1e-5 if found.device == "cpu" else torch.finfo(pick_dtype("auto", device)[0]).eps


def gradients_agree(found: Found, **options) -> None:
    """Check loss and gradient against fp32, beside transformers' and peft's layers."""
    rows = rows_of(*((3, 6, 20) if found.tiny else (8, 60, 400)))
    options |= {"micro_batch_tokens": 40 if found.tiny else 2048}
    plain = {"fused": False, "packing": False} | options
    exact = sft_gradient(found, rows, **plain | {"dtype": "fp32"})
    theirs = sft_gradient(found, rows, **plain)
    for name, more in {"packed": {}, "padded": {"packing": False},
                       "packed, activations recomputed": {"gradient_checkpointing": True}}.items():
        with found.guard(name):
            ours, row = sft_gradient(found, rows, **options | more), {}
            for what, off, other in (("gradient", ours.off(exact), theirs.off(exact)),
                                     ("loss", abs(ours.loss / exact.loss - 1), abs(theirs.loss / exact.loss - 1))):
                allowed = max(floor_of(found), NO_WORSE * other)
                row |= {what: off, f"{what}, theirs": other, f"{what}, allowed": allowed}
                found.check(f"{what}, {name}", off <= allowed, f"{off:.1e} from fp32, {allowed:.1e} allowed")
            found.row("off fp32", layers=name, **options, **row)
            found.figure(f"{name}: gradient {row['gradient']:.1e} from fp32, loss {row['loss']:.1e}; transformers' and "
                         f"peft's layers {row['gradient, theirs']:.1e}, {row['loss, theirs']:.1e}")


def train(found: Found) -> None:
    """Check gradients, then take steps of both stages."""
    gradients_agree(found)
    for packing in (True, False):
        with found.guard(f"sft, packing={packing}"):
            sft_steps(found, packing)
    with found.guard("rlaif"):
        rlaif_steps(found)


def sft_steps(found: Found, packing: bool) -> None:
    """Take steps on two batches in turns: the loss falls; time and memory."""
    length = 24 if found.tiny else 512
    cfg = config_of(found, SFTConfig, packing=packing, batch_size=4 if found.tiny else 16, max_len=length,
                    micro_batch_tokens=8 * length)
    policy, row = policy_of(cfg), {"packing": packing}
    optimizer, losses, taken, tokens = Optimizer(policy, cfg, print), [], [], []
    with peak_into(found.device, row):
        for number in range(STEPS):
            rows = rows_of(cfg.batch_size, length // 4, length, seed=number % 2)
            sync(found.device)
            started = time.perf_counter()
            told = sft.update(policy, optimizer, rows, packing=cfg.packing)
            sync(found.device)
            taken.append(time.perf_counter() - started)
            losses.append(told["loss"])
            tokens.append(told["data/tokens"])
    name = "packed" if packing else "padded"
    rate = statistics.median(n / s for n, s in zip(tokens[2:], taken[2:]))
    found.row("sft steps", **row, seconds=taken, losses=losses, tokens=tokens, planned=planned(found, cfg))
    found.check(f"sft, {name}", losses[-1] < losses[1], f"the loss does not fall: {losses}")
    found.figure(f"sft step, {name}: {1e3 * statistics.median(taken[2:]):.0f} ms, {rate:,.0f} tokens/s, first "
                 f"{taken[0]:.1f} s; {memory_words(row, found.all['rows'][-1]['planned'])}")


planner = functools.cache(Planner)  # of a model's folder and a kind of device


def planned(found: Found, cfg) -> dict[str, int]:
    """What the planner counts for training."""
    return planner(cfg.model.name, found.device).training(cfg)


def memory_words(row: dict, rows: dict[str, int]) -> str:
    """Write the peak beside the planner's number, without what that assumes."""
    counted = sum(size for name, size in rows.items() if name != ASSUMED)
    if row["peak bytes"] is None:
        return f"planned {counted / 1e6:,.1f} MB"
    return f"{row['peak bytes'] / 1e6:,.0f} MB at most, {counted / row['peak bytes']:.2f} of that planned"


def rlaif_steps(found: Found) -> None:
    """Check a rollout and the gradient of its update; then take steps."""
    prompts, group, new, length = (2, 3, 8, 20) if found.tiny else (8, 8, 256, 120)
    cfg = config_of(found, RLAIFConfig, micro_batch_tokens=64 if found.tiny else 4096, max_new_tokens=new,
                    prompts_per_step=prompts, group_size=group, lr=1e-4, overlong="none")
    policy = policy_of(cfg)
    ids = drawn_ids(prompts, length, length + 10)
    with open_engine(cfg.engine, cfg.sampling, policy, seed=1) as engine:
        engine.eos = []  # every completion as long as it may be
        engine.generate(ids, group)
        sync(found.device)
        started = time.perf_counter()
        samples = engine.generate(ids, group)
        sync(found.device)
        taken = time.perf_counter() - started
    groups = [Group(Example("problem"), prompt, each) for prompt, each in zip(ids, samples, strict=True)]
    for each in groups:
        for place, sample in enumerate(each.samples):
            sample.advantage = 1.0 if place % 2 else -1.0
    off = logp_difference(policy.model, ids[0], samples[0][0], cfg.sampling.temperature)
    found.check("rlaif, log-probs", off <= LOGP_TOLERANCE.get(policy.model.dtype, 0.1),
                f"those of the rollout are {off:.2g} away from the training forward's")
    exact = rlaif_gradient(cfg.replace(dtype="fp32"), None, groups, shared=False)
    theirs = rlaif_gradient(cfg, policy, groups, shared=False).off(exact)
    off, allowed = rlaif_gradient(cfg, policy, groups, shared=True).off(exact), max(floor_of(found), NO_WORSE * theirs)
    found.check("rlaif, shared prompts", off <= allowed, f"the gradient is {off:.1e} from fp32, {allowed:.1e} allowed")
    optimizer, row, update = Optimizer(policy, cfg, print), {}, []
    with peak_into(found.device, row):
        for _ in range(3):
            sync(found.device)
            started = time.perf_counter()
            told = rlaif.update(cfg, policy, optimizer, groups, groups)
            sync(found.device)
            update.append(time.perf_counter() - started)
            found.check("rlaif step", told["optim/stepped"] == 1.0, f"was not taken: {told}")
    found.row("rlaif steps", **row, rollout_seconds=taken, update_seconds=update, planned=planned(found, cfg))
    found.figure(f"rlaif step, {prompts} x {group} x {new}: rollout {taken:.2f} s, update {update[-1]:.2f} s, gradient "
                 f"{off:.1e} from fp32, of rows apart {theirs:.1e}; "
                 + memory_words(row, found.all["rows"][-1]["planned"]))


def rlaif_gradient(cfg, policy, groups: list[Group], *, shared: bool) -> Gradient:
    """Take the gradient of an update, prompts shared or not; policy None: a new one."""
    policy = policy or policy_of(cfg)
    taker = Taker(policy, cfg.optimizer.micro_batch_tokens)
    with mock.patch.object(prefix, "LEAST_SAVED", 0.0 if shared else 2.0):
        rlaif.update(cfg, policy, taker, groups, groups)
    return taker.taken


# ---- resume

def resume(found: Found) -> None:
    """Train twice unbroken, and once with a stop between.

    The same bits where a run promises them: on a CPU, and with deterministic=true."""
    from safetensors.torch import load_file
    data = [{"problem": e.problem, "solution": e.solution, "answer": e.answer} for e in make_problems(24, seed=0)]
    exactly = found.device == "cpu" or "deterministic" in options_of(SFTConfig)
    more = {"deterministic": True} if "deterministic" in options_of(SFTConfig) and found.device == "cuda" else {}

    def run(name: str, steps: int, **options):
        cfg = config_of(found, SFTConfig, data=data, out=str(found.path.parent / name), batch_size=4, max_len=1024,
                        micro_batch_tokens=2048, lora_dropout=0.1, steps=steps, **more | options)
        summary = sft.sft(cfg)
        found.check(f"run {name}", summary["steps"] == steps, f"ended after {summary['steps']} of {steps} steps")
        return load_file(f"{summary['adapter']}/adapter_model.safetensors")

    whole, twice = run("whole", 4), run("twice", 4)
    run("broken", 2)
    broken = run("broken", 4, resume=True)
    log = (found.path.parent / "broken" / "metrics.jsonl").read_text().splitlines()
    steps = [record["step"] for record in map(json.loads, log) if "loss" in record]
    found.check("metrics", steps == [1, 2, 3, 4], f"steps {steps}")
    apart = {}
    for name, other in (("a second run", twice), ("the resumed run", broken)):
        same = all(torch.equal(whole[key], other[key]) for key in whole)
        apart[name] = off = 0.0 if same else (sum(float((whole[key] - other[key]).square().sum()) for key in whole)
                                              / sum(float(value.square().sum()) for value in whole.values())) ** 0.5
        allowed = 0.0 if exactly else RESUMED * apart["a second run"]
        found.row("resume", run=name, same_bits=same, off=off, deterministic=bool(more))
        found.check(name, off <= allowed, f"its adapter is {off:.1e} of the norm away, {allowed:.1e} allowed")
        found.figure(f"{name}: {'the same bits' if same else f'{off:.1e} of the norm away'}"
                     + (" with deterministic=true" if more else ""))
