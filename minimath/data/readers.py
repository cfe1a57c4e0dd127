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

from minimath.core.errors import UserError

MAX_ROW_BYTES = 1_000_000  # longer is a broken file (a lost line end or quote), no problem with a solution
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
BOM = b"\xef\xbb\xbf"


class BadRow(NamedTuple):
    """Why a row was refused and what puts it right."""
    reason: str
    fix: str


Row = tuple[str, "dict | BadRow"]  # (file:line, row)
TOO_LONG = BadRow("row longer than 1 MB", "split it, or look for a missing line end or quote before it")
NUL = BadRow("NUL byte", "rewrite the file: it was damaged or is not text")
NOT_UTF8 = BadRow("not UTF-8", "save the file as UTF-8")
EMPTY = BadRow("empty row", "delete the blank line")
ESCAPED = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte that is not UTF-8


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
            raw = raw.removeprefix(BOM)  # on any line: files are often joined
            if not raw.strip() and not too_long:
                blank.append(number)
            else:
                for line in blank:
                    yield f"{path}:{line}", EMPTY
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
    text = path.read_bytes().removeprefix(BOM).decode("utf-8", "surrogateescape")
    start = re.match(r"\s*\[", text) or re.match(r'\s*\{\s*"data"\s*:\s*\[', text)
    if start is None:
        if re.match(r"\s*\{[^\n]*\}\s*(\n|$)", text):  # one object on line 1: really jsonl
            yield from _jsonl(path)
            return
        start = re.search(r'"data"\s*:\s*\[', text)
        if start is None:
            raise UserError(f'{path}: no list of rows; write [{{...}}], {{"data": [{{...}}]}} or .jsonl')
    position, line, counted, gap = start.end(), 1, 0, re.compile(r"[\s,]*")
    while True:
        position = gap.match(text, position).end()
        line, counted = line + text.count("\n", counted, position), position
        if text[position:position + 1] == "]":
            return
        row, end = _json_row(text, position)
        yield f"{path}:{line}", row
        if end is None:
            return
        position = end


def _json_row(text: str, position: int) -> "tuple[dict | BadRow, int | None]":
    """The element at position, and where it ends; None when what follows can't be found."""
    try:
        # to find the end only: it takes control characters in strings, and integers of any length
        _, end = json.JSONDecoder(strict=False, parse_int=str).raw_decode(text, position)
    except (ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        bad = BadRow("JSON nested too deep", "flatten the row") if deep else BadRow("not JSON", str(error))
        # A line as far in as this one begins the next row (strings have no line ends); one at the margin may be a
        # part of this row, unless it opens an object
        indent = re.compile(r"[^\S\n]*").match(text, text.rfind("\n", 0, position) + 1).group()
        opening = r"[^\s\]}]" if indent else r"\{"
        following = re.compile(rf"\n{indent}{opening}").search(text, position)
        if following:
            return bad, following.start()
        left = len(text) - getattr(error, "pos", 0)
        if str(error).startswith("Unterminated string") or left <= len('"\\u12'):
            return BadRow("truncated last row", f"{error}; the file ends inside the list"), None
        return bad._replace(fix=f"{bad.fix}; rows after it are not read"), None
    raw = text[position:end]
    if len(raw) > MAX_ROW_BYTES:
        return TOO_LONG, end
    if ESCAPED.search(raw):
        return NOT_UTF8, end
    if "\0" in raw:
        return NUL, end
    try:
        return _object(json.loads(raw)), end
    except ValueError as error:
        return BadRow("not JSON", str(error)), end


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(MAX_ROW_BYTES)
    # surrogateescape keeps bytes that are not UTF-8 until their row is known
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        header: list[str] | None = None
        blank: list[str] = []  # as in _jsonl: only between rows
        while True:
            where = f"{path}:{reader.line_num + 1}"  # the first line of a row that spans several
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                cells = _csv_error(str(error))
            if header is None and isinstance(cells, BadRow):
                raise UserError(f"{where}: the header is {cells.reason}; {cells.fix}")
            if not cells:
                blank += [where] if header else []
            elif header is None:
                header = [name.strip() for name in cells]
            else:
                yield from ((place, EMPTY) for place in blank)
                blank.clear()
                yield where, cells if isinstance(cells, BadRow) else _csv_row(header, cells)


def _csv_error(error: str) -> BadRow:
    if "field larger" in error:
        return TOO_LONG
    if "NUL" in error:  # Python 3.10 refuses it here
        return NUL
    if "unexpected end" in error:
        return BadRow("quote not closed", "close it, or write the last row again: the file ends inside a cell")
    return BadRow("not CSV", f"{error}; check the quotes of this row")


def _csv_row(header: list[str], cells: list[str]) -> "dict | BadRow":
    text = "".join(cells)
    if "\0" in text:
        return NUL
    if ESCAPED.search(text):
        return NOT_UTF8
    if len(text) > MAX_ROW_BYTES:
        return TOO_LONG
    if len(cells) != len(header):
        counts = f"{len(cells)} where the header has {len(header)}"
        return BadRow("wrong number of cells", f"{counts}; quote cells that hold commas")
    return dict(zip(header, cells))


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow  # comes with datasets; slow to import, so only where it is needed
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: parquet needs a package that isn't installed: pip install pyarrow, or write the rows "
                        "as jsonl") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=256):
            for row in _batch_rows(batch):
                number += 1
                yield f"{path}:row {number}", row
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable parquet file ({reason}); write it again") from error


def _batch_rows(batch) -> "list[dict | BadRow]":
    """The rows of an Arrow batch. It keeps text as bytes, which other writers need not have checked."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError) as error:  # bytes that are not UTF-8, a time that Python has no type for
        if batch.num_rows > 1:
            return [row for i in range(batch.num_rows) for row in _batch_rows(batch.slice(i, 1))]
        return [NOT_UTF8 if isinstance(error, UnicodeDecodeError) else BadRow("value can't be read", str(error))]
    return [row if _size(row) <= MAX_ROW_BYTES else TOO_LONG for row in rows]


def _size(value) -> int:
    """Characters and bytes in a row, nested ones too."""
    if isinstance(value, (str, bytes)):
        return len(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(_size, parts))
