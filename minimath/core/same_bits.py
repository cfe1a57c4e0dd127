"""The same bits from the same run: what deterministic=true asks of torch on a card.

A CPU gives them anyway, with the same number of threads. Minimath's own kernels add in a fixed order."""
import contextlib
import os
from collections.abc import Iterator

import torch

from minimath.core.errors import UserError

WORKSPACE, SIZES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # with which cuBLAS repeats its sums
SAID = ("deterministic=true: the same bits again on this card with these versions, except where max_num_seqs=0 follows "
        "the free memory (give a number), memory runs out, top_p cuts a single sequence, or vLLM samples")


@contextlib.contextmanager
def same_bits(asked: bool) -> Iterator[None]:
    """Have torch compute deterministically inside, if asked, and as before after that.

    Where torch has no such algorithm it raises. Raises UserError where cuBLAS has begun without WORKSPACE, which it
    reads once, and which therefore stays once CUDA has started."""
    if not asked:
        yield
        return
    given = os.environ.get(WORKSPACE)
    os.environ.setdefault(WORKSPACE, SIZES[0])
    try:
        with setting(True, (torch.backends.cudnn, "deterministic", True), (torch.backends.cudnn, "benchmark", False),
                     (torch.utils.deterministic, "fill_uninitialized_memory", False)):  # with NaN, in empty tensors
            if given not in (None, *SIZES) or has_begun():
                why = f"it is {given!r}" if given else "products have run without it"
                raise UserError(f"deterministic=true needs the environment variable {WORKSPACE}={SIZES[0]} from the "
                                f"start, and {why}: export {WORKSPACE}={SIZES[0]}, then start again")
            yield
    finally:
        if given is None and not torch.cuda.is_initialized():
            del os.environ[WORKSPACE]


@contextlib.contextmanager
def setting(mode: bool, *switches: tuple) -> Iterator[None]:
    """Set torch's mode, and switches (where, name, value), inside."""
    mode_before, before = torch.get_deterministic_debug_mode(), [(*at, getattr(*at)) for *at, _ in switches]
    torch.use_deterministic_algorithms(mode)
    for switch in switches:
        setattr(*switch)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode_before > 0, warn_only=mode_before == 1)
        for switch in before:
            setattr(*switch)


@contextlib.contextmanager
def in_any_order() -> Iterator[None]:
    """Let torch run inside what it does not call deterministic: running sums on a card.

    Those of many rows, one block of threads each, are; a single long one is added up by many blocks at once."""
    with setting(False) if torch.are_deterministic_algorithms_enabled() else contextlib.nullcontext():
        yield


def has_begun() -> bool:
    """Tell whether cuBLAS began without WORKSPACE, which torch says of a product."""
    if not torch.cuda.is_initialized():
        return False
    one = torch.ones(1, 1, device="cuda")
    try:
        torch.mm(one, one)
    except RuntimeError as error:
        if WORKSPACE not in str(error):
            raise
        return True
    return False
