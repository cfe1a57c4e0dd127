"""A forked child whose every change to a folder waits for a verdict: let it pass, fail it with an errno, or kill there.

Interposed at the system calls, by seccomp's user notifications (Linux 5.0 or newer on x86-64, no root needed): the
kernel holds each call that changes files until the parent has answered. So what Rust writes (safetensors) counts as
what Python does; `strace -f` of a save shows the same calls. Writes to other places are let through, uncounted.
"""
import ctypes
import fcntl
import json
import os
import platform
import select
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

# name: (number on x86-64, arguments: f file descriptor, d folder's descriptor, p path)
CALLS = {"write": (1, "f"), "open": (2, "p"), "pwrite64": (18, "f"), "writev": (20, "f"), "sendfile": (40, "f"),
         "fsync": (74, "f"), "fdatasync": (75, "f"), "truncate": (76, "p"), "ftruncate": (77, "f"), "rename": (82, "p"),
         "mkdir": (83, "p"), "rmdir": (84, "p"), "creat": (85, "p"), "link": (86, "p"), "unlink": (87, "p"),
         "symlink": (88, "p"), "chmod": (90, "p"), "fchmod": (91, "f"), "openat": (257, "dp"), "mkdirat": (258, "dp"),
         "unlinkat": (263, "dp"), "renameat": (264, "dp"), "linkat": (265, "dp"), "symlinkat": (266, "pd"),
         "fallocate": (285, "f"), "pwritev": (296, "f"), "renameat2": (316, "dp"), "copy_file_range": (326, "xxf")}
NAMES = {number: name for name, (number, _) in CALLS.items()}
FLAGS = {2: 24, 257: 32}  # open and openat: where their flags lie in seccomp_data
CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
LIBC = ctypes.CDLL(None, use_errno=True)
RECEIVE, SEND, PASS_ON = 0xC0502100, 0xC0182101, 1  # ioctls of the notifications, and their flag "continue"
KILL, TEAR = -1, -2  # verdicts besides 0 (pass) and an errno; TEAR: write the first half, then kill


@dataclass
class Call:
    """A system call that is about to change the folder; path: relative to it."""
    name: str
    path: str
    pid: int
    args: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.path}"


@dataclass
class Outcome:
    """What became of a child: exit status (-9: killed), what its job returned, the error it raised ("UserError") and
    its words, and the calls in order."""
    status: int
    value: object
    error: str
    words: str
    calls: list[Call]


def watched(job: Callable, folder: Path, verdict: Callable[[int, Call], int] = lambda n, call: 0) -> Outcome:
    """Run job() in a fork of this process; verdict(n, call) -> 0, errno, KILL or TEAR for its n-th change of `folder`
    (from 1). The job's value must be json-able. Its stdout and stderr go nowhere."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        run_job(job, theirs)
    theirs.close()
    with ours:
        _, [listener], _, _ = socket.recv_fds(ours, 1, 1)
        try:
            calls = supervise(listener, pid, str(folder.resolve()), verdict)
        finally:
            os.close(listener)
            _, status = os.waitpid(pid, 0)
        said = b"".join(iter(lambda: ours.recv(65536), b""))
    value, error, words = json.loads(said) if said else (None, "", "")
    return Outcome(os.waitstatus_to_exitcode(status), value, error, words, calls)


def run_job(job: Callable, channel: socket.socket) -> None:
    """In the child: hold the calls, run the job, tell the parent; never returns."""
    try:
        settle_child()
        socket.send_fds(channel, [b"x"], [hold_changes()])
        try:
            told = job(), "", ""
        except Exception as error:
            told = None, type(error).__name__, "\n".join([str(error), *traceback.format_tb(error.__traceback__)[-1:]])
        channel.sendall(json.dumps(told).encode())
    finally:
        os._exit(0)


def settle_child(output: int | None = None) -> None:
    """In a fork: one thread (a pool of the parent's is gone), and stdout and stderr to `output`, default nowhere."""
    torch.set_num_threads(1)
    output = os.open(os.devnull, os.O_WRONLY) if output is None else output
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout = sys.stderr = open(1, "w", encoding="utf-8", closefd=False)


def hold_changes() -> int:
    """Install the filter in this process -> descriptor of the listener. Raises RuntimeError where there is none."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise RuntimeError("interposing file-system calls needs Linux on x86-64")
    program = b"".join(instruction(*words) for words in filter_program())
    code = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)))
    LIBC.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    listener = LIBC.syscall(317, 1, 8, header)  # seccomp(SET_MODE_FILTER, NEW_LISTENER)
    if listener < 0:
        raise RuntimeError(f"no seccomp notifications here: {os.strerror(ctypes.get_errno())}")
    return listener


def instruction(code: int, if_true: int, if_false: int, operand: int) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, operand)


def filter_program() -> list[tuple[int, int, int, int]]:
    """BPF: hold the calls of CALLS, open and openat only where their flags may change something; allow the rest."""
    load, equal, any_bit, answer = 0x20, 0x15, 0x45, 0x06
    allow, notify = (answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x7FC00000)
    program = [(load, 0, 0, 0)]
    for number, offset in FLAGS.items():
        program += [(equal, 0, 4, number), (load, 0, 0, offset), (any_bit, 0, 1, CHANGES), notify, allow]
    for number in set(NAMES) - set(FLAGS):
        program += [(equal, 0, 1, number), notify]
    return [*program, allow]


def supervise(listener: int, pid: int, root: str, verdict: Callable[[int, Call], int]) -> list[Call]:
    """Answer the child's calls until it has ended; the list of those within `root`."""
    calls, poll = [], select.poll()
    poll.register(listener, select.POLLIN)
    while True:
        events = poll.poll(100)
        if not events:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return calls
            continue
        if not events[0][1] & select.POLLIN:
            return calls
        notice = bytearray(80)
        try:
            fcntl.ioctl(listener, RECEIVE, notice, True)
        except FileNotFoundError:  # the caller was killed meanwhile
            continue
        key, caller, _, number, _, _, *args = struct.unpack("QIIiIQ6Q", notice)
        answer = 0
        call = named(caller, NAMES[number], tuple(args), root)
        if call:
            calls.append(call)
            answer = verdict(len(calls), call)
        if answer < 0:
            if answer == TEAR:
                write_half(call)
            os.kill(pid, signal.SIGKILL)
            continue
        try:
            fcntl.ioctl(listener, SEND, struct.pack("QqiI", key, 0, -answer, 0 if answer else PASS_ON))
        except FileNotFoundError:
            continue


def named(pid: int, name: str, args: tuple[int, ...], root: str) -> Call | None:
    """The call with the path it changes, None when that lies outside `root`."""
    base = f"/proc/{pid}/cwd"
    path = ""
    try:
        for kind, value in zip(CALLS[name][1], args):
            value_fd = ctypes.c_int(value & 0xFFFFFFFF).value
            if kind == "f" or (kind == "d" and value_fd >= 0):
                base = f"/proc/{pid}/fd/{value_fd}"
            elif kind == "p":
                path = read_text(pid, value)
        full = os.path.join(os.readlink(base), path).removesuffix(" (deleted)")
    except OSError:
        return None
    return Call(name, os.path.relpath(full, root), pid, args) if full.startswith(root + "/") or full == root else None


def read_text(pid: int, address: int) -> str:
    """The C string at an address of another process."""
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        data = b""
        while b"\0" not in data:  # up to the page's end at a time: the next one may not be mapped
            data += os.pread(memory, 4096 - (address + len(data)) % 4096, address + len(data))
        return os.fsdecode(data.split(b"\0")[0])
    finally:
        os.close(memory)


def write_half(call: Call) -> None:
    """Do the first half of a held write(fd, data, length) in the caller's stead."""
    number, address, length = call.args[:3]
    position = int(Path(f"/proc/{call.pid}/fdinfo/{number}").read_text().split()[1])
    memory, file = os.open(f"/proc/{call.pid}/mem", os.O_RDONLY), os.open(f"/proc/{call.pid}/fd/{number}", os.O_WRONLY)
    try:
        os.pwrite(file, os.pread(memory, length // 2, address), position)
    finally:
        os.close(memory)
        os.close(file)
