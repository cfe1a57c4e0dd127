"""More than one process: what the loops share when `accelerate launch` or `torchrun` starts several of them.

    torchrun --nproc_per_node 4 -m minimath sft ...

Data parallel: every process holds the whole model, takes every world-th row or problem of the step, and divides by the
trained tokens of the *whole* step: gradients and metrics are sums over processes, the step is that of one process up to
the order of additions. Process 0 judges, writes and prints. With one process every function here returns at once.
"""
import atexit
import datetime
import functools
import os
import sys

import torch
import torch.distributed

TIMEOUT_H = 6.0  # process 0 may have a judge to wait for


@functools.cache
def state():
    """Find accelerate's PartialState, which starts the group; None with one process."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import PartialState
    cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return PartialState(cpu=cpu, timeout=datetime.timedelta(hours=TIMEOUT_H))


def world() -> int:
    """Number of processes."""
    return state().num_processes if state() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return state().process_index if state() else 0


def is_main() -> bool:
    """Whether this process writes, prints and judges."""
    return rank() == 0


def local_card() -> str:
    """Name this process's card, "cuda:N"; "" with one process, and on a CPU."""
    return str(state().device) if state() and state().device.type == "cuda" else ""


def barrier() -> None:
    if state():
        state().wait_for_everyone()


def shard(items: list) -> list:
    """This process's part of `items`: every world-th."""
    return items[rank()::world()]


def gather(mine: list) -> list:
    """Collect the items of all processes, in the order that shard took them from."""
    parts = of_all(mine)
    return [part[place] for place in range(max(map(len, parts))) for part in parts if place < len(part)]


def of_all(value) -> list:
    """The value of each process, by rank."""
    if not state():
        return [value]
    parts: list = [None] * world()
    torch.distributed.all_gather_object(parts, value)
    return parts


def broadcast(value):
    """Process 0's value, on all processes."""
    return of_all(value if is_main() else None)[0]


def all_reduce_sum(numbers: dict[str, float]) -> dict[str, float]:
    """Each number summed over processes; one that a process lacks counts as 0 there."""
    if not state():
        return numbers
    parts = of_all(numbers)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


@torch.no_grad()
def all_reduce_gradients(params) -> None:
    """Replace every .grad, or its lack, by its fp32 sum over processes."""
    if not state():
        return
    params = list(params)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in params])
    torch.distributed.all_reduce(flat)
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad = part.view_as(p).to(p.dtype)


@torch.no_grad()
def broadcast_parameters(params) -> None:
    """Give all processes the parameters of process 0."""
    if state():
        for p in params:
            torch.distributed.broadcast(p.data, src=0)


def leave(status: int = 0) -> None:
    """Close the process group at the end of the command; with gloo the process ends here, with `status`.

    torch's cache of sharded operations keeps the group, and so gloo's threads, alive. One that still holds a tensor
    while the interpreter ends aborts the process (pytorch #179291), and the whole run then counts as failed.
    """
    if not state() or not torch.distributed.is_initialized():
        return
    threads = torch.distributed.get_backend() == "gloo"
    torch.distributed.destroy_process_group()
    if threads:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
