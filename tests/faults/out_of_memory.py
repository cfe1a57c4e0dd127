"""Memory that runs out in a step of training or of a rollout: done again in smaller pieces, with the same gradient.

A stand-in raises what torch raises, on a CPU as on CUDA, for every forward pass or backward pass of more tokens, or
decode step of more rows, than it has room for. After three halvings a run stops, with its steps saved.
"""
import contextlib
import io
import itertools
import json
import re
from pathlib import Path
from unittest import mock

import torch
from harness import Tally
from tiny import write_tiny
from toy import adapter, make_config, metrics, write_problems

from minimath.rollout import open as engines
from minimath.train import rlaif
from minimath.train import sft
from minimath.core.checkpoint import list_checkpoints, verify
from minimath.config.schema import RLAIFConfig, SFTConfig
from minimath.core.errors import UserError
from minimath.rollout.decode import Decode

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
           rlaif: {"prompts_per_step": 3, "group_size": 6, "max_new_tokens": 12, "judge": "rules", "sample_every": 1,
                   "gate": "python:killing.even", "micro_batch_tokens": 100, "overlong": "none"}}
ROUNDING = 3e-6  # of fp32 sums in another order, relative to the gradient's norm
ROOM = {sft: 200, rlaif: 60}  # tokens of a pass
FURTHER = {sft: ({"lora_dropout": 0.1}, {"packing": False}, {"gradient_checkpointing": True}),
           rlaif: ({"lora_dropout": 0.1}, {"updates_per_rollout": 2, "beta": 0.1}, {"shared_prefix": False},
                   {"loss_type": "gspo", "minibatches": 2})}
SETTINGS = ("gradient_checkpointing=true", "quant=nf4", "micro_batch_tokens", "resume=true")


class Memory:
    """The stand-in's memory, and what became of a run in it. room: tokens of a pass; slots: rows of a decode step."""

    def __init__(self, room: int = 1 << 30, slots: int = 1 << 30, since: int = 1, kind="CUDA", where: str = "forward",
                 spare: bool = True):
        self.room, self.slots, self.since, self.where, self.spare = room, slots, since, where, spare
        self.raise_ = KINDS[kind]
        self.raised = self.step = self.passes = self.tokens = 0
        self.folder, self.said, self.error, self.gradients, self.before = Path(), "", None, [], 0

    def patches(self, loop) -> list:
        real = {name: getattr(loop, name) for name in ("hidden_states", "linear_token_loss", "clip_and_step", "lr_at")}
        decode = Decode.step

        def full(size: int, room: int) -> bool:
            self.passes += 1
            if self.step < self.since or size <= room or (self.spare and self.passes == 1):
                return False  # spare: the first pass of a step fits, whose gradient must not be counted twice
            self.raised += 1
            return True

        def hidden_states(model, input_ids, *args, **kwargs):
            self.tokens = input_ids.numel()
            if self.where == "forward" and full(self.tokens, self.room):
                raise self.raise_()
            return real["hidden_states"](model, input_ids, *args, **kwargs)

        def linear_token_loss(*args, **kwargs):
            loss, stats = real["linear_token_loss"](*args, **kwargs)
            if self.where == "backward" and full(self.tokens, self.room):
                def fail(_):
                    raise self.raise_()
                loss.register_hook(fail)
            return loss, stats

        def clip_and_step(optimizer, params, *args, **kwargs):
            self.before = self.before if self.gradients else self.raised  # the first step
            self.gradients.append(torch.cat([p.grad.flatten() for p in params if p.grad is not None]))
            return real["clip_and_step"](optimizer, params, *args, **kwargs)

        def lr_at(step, *args, **kwargs):
            if step + 1 > self.step:
                self.step, self.passes = step + 1, 0
            return real["lr_at"](step, *args, **kwargs)

        def step(decoder):
            if len(decoder.rows) > self.slots:
                self.raised += 1
                raise self.raise_()
            decode(decoder)

        own = {"hidden_states": hidden_states, "linear_token_loss": linear_token_loss, "clip_and_step": clip_and_step,
               "lr_at": lr_at}
        # many end tokens: a random model would hardly ever stop by itself
        ends = mock.patch.object(engines, "eos_ids", lambda *_: list(range(20, 60)))
        return [*(mock.patch.object(loop, *one) for one in own.items()), mock.patch.object(Decode, "step", step), ends]


def run(full: bool, folder: Path) -> list[Tally]:
    model, data = str(write_tiny(folder / "tiny")), write_problems(folder / "problems.jsonl", n=24)
    number = itertools.count()

    def train(loop, memory: Memory, out: Path | None = None, **options) -> Memory:
        memory.folder, output = out or folder / f"run{next(number)}", io.StringIO()
        cfg = make_config(SFTConfig if loop is sft else RLAIFConfig, model, data=data, out=str(memory.folder),
                          **COMMON | OPTIONS[loop] | options)
        with contextlib.ExitStack() as stack, contextlib.redirect_stdout(output):
            for patch in memory.patches(loop):
                stack.enter_context(patch)
            try:
                (sft.sft if loop is sft else rlaif.rlaif)(cfg)
            except (UserError, RuntimeError) as error:
                memory.error = error
        memory.said = output.getvalue()
        return memory

    return [*halved(full, train), learned(full, train), stopped(full, train), slots_halved(full, train), others(train)]


def halved(full: bool, train) -> list[Tally]:
    """The gradient is that of the unbroken step, and bitwise that of a run which began with fewer micro_batch_tokens."""
    tallies = []
    for loop in (sft, rlaif):
        tally = Tally(f"out_of_memory: {loop.__name__[9:]}, the same gradient")
        cases = [({}, "backward", "CPU")] if loop is sft else [({}, "forward", "CUDA")]
        if full:
            cases = [*itertools.product([{}], ("forward", "backward"), KINDS),
                     *itertools.product(FURTHER[loop], ("forward", "backward"), ("CUDA", "CPU"))]
        for options, where, kind in cases:
            options = options | {"steps": 2}
            short = train(loop, Memory(ROOM[loop], where=where, kind=kind), **options)
            whole = train(loop, Memory(), **options)
            wrong = unlike(short, whole, dropout="lora_dropout" in options)
            if not wrong and not {"updates_per_rollout", "minibatches"} & options.keys():  # old log-probs: before it
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
    if list(metrics(short.folder, "step", "skipped")) != list(metrics(whole.folder, "step", "skipped")):
        return "other steps are in the metrics"
    one, two = short.gradients[0], whole.gradients[0]
    error = float((one - two).norm() / two.norm())
    # a dropout mask depends on the cutting: there only the run with fewer micro_batch_tokens tells
    return "" if dropout or error <= ROUNDING else f"the gradient is off by {error:.1e}"


def kept(memory: Memory) -> dict:
    """What the newest checkpoint keeps of the lessons."""
    newest = list_checkpoints(memory.folder)[0]
    return json.loads((newest / "state.json").read_text())["memory"]


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


def slots_halved(full: bool, train) -> Tally:
    """A rollout that runs out of memory gives the same completions in fewer slots, and the next begins with those."""
    tally = Tally("out_of_memory: a rollout in fewer slots")
    whole = train(rlaif, Memory(), lr=1e-4)
    for slots, room in ((10, 1 << 30), (5, 1 << 30), (10, ROOM[rlaif])) if full else ((10, 1 << 30),):
        short = train(rlaif, Memory(room, slots=slots), lr=1e-4)
        texts = [[json.loads(line)["texts"] for line in open(m.folder / "samples.jsonl")] for m in (short, whole)]
        begun = short.said.count("sequences side by side")
        used = {r["slots"] for r in metrics(short.folder)}
        if short.error or not begun or max(used) != kept(short)["slots"] or max(used) > slots:  # a refill has fewer
            wrong = f"said {begun} times, slots {used}, learned {kept(short)}: {short.error}"
        elif 18 >> begun != max(used):
            wrong = f"it ran out {begun} times to come from 18 to {max(used)} slots"
        else:
            wrong = differs(short, whole) if texts[0] == texts[1] else f"other completions: {texts}"
        tally.add(not wrong, f"{slots} slots, passes of {room} tokens: {wrong}")
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
