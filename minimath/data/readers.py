"""Yield the rows of files, folders, hub data sets and lists, each with its place.

A row that can't be read comes out as a BadRow instead of an exception: load_examples counts it and goes on. Only what
spoils the whole file (unreadable, UTF-16, cut JSON list, not parquet) raises UserError. jsonl, where a line can be
damaged and the others are not, is read here; pyarrow, which comes with datasets, reads csv and parquet.
"""
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from minimath.core.errors import UserError
from minimath.core.text import did_you_mean

MAX_ROW_BYTES = 1_000_000  # longer is a broken file (a lost line end or quote), no problem with a solution
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
BOM = b"\xef\xbb\xbf"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/\w[\w.-]*(:\w[\w.-]*)?")


class BadRow(NamedTuple):
    """Why a row was refused and what puts it right."""
    reason: str
    fix: str


Row = tuple[str, "dict | BadRow"]  # (place, row)
TOO_LONG = BadRow("row longer than 1 MB", "split it, or look for a missing line end or quote before it")
NUL = BadRow("NUL byte", "rewrite the file: it was damaged or is not text")
NOT_UTF8 = BadRow("not UTF-8", "save the file as UTF-8")
EMPTY = BadRow("empty row", "delete the blank line")
END = "minimath-end-of-file"  # follows the last row of a csv file: a quote that is not closed swallows it
DAMAGED = "minimath-damaged-byte"  # stands for a byte that is not UTF-8
ESCAPED = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of such a byte
LAST = BadRow("end", "")
OPEN_QUOTE = BadRow("quote not closed", "close it, or write the last row again: the file ends inside a cell")


def rows_of(source: str | list, split: str) -> Iterator[Row]:
    """Yield the rows of a list, a file, a folder of files, or a hub data set.

    A hub data set is "owner/name" or "owner/name:config". split: of a hub data set; of a folder, the files with it in
    their name, if any. Raises UserError when nothing is there, or a file is spoiled.
    """
    if isinstance(source, list):
        yield from ((f"row {number}", row if isinstance(row, BadRow) else _object(row, ""))
                    for number, row in enumerate(source, 1))
        return
    path = Path(source).expanduser()
    if not source:
        raise UserError("no data given; set data= to a file, a folder or a data set name owner/name")
    if os.path.isdir(path):  # unlike is_dir, also for a name that is too long
        files = sorted(f for f in path.iterdir() if f.is_file() and f.suffix.lower() in SUFFIXES)
        files = [f for f in files if split in re.split(r"[^a-z0-9]+", f.stem.lower())] or files
        if not files:
            raise UserError(f"{path}: no data files in this folder; expected {', '.join(SUFFIXES)}")
        for file in files:
            yield from read_rows(file)
    elif os.path.exists(path):
        yield from read_rows(path)
    elif HUB_NAME.fullmatch(source) and path.suffix.lower() not in SUFFIXES and not os.path.isdir(path.parent):
        yield from _hub_rows(source, split)
    else:
        raise UserError(_missing(source, path))


def _missing(source: str, path: Path) -> str:
    folder = path.parent
    while not os.path.isdir(folder):
        folder, path = folder.parent, folder  # the first part of the path that does not exist
    there = sorted(p.name for p in folder.iterdir() if p.is_dir() or p.suffix.lower() in SUFFIXES)
    near = did_you_mean(path.name, there)
    listing = f"; {folder} has {', '.join(there[:8])}" if there and not near else ""
    return f"data={source}: {path} does not exist{near}{listing}"


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    try:
        import datasets  # seconds to import: only when a hub name is given
    except ImportError:
        raise UserError(f"data={name}: hub data sets need a package that isn't installed: pip install datasets, or "
                        "download the set's files and give their folder") from None
    repo, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(repo, config or None, split=split)
    except Exception as error:  # hub, network, disk and format errors share no other base
        text = " ".join(str(error).split())[:300]
        raise UserError(f"data={name}: is no file here, and as a hub data set (split {split!r}) it can't be "
                        f"loaded: {type(error).__name__}: {text}. Check the name and the network") from error
    for number, row in enumerate(rows, 1):
        yield f"{name}:{split}:row {number}", row


# ---- files

def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file, each with its place.

    That is "file:line" in jsonl and "file:row N", from 1, elsewhere. Raises UserError for a spoiled file.
    """
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv, ".tsv": _csv}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise UserError(f"{path}: unknown kind of file {path.suffix!r}; use one of {', '.join(SUFFIXES)}")
    try:
        with path.open("rb") as file:
            head = file.read(4)
        if suffix != ".parquet" and head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{path}: the file is UTF-16; save it as UTF-8")
        yield from readers[suffix](path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: can't be read ({reason}); check path and rights") from error


def _object(value, kind: str = "a JSON ") -> "dict | BadRow":
    if isinstance(value, dict):
        return value if _size(value) <= MAX_ROW_BYTES else TOO_LONG
    return BadRow(f"{kind}{type(value).__name__} instead of an object",
                  'write each row as {"problem": "...", "solution": "..."}')


def _size(value) -> int:
    """Count the characters and bytes in a row, nested ones too."""
    if isinstance(value, (str, bytes)):
        return len(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(_size, parts))


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
                yield from ((f"{path}:{line}", EMPTY) for line in blank)
                blank.clear()
                yield f"{path}:{number}", TOO_LONG if too_long else _jsonl_row(raw)
            number, raw = number + 1, file.readline(MAX_ROW_BYTES + 1)


def _jsonl_row(raw: bytes) -> "dict | BadRow":
    if b"\0" in raw:
        return NUL
    try:
        return _object(json.loads(raw.decode("utf-8")))
    except RecursionError:
        return BadRow("JSON nested too deep", "flatten the row")
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, and integers with thousands of digits
        if not raw.endswith(b"\n"):
            return BadRow("truncated last line", "write the last row again: the file ends inside it")
        if isinstance(error, UnicodeDecodeError):
            return NOT_UTF8._replace(fix=f"byte {error.start + 1} is 0x{raw[error.start]:02x}; {NOT_UTF8.fix}")
        return BadRow("not JSON", f"{error}; one complete object per line")


def _json(path: Path) -> Iterator[Row]:
    """Read a list of objects, {"data": [...]}, or jsonl under another name."""
    raw = path.read_bytes().removeprefix(BOM)
    if re.match(rb'\s*\{(?!\s*"data"\s*:)[^\n]*\}\s*(\n|$)', raw):  # one object on line 1
        yield from _jsonl(path)
        return
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); write it again, or as .jsonl, where a bad row costs no other "
                        "one") from None
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise UserError(f'{path}: no list of rows; write [{{...}}], {{"data": [{{...}}]}} or .jsonl')
    yield from ((f"{path}:row {number}", _object(row)) for number, row in enumerate(rows, 1))


# ---- tables

def _pyarrow(path: Path):
    try:
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: csv and parquet need a package that isn't installed: pip install pyarrow, or write "
                        "the rows as jsonl") from None
    return pyarrow


def _csv(path: Path) -> Iterator[Row]:
    """Read every cell as text."""
    pyarrow = _pyarrow(path)
    csv = pyarrow.csv
    text = path.read_bytes().decode("utf-8", "surrogateescape").strip("\r\n")
    raw = (ESCAPED.sub(DAMAGED, text) + f"\n{END}\n").encode()
    bad: dict[int, BadRow] = {}  # number of a row that has not the header's count of cells

    def refuse(row) -> str:
        counts = f"{row.actual_columns} where the header has {row.expected_columns}"
        bad[row.number - 1] = _cells([row.text]) or BadRow("wrong number of cells",
                                                           f"{counts}; quote cells that hold commas")
        return "skip"

    options = {  # one thread and one block, else rows have no numbers
        "read_options": csv.ReadOptions(use_threads=False, block_size=len(raw) + 1),
        "parse_options": csv.ParseOptions(delimiter="\t" if path.suffix.lower() == ".tsv" else ",",
                                          newlines_in_values=True, ignore_empty_lines=False,
                                          invalid_row_handler=refuse)}
    try:
        names = csv.open_csv(pyarrow.BufferReader(raw), **options).schema.names
        as_text = csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()))
        table = csv.read_csv(pyarrow.BufferReader(raw), convert_options=as_text, **options)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable table ({reason}); write it again") from error
    good = (row for batch in table.rename_columns([name.strip() for name in names]).to_batches(max_chunksize=256)
            for row in _batch_rows(batch))
    for number in range(1, table.num_rows + len(bad) + 1):
        row = bad[number] if number in bad else next(good)
        if isinstance(row, dict):
            row = _cells(list(row.values())) or row
        if row is not LAST:
            yield f"{path}:row {number}", row


def _cells(cells: list[str]) -> "BadRow | None":
    """Tell what is wrong with the cells of a row; None: nothing."""
    if cells == [END]:
        return LAST
    if any(END in cell for cell in cells):
        return OPEN_QUOTE
    if any(DAMAGED in cell for cell in cells):
        return NOT_UTF8
    if any("\0" in cell for cell in cells):
        return NUL
    return None if any(cells) else EMPTY


def _parquet(path: Path) -> Iterator[Row]:
    pyarrow = _pyarrow(path)
    try:
        file = pyarrow.parquet.ParquetFile(path)
        rows = (row for batch in file.iter_batches(batch_size=256) for row in _batch_rows(batch))
        yield from ((f"{path}:row {number}", row) for number, row in enumerate(rows, 1))
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable parquet file ({reason}); write it again") from error


def _batch_rows(batch) -> "list[dict | BadRow]":
    """Convert the rows of an Arrow batch, whose text no writer need have checked."""
    try:
        return [_object(row) for row in batch.to_pylist()]
    except (ValueError, OverflowError) as error:  # bytes that are not UTF-8, a time that Python has no type for
        if batch.num_rows > 1:
            return [row for i in range(batch.num_rows) for row in _batch_rows(batch.slice(i, 1))]
        return [NOT_UTF8 if isinstance(error, UnicodeDecodeError) else BadRow("value can't be read", str(error))]
