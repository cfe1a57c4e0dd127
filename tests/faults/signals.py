"""SIGINT, SIGTERM and the stop file in every phase of a run, and a second signal on top of the first.

A child gets its signal where a phase begins or up to 20 ms later, SIGINT with its whole process group as from a
terminal. It must stop within one step with the status that tells the cause, what it has saved must be valid, and the
resumed run must end bitwise as one that was never stopped.
"""
import json
import os
import random
import shutil
import signal
import threading
from pathlib import Path

from forks import beside, last_line, open_forks, words_of, wrap
from harness import Tally, model_and_data
from killing import records

from minimath.core.checkpoint import list_checkpoints, verify

LATEST_S = 0.02  # a signal comes at most this long after its phase began
PHASES = ("load", "data", "forward", "backward", "step", "rollout", "judge", "eval", "save")
STATUS = {"SIGINT": 130, "SIGTERM": 143, "stop file": 144}
SHARED = {"device": "cpu", "dtype": "fp32", "prompt_template": "{problem}"}
TRAIN = {"lora_r": 4, "lr": 0.01, "warmup": 0, "save_every": 2}
OPTIONS = {  # the kinds of runs: their command, options
    "sft": ("sft", TRAIN | {"steps": 6, "batch_size": 4}),
    "rlaif": ("rlaif", TRAIN | {"steps": 4, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 16,
                                "judge": "heuristic", "verifier": "python:killing.even"}),
    "eval": ("eval", {"max_new_tokens": 8, "limit": 12, "max_num_seqs": 1}),  # one by one: longer than LATEST_S
    "sft that evaluates": ("sft", TRAIN | {"steps": 4, "batch_size": 4, "eval_every": 1, "eval_limit": 3,
                                           "eval_max_new_tokens": 8}),
}
OPTIONS["rlaif that judges"] = ("rlaif", OPTIONS["rlaif"][1] | {"verifier": "none"})  # there is always a pair
KINDS = {"load": ("sft", "rlaif", "eval"), "data": ("sft", "rlaif", "eval"), "rollout": ("rlaif",),
         "judge": ("rlaif that judges",), "eval": ("eval", "sft that evaluates")}  # other phases: sft and rlaif
FAST = (("forward", "SIGTERM"), ("rollout", "SIGINT"), ("backward", "stop file"))


def run(full: bool, folder: Path) -> list[Tally]:
    shared = SHARED | dict(zip(("model", "data"), model_and_data(folder, n=12), strict=True))
    with open_forks(folder, "signals") as fork:
        runs = Runs(folder, shared, fork)
        if not full:
            first = Tally("signals: one, or a stop file")
            for phase, cause in FAST:
                runs.stop(first, phase, cause, number=0, resume=False)
            second = Tally("signals: a second one")
            runs.stop(second, "save", "SIGTERM", number=0, second=True, resume=False)
            return [first, second]
        tallies = []
        for phase in PHASES:
            for cause, times in (("SIGINT", 10), ("SIGTERM", 10), ("stop file", 3)):
                tallies.append(Tally(f"signals: {cause} in {phase}"))
                for number in range(times):
                    runs.stop(tallies[-1], phase, cause, number)
            tallies.append(Tally(f"signals: a second one in {phase}"))
            for number, cause in enumerate(("SIGINT", "SIGTERM") * 2):
                runs.stop(tallies[-1], phase, cause, number, second=True)
        return [*tallies, whole_recipe(folder, shared, fork)]


# ---- the parent's side

class Runs:
    """Runs of each kind: whole ones to compare with, made when first needed, and stopped ones."""

    def __init__(self, folder: Path, shared: dict, fork):
        self.folder, self.shared, self.fork, self.count = folder, shared, fork, 0

    def words(self, kind: str, out: Path, **options) -> list[str]:
        command, own = OPTIONS[kind]
        more = {"eval_data": self.shared["data"]} if "eval_every" in own else {}
        return words_of(command, self.shared | own | more | options | {"out": out})

    def whole(self, kind: str) -> Path:
        out = self.folder / f"whole {kind}"
        if not out.exists() and (status := self.fork(self.words(kind, out), out)):
            raise RuntimeError(f"{kind} without a signal ended with status {status}: {last_line(out)}")
        return out

    def stop(self, tally: Tally, phase: str, cause: str, number: int, second=False, resume=True) -> None:
        """A run with an alarm in a phase, by a second signal at once; number: of the try."""
        kinds, rng = KINDS.get(phase, ("sft", "rlaif")), random.Random(f"{phase} {cause} {number}")
        kind, self.count = kinds[number % len(kinds)], self.count + 1
        out = self.folder / f"run{self.count}"
        late = 0.0 if second or cause == "stop file" or number < 5 else rng.uniform(0, LATEST_S)
        most = {"load": 1, "data": 1, "judge": 3}.get(phase, 4)
        alarm = {"phase": phase, "nth": rng.randint(1, most), "cause": cause, "late": late, "second": second}
        status = self.fork(self.words(kind, out), out, alarm)
        # in the data phase SIGTERM's default action may end it; a shell shows 143 too
        if status not in (STATUS[cause], *([-signal.SIGTERM] if (phase, cause) == ("data", "SIGTERM") else [])):
            wrong = f"it ended with status {status}: {last_line(out)}"
        elif beside(out, "went on").exists():
            wrong = "it went on after the second signal"
        else:
            wrong = damaged(out) if second else not_stopped_well(out, kind)
        tally.add(not (wrong := wrong or (self.resumed_differs(kind, out) if resume else "")),
                  f"{kind}, {cause}, try {number}: {wrong}")
        shutil.rmtree(out, ignore_errors=True)

    def resumed_differs(self, kind: str, out: Path) -> str:
        held = any((out / name).exists() for name in ("config.yaml", "checkpoints"))
        words = self.words(kind, out, **({"resume": "true"} if held else {}))
        status = self.fork(words, out)
        return f"resumed, it ended with status {status}: {last_line(out)}" if status else differs(self.whole(kind), out)


def not_stopped_well(out: Path, kind: str) -> str:
    """What is wrong with a run that was asked to stop: more than one step after it, something damaged, a step lost."""
    at = int(beside(out, "mark").read_text()) if beside(out, "mark").exists() else 0
    done = steps_of(out)
    if done > at + 1:
        return f"it went on for {done - at} steps"
    if wrong := damaged(out):
        return wrong
    newest = list_checkpoints(out)[:1]
    kept = json.loads((newest[0] / "state.json").read_text())["done"] if newest else 0
    if kind != "eval" and kept != done:
        return f"{done} steps were done, and the newest checkpoint is of step {kept}"
    said = beside(out, "log").read_text()
    if "Traceback" in said:
        return f"a traceback: {last_line(out)}"
    return "" if not done or "resume=true" in said else "it did not say how to go on"


def steps_of(run: Path) -> int:
    """Steps in the metrics, evaluations left out."""
    return len([record for record in records(run / "metrics.jsonl") if "eval/accuracy" not in record])


def damaged(out: Path) -> str:
    """What of the saved does not verify."""
    folders = [*list_checkpoints(out), *([out / "adapter"] if (out / "adapter").exists() else [])]
    return "; ".join(f"{folder.name}: {problem}" for folder in folders for problem in verify(folder)[:1])


def differs(whole: Path, out: Path) -> str:
    """What is not equal, clocks aside, between a run that was never stopped and one that was and went on."""
    if (whole / "eval.json").exists():
        names = ["completions.jsonl"]
    else:
        names = ["metrics.jsonl", "samples.jsonl"]
        file = Path("adapter", "adapter_model.safetensors")
        if not (out / file).exists() or (whole / file).read_bytes() != (out / file).read_bytes():
            return "the adapter is another one than without the signal"
    wrong = [name for name in names if records(whole / name) != records(out / name)]
    return f"after the resume {', '.join(wrong)} differ" if wrong else ""


def whole_recipe(folder: Path, shared: dict, fork) -> Tally:
    """`minimath run` stopped in a stage, by a signal or by a stop file in the folder of the whole run, goes on."""
    tally, recipe = Tally("signals: a whole recipe"), folder / "recipe.yaml"
    lines = [f"{key}: {json.dumps(str(value))}" for key, value in (shared | {"lora_r": 4}).items()]
    lines += ["sft: {steps: 3, batch_size: 4}", "eval: {limit: 3, max_new_tokens: 6}",
              "rlaif: {steps: 2, prompts_per_step: 2, group_size: 4, max_new_tokens: 8, judge: heuristic, "
              "verifier: none}"]
    recipe.write_text("\n".join(lines) + "\n")
    for number, (phase, cause) in enumerate((p, c) for p in ("forward", "eval", "judge") for c in STATUS):
        out = folder / f"recipe{number}"
        status = fork(["run", str(recipe), f"out={out}"], out, {"phase": phase, "nth": 2, "cause": cause, "late": 0.0,
                                                                "second": False})
        wrong = "" if status == STATUS[cause] else f"it ended with status {status}: {last_line(out)}"
        if not wrong and "resume=true" not in beside(out, "log").read_text():
            wrong = "it did not say how to go on"
        if not wrong and (status := fork(["run", str(recipe), f"out={out}", "resume=true"], out)):
            wrong = f"resumed, it ended with status {status}: {last_line(out)}"
        tally.add(not wrong, f"{cause} in {phase}: {wrong}")
    return tally


# ---- the child's side

def set_hooks(run: Path, alarm: dict | None) -> None:
    """Let the alarm go off the nth time that its phase comes, and note how many steps are done when it is heard."""
    from minimath.core import checkpoint, files, interrupt
    from minimath.eval import evaluate, suite
    from minimath.rollout.decode import Decode
    from minimath.train import optimizer, rewards, rlaif, sft, trainer
    interrupt.LOOK_S = 0.0  # these evaluations take less than a second
    if not alarm:
        return
    times, evaluating, real = [], [], signal.signal

    def heard(number, handler):
        def noted(*args):
            beside(run, "mark").write_text(str(steps_of(run)))
            handler(*args)
        return real(number, noted if callable(handler) else handler)

    signal.signal = heard

    def comes(phase: str) -> None:
        if phase == alarm["phase"]:
            times.append(1)
            if len(times) == alarm["nth"]:
                go_off(run, alarm)

    def optimizer_made(optimizer, *_):
        optimizer.register_step_pre_hook(lambda *_: comes("step"))
        optimizer.register_step_post_hook(lambda *_: comes("step"))

    for loop in (sft, rlaif):
        wrap(loop, "load_examples", before=lambda *_, **__: comes("data"))
        wrap(loop, "hidden_states", before=lambda *_, **__: comes("forward"))
        wrap(loop, "linear_token_loss",
             after=lambda result, *_, **__: result[0].register_hook(lambda _: comes("backward")))
    wrap(optimizer, "make_optimizer", after=optimizer_made)
    wrap(suite, "load_examples", before=lambda *_, **__: comes("data"))
    for owner in (trainer, evaluate):
        wrap(owner, "load_policy", before=lambda *_, **__: comes("load"))
        wrap(owner, "evaluate_policy", before=lambda *_, **__: evaluating.append(1),
             after=lambda *_, **__: evaluating.clear())
    wrap(evaluate, "grade", before=lambda *_, **__: comes("eval"))
    wrap(Decode, "step", before=lambda *_: comes("eval" if evaluating else "rollout"))
    wrap(rewards, "make_judge", after=lambda judge, *_, **__: wrap(judge, "compare", before=lambda *_: comes("judge")))
    wrap(checkpoint, "write_adapter", after=lambda *_: comes("save"))
    wrap(files, "flush_to_disk", before=lambda path: path.suffix == ".yaml" or comes("save"))  # of a checkpoint


def go_off(run: Path, alarm: dict) -> None:
    """Send the signal to this process, or touch the stop file."""
    if alarm["cause"] == "stop file":
        run.mkdir(exist_ok=True)
        beside(run, "mark").write_text(str(steps_of(run)))
        (run / "stop").touch()
        return
    number = signal.Signals[alarm["cause"]]

    def send() -> None:
        (os.killpg if number == signal.SIGINT else os.kill)(os.getpid(), number)

    if alarm["late"]:
        threading.Timer(alarm["late"], send).start()
        return
    send()
    if alarm["second"]:
        send()
        beside(run, "went on").touch()

