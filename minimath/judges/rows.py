"""What a judge with an adapter reads, as tokens: the same in its training and when it is asked.

single, steps   the prompt of the problem, as the policy gets it, the solution, the end of the turn. After the last
                token of each step the verdict Yes or No says whether all is right so far, after the end of the turn
                whether the solution is right and sound. Nothing is written between the steps: one forward gives all
pair            the prompt of a rubric with both solutions; the verdict is the letter of the better one
"""
import functools
from typing import NamedTuple

from minimath.core.errors import UserError
from minimath.data.chat import IGNORE, Encoded, turn_end
from minimath.data.template import CLOSE, chat_args, is_open, render
from minimath.grading.answer import answer_end
from minimath.judges.base import Asked, Pair
from minimath.judges.rubrics import defuse, judge_prompt
from minimath.models.policy import Policy

SIGNS = "+-*/=^.<>"
LETTERS = ("A", "B", "TIE"),
YES_NO = ("Yes", "No"), ("Y", "N")  # the second for vocabularies of letters


@functools.lru_cache(maxsize=4)
def verdict_ids(tokenizer, choices: tuple[tuple[str, ...], ...] = LETTERS) -> list[int]:
    """Find the first tokens of verdicts, bare or after a space. Raises UserError.

    Of the choices the first whose first two words are one token each, and all of which begin differently."""
    for verdicts in choices:
        for space in ("", " "):
            ids = [tokenizer.encode(space + verdict, add_special_tokens=False) for verdict in verdicts]
            first = [one[0] for one in ids if one]
            if len(ids[0]) == len(ids[1]) == 1 and len(set(first)) == len(verdicts):
                return first
    raise UserError(f"judge=self: the tokenizer has no single tokens for the verdicts {choices[0][0]} and "
                    f"{choices[0][1]}; use judge=openai or judge=heuristic")


def chat_ids(tokenizer, prompt: str, thinking: str = "auto", template_args: str = "") -> list[int]:
    """Encode a prompt up to where the answer begins, behind a thought that the template opens."""
    if tokenizer.chat_template:
        args = chat_args(tokenizer, thinking, template_args)
        text = render(tokenizer, [{"role": "user", "content": prompt}], args, generate=True)
        text += f"\n{CLOSE}\n\n" if is_open(text) else ""
        return tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.encode(prompt + "\nVerdict:")


class Reading(NamedTuple):
    """A solution as tokens; ends: the places of the last token of each step, and of the end of the turn.

    prompt: how many tokens stand before the solution. numbers: the places of numbers and signs of arithmetic in it,
    but for a step's first token, in whose stead a verdict is trained."""
    ids: list[int]
    ends: list[int]
    prompt: int
    numbers: list[int]


class Reader:
    """Turns what a judge is asked into tokens.

    prompt: fills the rubric of a pair; while it is judge_prompt, solutions of every form are shown with special tokens,
    role marks and hidden characters broken, up to their answer."""

    def __init__(self, policy: Policy, rubric: str):
        self.tokenizer, self.rubric, self.prompt = policy.tokenizer, rubric, judge_prompt
        self.specials = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        self.is_number = functools.cache(self.is_number)
        self.prompt_ids = functools.lru_cache(1)(policy.prompt_ids)
        self.switches = policy.prompt.thinking, policy.prompt.template_args

    def shown(self, question: Asked) -> tuple[str, ...]:
        """The steps as they are shown, as many as there are; nothing behind the answer."""
        if self.prompt is not judge_prompt:
            return question.steps
        left, shown = answer_end("".join(question.steps)), []
        for step in question.steps:
            shown.append(defuse(step[:max(0, left)], self.specials))
            left -= len(step)
        return tuple(shown)

    def read(self, question: Asked) -> Reading:
        """Encode a single solution, step by step, so that a step's end is a token's end."""
        ids, ends = list(self.prompt_ids(question.problem)), []
        first = len(ids)
        for step in self.shown(question):
            ids += self.tokenizer.encode(step, add_special_tokens=False)
            ends.append(len(ids) - 1)
        behind = {end + 1 for end in ends}
        numbers = [place for place in range(first, len(ids)) if self.is_number(ids[place]) and place not in behind]
        return Reading([*ids, turn_end(self.tokenizer)], [*ends, len(ids)], first, numbers)

    def is_number(self, token: int) -> bool:
        """Tell whether a token is a number, or a part of one, or a sign of arithmetic."""
        text = self.tokenizer.decode([token]).strip()
        return bool(text) and all(c.isdecimal() or c in SIGNS for c in text)

    def pair(self, pair: Pair) -> list[int]:
        return chat_ids(self.tokenizer, self.prompt(self.rubric, pair, self.specials), *self.switches)


def single_row(reader: Reader, question: Asked, right: list[bool | None], max_len: int) -> Encoded:
    """Make a training row; right: of each step, and of the whole; None: not known.

    Where a right solution has no verdict, its next token is trained: a judge that can solve the problems tells right
    from wrong better (the joint objective of arXiv 2110.14168, section 4.2)."""
    reading, (yes, no), targets = reader.read(question), verdict_ids(reader.tokenizer, YES_NO), {}
    if all(right):
        targets = {place - 1: reading.ids[place] for place in range(reading.prompt, len(reading.ids))}
    targets |= {end: yes if known else no for end, known in zip(reading.ends, right, strict=True) if known is not None}
    return row(reading.ids, reading.prompt, targets, max_len)


def pair_row(reader: Reader, pair: Pair, first_wins: bool, max_len: int) -> Encoded:
    """Make a training row of a pair in this order."""
    ids, (a, b, _) = reader.pair(pair), verdict_ids(reader.tokenizer)
    return row(ids, len(ids) - 1, {len(ids) - 1: a if first_wins else b}, max_len)


def row(ids: list[int], prompt: int, verdicts: dict[int, int], max_len: int) -> Encoded:
    targets = [verdicts.get(place, IGNORE) for place in range(len(ids))]
    return Encoded(ids[:max_len], [place >= prompt for place in range(min(len(ids), max_len))], len(ids) > max_len,
                   targets[:max_len])
