"""Final answers and worked steps: extract, compare, count. No torch here.

An answer is taken from the text (`extract_answer`) and compared with the gold one (`AnswerChecker`). Plain
numbers, fractions, arithmetic and identical strings are decided here, exactly. Everything else goes to
math-verify (https://github.com/huggingface/Math-Verify), which can hang or eat memory on hostile LaTeX and
has no time-out of its own off the main thread: it runs in ONE child process, `python -m minimath.answer`,
with a memory limit and no secrets in its environment, killed and restarted when an answer takes too long. The
gold answer is always verify's first argument: verify is not symmetric.

`check_steps` (from steps.py) counts the `a op b = c` steps of a solution. Nothing here is ever eval'd.
"""
from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from .config import UserError
from .steps import MAX_TEXT_CHARS, StepCount, check_steps, plain_number, same_number

__all__ = ["AnswerChecker", "StepCount", "answer_end", "check_steps", "extract_answer"]

MAX_ANSWER_CHARS = 400        # a longer "answer" is wrong: the longest gold answer of MATH-500 has 53
CHILD_MEMORY_BYTES = 2 << 30
CHILD_START_S = 120.0         # sympy imports slowly on a loaded machine

# ---------------------------------------------------------------- extraction

_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.S)
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s+([^\s{}$\\]{1,60})")
_HASHES = re.compile(r"####[ \t]*([^\n]{1,400})")
_ANSWER_IS = re.compile(r"\banswer\b(?: is| was|:|=)[ \t]*:?[ \t]*([^\n]{1,400})", re.I)
_SENTENCE_END = re.compile(r"[.!?;](?:\s|$)|,\s|\s(?:because|since|so|as)\s")
_NUMBER = re.compile(r"(?:(?<![\w)])-)?\\?\$?(?:\d+(?:,\d{3})*(?!\d)(?:\.\d+)?|\.\d+)(?:/\d+)?(?:\\?%)?")


def extract_answer(text: str, *, strict: bool = False) -> str | None:
    """The final answer in `text`: the last complete, non-empty \\boxed{...}, else what follows the last
    "####", else the last "answer is ...", else the last number, else None. strict=True: \\boxed only."""
    text = text[-MAX_TEXT_CHARS:]
    boxed = _last_boxed(text)
    if boxed is not None or strict:
        return boxed
    for pattern in (_HASHES, _ANSWER_IS):
        found = pattern.findall(text)
        if found:
            answer = found[-1].strip()
            if pattern is _ANSWER_IS:
                answer = _SENTENCE_END.split(answer, maxsplit=1)[0]
                inner = re.search(r"\$([^$]+)\$", answer)
                answer = inner.group(1) if inner else answer
            answer = answer.strip().strip("*").rstrip(".").strip()
            if answer:
                return answer
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(" ", "").strip() if numbers else None


def _boxes(text: str) -> list[tuple[str, int]]:
    """(contents, end offset) of each complete, non-empty \\boxed{...} in the order in which they close. One
    pass with a stack: cut or nested boxes must not make this quadratic."""
    stack: list[int] = []          # start of the contents for a box, -1 for any other brace
    boxes = []
    for token in _BRACE.finditer(text):
        mark = token.group()
        if mark == "}":
            start = stack.pop() if stack else -1
            if start >= 0 and token.start() - start <= 4 * MAX_ANSWER_CHARS:
                contents = text[start:token.start()].strip()
                if contents:
                    boxes.append((contents, token.end()))
        elif mark.endswith("{") and mark != "\\{":
            stack.append(token.end() if len(mark) > 1 else -1)
    return boxes


def _last_boxed(text: str) -> str | None:
    """Contents of the \\boxed{...} that closes last; boxes inside it are opened."""
    boxes = _boxes(text)
    if not boxes:
        bare = _BARE_BOX.findall(text)
        return bare[-1].rstrip(".,") if bare else None
    best = boxes[-1][0]
    for _ in range(4):
        inner = _boxes(best) if re.match(r"\\(?:boxed|fbox)\s*\{", best) else []
        if not inner:
            break
        best = inner[-1][0]
    return best


def box_closed(text: str) -> bool:
    """Whether a non-empty \\boxed{...} is complete in text."""
    return bool(_boxes(text))


def answer_end(text: str) -> int:
    """Offset just after the place where the final answer is first given, len(text) when it is in no box. What
    follows is not part of the solution: a judge does not get to see it."""
    boxes = _boxes(text)
    return next((end for contents, end in boxes if contents == boxes[-1][0]), len(text))


# ---------------------------------------------------------------- comparison

_WRAPPERS = re.compile(r"\\(?:text|mathrm|textbf|mbox|mathbf|textit)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,;:! ]|\\\$|[\s$~]")


def _normal(answer: str) -> str:
    """One spelling for answers that differ only in typography: \\dfrac, \\left, \\text{...}, spaces, "$"."""
    text = _WRAPPERS.sub(r"\1", answer.strip())
    text = _SPACING.sub("", text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")).rstrip(".")
    if re.fullmatch(r"\([A-Za-z]\)", text):
        text = text[1:-1]                       # choice "(C)"
    return text.casefold() if len(text) > 1 and text.isalpha() else text


class AnswerChecker:
    """Compares answers; a context manager, usable from any thread. The math-verify child starts at the first
    answer that needs it and lives until close(). `timeout_s` bounds one comparison. Counters: `bad_gold` (no
    one can read the gold answer: all answers are wrong, so that it pays nobody), `timeouts`, `starts`."""

    def __init__(self, timeout_s: float = 2.0):
        self.timeout_s = timeout_s
        self.bad_gold = self.timeouts = self.starts = 0
        self._child: subprocess.Popen | None = None
        self._lines: queue.Queue = queue.Queue()
        self._lock = threading.Lock()
        self._cache: dict[tuple[str, str], bool] = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def check(self, text: str, gold: str) -> bool:
        """Whether the final answer of `text` equals `gold`; False without an answer."""
        answer = extract_answer(text)
        return answer is not None and self.equal(answer, gold)

    def check_many(self, rows: list[tuple[str, str]]) -> list[bool]:
        """`check` for each (text, gold)."""
        return [self.check(text, gold) for text, gold in rows]

    def equal(self, answer: str, gold: str) -> bool:
        """Whether two answers are the same mathematical object. UserError only when the child can't start."""
        if not gold.strip():
            self.bad_gold += 1
            return False
        if len(answer) > MAX_ANSWER_CHARS or len(gold) > MAX_ANSWER_CHARS or not answer.strip():
            return False
        if _normal(answer) == _normal(gold):
            return True
        gold_number, number = plain_number(gold), plain_number(answer)
        if gold_number and number:
            return same_number(gold_number, number)
        if gold_number and not re.search(r"[\d\\]", answer):
            return False                        # words: not a number
        key = (answer, gold)
        if key not in self._cache:
            if len(self._cache) >= 10_000:
                self._cache.clear()
            self._cache[key] = self._ask(answer, gold)
        return self._cache[key]

    def _ask(self, answer: str, gold: str) -> bool:
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._start()
            request = json.dumps({"gold": gold, "answer": answer, "seconds": self.timeout_s})
            try:
                self._child.stdin.write(request + "\n")
                self._child.stdin.flush()
                reply = self._lines.get(timeout=self.timeout_s)
            except queue.Empty:
                self.timeouts += 1
                reply = None
            except OSError:                     # it died (memory limit, stack): this answer is wrong
                reply = None
            if reply not in ("right", "wrong", "bad gold"):
                self._stop()
            self.bad_gold += reply == "bad gold"
            return reply == "right"

    def _start(self):
        kept = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV", "TMPDIR")
        root = str(Path(__file__).resolve().parents[1])
        env = {name: os.environ[name] for name in kept if name in os.environ}
        env["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        self._lines = queue.Queue()
        self._child = subprocess.Popen(
            [sys.executable, "-B", "-m", "minimath.answer"], env=env, text=True, bufsize=1, encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        threading.Thread(target=_pump, args=(self._child.stdout, self._lines), daemon=True).start()
        self.starts += 1
        try:
            ready = self._lines.get(timeout=CHILD_START_S)
        except queue.Empty:
            ready = None
        if ready != "ready":
            self._stop()
            raise UserError("answer checker: the math-verify child process did not start; try "
                            "`python -c 'import math_verify'`, and reinstall math-verify if that fails")

    def _stop(self):
        child, self._child = self._child, None
        if child is not None:
            with contextlib.suppress(OSError):
                child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                with contextlib.suppress(OSError, ValueError):
                    stream.close()

    def close(self):
        """Ends the child; the checker can be used again afterwards."""
        with self._lock:
            self._stop()


def _pump(stream, lines: queue.Queue):
    with contextlib.suppress(OSError, ValueError):
        for line in stream:
            lines.put(line.strip())
    lines.put("ended")


# ---------------------------------------------------------------- the child process

def _serve():
    """Reads one JSON request a line, writes right, wrong or "bad gold" a line, until its input closes."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)                               # a library's print must not become a verdict
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (CHILD_MEMORY_BYTES, CHILD_MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    # an alarm's default action ends the process: no hostile answer loops for ever when the parent was killed
    alarm = getattr(signal, "alarm", lambda seconds: 0)
    configs = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    @functools.lru_cache(maxsize=1024)
    def read(answer: str):
        return parse(f"\\boxed{{{answer}}}", configs, parsing_timeout=None)

    replies.write("ready\n")
    for line in sys.stdin:
        request = json.loads(line)
        alarm(int(request["seconds"]) + 5)
        try:
            gold = read(request["gold"])
            reply = "bad gold" if not gold else "right" if verify(
                gold, read(request["answer"]), timeout_seconds=None) else "wrong"
        except (Exception, RecursionError, MemoryError):
            reply = "wrong"
        alarm(0)
        replies.write(reply + "\n")


if __name__ == "__main__":
    _serve()
