"""Two more kernels that a training step could have, on paper: the policy loss in one launch, and a product
that reads NF4 weights. Each is written only if the count says it matters."""

from __future__ import annotations

from typing import NamedTuple

from .cards import Card, Head
from .work import LAUNCH_SECONDS, chunk_passes

# Small kernels of minimath.train.losses' dapo loss of one chunk, forward and backward under autograd, as
# count_policy_launches counts them.
POLICY_LAUNCHES = 39
NO_KERNEL = (  # operators that only move a pointer, set a shape or allocate
    "detach view as_strided expand to _to_copy empty empty_strided empty_like ones_like zeros_like "
    "resize_ alias unsqueeze squeeze select slice reshape _unsafe_view result_type lift_fresh item "
    "_local_scalar_dense promote_types resolve_conj resolve_neg unbind transpose is_nonzero split_with_sizes "
    "as_strided_"
).split()
NF4_BYTES = 0.5 + 4 / 64  # a weight, and an fp32 absmax for each 64 of them
DEQUANT_FLOPS = 8  # table look-up, scale, cast, of one weight
WORTH = 1.2  # a kernel of our own must be this much faster on paper


def count_launches(step) -> int:
    """Kernels that a call of step() launches, counted by torch's profiler on the CPU: operators that call no
    other."""
    import torch

    def launches(event) -> bool:
        return event.name.startswith("aten::") and event.name[6:] not in NO_KERNEL

    def within(event) -> bool:
        return any(launches(child) or within(child) for child in event.cpu_children)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return sum(launches(event) and not within(event) for event in profile.events())


def count_policy_launches() -> int:
    """Kernels of the dapo loss of one chunk and its gradient. Imports torch and minimath."""
    import torch

    from minimath.kernels import TokenStats
    from minimath.train.losses import PolicyRows, policy_loss

    count = 64
    ones, rows = torch.ones(count), torch.arange(count)
    loss_fn = policy_loss(PolicyRows(advantage=ones, weight=ones, sampled_logp=-ones))
    leaves = TokenStats(*(torch.randn(count).requires_grad_() for _ in TokenStats._fields))
    return count_launches(lambda: torch.autograd.grad(loss_fn(leaves, rows).sum(), leaves, allow_unused=True))


def count_sweep_launches() -> int:
    """Kernels that one more chunk of kernels.linear_token_loss adds, its tiles left out: what a second chunk
    adds less what a second tile adds. With the plainest loss, which is four of them."""
    import torch

    from minimath.kernels import linear_token_loss

    rows, columns, width = 64, 4096, 32  # columns: a whole tile on a CPU

    def count(chunks: int, tiles: int) -> int:
        hidden = torch.randn(rows * chunks, width).bfloat16().requires_grad_()
        weight = torch.randn(columns * tiles, width).bfloat16()
        target = torch.arange(rows * chunks)
        budget = rows * columns * 2

        def step():
            loss_fn = lambda stats, index: -stats.logp
            linear_token_loss(hidden, weight, target, loss_fn, workspace_bytes=budget)[0].backward()

        return count_launches(step)

    one = count(1, 1)
    return count(2, 1) - one - (count(1, 2) - one)


class LossShare(NamedTuple):
    """What the loss function's small kernels cost beside the rest of a chunk."""

    chunk_seconds: float
    loss_seconds: float
    share: float  # of the chunk
    host_bound: bool  # issuing a chunk's operators takes the host longer than the device needs for the chunk


def policy_share(card: Card, head: Head, rows: int, columns: int, host_seconds: float = 8e-6) -> LossShare:
    """Share of the policy loss, left to torch, in one chunk; host_seconds: issue of one operator with
    autograd."""
    passes = chunk_passes(card, head, rows, columns, POLICY_LAUNCHES)
    total, loss = sum(each.seconds(card) for each in passes), POLICY_LAUNCHES * LAUNCH_SECONDS
    issued = sum(each.launches for each in passes) * host_seconds
    return LossShare(total, loss, loss / total, issued > total)


class Nf4(NamedTuple):
    """Seconds per weight of a linear layer, times one thousand million."""

    plain: float  # dequantise to memory, then a 16-bit product
    fused: float  # a product that dequantises its tiles
    speedup: float
    worth: bool


def nf4(card: Card, tokens: int, block_rows: int = 128) -> Nf4:
    """A frozen NF4 weight times `tokens` rows. plain: 0.56 B read, 2 B written, 2 B read again by the product
    (a layer of a 7B model does not fit L2). fused: 0.56 B read; every row tile dequantises the weight again,
    on the fp32 units, not hidden behind the tensor cores."""
    gemm = 2 * tokens / card.tensor_flops
    plain = (NF4_BYTES + 2) / card.bandwidth + max(gemm, 2 / card.bandwidth)
    again = -(-tokens // block_rows)
    fused = max(gemm, NF4_BYTES / card.bandwidth) + again * DEQUANT_FLOPS / card.fp32_flops
    return Nf4(plain * 1e9, fused * 1e9, plain / fused, plain / fused >= WORTH)
