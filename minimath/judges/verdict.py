"""The forms in which a server is asked for a verdict, richest first.

`logprobs`: the log-probs of the likeliest first tokens; the vote is the probability of A over that of A, B and TIE,
half of TIE's counted as A: a soft vote, as the self-judge gives. `json_schema`: the server's grammar holds the reply to
{"verdict": "A" | "B" | "TIE"}. `plain`: the text must be a verdict and nothing else.
"""
import math
import re
from typing import NamedTuple

FORMS = ("logprobs", "json_schema", "plain")
VOTES = {"A": 1.0, "B": 0.0, "TIE": 0.5}
TOP = 20  # the most that the API allows; below it a rare verdict is lost
MIN_MASS = 0.1  # of the closed set: below it the model was about to say something else, and the ratio is noise
_TIE = {"T", "TI", "TIE", "Tie", "tie"}  # the first tokens that a vocabulary can split TIE into
_MARKS = " \t\n*_`'\"[](){}:.#\u2581\u0120"  # around a letter; the last two are a space in raw vocabularies
_SCHEMA = {"type": "object", "properties": {"verdict": {"type": "string", "enum": list(VOTES)}},
           "required": ["verdict"], "additionalProperties": False}
FIELDS = {"logprobs": {"logprobs": True, "top_logprobs": TOP},  # of a chat request in each form
          "json_schema": {"response_format": {"type": "json_schema", "json_schema": {
              "name": "verdict", "strict": True, "schema": _SCHEMA}}},
          "plain": {}}
INSTEAD = ("refusal", "reasoning_content", "reasoning", "thinking")  # fields of servers that tell an answer from others
THOUGHT = re.compile(r"\s*(<think(ing)?>|\[THINK\]|\u25c1think\u25b7|<\|channel\|>analysis)")
THOUGHT_END = re.compile(r"</think(ing)?>|\[/THINK\]|\u25c1/think\u25b7|<\|channel\|>final<\|message\|>")
TAIL = 100  # characters that hold the end of a thought, of 28 at most, and the white space behind it
_BEFORE = "json|the|my|final|better|solution|verdict|answer|choice|option|is|boxed|text"  # words before a verdict


class Reply(NamedTuple):
    """What is kept of a chat completion.

    text: its first characters, thoughts left out; cut: the limit of tokens ended it; top: (token, log-prob) of the
    likeliest tokens where the first word begins, empty where the server gave none; instead: what the server filled
    while the text is empty, such as reasoning_content."""
    text: str
    cut: bool = False
    top: list = []
    instead: str = ""


def read_reply(choice: dict) -> Reply:
    """Read choices[0] of a chat completion; LookupError, TypeError, AttributeError.

    A text that the limit of tokens ended before it began, as of a model that thinks first, is ""."""
    message, end = choice["message"], str(choice.get("finish_reason")).lower()
    content, cut = message.get("content"), end in ("length", "max_tokens")
    instead = next((name for name in INSTEAD if message.get(name)), "")
    if isinstance(content, list):  # parts, of which some are thoughts
        instead = next((part["type"] for part in content if "text" not in part), instead)
        content = "".join(part.get("text") or "" for part in content)
    if content is None and not (cut or instead or end == "content_filter"):
        raise TypeError("no content")
    thought, mark, text = split_thought(content or "")
    instead = instead or ("thoughts" if thought or mark else "")
    return Reply(text[:200], cut, likeliest_tokens(choice, bool(instead)), "" if text else instead)


def split_thought(text: str) -> tuple[str, str, str]:
    """Split a text into thoughts, the mark of their end and what follows; each can be ""."""
    *_, last = [None, *THOUGHT_END.finditer(text)]
    if last:
        return text[:last.start()], last[0], text[last.end():].strip()
    return (text, "", "") if THOUGHT.match(text) else ("", "", text.strip())


def likeliest_tokens(choice: dict, thinks: bool = False) -> list:
    """Find the likeliest tokens where the first word begins: "**A" begins with "**".

    thinks: behind the thoughts, whose tokens servers list too."""
    try:
        positions, said, start = (choice.get("logprobs") or {}).get("content") or [], "", 0
        for n, position in enumerate(positions if thinks else [], 1):
            said = (said + position["token"])[-TAIL:]  # not all of it again for every token
            start = n if THOUGHT_END.search(said) and not split_thought(said)[2] else start
        for position in positions[start:] if start or not thinks else []:
            if any(c.isalnum() for c in position["token"]):
                return [[str(one["token"]), float(one["logprob"])] for one in position.get("top_logprobs") or []]
    except (KeyError, TypeError, ValueError, AttributeError):
        pass  # another shape is as good as none: the text is still there
    return []


def vote(reply: Reply) -> float | None:
    """Read the probability that A is better: from log-probs, else from the text."""
    return text_vote(reply.text) if (chance := soft_vote(reply.top)) is None else chance


def soft_vote(top: list) -> float | None:
    """Weigh A, B and TIE by the log-probs of tokens.

    (P(A) + P(TIE) / 2) / (P(A) + P(B) + P(TIE)); None below MIN_MASS. Lower-case letters are not counted: "a" is an
    article."""
    mass = dict.fromkeys(VOTES, 0.0)
    for token, logp in top:
        name = token.strip(_MARKS)
        name = "TIE" if name in _TIE else name
        if name in mass and math.isfinite(logp):
            mass[name] += math.exp(min(logp, 0.0))
    whole = sum(mass.values())
    return (mass["A"] + mass["TIE"] / 2) / whole if whole >= MIN_MASS else None


def text_vote(text: str) -> float | None:
    """Read exactly A, B or TIE in any dress: **A**, [[B]], {"verdict": "TIE"}."""
    dress = rf"\W*(?:(?:{_BEFORE})\W+)*(a|b|tie)\W*(?:</(?:answer|verdict)>\W*)?"
    match = re.fullmatch(dress, text, re.I) if len(text) <= 80 else None
    return VOTES[match.group(1).upper()] if match else None
