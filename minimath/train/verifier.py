"""What decides right or wrong (`gate=`), and the user's own functions (`python:module.fn`) for gate and reward.

The gate is asked per completion; a completion that was cut has not answered and is wrong under every gate.
"""
import importlib
import os
import re
import sys
from collections.abc import Callable

from minimath.core.errors import UserError
from minimath.data.examples import Example


def make_gate(cfg, checker) -> Callable[[list[str], Example], list[bool]]:
    """gate(texts, example) -> whether each completion of the example is right, by cfg.verifier:

      exact: its final answer equals the reference answer; checker: an answer.AnswerChecker
      regex: its final answer matches the reference answer, a regular expression, from end to end; the checker runs
        it, with a time limit
      none: every completion is right, and judge and brevity alone speak
      python:module.fn: fn(text, example) -> bool, or a score in [0, 1] of which 0.5 and above is right

    Raises UserError when the function can't be loaded; the gate itself raises it for a bad pattern or result.
    """
    if cfg.verifier == "exact":
        return lambda texts, example: checker.check_many([(text, example.answer) for text in texts])
    if cfg.verifier == "regex":
        return lambda texts, example: [checker.matches(text, answer_pattern(example)) for text in texts]
    if cfg.verifier == "none":
        return lambda texts, example: [True] * len(texts)
    fn = load_function(cfg.verifier, "gate")
    return lambda texts, example: [verdict(fn, cfg.verifier, text, example) for text in texts]


def needed_columns(gate: str) -> tuple[str, ...]:
    """What load_examples must find in a row for this gate."""
    return ("answer",) if gate in ("exact", "regex") else ()


def check_gate(cfg, examples: list[Example]) -> None:
    """Raises UserError, before any long work, for a function that can't be loaded or a pattern that is none."""
    make_gate(cfg, None)
    if cfg.verifier == "regex":
        for example in examples:
            answer_pattern(example)


def answer_pattern(example: Example) -> str:
    """The reference answer as a pattern. Raises UserError when it is none; re caches the compilation."""
    pattern = example.answer.strip()
    try:
        re.compile(pattern, re.IGNORECASE | re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{example.where or example.id or 'example'}: gate=regex, but the answer {pattern[:200]!r} is "
                        f"no regular expression ({error}); escape special characters, or use gate=exact") from None
    return pattern


def verdict(fn, name: str, text: str, example: Example) -> bool:
    """The user's gate on one completion. Raises UserError that names the function and what it returned or raised."""
    try:
        value = fn(text, example)
    except Exception as error:  # any: it is the user's code, and the message must say whose
        raise UserError(f"gate={name} raised {type(error).__name__}: {error}") from error
    number = as_number(value)
    if number is None or not 0 <= number <= 1:
        raise UserError(f"gate={name} returned {value!r}; it must return True, False or a number from 0 to 1")
    return number >= 0.5


