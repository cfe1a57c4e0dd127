"""Replies of a judge's endpoint on disk: no question is paid for twice.

One SQLite file: an entry is there whole or not at all after a crash, several runs may read and write at once, and the
oldest entries can go without a rewrite. It keeps its rollback journal, since the write-ahead log needs shared memory,
which network file systems do not have. Stored are a hash of the request and the reply; never the prompt, a key, a
header or an address. Once open it never raises: a cache that fails costs money, not the run, and is counted.
"""
import contextlib
import hashlib
import json
import sqlite3
import threading
import time
import urllib.parse
from collections import Counter
from pathlib import Path

from minimath.core.errors import UserError
from minimath.core.files import cache_home

FILE = "replies.sqlite"
MAX_BYTES = 256 << 20  # some 500,000 replies with their log-probs
MAX_VALUE_CHARS = 16_384  # a verdict is a word: what is longer is not worth its place
CHECK_EVERY = 64  # writes between two looks at the size
TABLE = ("CREATE TABLE IF NOT EXISTS replies "
         "(id INTEGER PRIMARY KEY, key TEXT UNIQUE, value TEXT, digest TEXT, made REAL)")
BROKEN = ("not a database", "malformed", "no such column")  # no database, or not ours; else locked, or on a full disk


def cache_folder() -> Path:
    """Where all runs keep the replies."""
    return cache_home() / "judge"


def reply_key(url: str, body: dict) -> str:
    """Hash the address and the whole request body.

    User, password and query of the address are left out. A change of model, prompt, temperature or form of the verdict
    asks again."""
    parts = urllib.parse.urlsplit(url)
    address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return _hash(json.dumps([address, body], sort_keys=True))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _digest(key: str, value: str) -> str:
    return _hash(f"{key}\n{value}")[:16]


class ReplyCache:
    """Key -> reply text in `folder`/replies.sqlite, for several threads and processes.

    At most about max_bytes: over that the oldest quarter goes. counts: hits, misses, written, dropped (for room),
    corrupt (entries that do not match their digest, files that are no database), errors (failed reads and writes).
    """

    def __init__(self, folder: str | Path, max_bytes: int = MAX_BYTES):
        """Open or make the file. Raises UserError when it can't be written.

        A file that is no database is moved aside."""
        self.path = Path(folder) / FILE
        self.max_bytes, self.counts = max_bytes, Counter()
        self._lock, self._writes = threading.Lock(), 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.path.touch(mode=0o600)  # for its owner only, before SQLite makes it for all
            try:
                self._db = self._open()
            except sqlite3.DatabaseError as error:
                if not any(words in str(error) for words in BROKEN):
                    raise
                self.counts["corrupt"] += 1
                self.path.replace(self.path.with_suffix(f".corrupt-{time.time_ns()}"))
                self._db = self._open()
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"the judge's replies can't be kept in {self.path.parent}: "
                            f"{getattr(error, 'strerror', None) or error}; set MINIMATH_CACHE to a folder that can be "
                            "written") from None

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=5.0, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute(TABLE)
            db.execute("SELECT id, key, value, digest, made FROM replies LIMIT 1").fetchall()
        except sqlite3.Error:
            db.close()
            raise
        return db

    def get(self, key: str) -> str | None:
        """Return the reply, or None; a damaged entry is counted and deleted."""
        with self._lock:
            row = None
            with self._counted_errors():
                row = self._db.execute("SELECT value, digest FROM replies WHERE key = ?", (key,)).fetchone()
                if row and not (isinstance(row[0], str) and row[1] == _digest(key, row[0])):
                    row = None
                    self.counts["corrupt"] += 1
                    self._db.execute("DELETE FROM replies WHERE key = ?", (key,))
            self.counts["hits" if row else "misses"] += 1
            return row[0] if row else None

    def put(self, key: str, value: str) -> None:
        """Keep a reply of up to 16,384 characters; the first one of a key stays."""
        if len(value) > MAX_VALUE_CHARS:
            return
        with self._lock, self._counted_errors():
            row = (key, value, _digest(key, value), time.time())
            self._db.execute("INSERT OR IGNORE INTO replies (key, value, digest, made) VALUES (?, ?, ?, ?)", row)
            self.counts["written"] += 1
            self._writes += 1
            if self._writes % CHECK_EVERY == 0:
                self._make_room()

    def _make_room(self) -> None:
        """Delete the oldest quarter over max_bytes; its pages are written again."""
        pages, free, size = (self._db.execute(f"PRAGMA {name}").fetchone()[0]
                             for name in ("page_count", "freelist_count", "page_size"))
        if (pages - free) * size > self.max_bytes:
            quarter = self._db.execute("SELECT COUNT(*) FROM replies").fetchone()[0] // 4
            oldest = "DELETE FROM replies WHERE id IN (SELECT id FROM replies ORDER BY id LIMIT ?)"
            self.counts["dropped"] += self._db.execute(oldest, (quarter,)).rowcount

    @contextlib.contextmanager
    def _counted_errors(self):
        try:
            yield
        except (sqlite3.Error, UnicodeError):
            self.counts["errors"] += 1

    def close(self) -> None:
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._db.close()

    def __enter__(self) -> "ReplyCache":
        return self

    def __exit__(self, *_) -> None:
        self.close()
