"""Extract final answers from texts and compare them. Nothing here is ever eval'd."""
import functools
import itertools
import re

from minimath.grading.compare import Comparison
from minimath.grading.numbers import SCALES
from minimath.grading.sandbox import LATE, BoundedChild
from minimath.grading.typeset import typeset
from minimath.grading.units import NOT_UNITS

MAX_ANSWER_CHARS = 400        # a longer "answer" is wrong: the longest gold answer of MATH-500 has 53
MAX_TAIL_CHARS = 1 << 17      # of a text, its end is read for an answer: a hostile megabyte would take 0.7 s
MAX_KEPT = 10_000             # replies of math-verify
MAX_PARAGRAPH = 2000          # characters before the last number, in which a formula around it is looked for

_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.S)
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s+([^\s{}$\\]{1,60})")
# GSM8K's form: "#### 17", also "#### 17 pears" in the last line; a Markdown heading has words, or "2. Then"
_HASHES = re.compile(r"^####[ \t]*((?!\d+[.)][ \t])[^\sA-Za-z][^\sA-Za-z]*[ \t]*$|"
                     r"(?!\d+[.)][ \t])[^\n]{1,400}(?=\s*\Z))", re.M)
_HEADING = re.compile(
    r"\s*\**(?:step|final|answer|the |so |conclusion|check|verif|[^\n]*[:=?]\s*\S*\s*[a-z]{4})", re.I)
_THOUGHT, _ANSWER_TAG = "</think>", re.compile(r"<answer>((?:(?!<answer>).){1,2000}?)</answer>", re.S | re.I)
# a look-ahead, so that of "Final answer: the answer is 5" the last is found too
_ANSWER_IS = re.compile(
    r"\b(?:answers?|(?:option|choice)(?= is))\b(?: is| are| was|:|=)[ \t]*:?[ \t]*(?=([^\s:][^\n]{0,399}))", re.I)
_LETTER = re.compile(
    r"(?:.*\b(?:is|be|option|choice|answer)|(?:(?!not)[a-z]+ ){0,3}[a-z]+)\s+\(?([A-J])\)?\W{0,3}", re.S)
_SENTENCE_END = re.compile(r"[.!?;](?:\s|$)|,\s|\s(?:because|since|so|as)\s")
_NUMBER = re.compile(
    "(?:(?<![\\w)])[-\u2212]|(?<== )[-\u2212] )?\\\\?\\$?"
    r"(?:\d+(?:,\d\d\d?){0,8},\d{3}(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    "(?:[\u00bc-\u00be\u2150-\u215e]| \\d+/\\d+|/\\d+|(?:(?::| : )\\d+){1,4}(?: ?[ap]\\.?m\\b)?|[eE][-+]?\\d+(?!\\w)|"
    " ?(?:[x\u00d7]|\\\\times|\\\\cdot) ?10(?=\\^|[\u00b2-\u207e])(?:\\^\\{?-?\\d+\\}?)?)?"
    "[\u00b2\u00b3\u00b9\u2070-\u207b]*(?:\\\\?%| ?(?:[cdkm]?m|in|ft|yd|mi|units?)\\$?\\^\\{?[23]\\}?\\$?|"
    rf" (?:{'|'.join(SCALES)}|dozen)\b)?")
# a dollar before a digit begins an amount or a formula, and ends none: $5 and $6
_FORMULA = re.compile(r"\$\$?([^$]{1,400}?)(?:\$\$|\$(?!\d))|\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\]", re.S)
_FIRST_FORMULA = re.compile(rf"[\s*:]{{0,9}}(?:{_FORMULA.pattern})", re.S)
# (3, 4), or a list up to the end of the sentence, 1, 2, and 3 or A, C: its commas end no sentence
_PART = r"(?:[A-Za-z]\s*=\s*)?(?:[-\u2212]?\d[\d./]{0,20}|[A-J](?!\w)|\.{3}|\\[lc]?dots)"
_TUPLE_OR_LIST = re.compile(r"[\s*:]{0,9}([(\[\]][^()\[\]]{1,100}[)\]\[]|"
                            rf"{_PART}(?:(?:, (?:and |or )?| and | or ){_PART}){{1,20}}"
                            r"(?=[\s*]{0,9}(?:$|\.(?:\s|$))))")
_POINT = re.compile(r"(?<![\w)\\])[(\[]\s*{0}(?:\s*,\s*{0}){{1,20}}\s*[)\]]".format("[-\u2212]?\\d[\\d./]{0,20}"))
_BOLD = re.compile(r"(?<![\w)}])\*\*|\*\*(?![\w(\\])")   # 2**3 is a power
_LAST_IS = re.compile(r".*\b(?:is|are|was|were|equals|equal to)\s", re.S)
_EARLIER = re.compile(r"(?:[A-Za-z]\s*=\s*)?([-\u2212]?\d[\d,./]{0,20})(?:, | ?,? (?:and|or) )(?:[A-Za-z]\s*=\s*)?\Z")
_RELATION = re.compile(r"[\\<>=^(\[]")
# boxes with nothing else between them are one list
_BETWEEN = re.compile(r"(?:[\s$,;*]|\\[()\[\],;:! ]|\\q?quad|\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b){1,40}")


def extract_answer(text: str, *, strict: bool = False) -> str | None:
    """Return the final answer in a finished text, or None.

    It is the last complete, non-empty \\boxed{...}, else what follows the last "####", else the last "answer is ...",
    else the last number, with the formula around it. Boxes with nothing but commas, "and" or "or" between them are one
    list. strict=True: \\boxed only.
    """
    before, end, behind = text[-MAX_TAIL_CHARS:].partition(_THOUGHT)
    text = behind if end else before                # as data.template.behind_thought: a second one ends none
    tagged = [] if strict else _ANSWER_TAG.findall(text)[-1:]
    boxed = _last_boxed((tagged or [text])[0])
    if boxed is not None or strict:
        return boxed
    if tagged:
        said = _ANSWER_IS.findall(tagged[0])
        return (_said(said[-1].strip()) if said else tagged[0]).strip() or None
    hashes = [found for found in _HASHES.findall(text) if not _HEADING.match(found)]
    for found, read in ((hashes, _of_line), (_ANSWER_IS.findall(text), _said)):
        answer = _BOLD.sub("", read(found[-1].strip())).strip().strip("*").rstrip(".").strip() if found else ""
        if answer:
            return answer
    return _last_number(text)


def final_answer(text: str, finished: bool) -> str | None:
    """Return the final answer of a completion; of one that was cut only a closed box.

    lighteval and Qwen2.5-Math's grader take any last number there too, which would pay for luck.
    """
    if finished:
        return extract_answer(text)
    if "<think>" in text and _THOUGHT not in text:
        return None
    # what stands after the last of these may lack its end: \boxed 12 of \boxed 120
    end = max(text.rfind(mark) for mark in " \n}") + 1
    return extract_answer(text[:end], strict=True)


def _of_line(answer: str) -> str:
    return _SENTENCE_END.split(answer, maxsplit=1)[0] if re.search(r"[A-Za-z]{3}", answer) else answer


def _said(answer: str) -> str:
    """Return the formula, tuple or list that words after "answer is" begin with.

    Else it is what follows the last "is" of their sentence; of a long sentence its last number.
    """
    sentence = _LAST_IS.sub("", _SENTENCE_END.split(answer, maxsplit=1)[0])
    if _FIRST_FORMULA.match(answer):
        return _list_of(list(_FORMULA.finditer(answer)), 0, answer)
    if match := _TUPLE_OR_LIST.match(answer):
        return match[1]
    if formulas := list(_FORMULA.finditer(sentence)):
        return _list_of(formulas, 0, sentence)
    if letter := _LETTER.fullmatch(answer) or _LETTER.fullmatch(sentence):
        return letter[1]
    words = re.findall("[A-Za-z']+", sentence.lower())         # "She has 42 apples left": words around one number
    counted = (re.fullmatch(r"(?:[A-Za-z']+ ){2,}[^\\={}]*", sentence) and not NOT_UNITS & set(words)
               and len(_NUMBER.findall(sentence)) == 1)
    if sentence[:1].isalpha() and (counted or len(sentence.split()) > 5):
        return _last_number(sentence) or sentence
    return sentence


def _last_number(text: str) -> str | None:
    """Return the last number, or the last side of its formula: \\frac{3}{4} is not 4."""
    *_, last = [None, *_NUMBER.finditer(text)]
    if last is None:
        return None
    start = max(text.rfind("\n\n", 0, last.start()) + 1, last.start() - MAX_PARAGRAPH)
    paragraph = text[start:last.end() + MAX_PARAGRAPH].replace("\\$", "  ")
    formulas = list(_FORMULA.finditer(paragraph))
    for i, formula in enumerate(formulas):
        if formula.start() <= last.start() - start < formula.end():
            inside, joined = _inside(formula), _list_of(formulas, i, paragraph)
            if joined != inside:
                return joined
            if _RELATION.search(inside):
                return re.split(r"(?<![<>!])=", inside)[-1].strip() or inside
    for point in _POINT.finditer(paragraph):
        if point.start() < last.start() - start < point.end() and not _NUMBER.fullmatch(point[0][1:-1]):
            return point[0]                         # (3, 4), but not (1,234)
    parts, before = [last.group()], text[start:last.start()]
    while earlier := _EARLIER.search(before, max(0, len(before) - 60)):     # 2 and 3: a list, and no chance to name two
        if len(parts) == 1 and not re.search(r"(?:and|or)\s+(?:[A-Za-z]\s*=\s*)?\Z", before):
            break
        parts.append(earlier[1])
        before = before[:earlier.start()]
    return ", ".join(reversed(parts))


def _list_of(formulas: list[re.Match], at: int, text: str) -> str:
    """Return a formula and those that "and", "or" or commas join to it: one list."""
    joined = [_joins(text[one.end():other.start()]) for one, other in itertools.pairwise(formulas)]
    first = at - len(list(itertools.takewhile(bool, reversed(joined[:at]))))
    last = at + len(list(itertools.takewhile(bool, joined[at:])))
    return ", ".join(dict.fromkeys(map(_inside, formulas[first:last + 1])))


def _joins(between: str) -> bool:
    return len(between) < 40 and bool(_BETWEEN.fullmatch(between) and re.search("[,;]|and|or|quad", between))


def _inside(formula: re.Match) -> str:
    return formula[formula.lastindex].strip()


def boxes(text: str) -> list[tuple[str, int, int]]:
    """Return (contents, start, end) of complete, non-empty \\boxed{...}, as they close."""
    found, stack = [], []       # stack: of a box its start and that of its contents, None for any other brace
    for token in _BRACE.finditer(text):
        if token[0] == "}":
            start, inner = (stack.pop() if stack else None) or (0, 0)
            if inner and token.start() - inner <= 4 * MAX_ANSWER_CHARS and text[inner:token.start()].strip():
                found.append((text[inner:token.start()].strip(), start, token.end()))
        elif token[0].endswith("{") and token[0] != "\\{":
            stack.append(token.span() if len(token[0]) > 1 else None)
    return found


def _last_boxed(text: str) -> str | None:
    """Return the contents of the \\boxed{...} that closes last; open boxes inside it.

    "\\boxed{1} and \\boxed{2}" is "1, 2": an answer of two parts, and no chance to name two and be right with one.
    """
    parts, first = [], len(text)
    for contents, start, end in reversed(boxes(text)):
        if end > first:  # inside the box that follows
            continue
        if parts and not _joins(text[end:first]):
            break
        while re.match(r"\\(?:boxed|fbox)\s*\{", contents) and (inner := boxes(contents)):
            contents = inner[-1][0]
        parts.append(contents)
        first = start
    if not parts and (bare := _BARE_BOX.findall(text)):
        return bare[-1].rstrip(".,")
    return ", ".join(dict.fromkeys(reversed(parts))) or None


def answer_end(text: str) -> int:
    """Return the offset after the box that first gives the final answer; len(text) without one."""
    found = boxes(text)
    return next((end for contents, _, end in found if contents == found[-1][0]), len(text))


class AnswerChecker(BoundedChild):
    """Compare answers; a context manager, usable from any thread, also after close().

    `bad_gold` counts comparisons with a gold answer that no one can read: all answers are wrong, so that it pays
    nobody. Every method raises UserError only when the child can't start.
    """

    def __init__(self, timeout_s: float = 2.0):
        super().__init__(timeout_s)
        self.bad_gold = 0
        self._kept: dict[tuple[str, ...], str] = {}  # replies; "" for what was late once, maybe for a worker's death

    def _ask(self, *question: str) -> str:
        kept = reply = self._kept.get(question)
        if not kept:
            reply = self.ask(*question)
            self._kept[question] = "" if reply == LATE and kept is None else reply
            if len(self._kept) > MAX_KEPT:
                self._kept.clear()
        return reply

    def check(self, text: str, gold: str, finished: bool = True) -> bool:
        """Tell whether the final answer of a text is gold."""
        answer = final_answer(text, finished)
        return answer is not None and self.equal(answer, gold)

    def matches(self, text: str, pattern: str, finished: bool = True) -> bool:
        """Tell whether a regular expression matches the whole final answer in time, case ignored."""
        answer = final_answer(text, finished)
        return answer is not None and len(answer) <= MAX_ANSWER_CHARS and (
            self._ask("match", pattern, answer.strip()) == "right")

    def equal(self, answer: str, gold: str) -> bool:
        """Tell whether two answers are the same mathematical object."""
        if not gold.strip() or len(gold) > MAX_ANSWER_CHARS:
            self.bad_gold += 1
            return False
        if len(answer) > MAX_ANSWER_CHARS or not answer.strip():
            return False
        comparison = Comparison(functools.partial(self._ask, "equal"))
        same = comparison.same(typeset(answer), typeset(gold))
        self.bad_gold += comparison.bad_gold
        return same
