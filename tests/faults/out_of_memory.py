"""Memory that runs out in a step of training or of a rollout: done again in smaller pieces, with the same gradient.

A stand-in raises what torch raises, on a CPU as on CUDA, for every forward pass or backward pass of more tokens, or
decode step of more rows, than it has room for. After three halvings a run stops, with its steps saved. The model that
judges itself gives the same votes in smaller passes.
"""
import contextlib
import itertools
import json
import re
from pathlib import Path
from unittest import mock

import torch
from harness import Tally, heard, model_and_data
from toy import adapter, make_config, metrics

from minimath.config.schema import RLAIFConfig, SFTConfig
from minimath.core.checkpoint import list_checkpoints, verify
from minimath.core.errors import UserError
from minimath.judges import self_judge
from minimath.models import prefix
from minimath.rollout.decode import Decode
from minimath.train import optimizer as optim
from minimath.train import rlaif, sft, trainer

KINDS = {  # as torch says it
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CPU": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate "
                                "memory: you tried to allocate 999 bytes. Error code 12 (Cannot allocate memory)"),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "Python": MemoryError,
}
STEPS, FIRST = 4, 3
COMMON = {"lora_r": 4, "lr": 1e-2, "save_every": 0, "warmup": 0.0, "steps": STEPS}
OPTIONS = {sft: {"batch_size": 12, "micro_batch_tokens": 300},
           rlaif: {"prompts_per_step": 3, "group_size": 6, "max_new_tokens": 12, "judge": "heuristic",
                   "sample_every": 1, "verifier": "python:killing.even", "micro_batch_tokens": 100, "overlong": "none"}}
ROUNDING = 3e-6  # of fp32 sums in another order, relative to the gradient's norm
ROOM = {sft: 200, rlaif: 60}  # tokens of a pass
FURTHER = {sft: ({"lora_dropout": 0.1}, {"packing": False}, {"gradient_checkpointing": True}),
           rlaif: ({"lora_dropout": 0.1}, {"updates_per_rollout": 2, "kl_coef": 0.1}, {"alone": True},
                   {"loss": "gspo", "updates_per_rollout": 2})}
SETTINGS = ("gradient_checkpointing=true", "quant=nf4", "micro_batch_tokens", "resume=true")


class Memory:
    """The stand-in's memory, and what became of a run in it. room: tokens of a pass; rows: of a decode step."""

    def __init__(self, room: int = 1 << 30, rows: int = 1 << 30, since: int = 1, kind="CUDA", where: str = "forward",
                 spare: bool = True):
        self.room, self.rows, self.since, self.where, self.spare = room, rows, since, where, spare
        self.raise_ = KINDS[kind]
        self.raised = self.step = self.passes = self.tokens = 0
        self.folder, self.said, self.error, self.gradients, self.before = Path(), "", None, [], 0

    def full(self, size: int) -> bool:
        """Whether a pass of `size` tokens is too large."""
        self.passes += 1
        if self.step < self.since or size <= self.room or (self.spare and self.passes == 1):
            return False  # spare: the first pass of a step fits, whose gradient must not be counted twice
        self.raised += 1
        return True

    def patches(self, loop) -> list:
        real = {name: getattr(loop, name) for name in ("hidden_states", "linear_token_loss")}
        clip, rate, judged, decode = optim.clip_and_step, trainer.lr_at, self_judge.hidden_states, Decode.step

        def hidden_states(model, input_ids, *args, **kwargs):
            self.tokens = input_ids.numel()
            if self.where == "forward" and self.full(self.tokens):
                raise self.raise_()
            return real["hidden_states"](model, input_ids, *args, **kwargs)

        def linear_token_loss(*args, **kwargs):
            loss, stats = real["linear_token_loss"](*args, **kwargs)
            if self.where == "backward" and self.full(self.tokens):
                def fail(_):
                    raise self.raise_()
                loss.register_hook(fail)
            return loss, stats

        def clip_and_step(optimizer, params, *args, **kwargs):
            self.before = self.before if self.gradients else self.raised  # the first step
            self.gradients.append(torch.cat([p.grad.flatten() for p in params if p.grad is not None]))
            return clip(optimizer, params, *args, **kwargs)

        def lr_at(step, *args, **kwargs):
            if step + 1 > self.step:
                self.step, self.passes = step + 1, 0
            return rate(step, *args, **kwargs)

        def judge_states(model, input_ids, *args, **kwargs):
            if self.where == "judge" and self.full(input_ids.numel()):
                raise self.raise_()
            return judged(model, input_ids, *args, **kwargs)

        def step(decoder):
            if len(decoder.rows) > self.rows:
                self.raised += 1
                raise self.raise_()
            decode(decoder)

        return [mock.patch.object(loop, "hidden_states", hidden_states),
                mock.patch.object(loop, "linear_token_loss", linear_token_loss),
                mock.patch.object(optim, "clip_and_step", clip_and_step), mock.patch.object(trainer, "lr_at", lr_at),
                mock.patch.object(self_judge, "hidden_states", judge_states), mock.patch.object(Decode, "step", step)]


def run(full: bool, folder: Path) -> list[Tally]:
    (model, data), number = model_and_data(folder), itertools.count()

    def train(loop, memory: Memory, out: Path | None = None, alone: bool = False, **options) -> Memory:
        """alone: no prompt is shared in an update."""
        memory.folder = out or folder / f"run{next(number)}"
        cfg = make_config(SFTConfig if loop is sft else RLAIFConfig, model, data=data, out=str(memory.folder),
                          **COMMON | OPTIONS[loop] | options)
        with contextlib.ExitStack() as stack:
            for patch in memory.patches(loop):
                stack.enter_context(patch)
            if alone:
                stack.enter_context(mock.patch.object(prefix, "LEAST_SAVED", 2.0))
            memory.said, memory.error = heard(lambda: (sft.sft if loop is sft else rlaif.rlaif)(cfg), UserError,
                                              RuntimeError)
        return memory

    return [*halved(full, train), learned(full, train), stopped(full, train), rollouts_halved(full, train),
            judge_halved(full, train), others(train)]


def halved(full: bool, train) -> list[Tally]:
    """The gradient is that of the unbroken step, and bitwise that of a run begun with fewer micro_batch_tokens."""
    tallies = []
    for loop in (sft, rlaif):
        tally = Tally(f"out_of_memory: {loop.__name__.rpartition('.')[2]}, the same gradient")
        cases = [({}, "backward", "CPU")] if loop is sft else [({}, "forward", "CUDA")]
        if full:
            cases = [*itertools.product([{}], ("forward", "backward"), KINDS),
                     *itertools.product(FURTHER[loop], ("forward", "backward"), ("CUDA", "CPU"))]
        for options, where, kind in cases:
            options = options | {"steps": 2}
            short = train(loop, Memory(ROOM[loop], where=where, kind=kind), **options)
            whole = train(loop, Memory(), **options)
            wrong = unlike(short, whole, dropout="lora_dropout" in options)
            if not wrong and "updates_per_rollout" not in options:  # old log-probs: before it
                fewer = re.findall(r"micro_batch_tokens=(\d+), which", short.said)[short.before - 1]
                small = train(loop, Memory(), **options | {"steps": 1, "micro_batch_tokens": int(fewer)})
                same = torch.equal(short.gradients[0], small.gradients[0])
                wrong = "" if same else f"the gradient is not that of a run with micro_batch_tokens={fewer}"
            tally.add(not wrong, f"{kind} in {where} with {options}: {wrong}")
        tallies.append(tally)
    return tallies


def unlike(short: Memory, whole: Memory, dropout: bool) -> str:
    """What is wrong with a run in a short memory, beside one in enough of it; "" for nothing."""
    if short.error or whole.error or not short.before:
        return f"{short.error or whole.error or 'memory never ran out'}"
    said = short.said.count("which gives the same gradient")
    if not said or said != short.raised or said != kept(short)["halved"]:
        return f"ran out {short.raised} times, said {said} times, learned {kept(short)}"
    if metrics(short.folder, "step", "optim/skipped") != metrics(whole.folder, "step", "optim/skipped"):
        return "other steps are in the metrics"
    one, two = short.gradients[0], whole.gradients[0]
    error = float((one - two).norm() / two.norm())
    # a dropout mask depends on the cutting: there only the run with fewer micro_batch_tokens tells
    return "" if dropout or error <= ROUNDING else f"the gradient is off by {error:.1e}"


def kept(memory: Memory) -> dict:
    """What the newest checkpoint keeps of the lessons: micro_batch_tokens, halved, max_num_seqs."""
    tracked = json.loads((list_checkpoints(memory.folder)[0] / "state.json").read_text())["tracked"]
    budget, engine = tracked["optimizer"]["budget"], tracked.get("engine", {})
    return {name: value for name, value in (budget | engine).items() if name in
            ("micro_batch_tokens", "halved", "max_num_seqs")}


def learned(full: bool, train) -> Tally:
    """A resumed run begins with what fitted, and with the options again when one that bears on memory has changed."""
    tally = Tally("out_of_memory: remembered by a resumed run")
    for loop in (sft, rlaif) if full else (sft,):
        first = train(loop, Memory(ROOM[loop], spare=False), steps=2)
        fits, wrong = kept(first), "" if first.raised else "memory never ran out"
        for options, expected in (({}, 0), ({"gradient_checkpointing": True}, fits["halved"])):
            again = train(loop, Memory(ROOM[loop], spare=False), out=first.folder, resume=True,
                          steps=2 + len(list_checkpoints(first.folder)), **options)
            if again.error or again.raised != expected or kept(again) != fits:
                wrong = wrong or (f"resumed with {options} memory ran out {again.raised} times: {again.error}, "
                                  f"{kept(again)}")
            tally.add(not wrong, f"{loop.__name__}: {wrong}")
    return tally


def stopped(full: bool, train) -> Tally:
    """Where nothing fits, the run ends after three halvings with the steps before saved and the settings to try."""
    tally = Tally("out_of_memory: stopped with a checkpoint")
    for loop, where, kind in itertools.product((sft, rlaif), ("forward", "backward"), KINDS) if full else (
            (sft, "backward", "CUDA"),):
        options = {"micro_batch_tokens": 2000} | ({"batch_size": 24} if loop is sft else {"group_size": 12})
        short = train(loop, Memory(0, since=FIRST, where=where, kind=kind, spare=False), **options)
        newest = [folder.name for folder in list_checkpoints(short.folder)]
        missing = [word for word in SETTINGS if word not in str(short.error)]
        if not isinstance(short.error, UserError) or missing or short.raised != 4:
            wrong = f"ran out {short.raised} times, without {missing}: {short.error}"
        elif newest != [f"step-{FIRST - 1:06d}"] or verify(short.folder / "checkpoints" / newest[0]):
            wrong = f"saved is {newest}"
        else:
            again = train(loop, Memory(), out=short.folder, resume=True, **options, gradient_checkpointing=True)
            whole = train(loop, Memory(), **options, gradient_checkpointing=True)
            wrong = str(again.error or "") or differs(again, whole)
        tally.add(not wrong, f"{loop.__name__}, {kind} in {where}: {wrong}")
    return tally


def differs(run: Memory, whole: Memory) -> str:
    """Two finished runs that may differ by rounding."""
    steps = [[r["step"] for r in metrics(m.folder)] for m in (run, whole)]
    one, two = (torch.cat([t.flatten() for _, t in sorted(adapter(m.folder).items())]) for m in (run, whole))
    error = float((one - two).norm() / two.norm())
    return "" if steps[0] == steps[1] and error < 1e-3 else f"steps {steps}, weights off by {error:.1e}"


def rollouts_halved(full: bool, train) -> Tally:
    """A rollout that runs out of memory gives the same completions with fewer sequences side by side, and the next one,
    also of a resumed run, begins with those."""
    tally = Tally("out_of_memory: a rollout with fewer sequences")
    whole = train(rlaif, Memory(), lr=1e-4)
    for rows, room in ((10, 1 << 30), (5, 1 << 30), (10, ROOM[rlaif])) if full else ((10, 1 << 30),):
        short = train(rlaif, Memory(room, rows=rows), lr=1e-4)
        texts = [[json.loads(line)["texts"] for line in open(m.folder / "samples.jsonl")] for m in (short, whole)]
        begun = short.said.count("sequences side by side")
        used = {r["rollout/max_num_seqs"] for r in metrics(short.folder)}
        most = kept(short)["max_num_seqs"]
        if short.error or not begun or max(used) != most or max(used) > rows:  # a refill has fewer
            wrong = f"said {begun} times, used {used}, learned {kept(short)}: {short.error}"
        elif 18 >> begun != max(used):
            wrong = f"it ran out {begun} times to come from 18 to {max(used)} sequences"
        else:
            wrong = differs(short, whole) if texts[0] == texts[1] else f"other completions: {texts}"
        again = train(rlaif, Memory(rows=rows), out=short.folder, resume=True, lr=1e-4, steps=STEPS + 1)
        wrong = wrong or str(again.error or "") or again.raised * f"resumed, it ran out {again.raised} times"
        tally.add(not wrong, f"{rows} rows, passes of {room} tokens: {wrong}")
    return tally


@mock.patch.object(self_judge, "EAGER_TOKENS", self_judge.TREE_TOKENS)  # passes of several prompts, as on a card
def judge_halved(full: bool, train) -> Tally:
    """The model that judges itself votes the same in smaller passes; that they are smaller is said."""
    tally = Tally("out_of_memory: the judge in smaller passes")
    own = {"judge": "self", "verifier": "none", "micro_batch_tokens": 8000, "lr": 1e-4, "steps": 2}
    names = ("judge/comparisons", "judge/no_votes", "judge/position_bias", "reward/mean")
    whole = train(rlaif, Memory(), **own)
    for kind, room in itertools.product(KINDS, (1500, 1100)) if full else (("CUDA", 1500),):
        short = train(rlaif, Memory(room, kind=kind, where="judge", spare=False), **own)
        figures = [[r[name] for r in metrics(m.folder) for name in names] for m in (short, whole)]
        same = all(abs(a - b) < 1e-5 for a, b in zip(*figures, strict=True)) and any(figures[0])
        wrong = str(short.error or whole.error or "") or ("" if same else f"other votes: {figures}")
        if not short.raised or short.said.count("the judge self ran out of memory") != 1:
            wrong = wrong or f"ran out {short.raised} times: {short.said[-500:]}"
        tally.add(not wrong, f"{kind}, passes of {room} tokens: {wrong or differs(short, whole)}")
    return tally


def others(train) -> Tally:
    """Another error is not taken for a lack of memory, and costs no step that was done."""
    tally = Tally("out_of_memory: no other error is taken for it")
    with mock.patch.dict(KINDS, {"other": lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied")}):
        broken = train(sft, Memory(0, since=FIRST, kind="other", spare=False))
    newest = [folder.name for folder in list_checkpoints(broken.folder)]
    again = isinstance(broken.error, UserError) or broken.raised != 1
    tally.add(not again and newest == [f"step-{FIRST - 1:06d}"],
              f"raised {broken.raised} times, {broken.error}, saved {newest}")
    return tally
