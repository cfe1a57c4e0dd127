"""Replies of a judge's endpoint on disk: no vote is paid for twice.

One SQLite file for all runs, with a hash of the request and the reply; never the prompt, a key, a header or an address.
Once open it never raises: a cache that fails costs money, not the run, and says so once.
"""
import hashlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

from minimath.core.errors import UserError
from minimath.core.files import cache_home

FILE = "replies.sqlite"
MOST = 500_000  # replies, some 256 MB with their log-probs: when a run opens the file, older ones go


def reply_key(url: str, body: dict) -> str:
    """Hash the address and the whole request body: a change of any asks again."""
    text = json.dumps(["reply 2", url, body], sort_keys=True)  # the number: of the form in which replies are kept
    return hashlib.sha256(text.encode()).hexdigest()


class ReplyCache:
    """Key -> reply text in `folder`/replies.sqlite, for several threads and processes."""

    def __init__(self, folder: str | Path = "", say: Callable[[str], None] = print):
        """Open or make the file, by default that of all runs; one that is damaged is set aside. Raises UserError."""
        self.path, self.say, self.failed = Path(folder or cache_home() / "judge") / FILE, say, False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.path.touch(mode=0o600)  # for its owner only, before SQLite makes it for all
            try:
                self._db = self._open()
            except sqlite3.OperationalError:  # a lock, a full disk
                raise
            except sqlite3.DatabaseError as error:
                aside = self.path.replace(self.path.with_suffix(".damaged"))
                say(f"the judge's kept replies are damaged ({error}): set aside as {aside}, a new file is begun")
                self._db = self._open()
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"the judge's replies can't be kept in {self.path.parent}: "
                            f"{getattr(error, 'strerror', None) or error}; set MINIMATH_CACHE to a folder that can be "
                            "written") from None

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=5.0, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("CREATE TABLE IF NOT EXISTS replies (id INTEGER PRIMARY KEY, key TEXT UNIQUE, value TEXT)")
        db.execute("DELETE FROM replies WHERE id <= (SELECT MAX(id) FROM replies) - ?", (MOST,))
        return db

    def get(self, key: str) -> str | None:
        return (self._execute("SELECT value FROM replies WHERE key = ?", key) or [None])[0]

    def put(self, key: str, value: str) -> None:
        """Keep a reply in place of an earlier one of its key."""
        self._execute("INSERT OR REPLACE INTO replies (key, value) VALUES (?, ?)", key, value)

    def _execute(self, statement: str, *values: str) -> tuple | None:
        """Run a statement, and return its first row."""
        try:
            return self._db.execute(statement, values).fetchone()
        except sqlite3.Error as error:
            if not self.failed:
                self.say(f"the judge's replies in {self.path} can't be used ({error}): they are paid for again")
            self.failed = True

    def close(self) -> None:
        self._db.close()
