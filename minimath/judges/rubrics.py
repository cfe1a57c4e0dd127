"""What a judge is shown: a rubric with a problem and two candidates, or a list of them, filled in.

A rubric is a text file with four places, each filled wherever it stands: {problem}, {first} (candidate A), {second}
(candidate B) and {nonce}, a mark that no candidate can know, for the lines that fence them in. It ends by asking for
one word: A, B or TIE. With {problem} before {first} before {second}, a self-judge computes what prompts share once.
Shipped: `maths` (rubric.txt), and rubric-NAME.txt beside it. `list_rubric` makes of it the form for a list, so that
pairs and lists are judged by the same rules.

A candidate is text of the policy in training, which is paid for being liked: it is shown up to its final answer, with
control characters, special tokens and role marks defused, capped in length.
"""
import hashlib
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

from minimath.grading.answer import answer_end
from minimath.core.errors import UserError
from minimath.core.text import did_you_mean
from minimath.grading.steps import StepCount

FOLDER = Path(__file__).parent
LETTERS = "ABCDEF"  # of the candidates of a list
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


class Listing(NamedTuple):
    """One question to a judge: which of the candidates, at most len(LETTERS), is the best? nonce as in Pair."""
    problem: str
    candidates: tuple[Candidate, ...]
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
    return fill(rubric, parts, pair.nonce, max_chars, specials)


def list_prompt(rubric: str, listing: Listing, max_chars: int, specials: list[str] = ()) -> str:
    """`judge_prompt` for a list; for a list of two, the same text. Raises UserError where list_rubric does."""
    parts = {"problem": listing.problem} | {f"candidate {letter}": candidate.text for letter, candidate
                                            in zip(LETTERS, listing.candidates, strict=False)}
    return fill(list_rubric(rubric, len(listing.candidates)), parts, listing.nonce, max_chars, specials)


def fill(rubric: str, parts: dict[str, str], nonce: str, max_chars: int, specials: list[str]) -> str:
    nonce = nonce or make_nonce(*parts.values())
    parts = {name: clean(text, max_chars, specials) for name, text in parts.items()} | {"nonce": nonce}
    return re.sub(r"\{(" + "|".join(parts) + r")\}", lambda match: parts[match.group(1)], rubric)


# ---- the form for lists

# the line that announces A, and the same for B
_BLOCKS = re.compile(r"(?P<before>[^\n]*)\bA\b(?P<after>[^\n]*\n?)\{first\}(?P<gap>\s*)"
                     r"(?P=before)B(?P=after)\{second\}")
_ASKED = re.compile(r"\bA, B(,?) or TIE\b")
_NUMBERS = ("three", "four", "five", "six")


def list_rubric(rubric: str, k: int) -> str:
    """The form of a pair rubric for k candidates, with places {candidate A}, {candidate B}, ... for {first} and
    {second}. The lines that announce and show A and B are repeated for the others, and the few words about a pair are
    put into the plural, in exactly the turns of the shipped rubrics; every rule stays as it is.

    Raises UserError where that can't be done without guessing, so that no rubric speaks of two where more are shown.
    """
    match = _BLOCKS.search(rubric)
    around = rubric[:match.start()] + rubric[match.end():] if match else rubric
    if not match or "{first}" in around or "{second}" in around or not _ASKED.search(around):
        raise UserError("judge_plan=listwise: this judge_rubric has no form for a list: it must show {first} and "
                        "{second} once, under lines that are the same but for the letters A and B, and ask for \"A, B, "
                        "or TIE\" (as minimath/rubric.txt does); or use judge_plan=round_robin")
    before, after, gap = match.group("before", "after", "gap")
    blocks = gap.join(f"{before}{letter}{after}{{candidate {letter}}}" for letter in LETTERS[:k])
    parts = [plural(text, k) for text in (rubric[:match.start()], rubric[match.end():])]
    if left := re.search(r"[^\n]{0,30}\bA (?:and|or) B\b", "\n".join(parts)) if k > 2 else None:
        raise UserError(f"judge_plan=listwise: this judge_rubric speaks of a pair: {left.group()!r}; say \"two "
                        "solutions, A and B\" or \"A, B, or TIE\", which become those of a list, or use "
                        "judge_plan=round_robin")
    return parts[0] + blocks + parts[1]


def plural(text: str, k: int) -> str:
    """What the shipped rubrics say of two candidates, said of k."""
    if k == 2:
        return text
    letters = ", ".join(LETTERS[:k - 1])
    for pattern, said in ((r"\btwo (\w+), A and B\b", rf"{_NUMBERS[k - 3]} \1, {letters} and {LETTERS[k - 1]}"),
                          (r"\bthe two are shown\b", "they are shown"), (r"\bWhen both are\b", "When two are"),
                          (r"\b(Which \w+ is) better\?", r"\1 the best?"),
                          (r"\beasier to read\b", "the easiest to read"),
                          (_ASKED.pattern, rf"{letters}, {LETTERS[k - 1]}\1 or TIE")):
        text = re.sub(pattern, said, text)
    return text
