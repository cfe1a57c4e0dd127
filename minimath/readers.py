"""Files to rows: jsonl, json, csv, tsv and parquet, one row at a time, each with the place it came from.

A row that can't be read comes out as a BadRow instead of an exception: data.py counts it and goes on.
Only what spoils the whole file (unreadable, UTF-16, not parquet) raises UserError.
"""
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from minimath.config import UserError

MAX_ROW_BYTES = 1_000_000  # longer is a broken file (a lost line end or quote), no problem with a solution
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")


class BadRow(NamedTuple):
    """Why a row was refused and what puts it right."""
    reason: str
    fix: str


Row = tuple[str, "dict | BadRow"]  # (file:line, row)
TOO_LONG = BadRow("row longer than 1 MB", "split it, or look for a missing line end or quote before it")
NUL = BadRow("NUL byte", "rewrite the file: it was damaged or is not text")


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a file with "file:line" (parquet: "file:row N" from 1). Raises UserError for a spoiled file."""
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv, ".tsv": _csv}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: unknown kind of file {path.suffix!r}; use one of {', '.join(SUFFIXES)}")
    try:
        with path.open("rb") as file:
            head = file.read(4)
        if path.suffix.lower() != ".parquet" and head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{path}: the file is UTF-16; save it as UTF-8")
        yield from readers[path.suffix.lower()](path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: can't be read ({reason}); check path and rights") from error


def _object(value) -> "dict | BadRow":
    if isinstance(value, dict):
        return value
    return BadRow(f"a JSON {type(value).__name__} instead of an object",
                  'write each row as {"problem": "...", "solution": "..."}')


def _utf8(raw: bytes) -> "str | BadRow":
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} is 0x{raw[error.start]:02x}"
        return BadRow("not UTF-8", f"{byte}; save the file as UTF-8")


def _jsonl(path: Path) -> Iterator[Row]:
    blank: list[int] = []  # blank lines at the end of a file are no rows; between rows they are reported
    with path.open("rb") as file:
        number, raw = 1, file.readline(MAX_ROW_BYTES + 1)
        while raw:
            too_long = len(raw) > MAX_ROW_BYTES
            while too_long and raw and not raw.endswith(b"\n"):
                raw = file.readline(MAX_ROW_BYTES)
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if not raw.strip() and not too_long:
                blank.append(number)
            else:
                for line in blank:
                    yield f"{path}:{line}", BadRow("empty row", "delete the blank line")
                blank.clear()
                yield f"{path}:{number}", TOO_LONG if too_long else _jsonl_row(raw)
            number, raw = number + 1, file.readline(MAX_ROW_BYTES + 1)


def _jsonl_row(raw: bytes) -> "dict | BadRow":
    if b"\0" in raw:
        return NUL
    text = _utf8(raw)
    if isinstance(text, BadRow):
        return text if raw.endswith(b"\n") else BadRow("truncated last line", "write the last row again")
    try:
        return _object(json.loads(text))
    except RecursionError:
        return BadRow("JSON nested too deep", "flatten the row")
    except ValueError as error:  # JSONDecodeError, and integers with thousands of digits
        if not raw.endswith(b"\n"):
            return BadRow("truncated last line", "write the last row again: the file ends inside it")
        return BadRow("not JSON", f"{error}; one complete object per line")


def _json(path: Path) -> Iterator[Row]:
    """A list of objects, or {"data": [...]}; elements are decoded one by one so that each has its line."""
    raw = path.read_bytes()
    text = _utf8(raw.removeprefix(b"\xef\xbb\xbf"))
    if isinstance(text, BadRow):
        raise UserError(f"{path}: {text.reason}; {text.fix}")
    start = re.match(r"\s*\[", text) or re.match(r'\s*\{\s*"data"\s*:\s*\[', text)
    if start is None:
        if re.match(r"\s*\{[^\n]*\}\s*(\n|$)", text):  # one object on line 1: really jsonl
            yield from _jsonl(path)
            return
        start = re.search(r'"data"\s*:\s*\[', text)
        if start is None:
            raise UserError(f'{path}: no list of rows; write [{{...}}], {{"data": [{{...}}]}} or .jsonl')
    position, line, counted = start.end(), 1, 0
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,]*")
    while True:
        position = gap.match(text, position).end()
        line, counted = line + text.count("\n", counted, position), position
        if text[position:position + 1] == "]":
            return
        where = f"{path}:{line}"
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:  # no way to find the next row after this
            cut = not text.rstrip().endswith(("]", "}"))
            reason = "truncated last row" if cut else "not JSON"
            yield where, BadRow(reason, f"{error}; rows after it are not read")
            return
        yield where, TOO_LONG if end - position > MAX_ROW_BYTES else _object(value)
        position = end


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(MAX_ROW_BYTES)
    # surrogateescape keeps bytes that are not UTF-8 until their row is known
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        header: list[str] | None = None
        while True:
            where = f"{path}:{reader.line_num + 1}"  # the first line of a row that spans several
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield where, BadRow("not CSV", f"{error}; check the quotes of this row")
                continue
            if header is None:
                header = [name.strip() for name in cells]
                continue
            row = _csv_row(header, cells)
            if row is not None:
                yield where, row


def _csv_row(header: list[str], cells: list[str]) -> "dict | BadRow | None":
    """None for a blank line: csv writers leave them at the end."""
    if not cells:
        return None
    text = "".join(cells)
    if "\0" in text:
        return NUL
    if any("\udc80" <= c <= "\udcff" for c in text):
        return BadRow("not UTF-8", "save the file as UTF-8")
    if len(text) > MAX_ROW_BYTES:
        return TOO_LONG
    if len(cells) != len(header):
        counts = f"{len(cells)} where the header has {len(header)}"
        return BadRow("wrong number of cells", f"{counts}; quote cells that hold commas")
    return dict(zip(header, cells))


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow  # comes with datasets; slow to import, so only where it is needed
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                size = sum(len(v) for v in row.values() if isinstance(v, (str, bytes)))
                yield f"{path}:row {number}", TOO_LONG if size > MAX_ROW_BYTES else row
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable parquet file ({reason}); write it again") from error
