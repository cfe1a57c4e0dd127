"""Attention of one new token per row over keys and values in blocks of a pool: what a decoding step runs in each layer.

    s_rt = scale q_r . k_t  (softcap tanh(s_rt / softcap) where set),  t in [a, b),  b = length,  a = max(0, b - window)
    o_r  = sum_t e^(s_rt - m_r) v_t / sum_t e^(s_rt - m_r),  m_r = max_t s_rt

Query heads that share a key head are the rows r of one small product, so that keys and values are read once for all of
them. On a GPU a row is cut at places that depend on nothing else: neither its neighbours in the batch nor the blocks
that it has, nor the size of the pool change a bit of its result.
"""
import torch

from . import decode_attention_triton as fused
from .common import architecture, runs_as_it_is, runs_triton, wide


@runs_as_it_is
def decode_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor,
                     table: torch.Tensor, *, scale: float, window: int = 0, softcap: float = 0.0) -> torch.Tensor:
    """Attend from one token per row to the places that its row holds -> (n, H, r, Dh).

    query (n, H, r, Dh): r query heads of each of H key heads; keys, values (P, H, page, Dh) contiguous, page a multiple
    of PAGE on a GPU; all of one floating dtype. table (n, pages) int64: place t of row i is place t % page of block
    table[i, t // page]; rows may share blocks. length (n,) integer, on the device, at most pages times page: row i sees
    places [max(0, length_i - window), length_i), all from 0 without a window; none gives zeros. Sums in fp32; on a GPU
    nothing is read back and no allocation depends on length, so that a CUDA graph can record it.
    Raises ValueError for shapes or dtypes that do not fit.
    """
    rows, heads, _, size = query.shape
    fits = keys.shape == values.shape and keys.shape[1::2] == (heads, size) and table.shape[:-1] == (rows,)
    if not fits or length.shape != (rows,) or length.is_floating_point() or table.dtype != torch.int64:
        shapes = ", ".join(str(tuple(each.shape)) for each in (query, keys, values, length, table))
        raise ValueError("expected query (n, H, r, Dh), keys and values (P, H, page, Dh), whole length (n,), int64 "
                         f"table (n, pages), got {shapes}")
    if not query.dtype == keys.dtype == values.dtype:
        raise ValueError(f"expected one dtype, got {query.dtype}, {keys.dtype} and {values.dtype}")
    large = keys.untyped_storage().nbytes() >= 1 << 31
    if runs_triton(query) and fused.takes(architecture(query.device), query.dtype, size, large):
        return fused.decode_attention(query, keys, values, length, table, scale, window, softcap)
    return in_torch(query, together(keys, table), together(values, table), length, scale, window, softcap)


def together(blocks: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Copy what a table (n, pages) names of blocks (P, H, page, Dh) behind one another -> (n, H, T, Dh)."""
    return blocks[table].transpose(1, 2).flatten(2, 3)


def in_torch(query, keys, values, length, scale: float, window: int, softcap: float) -> torch.Tensor:
    """The same in plain torch, all places of (n, H, T, Dh): rounded where transformers' eager attention rounds."""
    scores = query @ keys.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    place, end = torch.arange(keys.shape[2], device=keys.device), length[:, None, None, None]
    outside = place >= end
    if window:
        outside = outside | (place < end - window)
    scores = scores.masked_fill(outside, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=wide(scores.dtype)).masked_fill(outside, 0).to(values.dtype) @ values
