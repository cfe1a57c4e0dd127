"""The three forms in which an OpenAI-compatible server can be asked for a verdict, richest first, and their reading.

`logprobs`: the log-probs of the likeliest first tokens (`top_logprobs` of the chat API); the vote is the probability
of A over that of A, B and TIE, half of TIE's counted as A: a soft vote, as `self_judge` gives. `json_schema`: the reply
is held to {"verdict": "A" | "B" | "TIE"} by the server's grammar. `plain`: the text must be a verdict and nothing else.

A list of candidates is asked about in the same forms with more letters; its vote is a probability for each of them.
"""
from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass

FORMS = ("logprobs", "json_schema", "plain")
VOTES = {"A": 1.0, "B": 0.0, "TIE": 0.5}
TOP = 20                     # the most that the API allows; below it a rare verdict is lost
SCHEMA_TOKENS = 48           # {"verdict": "TIE"} takes 8 to 20, by the spaces that a grammar lets through
MIN_MASS = 0.1               # of the closed set: below it the model was about to say something else, and the ratio of
#                              two unlikely tokens is noise
MIN_REST = 1e-9              # left for a letter of a list that the server shows no log-prob of
_TIE = {"T", "TI", "TIE", "Tie", "tie"}      # the first tokens that a vocabulary can split TIE into


@dataclass
class Reply:
    """What is kept of a chat completion: its text, the form it was asked in, whether max_tokens ended it, and (token,
    log-prob) of the likeliest tokens where the first word begins; [] where the server gave none."""
    text: str
    form: str = "plain"
    cut: bool = False
    top: tuple = ()

    def dumps(self) -> str:
        """As text, for the cache."""
        return json.dumps(asdict(self))

    @staticmethod
    def loads(text: str) -> Reply | None:
        """`dumps` undone; None for what it did not write."""
        try:
            kept = json.loads(text)
            top = tuple((str(token), float(logp)) for token, logp in kept["top"])
            return Reply(str(kept["text"]), str(kept["form"]), bool(kept["cut"]), top)
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def serves(self) -> bool:
        """Whether the server answered in the form it was asked in."""
        if self.form == "logprobs":
            return len(self.top) > 1
        return self.form != "json_schema" or json_vote(self.text) is not None


def form_fields(form: str, max_tokens: int, letters: str = "AB") -> dict:
    """What a form adds to a chat request that asks for one of the letters, or TIE, in at most max_tokens."""
    if form == "logprobs":
        return {"logprobs": True, "top_logprobs": TOP}
    if form == "json_schema":
        verdict = {"type": "object", "properties": {"verdict": {"type": "string", "enum": [*letters, "TIE"]}},
                   "required": ["verdict"], "additionalProperties": False}
        schema = {"name": "verdict", "strict": True, "schema": verdict}
        return {"max_tokens": max(max_tokens, SCHEMA_TOKENS),
                "response_format": {"type": "json_schema", "json_schema": schema}}
    return {}


def read_reply(choice: dict, form: str) -> Reply:
    """A Reply from choices[0]. A text that max_tokens ended before it began (a model that thinks first) is "". Raises
    KeyError, TypeError, AttributeError or ValueError for anything that is not a choice of a chat completion."""
    text, cut = choice["message"].get("content"), choice.get("finish_reason") == "length"
    if text is None and cut:
        text = ""
    if not isinstance(text, str):
        raise TypeError("no content")
    return Reply(text, form, cut, _first_word(choice) if form == "logprobs" else ())


def _first_word(choice: dict) -> tuple:
    """(token, log-prob) pairs of the first position whose token has a letter or digit: "**A" begins with "**"."""
    try:
        for position in (choice.get("logprobs") or {}).get("content") or []:
            if any(c.isalnum() for c in position["token"]):
                pairs = ((str(one["token"]), float(one["logprob"])) for one in position.get("top_logprobs") or [])
                return tuple((token, round(logp, 8)) for token, logp in pairs if math.isfinite(logp))
    except (KeyError, TypeError, ValueError, AttributeError):
        pass                                     # another shape is as good as none: the text is still there
    return ()


def vote(reply: Reply, read: Callable[[str], float | None]) -> float | None:
    """The probability that A is better, or None: from the log-probs where they tell, else from the text, which
    `read` turns into 1.0, 0.0, 0.5 or None."""
    chance = soft_vote(reply.top)
    if chance is not None:
        return chance
    if reply.form == "json_schema":
        return json_vote(reply.text)
    return read(without_thoughts(reply.text))


def list_vote(reply: Reply, letters: str, read: Callable[[str, str], str | None]) -> list[float] | None:
    """The probability of each letter, adding up to 1, or None: from the log-probs where they tell, else from the text,
    of which read(text, letters) makes a letter, "TIE" or None. TIE counts for all letters alike."""
    mass = verdict_mass(reply.top, letters)
    if mass:
        least = math.exp(min(logp for _, logp in reply.top))
        # a letter that is not among the likeliest tokens is no likelier than the last of them, and not impossible
        rest = min(least, max(MIN_REST, 1 - sum(mass.values())))
        shares = [(mass[letter] or rest) + mass["TIE"] / len(letters) for letter in letters]
        return [share / sum(shares) for share in shares]
    word = json_word(reply.text) if reply.form == "json_schema" else read(without_thoughts(reply.text), letters)
    if word == "TIE":
        return [1 / len(letters)] * len(letters)
    return [float(word == letter) for letter in letters] if word in list(letters) else None


def is_soft(vote: float | list[float]) -> bool:
    """Whether a vote is more than a verdict."""
    if isinstance(vote, list):
        return max(vote) < 1 and len(set(vote)) > 1
    return vote not in (0.0, 0.5, 1.0)


def without_thoughts(text: str) -> str:
    return re.sub(r"\A\s*<think>.*?</think>", "", text, flags=re.S).strip()


def soft_vote(top: tuple) -> float | None:
    """(P(A) + P(TIE) / 2) / (P(A) + P(B) + P(TIE)) from (token, log-prob) pairs; None below MIN_MASS."""
    mass = verdict_mass(top)
    return (mass["A"] + mass["TIE"] / 2) / sum(mass.values()) if mass else None


def verdict_mass(top: tuple, letters: str = "AB") -> dict[str, float] | None:
    """Probability of each letter and of TIE from (token, log-prob) pairs; None when they add up to less than MIN_MASS.
    Lower-case letters are not counted: "a" is an article."""
    mass = dict.fromkeys([*letters, "TIE"], 0.0)
    for token, logp in top:
        name = token.strip(" \t\n*_`'\"[](){}:.#\u2581\u0120")     # the last two: a space in raw vocabularies
        name = "TIE" if name in _TIE else name
        if name in mass:
            mass[name] += math.exp(min(logp, 0.0))
    return mass if sum(mass.values()) >= MIN_MASS else None


def json_vote(text: str) -> float | None:
    """The vote of {"verdict": ...}; None for anything else."""
    return VOTES.get(json_word(text))


def json_word(text: str) -> str | None:
    """The word of {"verdict": ...}; None for anything else."""
    try:
        word = json.loads(text)["verdict"]
        return word if isinstance(word, str) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
