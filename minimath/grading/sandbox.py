"""Run math-verify and regular expressions on hostile text, within limits.

math-verify (https://github.com/huggingface/Math-Verify) can hang or eat memory on hostile LaTeX and has no time-out
off the main thread; re has none at all. So neither runs in this process:

    this process - passes a socket -> `python -m minimath.grading.sandbox` - forks -> worker at the socket's other end

The child imports math-verify once (a second), then does nothing but fork: it reads no question and so never hangs. A
worker that runs out of time or memory dies alone, and the next one is forked in milliseconds.
"""
import contextlib
import functools
import json
import os
import queue
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

from minimath.core.errors import UserError
from minimath.grading.numbers import read_number, rounds_to

MEMORY_BYTES = 512 << 20      # of a worker's address space; after its imports it has 70 MiB
WORKERS = 8                   # questions at a time; more threads wait
ALARM_SHARE = 0.75            # of the time limit, for the worker's alarm; the rest is for its death and replacement
WAIT_TIMES = 15               # of the time limit, by the clock: on a busy machine a worker gets its seconds slowly
START_S = 600.0               # seconds of work, and minutes beside jobs that go first
PRECISION, MAX_PRECISION = 60, 400  # digits
POINTS = 12                   # at which two expressions are compared that sympy cannot bring together
LATE = "late"                 # the reply of a worker that ran out of time or memory
# of the environment: no secrets
KEPT_ENVIRONMENT = ("PATH", "PYTHONPATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TMPDIR")
# Done before forking: sympy's and the LaTeX parser's caches fill with the first expression of each form, in up to 0.5 s
WARM_UP = ((r"2\sqrt{3}", r"\sqrt{12}"), ("x^2+2x+1", "(x+1)^2"), (r"x \in [2,5)", "[2,5)"),
           (r"(3,\frac{1}{2})", "(3,4)"))


class BoundedChild(contextlib.AbstractContextManager):
    """Put questions to the workers; a context manager, usable from any thread.

    The child starts with the first question. A reply takes at most `timeout_s` of a worker's processor time, so that
    what else the machine does changes no verdict, and WAIT_TIMES times that by the clock.
    `timeouts` counts the questions without one, for want of time or memory; `starts` the starts of the child.
    """

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self.timeouts = self.starts = 0
        self.process: subprocess.Popen | None = None  # with _control, through which sockets for new workers go out
        self._lock, self._slots = threading.RLock(), queue.LifoQueue()
        for _ in range(WORKERS):
            self._slots.put((None, None))           # the child that a worker is of, and the worker's socket

    def __exit__(self, *_):
        self.close()

    def ask(self, kind: str, first: str, second: str) -> str:
        """Return the reply to `kind`, or LATE when time or memory ran out.

        kind: equal (gold, answer) -> right, wrong, bad gold; match (pattern, text) -> right, wrong. Raises UserError
        only when the child can't start.
        """
        question = json.dumps([ALARM_SHARE * self.timeout_s, kind, first, second]) + "\n"
        (process, worker), reply = self._slots.get(), b""
        try:
            with self._lock:
                if self.process is None or self.process.poll() is not None:
                    self._start()
                if process is not self.process:     # closed, dead, or none yet
                    process, (worker, theirs) = self.process, socket.socketpair()
                    with theirs, contextlib.suppress(OSError):  # the child died just now: no one will reply
                        socket.send_fds(self._control, [b"w"], [theirs.fileno()])
            with contextlib.suppress(OSError):      # TimeoutError too; b"" is a worker that died
                worker.settimeout(WAIT_TIMES * self.timeout_s)
                worker.sendall(question.encode())
                reply = worker.recv(100)
            with self._lock:
                self.timeouts += not reply
        finally:
            if worker and not reply:                # it ends, by its alarm if it hangs
                worker.close()
            self._slots.put((process, worker) if reply else (None, None))
        return reply.decode() or LATE

    def _start(self):
        self.close()                                # what a dead one left
        env = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
        self._control, theirs = socket.socketpair()
        with theirs:                                # its cwd is where minimath is imported from
            self.process = subprocess.Popen([sys.executable, "-B", "-m", "minimath.grading.sandbox"], env=env,
                                            cwd=Path(__file__).resolve().parents[2], stdin=theirs,
                                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                            start_new_session=True)  # Ctrl-C is for this process to hear
        self.starts += 1
        self._control.settimeout(START_S)
        fault = "ended as it started; try `python -c 'import math_verify'`, and reinstall math-verify if that fails"
        try:
            if self._control.recv(1):
                return
        except OSError as error:                    # reset: it ended
            if isinstance(error, TimeoutError):
                fault = f"was not ready in {START_S:g} s: this machine is too busy; try again (a run with resume=true)"
        self.close()
        raise UserError(f"answer checker: the math-verify child process {fault}")

    def close(self):
        """End the child and its workers; the next question starts it again."""
        with self._lock:
            if self.process is not None:
                if self.process.poll() is None:
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
                self._control.close()
            self.process = None


# ---- the child process

def _serve(control: socket.socket) -> None:
    """Fork a worker for each socket that comes, until the other end closes."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)   # dead workers leave no zombies
    for gold, answer in WARM_UP:
        _equal(gold, answer)
    for limit, most in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (most, most))
    control.sendall(b"r")
    while True:
        message, sockets, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            try:
                _work(socket.socket(fileno=sockets[0]))
            finally:
                os._exit(1)
        os.close(sockets[0])


def _work(connection: socket.socket) -> None:
    """Reply to questions, one a line; the alarm's default action ends the process."""
    for line in connection.makefile("rb"):
        seconds, kind, first, second = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            if kind == "equal":
                reply = _equal(first, second)
            else:
                reply = "right" if re.fullmatch(first, second, re.IGNORECASE | re.DOTALL) else "wrong"
        except MemoryError:
            raise                                   # who knows what it left half done: this worker ends
        except Exception:                           # any: the parser was not made for hostile text
            reply = "wrong"
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.sendall(reply.encode())


def _equal(gold: str, answer: str) -> str:
    """Compare two expressions, equations or sets that were read from end to end."""
    from math_verify import verify
    from sympy import Eq, Expr
    right, read = _read(gold), _read(answer)
    if right is None or read is None:
        return "bad gold" if right is None else "wrong"
    if isinstance(right, Expr) and isinstance(read, Expr):
        same = _same_expression(right, read, gold, answer)
    elif isinstance(right, Eq) or isinstance(read, Eq):  # verify takes x - y = 3 for x + y = 3
        same = isinstance(right, Eq) and isinstance(read, Eq) and _same_equation(right, read)
    else:                                           # not symmetric: wants the gold first
        same = isinstance(right, Expr) == isinstance(read, Expr) and verify(
            right, read, float_rounding=PRECISION, numeric_precision=PRECISION, timeout_seconds=None)
    return "right" if same else "wrong"


def _same_expression(right, read, gold: str, answer: str) -> bool:
    """Compare exactly, or to the digits of the one that is a decimal."""
    import sympy
    if right == read:
        return True
    if right.free_symbols or read.free_symbols:
        return sympy.simplify(right - read) == 0 or bool(
            right.free_symbols and read.free_symbols) and _same_everywhere(right, read)
    for text, other in ((gold, read), (answer, right)):
        decimal = read_number(text)
        if decimal and decimal.step:
            value = sympy.N(other, PRECISION)
            return bool(value.is_real and value.is_finite) and rounds_to(Fraction(str(value)), decimal)
    if right.is_Rational and read.is_Rational:
        return False
    value = (right - read).evalf(15, maxn=MAX_PRECISION)
    parts = value.as_real_imag()
    return bool(value.is_finite is not False and all(
        part.is_Float and part._prec == 1 or part == 0 for part in parts)) and value.is_number


def _same_equation(right, read) -> bool:
    """Tell whether one is the other times a number, denominators cleared."""
    import sympy
    first, second = (sympy.numer(sympy.together(each.lhs - each.rhs)) for each in (right, read))
    if first.free_symbols != second.free_symbols or not first.free_symbols:
        return False
    ratio = sympy.simplify(first / second)
    return bool(ratio.is_number and ratio.is_nonzero and ratio.is_finite)


def _same_everywhere(right, read) -> bool:
    """Compare at points of both signs: real at the same ones, and equal there.

    So sqrt(4/k) is 2/sqrt(k), and |x| is not x.
    """
    import sympy
    symbols, points = sorted(right.free_symbols | read.free_symbols, key=str), 0
    for k in range(POINTS):
        at = {symbol: sympy.Rational((-1) ** (k // (i + 1)) * (37 * k + 11 * i + 13), 29 + 7 * i + k)
              for i, symbol in enumerate(symbols)}
        a, b = (sympy.N(side.subs(at), PRECISION) for side in (right, read))
        real = [bool(side.is_real and side.is_finite) for side in (a, b)]
        if real[0] != real[1] or not (a.is_number and b.is_number):
            return False
        if all(real):
            points += 1
            if abs(a - b) > abs(a) * sympy.Float(10) ** (8 - PRECISION):
                return False
    return points >= POINTS // 4


@functools.lru_cache(maxsize=1024)
def _read(answer: str):
    """Return what math-verify's parser reads of a whole answer, else None."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
    from math_verify.grader import should_treat_as_complex

    class Whole(_Latex2Sympy):
        def create_parser(self, text):
            self.parser = super().create_parser(text)
            return self.parser

    reader = Whole(is_real=not should_treat_as_complex(answer))
    try:
        found = reader.parse(answer)
    except MemoryError:
        raise
    except Exception:                               # any: it was not made for hostile text
        return None
    if reader.parser.getCurrentToken().type != -1:  # not the end: the rest was not read
        return None
    floats = {number: sympy.Rational(str(number)) for number in getattr(found, "atoms", lambda _: ())(sympy.Float)}
    return found.xreplace(floats) if floats else found


if __name__ == "__main__":
    _serve(socket.socket(fileno=0))
