"""What a pairwise judge is shown: a rubric with a problem and two candidates filled in.

A rubric is a text file with four places, each filled wherever it stands: {problem}, {first} (candidate A), {second}
(candidate B) and {nonce}, a mark that no candidate can know, for the lines that fence them in. It ends by asking for
one word: A, B or TIE. With {problem} before {first} before {second}, a self-judge computes what prompts share once.
Shipped: `maths` (rubric.txt), and rubric-NAME.txt beside it.

A candidate is text of the policy in training, which is paid for being liked: it is shown up to its final answer, with
control characters, special tokens and role marks defused, capped in length.
"""
import hashlib
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

from minimath.answer import answer_end
from minimath.config import UserError, did_you_mean
from minimath.steps import StepCount

FOLDER = Path(__file__).parent
PLACES = ("{problem}", "{first}", "{second}", "{nonce}")


class Candidate(NamedTuple):
    """One completion: its text, whether its answer is right, its checked steps, its length in tokens."""
    text: str
    right: bool
    steps: StepCount
    tokens: int


class Pair(NamedTuple):
    """One question to a judge: is `first` the better solution? nonce: the mark of its group; "": one of its own."""
    problem: str
    first: Candidate
    second: Candidate
    nonce: str = ""


def shipped_rubrics() -> dict[str, Path]:
    """Name -> file."""
    return {"maths": FOLDER / "rubric.txt",
            **{path.stem.removeprefix("rubric-"): path for path in sorted(FOLDER.glob("rubric-*.txt"))}}


def load_rubric(name: str | Path = "maths") -> str:
    """The text of a rubric: of a file, or of the shipped rubric of that name. Raises UserError when there is neither,
    or when one of the four places is missing."""
    path, shipped = Path(name), shipped_rubrics()
    if not path.is_file():
        if str(name) not in shipped:
            raise UserError(f"judge_rubric={str(name)!r}: not a file, and not one of the shipped rubrics "
                            f"({', '.join(shipped)}){did_you_mean(str(name), shipped)}")
        path = shipped[str(name)]
    try:
        rubric = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"judge_rubric={path}: {error}; give a readable text file") from None
    missing = [place for place in PLACES if place not in rubric]
    if missing:
        raise UserError(f"judge_rubric={path}: {', '.join(missing)} not found in it; all of {', '.join(PLACES)} "
                        "must stand in a rubric (copy minimath/rubric.txt and change its rules)")
    return rubric


_SPECIAL = re.compile(r"<(?=[^\s\d=<>-])")  # <|im_end|>, </s>, <think>, <start_of_turn>
_BRACKETS = re.compile(r"\[(?=/?(?:INST|SYS|AVAILABLE|TOOL|IMG|BOS|EOS)\b)", re.I)
_ROLE = re.compile(r"^([ \t>#*]{0,9}(?:system|user|human|assistant|judge|verdict|instructions?)[ \t*]{0,9}):",
                   re.I | re.M)
_HIDDEN = ("Cc", "Cf", "Co", "Cs", "Cn")  # Unicode categories: control, format, private, surrogate, none


def clean(text: str, max_chars: int, specials: list[str] = ()) -> str:
    """Candidate text as a judge may see it: up to the final answer, without control, format and private characters,
    special tokens broken by a space, role marks at line starts without their colon, the middle cut beyond max_chars."""
    text = text[:answer_end(text)]
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in _HIDDEN)
    for special in specials:
        text = text.replace(special, f"{special[:1]} {special[1:]}")
    text = _ROLE.sub(r"\1 -", _BRACKETS.sub("[ ", _SPECIAL.sub("< ", text))).strip()
    if len(text) > max_chars:
        tail = max_chars // 3
        text = f"{text[:max_chars - tail]}\n[cut]\n{text[len(text) - tail:]}"
    return text


def make_nonce(*texts: str) -> str:
    """A hash of the texts that it will fence in, in any order: a candidate would have to contain the hash of itself to
    forge a mark, both orders of a pair get the same one, and a run stays reproducible."""
    return hashlib.sha256("\x00".join(sorted(texts)).encode("utf-8", "replace")).hexdigest()[:12]


def judge_prompt(rubric: str, pair: Pair, max_chars: int, specials: list[str] = ()) -> str:
    """The rubric with its places filled in one pass, so that no text can open a place of its own."""
    parts = {"problem": pair.problem, "first": pair.first.text, "second": pair.second.text}
    nonce = pair.nonce or make_nonce(*parts.values())
    parts = {name: clean(text, max_chars, specials) for name, text in parts.items()} | {"nonce": nonce}
    return re.sub(r"\{(problem|first|second|nonce)\}", lambda match: parts[match.group(1)], rubric)
