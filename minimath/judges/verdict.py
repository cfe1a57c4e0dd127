"""The forms in which a server is asked for a verdict, richest first.

`logprobs`: the log-probs of the likeliest first tokens; the vote is the probability of A over that of A, B and TIE,
half of TIE's counted as A: a soft vote, as the self-judge gives. `json_schema`: the reply is held to {"verdict": "A" |
"B" | "TIE"} by the server's grammar. `plain`: the text must be a verdict and nothing else.
"""
import json
import math
import re
from dataclasses import asdict, dataclass

FORMS = ("logprobs", "json_schema", "plain")
VOTES = {"A": 1.0, "B": 0.0, "TIE": 0.5}
TOP = 20  # the most that the API allows; below it a rare verdict is lost
SCHEMA_TOKENS = 48  # {"verdict": "TIE"} takes 8 to 20, by the spaces that a grammar lets through
MIN_MASS = 0.1  # of the closed set: below it the model was about to say something else, and the ratio is noise
_TIE = {"T", "TI", "TIE", "Tie", "tie"}  # the first tokens that a vocabulary can split TIE into
_MARKS = " \t\n*_`'\"[](){}:.#\u2581\u0120"  # around a letter; the last two are a space in raw vocabularies


@dataclass
class Reply:
    """What is kept of a chat completion.

    form: that it was asked in; cut: max_tokens ended it; top: (token, log-prob) of the likeliest tokens where the first
    word begins, () where the server gave none."""
    text: str
    form: str = "plain"
    cut: bool = False
    top: tuple = ()

    def dumps(self) -> str:
        """Write it as text, for the cache."""
        return json.dumps(asdict(self))

    @staticmethod
    def loads(text: str) -> "Reply | None":
        """Undo `dumps`; None for what it did not write."""
        try:
            kept = json.loads(text)
            top = tuple((str(token), float(logp)) for token, logp in kept["top"])
            return Reply(str(kept["text"]), str(kept["form"]), bool(kept["cut"]), top)
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def serves(self) -> bool:
        """Say whether the server answered in the form it was asked in."""
        if self.form == "logprobs":
            return len(self.top) > 1
        return self.form != "json_schema" or json_vote(self.text) is not None


def form_fields(form: str, max_tokens: int) -> dict:
    """Return what a form adds to a chat request for a verdict in at most max_tokens."""
    if form == "logprobs":
        return {"logprobs": True, "top_logprobs": TOP}
    if form == "json_schema":
        verdict = {"type": "object", "properties": {"verdict": {"type": "string", "enum": list(VOTES)}},
                   "required": ["verdict"], "additionalProperties": False}
        schema = {"name": "verdict", "strict": True, "schema": verdict}
        return {"max_tokens": max(max_tokens, SCHEMA_TOKENS),
                "response_format": {"type": "json_schema", "json_schema": schema}}
    return {}


def read_reply(choice: dict, form: str) -> Reply:
    """Read choices[0] of a chat completion.

    A text that max_tokens ended before it began, as of a model that thinks first, is "". Raises KeyError, TypeError,
    AttributeError or ValueError for anything that is no such choice."""
    text, cut = choice["message"].get("content"), choice.get("finish_reason") == "length"
    if text is None and cut:
        text = ""
    if not isinstance(text, str):
        raise TypeError("no content")
    return Reply(text, form, cut, _first_word(choice) if form == "logprobs" else ())


def _first_word(choice: dict) -> tuple:
    """Find the likeliest tokens where the first word begins: "**A" begins with "**"."""
    try:
        for position in (choice.get("logprobs") or {}).get("content") or []:
            if any(c.isalnum() for c in position["token"]):
                pairs = ((str(one["token"]), float(one["logprob"])) for one in position.get("top_logprobs") or [])
                return tuple((token, round(logp, 8)) for token, logp in pairs if math.isfinite(logp))
    except (KeyError, TypeError, ValueError, AttributeError):
        pass  # another shape is as good as none: the text is still there
    return ()


def vote(reply: Reply) -> float | None:
    """Read the probability that A is better: from log-probs, else from the text."""
    read = json_vote if reply.form == "json_schema" else text_vote
    return read(reply.text) if (chance := soft_vote(reply.top)) is None else chance


def soft_vote(top: tuple) -> float | None:
    """Weigh A, B and TIE by the log-probs of tokens.

    (P(A) + P(TIE) / 2) / (P(A) + P(B) + P(TIE)); None below MIN_MASS. Lower-case letters are not counted: "a" is an
    article."""
    mass = dict.fromkeys(VOTES, 0.0)
    for token, logp in top:
        name = token.strip(_MARKS)
        name = "TIE" if name in _TIE else name
        if name in mass:
            mass[name] += math.exp(min(logp, 0.0))
    whole = sum(mass.values())
    return (mass["A"] + mass["TIE"] / 2) / whole if whole >= MIN_MASS else None


def json_vote(text: str) -> float | None:
    """Read the vote of {"verdict": ...}; None for anything else."""
    try:
        word = json.loads(text)["verdict"]
        return VOTES.get(word) if isinstance(word, str) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def text_vote(reply: str) -> float | None:
    """Read A, B or TIE in any dress: "**A**", "[[B]]", "Verdict: TIE.".

    What a model thought before is left out; None for anything that is not exactly one of them."""
    text = re.sub(r"\A\s*<think>.*?</think>", "", reply, flags=re.S).strip()
    match = re.fullmatch(r"\W*(?:(?:verdict|answer|solution)\W+)?(a|b|tie)\W*", text, re.I) if len(text) <= 80 else None
    return VOTES[match.group(1).upper()] if match else None
