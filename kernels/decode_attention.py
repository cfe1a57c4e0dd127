"""Attention of one new token per row over the keys and values of a slot cache: what a decoding step runs in each layer.

    s_rt = scale q_r . k_t  (softcap tanh(s_rt / softcap) where set),  t in [a, b),  b = length,  a = max(0, b - window)
    o_r  = sum_t e^(s_rt - m_r) v_t / sum_t e^(s_rt - m_r),  m_r = max_t s_rt

Query heads that share a key head are the rows r of one small product, so that keys and values are read once for all of
them. On a GPU a row is cut at places that depend on nothing else: neither its neighbours in the batch nor the size of
the buffer change a bit of its result.
"""
import torch

from . import decode_attention_triton as fused
from .common import architecture, runs_as_it_is, runs_triton


@runs_as_it_is
def decode_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor, *,
                     scale: float, window: int = 0, softcap: float = 0.0) -> torch.Tensor:
    """Attend from one token per row to the places that its row holds -> (n, H, r, Dh).

    query (n, H, r, Dh): r query heads of each of H key heads; keys, values (S >= n, H, T, Dh) contiguous: row i of the
    query reads row i; all of one floating dtype. length (n,) integer, on the device, at most T: row i sees places
    [max(0, length_i - window), length_i), all from 0 without a window; none gives zeros. Sums in fp32; on a GPU
    nothing is read back and no allocation depends on length, so that a CUDA graph can record it.
    Raises ValueError for shapes or dtypes that do not fit.
    """
    rows, heads, _, size = query.shape
    fits = keys.shape == values.shape and keys.shape[1::2] == (heads, size) and len(keys) >= rows
    if not fits or length.shape != (rows,) or length.is_floating_point():
        raise ValueError("expected query (n, H, r, Dh), keys and values (S >= n, H, T, Dh), whole length (n,), got "
                         f"{tuple(query.shape)}, {tuple(keys.shape)}, {tuple(values.shape)}, {tuple(length.shape)}")
    if not query.dtype == keys.dtype == values.dtype:
        raise ValueError(f"expected one dtype, got {query.dtype}, {keys.dtype} and {values.dtype}")
    large = keys.untyped_storage().nbytes() >= 1 << 31
    if runs_triton(query) and fused.takes(architecture(query.device), query.dtype, size, large):
        return fused.decode_attention(query, keys, values, length, scale, window, softcap)
    return in_torch(query, keys[:rows], values[:rows], length, scale, window, softcap)


def in_torch(query, keys, values, length, scale: float, window: int, softcap: float) -> torch.Tensor:
    """The same in plain torch, all places of the buffer: rounded where transformers' eager attention rounds."""
    scores = query @ keys.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    place, end = torch.arange(keys.shape[2], device=keys.device), length[:, None, None, None]
    outside = place >= end
    if window:
        outside = outside | (place < end - window)
    scores = scores.masked_fill(outside, torch.finfo(scores.dtype).min)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide).masked_fill(outside, 0).to(values.dtype) @ values
