"""Rows made by hypothesis, for bad_rows.py: what becomes of each is worked out here a second time, independently."""
import json
import math
import re
import unicodedata
from pathlib import Path

import hypothesis
from harness import Tally
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from tiny import tiny_tokenizer

from minimath.config.schema import DataOptions
from minimath.data.chat import control_tokens, encode
from minimath.data.examples import load_examples
from minimath.data.rows import MISSING

PROBLEM = ("problem", "question", "prompt", "instruction")
SOLUTION = ("solution", "completion", "response", "output")
ANSWER = ("answer", "final_answer", "expected_answer")


def run(count: int, folder: Path) -> list[Tally]:
    set_hypothesis_home_dir(folder / "hypothesis")
    lines = made_lines(count)
    tally, encodes = Tally("bad rows: fuzzed rows"), Tally("bad rows: fuzzed rows as tokens")
    path = folder / "fuzz.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in lines) + b'{"problem": "end", "solution": "end"}\n')
    want = [fate(line) for line in lines]
    examples, report = load_examples(DataOptions(source=str(path)), need=("solution",))
    kept = {int(e.where.rpartition(":")[2]): e for e in examples}
    shown = iter(report.rows)
    counts = {}
    for number, (line, reason) in enumerate(zip(lines, want), 1):
        agrees = (number in kept) == (not reason)
        if reason:
            counts[reason] = counts.get(reason, 0) + 1
            named = next(shown, None)
            agrees = agrees and (named is None or named.startswith(f"{path}:{number}: {reason}; "))
        tally.add(agrees, f"line {number}, {'taken' if number in kept else 'refused'}, expected {reason or 'taken'}: "
                          f"{line[:200]!r}")
    tally.add(report.skipped == counts, f"{report.skipped} instead of {counts}")
    tokenizer = tiny_tokenizer()
    special = {number for number, _ in control_tokens(tokenizer).values()}
    for number, example in kept.items():
        row = encode(tokenizer, example, prompt_template="{problem}", max_len=1 << 20)
        turns = len(example.messages) if example.messages else 2
        whole = any(row.loss_mask) and sum(i in special for i in row.ids) == 2 * turns
        encodes.add(whole, f"line {number}: {row.ids[:80]}")
    return [tally, encodes]


# ---- the rows

def made_lines(count: int) -> list[bytes]:
    """Lines without line ends, most of them JSON objects of the known columns with all sorts of values."""
    lines = []

    @hypothesis.settings(max_examples=count, derandomize=True, database=None, deadline=None,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.one_of(*(objects() for _ in range(4)), st.binary(max_size=40),
                                st.builds(damaged, objects(), st.integers(0, 500), st.binary(max_size=3))))
    def collect(line):
        lines.append(line.replace(b"\n", b" "))

    collect()
    assert len(lines) >= count, f"hypothesis made {len(lines)} rows of {count}"
    return lines[:count]


def damaged(line: bytes, at: int, by: bytes) -> bytes:
    at = at % (len(line) + 1)
    return line[:at] + by + line[at + 1:]


def objects():
    """JSON objects as bytes. one_of drops equal branches: a weight is a branch made several times."""
    nasty = st.sampled_from(["", " ", "\u200b", "<|im_end|>", "<|im_start|>user\n", "#### 5", "#### Step\nx", "a\0",
                             "\\boxed{7}", "\ud83d", "\ufeff", "\r\n", "{problem}", "[/b]", "\x1b[2J", "nine\nlines"])
    text = st.one_of(*(st.text(min_size=1, max_size=20) for _ in range(4)), st.lists(nasty, max_size=3).map("".join),
                     st.text(st.characters(codec=None), max_size=8))
    value = st.one_of(text, st.none(), st.integers(), st.floats(), st.booleans(), st.lists(text, max_size=2),
                      st.dictionaries(st.sampled_from(PROBLEM), text, max_size=1))
    turn = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "human"]), "content": text})
    parts = text.map(lambda t: [{"role": "user", "content": t}, {"role": "assistant", "content": [
        {"type": "text", "text": "so "}, {"text": t}]}])
    talk = st.one_of(st.lists(turn, max_size=4), value, parts)
    filled = text.map("x".__add__)
    usual = (st.fixed_dictionaries({"problem": filled, "solution": filled}, optional={"answer": text, "id": value})
             for _ in range(5))
    known = dict.fromkeys((*PROBLEM[:3], *SOLUTION[:2], *ANSWER[:2], "id", "extra"), value)
    return st.one_of(
        *usual, st.fixed_dictionaries({"question": text, "answer": value}), st.fixed_dictionaries({}, optional=known),
        st.fixed_dictionaries({"messages": talk}, optional={"answer": value}),
        st.fixed_dictionaries({"prompt": talk, "completion": talk})).map(lambda made: json.dumps(made).encode())


# ---- what should become of a line: the reason for which it is refused, "" when it is taken

def fate(line: bytes) -> str:
    line = line.removeprefix(b"\xef\xbb\xbf")
    if not line.strip():
        return "empty row"
    if b"\0" in line:
        return "NUL byte"
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        return "not UTF-8"
    except ValueError:
        return "not JSON"
    if not isinstance(row, dict):
        return f"a JSON {type(row).__name__} instead of an object"
    messages = row.get("messages")
    messages = None if nothing(messages) and messages != [] else messages
    if messages is None and isinstance(row.get("prompt"), list):
        last = row.get("completion")
        messages = row["prompt"] + (last if isinstance(last, list) else [] if nothing(last) else
                                    [{"role": "assistant", "content": last}])
    return columns_fate(row) if messages is None else chat_fate(messages, row)


def columns_fate(row: dict) -> str:
    if not set(PROBLEM) & set(row):
        return "no column with the problem"
    found = {}
    for names in (PROBLEM, SOLUTION, ANSWER):
        name = next((n for n in names if not nothing(row.get(n))), None)
        if name is None and names is PROBLEM:
            return "empty problem"
        found[names] = "" if name is None else row[name]
        if name and (reason := value_fate(row[name], name)):
            return reason
    answer = found[ANSWER][0] if isinstance(found[ANSWER], list) else found[ANSWER]
    words = len(re.findall("[A-Za-z]{2,}", answer)) if isinstance(answer, str) else 0  # none of these has LaTeX prose
    worked = isinstance(answer, str) and not nothing(answer) and (
        "####" in answer or "\\boxed" in answer or "\n" in answer.strip() and words > 2 or words > 8)
    return "" if found[SOLUTION] or worked else "no solution"


def chat_fate(messages, row: dict) -> str:
    if not isinstance(messages, list) or not messages:
        return "malformed messages"
    expected = ("system", "user")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            return "malformed messages"
        content = message["content"]
        role = "user" if message["role"] == "human" else message["role"]
        if role not in ("system", "user", "assistant"):
            return "malformed messages"
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(p["text"] for p in content)
        if content is not None and (reason := value_fate(content, f"content of message {number}")):
            return reason
        if content is None or empty(content) or role not in expected:
            return "malformed messages"
        expected = ("assistant",) if role == "user" else ("user",)
    if all(m["role"] not in ("user", "human") for m in messages):
        return "malformed messages"
    name = next((n for n in ANSWER if not nothing(row.get(n))), None)
    if name and (reason := value_fate(row[name], name, number=True)):
        return reason
    answer = row[name] if name else ""
    worked = isinstance(answer, str) and ("####" in answer or "\\boxed" in answer)
    return "" if messages[-1]["role"] == "assistant" or worked else "no solution"


def value_fate(value, name: str, *, number: bool = False) -> str:
    if name in ANSWER and isinstance(value, list) and len(value) == 1:
        [value] = value
    if (number or name in ANSWER) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{name} is infinite" if isinstance(value, float) and math.isinf(value) else ""
    if not isinstance(value, str):
        return f"{name} has the wrong type"
    if "\0" in value:
        return "NUL character"
    return "half of a surrogate pair" if any(unicodedata.category(c) == "Cs" for c in value) else ""


def nothing(value) -> bool:
    text = isinstance(value, str)
    return value in (None, [], {}) or value != value or text and (empty(value) or value.strip() in MISSING)


def empty(text) -> bool:
    return not any(not c.isspace() and unicodedata.category(c) not in ("Cf", "Cc") for c in text)
