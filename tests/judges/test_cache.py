"""The replies kept on disk: whole or absent, private, bounded, shared by threads and processes."""
import json
import sqlite3
import stat
import subprocess
import sys
import threading
from contextlib import closing

import pytest

from minimath.core.errors import UserError
from minimath.judges import cache as judge_cache
from minimath.judges.cache import FILE, ReplyCache, reply_key

BODY = {"model": "m", "messages": [{"role": "user", "content": "A or B?"}], "temperature": 0}


def test_a_reply_is_found_again_after_reopening(tmp_path):
    key = reply_key("http://h/v1", BODY)
    with closing(ReplyCache(tmp_path / "new" / "folder")) as cache:
        assert cache.get(key) is None
        cache.put(key, "I cannot tell")
        cache.put(key, "A \u2713")
    with closing(ReplyCache(tmp_path / "new" / "folder")) as cache:
        assert cache.get(key) == "A \u2713"


def test_the_key_follows_address_model_and_body():
    base = reply_key("http://h/v1", BODY)
    assert len(base) == 64
    assert reply_key("http://h/v1", dict(reversed(BODY.items()))) == base
    others = [reply_key("http://h:81/v1", BODY), reply_key("http://h/v2", BODY),
              reply_key("http://h/v1", BODY | {"model": "n"}), reply_key("http://h/v1", BODY | {"temperature": 1}),
              reply_key("http://h/v1", BODY | {"messages": []})]
    assert len({base, *others}) == 6
    assert reply_key("http://h/v1", {"messages": "\ud800"})      # half a surrogate pair in a candidate


def test_the_file_holds_no_prompt_and_is_private(tmp_path):
    with closing(ReplyCache(tmp_path)) as cache:
        cache.put(reply_key("http://h/v1", BODY), "the verdict")
    raw = (tmp_path / FILE).read_bytes()
    assert b"the verdict" in raw and b"A or B?" not in raw and b"http" not in raw
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


@pytest.mark.parametrize("junk", [b"not a database at all" * 99, b"SQLite format 3\x00" + b"\xff" * 4080])
def test_a_file_that_is_no_database_is_set_aside_and_said(tmp_path, junk):
    (tmp_path / FILE).write_bytes(junk)
    said = []
    with closing(ReplyCache(tmp_path, said.append)) as cache:
        cache.put("k", "A")
        assert cache.get("k") == "A"
    assert (tmp_path / "replies.damaged").read_bytes() == junk and len(said) == 1 and "replies.damaged" in said[0]


def test_a_locked_file_is_not_set_aside_and_a_failing_one_does_not_raise_and_is_said_once(tmp_path):
    said = []
    with closing(ReplyCache(tmp_path, said.append)) as cache:
        cache.put("k", "A")
        cache._db.execute("PRAGMA busy_timeout=50")
        other = sqlite3.connect(tmp_path / FILE, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        assert cache.get("k") is None
        cache.put("k2", "B")
        assert len(said) == 1 and "locked" in said[0]
        other.execute("ROLLBACK")
        other.close()
        assert cache.get("k") == "A"
    cache.put("k", "A")                                          # closed: not raised
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_the_number_of_replies_is_bounded_and_the_oldest_go_first(tmp_path, monkeypatch):
    monkeypatch.setattr(judge_cache, "MOST", 8)
    for start in (0, 10):
        with closing(ReplyCache(tmp_path)) as cache:
            for i in range(start, start + 10):
                cache.put(f"k{i}", "A")
    with closing(ReplyCache(tmp_path)) as cache:
        assert [i for i in range(20) if cache.get(f"k{i}")] == list(range(12, 20))


def test_threads_and_processes_share_it(tmp_path):
    script = ("import sys; from minimath.judges.cache import ReplyCache; c = ReplyCache(sys.argv[1]);"
              "[c.put(f'p{i}', 'B') for i in range(20)]; print(c.failed)")
    with closing(ReplyCache(tmp_path)) as cache:
        child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        threads = [threading.Thread(target=lambda n=n: [cache.put(f"t{n}-{i}", "A") for i in range(10)])
                   for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert child.communicate(timeout=60)[0].strip() == "False"
        assert all(cache.get(f"p{i}") == "B" for i in range(20))
        assert all(cache.get(f"t{n}-{i}") == "A" for n in range(4) for i in range(10))
        assert not cache.failed


def test_the_folder_follows_the_environment(tmp_path, monkeypatch):
    def folder():
        with closing(ReplyCache()) as cache:
            return cache.path.parent

    monkeypatch.setenv("MINIMATH_CACHE", str(tmp_path))
    assert folder() == tmp_path / "judge"
    monkeypatch.delenv("MINIMATH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder() == tmp_path / "xdg" / "minimath" / "judge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert folder() == tmp_path / "home" / ".cache" / "minimath" / "judge"


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text(json.dumps(1))
    with pytest.raises(UserError, match="kept in .*sub: .*set MINIMATH_CACHE"):
        ReplyCache(tmp_path / "file" / "sub")
