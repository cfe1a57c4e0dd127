"""What decides correct or wrong: the reference answer, a pattern, nothing, or the user's own function."""
import contextlib
import re

from minimath.config.options import as_number, user_function
from minimath.core.errors import UserError
from minimath.data.examples import Example
from minimath.data.sample import Group, Sample
from minimath.grading.answer import AnswerChecker

NEEDS_ANSWER = ("exact", "regex")


def verifier_columns(verifier) -> tuple[str, ...]:
    """What a row of the data must have for this verifier."""
    return ("answer",) if verifier in NEEDS_ANSWER else ()


class Verifier(contextlib.AbstractContextManager):
    """Marks the samples of a group as correct or wrong.

      exact: the final answer equals the reference answer; of a completion that was cut only a closed box is one
      regex: the final answer matches the reference answer, a regular expression, from end to end, within a time limit
      none: every completion that finished is correct, and judge and brevity alone speak
      python:module.fn, or a callable: fn(text, example) -> bool, or a score in [0, 1] of which 0.5 and above is
        correct; a completion that was cut has not answered and is wrong

    Raises UserError for a function that can't be loaded, and for an answer of `examples` that is no pattern; `mark`
    raises it for a bad result."""

    def __init__(self, verifier, examples: list[Example] = ()):
        self.kind, self.checker = verifier, AnswerChecker()
        self.fn = self.name = None
        if verifier not in (*NEEDS_ANSWER, "none"):
            self.fn, self.name = user_function(verifier, "verifier")
        for example in examples if verifier == "regex" else ():
            answer_pattern(example)

    def __exit__(self, *error):
        return self.checker.__exit__(*error)

    def mark(self, groups: list[Group]) -> None:
        """Set `correct` of every sample."""
        for group in groups:
            for sample in group.samples:
                sample.correct = self.verdict(sample, group.example)

    def verdict(self, sample: Sample, example: Example) -> bool:
        if self.kind == "exact":
            return self.checker.check(sample.text, example.answer, sample.finished)
        if self.kind == "regex":
            return self.checker.matches(sample.text, answer_pattern(example), sample.finished)
        return sample.finished and (self.kind == "none" or self.asked(sample.text, example))

    def asked(self, text: str, example: Example) -> bool:
        """Ask the user's function about one completion, or UserError that names it."""
        try:
            value = self.fn(text, example)
        except Exception as error:  # any: it is the user's code, and the message must say whose
            raise UserError(f"verifier={self.name} raised {type(error).__name__}: {error}") from error
        number = as_number(value)
        if number is None or not 0 <= number <= 1:
            raise UserError(f"verifier={self.name} returned {value!r}; it must return a bool or a number from 0 to 1")
        return number >= 0.5


def answer_pattern(example: Example) -> str:
    """Return the reference answer as a pattern, or raise UserError."""
    pattern = example.answer.strip()
    try:
        re.compile(pattern, re.IGNORECASE | re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{example.where or example.id or 'example'}: verifier=regex, but the answer {pattern[:200]!r} "
                        f"is no regular expression ({error}); escape special characters, or use verifier=exact"
                        ) from None
    return pattern
