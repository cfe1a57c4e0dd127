"""RMSNorm, rotary embedding and gated activation of a decoder layer, forward and backward, for frozen weights.

    y = x r (o + w),  r = (mean x^2 + eps)^(-1/2)     dx = r (g - x r mean(g x r)),  g = dy (o + w)     (N, D)
    (y1, y2) = (x1 c - x2 s, x2 c + x1 s)             the same with -s
    h = act(a) u                                      da = dh u act'(a),  du = dh act(a)

o is 0, or 1 where a model stores w - 1 (Gemma). Arithmetic is fp32 on a GPU, in one pass over memory; on a CPU it is
the fewest torch operations, 16-bit values rounded in between where transformers rounds them too: a compiled pass saved
less than a run waited for the compiler. Rows may be strided, their last dimension not.
"""
import torch
from torch.nn import functional

from . import elementwise_triton as fused
from .common import runs_triton


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise x [..., D] by weight (D,) -> (y [..., D], r [..., 1] fp32)."""
    if runs_triton(x):
        return fused.rms_norm(x, weight, eps, offset)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=widened(x))
    r = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return apply_norm(x, weight, r, offset), r


def apply_norm(x: torch.Tensor, weight: torch.Tensor, r: torch.Tensor, offset: int) -> torch.Tensor:
    """Repeat the norm of x [..., D] from its factor r [..., 1]."""
    if runs_triton(x):
        return fused.apply_norm(x, weight, r, offset)
    y = x * r
    return y.mul_(weight.to(y.dtype) + 1).to(x.dtype) if offset else y.to(x.dtype).mul_(weight)


def rms_norm_backward(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, r: torch.Tensor, offset: int,
                      residual: torch.Tensor | None = None) -> torch.Tensor:
    """Compute dx [..., D] from dy; residual: a gradient of x that is added."""
    if runs_triton(x):
        return fused.rms_norm_backward(dy, x, weight, r, offset, residual)
    g = dy.to(r.dtype) * (weight.to(r.dtype) + offset)
    mean = torch.linalg.vecdot(g, x.to(r.dtype)).unsqueeze(-1).mul_(r.square()).div_(x.shape[-1])
    dx = g.addcmul_(x, mean, value=-1).mul_(r)
    return (dx if residual is None else dx.add_(residual)).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool = False) -> None:
    """Rotate x (N, H, Dh) in place by cos, sin (N, R): its first R places of each head; back: transposed."""
    if runs_triton(x):
        return fused.rotate(x, cos, sin, back)
    half = cos.shape[-1] // 2
    c, s = cos[:, None, :half], sin[:, None, :half]  # both halves of the tables are the same
    x1, x2 = x[..., :half], x[..., half:2 * half]
    turned, sign = x1 * s, -1 if back else 1
    x1.mul_(c).addcmul_(x2, s, value=-sign)
    x2.mul_(c).add_(turned, alpha=sign)


def gated(gate_up: torch.Tensor, act: str) -> torch.Tensor:
    """Compute act(a) u of gate_up (N, 2 I) = [a, u]; act: silu or gelu_tanh."""
    if runs_triton(gate_up):
        return fused.gated(gate_up, act)
    a, u = gate_up.chunk(2, -1)
    return (functional.silu(a) if act == "silu" else functional.gelu(a, approximate="tanh")).mul_(u)


def gated_backward(dh: torch.Tensor, gate_up: torch.Tensor, act: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (gradient of gate_up (N, 2 I), h (N, I) again) from dh (N, I)."""
    if runs_triton(gate_up):
        return fused.gated_backward(dh, gate_up, act)
    a, u = gate_up.chunk(2, -1)
    grad = torch.empty_like(gate_up)
    da, du = grad.chunk(2, -1)
    if act == "silu":
        h = functional.silu(a)
        torch.ops.aten.silu_backward.grad_input(dh * u, a, grad_input=da)
    else:
        h = functional.gelu(a, approximate="tanh")
        torch.ops.aten.gelu_backward.grad_input(dh * u, a, approximate="tanh", grad_input=da)
    torch.mul(dh, h, out=du)
    return grad, h.mul_(u)


def widened(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
