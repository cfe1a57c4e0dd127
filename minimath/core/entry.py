"""Run a command: what a user can put right becomes one line on the terminal and an exit status."""
import contextlib
import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable

from minimath.core.errors import NO_MEMORY, Interrupted, UserError, is_out_of_memory
from minimath.core.segments import grow_segments

# All are read when a library is loaded; see core.run.keep_freed_memory, core.threads
grow_segments()
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if "OMP_WAIT_POLICY" not in os.environ:  # some 20 us and not 7 ms: as fast alone, faster beside others
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# oneDNN keeps compiled products, one per shape, of half a MiB each: by default 1,024, and a step needs some 100
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "512")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

OF_A_PATH = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOSPC, errno.EDQUOT,  # a user can mend
             errno.ENOTDIR, errno.EEXIST}  # a file where a folder is to be


def run_command(action: Callable[[], object]) -> int:
    """Run action and return an exit status, with one line for a UserError.

    action may return a status, or a summary whose `signal` says that a run was stopped."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries: a user can do nothing about them
    logging.getLogger("datasets").setLevel(logging.ERROR)
    with contextlib.suppress(AttributeError, ValueError):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 must not stop a command
    try:
        result = action()
        print(end="", flush=True)  # who reads it may have left
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:  # training has its own care and words
        if not is_out_of_memory(error):
            raise
        said = str(error).replace("\n", ". ").split(". ")
        where = next((part for part in said if any(words in part for words in NO_MEMORY)), said[0]) or "of the CPU"
        print(f"error: out of memory ({where}): try quant=nf4, a lower max_num_seqs or max_new_tokens, or a smaller "
              "model; resume=true goes on with what was saved", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        result = {"signal": stopped.args[0]}
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in OF_A_PATH:
            raise
        print(f"error: {error.filename or 'a file'}: {error.strerror}; choose another place, or check permissions and "
              "space", file=sys.stderr)
        return 2
    status = result if isinstance(result, int) else 0
    if isinstance(result, dict) and result.get("signal"):
        status = 128 + result["signal"]
    if started_together():
        from minimath.core import dist
        dist.leave(status)
    return status


def started_together() -> bool:
    """Tell as dist.state does, without torch, whether a launcher started several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
