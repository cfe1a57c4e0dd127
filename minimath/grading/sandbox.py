"""Maths and patterns that may be hostile, in processes with a limit on time and memory. No torch here.

math-verify (https://github.com/huggingface/Math-Verify) can hang or eat memory on hostile LaTeX and has no time-out
of its own off the main thread; re has none at all. So neither runs in this process:

    this process -- BoundedChild.ask --> `python -m minimath.grading.sandbox` -- fork --> worker, killed by its own alarm

The child imports math-verify once (a second), reads nothing of a request but its number, and so never hangs; it forks
a worker for a request when none is idle. A worker that runs out of time or memory dies alone, and the next one is
forked in milliseconds. Without os.fork (Windows) the child answers by itself, and is replaced when it is late.
"""
from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

from minimath.core.errors import UserError

MEMORY_BYTES = 512 << 20      # of a worker's address space; after its imports it has 70 MiB
WORKERS = 8 if hasattr(os, "fork") else 1  # requests at a time; more threads wait
ALARM_SHARE, WAIT_SHARE = 0.75, 0.95  # of the time limit: the worker's alarm, and when the caller waits no longer
START_S = 120.0               # sympy imports slowly on a loaded machine
LATE, DIED = "late", "died"
# What a worker would else learn anew after each fork: sympy's and the LaTeX parser's caches fill with the first
# expression of each form, and take up to half a second for it
WARM_UP = ((r"2\sqrt{3}", r"\sqrt{12}"), ("x^2+2x+1", "(x+1)^2"), (r"x \in [2,5)", "[2,5)"),
           (r"(3,\frac{1}{2})", "(3,4)"))


class BoundedChild:
    """Puts questions to the workers; usable from any thread. The child starts with the first question and lives
    until close(). A reply comes within `timeout_s` by the clock, the first start apart; `timeouts`: how often none
    did, or memory ran out before; `starts`: of the child."""

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self.timeouts = self.starts = 0
        self.process: subprocess.Popen | None = None
        self._waiting: dict[int, queue.SimpleQueue] = {}  # of this process: number of a request -> its reply
        self._sent = 0
        self._lock, self._free = threading.Lock(), threading.BoundedSemaphore(WORKERS)

    def ask(self, kind: str, first: str, second: str) -> str:
        """The reply to `kind`: equal (gold, answer) -> right, wrong, bad gold; match (pattern, text) -> right, wrong.
        LATE when the time and DIED when the memory ran out. UserError only when the child can't start."""
        mine = queue.SimpleQueue()
        with self._free:
            with self._lock:
                if self.process is None or self.process.poll() is not None:
                    self._start()
                self._sent += 1
                number, waiting = self._sent, self._waiting
                waiting[number] = mine
                request = json.dumps([ALARM_SHARE * self.timeout_s, kind, first, second])
                try:
                    self.process.stdin.write(f"{number} {request}\n")
                    self.process.stdin.flush()
                except OSError:
                    mine.put(DIED)
            try:
                reply = mine.get(timeout=WAIT_SHARE * self.timeout_s)
            except queue.Empty:
                reply = LATE
            waiting.pop(number, None)
            with self._lock:
                self.timeouts += reply in (LATE, DIED)
                if reply == LATE and WORKERS == 1:  # no fork: the child itself hangs
                    self._stop()
        return reply

    def _start(self):
        kept = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV", "TMPDIR")
        root = str(Path(__file__).resolve().parents[1])
        env = {name: os.environ[name] for name in kept if name in os.environ}  # no secrets
        env["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        self._stop()
        self._waiting, ready = {}, queue.SimpleQueue()
        self._waiting[0] = ready
        self.process = subprocess.Popen(
            [sys.executable, "-B", "-m", "minimath.grading.sandbox"], env=env, text=True, encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        threading.Thread(target=_pump, args=(self.process.stdout, self._waiting), daemon=True).start()
        self.starts += 1
        try:
            said = ready.get(timeout=START_S)
        except queue.Empty:
            said = LATE
        if said != "ready":
            self._stop()
            raise UserError("answer checker: the math-verify child process did not start; try "
                            "`python -c 'import math_verify'`, and reinstall math-verify if that fails")

    def _stop(self):
        child, self.process = self.process, None
        if child is not None:
            with contextlib.suppress(OSError):
                child.kill()
            child.wait()
            with contextlib.suppress(OSError, ValueError):
                child.stdin.close()

    def close(self):
        """Ends the child; the next question starts it again."""
        with self._lock:
            self._stop()


def _pump(stream, waiting: dict[int, queue.SimpleQueue]):
    """Hands each reply, "number words", to who waits for it; when the stream ends, DIED to all."""
    with contextlib.suppress(OSError, ValueError), stream:
        for line in stream:
            number, _, reply = line.strip().partition(" ")
            if place := waiting.get(int(number)):
                place.put(reply)
    for place in list(waiting.values()):
        place.put(DIED)


# ---------------------------------------------------------------- the child process

def _serve():
    """Reads "number request" a line, writes "number reply" a line, until its input closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal goes to all: the parent decides
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)                               # a library's print must not become a verdict
    for gold, answer in WARM_UP:
        _equal(gold, answer)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    replies.write(b"0 ready\n")
    if hasattr(os, "fork"):
        _share_out(replies)
    for line in sys.stdin.buffer if WORKERS == 1 else ():
        number, _, request = line.partition(b" ")
        replies.write(number + b" " + _reply(*json.loads(request)[1:]).encode() + b"\n")


def _share_out(replies):
    """Gives each request to an idle worker, forking one when there is none, and passes on what they reply. The
    workers end with this process: their sockets close."""
    import select
    workers: dict = {}                          # socket -> process id
    busy: dict = {}                             # socket -> number of its request
    rest = b""
    while True:
        for source in select.select([0, *workers], [], [])[0]:
            if source == 0:
                chunk = os.read(0, 1 << 16)
                if not chunk:
                    return
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    number, _, request = line.partition(b" ")
                    worker = next((w for w in workers if w not in busy), None) or _fork(workers, replies)
                    busy[worker] = number
                    with contextlib.suppress(OSError):  # it died just now: its socket will say so
                        worker.sendall(request + b"\n")
                continue
            said, number = source.recv(100), busy.pop(source, None)
            if not said:                        # its alarm, the memory limit, a crash
                _, status = os.waitpid(workers.pop(source), 0)
                source.close()
                late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
                said = (LATE if late else DIED).encode()
            if number is not None:
                replies.write(number + b" " + said + b"\n")


def _fork(workers: dict, replies):
    """A new worker: adds its socket to `workers`, and returns it."""
    import socket
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        os.close(0)
        for other in (ours, replies, *workers):  # else these would not close when the child dies
            other.close()
        try:
            _work(theirs)
        finally:
            os._exit(1)
    theirs.close()
    workers[ours] = pid
    return ours


def _work(connection):
    """Replies to requests, one a line. The alarm has its default action: it ends the process."""
    for line in connection.makefile("rb"):
        seconds, *request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        reply = _reply(*request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.sendall(reply.encode())


def _reply(kind: str, first: str, second: str) -> str:
    try:
        return _equal(first, second) if kind == "equal" else _match(first, second)
    except MemoryError:
        raise                                   # who knows what it left half done: this worker ends
    except Exception:                           # any: the parser was not made for hostile text
        return "wrong"


def _equal(gold: str, answer: str) -> str:
    """math-verify's verdict. The gold answer is its first argument: verify is not symmetric."""
    from math_verify import verify
    right = _read(gold)
    if not right:
        return "bad gold"
    return "right" if verify(right, _read(answer), timeout_seconds=None) else "wrong"


@functools.lru_cache(maxsize=1024)
def _read(answer: str):
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse
    configs = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return parse(f"\\boxed{{{answer}}}", configs, parsing_timeout=None)


def _match(pattern: str, text: str) -> str:
    return "right" if re.compile(pattern, re.IGNORECASE | re.DOTALL).fullmatch(text) else "wrong"


if __name__ == "__main__":
    _serve()
