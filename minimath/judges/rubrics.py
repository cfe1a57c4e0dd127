"""What a judge is shown: a rubric with a problem and two solutions filled in.

A rubric is a text file with four places: {problem}, {first} (solution A), {second} (solution B) and {nonce}, a mark
that no solution can know, for the lines that fence them in. Shipped: rubric-NAME.txt, `maths` by default.

A solution is text of the policy in training, which is paid for being liked: it is shown up to its final answer, with
control characters, special tokens and role marks defused, capped in length.
"""
import hashlib
import re
import unicodedata
from pathlib import Path

from minimath.core.errors import UserError
from minimath.core.text import did_you_mean
from minimath.grading.answer import answer_end
from minimath.judges.base import Pair

SHIPPED = {path.stem.removeprefix("rubric-"): path for path in sorted(Path(__file__).parent.glob("rubric-*.txt"))}
PLACES = ("{problem}", "{first}", "{second}", "{nonce}")
MAX_CHARS = 4000  # of a solution that is shown


def load_rubric(name: str | Path = "maths") -> str:
    """Read a rubric: a file, or the shipped one of that name; all places. UserError."""
    path = SHIPPED.get(str(name), Path(name))
    try:
        rubric = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"judge_rubric={path}: {error}; give a readable text file, or one of {', '.join(SHIPPED)}"
                        f"{did_you_mean(str(name), SHIPPED)}") from None
    if missing := [place for place in PLACES if place not in rubric]:
        raise UserError(f"judge_rubric={path}: {', '.join(missing)} not found in it; copy {SHIPPED['maths']} "
                        "and change its rules")
    return rubric


_SPECIAL = re.compile(r"<(?=[^\s\d=<>-])")  # <|im_end|>, </s>, <think>, <start_of_turn>
_BRACKETS = re.compile(r"\[(?=/?(?:INST|SYS|AVAILABLE|TOOL|IMG|BOS|EOS)\b)", re.I)
_ROLE = re.compile(r"^([ \t>#*]{0,9}(?:system|user|human|assistant|judge|verdict|instructions?)[ \t*]{0,9}):",
                   re.I | re.M)
_HIDDEN = ("Cc", "Cf", "Co", "Cs", "Cn")  # Unicode categories: control, format, private, surrogate, none


def defuse(text: str, specials: list[str] = ()) -> str:
    """Break hidden characters, role marks and the tokenizer's special tokens."""
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in _HIDDEN)
    for special in specials:
        text = text.replace(special, f"{special[:1]} {special[1:]}")
    return _ROLE.sub(r"\1 -", _BRACKETS.sub("[ ", _SPECIAL.sub("< ", text)))


def clean(text: str, specials: list[str] = ()) -> str:
    """Make a solution safe to show to a judge, up to its final answer, the middle cut."""
    text = defuse(text[:answer_end(text)], specials).strip()
    if len(text) > MAX_CHARS:
        tail = MAX_CHARS // 3
        text = f"{text[:MAX_CHARS - tail]}\n[cut]\n{text[len(text) - tail:]}"
    return text


def make_nonce(*texts: str) -> str:
    """Hash the texts that a mark fences in: a forger must contain its own hash."""
    return hashlib.sha256("\x00".join(sorted(texts)).encode("utf-8", "replace")).hexdigest()[:12]


def judge_prompt(rubric: str, pair: Pair, specials: list[str] = ()) -> str:
    """Fill the rubric's places in one pass, so that no text opens one of its own."""
    problem, first, second = pair.problem, pair.first.text, pair.second.text
    parts = {"problem": defuse(problem, specials).strip(),  # whole: a box in it is no final answer
             "first": clean(first, specials), "second": clean(second, specials),
             "nonce": pair.nonce or make_nonce(problem, first, second)}
    return re.sub(r"\{(" + "|".join(parts) + r")\}", lambda match: parts[match.group(1)], rubric)
