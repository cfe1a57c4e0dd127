"""The learning rate of every step: by the steps, or by the clock where max_minutes ends before they do."""
import math
import statistics
from collections.abc import Callable

from minimath.config.schema import OptimizerOptions
from minimath.core.state import Kept

RECENT = 9  # step times whose median tells how long the rest takes
SURE = 5  # of them, after which the rest is told; or fewer, when a share USED of the time is gone
USED = 0.2


def lr_at(step: float, total_steps: int, *, lr: float, schedule: str, warmup: float) -> float:
    """Return the learning rate of step 0 .. total_steps - 1, or of a place between.

    warmup below 1 is a share of the steps, from 1 on a number of them. No step is spent at rate 0: warm-up starts at
    lr / steps, and the decay reaches 0 one step after the last."""
    warmup_steps = min(total_steps, math.ceil(warmup * total_steps - 1e-9) if warmup < 1 else round(warmup))
    if step < warmup_steps:
        return lr * min(1.0, (step + 1) / warmup_steps)
    if schedule == "constant":
        return lr
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))  # 0 .. 1
    return lr * (1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


class Schedule(Kept):
    """Places steps in the schedule: by number, until the time left is too short for all.

    From then on a step takes its share of what is left of the schedule: that of the steps left or that of the time
    left, whichever is larger. So the rate never rises, and is near 0 at the limit. A run that goes on has a limit of
    its own, and spreads what was left of the schedule over that or over the steps left. While all steps fit, the rate
    is lr_at(number), bit by bit."""
    kept = ("progress",)

    def __init__(self, options: OptimizerOptions, total: int, say: Callable[[str], None]):
        self.total, self.say, self.decays = total, say, options.lr_schedule != "constant"
        self.progress: float | None = None  # of the next step, 0 .. 1; None: its number over all
        self.seconds: list[float] = []  # of this process's steps
        self.left = self.limit = math.inf  # seconds: at the last commit, before the first step

    def begin(self, left: float) -> None:
        """Note the seconds left before the first step of this process."""
        self.left = self.limit = left
        if self.progress is not None:
            self.say(f"the learning rate had followed max_minutes: it goes on with the last {1 - self.progress:.0%} of "
                     "its schedule; a new run with adapter= begins another")

    def place(self, done: int) -> float:
        """Find the place of the next step, as lr_at takes it: in steps."""
        return done if self.progress is None else self.progress * self.total

    def commit(self, done: int, left: float) -> None:
        """Take in that the done-th step is done, with so many seconds left."""
        before, self.left = self.left, left
        if done == self.total:  # a run that goes on has more steps: not all of them at rate 0
            return
        if self.progress is not None:
            share = 1 - left / before if 0 < left < before else 0.0  # at the limit the rest is for a run that goes on
            self.progress += (1 - self.progress) * max(share, 1 / (self.total - done + 1))
        elif self.decays and 0 < left < math.inf:
            self.seconds.append(before - left)
            rest = self.total - done
            usual = statistics.median((self.seconds[1:] or self.seconds)[-RECENT:])  # the first one warms up
            sure = len(self.seconds) > SURE or self.limit - left > USED * self.limit
            if sure and usual * rest > left:
                self.progress = done / self.total
                self.say(f"max_minutes ends near step {done + int(left / usual)} of {self.total}: the learning rate "
                         "follows the clock")
