"""The specification: the operations in plain torch with the full (N, V) logits, in the dtype of the input
but at least fp32. In float64 it is what every kernel is measured against. Use it for small inputs only.
"""
import torch

from .common import wide
from .head import TokenStats


def full_logits(hidden, weight, *, bias=None, temperature=1.0, softcap=0.0, logit_scale=1.0) -> torch.Tensor:
    """(N, V) logits: cap(logit_scale * (hidden @ weight.T + bias)) / temperature."""
    dtype = wide(hidden.dtype)
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logit_scale * logits
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def linear_logp(hidden, weight, target, *, ignore_index=-100, return_stats=False, **head):
    """See kernels.linear_logp.linear_logp; differentiable by autograd."""
    logits = full_logits(hidden, weight, **head)
    kept = target != ignore_index
    log_softmax = torch.log_softmax(logits, -1)  # (N, V)
    picked = log_softmax.gather(1, target.masked_fill(~kept, 0)[:, None]).squeeze(1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    stats = (picked, entropy, torch.logsumexp(logits, -1), log_softmax.mean(-1))
    stats = TokenStats(*(each.masked_fill(~kept, 0.0) for each in stats))
    return stats if return_stats else stats.logp


def linear_token_loss(hidden, weight, target, loss_fn, *, ignore_index=-100, **head):
    """See kernels.linear_token_loss.linear_token_loss; calls the loss function once, on all rows that count."""
    stats = linear_logp(hidden, weight, target, ignore_index=ignore_index, return_stats=True, **head)
    rows = (target != ignore_index).nonzero().squeeze(1)
    loss = loss_fn(TokenStats(*(each[rows] for each in stats)), rows).sum()
    return loss, TokenStats(*(each.detach() for each in stats))


def linear_kl(hidden, teacher_hidden, weight, **head):
    """See kernels.linear_kl.linear_kl; differentiable by autograd."""
    log_p, log_q = (torch.log_softmax(full_logits(each, weight, **head), -1) for each in (hidden, teacher_hidden))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def rms_norm(x, weight, eps: float, offset: int) -> torch.Tensor:
    """See kernels.elementwise; differentiable by autograd, as the two below."""
    x = x.to(wide(x.dtype))
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (weight.to(x.dtype) + offset)


def rotated(x, cos, sin) -> torch.Tensor:
    """x (N, H, Dh), cos and sin (N, R)."""
    size = cos.shape[-1]
    x, rest = x.to(wide(x.dtype)).split([size, x.shape[-1] - size], -1)
    x1, x2 = x.chunk(2, -1)
    turned = x * cos[:, None].to(x.dtype) + torch.cat((-x2, x1), -1) * sin[:, None].to(x.dtype)
    return torch.cat((turned, rest), -1)


def gated(gate_up, act: str) -> torch.Tensor:
    """gate_up (N, 2 I); act: silu or gelu_tanh."""
    a, u = gate_up.to(wide(gate_up.dtype)).chunk(2, -1)
    if act == "silu":
        return a / (1 + torch.exp(-a)) * u
    return a / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (a + 0.044715 * a**3))) * u


def decode_attention(query, keys, values, length, *, scale: float, window: int = 0, softcap: float = 0.0):
    """See kernels.decode_attention.decode_attention; row by row, each over its own places."""
    dtype = wide(query.dtype)
    out = torch.zeros(query.shape, dtype=dtype, device=query.device)
    for row, end in enumerate(length.tolist()):
        first = max(0, end - window) if window else 0
        k, v = (each[row, :, first:end].to(dtype) for each in (keys, values))  # (H, places, Dh)
        scores = scale * query[row].to(dtype) @ k.transpose(1, 2)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        out[row] = torch.softmax(scores, -1) @ v
    return out


def paged(cache: torch.Tensor, page: int, unheld=0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut keys or values (S, H, T, Dh) into blocks in no order -> pool (S pages + 1, H, page, Dh), table (S, pages).

    unheld: what stands behind T, and in the first block, which no row holds."""
    rows, heads, places, size = cache.shape
    pages = -(-places // page)
    padded = torch.nn.functional.pad(cache, (0, 0, 0, pages * page - places), value=unheld)
    order = torch.randperm(rows * pages, generator=torch.Generator().manual_seed(0)).to(cache.device)
    pool = torch.full((rows * pages + 1, heads, page, size), unheld, dtype=cache.dtype, device=cache.device)
    pool[1 + order] = padded.unflatten(2, (pages, page)).transpose(1, 2).flatten(0, 1)
    return pool, 1 + order.view(rows, pages)
