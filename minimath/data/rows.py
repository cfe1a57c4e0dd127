"""Make an example of a row; README.md lists the shapes that are accepted."""
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

from minimath.core.text import did_you_mean
from minimath.data.readers import BadRow
from minimath.data.template import CLOSE, OPEN, with_thought
from minimath.grading.answer import extract_answer

COLUMNS = {
    "problem": ("problem", "question", "prompt", "instruction", "query", "input"),
    "solution": ("solution", "completion", "response", "output", "generation", "generations"),
    "answer": ("answer", "final_answer", "expected_answer", "ground_truth"),
}
BESIDE = {"instruction": ("{0}\n\n{1}", "input"), "question": ("{1} {0}", "body")}  # the other half of the problem
CHATS = ("messages", "conversations", "conversation")
NESTED = (("reward_model", "ground_truth"), ("extra_info", "answer"))  # verl's place of the answer
OURS = ("id", "tokens", "solve_rate")  # of the rows that minimath writes: nothing to learn from
MISSING = {"NULL", "Null", "null", "NaN", "nan", "NAN", "None", "N/A", "n/a", "NA", "<NA>", "#N/A"}  # as programs write
VERDICTS, WHOLE = ("correctness_math_verify", "correctness_llama"), ("is_reasoning_complete",)  # first there counts
FOLLOWS = {"system": ("start",), "user": ("start", "system", "assistant"), "assistant": ("user",)}  # role after role
BAD_CHAT = "malformed messages"
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


def blank(text: str) -> bool:
    """Tell whether a text has nothing but space, zero-width and control characters."""
    return all(c.isspace() or unicodedata.category(c) in ("Cf", "Cc") for c in text)


def _filled(value) -> bool:
    """Tell whether a cell holds anything: no NaN, no blank, no program's word for nothing."""
    if isinstance(value, str):
        return not (blank(value) or value.strip() in MISSING)
    return value is not None and value == value and value != [] and value != {}


class Columns:
    """The columns of a row by lower-case name, and which of them were read."""

    def __init__(self, row: dict | BadRow):
        """Take what a reader made of a row. Raises that if it is a BadRow."""
        if isinstance(row, BadRow):
            raise row
        self.row, self.read = row, set(OURS)
        self.values = {str(name).strip().lower(): value for name, value in row.items()}
        self.values |= {name: value for name, value in row.items() if name in self.values and _filled(value)}
        self.inside: dict[str, None] = {}  # fields of its messages that were not read, in order

    def take(self, names: tuple[str, ...], kind: type | None = None) -> tuple[str, object]:
        """Read the first column that holds something, or one of a kind; None: none does."""
        for name in names:
            value = self.values.get(name)
            if name not in self.read and (isinstance(value, kind) if kind else _filled(value)):
                self.read.add(name)
                return name, value
        return names[0], None

    def unread(self) -> list[str]:
        """Name the columns that hold something and that nobody asked for."""
        keys = {name: str(name).strip().lower() for name, value in self.row.items() if _filled(value)}
        return [str(name)[:60] for name, key in keys.items()
                if key not in self.read or self.values[key] is not self.row[name]] + list(self.inside)

    def missing(self, what: str, fix: str) -> BadRow:
        """Say that there is no solution or answer, and which columns could be meant."""
        said = [f"{name} is {value!r}, which is how programs write a missing one" for name in COLUMNS[what]
                if isinstance(value := self.values.get(name), str) and value.strip() in MISSING]
        said += [f"column {name} is not read{did_you_mean(name, COLUMNS[what])}" for name in self.unread()[:12]]
        return BadRow(f"no {what}", "; ".join([fix, *said]))


def to_example(row: Columns, where: str, need: Iterable[str]) -> Example:
    """Make an example of a row in any accepted shape. Raises BadRow."""
    _take_best_generation(row, "solution" in need)
    talk = _talk(row)
    example = Example("", messages=talk, where=where)
    example.problem = _asked(example.asked()) if talk else _problem(row)
    written = talk[-1]["content"] if talk and talk[-1]["role"] == "assistant" else ""
    solution, example.answer = _solution_answer(row, written)
    example.solution = written or solution
    if talk and solution and not written:  # in a column of its own
        talk.append({"role": "assistant", "content": solution})
    if isinstance(name := row.values.get("id"), (str, int)):
        example.id = str(name).encode(errors="backslashreplace").decode()
    if not example.answer and example.solution:
        example.answer = split_hashes(example.solution)[1] or extract_answer(example.solution, strict=True) or ""
    if "solution" in need and not example.solution:
        raise row.missing("solution", "add a worked solution (column solution, completion or messages)")
    if "solution" in need and example.solution.startswith(OPEN) and CLOSE not in example.solution:
        raise BadRow("thought never ends", f"the solution was cut before its {CLOSE}: drop the row, or end it")
    if "answer" in need and not example.answer:
        raise row.missing("answer", "add a column answer, or end the solution with \\boxed{...} or #### ...")
    return example


def _take_best_generation(row: Columns, needed: bool) -> None:
    """Put the shortest correct one of a list of generations in the place of the list."""
    name, texts = row.take(("generations", "generation"), list)
    if texts is None:
        return
    verdicts, whole = (row.take(columns, list)[1] for columns in (VERDICTS, WHOLE))
    marked = zip(texts, *(marks for marks in (verdicts, whole) if marks is not None))
    right = [text for text, *marks in marked if isinstance(text, str) and all(marks) and verdicts is not None]
    if needed and verdicts is None:
        raise BadRow(f"{name} without verdicts", f"add {VERDICTS[0]}, a list of true and false, or keep one; minimath "
                     "sample checks answers and keeps the shortest right solution")
    if needed and not right:
        raise BadRow("no right generation", f"none of {len(texts)} is right and whole: drop it, or sample more")
    for other in {"messages", *COLUMNS["solution"]} - {name}:
        row.values.pop(other, None)
    row.values["solution"] = min(right, key=len, default="")
    if not right:
        row.values[name] = None  # it counts as not read


def split_hashes(solution: str) -> tuple[str, str]:
    """Split off what follows the last "####"; "" where it opened a Markdown heading."""
    body, _, final = solution.rpartition("####")
    body, final = body.strip(), final.strip()
    return (body, final) if "####" in solution and final and "\n" not in final else (solution, "")


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


def _problem(row: Columns) -> str:
    if not any(c in row.values for c in COLUMNS["problem"]):
        raise _unknown_columns(row.row)
    name, value = row.take(COLUMNS["problem"])
    if not (problem := plain_text(value, name)):
        raise BadRow("empty problem", "fill it in or delete the row")
    form, beside = BESIDE.get(name, ("", ""))
    _, more = row.take((beside,))
    return problem if more is None else form.format(problem, plain_text(more, beside))


def _solution_answer(row: Columns, written: str) -> tuple[str, str]:
    """Read solution, unless a message has it, and answer off the columns."""
    solution = written or plain_text(*row.take(COLUMNS["solution"])[::-1])
    name, value = row.take(COLUMNS["answer"])
    answers = {name: value} if value is not None else {
        outer: found for outer, inner in NESTED
        if isinstance(cell := row.values.get(outer), dict) and _filled(found := cell.get(inner))}
    row.read |= answers.keys()
    texts = [plain_text(each[0] if isinstance(each, list) and len(each) == 1 else each, name, number=True)
             for each in answers.values()]
    worked = next((text for text in texts if is_worked(text)), "")
    if not solution and worked:
        solution, texts = worked, [text for text in texts if not is_worked(text)]
    answer = texts[0].rsplit("####", 1)[-1].strip() if texts else ""
    body, final = split_hashes(solution)
    if body and final:
        solution, answer = ANNOTATION.sub("", body).strip(), answer or final
    if solution and not written and CLOSE not in solution:
        name, thoughts = row.take(THOUGHT_COLUMNS)
        solution = solution if thoughts is None else with_thought(plain_text(thoughts, name), solution)
    return solution, answer


def is_worked(answer: str) -> bool:
    """Tell a worked solution from a final answer, which may be long LaTeX too."""
    words = len(WORD.findall(COMMAND.sub(" ", answer)))
    return "####" in answer or "\\boxed" in answer or words > 8 or "\n" in answer and words > 2


def _unknown_columns(row: dict) -> BadRow:
    accepted = [*COLUMNS["problem"], *CHATS]
    known, names = {*accepted, *sum(COLUMNS.values(), ())}, [str(name)[:60] for name in list(row)[:12]]
    near = [name + said for name in names if name not in known and (said := did_you_mean(name, accepted))]
    hint = ", ".join(near) or f"call the column with the problem one of {', '.join(accepted)}"
    for name, value in row.items():
        if isinstance(value, dict) and known & value.keys():
            hint = f"the row is nested: move the content of {str(name)[:60]!r} up"
    return BadRow("no column with the problem", f"columns are {', '.join(names) or 'none'}; {hint}")


# ---- chat rows

def _talk(row: Columns) -> list[dict] | None:
    """Return the clean messages of a chat row; None when the row has another shape."""
    raw = row.take(CHATS, list)[1]
    raw = row.take(CHATS[:1])[1] if raw is None else raw
    if raw is None and (prompt := row.take(("prompt",), list)[1]) is not None:
        done = row.take(("completion",))[1]
        raw = prompt + (done if isinstance(done, list) else [] if done is None else
                        [{"role": "assistant", "content": done}])
    if raw is None:
        return None
    if not isinstance(raw, list) or not raw:
        raise BadRow(BAD_CHAT, 'write a list of {"role": ..., "content": ...}')
    talk: list[dict] = []
    for number, message in enumerate(raw, 1):
        talk.append(_message(message, number, talk[-1]["role"] if talk else "start"))
        read = {"role", "from", "content", "value", *(THOUGHTS if "reasoning_content" in talk[-1] else ())}
        row.inside |= {f"{key} of messages": None for key in message if _filled(message[key]) and key not in read}
    return talk


def _message(message, number: int, last: str) -> dict:
    message = message if isinstance(message, dict) else {}
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if role is None or content is None:
        raise BadRow(BAD_CHAT, f"message {number} needs role and content")
    role = SPEAKERS.get(role := str(role).lower(), role)
    if role not in FOLLOWS:
        raise BadRow(BAD_CHAT, f"message {number} has role {role[:60]!r}{did_you_mean(role[:60], FOLLOWS)}; use "
                     f"{', '.join(FOLLOWS)}")
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(p["text"] for p in content)  # the form with parts that hub data sets use
    clean = {"role": role, "content": plain_text(content, f"content of message {number}")}
    if not clean["content"]:
        raise BadRow(BAD_CHAT, f"message {number} is empty")
    if last not in FOLLOWS[role]:
        raise BadRow(BAD_CHAT, f"message {number} is from {role} after {last}; system may come first, then user and "
                     "assistant take turns")
    thoughts = [message[key] for key in THOUGHTS if _filled(message.get(key))]
    if thoughts and role == "assistant":
        clean["reasoning_content"] = plain_text(thoughts[0], f"thoughts of message {number}")
    return clean


def _asked(talk: list[dict]) -> str:
    """Write what messages ask as one text: the only question, or all turns."""
    users = [m["content"] for m in talk if m["role"] == "user"]
    if not users:
        raise BadRow(BAD_CHAT, "no message from user")
    return users[0] if len(users) == 1 else "\n\n".join(f"{m['role']}: {m['content']}" for m in talk)
