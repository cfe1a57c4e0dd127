"""NaN, inf and -inf in loss, gradient, logits, reward and log-probs, at one step of a run and at three in a row.

A step that meets one must leave weights and optimizer bitwise as they were and be counted; three in a row end the run
with what to try. What is saved is finite, and what was saved before is intact.
"""
import contextlib
import itertools
import json
import math
from pathlib import Path
from unittest import mock

import torch
from harness import Tally, heard, model_and_data
from safetensors.torch import load_file
from toy import make_config, metrics, same_tensors

from minimath.config.schema import RLAIFConfig, SFTConfig
from minimath.core.checkpoint import list_checkpoints, verify
from minimath.core.errors import UserError
from minimath.core.state import optimizer_state
from minimath.judges import self_judge
from minimath.rollout import decode as decoding
from minimath.train import optimizer as optim
from minimath.train import rlaif, sft, trainer
from minimath.train.batches import PolicyBatch
from minimath.train.rewards import JudgeReward

VALUES = (math.nan, math.inf, -math.inf)
STEPS, FIRST = 5, 3  # of a run, and the first step that goes wrong
COMMON = {"lora_r": 4, "lr": 1e-2, "save_every": 1, "warmup": 0.0, "steps": STEPS}
SFT = {"batch_size": 4}
RLAIF = {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 10, "judge": "heuristic",
         "verifier": "python:killing.even"}
SFT_OPTIONS = ({}, {"packing": False, "micro_batch_tokens": 150}, {"optimizer": "adamw8bit"}, {"dtype": "bf16"},
               {"gradient_checkpointing": True, "lr_schedule": "constant"})
RLAIF_OPTIONS = ({}, {"importance_cap": 0.0}, {"updates_per_rollout": 2, "kl_coef": 0.1}, {"loss": "cispo"},
                 {"loss": "gspo", "updates_per_rollout": 2}, {"loss": "grpo", "entropy_coef": 0.01},
                 {"loss": "dr_grpo", "micro_batch_tokens": 70}, {"kl_coef": 0.1, "max_refill": 0})
PLACES = {sft: ("loss", "loss and gradient", "gradient", "logits"),
          rlaif: ("loss", "loss and gradient", "gradient", "logits", "logits of the rollout", "reward", "log-prob")}


def run(full: bool, folder: Path) -> list[Tally]:
    (model, data), number = model_and_data(folder, n=12), itertools.count()

    def train(loop, hooks, **options) -> Trained:
        own = {"model": model, "data": data, "out": str(folder / f"run{next(number)}"), **COMMON,
               **(SFT if loop is sft else RLAIF), **options}
        return train_with(loop, own, hooks)

    return [*poisoned(full, train), bad_weights(full, train), bad_rewards(full, train), bad_judge(full, train)]


# ---- a run with something wrong in it

class Trained:
    """What became of a run: its folder, output, error ("" for none), and a look at every optimizer step."""

    def __init__(self, out: str):
        self.folder, self.said, self.error = Path(out), "", ""
        self.step, self.bad, self.changed, self.good = 0, 0, [], {}


def train_with(loop, options: dict, hooks) -> Trained:
    """Train with hooks(trained) -> patches; every optimizer step is looked at."""
    trained = Trained(options["out"])
    cfg = make_config(SFTConfig if loop is sft else RLAIFConfig, **options)
    real, at_lr = optim.clip_and_step, trainer.lr_at

    def clip_and_step(optimizer, params, *args, **kwargs):
        before = {name: tensor.clone() for name, tensor in weights(params, optimizer).items()}
        norm, stepped = real(optimizer, params, *args, **kwargs)
        if not stepped:
            trained.bad += 1
            if not same_tensors(before, weights(params, optimizer)):
                trained.changed.append(trained.step)
        return norm, stepped

    def step_begins(step, *args, **kwargs):
        trained.step = step + 1
        return at_lr(step, *args, **kwargs)

    patches = [mock.patch.object(optim, "clip_and_step", clip_and_step),
               mock.patch.object(trainer, "lr_at", step_begins)]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        for patch in hooks(trained):  # after the others, so that they come first
            stack.enter_context(patch)
        trained.said, error = heard(lambda: (sft.sft if loop is sft else rlaif.rlaif)(cfg), UserError)
    trained.error = str(error or "")
    return trained


def weights(params, optimizer) -> dict[str, torch.Tensor]:
    return {str(i): p.detach() for i, p in enumerate(params)} | optimizer_state(optimizer)[0]


def injected(loop, place: str, value: float, steps, trained: Trained) -> list:
    """The patches that put `value` at a place of the given steps."""
    def patched(owner, name, spoil, before=False):
        real = getattr(owner, name)

        def function(*args, **kwargs):
            now = trained.step in steps
            if now and before:
                spoil(*args, **kwargs)
            result = real(*args, **kwargs)
            return spoil(result) if now and not before else result
        return [mock.patch.object(owner, name, function)]

    def gradient(optimizer, params, *_, **__):
        next(p for p in params if p.grad is not None).grad.view(-1)[1] = value

    def old_and_reference(result):
        result[-1][-1] = value
        return result

    match place:
        case "loss":
            return patched(loop, "linear_token_loss", lambda result: (result[0] + value, *result[1:]))
        case "loss and gradient":
            return patched(loop, "linear_token_loss", lambda result: (result[0] * value, *result[1:]))
        case "gradient":
            return patched(optim, "clip_and_step", gradient, before=True)
        case "logits":
            return patched(loop, "hidden_states", lambda hidden: hidden * value)
        case "logits of the rollout":
            return patched(decoding, "logits_of", lambda logits: logits.fill_(value))
        case "reward":
            return patched(JudgeReward, "rewards", lambda rewards: [*rewards[:-1], value])
        case "log-prob":
            real = PolicyBatch.__init__

            def made(batch, *args):
                real(batch, *args)
                if trained.step in steps:
                    batch.sampled_logp[-1][-1] = value
            own = [mock.patch.object(PolicyBatch, "__init__", made)]
            return own if value != value else own + patched(rlaif, "logps", old_and_reference)
    raise ValueError(place)


# ---- the cases

def poisoned(full: bool, train) -> list[Tally]:
    """Every place and value: in one step, which is skipped, and in all from FIRST on, which ends the run."""
    tallies = []
    for loop, places, every in ((sft, PLACES[sft], SFT_OPTIONS), (rlaif, PLACES[rlaif], RLAIF_OPTIONS)):
        name = loop.__name__.rpartition(".")[2]
        for k, place in enumerate(places):
            once, thrice = Tally(f"not_finite: {name}, {place}, one step"), Tally(f"not_finite: {name}, {place}, three")
            for i, (options, value) in enumerate(itertools.product(every, VALUES) if full else [({}, VALUES[k % 3])]):
                for tally, steps, check in ((once, {FIRST}, skipped), (thrice, range(FIRST, 99), ended)):
                    if full and i >= len(VALUES) and (i + k) % 2 == (tally is once):
                        continue  # of the further options each place and value in one of the two ways
                    if not full and tally is not (once, thrice)[k % 2]:
                        continue
                    trained = train(loop, lambda t: injected(loop, place, value, steps, t), **options)  # noqa: B023
                    wrong = check(trained)
                    tally.add(not wrong, f"{value} with {options}: {wrong}")
            tallies += [tally for tally in (once, thrice) if tally.tried]
    return tallies


def skipped(trained: Trained) -> str:
    """What is wrong with a run in one step of which something was not finite; "" for nothing."""
    if trained.error or "no weight was changed" not in trained.said:
        return trained.error or "no step was skipped"
    if trained.changed:
        return f"the skipped step {trained.changed[0]} changed weights or optimizer"
    records = metrics(trained.folder, "step", "optim/stepped", "optim/skipped")
    counted = [r["step"] for r in records if r["optim/stepped"] is not None and not r["optim/stepped"]]
    if [r["step"] for r in records] != list(range(1, STEPS + 1)) or counted != [FIRST]:
        return f"metrics tell of skipped steps {counted}"
    if records[-1]["optim/skipped"] != max(1, trained.bad):  # a step without an update, from a rollout of NaN, counts
        return f"{trained.bad} skipped, of which {records[-1]['optim/skipped']} were counted"
    return saved(trained, STEPS)


def ended(trained: Trained) -> str:
    """What is wrong with a run that met something not finite in every step from FIRST on."""
    if "3 steps in a row" not in trained.error or "try a lower lr" not in trained.error:
        return trained.error or "the run was not ended"
    if trained.changed:
        return f"the skipped step {trained.changed[0]} changed weights or optimizer"
    return saved(trained, trained.step - 1, adapter=False)


def saved(trained: Trained, steps: int, adapter: bool = True) -> str:
    """What is wrong with what a run has saved, the newest after `steps` steps."""
    folders = list_checkpoints(trained.folder)
    if not folders or int(folders[0].name[5:]) != steps:
        return f"the newest checkpoint is {folders[0].name if folders else 'missing'}, not of step {steps}"
    for folder in [*folders, *([trained.folder / "adapter"] if adapter else [])]:
        if problems := verify(folder):
            return f"{folder.name}: {problems[0]}"
    for file in trained.folder.rglob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if not torch.isfinite(tensor.float()).all():
                return f"{file.relative_to(trained.folder)}: {name} is not finite"
    text = (folders[0] / "state.json").read_text()
    return "state.json is not finite" if "NaN" in text or "Infinity" in text else ""


def bad_weights(full: bool, train) -> Tally:
    """A weight, or a number of the optimizer, that went bad unseen is not saved, whatever would have saved it."""
    tally = Tally("not_finite: weights that went bad unseen")
    cases = list(itertools.product((sft, rlaif), VALUES, ("weight", "optimizer"), (1, 2)))
    for loop, value, of, every in cases if full else (cases[0], cases[3]):
        def hooks(trained, loop=loop, value=value, of=of):
            real = optim.clip_and_step

            def clip_and_step(optimizer, params, *args, **kwargs):
                result = real(optimizer, params, *args, **kwargs)
                if trained.step == FIRST and result[1]:
                    spoiled = params[-1] if of == "weight" else optimizer.state[params[-1]]["exp_avg_sq"]
                    with torch.no_grad():
                        spoiled.view(-1)[0] = value
                return result
            return [mock.patch.object(optim, "clip_and_step", clip_and_step)]

        trained = train(loop, hooks, save_every=every, lr=1e-3)
        wrong = "" if "NaN or infinities" in trained.error or "3 steps in a row" in trained.error else "it was saved"
        wrong = wrong or saved(trained, FIRST - 1, adapter=False)
        if (trained.folder / "adapter").exists():
            wrong = wrong or "an adapter was saved"
        tally.add(not wrong, f"{loop.__name__}, {value} in the {of}, save_every={every}: {wrong} {trained.error}")
    return tally


def bad_rewards(full: bool, train) -> Tally:
    """A reward or a verifier of the user's that returns NaN or infinity ends the run with its name; the steps stay."""
    tally = Tally("not_finite: the user's own reward and verifier")
    for option in ("reward", "verifier"):
        for value in VALUES if full else [VALUES[len(option) % 3]]:
            def hooks(trained, value=value):
                return [mock.patch.dict(hook, {"at": lambda: value if trained.step == FIRST else None})]

            spec = f"python:{__name__}.hooked_{option}"
            trained = train(rlaif, hooks, **{option: spec}, save_every=0)
            named = f"{option}={spec}" in trained.error and str(value) in trained.error
            wrong = saved(trained, FIRST - 1, adapter=False) if named else trained.error or "the run went on"
            tally.add(not wrong, f"{option} that returns {value}: {wrong}")
    return tally


hook = {"at": lambda: None}  # () -> what the functions below return instead, None: nothing else


def hooked_reward(samples, example):
    value = hook["at"]()
    return [float(len(s.text)) if value is None else value for s in samples]


def hooked_verifier(text, example):
    value = hook["at"]()
    return len(text) % 2 == 0 if value is None else value


def bad_judge(full: bool, train) -> Tally:
    """Where the model that judges gives no finite log-probs, its verdicts are no votes, and the run goes on."""
    tally = Tally("not_finite: log-probs of the judge")
    for value in VALUES if full else VALUES[:1]:
        def hooks(trained, value=value):
            real = self_judge.linear_logp
            return [mock.patch.object(self_judge, "linear_logp", lambda *args, **kwargs: real(*args, **kwargs).fill_(
                value) if trained.step == FIRST else real(*args, **kwargs))]

        trained = train(rlaif, hooks, judge="self", group_size=6)
        counts = metrics(trained.folder, "judge/comparisons", "judge/no_votes", "judge/error")[FIRST - 1]
        wrong = trained.error or saved(trained, STEPS)
        if trained.bad or not counts["judge/comparisons"] or counts["judge/comparisons"] != counts["judge/no_votes"]:
            wrong = wrong or f"{trained.bad} steps were skipped, and counted was {json.dumps(counts)}"
        tally.add(not wrong, f"{value}: {wrong}")
    return tally


assert optim.BAD_STEPS == 3  # as `ended` reads it
