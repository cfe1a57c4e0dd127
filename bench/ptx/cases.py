"""What is run: each operation of minimath.kernels in small odd shapes, against float64 and torch's own results.

An operation is a function (dtype, **sizes) that yields Checks; it calls the public function, so that what runs is what
a user's call would launch. Rows lie apart in wider buffers with NaN between them.
"""
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional

from minimath.kernels import TokenStats, elementwise, linear_kl, linear_logp, linear_token_loss, reference
from minimath.kernels.decode_attention import decode_attention
from minimath.kernels.decode_attention_triton import PAGE

FLOAT, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16
# A result is right where its largest error, over its largest number, is not above this, or not above twice torch's own:
# fp32 sums of some hundred numbers; in 16 bits one rounding (2^-11, 2^-8, and a little).
LIMIT = {FLOAT: 6e-6, HALF: 5.1e-4, BF16: 4.1e-3}


class Check(NamedTuple):
    """One result: ours, in float64, and torch's own in the same dtype."""
    name: str
    got: torch.Tensor
    want: torch.Tensor
    torch: torch.Tensor

    def error(self, of: str = "got") -> float:
        """Largest error over the largest number; inf for what is not finite."""
        difference = (getattr(self, of).detach().double() - self.want).abs().max()
        return float(difference.nan_to_num(torch.inf) / self.want.abs().max().clamp(min=1e-30))

    def ok(self) -> bool:
        return self.error() <= max(LIMIT[self.got.dtype], 2 * self.error("torch"))


def drawn(*shape, dtype, seed=0, scale=1.0, apart=0) -> torch.Tensor:
    """Draw numbers; apart: as a slice of a buffer that is so many columns wider."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=draw, dtype=torch.float64) * scale
    wide = torch.full((shape[0], values[0].numel() + apart), torch.nan, dtype=dtype)
    return wide[:, apart // 2:apart // 2 + values[0].numel()].view(shape).copy_(values)


def with_gradient(function, x, dy, *others):
    """(function(x, ...), its gradient in x for dy), by autograd."""
    leaf = x.detach().clone().requires_grad_()
    y = function(leaf, *others)
    return y.detach(), torch.autograd.grad(y, leaf, dy)[0]


def doubled(*tensors):
    return tuple(each.detach().double() if torch.is_tensor(each) else each for each in tensors)


def norm(dtype, *, shape, apart=0, offset=0) -> Iterator[Check]:
    x, dy = drawn(*shape, dtype=dtype, apart=apart), drawn(*shape, dtype=dtype, seed=1, apart=2 * apart)
    weight, residual = drawn(1, shape[-1], dtype=dtype, seed=2)[0], drawn(*shape, dtype=dtype, seed=3, apart=apart)
    want, grad = with_gradient(reference.rms_norm, *doubled(x, dy, weight, 1e-5, offset))
    own, own_grad = with_gradient(lambda x: functional.rms_norm(x, x.shape[-1:], weight + offset, 1e-5), x, dy)
    y, r = elementwise.rms_norm(x, weight, 1e-5, offset)
    yield Check("norm", y, want, own)
    yield Check("norm again", elementwise.apply_norm(x, weight, r, offset), want, own)
    yield Check("norm, gradient", elementwise.rms_norm_backward(dy, x, weight, r, offset), grad, own_grad)
    got = elementwise.rms_norm_backward(dy, x, weight, r, offset, residual)
    yield Check("norm, gradient + residual", got, grad + residual.double(), own_grad + residual)


def rotation(dtype, *, shape, part, apart=0) -> Iterator[Check]:
    x, dy = drawn(*shape, dtype=dtype, apart=apart), drawn(*shape, dtype=dtype, seed=1, apart=apart)
    angle = torch.outer(torch.arange(shape[0]) * 1.7, 0.3 ** torch.arange(part // 2)).repeat(1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    wants = with_gradient(reference.rotated, *doubled(x, dy, cos, sin))

    def own(x, cos, sin):
        x, rest = x.split([part, shape[-1] - part], -1)
        half = torch.cat((-x[..., part // 2:], x[..., :part // 2]), -1)
        return torch.cat((x * cos[:, None] + half * sin[:, None], rest), -1)

    for name, got, want, other in zip(("rotation", "rotation back"), (x, dy), wants,
                                      with_gradient(own, x, dy, cos, sin)):
        elementwise.rotate(got, cos, sin, back=name != "rotation")
        yield Check(name, got, want, other)


def gate(dtype, *, rows, width, act, apart=0) -> Iterator[Check]:
    gate_up, dh = drawn(rows, 2 * width, dtype=dtype, apart=apart), drawn(rows, width, dtype=dtype, seed=1)
    want, grad = with_gradient(reference.gated, *doubled(gate_up, dh, act))
    act_of = functional.silu if act == "silu" else partial(functional.gelu, approximate="tanh")
    own, own_grad = with_gradient(lambda x: act_of(x[:, :width]) * x[:, width:], gate_up, dh)
    yield Check(f"gate {act}", elementwise.gated(gate_up, act), want, own)
    got, again = elementwise.gated_backward(dh, gate_up, act)
    yield Check(f"gate {act}, gradient", got, grad, own_grad)
    yield Check(f"gate {act} again", again, want, own)


def head_inputs(dtype, n, d, v, bias):
    """Hidden states with rows apart, weight, bias or None, targets of which one in five is ignored."""
    hidden, weight = drawn(n, d, dtype=dtype, apart=16), drawn(v, d, dtype=dtype, seed=1, scale=2 * d**-0.5)
    target = torch.randint(v, (n,), generator=torch.Generator().manual_seed(2))
    target[1::5] = -100
    return hidden, weight, drawn(1, v, dtype=dtype, seed=3)[0] if bias else None, target


def torch_logits(hidden, weight, bias, temperature=1.0, softcap=0.0, logit_scale=1.0) -> torch.Tensor:
    """What a trainer in plain torch does: logits in the input's dtype, then fp32."""
    logits = logit_scale * functional.linear(hidden, weight, bias).float()
    return (softcap * torch.tanh(logits / softcap) if softcap else logits) / temperature


def torch_stats(hidden, weight, bias, target, **scaling) -> TokenStats:
    logits = torch_logits(hidden, weight, bias, **scaling)
    logp = torch.log_softmax(logits, -1)
    picked = logp.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
    stats = picked, -(logp.exp() * logp).sum(-1), torch.logsumexp(logits, -1), logp.mean(-1)
    return TokenStats(*(each.masked_fill(target < 0, 0.0) for each in stats))


def log_prob(dtype, *, n, d, v, bias=False, tf32=False, **scaling) -> Iterator[Check]:
    """Without a gradient: logp_kernel, on Turing tile_kernel. tf32: where torch's switch allows that to fp32."""
    hidden, weight, b, target = head_inputs(dtype, n, d, v, bias)
    want = reference.linear_logp(*doubled(hidden, weight), target, bias=None if b is None else b.double(),
                                 return_stats=True, **scaling)
    switch, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    switch.allow_tf32 = tf32
    got = linear_logp(hidden, weight, target, bias=b, return_stats=True, **scaling)
    switch.allow_tf32 = before
    if tf32 and dtype == FLOAT:  # tensor cores leave out the last 13 bits of what Triton hands them
        hidden, weight = ((each.view(torch.int32) & ~0x1FFF).view(FLOAT) for each in (hidden, weight))
    own = torch_stats(hidden, weight, b, target, **scaling)
    for name, *each in zip(TokenStats._fields, got, want, own):
        yield Check(f"log-prob: {name}", *each)


def loss(dtype, *, n, d, v, bias=False, entropy=0.0, **scaling) -> Iterator[Check]:
    """Loss and gradient over tiles; with an entropy term also of the weight, by making the logits a second time."""
    hidden, weight, b, target = head_inputs(dtype, n, d, v, bias)
    chosen = (target >= 0).nonzero().squeeze(1)

    def of(stats, rows):
        return -stats.logp - entropy * stats.entropy if entropy else -stats.logp

    def run(operation, *leaves):
        leaves = [each.detach().clone().requires_grad_(index == 0 or bool(entropy))
                  for index, each in enumerate(leaves)]
        value, stats = operation(*leaves)
        value.backward()
        return stats.logp.detach(), *(each.grad for each in leaves if each.requires_grad)

    rows = n if n < 16 else 16  # of a chunk
    got = run(lambda h, w: linear_token_loss(h, w, target, of, bias=b, all_stats=bool(entropy), **scaling,
                                             workspace_bytes=rows * 1024 * hidden.element_size()), hidden, weight)
    want = run(lambda h, w: reference.linear_token_loss(
        h, w, target, of, bias=None if b is None else b.double(), **scaling), *doubled(hidden, weight))

    def eager(h, w):
        stats = torch_stats(h, w, b, target, **scaling)
        return of(TokenStats(*(each[chosen] for each in stats)), chosen).sum(), stats

    for name, *each in zip(("log-prob", "gradient", "weight's gradient"), got, want, run(eager, hidden, weight)):
        yield Check(f"loss{' + entropy' if entropy else ''}: {name}", *each)


def divergence(dtype, *, n, d, v, bias=False, **scaling) -> Iterator[Check]:
    """KL of two hidden states and its gradient, over tiles."""
    hidden, weight, b, _ = head_inputs(dtype, n, d, v, bias)
    teacher = (hidden.double() + drawn(n, d, dtype=torch.float64, seed=4, scale=0.3)).to(dtype)
    wide = dict(scaling, bias=None if b is None else b.double())
    budget = 2 * n * 1024 * hidden.element_size()
    got, want, own = (with_gradient(function, x, torch.ones(n, dtype=kind), *others) for function, kind, x, *others in (
        (lambda *each: linear_kl(*each, bias=b, workspace_bytes=budget, **scaling), FLOAT, hidden, teacher, weight),
        (lambda *each: reference.linear_kl(*each, **wide), torch.float64, *doubled(hidden, teacher, weight)),
        (lambda *each: torch_kl(*each, b, **scaling), FLOAT, hidden, teacher, weight)))
    for name, *each in zip(("value", "gradient"), got, want, own):
        yield Check(f"divergence: {name}", *each)


def torch_kl(hidden, teacher, weight, bias, **scaling) -> torch.Tensor:
    p, q = (torch.log_softmax(torch_logits(each, weight, bias, **scaling), -1) for each in (hidden, teacher))
    return (p.exp() * (p - q)).sum(-1)


def attention(dtype, *, heads, group, size, lengths, places, window=0, softcap=0.0) -> Iterator[Check]:
    """One new token per row over a cache of `places`; what a row does not hold is NaN, and so is a spare row."""
    n, scale = len(lengths), size**-0.5
    query = drawn(n, heads, group, size, dtype=dtype, apart=16)
    keys, values = (drawn(n + 1, heads, places, size, dtype=dtype, seed=seed) for seed in (1, 2))
    length = torch.tensor(lengths)
    unheld = torch.arange(places) >= torch.tensor([*lengths, 0])[:, None]
    for cache in (keys, values):
        cache.masked_fill_(unheld[:, None, :, None], torch.nan)
    options = {"scale": scale, "window": window, "softcap": softcap}
    own = torch.zeros(query.shape, dtype=dtype)
    for row, end in enumerate(lengths):
        seen = slice(max(0, end - window) if window else 0, end)
        scores = query[row] @ keys[row, :, seen].mT * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        own[row] = scores.softmax(-1, dtype=FLOAT).to(dtype) @ values[row, :, seen]
    want = reference.decode_attention(*doubled(query, keys, values), length, **options)
    (keys, table), (values, _) = (reference.paged(each, PAGE, torch.nan) for each in (keys, values))
    yield Check("attention", decode_attention(query, keys, values, length, table[:n], **options), want, own)


FULL = {
    "norm": [(norm, {"shape": (5, 576), "apart": 64}), (norm, {"shape": (7, 19), "apart": 3, "offset": 1}),
             (norm, {"shape": (4, 3, 64), "apart": 128}), (norm, {"shape": (2, 8192), "offset": 1}),
             (norm, {"shape": (33, 5)})],
    "rotation": [(rotation, {"shape": (5, 3, 64), "part": 64, "apart": 64}),
                 (rotation, {"shape": (3, 5, 80), "part": 32}),
                 (rotation, {"shape": (40, 1, 6), "part": 6, "apart": 3})],
    "gate": [(gate, {"rows": rows, "width": width, "apart": apart, "act": act})
             for rows, width, apart in ((2, 1536, 64), (3, 19, 3)) for act in ("silu", "gelu_tanh")],
    "log-prob": [(log_prob, {"n": 7, "d": 64, "v": 203, "bias": True}),
                 (log_prob, {"n": 131, "d": 75, "v": 203, "bias": True, "softcap": 3.0}),
                 (log_prob, {"n": 131, "d": 128, "v": 517, "temperature": 0.7, "logit_scale": 1.3}),
                 (log_prob, {"n": 33, "d": 96, "v": 130, "tf32": True}),
                 (log_prob, {"n": 1, "d": 16, "v": 1000, "softcap": 5.0})],
    "loss": [(loss, {"n": 9, "d": 32, "v": 2001, "bias": True}),
             (loss, {"n": 37, "d": 75, "v": 300, "softcap": 3.0, "temperature": 0.7}),
             (loss, {"n": 9, "d": 32, "v": 1500, "bias": True, "entropy": 0.3}),
             (loss, {"n": 5, "d": 19, "v": 77, "entropy": 0.3, "softcap": 3.0, "logit_scale": 1.3})],
    "divergence": [(divergence, {"n": 3, "d": 32, "v": 2001, "bias": True}),
                   (divergence, {"n": 5, "d": 75, "v": 300, "softcap": 3.0, "temperature": 0.7})],
    "attention": [(attention, {"heads": 2, "group": 3, "size": 16, "lengths": (1, 37, 0, 300), "places": 300}),
                  (attention, {"heads": 1, "group": 7, "size": 64, "lengths": (600, 130), "places": 601,
                               "window": 300}),
                  (attention, {"heads": 2, "group": 1, "size": 24, "lengths": (45, 3), "places": 45, "softcap": 2.0}),
                  (attention, {"heads": 1, "group": 20, "size": 128, "lengths": (70,), "places": 90})],
}
# Which of them are the cross-section.
QUICK = {"norm": (1, 2), "rotation": (1,), "gate": (3,), "log-prob": (0,), "loss": (0, 3), "divergence": (1,),
         "attention": (0,)}


def chosen_cases(quick: bool) -> dict:
    """Operation -> [(function, sizes)]; quick: a cross-section."""
    return {name: [each for index, each in enumerate(found) if not quick or index in QUICK[name]]
            for name, found in FULL.items()}
