"""The cases of bench.graders: peers' own test cases, read where they are, and variants of gold answers.

Nothing of a peer is imported or copied: its test files are parsed for literals. Three forms of case: `pair` and
`answer` are two short answers (a pair comes from a test of a bare comparison, so nothing is extracted), `text` is a
solution that ends in an answer, and a gold answer.
"""
import ast
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from minimath.core.errors import UserError
from minimath.grading.answer import extract_answer


class Case(NamedTuple):
    """Two answers to compare.

    expected: whether they are equal, None where the source does not say. kind: the test, or the variant.
    """
    form: str  # pair, answer, text
    answer: str
    gold: str
    expected: bool | None
    kind: str
    data: str = "math"  # or gsm8k: what a peer takes the answers for


# ---- cases of the peers

_STRING = r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
_CALL = re.compile(rf"(assertTrue|assertFalse)?\(?(math_equal|is_numerical_equal|(?:compare|check)_\w+)"
                   rf"\({_STRING}, {_STRING}")
_LOOSE = re.compile(rf"pred\s*=\s*{_STRING},?\s*(?:#\s*)?gt\s*=\s*{_STRING}")


def qwen_cases(folder: Path) -> list[Case]:
    """Read the comparisons in Qwen2.5-Math's evaluation/grader.py.

    Its unit tests, and what `_test_math_equal` tries, where the outcome that they want is not written down. Raises
    UserError when the file is not there.
    """
    path = folder / "evaluation" / "grader.py"
    if not path.is_file():
        raise UserError(f"--qwen {folder}: no evaluation/grader.py in it; give a checkout of QwenLM/Qwen2.5-Math")
    source = path.read_text(encoding="utf-8")
    found = [(said == "assertTrue" if said else None, name, answer, gold)
             for said, name, answer, gold in _CALL.findall(source)]
    found += [(None, "_test_math_equal", answer, gold) for answer, gold in _LOOSE.findall(source)]
    cases = [Case("pair", ast.literal_eval(answer), ast.literal_eval(gold), expected, name)
             for expected, name, answer, gold in found]
    return list(dict.fromkeys(cases))


def test_cases(folder: Path) -> list[Case]:
    """Read the gold, pred and expected rows of the pytest files of a folder.

    As Math-Verify's tests, which took over lighteval's. Rows with a further argument (another precision, another mode)
    are left out, and so are rows whose gold answer is a whole solution.
    """
    files = sorted(folder.glob("test_*.py"))
    if not files:
        raise UserError(f"--tests {folder}: no test_*.py in it; give the tests folder of Math-Verify or lighteval")
    cases = [Case(*formed(pred), bare(gold), bool(expected), file.stem)
             for file in files for gold, pred, expected in rows_of(file) if not _PROSE.search(words_of(bare(gold)))]
    return list(dict.fromkeys(cases))


def rows_of(file: Path) -> Iterator[tuple[str, str, int]]:
    """Read literal rows of pytest.mark.parametrize; `precision` may follow if it is 6."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not (isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "parametrize" and len(node.args) == 2):
            continue
        names, rows = node.args
        names = [name.strip() for name in getattr(names, "value", "").split(",")]
        if names[:2] != ["gold", "pred"] or names[2:] not in (["expected"], ["result"], ["expected", "precision"]):
            continue
        for row in getattr(rows, "elts", []):
            try:
                gold, pred, expected, *precision = ast.literal_eval(row)
            except ValueError:  # made by a call or an f-string
                continue
            if precision in ([], [6]):
                yield gold, pred, expected


_SPAN = re.compile(r"\s*(?:\$\$?([^$]+)\$\$?|\\\((.+)\\\)|\\\[(.+)\\\])\.?\s*", re.S)
_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}")


def bare(text: str) -> str:
    """Strip a short answer of its box or its dollars."""
    inner = extract_answer(text, strict=True)
    match = _SPAN.fullmatch(text)
    return inner or (next(group for group in match.groups() if group) if match else text).strip()


def formed(pred: str) -> tuple[str, str]:
    """Tell form and text: a prediction without prose is an answer, else a solution."""
    return ("text", pred) if _PROSE.search(words_of(pred)) or "\\boxed" in pred else ("answer", bare(pred))


def words_of(text: str) -> str:
    """Strip a text of the words that LaTeX wants."""
    return re.sub(r"\\(?:text|mathrm|mbox|textbf|begin|end)\s*\{[^{}]*\}", "", text)


# ---- variants of gold answers

_FRACTION = re.compile(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}")
_TUPLE = re.compile(r"(?:\\left)?\(([^()\[\]]+,[^()\[\]]+?)(?:\\right)?\)")
_WHOLE = re.compile(r"-?\d+(?:,\d{3})*")


def generated_cases(golds: list[str], data: str, seed: int = 0) -> list[Case]:
    """Make variants of gold answers that are equal to them, and such that are not."""
    rng, cases = random.Random(seed), []
    for gold in golds:
        cases += [Case("answer", answer, gold, True, kind, data) for kind, answer in equal_variants(gold, rng)]
        cases += [Case("answer", answer, gold, False, kind, data) for kind, answer in wrong_variants(gold)]
        if re.fullmatch(r"[1-9]\d?", gold):  # MATH asks for a percentage with or without its sign
            cases.append(Case("answer", gold, f"{gold}\\%", True, "percent", data))
            cases.append(Case("answer", f"{int(gold) + 1}\\%", f"{gold}\\%", False, "another percent", data))
    return list(dict.fromkeys(cases))


def equal_variants(gold: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Write `gold` in other ways, each with its kind."""
    yield "same", gold
    yield "spaces", f" {gold.replace(',', ', ')} " if _TUPLE.fullmatch(gold) else f"  {gold} "
    if "frac" in gold:
        yield "dfrac", gold.replace("\\dfrac", "\\frac") if "\\dfrac" in gold else gold.replace("\\frac", "\\dfrac")
    if match := _FRACTION.fullmatch(gold):
        sign, top, bottom = match.groups()
        yield "slash", f"{sign}{top}/{bottom}"
        yield "times two", f"{sign}\\frac{{{2 * int(top)}}}{{{2 * int(bottom)}}}"
        if re.fullmatch("[25]*", "".join(str(p) for p in primes(Fraction(int(top), int(bottom)).denominator))):
            yield "decimal", f"{sign}{int(top) / int(bottom)!r}"
    if _WHOLE.fullmatch(gold):
        value = int(gold.replace(",", ""))
        yield "trailing .0", f"{value}.0"
        yield "units", f"{value}\\text{{ {rng.choice(['cm', 'apples', 'miles', 'hours'])}}}"
        yield "words", f"{value} {rng.choice(['dollars', 'apples', 'students'])}"
        yield "currency", f"\\${value}"
        yield "x =", f"x = {value}"
        if abs(value) > 999:
            yield "thousands", f"{value:,}"
            yield "thousands {,}", f"{value:,}".replace(",", "{,}")
    if match := re.fullmatch(r"\\text\{([A-Za-z ]+)\}", gold):
        yield "no text", match.group(1)
    if gold.endswith("^\\circ"):
        yield "no degrees", gold.removesuffix("^\\circ")
    if _TUPLE.fullmatch(gold):
        plain = gold.replace("\\left", "").replace("\\right", "")
        yield "left right", plain if plain != gold else f"\\left{gold[:-1]}\\right)"
    if re.fullmatch(r"-?\d+(?:, ?-?\d+)+", gold) and not re.fullmatch(r"\d{1,3}(?:,\d{3})+", gold):
        yield "list order", ",".join(reversed(gold.replace(" ", "").split(",")))


def wrong_variants(gold: str) -> Iterator[tuple[str, str]]:
    """Write answers that are not `gold`, each with its kind."""
    plain = gold.replace("\\!", "").replace(" ", "")
    numbers = list(re.finditer(r"\d+", gold))
    if numbers and not re.search(r"\d,\\?!?\d{3}", plain):
        last = numbers[-1]
        yield "off by one", f"{gold[:last.start()]}{int(last.group()) + 1}{gold[last.end():]}"
    if re.fullmatch(r"-?(?:[\d.]+|\\d?frac\{\d+\}\{\d+\}|\d*\\sqrt\{?\d+\}?|\d*\\pi)", plain) and plain.strip("0.-"):
        yield "sign flipped", plain[1:] if plain.startswith("-") else f"-{plain}"
    if (match := _FRACTION.fullmatch(gold)) and match[2] != match[3]:
        yield "swapped", f"{match[1]}\\frac{{{match[3]}}}{{{match[2]}}}"
    if _WHOLE.fullmatch(gold) and len(plain.strip("-")) > 1:
        yield "digit dropped", plain[:-1]
        yield "digit added", f"{plain}0"
    if (match := _TUPLE.fullmatch(gold)) and len({part.strip() for part in match[1].split(",")}) > 1:
        yield "tuple order", f"({','.join(reversed(match[1].split(',')))})"
    if re.search(r"[\[\]]", gold) and "\\sqrt[" not in gold:
        yield "bracket", gold.translate(str.maketrans("[]", "()"))
    if match := re.fullmatch(r"\\text\{([A-Za-z ]{3,})\}", gold):
        yield "another word", f"\\text{{not {match[1]}}}"
    if match := re.fullmatch(r"\\text\{\(([A-E])\)\}", gold):
        yield "another choice", f"\\text{{({'BCDEA'['ABCDE'.index(match[1])]})}}"


def primes(n: int) -> list[int]:
    """Prime factors of n, each once."""
    return [p for p in range(2, n + 1) if n % p == 0 and all(p % q for q in range(2, p))]
