"""Keep a trained judge fresh: now and then it learns from the newest rollouts, as the verifier marks them.

A judge knows the faults of the policy that it was trained beside; RL makes another one of that. The policy's adapter
is not touched: the judge's is the active one and alone has gradients."""
import contextlib
from collections.abc import Iterator
from dataclasses import replace

from minimath.config.schema import RLAIFConfig
from minimath.core import dist
from minimath.core.checkpoint import save_adapter
from minimath.core.errors import Interrupted, UserError
from minimath.core.log import RunLog
from minimath.core.state import stream_seed
from minimath.data.batch import step_indices
from minimath.data.examples import Example
from minimath.data.sample import Group
from minimath.judges.base import Judge
from minimath.judges.card import JUDGE, write_card
from minimath.judges.known import problem_hash
from minimath.judges.lessons import Lessons, Solved
from minimath.models.forward import adapter_named
from minimath.models.policy import Policy
from minimath.train.judge import learn
from minimath.train.optimizer import Optimizer
from minimath.train.verifier import BY_VOTES, NEEDS_ANSWER, answer_of

LONGEST = 4096  # tokens of a row: longer ones are cut


class JudgeRefresh(contextlib.AbstractContextManager):
    """Trains the judge's adapter for a few steps, every judge_refresh steps of the run.

    The groups since the last time are kept, and with weights and moments in the checkpoints. A group that the verifier
    did not decide teaches nothing, nor does a problem of the canary, which is held out, nor a completion that was cut,
    of which a user's function is not asked. On exit, stopped in a rollout too, the judge as it is goes to RUN/judge, if
    it learnt anything."""

    def __init__(self, cfg: RLAIFConfig, policy: Policy, judge: Judge | None, log: RunLog):
        self.every, self.steps, self.size = cfg.judge.refresh, cfg.judge.refresh_steps, cfg.prompts_per_step
        self.policy, self.judge, self.log, self.seed, self.done = policy, judge, log, cfg.run.seed, 0
        self.marks_cut = cfg.verifier in (*NEEDS_ANSWER, *BY_VOTES)
        self.newest: list[dict] = []  # problem and records of each group
        self.learnt: set[str] = set()  # hashes of problems
        if self.every:
            self.held_out = {problem_hash(problem) for problem, *_ in judge.card.pairs}
            self.params = [p for name, p in policy.model.named_parameters() if f".{JUDGE}." in name]
            self.lessons = Lessons(judge.form, judge.reader, LONGEST, seed=cfg.run.seed)
            with self.training():
                self.optimizer = Optimizer(policy, cfg.replace(lr=cfg.judge.refresh_lr, updates_per_rollout=1), log.say)
            self.state = self.optimizer.snapshot()  # a copy: what a checkpoint holds must not change under it

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Let the judge's adapter train inside, and nothing else."""
        trains = [(p, p.requires_grad) for p in self.policy.model.parameters()]
        own = set(self.params)
        try:
            with adapter_named(self.policy.model, JUDGE):
                for p, _ in trains:
                    p.requires_grad_(p in own)
                yield
        finally:
            for p, does in trains:
                p.requires_grad_(does)

    def learn(self, step, groups: list[Group]) -> dict:
        """Take in a step's groups; where a refresh is due, train, and return its loss."""
        if not self.every:
            return {}
        self.newest += [{"problem": group.example.problem,
                         "records": [record_of(s) for s in group.samples if s.finished or self.marks_cut]}
                        for group in groups
                        if group.decided and problem_hash(group.example.problem) not in self.held_out]
        if not step.due(self.every) or not self.newest:
            return {}
        sets = self.lessons.sets([Solved(Example(each["problem"]), each["records"]) for each in self.newest])
        metrics = {}
        with self.training():
            for number in range(self.steps if sets else 0):
                chosen = step_indices(number, len(sets), self.size, stream_seed(self.seed, self.done) % 2**31)
                metrics = learn(self.policy, self.optimizer, self.judge.form, [sets[i] for i in chosen])
        self.learnt |= {problem_hash(each["problem"]) for each in self.newest}
        self.newest, self.done, self.state = [], self.done + 1, self.optimizer.snapshot()
        return {"judge/refresh_loss": metrics["loss"], "judge/refresh_rows": sum(map(len, sets))} if metrics else {}

    def state_dict(self) -> dict:
        if not self.every:
            return {}
        tensors, numbers = self.state
        return {"newest": self.newest, "done": self.done, "learnt": sorted(self.learnt), "numbers": numbers,
                "tensors": tensors, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        if not self.every and state.get("done"):
            self.log.say("judge_refresh=0: the judge is that of judge_adapter again, not what it learnt in "
                         f"{state['done']} refreshes of this run; judge_adapter=RUN/judge has that")
        if not self.every or not state:
            return
        tensors = state["tensors"]
        if [p.shape for p in self.params] != [w.shape for name, w in tensors.items() if name[:6] == "weight"]:
            raise UserError("judge_adapter is not the one that this run has refreshed so far: give that, or a new out=")
        if (learnt := state.get("learnt")) is None:  # of an older minimath
            self.log.say("the checkpoint does not say which problems the judge has learnt from so far: RUN/judge will "
                         "not name them, so check that judge on data that this run does not train on")
        self.newest, self.done, self.learnt = state["newest"], state["done"], set(learnt or ())
        self.optimizer.restore(tensors, state["numbers"], where="the judge's state")
        self.optimizer.load_state_dict(state["optimizer"])
        self.state = self.optimizer.snapshot()  # torch's optimizers change the moments that they were given

    def __exit__(self, kind, *_) -> None:
        if kind in (None, Interrupted) and self.every and self.done and dist.is_main():
            card = replace(self.judge.card, problems=sorted({*self.judge.card.problems, *self.learnt}))
            write_card(save_adapter(self.policy.model, self.log.run_dir / JUDGE, name=JUDGE), card)


def record_of(sample) -> dict:
    """Give what a lesson needs of a sample, as json holds it."""
    return {"text": sample.solution, "correct": sample.correct, "finished": sample.finished,
            "answer": answer_of(sample), "tokens": sample.tokens, "correct_steps": sample.steps.right,
            "steps": sample.steps.total}
