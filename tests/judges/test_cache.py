"""The replies kept on disk: whole or absent, private, bounded, shared by threads and processes."""
import json
import sqlite3
import stat
import subprocess
import sys
import threading

import pytest

from minimath.core.errors import UserError
from minimath.judges import cache as judge_cache
from minimath.judges.cache import FILE, ReplyCache, cache_folder, reply_key

BODY = {"model": "m", "messages": [{"role": "user", "content": "A or B?"}], "temperature": 0}


def change(folder, statement, *values):
    db = sqlite3.connect(folder / FILE)
    with db:
        db.execute(statement, values)
    db.close()


def test_a_reply_is_found_again_after_reopening(tmp_path):
    key = reply_key("http://h/v1", BODY)
    with ReplyCache(tmp_path / "new" / "folder") as cache:
        assert cache.get(key) is None
        cache.put(key, "A \u2713")
        cache.put(key, "later")
    with ReplyCache(tmp_path / "new" / "folder") as cache:
        assert cache.get(key) == "A \u2713"
        assert cache.counts == {"hits": 1}


def test_the_key_follows_address_model_and_body_but_no_credentials():
    base = reply_key("http://h/v1", BODY)
    assert len(base) == 64
    assert reply_key("http://user:secret@h/v1?api-key=secret", BODY) == base
    assert reply_key("http://h/v1", dict(reversed(BODY.items()))) == base
    others = [reply_key("http://h:81/v1", BODY), reply_key("http://h/v2", BODY),
              reply_key("http://h/v1", BODY | {"model": "n"}), reply_key("http://h/v1", BODY | {"temperature": 1}),
              reply_key("http://h/v1", BODY | {"messages": []})]
    assert len({base, *others}) == 6
    assert reply_key("http://h/v1", {"messages": "\ud800"})      # half a surrogate pair in a candidate


def test_the_file_holds_no_prompt_and_is_private(tmp_path):
    with ReplyCache(tmp_path) as cache:
        cache.put(reply_key("http://user:secret@h/v1", BODY), "the verdict")
    raw = (tmp_path / FILE).read_bytes()
    assert b"the verdict" in raw and b"A or B?" not in raw and b"secret" not in raw
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


@pytest.mark.parametrize("damage", ["UPDATE replies SET value = 'B' WHERE key = ?",
                                    "UPDATE replies SET value = x'ff00' WHERE key = ?",
                                    "UPDATE replies SET value = NULL WHERE key = ?",
                                    "UPDATE replies SET digest = '' WHERE key = ?"])
def test_a_damaged_entry_is_ignored_counted_and_can_be_written_again(tmp_path, damage):
    with ReplyCache(tmp_path) as cache:
        cache.put("k1", "A")
        cache.put("k2", "A")
        change(tmp_path, damage, "k1")
        assert cache.get("k1") is None and cache.get("k2") == "A"
        assert cache.counts["corrupt"] == 1
        cache.put("k1", "TIE")
        assert cache.get("k1") == "TIE"


@pytest.mark.parametrize("junk", [b"not a database at all" * 99, b"SQLite format 3\x00" + b"\xff" * 4080])
def test_a_file_that_is_no_database_is_moved_aside(tmp_path, junk):
    (tmp_path / FILE).write_bytes(junk)
    with ReplyCache(tmp_path) as cache:
        cache.put("k", "A")
        assert cache.get("k") == "A" and cache.counts["corrupt"] == 1
    assert [path.read_bytes() for path in tmp_path.glob("*.corrupt-*")] == [junk]


def test_a_locked_file_is_not_moved_aside_and_a_failing_one_does_not_raise(tmp_path, monkeypatch):
    with ReplyCache(tmp_path) as cache:
        cache.put("k", "A")
        cache._db.execute("PRAGMA busy_timeout=50")
        other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        assert cache.get("k") is None
        cache.put("k2", "B")
        assert cache.counts["errors"] == 2
        other.execute("ROLLBACK")
        other.close()
        assert cache.get("k") == "A"
    cache.put("k", "A")                                          # closed: counted, not raised
    assert cache.counts["errors"] == 3 and not list(tmp_path.glob("*.corrupt-*"))


def test_size_is_bounded_and_the_oldest_go_first(tmp_path, monkeypatch):
    monkeypatch.setattr(judge_cache, "CHECK_EVERY", 8)
    with ReplyCache(tmp_path, max_bytes=200_000) as cache:
        cache.counts.clear()
        cache._db.execute("PRAGMA synchronous=OFF")              # for speed
        for i in range(400):
            cache.put(f"k{i}", "x" * 2000)
        cache.put("long", "x" * (judge_cache.MAX_VALUE_CHARS + 1))
        assert cache.get("k0") is None and cache.get("k399") is not None and cache.get("long") is None
        assert cache.counts["dropped"] > 200
    assert (tmp_path / FILE).stat().st_size < 300_000


def test_threads_and_processes_share_it(tmp_path):
    script = ("import sys; from minimath.judges.cache import ReplyCache; c = ReplyCache(sys.argv[1]);"
              "[c.put(f'p{i}', 'B') for i in range(20)]; print(c.counts['errors'])")
    with ReplyCache(tmp_path) as cache:
        child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        threads = [threading.Thread(target=lambda n=n: [cache.put(f"t{n}-{i}", "A") for i in range(10)])
                   for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert child.communicate(timeout=60)[0].strip() == "0"
        assert all(cache.get(f"p{i}") == "B" for i in range(20))
        assert all(cache.get(f"t{n}-{i}") == "A" for n in range(4) for i in range(10))
        assert cache.counts["errors"] == 0


def test_the_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMATH_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "judge"
    monkeypatch.delenv("MINIMATH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "minimath" / "judge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "minimath" / "judge"


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text(json.dumps(1))
    with pytest.raises(UserError, match="kept in .*sub: .*set MINIMATH_CACHE"):
        ReplyCache(tmp_path / "file" / "sub")
