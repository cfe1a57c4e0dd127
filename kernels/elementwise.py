"""RMSNorm, rotary embedding and gated activation of a decoder layer, forward and backward, for frozen weights.

    y = x r (o + w),  r = (mean x^2 + eps)^(-1/2)     dx = r (g - x r mean(g x r)),  g = dy (o + w)     (N, D)
    (y1, y2) = (x1 c - x2 s, x2 c + x1 s)             the same with -s
    h = act(a) u                                      da = dh u act'(a),  du = dh act(a)

o is 0, or 1 where a model stores w - 1 (Gemma). On a GPU each array is read once and written once, arithmetic is fp32,
a result is rounded when it is stored. On a CPU it is the fewest torch operations, 16-bit values rounded in between
where transformers rounds them too: a compiled pass saved less than a run waited for the compiler. Rows may be strided,
their last dimension not.

The kernels of norms and rotations take rows of D numbers, (token n, head h) at n * stride + h * head_stride, several of
them a program where D is small. Nothing is tuned at run time: 8 numbers a thread, so that loads are 16 bytes wide.
"""
from __future__ import annotations

import torch
from torch.nn import functional

from .common import architecture, jit, on_device, runs_triton, tl, triton, wide

TILE = 1024  # numbers a program has at least: 128 threads


@jit("rows")
def norm_kernel(x, weight, r, y, x_stride, eps, rows, heads, width, OFFSET: tl.constexpr, AGAIN: tl.constexpr,
                ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y = x r (OFFSET + weight) of ROWS rows, y (rows, D); r (rows,) fp32 is stored, with AGAIN loaded."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)[None, :]
    here = row < rows
    inside = here[:, None] & (lane < width)
    place = (row // heads).to(tl.int64) * x_stride + (row % heads).to(tl.int64) * width
    value = tl.load(x + place[:, None] + lane, mask=inside, other=0.0).to(tl.float32)
    if AGAIN:
        factor = tl.load(r + row, mask=here, other=0.0)
    else:
        factor = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
        tl.store(r + row, factor, mask=here)
    scale = tl.load(tl.broadcast_to(weight + lane, (ROWS, BLOCK)), mask=inside, other=0.0).to(tl.float32) + OFFSET
    value = value * factor[:, None] * scale
    tl.store(y + row.to(tl.int64)[:, None] * width + lane, value.to(y.dtype.element_ty), mask=inside)


@jit("rows")
def norm_backward_kernel(dy, x, weight, r, residual, dx, dy_stride, x_stride, residual_stride, rows, heads, width,
                         OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dx = r (g - x r^2 mean(g x)) [+ residual] of ROWS rows, g = dy (OFFSET + weight); dx (rows, D)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (lane < width)
    token, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64) * width
    value = tl.load(x + (token * x_stride + head)[:, None] + lane, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(dy + (token * dy_stride + head)[:, None] + lane, mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(tl.broadcast_to(weight + lane, (ROWS, BLOCK)), mask=inside, other=0.0).to(tl.float32) + OFFSET
    factor = tl.load(r + row, mask=row < rows, other=0.0)
    mean = tl.sum(g * value, 1) / width * factor * factor
    value = (g - value * mean[:, None]) * factor[:, None]
    if residual is not None:
        value += tl.load(residual + (token * residual_stride + head)[:, None] + lane, mask=inside,
                         other=0.0).to(tl.float32)
    tl.store(dx + row.to(tl.int64)[:, None] * width + lane, value.to(dx.dtype.element_ty), mask=inside)


@jit("rows")
def rotate_kernel(x, cos, sin, x_stride, head_stride, table_stride, rows, heads, half, BACK: tl.constexpr,
                  ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(x1, x2) <- (x1 c - x2 s, x2 c + x1 s) of ROWS rows in place, x1 and x2 `half` long; BACK: with -s."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (lane < half)
    token = (row // heads).to(tl.int64)
    table = (token * table_stride)[:, None] + lane
    c = tl.load(cos + table, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + table, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        s = -s
    place = x + (token * x_stride + row % heads * head_stride)[:, None] + lane
    x1 = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, (x1 * c - x2 * s).to(x.dtype.element_ty), mask=inside)
    tl.store(place + half, (x2 * c + x1 * s).to(x.dtype.element_ty), mask=inside)


@jit()
def gated_kernel(gate_up, dh, grad, h, width, blocks, gate_up_stride, dh_stride, GELU: tl.constexpr,
                 BLOCK: tl.constexpr):
    """h (N, I) = act(a) u, and with dh (N, I) grad (N, 2 I) = [dh u act'(a), dh act(a)]; one program per (row, block).

    act(a) = a s, s = sigmoid(t), with t = a or, for GELU in its tanh form, t = 2 sqrt(2 / pi) (a + 0.044715 a^3).
    """
    row = (tl.program_id(0) // blocks).to(tl.int64)
    lane = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = lane < width
    place = gate_up + row * gate_up_stride + lane
    a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(place + width, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        t = a * (1.5957691216057308 + 0.07135481627260025 * a * a)
        slope = 1.5957691216057308 + 0.21406444881780076 * a * a
    else:
        t = a
        slope = 1.0
    s = tl.sigmoid(t)
    act = a * s
    tl.store(h + row * width + lane, (act * u).to(h.dtype.element_ty), mask=inside)
    if dh is not None:
        d = tl.load(dh + row * dh_stride + lane, mask=inside, other=0.0).to(tl.float32)
        place = grad + row * width * 2 + lane
        tl.store(place, (d * u * (s + act * (1.0 - s) * slope)).to(grad.dtype.element_ty), mask=inside)
        tl.store(place + width, (d * act).to(grad.dtype.element_ty), mask=inside)


def row_config(width: int, arch: str) -> dict:
    """Rows, block and warps of the kernels that keep rows of `width` in registers."""
    block = triton.next_power_of_2(width)
    rows, warp_size = max(1, TILE // block), 64 if arch.startswith("gfx9") else 32
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(1024, rows * block // 8) // warp_size}


def gated_config(arch: str) -> dict:
    return {"BLOCK": TILE, "num_warps": 2 if arch.startswith("gfx9") else 4}


def placed(x: torch.Tensor) -> torch.Tensor:
    """x [N, ..., D] as the kernels read it: rows of a token side by side; a copy where it is not."""
    beside = x.stride(-1) == 1 and (x.dim() == 2 or x.dim() == 3 and x.stride(1) == x.shape[2])
    return x if beside else x.contiguous()


def launch(kernel, x: torch.Tensor, width: int, *arguments, **constants) -> None:
    """Run a kernel on all rows of x [N, ..., D], `width` numbers in a block of each."""
    rows, config = x.shape[:-1].numel(), row_config(width, architecture(x.device))
    with on_device(x):
        kernel[(triton.cdiv(rows, config["ROWS"]),)](*arguments, rows, x.shape[1:-1].numel(), width, **constants,
                                                     **config)


def launch_norm(x, weight, r, eps: float, offset: int, *, again: bool) -> torch.Tensor:
    x, y = placed(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(norm_kernel, x, x.shape[-1], x, weight, r, y, x.stride(0), eps, OFFSET=offset, AGAIN=again)
    return y


def launch_gated(gate_up, dh, grad, act: str) -> torch.Tensor:
    gate_up, dh = placed(gate_up), None if dh is None else placed(dh)
    rows, width = len(gate_up), gate_up.shape[1] // 2
    h = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    blocks = triton.cdiv(width, TILE)
    with on_device(h):
        gated_kernel[(rows * blocks,)](gate_up, dh, grad, h, width, blocks, gate_up.stride(0),
                                       0 if dh is None else dh.stride(0), GELU=act == "gelu_tanh",
                                       **gated_config(architecture(h.device)))
    return h


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise x [..., D] by weight (D,) -> (y [..., D], r [..., 1] fp32)."""
    if runs_triton(x):
        r = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
        return launch_norm(x, weight, r, eps, offset, again=False), r
    r = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x.dtype))
    r.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return apply_norm(x, weight, r, offset), r


def apply_norm(x: torch.Tensor, weight: torch.Tensor, r: torch.Tensor, offset: int) -> torch.Tensor:
    """Repeat the norm of x [..., D] from its factor r [..., 1]."""
    if runs_triton(x):
        return launch_norm(x, weight, r.contiguous(), 0.0, offset, again=True)
    y = x * r
    return y.mul_(weight.to(y.dtype) + 1).to(x.dtype) if offset else y.to(x.dtype).mul_(weight)


def rms_norm_backward(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, r: torch.Tensor, offset: int,
                      residual: torch.Tensor | None = None) -> torch.Tensor:
    """Compute dx [..., D] from dy; residual: a gradient of x that is added."""
    if runs_triton(x):
        dy, x, residual = placed(dy), placed(x), None if residual is None else placed(residual)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        launch(norm_backward_kernel, x, x.shape[-1], dy, x, weight, r.contiguous(), residual, dx, dy.stride(0),
               x.stride(0), 0 if residual is None else residual.stride(0), OFFSET=offset)
        return dx
    g = dy.to(r.dtype) * (weight.to(r.dtype) + offset)
    mean = torch.linalg.vecdot(g, x.to(r.dtype)).unsqueeze(-1).mul_(r.square()).div_(x.shape[-1])
    dx = g.addcmul_(x, mean, value=-1).mul_(r)
    return (dx if residual is None else dx.add_(residual)).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool = False) -> None:
    """Rotate x (N, H, Dh) in place by cos, sin (N, R): its first R places of each head; back: transposed."""
    half = cos.shape[-1] // 2
    if runs_triton(x):
        cos, sin = placed(cos), placed(sin)
        assert x.stride(-1) == 1 and cos.stride() == sin.stride()  # x is never copied
        return launch(rotate_kernel, x, half, x, cos, sin, x.stride(0), x.stride(1), cos.stride(0), BACK=back)
    c, s = cos[:, None, :half], sin[:, None, :half]  # both halves of the tables are the same
    x1, x2 = x[..., :half], x[..., half:2 * half]
    turned, sign = x1 * s, -1 if back else 1
    x1.mul_(c).addcmul_(x2, s, value=-sign)
    x2.mul_(c).add_(turned, alpha=sign)


def activated(a: torch.Tensor, act: str) -> torch.Tensor:
    return functional.silu(a) if act == "silu" else functional.gelu(a, approximate="tanh")


def gated(gate_up: torch.Tensor, act: str) -> torch.Tensor:
    """Compute act(a) u of gate_up (N, 2 I) = [a, u]; act: silu or gelu_tanh."""
    if runs_triton(gate_up):
        return launch_gated(gate_up, None, None, act)
    a, u = gate_up.chunk(2, -1)
    return activated(a, act).mul_(u)


def gated_backward(dh: torch.Tensor, gate_up: torch.Tensor, act: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (gradient of gate_up (N, 2 I), h (N, I) again) from dh (N, I)."""
    if runs_triton(gate_up):
        grad = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
        return grad, launch_gated(gate_up, dh, grad, act)
    grad = torch.empty_like(gate_up)
    (a, u), (da, du) = gate_up.chunk(2, -1), grad.chunk(2, -1)
    if act == "silu":
        torch.ops.aten.silu_backward.grad_input(dh * u, a, grad_input=da)
    else:
        torch.ops.aten.gelu_backward.grad_input(dh * u, a, approximate="tanh", grad_input=da)
    h = activated(a, act)
    torch.mul(dh, h, out=du)
    return grad, h.mul_(u)
