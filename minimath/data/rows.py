"""Make an example of a row.

The shape is read off a row's columns; the first of these that fits counts:
    generations        problem + a list generations or generation (OpenR1-Math): the shortest of those that
                       correctness_math_verify calls right and is_reasoning_complete whole, as in the paper
    messages           messages: [{role, content}, ...] with roles system, user, assistant; an assistant's thoughts may
                       be in reasoning_content. Also ShareGPT's conversations: [{from, value}, ...]
    prompt, completion each a text or a list of messages; verl's answer is in reward_model.ground_truth
    instruction, input Alpaca's: the problem is both
    question, answer   an answer with "#### 72" (GSM8K) is split in solution and answer, one with \\boxed or of
                       more than 8 words is a worked solution, any other a final answer
    problem, solution  or generation (+ answer; else from "#### x" or \\boxed{x}), as in Fast-Math-R1-SFT and -GRPO
Thoughts before a solution are in its text, in <think> and </think>, or in reasoning_content or thinking beside it.
"""
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

from minimath.core.text import did_you_mean
from minimath.data.readers import BadRow
from minimath.data.template import CLOSE, OPEN
from minimath.grading.answer import extract_answer

COLUMNS = {
    "problem": ("problem", "question", "prompt", "instruction", "query", "input"),
    "solution": ("solution", "completion", "response", "output", "generation", "generations"),
    "answer": ("answer", "final_answer", "expected_answer", "ground_truth"),
}
CHATS = ("messages", "conversations", "conversation")
NESTED = (("reward_model", "ground_truth"), ("extra_info", "answer"))  # verl's place of the answer
OURS = ("id", "tokens", "solve_rate")  # of the rows that minimath writes: nothing to learn from
MISSING = {"NULL", "Null", "null", "NaN", "nan", "NAN", "None", "N/A", "n/a", "NA", "<NA>", "#N/A"}  # as programs write
VERDICTS, WHOLE = ("correctness_math_verify", "correctness_llama"), ("is_reasoning_complete",)  # first there counts
ROLES = ("system", "user", "assistant")
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # of a message
THOUGHT_COLUMNS = ("reasoning_content", "thinking")  # beside a solution; a column `reasoning` is often a solution
ANNOTATION = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator marks
COMMAND = re.compile(r"\\[A-Za-z]+(\{[A-Za-z* ]*\})*")
WORD = re.compile(r"(?<![A-Za-z])[A-Za-z]{2,}(?![A-Za-z,])")


@dataclass
class Example:
    """One problem; `messages` replaces problem and solution for chat rows."""
    problem: str
    solution: str = ""
    answer: str = ""
    id: str = ""
    messages: list[dict] | None = None
    where: str = ""  # the row's place

    def asked(self) -> list[dict]:
        """The messages up to the last answer."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages


def _filled(value) -> bool:
    """Tell whether a cell holds anything: no NaN, no blank, no program's word for nothing."""
    if isinstance(value, str):
        return not (blank(value) or value.strip() in MISSING)
    return value is not None and value == value and value != [] and value != {}


def blank(text: str) -> bool:
    """Tell whether a text has nothing but space, zero-width and control characters."""
    return all(c.isspace() or unicodedata.category(c) in ("Cf", "Cc") for c in text)


class Columns:
    """The columns of a row by lower-case name, and which of them were read."""

    def __init__(self, row: dict):
        self.row, self.read = row, set(OURS)
        self.values = {str(name).strip().lower(): value for name, value in row.items()}
        self.values |= {name: value for name, value in row.items() if name in self.values and _filled(value)}
        self.inside: list[str] = []  # fields of its messages that were not read

    def take(self, what: str) -> tuple[str, object]:
        """Return the first column for `what` that holds something, and its value, or None."""
        for name in COLUMNS[what]:
            if name not in self.read and _filled(self.values.get(name)):
                self.read.add(name)
                return name, self.values[name]
        return what, None

    def nested_answers(self) -> list:
        """Return what verl's columns hold in the place of the answer."""
        found = [(outer, self.values[outer].get(inner)) for outer, inner in NESTED
                 if isinstance(self.values.get(outer), dict)]
        self.read |= {outer for outer, value in found if _filled(value)}
        return [value for _, value in found if _filled(value)]

    def unread(self) -> list[str]:
        """Name the columns that hold something and that nobody asked for."""
        return [str(name)[:60] for name, value in self.row.items() if _filled(value)
                and (str(name).strip().lower() not in self.read or self.values[str(name).strip().lower()] is not value)
                ] + self.inside

    def missing(self, what: str, fix: str) -> BadRow:
        """Say that there is no solution or answer, and which columns could be meant."""
        said = [f"{name} is {value!r}, which is how programs write a missing one" for name in COLUMNS[what]
                if isinstance(value := self.values.get(name), str) and value.strip() in MISSING]
        said += [f"column {name} is not read{did_you_mean(name, COLUMNS[what])}" for name in self.unread()[:12]]
        return BadRow(f"no {what}", "; ".join([fix, *said]))


def to_example(row: Columns, where: str, need: Iterable[str]) -> Example | BadRow:
    """Make an example of a row in any accepted shape; BadRow when it can't be used."""
    try:
        _take_best_generation(row, "solution" in need)
        chat = _chat_messages(row)
        example = _from_messages(row, chat, where) if chat else _from_columns(row, where)
    except BadRow as bad:
        return bad
    if not example.answer and example.solution:
        example.answer = hashes_answer(example.solution) or extract_answer(example.solution, strict=True) or ""
    if "solution" in need and not example.solution:
        return row.missing("solution", "add a worked solution (column solution, completion or messages)")
    if "answer" in need and not example.answer:
        return row.missing("answer", "add a column answer, or end the solution with \\boxed{...} or #### ...")
    return example


def _take_best_generation(row: Columns, needed: bool) -> None:
    """Put the shortest correct one of a list of generations in the place of the list.

    Raises BadRow when there is none and it is needed.
    """
    values = row.values
    name = next((n for n in ("generations", "generation") if isinstance(values.get(n), list)), None)
    if name is None:
        return
    verdicts, whole = ([n for n in names if isinstance(values.get(n), list)][:1] for names in (VERDICTS, WHOLE))
    row.read |= {name, *verdicts, *whole}
    marked = zip(values[name], *(values[n] for n in verdicts + whole))
    right = [text for text, *marks in marked if isinstance(text, str) and all(marks)] if verdicts else []
    if needed and not verdicts:
        raise BadRow(f"{name} without verdicts", f"add {VERDICTS[0]}, a list of true and false, or keep one; minimath "
                     "sample checks answers and keeps the shortest right solution")
    if needed and not right:
        raise BadRow("no right generation", f"none of {len(values[name])} is right and whole: drop it, or sample more")
    for other in ("messages", *COLUMNS["solution"]):
        values.pop(other, None) if other != name else None
    values["solution"] = values[name] = min(right, key=len, default="")


def hashes_answer(solution: str) -> str:
    """Return what follows the last "####"; "" where it opened a Markdown heading."""
    final = solution.rsplit("####", 1)[1].strip() if "####" in solution else ""
    return "" if "\n" in final else final


def plain_text(value, name: str, *, number: bool = False) -> str:
    """Strip a text; None is empty. number: numbers become text. Raises BadRow for anything else."""
    if value is None:
        return ""
    if number and isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        if abs(value) == float("inf"):
            raise BadRow(f"{name} is infinite", "write it as text, \\infty")
        text = format(Decimal(str(value)), "f")  # 0.00001, not 1e-05
        text = text.rstrip("0").rstrip(".") if "." in text else text
        return "0" if text == "-0" else text
    if not isinstance(value, str):
        raise BadRow(f"{name} has the wrong type", f"{type(value).__name__} instead of text")
    if "\0" in value:
        raise BadRow("NUL character", f"remove it from {name}")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise BadRow("half of a surrogate pair", f"{name} was cut inside an emoji; write it again")
    return "" if blank(value) else value.strip()


def _from_columns(row: Columns, where: str) -> Example:
    if not any(c in row.values for c in COLUMNS["problem"]):
        raise _unknown_columns(row.row)
    name, value = row.take("problem")
    problem = plain_text(value, name)
    if not problem:
        raise BadRow("empty problem", "fill it in or delete the row")
    if name == "instruction" and _filled(more := row.values.get("input")):
        row.read.add("input")
        problem += "\n\n" + plain_text(more, "input")
    solution, answer = _solution_answer(row)
    name = next((n for n in THOUGHT_COLUMNS if _filled(row.values.get(n))), "")
    if name and solution and CLOSE not in solution:
        row.read.add(name)
        solution = f"{OPEN}\n{plain_text(row.values[name], name)}\n{CLOSE}\n\n{solution}"
    return Example(problem, solution, answer, _identity(row), where=where)


def _solution_answer(row: Columns, solution: str = "") -> tuple[str, str]:
    """Read solution, unless it is known, and answer off the columns."""
    if not solution:
        name, value = row.take("solution")
        solution = plain_text(value, name)
    name, value = row.take("answer")
    answers = [value] if value is not None else row.nested_answers()
    texts = [plain_text(v[0] if isinstance(v, list) and len(v) == 1 else v, name, number=True) for v in answers]
    worked = next((text for text in texts if is_worked(text)), "")
    if not solution and worked:
        solution, texts = worked, [text for text in texts if not is_worked(text)]
    answer = texts[0].rsplit("####", 1)[-1].strip() if texts else ""
    body, final = solution.rsplit("####", 1)[0].strip(), hashes_answer(solution)
    return (ANNOTATION.sub("", body).strip(), answer or final) if body and final else (solution, answer)


def is_worked(answer: str) -> bool:
    """Tell a worked solution from a final answer, which may be long LaTeX too."""
    words = len(WORD.findall(COMMAND.sub(" ", answer)))
    return "####" in answer or "\\boxed" in answer or words > 8 or "\n" in answer and words > 2


def _identity(row: Columns) -> str:
    name = row.values.get("id")
    return str(name).encode(errors="backslashreplace").decode() if isinstance(name, (str, int)) else ""


def _unknown_columns(row: dict) -> BadRow:
    accepted = [*COLUMNS["problem"], *CHATS]
    known = {c for names in COLUMNS.values() for c in names}
    near = {c: did_you_mean(c, accepted) for c in map(str, list(row)[:60]) if len(c) <= 60 and c not in known}
    nested = next((str(k)[:60] for k, v in row.items() if isinstance(v, dict) and set(v) & {*known, *accepted}), None)
    if nested is not None:
        hint = f"the row is nested: move the content of {nested!r} up"
    else:
        hint = ", ".join(c + said for c, said in near.items() if said) or \
            f"call the column with the problem one of {', '.join(accepted)}"
    names = ", ".join(str(name)[:60] for name in list(row)[:12]) or "none"
    return BadRow("no column with the problem", f"columns are {names}; {hint}")


# ---- chat rows

def _chat_messages(row: Columns) -> list[dict] | None:
    """Return the clean messages of a chat row; None when the row has another shape."""
    values = row.values
    name = next((n for n in CHATS if isinstance(values.get(n), list) or n == "messages" and _filled(values.get(n))), "")
    raw = values.get(name)
    if raw is None and isinstance(values.get("prompt"), list):
        name, done = "prompt", values.get("completion")
        row.read.add("completion")
        if not isinstance(done, list):
            done = [{"role": "assistant", "content": done}] if _filled(done) else []
        raw = [*values["prompt"], *done]
    if raw is None:
        return None
    row.read.add(name)
    if not isinstance(raw, list) or not raw:
        raise BadRow("malformed messages", 'write a list of {"role": ..., "content": ...}')
    messages: list[dict] = []
    for number, message in enumerate(raw, 1):
        messages.append(_message(message, number, messages[-1]["role"] if messages else "start"))
        row.inside += [f"{key} of messages" for key in message if _filled(message[key]) and key not in
                       ("role", "from", "content", "value", *(THOUGHTS if "reasoning_content" in messages[-1] else ()))]
    row.inside = list(dict.fromkeys(row.inside))
    return messages


def _message(message, number: int, last: str) -> dict:
    bad = "malformed messages"
    role, content = (next((message[k] for k in keys if k in message), None) if isinstance(message, dict) else None
                     for keys in (("role", "from"), ("content", "value")))
    if role is None or content is None:
        raise BadRow(bad, f"message {number} needs role and content")
    role = SPEAKERS.get(str(role).lower(), str(role).lower()) if role not in ROLES else role
    if role not in ROLES:
        raise BadRow(bad, f"message {number} has role {role[:60]!r}{did_you_mean(role[:60], ROLES)}; use "
                     f"{', '.join(ROLES)}")
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(p["text"] for p in content)  # the form with parts that hub data sets use
    text = plain_text(content, f"content of message {number}")
    if not text:
        raise BadRow(bad, f"message {number} is empty")
    if role not in {"start": ("system", "user"), "user": ("assistant",)}.get(last, ("user",)):
        raise BadRow(bad, f"message {number} is from {role} after {last}; system may come first, then user and "
                     "assistant take turns")
    thoughts = next((message[k] for k in THOUGHTS if _filled(message.get(k))), None) if role == "assistant" else None
    more = {} if thoughts is None else {"reasoning_content": plain_text(thoughts, f"thoughts of message {number}")}
    return {"role": role, "content": text, **more}


def _from_messages(row: Columns, messages: list[dict], where: str) -> Example:
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    users = [m["content"] for m in asked if m["role"] == "user"]
    if not users:
        raise BadRow("malformed messages", "no message from user")
    written = messages[-1]["content"] if asked is not messages else ""
    solution, answer = _solution_answer(row, written)
    if solution and not written:  # in a column of its own
        messages = [*messages, {"role": "assistant", "content": solution}]
    problem = users[0] if len(users) == 1 else "\n\n".join(f"{m['role']}: {m['content']}" for m in asked)
    return Example(problem, written or solution, answer, _identity(row), messages, where)
