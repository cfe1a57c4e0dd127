"""One completion, from the engine to the gradient, and the group of completions of one problem."""
from dataclasses import dataclass, field
from functools import cached_property

from minimath.data.examples import Example
from minimath.data.template import CLOSE, behind_thought
from minimath.grading.steps import StepCount, check_steps


@dataclass(eq=False)
class Sample:
    """One completion. The engine gives what it sampled; verifier and reward add what they find, in this order."""
    ids: list[int]
    logp: list[float]  # of each token, under the distribution that it was sampled from
    finished: bool  # False: cut at max_new_tokens, or by the loop guard; else the end token is in ids
    text: str = ""  # without special tokens
    full_logp: list[float] | None = None  # after temperature, before top-k, top-p and min-p; None: the same as logp
    thought: int = 0  # tokens up to the end of its thought, the tags among them; all, if that never ends
    correct: bool = False  # by the verifier
    win: float | None = None  # mean win probability against the group's other correct samples; None: no vote
    reward: float | None = 0.0  # None: the user's function knows none, and the sample is as if it were not there
    advantage: float = 0.0  # relative to the group; 0: nothing to learn from
    parts: dict[str, float | None] = field(default_factory=dict)  # what the reward is made of, by name

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def cut_thinking(self) -> bool:
        """Whether it was cut before its thought ended: a box in there is no answer."""
        return not self.finished and 0 < self.thought == self.tokens and not self.text.rstrip().endswith(CLOSE)

    @cached_property
    def solution(self) -> str:
        """The text behind its thought: what judges read, and whose steps count."""
        return behind_thought(self.text, begun=0 < self.thought == self.tokens)

    @cached_property
    def steps(self) -> StepCount:
        return check_steps(self.solution)


@dataclass(eq=False)
class Group:
    """The samples of one problem, with its prompt.

    decided: False when the verifier could not tell which samples are correct; no reward makes an advantage of that."""
    example: Example
    prompt: list[int]
    samples: list[Sample]
    decided: bool = True

    def has_signal(self) -> bool:
        return any(sample.advantage for sample in self.samples)
