"""Attention of training passes on a CPU: every row by itself, in plain batched products.

    P = softmax(c Q K^T + mask),  O = P V
    dV = P^T dO,  dS = P (dO V^T - rowsum(dO O)),  dQ = c dS K,  dK = c dS^T Q

A pass holds many rows behind one another, some of them behind a common prompt. Rows do not see each other, so no score
between them is computed. Queries are taken 256 at a time, with the keys up to them: most scores above the diagonal are
never computed either. Heads that share keys are rows of one query. Rows of like length, rounded up to a multiple of 32,
go together; what is beyond a row's end is dropped, and few shapes keep oneDNN's cache small."""
from collections.abc import Sequence
from typing import NamedTuple

import torch

ROW_MULTIPLE = 32  # places; a row is computed up to the next multiple
QUERIES = 256  # of a row at a time
KEPT = 256  # longest row whose P is kept for the backward pass; computed again beyond


class Segment(NamedTuple):
    """A row of a pass: `length` tokens from `start` on, and the places of the tokens before it that it sees."""
    start: int
    length: int
    before: Sequence[int] = range(0)  # ascending; a range of a common prompt, else the path to a branch of a tree


class Block(NamedTuple):
    """Queries of rows alike: the same sizes, the same place in the row, the same prompt."""
    starts: tuple[int, ...]  # of the rows
    lengths: tuple[int, ...]  # queries that count, of each
    first: int  # place of the first query in its row
    queries: int
    prompt: range  # its places
    long: bool


class Segments:
    """The rows of a pass of N tokens, behind prompts or nothing, and the blocks that attention computes."""

    def __init__(self, rows: list[Segment], tokens: int):
        self.tokens, self._masks = tokens, {}
        alike: dict[tuple, list[tuple[int, int]]] = {}
        for row in rows:
            for first in range(0, row.length, QUERIES):
                count = min(QUERIES, row.length - first)
                queries = min(-(-count // ROW_MULTIPLE) * ROW_MULTIPLE, tokens - row.start - first)
                key = (first, queries, row.before, row.length > KEPT)
                alike.setdefault(key, []).append((row.start, count))
        self.blocks = [Block(tuple(s for s, _ in members), tuple(n for _, n in members), *key)
                       for key, members in alike.items()]

    def padded_prompt(self, block: Block) -> int:
        return min(-(-len(block.prompt) // ROW_MULTIPLE) * ROW_MULTIPLE, self.tokens - block.prompt.start)

    def mask(self, block: Block, window: int | None, q: torch.Tensor) -> torch.Tensor:
        """Make the mask (r queries, keys) of q (.., r queries, Dh): keys of the prompt, then of the row."""
        heads, shared = q.shape[1] // block.queries, len(block.prompt)
        shape = (block.first, block.queries, shared, self.padded_prompt(block), window, heads, q.dtype)
        if shape not in self._masks:
            query = torch.arange(block.queries)[:, None] + block.first
            own, prompt = torch.arange(block.first + block.queries)[None], torch.arange(shape[3])[None]
            age = torch.cat([query + shared - prompt, query - own], 1)
            seen = torch.cat([(prompt < shared).expand(block.queries, -1), query >= own], 1)
            if window:
                seen &= age < window
                seen |= (age == 0) & (seen.sum(-1, keepdim=True) == 0)  # rows beyond the end must see something
            mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
            self._masks[shape] = mask.repeat(heads, 1)
        return self._masks[shape]


class Heads(NamedTuple):
    """How the columns of qkv (N, width) are heads, and how they attend."""
    queries: int  # heads of q; those of k and of v follow
    keys: int
    dim: int
    scale: float
    softcap: float | None

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """View qkv (N, width) as q (N, H, r, Dh), k and v (N, H, Dh)."""
        q, k, v = qkv.split([self.queries * self.dim, self.keys * self.dim, self.keys * self.dim], -1)
        k, v = (each.unflatten(-1, (self.keys, self.dim)) for each in (k, v))
        return q.unflatten(-1, (self.keys, self.queries // self.keys, self.dim)), k, v


class SegmentAttention(torch.autograd.Function):
    """qkv (N, width) -> (N, queries dim): causal attention within rows and to their prompts."""

    @staticmethod
    def forward(ctx, qkv, heads: Heads, segments: Segments, window: int | None):
        out, kept = qkv.new_zeros(len(qkv), heads.queries * heads.dim), []
        into = out.view(len(qkv), heads.keys, -1, heads.dim)
        for block in segments.blocks:
            q, k, v = operands(qkv, heads, segments, block)
            p = torch.softmax(scores(q, k, heads.scale, heads.softcap, segments.mask(block, window, q))[0], -1)
            o = torch.bmm(p, v).view(len(block.starts), heads.keys, -1, block.queries, heads.dim)
            for row, start, count in zip(o, block.starts, block.lengths):
                into[start + block.first:start + block.first + count] = row[:, :, :count].permute(2, 0, 1, 3)
            kept.append(None if block.long or heads.softcap else p)
        ctx.save_for_backward(qkv, *kept)
        ctx.heads, ctx.segments, ctx.window = heads, segments, window
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        qkv, *kept = ctx.saved_tensors
        heads, segments, window = ctx.heads, ctx.segments, ctx.window
        result = torch.zeros_like(qkv)
        dq_all, dk_all, dv_all = heads.split(result)
        grad = grad.reshape(len(qkv), heads.keys, -1, heads.dim)
        several = any(b.prompt or b.long for b in segments.blocks)
        sums = torch.zeros(2, len(qkv), heads.keys, heads.dim) if several else None  # fp32: of many terms
        for block, p in zip(segments.blocks, kept):
            q, k, v = operands(qkv, heads, segments, block)
            slope = None
            if p is None:
                p, slope = scores(q, k, heads.scale, heads.softcap, segments.mask(block, window, q))
                p = torch.softmax(p, -1)
            do = torch.stack([rows(grad, start + block.first, block.queries, count)
                              for start, count in zip(block.starts, block.lengths)]).view_as(q)
            dv = torch.bmm(p.transpose(1, 2), do)
            ds = torch._softmax_backward_data(torch.bmm(do, v.transpose(1, 2)), p, -1, p.dtype)
            ds = ds.mul_(heads.scale) if slope is None else ds.mul_(slope)
            dq = torch.bmm(ds, k).view(len(block.starts), heads.keys, -1, block.queries, heads.dim)
            dk = torch.bmm(ds.transpose(1, 2), q)
            shared = segments.padded_prompt(block)
            for i, (start, count) in enumerate(zip(block.starts, block.lengths)):
                dq_all[start + block.first:start + block.first + count] = dq[i, :, :, :count].permute(2, 0, 1, 3)
                for which, all_, part in ((0, dk_all, dk), (1, dv_all, dv)):
                    part = part[i * heads.keys:(i + 1) * heads.keys].transpose(0, 1)  # (keys, H, Dh)
                    end = block.first + count
                    if sums is None:
                        all_[start:start + end] = part[:end]
                        continue
                    sums[which, start:start + end] += part[shared:shared + end]
                    if block.prompt:
                        sums[which, block.prompt.start:block.prompt.stop] += part[:len(block.prompt)]
        if sums is not None:
            dk_all.copy_(sums[0])
            dv_all.copy_(sums[1])
        return result, None, None, None


def rows(x: torch.Tensor, start: int, count: int, valid: int | None = None) -> torch.Tensor:
    """Take rows of x (N, H, r, Dh) -> (H, r, count, Dh); those from `valid` on are 0."""
    part = x[start:start + count]
    if valid is not None and valid < count:
        part = part.clone()
        part[valid:] = 0
    return part.permute(1, 2, 0, 3)


def operands(qkv, heads: Heads, segments: Segments, block: Block):
    """Lay a block out: q (S H, r queries, Dh), k and v (S H, keys, Dh)."""
    q, k, v = heads.split(qkv)
    end, shared = block.first + block.queries, segments.padded_prompt(block)
    q = torch.stack([rows(q, start + block.first, block.queries) for start in block.starts])
    prompt = slice(block.prompt.start, block.prompt.start + shared)
    k, v = (torch.stack([torch.cat([each[prompt], each[start:start + end]]).transpose(0, 1)
                         if shared else each[start:start + end].transpose(0, 1) for start in block.starts])
            for each in (k, v))
    return q.view(q.shape[0] * heads.keys, -1, heads.dim), k.flatten(0, 1), v.flatten(0, 1)


def scores(q, k, scale: float, softcap: float | None, mask: torch.Tensor):
    """Compute S (B, r queries, keys) under a mask, and dS / d(raw scores) where a softcap bends them."""
    mask = mask.expand(len(q), -1, -1)
    if not softcap:
        return torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale), None
    bent = torch.tanh(torch.bmm(q, k.transpose(1, 2)).mul_(scale / softcap))
    slope = (1 - bent * bent).mul_(scale)
    return bent.mul_(softcap).add_(mask), slope
