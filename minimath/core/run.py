"""What every stage does around its work: choose and lock the run folder, save the options, start the log."""
import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

from minimath.core import dist, run_folder
from minimath.core.checkpoint import list_checkpoints
from minimath.core.files import write_whole
from minimath.core.interrupt import interruptible
from minimath.core.log import RunLog
from minimath.core.run_folder import CONFIG, lock_run
from minimath.core.same_bits import SAID, same_bits


def keep_freed_memory() -> None:
    """Keep freed memory and use huge pages, on Linux: a fifth faster on 2 cores.

    glibc would give activations of megabytes back and fault them in again. For huge pages: before the first tensor."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another libc
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            for option, value in ((-3, 1 << 25), (-1, (1 << 31) - 1), (-2, 1 << 26)):  # mmap and trim threshold, pad
                mallopt(option, value)


@contextlib.contextmanager
def open_run(out: str, command: str, *, config: str, resume: bool, trackers: str = "",
             deterministic: bool = False) -> Iterator[RunLog]:
    """Lock the folder, save the options, start log and signal handlers; yield the log.

    deterministic: as same_bits has it, until the run ends. Raises UserError when the folder already holds a run that is
    not being resumed: nothing is ever overwritten."""
    keep_freed_memory()
    run_dir, evaluation = run_folder.new_run_folder(out, command, resume=resume), command == "eval"
    dist.barrier()  # until all have chosen the same folder, the first must not begin to fill it
    if dist.is_main():
        run_folder.refuse_links(run_dir)
        run_folder.refuse_held(run_dir, evaluation=evaluation, resume=resume)
        written = CONFIG, run_folder.METRICS, run_folder.SAMPLES, run_folder.COMPLETIONS
        run_folder.refuse_foreign(run_dir, *written)
    with same_bits(deterministic), lock_run(run_dir), RunLog(run_dir, f"minimath {command}", trackers) as log:
        if not (resume and list_checkpoints(run_dir)):  # else the trainer does, if the options are those of one
            write_whole(run_dir / CONFIG, config)
        if dist.world() > 1:
            log.say(f"{dist.world()} processes share every step")
        if deterministic:
            log.say(SAID)
        dist.barrier()
        files = run_folder.stop_files(run_dir)
        log.say(f"to stop it cleanly: Ctrl-C, or touch {files[0]}")
        kept = "stopping; the completions that have ended are kept" if evaluation else \
            "stopping after this step with a checkpoint"
        with interruptible(files, log.say, kept):
            yield log
