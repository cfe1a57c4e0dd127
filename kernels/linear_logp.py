"""Log-probability (and entropy, log-sum-exp, mean log-prob) of targets under a linear head's softmax.

Forward-only it is what the reference policy, the judge and evaluation need: on a GPU one kernel whose logits never
leave the registers. Where a gradient is needed, forward and backward make the same tiles of logits (`tiles`), so that
the probabilities of backward sum to 1, and nothing but (N,) numbers is kept between the two.
"""
from __future__ import annotations

import torch

from .common import (
    INTERPRET,
    architecture,
    differentiable,
    dot_precision,
    jit,
    on_device,
    processors,
    runs_as_it_is,
    runs_triton,
    tl,
    triton,
    wide,
)
from .head import Gradients, Scaling, TokenStats, cast_operands, check_arguments, kept_rows
from .tiles import chunks, forward_tiles, gradient_tiles

PARTIALS = 5  # running numbers of a (row, part of the vocabulary): maximum, sum, weighted sum, plain sum, target


@jit("rows", "out_stride")
def logp_kernel(hidden, weight, bias, target, out, rows, vocab, width, vocab_per_split, hidden_stride, weight_stride,
                out_stride, inner, outer, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr,
                UPCAST: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
                BLOCK_D: tl.constexpr):
    """Reduce a (BLOCK_N, BLOCK_V) tile of logits in registers; one program per (rows, part of the vocabulary).

    hidden (N, D), weight (V, D), bias (V,), target (N,) -> out (splits, 5, N) fp32: PARTIALS of each part,
    which `merge` adds up in a fixed order. EVEN_D: D is a multiple of BLOCK_D.
    """
    row_blocks = tl.cdiv(rows, BLOCK_N)
    row = (tl.program_id(0) % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)  # neighbours share the weight tile in L2
    split = tl.program_id(0) // row_blocks
    here = row < rows
    wanted = tl.load(target + row, mask=here, other=-1)
    # what lies past the end reads the last row or column: no mask in the inner loop; `inside` and `here` drop it
    hidden_rows = hidden + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * hidden_stride
    top = tl.full([BLOCK_N], -1e30, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    weighted, plain, target_z = total, total, total
    last = tl.minimum((split + 1) * vocab_per_split, vocab)
    for start in range(split * vocab_per_split, last, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        inside = column < last
        weight_rows = weight + tl.minimum(column, vocab - 1).to(tl.int64)[None, :] * weight_stride
        z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for depth in range(0, width, BLOCK_D):
            k = depth + tl.arange(0, BLOCK_D)
            if EVEN_D:
                x = tl.load(hidden_rows + k[None, :])
                w = tl.load(weight_rows + k[:, None])
            else:
                x = tl.load(hidden_rows + k[None, :], mask=(k < width)[None, :], other=0.0)
                w = tl.load(weight_rows + k[:, None], mask=(k < width)[:, None], other=0.0)
            if UPCAST:  # the interpreter's bf16 product is wrong
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            z = tl.dot(x, w, z, input_precision=PRECISION)
        if HAS_BIAS:
            z += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        z = z * inner
        if HAS_CAP:
            z = outer * (2.0 * tl.sigmoid(2.0 * z) - 1.0)
        plain += tl.sum(tl.where(inside[None, :], z, 0.0), 1)
        target_z += tl.sum(tl.where(column[None, :] == wanted[:, None], z, 0.0), 1)
        z = tl.where(inside[None, :], z, -1e30)
        new = tl.maximum(top, tl.max(z, 1))
        rescale = tl.exp(top - new)
        z -= new[:, None]
        e = tl.exp(z)  # exactly 0 where z is -1e30, or the -inf of a bias that masks
        weighted = (weighted + total * (top - new)) * rescale + tl.sum(tl.where(e > 0.0, e * z, 0.0), 1)
        total = total * rescale + tl.sum(e, 1)
        top = new
    place = out + split.to(tl.int64) * 5 * out_stride + row
    tl.store(place, top, mask=here)
    tl.store(place + out_stride, total, mask=here)
    tl.store(place + 2 * out_stride, weighted, mask=here)
    tl.store(place + 3 * out_stride, plain, mask=here)
    tl.store(place + 4 * out_stride, target_z, mask=here)


# (BLOCK_N, BLOCK_V, BLOCK_D, num_warps, num_stages) of logp_kernel for 16-bit aligned operands: one of the largest
# tiles (`bench.compile --space`) that keep everything in registers and within the chip's shared memory.
TILES = {
    "sm_90": (128, 128, 64, 8, 4),
    "sm_100": (128, 64, 64, 8, 4),  # 128 columns spill there
    "gfx1100": (128, 128, 32, 8, 2),
    "gfx942": (128, 128, 64, 8, 2),
}


def logp_config(arch: str, dtype: torch.dtype, aligned: bool) -> dict:
    """Tile of logp_kernel for a chip: one for each, so that no user waits for a search.

    bench.compile shows that none spills and that each fits the chip's shared memory. aligned: hidden size and strides
    are multiples of 16. Else loads go through registers one element at a time, and the deeper tiles spill."""
    unaligned = (64 if arch == "sm_100" else 128, 64, 32, 8, 2)
    tile = TILES.get(arch, (128, 128, 64, 8, 3)) if aligned else unaligned
    if dtype == torch.float32:
        stages = 1 if arch == "sm_120" and not aligned else 2
        tile = (64, 64, 16, 4 if arch == "gfx942" else 8, stages)
    return dict(zip(("BLOCK_N", "BLOCK_V", "BLOCK_D", "num_warps", "num_stages"), tile))


def keeps_registers(arch: str) -> bool:
    """Whether logp_kernel is the better forward on a chip.

    Not on Volta and Turing: Triton 3.7 makes no tensor-core instructions for them, and the library's products do."""
    return arch not in ("sm_70", "sm_72", "sm_75")


def merge(partials: torch.Tensor, vocab: int) -> torch.Tensor:
    """partials (splits, 5, N) -> (4, N) TokenStats rows; sums over splits in a fixed order."""
    top, total, weighted, plain, target_z = partials.unbind(1)  # each (splits, N)
    highest = top.amax(0)
    gap = top - highest
    rescale = gap.exp()
    mass = (total * rescale).sum(0)
    spread = ((weighted + total * gap) * rescale).sum(0)
    lse = highest + mass.log()
    return torch.stack((target_z.sum(0) - lse, mass.log() - spread / mass, lse, plain.sum(0) / vocab - lse))


def triton_forward(x, weight, bias, target, scaling: Scaling) -> torch.Tensor:
    """(4, M): TokenStats rows of x (M, D), all of whose targets count."""
    (rows, width), vocab, arch = x.shape, len(weight), architecture(x.device)
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    assert x.stride(1) == 1 and target.is_contiguous() and (bias is None or bias.is_contiguous())
    config = logp_config(arch, x.dtype, all(number % 16 == 0 for number in (width, x.stride(0), weight.stride(0))))
    row_blocks, columns = triton.cdiv(rows, config["BLOCK_N"]), triton.cdiv(vocab, config["BLOCK_V"])
    # few rows would leave most of the chip idle: cut the vocabulary until there are two programs per processor
    splits = max(1, min(columns, -(-2 * processors(x.device) // row_blocks)))
    per_split = triton.cdiv(columns, splits) * config["BLOCK_V"]
    splits = triton.cdiv(vocab, per_split)
    out = torch.empty((splits, PARTIALS, rows), dtype=torch.float32, device=x.device)
    with on_device(x):
        logp_kernel[(row_blocks * splits,)](
            x, weight, x if bias is None else bias, target, out, rows, vocab, width, per_split, x.stride(0),
            weight.stride(0), out.stride(1), *scaling.factors, HAS_BIAS=bias is not None, HAS_CAP=scaling.softcap > 0,
            PRECISION=dot_precision(x.dtype, arch), UPCAST=INTERPRET,
            EVEN_D=width % config["BLOCK_D"] == 0, **config)
    return merge(out, vocab)


def forward_stats(hidden, weight, bias, target, rows, scaling: Scaling, workspace_bytes, *, all_four=True,
                  in_tiles=False) -> torch.Tensor:
    """(4, N): the TokenStats rows, 0 where not in `rows` (M,) int64.

    Without all_four, entropy and mean_logp may be left at 0. in_tiles: from the logits that gradient_tiles will make,
    else on a GPU from fp32 logits in registers."""
    out = torch.zeros((4, len(hidden)), dtype=wide(hidden.dtype), device=hidden.device)
    if runs_triton(hidden) and not in_tiles and keeps_registers(architecture(hidden.device)):
        if len(rows):
            x, wanted = hidden.index_select(0, rows), target.index_select(0, rows)
            out.index_copy_(1, rows, triton_forward(x, weight, bias, wanted, scaling))
        return out
    for index, chunk in chunks(hidden, weight, bias, target, rows, scaling, workspace_bytes):
        out.index_copy_(1, index, torch.stack(forward_tiles(chunk, pull=False, all_four=all_four)[0]))
    return out


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, in_tiles, all_four, *arguments):
        *operands, scaling, workspace_bytes = arguments
        out = forward_stats(*arguments, all_four=all_four, in_tiles=in_tiles)
        ctx.save_for_backward(*operands, out)
        ctx.options = scaling, workspace_bytes
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grad_stats):
        *operands, out = ctx.saved_tensors
        grads = Gradients.zeros(operands[:3], ctx.needs_input_grad[2:])
        for index, chunk in chunks(*operands, *ctx.options):
            coefs = TokenStats(*(None if each is None else each.index_select(0, index) for each in grad_stats))
            gradient_tiles(chunk, index, TokenStats(*out.index_select(1, index)), coefs, grads)
        cast = (None if grad is None else grad.to(like.dtype) for grad, like in zip(grads, operands))
        return None, None, *cast, None, None, None, None


@runs_as_it_is
def linear_logp(hidden, weight, target, *, bias=None, temperature=1.0, softcap=0.0, logit_scale=1.0, ignore_index=-100,
                rows=None, return_stats=False, workspace_bytes=None):
    """Per-token log-prob of target under the model's head, without the (N, V) logits.

    hidden (N, D) and weight (V, D) floating point, bias (V,) or None, target (N,) int64. Returns logp (N,),
    or TokenStats of four (N,) with return_stats; fp32 (fp64 for fp64 input), 0 at rows whose target is
    ignore_index. rows (M,) int64: the rows that count, as in linear_token_loss; without it a GPU is waited for twice.
    Differentiable in hidden, weight and bias where they require grad. Raises ValueError on bad arguments.
    """
    scaling = Scaling(float(temperature), float(softcap), float(logit_scale))
    check_arguments(hidden, weight, target, bias, scaling)
    hidden, weight, bias = cast_operands(hidden, weight, bias)
    rows = kept_rows(target, ignore_index, len(weight), rows)
    arguments = hidden, weight, bias, target, rows, scaling, workspace_bytes
    with torch.autocast(hidden.device.type, enabled=False):
        stats = TokenStats(*_LinearLogp.apply(differentiable(hidden, weight, bias), return_stats, *arguments))
    return stats if return_stats else stats.logp
