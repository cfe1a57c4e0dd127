"""Bad rows of every kind in every kind of file: counted by reason, placed, and the good rows around them unchanged."""
import contextlib
import io
import json
import random
from pathlib import Path
from typing import NamedTuple

import fuzz_rows
from harness import Tally
from tiny import tiny_tokenizer, write_tiny
from toy import make_config

from minimath.config.schema import DataOptions, SFTConfig
from minimath.core.errors import UserError
from minimath.data.chat import control_tokens as tokens_of_control
from minimath.data.chat import encode, turn_end
from minimath.data.examples import load_examples
from minimath.train.sft import sft

COLUMNS = ("id", "problem", "solution", "answer")
ROWS = 12  # good ones in a file
LONG = 10_000_000
ABSURD = ("Z\u0351\u036b\u0343a\u0489\u0300lgo", "\u202eright to left\u202c", "\ufdfd\U00012031\ufdd0\uffff",
          "a\u200bb", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "e" + "\u0301" * 500, "\ue000\U0010ffff",
          "\x1b[2J\x07", "\u2028\x85")
CONTROL = "2<|im_end|>\n<|im_start|>assistant\n<|endoftext|><pad>3"


class Kind(NamedTuple):
    """A bad row as a line of jsonl (and an element of json), a line of csv, a parquet row; None where it can't be.
    Without a reason it is a row to keep. need: what a row must have."""
    name: str
    reason: str
    line: bytes | None = None
    cells: bytes | None = None
    row: dict | None = None
    in_list: bool = True
    need: tuple[str, ...] = ("solution",)


def row(**fields) -> dict:
    return {"id": "bad", "problem": "What is 1 + 1?", "solution": "1 + 1 = 2.", "answer": "2"} | fields


def kind(name: str, reason: str, *, csv: bool = True, parquet: bool = True, need=("solution",), **fields) -> Kind:
    """The kind whose row is a good one with other `fields`, in every format that can hold it."""
    whole = row(**fields)
    cells = ",".join('"' + str(whole[c] or "").replace('"', '""') + '"' for c in COLUMNS).encode(errors="surrogatepass")
    return Kind(name, reason, json.dumps(whole).encode(), cells if csv else None, whole if parquet else None, need=need)


def line(name: str, reason: str, raw: bytes, **options) -> Kind:
    return Kind(name, reason, raw, **options)


def chat(*messages) -> bytes:
    return json.dumps({"messages": list(messages)}).encode()


USER, ASSISTANT = {"role": "user", "content": "p"}, {"role": "assistant", "content": "s"}
KINDS = [
    Kind("empty line", "empty row", b"", b"", in_list=False),
    line("blank line", "empty row", b" \t ", in_list=False),
    kind("empty problem", "empty problem", problem=" \n "),
    kind("no visible character", "empty problem", problem="\u200b\ufeff \u2060"),
    kind("null problem", "empty problem", problem=None),
    kind("empty solution", "no solution", solution="", answer=None),
    kind("null solution", "no solution", solution=None, answer=None),
    kind("missing answer", "no answer", solution="it is two", answer=None, need=("solution", "answer")),
    kind("NaN for an answer", "no answer", solution="so", answer=float("nan"), csv=False, parquet=False,
         need=("answer",)),
    kind("infinite answer", "answer is infinite", answer=float("inf"), csv=False, parquet=False),
    kind("number as problem", "problem has the wrong type", problem=7, csv=False, parquet=False),
    kind("list as solution", "solution has the wrong type", solution=["2"], csv=False, parquet=False),
    kind("object as answer", "answer has the wrong type", answer={"value": 2}, csv=False, parquet=False),
    Kind("not UTF-8", "not UTF-8", b'{"problem": "caf\xe9", "solution": "s"}', b"bad,caf\xe9,s,1",
         row(problem=b"caf\xe9")),
    Kind("a byte of UTF-16", "not UTF-8", b'{"problem": "\xff\xfep", "solution": "s"}', b"bad,\xff\xfep,s,1",
         row(solution=b"\xff\xfes")),
    kind("10 MB string", "row longer than 1 MB", problem="9" * LONG),
    line("10 MB deep in a list", "row longer than 1 MB", chat(USER, {"role": "assistant", "content": "9" * LONG})),
    Kind("NUL byte", "NUL byte", b'{"problem": "a\0b", "solution": "s"}', b"bad,a\0b,s,1"),
    kind("NUL character", "NUL character", problem="a\0b", csv=False),
    kind("half an emoji", "half of a surrogate pair", problem="a\ud83d", csv=False, parquet=False),
    line("no JSON", "not JSON", b"{oops}"),
    line("a lost quote", "not JSON", b'{"problem": "p, "solution": "s"}'),
    line("a control character", "not JSON", b'{"problem": "a\tb", "solution": "s"}'),
    line("5,000 digits", "not JSON", b'{"problem": "p", "answer": ' + b"9" * 5000 + b"}"),
    line("text after a row", "not JSON", b'oops"p": {}}'),
    kind("an id of half an emoji", "", id="\ud83d\xa0", csv=False, parquet=False),
    line("a text", "a JSON str instead of an object", b'"just text"'),
    line("a list", "a JSON list instead of an object", b'["problem", "solution"]'),
    line("100,000 brackets", "JSON nested too deep", b'{"problem": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    line("nested row", "no column with the problem", json.dumps({"data": row()}).encode()),
    line("other columns", "no column with the problem", b'{"text": "p", "label": "s"}'),
    line("misspelt column", "no column with the problem", b'{"problme": "p", "solution": "s"}'),
    line("50,000 columns", "no column with the problem",
         json.dumps({f"c{n}": n for n in range(50_000)}).encode()),
    line("a column named by half an emoji", "no column with the problem", b'{"\\ud83d\\u0000": 1}'),
    line("messages without role", "malformed messages", chat({"content": "p"}, ASSISTANT)),
    line("unknown role", "malformed messages", chat({"role": "narrator", "content": "p"}, ASSISTANT)),
    line("two users in turn", "malformed messages", chat(USER, USER, ASSISTANT)),
    line("messages as text", "malformed messages", json.dumps({"messages": "user: p"}).encode()),
    line("an image as content", "content of message 1 has the wrong type",
         chat({"role": "user", "content": [{"type": "image", "text": None}]}, ASSISTANT)),
    Kind("one cell", "wrong number of cells", cells=b"only one cell"),
    Kind("a comma without quotes", "wrong number of cells", cells=b"bad,1,200 + 1?,s,1"),
    Kind("text after a quote", "quote in the middle of a cell", cells=b'bad,"p" and,s,1'),
    *(kind(f"absurd unicode {n}", "", problem=f"p {text} p") for n, text in enumerate(ABSURD)),
    kind("special tokens in the text", "", problem=CONTROL, solution=CONTROL),
    kind("a repeated id", "", id="good-1"),
    line("a byte order mark", "", b"\xef\xbb\xbf" + json.dumps(row()).encode(), in_list=False),
]


def run(full: bool, folder: Path) -> list[Tally]:
    fuzz_tally = fuzz_rows.run(10_000 if full else 300, folder)
    return [*(files_of(name, write, 6 if full else 1, folder) for name, write in FORMATS.items()),
            cut_files(1 if full else 25, folder), whole_files(folder), control_tokens(), *fuzz_tally, trained(folder)]


def load(path: Path, need=("solution",), strict: bool = False):
    return load_examples(DataOptions(source=str(path), strict=strict), need=need)


def good_rows(rng) -> list[dict]:
    signs = ("", "caf\u00e9", "\u221a", "\U0001f600")
    return [{"id": f"good-{n}", "problem": f"{n} + {rng.randint(1, 99)}? {rng.choice(signs)}", "answer": str(n),
             "solution": f"line one\nso \\boxed{{{n}}}, \"{n}\""} for n in range(ROWS)]


# ---- files of good rows with bad ones in known places; each writer returns the place of every row, None: not possible

def write_jsonl(path: Path, rows: list) -> list[str]:
    path.write_bytes(b"".join((r.line if isinstance(r, Kind) else json.dumps(r, ensure_ascii=False).encode()) + b"\n"
                              for r in rows))
    return [f"{path}:{n}" for n in range(1, len(rows) + 1)]


def write_json(path: Path, rows: list) -> list[str]:
    lines = [r.line if isinstance(r, Kind) else json.dumps(r, ensure_ascii=False).encode() for r in rows]
    path.write_bytes(b"[\n  " + b",\n  ".join(lines) + b"\n]\n")
    return [f"{path}:row {n}" for n in range(1, len(rows) + 1)]


def write_csv(path: Path, rows: list) -> list[str]:
    path.write_bytes(b"id,problem,solution,answer\r\n" + b"".join(
        (r.cells if isinstance(r, Kind) else kind("", "", **r).cells) + b"\r\n" for r in rows))
    return [f"{path}:row {n}" for n in range(1, len(rows) + 1)]


def write_parquet(path: Path, rows: list) -> list[str]:
    import pyarrow
    import pyarrow.parquet
    rows = [r.row if isinstance(r, Kind) else r for r in rows]
    texts = {c: [r[c].encode() if isinstance(r[c], str) else r[c] for r in rows] for c in COLUMNS}
    table = {c: pyarrow.array(texts[c], pyarrow.binary()).view(pyarrow.utf8()) for c in COLUMNS}  # unchecked
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    return [f"{path}:row {n}" for n in range(1, len(rows) + 1)]


FORMATS = {"jsonl": write_jsonl, "json": write_json, "csv": write_csv, "parquet": write_parquet}


def possible(k: Kind, name: str) -> bool:
    in_list = k.line if k.in_list and is_json(k.line) else None
    held = {"jsonl": k.line, "json": in_list, "csv": k.cells, "parquet": k.row}
    return held[name] is not None


def is_json(line: bytes | None) -> bool:
    """Whether a list can hold the line: a damaged one spoils a json file as a whole."""
    try:
        return line is not None and json.loads(line.decode()) is not None
    except (ValueError, RecursionError):
        return False


def files_of(name: str, write, times: int, folder: Path) -> Tally:
    """Each kind that the format can hold, twice per file at seeded places, and all of them in one file."""
    tally, rng, path = Tally(f"bad rows in {name}"), random.Random(name), folder / f"rows.{name}"
    kinds = [k for k in KINDS if possible(k, name)]
    sets = [[k, k] for k in kinds for _ in range(times)]
    sets += [rng.sample(same, len(same)) for same in
             ([k for k in kinds if k.need == ("solution",)],) for _ in range(times)]
    for bad in sets:
        rows = good = good_rows(rng)
        for k in bad:
            rows = [*rows[:(at := rng.randrange(len(rows)))], k, *rows[at:]]  # never last: blank lines there are none
        tally.add(*outcome(write(path, rows), path, rows, good, bad))
    return tally


def outcome(places: list[str], path: Path, rows: list, good: list[dict], bad: list[Kind]) -> tuple[bool, str]:
    """Whether a load takes exactly the rows to keep, unchanged, and names, counts and (strict) stops at the others."""
    need, names = bad[0].need, ", ".join(sorted({k.name for k in bad}))
    wrong = [(place, r.reason) for place, r in zip(places, rows) if isinstance(r, Kind) and r.reason]
    counts = {reason: sum(r == reason for _, r in wrong) for _, reason in wrong}
    examples, report = load(path, need)
    mine = [(e.id, e.problem, e.solution, e.answer, e.where) for e in examples
            if e.id.startswith("good") and e.problem != row()["problem"]]
    want = [(r["id"], r["problem"].strip(), r["solution"], r["answer"], place)
            for place, r in zip(places, rows) if not isinstance(r, Kind)]
    if mine != want:
        return False, f"{path.suffix}, {names}: good rows changed or lost, {len(mine)} of {len(want)}"
    if any(not "".join([e.id, e.problem, e.solution, e.answer]).encode() for e in examples):  # else no log can hold it
        return False, f"{path.suffix}, {names}: no UTF-8"
    if report.skipped != counts or report.kept != len(rows) - len(wrong):
        return False, f"{path.suffix}, {names}: {report.kept} kept, {report.skipped}; expected {counts}"
    if [shown.split("; ")[0] for shown in report.rows] != [f"{place}: {reason}" for place, reason in wrong][:20]:
        return False, f"{path.suffix}, {names}: reported {[shown[-80:] for shown in report.rows[:2]]}"
    return strict_stops(path, need, wrong[0] if wrong else None), f"{path.suffix}, {names}: strict=true"


def strict_stops(path: Path, need, first: tuple[str, str] | None) -> bool:
    try:
        load(path, need, strict=True)
        return first is None
    except UserError as error:
        return first is not None and str(error).startswith(f"{first[0]}: {first[1]}; ")


# ---- whole files

def cut_files(step: int, folder: Path) -> Tally:
    """Files cut at every byte (every `step`th): of jsonl all whole rows are there and the cut one is counted; a json
    list is one clear error."""
    tally, lines, array = Tally("bad rows: a file cut at any byte"), folder / "cut.jsonl", folder / "cut.json"
    rows = [json.dumps(r, ensure_ascii=False).encode() for r in good_rows(random.Random(5))[:4]]
    raw = b"\n".join(rows)
    ends = [len(b"\n".join(rows[:n])) for n in range(1, len(rows) + 1)]
    for cut in range(ends[0], ends[-1], step):
        lines.write_bytes(raw[:cut])
        whole = sum(end <= cut for end in ends)
        examples, report = load(lines)
        want = {} if cut in [end + n for end in ends for n in range(2)] else {"truncated last line": 1}
        tally.add(len(examples) == whole and report.skipped == want,
                  f"jsonl cut at {cut}: {len(examples)} of {whole} rows, {report.skipped}")
        array.write_bytes((b"[" + raw.replace(b"\n", b", "))[:cut])
        tally.add(refused(array), f"json cut at {cut}: no clear error")
    return tally


def whole_files(folder: Path) -> Tally:
    """What is accepted of a whole file (line ends, byte order marks), and what is one clear error."""
    tally, good = Tally("bad rows: line ends, byte order marks, other encodings"), good_rows(random.Random(6))
    for name, write in FORMATS.items():
        path = folder / f"whole.{name}"
        write(path, good)
        raw = path.read_bytes()
        lf = raw.replace(b"\r\n", b"\n")
        forms = {"CRLF": lf.replace(b"\n", b"\r\n"), "BOM": b"\xef\xbb\xbf" + raw, "no end": raw.rstrip(),
                 "both": b"\xef\xbb\xbf" + lf.replace(b"\n", b"\r\n"), "blank end": raw + b"\n\r\n\n"}
        for form, changed in forms.items() if name != "parquet" else ():
            path.write_bytes(changed)
            examples, report = load(path, strict=True)
            same = [(e.id, e.problem, e.solution.replace("\r", "")) for e in examples] == [
                (r["id"], r["problem"].strip(), r["solution"]) for r in good]
            tally.add(same and not report.skipped, f"{name}, {form}: {report}")
        for form, changed in {"empty": b"", "UTF-16": b"\xff\xfe" + lf.decode("utf-8", "replace").encode("utf-16-le"),
                              "UTF-16 without mark": lf.decode("utf-8", "replace").encode("utf-16-le"),
                              "cut in half": raw[:len(raw) // 2] if name == "parquet" else b"\x89PNG\r\n\0"}.items():
            path.write_bytes(changed)
            tally.add(refused(path), f"{name}, {form}: no clear error")
    return tally


def refused(path: Path) -> bool:
    """Whether the file is one UserError that names it and can be printed."""
    try:
        load(path)
    except UserError as error:
        return str(path) in str(error) and bool(str(error).encode())
    return False


# ---- through chat template and training

def control_tokens() -> Tally:
    """No text of a row becomes a control token: whole, spliced, at borders, in each column and in messages."""
    tally, tokenizer, rng = Tally("bad rows: special tokens in texts"), tiny_tokenizer(), random.Random(7)
    names = list(tokens_of_control(tokenizer))
    plain = special_count(tokenizer, encoded(tokenizer, "p", "s"))
    for _ in range(100):
        text = "".join(rng.choices([*names, "a", "<", ">", "|", "im_end", "\n", " ", "<|"], k=rng.randint(1, 12)))
        spliced = text[:(at := rng.randrange(len(text) + 1))] + rng.choice(names) + text[at:]
        got = encoded(tokenizer, spliced, text + spliced)
        tally.add(special_count(tokenizer, got) == plain and got.ids[-1] == turn_end(tokenizer)
                  and got.ids.count(turn_end(tokenizer)) == 2, repr(spliced))
    return tally


def encoded(tokenizer, problem: str, solution: str, *, max_len: int = 100_000):
    from minimath.data.examples import Example
    return encode(tokenizer, Example(problem, solution), prompt_template="{problem}", max_len=max_len)


def special_count(tokenizer, encoded_row) -> int:
    return sum(i in {n for n, _ in tokens_of_control(tokenizer).values()} for i in encoded_row.ids)


def trained(folder: Path) -> Tally:
    """`minimath sft` on a file with every kind of bad row, and one that max_len masks wholly, trains on the rest."""
    tally, rng, path = Tally("bad rows: sft trains on the good ones"), random.Random(8), folder / "train.jsonl"
    kinds = [k for k in KINDS if k.line is not None and k.need == ("solution",)]
    long = {"id": "long", "problem": "word " * 4000, "solution": "s"}
    rows = [*rng.sample(kinds, len(kinds)), long, *good_rows(rng)]
    write_jsonl(path, rows)
    bad = [k for k in kinds if k.reason]
    said = io.StringIO()
    cfg = make_config(SFTConfig, str(write_tiny(folder / "tiny")), data=str(path), out=str(folder / "run"), steps=2,
                      batch_size=8, max_len=1500, lora_r=4, save_every=0)
    with contextlib.redirect_stdout(said):
        summary = sft(cfg)
    said = said.getvalue()
    tally.add(summary["steps"] == 2, f"{summary['steps']} steps of 2")
    for words in (f"{len(rows) - len(bad)} rows kept, {len(bad)} skipped", f"{len(rows) - len(bad)} rows, ",
                  "1 x repeated id", "1 of them to nothing trained",
                  *(f"{sum(k.reason == reason for k in bad)} x {reason}" for reason in {k.reason for k in bad})):
        tally.add(words in said, f"the log does not say {words!r}")
    return tally
