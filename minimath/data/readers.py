"""Yield the rows of files, folders, hub data sets and lists, each with its place.

A row that can't be read comes out as a BadRow: load_examples counts it and goes on. Only what spoils the whole file
(unreadable, UTF-16, cut JSON list, not parquet) raises UserError."""
import contextlib
import csv
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minimath.core.errors import UserError
from minimath.core.hub import without_network
from minimath.core.text import did_you_mean

MAX_ROW_BYTES = 1_000_000  # longer is a broken file (a lost line end or quote), no problem with a solution
BOM = b"\xef\xbb\xbf"
OBJECT_ON_LINE_1 = re.compile(rb'\s*\{(?!\s*"data"\s*:)[^\r\n]*\}\s*([\r\n]|$)')  # jsonl under another name
LIST = re.compile(rb"\s*\[\s*\{")  # json under another name
SPLIT = r":\w[\w.+%:\[\]-]*"
HUB_NAME = re.compile(rf"[A-Za-z0-9][\w.-]*/\w[\w.-]*(:\w[\w.-]*({SPLIT})?|:{SPLIT})?")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
ESCAPED = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte that is not UTF-8


@dataclass(eq=False)
class BadRow(Exception):
    """Why a row was refused and what puts it right."""
    reason: str
    fix: str


Row = tuple[str, dict | BadRow]  # (place, row)
TOO_LONG = BadRow("row longer than 1 MB", "split it, or look for a missing line end or quote before it")
NUL = BadRow("NUL byte", "rewrite the file: it was damaged or is not text")
NOT_UTF8 = BadRow("not UTF-8", "save the file as UTF-8")
EMPTY = BadRow("empty row", "delete the blank line")
LOST_QUOTE = BadRow("quote in the middle of a cell", "put the whole cell into quotes and double those in it: \"\"")
OPEN_QUOTE = BadRow("quote not closed", "close it, or write the last row again: the file ends inside a cell")


def rows_of(source: str | list, split: str) -> Iterator[Row]:
    """Yield the rows of a list, a file, a folder of files, or a hub data set.

    A hub data set is "owner/name", "owner/name:config" or "owner/name:config:split", as in
    "openai/gsm8k:main:train[-128:]". split: of a hub data set that names none; of a folder, the files with it in
    their name, if any. Raises UserError when nothing is there, or a file is spoiled."""
    if isinstance(source, list):
        yield from ((f"row {number}", _object(row, "")) for number, row in enumerate(source, 1))
        return
    if not source:
        raise UserError("no data given; set data= to a file, a folder or a data set name owner/name")
    path = Path(source).expanduser()
    if os.path.exists(path) and re.search(r"[\[+]", split):
        raise UserError(f"split={split} is for a hub data set, and data={source} is a file or folder: give split= as "
                        "one word, and limit=N for the first rows")
    if os.path.isdir(path):  # unlike is_dir, also for a name that is too long
        there = [f for f in path.iterdir() if f.is_file() and not f.name.startswith(".")]  # macOS hides ._x.jsonl there
        if packed := [f for f in there if f.suffix.lower() in PACKED and not (plain := f.with_suffix("")).exists()
                      and plain.suffix.lower() in SUFFIXES]:
            raise UserError(f"{packed[0]}: compressed files are not read; unpack it, or move it elsewhere")
        files = sorted(f for f in there if f.suffix.lower() in SUFFIXES)
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
        while not os.path.isdir(folder := path.parent):
            path = folder  # at last the first part of the path that does not exist
        there = sorted(p.name for p in folder.iterdir() if p.is_dir() or p.suffix.lower() in SUFFIXES)
        near = did_you_mean(path.name, there)
        listing = f"; {folder} has {', '.join(there[:8])}" if there and not near else ""
        raise UserError(f"data={source}: {path} does not exist{near}{listing}")


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    without_network()
    try:
        import datasets  # seconds to import: only when a hub name is given
    except ImportError:
        raise UserError(f"data={name}: hub data sets need a package that isn't installed: pip install datasets, or "
                        "download the set's files and give their folder") from None
    repo, config, own = (name.split(":", 2) + ["", ""])[:3]
    split = own or split
    try:
        rows = datasets.load_dataset(repo, config or None, split=split)
    except Exception as error:  # hub, network, disk and format errors share no other base
        text = " ".join(str(error).split())[:300]
        raise UserError(f"data={name}: is no file here, and as a hub data set (split {split!r}) it can't be "
                        f"loaded: {type(error).__name__}: {text}. Check the name and the network") from error
    yield from ((f"{name}:{split}:row {number}", row) for number, row in enumerate(rows, 1))


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file, each with its place.

    That is "file:line" in jsonl and "file:row N", from 1, elsewhere. Raises UserError for a spoiled file."""
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise UserError(f"{path}: unknown kind of file {path.suffix!r}; use one of {', '.join(SUFFIXES)}")
    try:
        with path.open("rb") as file:
            head = file.read(MAX_ROW_BYTES).removeprefix(BOM)
        if suffix != ".parquet" and head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{path}: the file is UTF-16; save it as UTF-8")
        if suffix == ".json" and OBJECT_ON_LINE_1.match(head):
            suffix = ".jsonl"
        elif suffix == ".jsonl" and LIST.match(head):  # whose last row alone is one without a comma
            suffix = ".json"
        place, blank = f"{path}:" if suffix == ".jsonl" else f"{path}:row ", []
        for number, row in enumerate(READERS[suffix](path, head), 1):
            blank.append((f"{place}{number}", row))
            if row is not EMPTY:  # at the end of a file it is no row
                yield from blank
                blank.clear()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error}); check path and rights") from error


def _object(value, kind: str = "a JSON ") -> dict | BadRow:
    if isinstance(value, dict):
        return value if _size(value) <= MAX_ROW_BYTES else TOO_LONG
    return BadRow(f"{kind}{type(value).__name__} instead of an object",
                  'write each row as {"problem": "...", "solution": "..."}')


def _size(value) -> int:
    """Count the characters and bytes of the texts in a row, nested ones too."""
    if isinstance(value, (str, bytes)):
        return len(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(map(_size, parts))


def _once(pairs: list[tuple]) -> dict:
    """Make an object of its keys and values. Raises BadRow for a key that stands twice: json keeps the last."""
    if len(made := dict(pairs)) < len(pairs):
        names = [name for name, _ in pairs]
        raise BadRow("a key stands twice", f"rename or delete one {max(names, key=names.count)!r}")
    return made


# ---- one reader per kind of file: of its path and its first bytes

def _jsonl(path: Path, head: bytes) -> Iterator[dict | BadRow]:
    with path.open("rb") as file:
        yield from map(_jsonl_row, file.read().splitlines(True) if b"\r" in head and b"\n" not in head else file)


def _jsonl_row(line: bytes) -> dict | BadRow:
    if len(line) > MAX_ROW_BYTES:
        return TOO_LONG
    if b"\0" in line:
        return NUL
    if not line.removeprefix(BOM).strip():  # on any line: files are often joined
        return EMPTY
    try:
        return _object(json.loads(line.decode("utf-8-sig"), object_pairs_hook=_once))
    except BadRow as error:
        return error
    except RecursionError:
        return BadRow("JSON nested too deep", "flatten the row")
    except ValueError as error:  # of json, of decode, and of integers with thousands of digits
        if not line.endswith((b"\n", b"\r")):
            return BadRow("truncated last line", "write the last row again: the file ends inside it")
        if isinstance(error, UnicodeDecodeError):
            return BadRow("not UTF-8", f"{error}; {NOT_UTF8.fix}")
        return BadRow("not JSON", f"{error}; one complete object per line")


def _json(path: Path, _) -> Iterator[dict | BadRow]:
    """Read a list of objects, or {"data": [...]}."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except BadRow as error:
        raise UserError(f"{path}: {error.reason}; {error.fix}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); write it again, or as .jsonl, where a bad row costs no other "
                        "one") from None
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise UserError(f'{path}: no list of rows; write [{{...}}], {{"data": [{{...}}]}} or .jsonl')
    yield from map(_object, rows)


def _csv(path: Path, _) -> Iterator[dict | BadRow]:
    """Read every cell as text; the header tells what stands between them."""
    csv.field_size_limit(MAX_ROW_BYTES)
    ended = []  # filled behind the last line: a quote that is not closed takes in the rest of the file

    def lines(file):
        yield from file
        ended.append(True)

    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = next((line for line in file if line.strip()), "")
        file.seek(0)
        usual = "\t" if path.suffix.lower() == ".tsv" else ","
        # strict: else a quote that is not closed joins rows up to the next one
        reader, names = csv.reader(lines(file), delimiter=max(usual + ",;\t|", key=first.count), strict=True), []
        with contextlib.suppress(csv.Error):
            names = [name.strip() for name in next(filter(None, reader), [])]
        if not names or ended:
            raise UserError(f"{path}: not a readable table: no line of column names, or a quote in it is not closed; "
                            "write it again")
        if twice := [name for name in names if name and names.count(name) > 1]:
            raise UserError(f"{path}: two columns are called {twice[0]!r}; rename one")
        while True:
            try:
                row = _csv_row(names, next(reader))
            except StopIteration:
                return
            except csv.Error as error:  # of one line; Python 3.10 reads no NUL
                row = NUL if "NUL" in str(error) else TOO_LONG if "limit" in str(error) else LOST_QUOTE
            yield OPEN_QUOTE if ended else row


def _csv_row(names: list[str], cells: list[str]) -> dict | BadRow:
    if not cells:
        return EMPTY
    text = "".join(cells)
    if "\0" in text:
        return NUL
    if ESCAPED.search(text):
        return NOT_UTF8
    if len(cells) != len(names):
        return BadRow("wrong number of cells", f"{len(cells)} where the header has {len(names)}; quote cells that hold "
                      "commas")
    return _object(dict(zip(names, cells))) if text else BadRow("empty row", "fill it in or delete it")


def _parquet(path: Path, _) -> Iterator[dict | BadRow]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: parquet needs a package that isn't installed: pip install pyarrow, or write the rows "
                        "as jsonl") from None
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            for i, column in enumerate(batch.schema):
                if column.type == pyarrow.float32():  # 0.1, not 0.10000000149011612
                    digits = batch.column(i).cast(pyarrow.string()).cast(pyarrow.float64())
                    batch = batch.set_column(i, column.name, digits)
            yield from _batch_rows(batch)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the second of a column's name
        reason, *_ = str(error).splitlines()
        raise UserError(f"{path}: not a readable parquet file ({reason}); write it again") from error


def _batch_rows(batch) -> list[dict | BadRow]:
    """Convert the rows of an Arrow batch, whose text no writer need have checked."""
    try:
        return [_object(row) for row in batch.to_pylist()]
    except (ValueError, OverflowError) as error:  # bytes that are not UTF-8, a time that Python has no type for
        if batch.num_rows > 1:
            return [row for i in range(batch.num_rows) for row in _batch_rows(batch.slice(i, 1))]
        return [NOT_UTF8 if isinstance(error, UnicodeDecodeError) else BadRow("value can't be read", str(error))]


READERS = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv, ".tsv": _csv}
SUFFIXES = tuple(READERS)
