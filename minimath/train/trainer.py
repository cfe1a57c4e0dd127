"""What both stages need around their algorithm: the run folder, resume, rollback, checkpoints, evaluation, signals.

    with Trainer(cfg, "sft") as trainer:
        trainer.track(sampler=sampler)               # whatever has memory: state_dict / load_state_dict
        for step in trainer.steps(100):
            step.log(trainer.optimizer.step(batch, closure))
    return trainer.summary()

Asking for the next step commits the last one: random numbers and tracked states are taken over, its metrics are
written, it is saved and evaluated when due. `steps` ends on a stop signal or at the deadline. An exception inside the
block gives up what was not committed, random numbers too (a user's verifier may throw dice), saves the last commit if
no checkpoint has it, and goes on; Interrupted ends the block as its own end would.
"""
import contextlib
import copy
import math
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from minimath.config.load import config_text, plain_values
from minimath.config.options import options_of
from minimath.config.schema import DataOptions, EvalConfig
from minimath.core import checkpoint, dist, interrupt
from minimath.core.errors import Interrupted, UserError, is_out_of_memory
from minimath.core.files import read_json, write_whole
from minimath.core.log import RunLog, truncate_metrics
from minimath.core.run import open_run
from minimath.core.run_folder import ADAPTER, CONFIG
from minimath.core.state import restore_rng, rng_state, seed_rng, stream_seed
from minimath.data.examples import Example, describe_report, hash_of, load_examples
from minimath.eval.evaluate import evaluate_policy
from minimath.models.load import describe, first_line
from minimath.models.policy import load_policy
from minimath.train.best import Best
from minimath.train.optimizer import Optimizer, check_finite, settings_to_try
from minimath.train.schedule import Schedule, lr_at

KEPT = 3  # newest checkpoints; the best one is kept besides
HELD_OUT = {"eval_data", "eval_limit", "eval_max_new_tokens"}  # options that make an evaluation another one
BAR = {"loss": "loss", "time/tokens_per_s": "tok_s", "reward/mean": "reward", "rollout/correct": "correct",
       "rollout/tokens": "tokens"}  # metrics beside the progress bar, and what they are called there


class Step:
    """One step of the loop: its number from 1, and the metrics it has so far."""

    def __init__(self, number: int, log: RunLog, progress: float):
        self.number, self.metrics, self._log = number, {}, log
        self.progress = progress  # of the schedule: 0 in the first step, 1 in the last

    def log(self, *metrics: dict) -> None:
        for each in metrics:
            self.metrics |= each

    def warn(self, texts: list[str]) -> None:
        for text in texts:
            self._log.say(f"step {self.number}: {text}")

    def due(self, every: int) -> bool:
        """Whether something done every N steps is due; 0: never."""
        return bool(every) and self.number % every == 0

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.metrics[f"time/{name}"] = self.metrics.get(f"time/{name}", 0.0) + time.monotonic() - started


class Trainer:
    """Owns folder, lock, log, signals, model and optimizer of a training run."""

    def __init__(self, cfg, stage: str, examples: list[Example] = ()):
        """Read the held-out problems. examples: of the training, by which a resume tells other data."""
        self.cfg, self.stage = cfg, stage
        if fault := cfg.check():
            raise UserError(fault)
        self.held_out, self._noted = load_held_out(cfg)
        self._rows = {"data": hash_of(examples), "eval_data": hash_of(self.held_out)}
        self.tracked: dict[str, object] = {}
        self.done = self.saved = self.total = 0  # steps committed, in the newest checkpoint, wanted
        self.keeps_best = bool(self.held_out) and cfg.evaluation.final == "best"
        self.best = Best(margin=self.keeps_best)  # handed on at the end, if it is kept, instead of the last one
        self.owed = False  # an evaluation was interrupted: the run that goes on begins with it
        self.interrupted_by = 0
        self._state = self._rng = None  # states of what is tracked, and random generators, at the last commit
        self._trainable: set[str] = set()  # names

    def __enter__(self) -> "Trainer":
        with contextlib.ExitStack() as stack:
            run = self.cfg.run
            self.log = stack.enter_context(open_run(
                run.out, self.stage, config=config_text(self.cfg), resume=run.resume, trackers=run.trackers,
                deterministic=run.deterministic))
            self.started = time.monotonic()
            if self._noted:
                self.log.say(self._noted)
            seed_rng(run.seed)  # adapter initialisation, and whatever a user's function draws
            self.policy = load_policy(self.cfg, train=True)
            self.log.say(describe(self.policy.model, self.cfg))
            self._trainable = self.policy.trainable()
            dist.broadcast_parameters(self.policy.params)
            self.optimizer = Optimizer(self.policy, self.cfg, self.log.say)
            self.track(optimizer=self.optimizer)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind, error, trace) -> bool:
        ends_well = error is None or isinstance(error, Interrupted)
        if no_memory := error is not None and is_out_of_memory(error):  # where no pass can be made smaller
            traceback.clear_frames(trace)  # they hold the failed pass, beside which saving might fail as well
        with self._stack:
            if isinstance(error, Exception):
                self._roll_back()
                if not ends_well:
                    self._rescue()
                elif self.done < self.total:  # else it is what comes after the steps
                    self.log.say("the step was interrupted and is not counted")
            if ends_well:
                self._finish()
            if no_memory:
                raise UserError(f"out of memory ({first_line(error)}): try {settings_to_try(self.cfg)}, then "
                                "resume=true") from None
        return ends_well

    def track(self, **objects) -> None:
        """Keep the state of objects with state_dict / load_state_dict in the checkpoints.

        A state is a dict for json, and may have a dict of tensors by name under "tensors". Those are not copied: the
        object must never change a tensor in place that it has handed out, but make another."""
        self.tracked |= objects

    # ---- the steps

    def steps(self, total: int) -> Iterator[Step]:
        """Yield steps until `total` are done, a signal comes or the time is up."""
        cfg, self.total = self.cfg, total
        schedule = Schedule(cfg.optimizer, total, self.log.say)
        self.track(schedule=schedule)
        if cfg.run.resume:
            self._resume()
        if not self.done and not self.best.newest and self.keeps_best:  # what it began with may stay the best
            self.owed = True
        self._commit_state()
        with self.log.progress(total, self.stage, done=self.done) as advance:
            if self.owed and self.held_out:
                self._save(best=self._evaluate())  # also when it is not the best: it is owed no longer
            schedule.begin(self._left())
            while self.done < total and not self._ends():
                place = schedule.place(self.done)
                step = Step(self.done + 1, self.log, place / max(1, total - 1))
                # by the step, so that dropout after a resume is what it would have been
                torch.manual_seed(stream_seed(cfg.run.seed, self.done) + dist.rank())
                self.optimizer.lr = lr_at(place, total, lr=cfg.optimizer.lr,
                                          schedule=cfg.optimizer.lr_schedule, warmup=cfg.optimizer.warmup)
                yield step
                if other := self._trainable ^ self.policy.trainable():
                    raise RuntimeError(f"step {step.number} changed which tensors train ({', '.join(sorted(other)[:3])}"
                                       "): leaving disable_adapter or set_adapter does so, see peft #3447")
                self.done += 1
                schedule.commit(self.done, self._left())
                self._commit_state()
                self.log.metrics(self.done, **step.metrics)
                advance(1, **beside_bar(step.metrics))
                is_best = bool(self.held_out) and step.due(cfg.evaluation.eval_every) and self._evaluate()
                if is_best or step.due(cfg.run.save_every):
                    self._save(best=is_best)
            if self.done >= total and self.keeps_best and self.done > self.best.newest_step():
                self._save(best=self._evaluate())  # the last one may be the best, also where no evaluation was due

    def _ends(self) -> bool:
        self.interrupted_by = interrupt.requested()
        return bool(self.interrupted_by) or self._left() < 0

    def _left(self) -> float:
        """Seconds until max_minutes are over; the same on all processes."""
        minutes = self.cfg.run.max_minutes
        return -max(dist.of_all(time.monotonic() - self.started - 60 * minutes)) if minutes else math.inf

    # ---- evaluation within training

    def _evaluate(self) -> bool:
        """Evaluate on the held-out problems; tell whether it is the best so far."""
        cfg = self.cfg
        shared = cfg.shared(EvalConfig, "model", "prompt", "engine")
        if cfg.engine.rollout == "vllm":  # its engine has the sampling options of the rollouts
            shared |= {"rollout": "auto", "vllm_url": ""}
        own = EvalConfig(**shared, max_new_tokens=cfg.evaluation.eval_max_new_tokens, seed=cfg.run.seed)
        self.owed = True
        try:
            summary, _ = evaluate_policy(self.policy, self.held_out, own, self.log)
        except Interrupted:
            self.log.say("the evaluation was interrupted")
            return False
        self.owed = False
        self.log.metrics(self.done, **{"eval/accuracy": summary["accuracy"], "eval/tokens": summary["mean_tokens"]})
        low, high = summary["interval"]
        self.log.say(f"step {self.done}: accuracy {summary['accuracy']:.3f} ({low:.3f} to {high:.3f}), "
                     f"{summary['mean_tokens']:.0f} tokens on {summary['problems']} held-out problems")
        return self.best.take(step=self.done, accuracy=summary["accuracy"], tokens=summary["mean_tokens"],
                              problems=summary["problems"])

    # ---- commit, save, resume

    def _commit_state(self) -> None:
        """Take the states as they are: to save, and to go back to."""
        self.optimizer.commit()
        states = {name: each.state_dict() for name, each in self.tracked.items()}
        big = [tensor for state in states.values() for tensor in state.get("tensors", {}).values()]
        self._state = copy.deepcopy(states, {id(tensor): tensor for tensor in big})  # see track
        self._rng = rng_state()

    def _roll_back(self) -> None:
        if self._rng is None:  # no step has begun
            return
        restore_rng(*self._rng)
        if not self.optimizer.roll_back():  # its weights have no name: the checkpoint before stands
            self.done = self.saved

    def _save(self, best: bool = False) -> None:
        """Save in the middle of a run; a failure is said: the next save may work."""
        check_finite(self.policy.params, self.optimizer.inner)
        try:
            self._write(best)
        except UserError as error:
            self._recall()  # what is not saved is no mark for the next
            self.log.say(f"step {self.done} is not saved; the run goes on, and tries again at the next save: {error}")

    def _recall(self, state: dict | None = None) -> None:
        """Take what is known of evaluations from a state, or from the best checkpoint; nothing if that is not sound."""
        saved = checkpoint.best_checkpoint(self.log.run_dir, self.done)
        sound = saved is not None and not checkpoint.verify(saved)
        known = (state or read_json(saved / "state.json"))["best"] if sound else None
        self.best = Best(margin=self.keeps_best)
        if isinstance(known, dict):  # of an older minimath it is a number
            self.best.load_state_dict(known)

    def _write(self, best: bool = False) -> None:
        state = {"done": self.done, "best": self.best.state_dict(), "owed": self.owed,
                 "config": plain_values(self.cfg), "rows": self._rows, "tracked": self._state}
        checkpoint.save_checkpoint(self.log.run_dir, self.done, model=self.policy.model, state=state, keep=KEPT,
                                   optimizer=self.optimizer.inner, best=best)
        self.saved = self.done

    def _rescue(self) -> None:
        """After an exception: save the steps done, unless a sound checkpoint has them."""
        if not self.done or not checkpoint.verify(checkpoint.checkpoint_folder(self.log.run_dir, self.done)):
            return
        try:
            check_finite(self.policy.params, self.optimizer.inner)
            self._write()
            self.log.say(f"the {self.done} steps done are saved; put it right and go on with resume=true")
        except (UserError, RuntimeError) as error:  # that of the loop is what the user must hear
            self.log.say(f"the steps since the last checkpoint can't be saved: {error}")

    def _finish(self) -> None:
        """Save what the last checkpoint lacks, and the adapter; say how far it got."""
        if self._rng is None and (number := interrupt.requested()):  # before `steps`: these are no weights of the run
            self.interrupted_by = number
            self.log.say(f"{interrupt.reason()}: stopped before its first step; go on with out={self.log.run_dir} "
                         "resume=true")
            return
        check_finite(self.policy.params, self.optimizer.inner)
        if self.done > self.saved:
            self._write()
        self.interrupted_by = interrupt.requested()
        adapter = self._hand_on()
        if self.done < self.total:
            self.log.say(f"{interrupt.reason()}: stopped after step {self.done} of {self.total}; go on with "
                         f"out={self.log.run_dir} resume=true")
        self.log.say(f"adapter: {adapter} ({time.monotonic() - self.started:.0f} s)")

    def _hand_on(self) -> Path:
        """Leave the adapter that the options ask for in the run folder."""
        folder = self.log.run_dir / ADAPTER
        best = checkpoint.best_checkpoint(self.log.run_dir, self.done) if self.keeps_best else None
        if best and (faults := checkpoint.verify(best)):
            self.log.say(f"{best}, the best, is damaged ({faults[0]}): that of step {self.done} is left")
            best = None
        if best is None or checkpoint.step_of(best) == self.done or self.best.newest_step() < 1:  # nothing to compare
            return checkpoint.save_adapter(self.policy.model, folder)
        self.log.say(f"the adapter left is that after step {checkpoint.step_of(best)}, the shortest within a standard "
                     f"error of the highest accuracy; final=last leaves that after step {self.done}")
        return checkpoint.copy_adapter(best, folder)

    def _resume(self) -> None:
        """Load the newest sound checkpoint; say changed options; drop lost metrics."""
        state = checkpoint.load_checkpoint(self.log.run_dir, model=self.policy.model, optimizer=self.optimizer.inner)
        self.done = self.saved = state["done"] if state else 0
        if max(dist.of_all(self.done)) > self.done:
            raise UserError(f"process {dist.rank()} found {self.done} steps in {self.log.run_dir}, another one more: "
                            "all machines need the same run folder, on a drive that they share")
        truncate_metrics(self.log.run_dir, self.done if state else -1)  # what it began with is evaluated again
        if state is None:
            self.log.say("no checkpoint yet: starting from step 0")
            return
        self._recall(state)
        self.owed = state["owed"]
        for name, each in self.tracked.items():
            if name in state["tracked"]:
                each.load_state_dict(state["tracked"][name])
        before = state["config"]
        changed = {name: f"{name} {before.get(name)} -> {value}" for name, value in plain_values(self.cfg).items()
                   if before.get(name) != value and name not in ("resume", "out")}
        other = {name for name, was in state.get("rows", {}).items() if was and self._rows[name] not in ("", was)}
        changed |= {name: f"{name} has other rows than it had" for name in other - changed.keys()}
        if changed.keys() & HELD_OUT:
            self.best = Best(margin=self.keeps_best)  # it was of other problems
        if changed:
            self.log.say("options changed since the checkpoint: " + ", ".join(changed.values()))
        self.log.say(f"resumed after step {self.done}")
        write_whole(self.log.run_dir / CONFIG, config_text(self.cfg))

    def summary(self) -> dict:
        """Return steps, run_dir, adapter, and the signal that ended it, or 0."""
        return {"steps": self.done, "run_dir": str(self.log.run_dir), "adapter": str(self.log.run_dir / ADAPTER),
                "signal": self.interrupted_by}


def beside_bar(metrics: dict) -> dict:
    """Choose what of a step's metrics stands beside the progress bar."""
    shown = {short: metrics[name] for name, short in BAR.items() if name in metrics}
    if metrics.get("time/rollout"):
        shown["tok_s"] = metrics["rollout/samples"] * metrics["rollout/tokens"] / metrics["time/rollout"]
    parts = {name.removeprefix("reward/"): value for name, value in metrics.items()
             if name.startswith("reward/") and name not in BAR}
    return shown | parts | shown  # the order of the first two; a part may be called loss


def load_held_out(cfg) -> tuple[list, str]:
    """Load the problems evaluated during training, and what is to be said of them; or UserError."""
    own = getattr(cfg, "evaluation", None)
    if own is None:
        return [], ""
    if own.eval_every and not own.eval_data:
        raise UserError("eval_every needs held-out problems: set eval_data=, or eval_every=0")
    if not own.eval_every:
        idle = [name for name in ("eval_data", "final")
                if cfg.value(name) not in (options_of(type(cfg))[name].default, "last")]
        return [], f"{' and '.join(idle)} without eval_every=N: nothing is evaluated in training" if idle else ""
    options = DataOptions(source=own.eval_data, split="test", limit=own.eval_limit, strict=cfg.data.strict)
    examples, report = load_examples(options, need=("answer",))
    said = describe_report(report)
    return examples, said and f"eval_data: {said}"
