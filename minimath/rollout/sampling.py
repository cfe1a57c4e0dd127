"""Choose tokens: temperature, top-k, min-p, top-p, for all rows at once and without a read-back.

A token is found by inverting the cumulative distribution at a number in [0, 1) that belongs to the completion and the
place in it alone, so that a completion does not depend on its batch."""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from minimath.core.same_bits import in_any_order
from minimath.kernels.common import mm_fp32

BLOCK = 256  # tokens of the vocabulary that the cumulative distribution is first looked up in


class Sampling(NamedTuple):
    """How a token is chosen. Temperature 0 is greedy, with log-probs at 1."""
    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0

    @classmethod
    def of(cls, options) -> "Sampling":
        """Take what bears on a token from config's SamplingOptions."""
        return cls(options.temperature, options.top_p, options.min_p, options.top_k)

    def full(self) -> bool:
        """Tell whether tokens come from the whole softmax, so that one log-prob is all."""
        return self.top_p >= 1 and self.min_p <= 0 and self.top_k <= 0


def stream_noise(seed: int, count: int) -> torch.Tensor:
    """Draw a completion's random numbers in [0, 1); the first ones for every count."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def logits_of(hidden: torch.Tensor, lm_head, product) -> torch.Tensor:
    """Compute next-token logits [n, V] in fp32 of hidden [n, D].

    product: multiplies by the weight; None: a plain product."""
    weight, bias, hidden = lm_head.weight, lm_head.bias, hidden.to(lm_head.weight.dtype)
    if product is not None:
        logits = product(hidden).float()
    elif weight.is_cuda:  # not rounded to 16 bits, like linear_logp's
        logits = mm_fp32(hidden, weight.T)
        logits = logits if bias is None else logits + bias
    else:
        logits = F.linear(hidden, weight, bias).float()
    if lm_head.logit_scale != 1.0:
        logits *= lm_head.logit_scale
    if lm_head.softcap:
        logits = lm_head.softcap * torch.tanh(logits / lm_head.softcap)
    return logits


@in_any_order()
def sample_tokens(logits: torch.Tensor, noise: torch.Tensor, how: Sampling) -> tuple[torch.Tensor, ...]:
    """Choose one token per row.

    logits (n, V) fp32, overwritten; noise (n,) in [0, 1). Returns token (n,) int64, logp (n,) fp32 under the
    distribution sampled from (after temperature, and renormalised after top-k, min-p and top-p, in this order),
    full_logp (n,) after temperature alone: what linear_logp gives for the token."""
    if how.temperature > 0 and how.temperature != 1:
        logits /= how.temperature
    whole = None if how.full() else logits.clone()
    if how.temperature == 0:
        token = logits.argmax(-1)
        logp = gather(logits, token) - logits.logsumexp(-1)
    else:
        truncate(logits, how)
        token, logp = invert(logits, noise)
    full_logp = logp if whole is None else gather(whole, token) - whole.logsumexp(-1)
    return token, logp, full_logp


def invert(logits: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the tokens at which the cumulative softmax passes noise, and their log-probs.

    In two levels, sums of blocks and then one block: a running sum over the whole vocabulary is slower by far."""
    n, size = logits.shape
    block = math.gcd(size, BLOCK)
    if block < 16:  # a vocabulary of no nice size
        block = BLOCK
        logits = F.pad(logits, (0, -size % block), value=-torch.inf)
    weights = torch.softmax(logits, -1).view(n, -1, block)  # (n, V / block, block)
    sums = weights.sum(-1).cumsum(-1)
    total = sums[:, -1:]
    below = 1 - 2 ** -24  # noise rounded to 1 would fall on the last token, whatever its probability
    level = noise.clamp(max=below)[:, None] * total
    which = torch.searchsorted(sums, level, right=True).clamp_(max=sums.shape[1] - 1)  # (n, 1)
    inside = weights.gather(1, which[..., None].expand(-1, 1, block))[:, 0].cumsum(-1)  # (n, block)
    before = torch.where(which > 0, sums.gather(1, (which - 1).clamp_(min=0)), torch.zeros_like(total))
    rest = torch.minimum((level - before).clamp_(min=0), inside[:, -1:] * below)
    place = torch.searchsorted(inside, rest, right=True).clamp_(max=block - 1)
    token = (which * block + place)[:, 0]
    if logits.shape[1] > size:  # NaN ends in the padding, of which no embedding knows
        token.clamp_(max=size - 1)
    return token, torch.log(gather(weights.view(n, -1), token) / total[:, 0])


def gather(values: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Pick the value of each row of [n, V] at its token."""
    return values.gather(-1, token[:, None])[:, 0]


def truncate(logits: torch.Tensor, how: Sampling) -> None:
    """Set logits [n, V] outside top-k, min-p and top-p, in this order, to -inf."""
    if 0 < how.top_k < logits.shape[-1]:
        logits.masked_fill_(logits < logits.topk(how.top_k, -1).values[:, -1:], -torch.inf)
    if how.min_p > 0:
        logits.masked_fill_(logits < logits.amax(-1, keepdim=True) + math.log(how.min_p), -torch.inf)
    if how.top_p < 1:
        best, order = torch.softmax(logits, -1).sort(-1, descending=True)
        drop = best.cumsum(-1) - best >= how.top_p  # mass before a token already suffices; the first always stays
        logits.masked_fill_(torch.zeros_like(drop).scatter_(-1, order, drop), -torch.inf)
