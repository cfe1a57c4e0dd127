"""Which steps of a solution are right, where no one has said so: what a judge's adapter is trained on.

From the end of a solution alone little is learnt. Two sources cost nothing beside it: the exact arithmetic of every
equation, and what became of other samples of the problem that had computed the same so far, as Math-Shepherd counts it
by rolling on from each prefix (arXiv 2312.08935); here the samples of a group are the rollouts.
"""
import re
from collections import defaultdict

from minimath.grading.answer import answer_end
from minimath.grading.steps import check_steps
from minimath.judges.base import Asked

EQUATION = re.compile(r"[\d.]+\s*[-+*/]\s*[\d.]+\s*=\s*[\d.]*\d")
LEAST_SEEN = 2  # samples behind the same equations, all of them wrong: then the last of these is


def computed(text: str) -> tuple[str, ...]:
    """List the equations of a text, without spaces: what was computed so far."""
    return tuple(re.sub(r"\s", "", match) for match in EQUATION.findall(text[:20_000]))


class Prefixes:
    """Counts how often samples of one problem end right behind the same equations."""

    def __init__(self, samples: list[tuple[str, bool]]):
        """samples: (text, correct) of each."""
        self.right, self.seen = defaultdict(int), defaultdict(int)
        for text, correct in samples:
            equations = computed(text)
            for length in range(1, len(equations) + 1):
                self.seen[equations[:length]] += 1
                self.right[equations[:length]] += correct

    def leads_to_right(self, text: str) -> bool | None:
        """Tell whether a right end follows what was computed so far; None: not known."""
        equations = computed(text)
        if not equations or not self.seen[equations]:
            return None
        return True if self.right[equations] else False if self.seen[equations] >= LEAST_SEEN else None


def step_labels(question: Asked, correct: bool, prefixes: Prefixes | None = None) -> list[bool | None]:
    """Label each step of a sample, and its whole; None: not known.

    A step is wrong from the first equation on that does not hold. Without one, all steps of a right solution are right;
    those of a wrong one are as `prefixes` tells. What stands behind the answer is not shown, and changes nothing."""
    labels, text, sound, left = [], "", True, answer_end("".join(question.steps))
    for step in question.steps:
        step, left = step[:max(0, left)], left - len(step)
        if not step and labels:
            labels.append(labels[-1])
            continue
        text, count = text + step, check_steps(step)
        sound &= count.right == count.total
        known = True if correct else prefixes.leads_to_right(text) if prefixes else None
        if known is not True and labels and labels[-1] is False:  # nothing mends what is wrong
            known = False
        labels.append(known if sound else False)
    return [*labels, correct and sound]


def labels_from(question: Asked, first_wrong: int | None) -> list[bool]:
    """Label each step, and the whole, of a text whose first fault is at an offset; None: it has none."""
    labels, end = [], 0
    for step in question.steps:
        end += len(step)
        labels.append(first_wrong is None or end <= first_wrong)
    return [*labels, first_wrong is None]
