"""Judges whose votes are known, and solutions and groups to put before them."""
from collections.abc import Callable
from typing import NamedTuple

from minimath.config.schema import JudgeOptions, RLAIFConfig
from minimath.data.examples import Example
from minimath.data.sample import Group, Sample
from minimath.grading.steps import StepCount
from minimath.judges.base import Judge
from minimath.judges.judge import judge_groups
from minimath.train.rewards import JudgeReward


class Fixed(NamedTuple):
    """A solution whose steps are what is said, whatever its text."""
    text: str
    correct: bool = True
    steps: StepCount = StepCount(1, 1)
    tokens: int = 10

    @property
    def solution(self) -> str:
        return self.text


class FakeJudge(Judge):
    """compare(pairs) is the function given; `heard` is what it said."""
    name = "fake"

    def __init__(self, compare: Callable, *, soft: bool = False, pairs: int = 0, fallback: str = "none"):
        self.heard: list[str] = []
        super().__init__(JudgeOptions(pairs=pairs, fallback=fallback), say=self.heard.append)
        self.compare, self.soft = compare, soft


def judge_by(vote: Callable, soft: bool = False, **options) -> FakeJudge:
    """A judge that votes vote(pair)."""
    return FakeJudge(lambda pairs: [vote(pair) for pair in pairs], soft=soft, **options)


def group(problem: str, samples: list) -> Group:
    return Group(Example(problem), [], list(samples))


def judge_one(judge: Judge, samples: list, problem: str = "p") -> tuple[list[float | None], dict]:
    """judge_groups for one group."""
    wins, stats = judge_groups(judge, [group(problem, samples)])
    return wins[0], stats


def sample(text: str, correct: bool = True, tokens: int = 10) -> Sample:
    """A completion of the engine's kind."""
    return Sample([1] * tokens, [-0.5] * tokens, True, text, correct=correct)


def rewards_of(judge: Judge, samples: list[Sample], problem: str = "p") -> list[float]:
    """The rewards of one group with a quarter for the judge and a quarter for brevity."""
    reward = JudgeReward(RLAIFConfig(judge_weight=0.25, brevity_weight=0.25), judge)
    reward.score([group(problem, samples)])
    return [sample.reward for sample in samples]
