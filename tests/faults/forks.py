"""Runs of the command line in forked children, each with hooks set at chosen moments.

`python -m forks HOOKS` imports minimath once and forks a child for each run it is told of, which spares the seconds of
the import. It has a single thread, so forking is safe. HOOKS is a module with set_hooks(run, given).
"""
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from harness import child_env

LIMIT_S = 240  # a child that takes longer ends by SIGALRM, status -14


# ---- the parent's side

@contextlib.contextmanager
def open_forks(folder: Path, hooks: str, **env: str) -> Iterator[Callable[..., int]]:
    """Yield fork(words, run, given=None, **env) -> exit status, negative for a signal.

    The run folder is `run`; beside it grow run.log (what was printed) and what the hooks write.
    """
    command = [sys.executable, "-m", "forks", hooks]
    with subprocess.Popen(command, cwd=folder, env=child_env(**env), text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as parent:

        def fork(words: list[str], run: Path, given=None, **own: str) -> int:
            parent.stdin.write(json.dumps({"words": words, "run": str(run), "given": given, "env": own}) + "\n")
            parent.stdin.flush()
            return int(parent.stdout.readline())  # "" when the parent died: a ValueError

        yield fork
        parent.stdin.close()


def words_of(command: str, options: dict) -> list[str]:
    """The command line of a run."""
    return [command, *(f"{key}={value}" for key, value in options.items())]


def beside(run: Path, ending: str) -> Path:
    """The file RUN.ending beside a run folder."""
    return run.with_name(f"{run.name}.{ending}")


def last_line(run: Path) -> str:
    """The last line that a run printed."""
    lines = beside(run, "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


# ---- the child's side

def serve(hooks: str) -> None:
    """Fork a child for each json line of stdin; answer with its exit status, negative for a signal."""
    import bitsandbytes  # noqa: F401  these so that no child has to
    import openai  # noqa: F401
    import peft

    import minimath.commands.run
    import minimath.eval.evaluate  # noqa: F401
    peft.PeftModel.create_or_update_model_card = lambda *_: None  # half of a save's time, for a file that is not kept
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored
    if Path("/proc/self/task").exists() and len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("an import has started a thread: forking is not safe")
    set_hooks = importlib.import_module(hooks).set_hooks
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if not pid:
            run_job(job, set_hooks)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def run_job(job: dict, set_hooks: Callable) -> None:
    """In the child: the command line with the hooks set; never returns."""
    status = 99
    try:
        os.setpgid(0, 0)
        signal.alarm(LIMIT_S)
        run = Path(job["run"])
        log = os.open(beside(run, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(source, number)
        os.environ.update(job["env"])
        set_hooks(run, job["given"])
        sys.argv = ["minimath", *job["words"]]
        from minimath.cli import main
        status = main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wrap(owner, name: str, before=None, after=None) -> None:
    """Replace owner.name by itself with before(*args, **kwargs) and after(value, *args, **kwargs) around it."""
    real = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if before:
            before(*args, **kwargs)
        value = real(*args, **kwargs)
        if after:
            after(value, *args, **kwargs)
        return value

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    serve(sys.argv[1])
