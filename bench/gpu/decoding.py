"""Rollouts on the card: tokens, log-probs and tokens/s; 4-bit weights."""
import contextlib
import importlib
import time
from typing import NamedTuple
from unittest import mock

import torch

from bench.gpu.common import Found, config_of, drawn_ids, peak_into, policy_of, sync
from bench.gpu.steps import ASSUMED, Taker, gradients_agree, planned, planner, rows_of
from minimath.config.schema import EngineOptions, RLAIFConfig, SamplingOptions, SFTConfig
from minimath.data.sample import Sample
from minimath.kernels import linear_logp
from minimath.models.forward import compute_dtype, head, hidden_states, inference
from minimath.rollout import transformers_engine
from minimath.rollout.open import open_engine
from minimath.rollout.transformers_engine import LOGP_TOLERANCE, logp_difference
from minimath.train import sft
from minimath.train.optimizer import Optimizer

TIE = {torch.float32: 1e-3}  # nats between two tokens that rounding may exchange; 0.3 in 16 bit


class Rollout(NamedTuple):
    seconds: float
    samples: list[Sample]
    metrics: dict

    @property
    def ids(self) -> list[list[int]]:
        return [sample.ids for sample in self.samples]

    def rate(self) -> float:
        return sum(map(len, self.ids)) / self.seconds


def step_graphs():
    """Find the class that records decode steps."""
    for name in ("minimath.rollout.graphs", "minimath.rollout.decode"):
        with contextlib.suppress(ModuleNotFoundError, AttributeError):
            return importlib.import_module(name).StepGraphs
    raise RuntimeError("StepGraphs is neither in rollout.graphs nor in rollout.decode")


def roll(found: Found, policy, prompts, new: int, *, temperature: float = 0.0, graphs: bool = True) -> Rollout:
    """Sample a completion of `new` tokens for every prompt, all side by side.

    graphs=False: every step is launched, whatever was recorded before."""
    never = property(lambda self: False, lambda self, value: vars(self).update(usable=value))
    with contextlib.nullcontext() if graphs else mock.patch.object(step_graphs(), "usable", never, create=True), \
            open_engine(EngineOptions(max_num_seqs=len(prompts)),
                        SamplingOptions(temperature=temperature, max_new_tokens=new), policy) as engine:
        engine.eos = []  # every completion as long as it may be
        sync(found.device)
        started = time.perf_counter()
        samples = [sample for [sample] in engine.generate(prompts)]
        sync(found.device)
        return Rollout(time.perf_counter() - started, samples, engine.metrics())


def by_generate(found: Found, policy, prompts, new: int) -> tuple[float, list[list[int]]]:
    """Decode greedily by transformers' `generate`, prompts left-padded.

    Returns seconds and ids."""
    width, model = max(map(len, prompts)), policy.model
    with inference(model), compute_dtype(model), transformers_engine.own_generation_config(model):
        sync(found.device)
        started = time.perf_counter()
        ids = transformers_engine.greedy(model, prompts, width, policy.tokenizer.pad_token_id, max_new_tokens=new)
        sync(found.device)
        return time.perf_counter() - started, ids[:, width:].tolist()


def tie(policy, prompt: list[int], one: list[int], other: list[int]) -> float:
    """Find how far apart in nats two greedy completions are where they part.

    By the training forward; 0 where they don't part."""
    place = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), None)
    if place is None:
        return 0.0
    lm_head, ids = head(policy.model), torch.tensor([prompt + one[:place]], device=policy.device)
    with inference(policy.model):
        last = hidden_states(policy.model, ids)[0, -1:].expand(2, -1).contiguous()  # (2, D)
        a, b = linear_logp(last, lm_head.weight, torch.tensor([one[place], other[place]], device=policy.device),
                           **lm_head.kernel_args()).tolist()
    return abs(a - b)


def check_logp(found: Found, what: str, policy, prompts, rollout: Rollout, temperature: float = 1.0) -> None:
    """Check recorded log-probs by the bound at which a run stops."""
    with inference(policy.model):
        off = [logp_difference(policy.model, prompt, sample, temperature)
               for prompt, sample in list(zip(prompts, rollout.samples))[:8]]
    allowed = LOGP_TOLERANCE.get(policy.model.dtype, 0.1)
    found.row("log-probs", of=what, off=off)
    found.check(f"log-probs, {what}", max(off) <= allowed, f"medians {max(off):.2g} from the training forward's")
    found.figure(f"log-probs, {what}: medians up to {max(off):.1e} from the training forward's, {allowed:g} allowed")


def rollout(found: Found) -> None:
    """Decode by recorded steps, by launched ones and by `generate`."""
    rows, new, shortest, longest = (3, 12, 5, 9) if found.tiny else (64, 256, 40, 200)
    prompts = drawn_ids(rows, shortest, longest)
    cfg = config_of(found, RLAIFConfig, max_new_tokens=new, max_prompt_len=longest, max_num_seqs=rows,
                    prompts_per_step=rows, group_size=2)
    policy, seen = policy_of(cfg), {}
    for temperature, graphs in ((0.0, False), (1.0, False), (0.0, True), (1.0, True)):
        name, row = f"graphs {'on' if graphs else 'off'}, temperature {temperature:g}", {}
        roll(found, policy, prompts, min(new, 40), temperature=temperature, graphs=graphs)
        with peak_into(found.device, row):
            seen[temperature, graphs] = it = roll(found, policy, prompts, new, temperature=temperature, graphs=graphs)
        found.row("rollout", how=name, rows=rows, new=new, seconds=it.seconds, rate=it.rate(), **row, **it.metrics)
        peak = "" if row["peak bytes"] is None else f", {row['peak bytes'] / 1e6:,.0f} MB at most"
        found.figure(f"{rows} rows x {new}, {name}: {it.rate():,.0f} tokens/s, {it.metrics['graph_replays']} steps "
                     f"replayed, {it.metrics['plain_steps']} launched{peak}")
    found.check("graphs", seen[0.0, True].ids == seen[0.0, False].ids, "other greedy tokens than by launched steps")
    if found.device == "cuda" and torch.version.hip is None:
        metrics = seen[0.0, True].metrics
        found.check("graphs", metrics["graph_replays"] > 0, f"no step was recorded: {metrics}")
        launched = seen[1.0, False].metrics
        found.check("graphs off", launched["graph_replays"] == 0, f"steps were replayed: {launched}")
    check_logp(found, "sampled", policy, prompts, seen[1.0, True])
    counted = planner(cfg.model.name, found.device).rollout(cfg, cfg, rows, 1 << 40)
    found.row("planned", **counted)
    counted = sum(size for name, size in counted.items() if name not in (ASSUMED, "optimizer state"))
    found.figure(f"the planner counts {counted / 1e6:,.0f} MB for it")
    with found.guard("generate"):
        against_generate(found, cfg, policy, prompts, new, seen[0.0, True])


def against_generate(found: Found, cfg, policy, prompts, new: int, ours: Rollout) -> None:
    """Compare a greedy rollout with transformers' loop over transformers' layers."""
    stock, row = policy_of(cfg, fused=False), {}
    by_generate(found, stock, prompts, 2)
    with peak_into(found.device, row):
        seconds, theirs = by_generate(found, stock, prompts, new)
    rate, equal = len(prompts) * new / seconds, sum(a == b for a, b in zip(ours.ids, theirs))
    apart = [tie(policy, *each) for each in zip(prompts, ours.ids, theirs)]
    found.row("generate", seconds=seconds, rate=rate, equal=equal, nats_where_they_part=apart, **row)
    found.check("generate", max(apart) <= TIE.get(policy.model.dtype, 0.3),
                f"other greedy tokens, {max(apart):.2g} nats apart where they part")
    found.figure(f"transformers' generate: {rate:,.0f} tokens/s, ours {ours.rate() / rate:.2f} times; "
                 f"{equal} of {len(prompts)} rows the same greedy tokens"
                 + (f", the others part at ties of up to {max(apart):.1e} nats" if equal < len(prompts) else ""))


def nf4(found: Found) -> None:
    """Train and sample with 4-bit weights in turns; neither may change the other."""
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # a build without this card's library raises what it likes
        found.skip(f"bitsandbytes cannot be imported here ({type(error).__name__}: {error})"[:200])
        return
    gradients_agree(found, quant="nf4")
    rows, new = (3, 8) if found.tiny else (64, 128)
    cfg = config_of(found, SFTConfig, quant="nf4", micro_batch_tokens=64 if found.tiny else 2048)
    policy, prompts = policy_of(cfg), drawn_ids(rows, 5, 9 if found.tiny else 60)
    batch, taker = rows_of(*((3, 6, 20) if found.tiny else (8, 60, 400))), Taker(policy, 64 if found.tiny else 2048)
    seen = []
    for _ in range(2):
        sft.update(policy, taker, batch, packing=cfg.packing)
        seen.append((taker.taken, roll(found, policy, prompts, new)))
    (first, tokens), (second, again) = seen
    off = second.off(first)
    found.check("gradient after a rollout", off <= (0.0 if found.device == "cpu" else 0.01), f"{off:.1e} away")
    apart = max(tie(policy, *each) for each in zip(prompts, tokens.ids, again.ids))
    found.check("rollout after a gradient", apart <= TIE.get(policy.model.dtype, 0.3),
                f"with the same weights other greedy tokens, {apart:.2g} nats apart")
    optimizer, losses = Optimizer(policy, cfg, print), []
    for _ in range(4):
        losses.append(sft.update(policy, optimizer, batch, packing=cfg.packing)["loss"])
    found.check("training", losses[-1] < losses[0], f"the loss does not fall: {losses}")
    trained = roll(found, policy, prompts, new, temperature=1.0)
    check_logp(found, "after training", policy, prompts, trained)
    for count in (1, rows):
        it = roll(found, policy, prompts[:count], new)
        found.row("rollout", rows=count, new=new, seconds=it.seconds, rate=it.rate(), **it.metrics)
        found.figure(f"{count} rows x {new}: {it.rate():,.0f} tokens/s, weights {it.metrics.get('weights')}")
    found.row("losses", losses=losses, planned=planned(found, cfg))
