"""Every kernel against float64, beside torch's own error in the same dtype.

A number may be as far from float64 as the worst of torch's own in its row, and two roundings of the row's largest
number (in fp32 1e-5 of it) farther. The tests hold each number to torch's own error in that place; of as many as here
some would miss that by chance.
"""
import itertools
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from torch.nn import functional

from bench.gpu.common import Found
from minimath.kernels import elementwise, linear_cross_entropy, linear_kl, linear_logp, linear_token_loss, reference
from minimath.kernels.common import runs_triton
from minimath.kernels.decode_attention import decode_attention, in_torch
from minimath.kernels.decode_attention_triton import PAGE

HEADS = {"plain": {}, "bias": {"bias": True}, "capped": {"softcap": 30.0, "logit_scale": 0.5},
         "warm": {"temperature": 0.7}}
LOSSES = {  # of the statistics of some rows, and numbers drawn for each of them
    "nll": lambda stats, draw: -stats.logp,
    "ratio": lambda stats, draw: -draw * torch.exp(stats.logp - stats.logp.detach() + 0.1 * draw),
    "all four": lambda stats, draw: -0.9 * stats.logp - 0.1 * stats.mean_logp - 0.01 * stats.entropy
    + 1e-3 * stats.lse.square()}
ODD, SMALL = (67, 96, 1009), (19, 12, 203)
# one row; odd; two chunks of rows and a tile of 17 columns; a last tile of 3,627; heads of Qwen2.5-0.5B and 7B
SHAPES = ((1, 64, 1000), ODD, (2100, 64, 8209), (131, 75, 20_011), (300, 896, 151_936), (40, 3584, 152_064))
TINY_SHAPES = ((1, 8, 50), SMALL, (9, 16, 4113))  # on a CPU a tile has 4,096 columns
LOGP_ERROR = 1e-3  # of a log-prob whose logits never leave the registers


class Head(NamedTuple):
    """One comparison of a linear head."""
    shape: tuple[int, int, int]
    head: str
    loss: str
    trained: bool = False


def kernels(found: Found) -> None:
    """Compare all kernels in all dtypes that the device computes."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    if found.device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        found.skip("bf16: the card does not compute it")
        dtypes.remove(torch.bfloat16)
    found.row("path", triton=runs_triton(torch.empty(1, device=found.device)))
    for dtype in dtypes:
        for case in head_cases(found.tiny):
            compare(found, dtype, "linear_token_loss", case._asdict(), *token_loss(found.device, dtype, case))
            if case.loss == "nll":
                compare(found, dtype, "linear_logp", case._asdict(), *log_prob(found.device, dtype, case))
                compare(found, dtype, "linear_kl", case._asdict(), *divergence(found.device, dtype, case))
        for case, reduction in itertools.product(head_cases(found.tiny)[:2], ("mean", "sum", "none")):
            compare(found, dtype, "linear_cross_entropy", {"shape": case.shape, "reduction": reduction},
                    *cross_entropy(found.device, dtype, case, reduction))
        for name, given, *three in elementwise_cases(found.device, dtype, found.tiny):
            compare(found, dtype, name, given, *three)
    for dtype in dtypes:  # the newest kernel last: an error of the card would end the others
        for given, *three in attention_cases(found.device, dtype, found.tiny):
            compare(found, dtype, "decode_attention", given, *three)
    for name in dict.fromkeys(row["kernel"] for row in found.all["rows"] if row["what"] == "kernel"):
        mine = [row for row in found.all["rows"] if row.get("kernel") == name]
        found.figure(f"{name}: {len(mine)} cases, worst {max(row['worst'] for row in mine):.2f} of what is allowed, "
                     f"{'all' if all(row['same bits'] for row in mine) else 'NOT all'} the same bits twice")


def compare(found: Found, dtype: torch.dtype, kernel: str, given: dict, ours: Callable, exact: Callable,
            theirs: Callable) -> None:
    """Check one case; each function returns tensors by name."""
    words = f"{kernel} {str(dtype)[6:]} {given}"
    with found.guard(words):
        got, again, want, other = ours(), ours(), exact(), theirs()
        same = all(torch.equal(got[name], again[name]) for name in got)
        shares = {name: share(got[name], want[name], other[name], dtype) for name in got}
        errors = {name: float((got[name].double() - want[name]).norm() / want[name].norm().clamp(min=1e-300))
                  for name in got}
        worst = max(shares.values(), key=lambda value: value if value == value else torch.inf)
        found.row("kernel", kernel=kernel, dtype=str(dtype)[6:], **given, worst=worst, errors=errors,
                  **{"same bits": same})
        found.check(words, worst <= 1, f"{worst:.2f} times what is allowed ({shares})")
        found.check(words, same, "other bits the second time")
        if "logp" in errors and kernel == "linear_logp" and runs_triton(got["logp"].to(dtype)):
            off = float((got["logp"].double() - want["logp"]).abs().max())
            found.check(words, off <= LOGP_ERROR, f"log-probs off by {off:.1e}")


def share(got, want, other, dtype) -> float:
    """Find the worst distance from float64, as a share of what is allowed."""
    got, other, kind = got.double(), other.double(), torch.finfo(dtype)

    def largest(x):  # of the row; of numbers one a row, of all
        return x.abs().amax(-1, keepdim=True) if x.dim() > 1 else x.abs().max()
    rounding = max(2 * kind.eps, 1e-5) * largest(want).clamp(min=kind.smallest_normal)
    return float(((got - want).abs() / (largest(other - want) + rounding)).max())


# ---- linear heads

def head_cases(tiny: bool) -> list[Head]:
    """List the cases: all shapes, plain; an odd one with every head and loss."""
    odd = SMALL if tiny else ODD
    return [Head(shape, "plain", "nll") for shape in (TINY_SHAPES if tiny else SHAPES)] + [
        Head(odd, head, loss) for head in HEADS for loss in LOSSES if (head, loss) != ("plain", "nll")] + [
        Head(odd, head, "all four", trained=True) for head in ("plain", "bias", "capped")]


def drawn(device, dtype, case: Head):
    """Draw hidden, weight, bias or None, target, row numbers; then head options."""
    n, d, v = case.shape
    draw = torch.Generator(device).manual_seed(n + v)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, device=device)
    hidden, weight = normal(n, d).to(dtype), (normal(v, d) * 2 / d**0.5).to(dtype)
    options = dict(HEADS[case.head])
    bias = normal(v).to(dtype) if options.pop("bias", False) else None
    target = torch.randint(0, v, (n,), generator=draw, device=device)
    target[1::7] = -100
    target[0] = v - 1
    return hidden, weight, bias, target, normal(n), options


def own_logits(hidden, weight, *, bias=None, temperature=1.0, softcap=0.0, logit_scale=1.0):
    """Make logits in the dtype of the inputs; stands for reference.full_logits."""
    logits = logit_scale * functional.linear(hidden, weight, bias).float()
    return (softcap * torch.tanh(logits / softcap) if softcap else logits) / temperature


def token_loss(device, dtype, case: Head):
    """Make the three functions of linear_token_loss: all that it returns, gradients."""
    hidden, weight, bias, target, draw, options = drawn(device, dtype, case)
    counted = int((target != -100).sum())

    def run(function, kind):
        leaves = [None if each is None else each.detach().to(kind).requires_grad_(number == 0 or case.trained)
                  for number, each in enumerate((hidden, weight, bias))]
        x, w, b = leaves
        numbers = draw.to(torch.promote_types(kind, torch.float32))
        loss, stats = function(x, w, target, lambda s, rows: LOSSES[case.loss](s, numbers[rows]) / counted, bias=b,
                               **options)
        loss.backward()
        grads = {f"gradient in {name}": each.grad for name, each in zip(("hidden", "weight", "bias"), leaves)
                 if each is not None and each.grad is not None}
        return {"loss": loss.detach()[None], **stats._asdict(), **grads}
    return three(linear_token_loss, reference.linear_token_loss, run, dtype)


def log_prob(device, dtype, case: Head):
    """Make those of linear_logp: statistics without gradient; that of log-probs."""
    hidden, weight, bias, target, draw, options = drawn(device, dtype, case)

    def run(function, kind):
        x, w = hidden.detach().to(kind).requires_grad_(), weight.to(kind)
        b = None if bias is None else bias.to(kind)
        with torch.no_grad():
            stats = function(x, w, target, bias=b, return_stats=True, **options)
        (function(x, w, target, bias=b, **options) * draw).sum().backward()
        return {**stats._asdict(), "gradient in hidden": x.grad}
    return three(linear_logp, reference.linear_logp, run, dtype)


def divergence(device, dtype, case: Head):
    """Make those of linear_kl, of a teacher a third of hidden's size away."""
    hidden, weight, bias, _, draw, options = drawn(device, dtype, case)
    teacher = (hidden.float() + 0.3 * hidden.float().roll(1, -1)).to(dtype)

    def run(function, kind):
        x, b = hidden.detach().to(kind).requires_grad_(), None if bias is None else bias.to(kind)
        kl = function(x, teacher.to(kind), weight.to(kind), bias=b, **options)
        (kl * draw).sum().backward()
        return {"kl": kl.detach(), "gradient in hidden": x.grad}
    return three(linear_kl, reference.linear_kl, run, dtype)


def cross_entropy(device, dtype, case: Head, reduction: str):
    hidden, weight, _, target, draw, _ = drawn(device, dtype, case)

    def run(function, kind):
        x = hidden.detach().to(kind).requires_grad_()
        loss = function(x, weight.to(kind), target, reduction=reduction, label_smoothing=0.1)
        (loss * draw if reduction == "none" else loss).sum().backward()
        return {"loss": loss.detach().reshape(-1), "gradient in hidden": x.grad}

    def torchs(hidden, weight, target, **options):
        logits = hidden @ weight.t()
        return functional.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, **options)
    return three(linear_cross_entropy, torchs, run, dtype)


def three(kernel, formula, run, dtype):
    """Pair kernel, formula in float64, and formula over torch's logits in dtype."""
    def theirs():
        with mock.patch.object(reference, "full_logits", own_logits):
            return run(formula, dtype)
    return (lambda: run(kernel, dtype)), (lambda: run(formula, torch.float64)), theirs


# ---- elementwise

def own_norm(x, weight, eps, offset):
    """RMSNorm as transformers' layers round it: Llama's, or Gemma's with an offset."""
    y = x.float() * (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    return (y * (weight.float() + 1)).to(x.dtype) if offset else y.to(x.dtype) * weight


def own_rotated(x, cos, sin):
    c, s, (x1, x2) = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype), x.chunk(2, -1)
    return x * c + torch.cat((-x2, x1), -1) * s


def own_gated(gate_up, act):
    a, u = gate_up.chunk(2, -1)
    return (functional.silu(a) if act == "silu" else functional.gelu(a, approximate="tanh")) * u


def with_gradient(formula, x, dy, *others):
    """Result and gradient in x of a formula, for dy."""
    x = x.detach().requires_grad_()
    y = formula(x, *others)
    return {"result": y.detach(), "gradient": torch.autograd.grad(y, x, dy.to(y.dtype))[0]}


def elementwise_cases(device, dtype, tiny: bool):
    """Yield name, sizes, and the three functions; rows lie apart in wider buffers."""
    draw = torch.Generator(device).manual_seed(0)

    def apart(rows, *shape):
        wide = torch.randn(rows, shape[0] * (shape[1] if len(shape) > 1 else 1) + 16, generator=draw, device=device)
        return (2 * wide).to(dtype)[:, :-16].unflatten(-1, shape)

    def pair(ours, formula, own, x, dy, *others):
        wide = [each.double() if torch.is_tensor(each) else each for each in others]
        return ours, (lambda: with_gradient(formula, x.double(), dy.double(), *wide)), \
            (lambda: with_gradient(own, x, dy, *others))

    rows, width, dim = (5, 24, 8) if tiny else (333, 896, 64)
    for offset in (0, 1):
        x, dy, weight = apart(rows, width), apart(rows, width), apart(1, width)[0]

        def norm(x=x, dy=dy, weight=weight, offset=offset):
            y, r = elementwise.rms_norm(x, weight, 1e-6, offset)
            return {"result": y, "gradient": elementwise.rms_norm_backward(dy, x, weight, r, offset)}
        yield "rms_norm", {"shape": [rows, width], "offset": offset}, *pair(
            norm, reference.rms_norm, own_norm, x, dy, weight, 1e-6, offset)
    x, dy = apart(rows, 3, dim), apart(rows, 3, dim)
    angle = torch.outer(torch.arange(rows, device=device) * 1.7, 0.3 ** torch.arange(dim // 2, device=device))
    cos, sin = angle.repeat(1, 2).cos().to(dtype), angle.repeat(1, 2).sin().to(dtype)

    def rotation():
        y, grad = x.clone(), dy.clone()
        elementwise.rotate(y, cos, sin)
        elementwise.rotate(grad, cos, sin, back=True)
        return {"result": y, "gradient": grad}
    yield "rotate", {"shape": [rows, 3, dim]}, *pair(rotation, reference.rotated, own_rotated, x, dy, cos, sin)
    for act in ("silu", "gelu_tanh"):
        x, dy = apart(rows, 2 * width), apart(rows, width)

        def gate(x=x, dy=dy, act=act):
            grad, _ = elementwise.gated_backward(dy, x, act)
            return {"result": elementwise.gated(x, act), "gradient": grad}
        yield "gated", {"shape": [rows, 2 * width], "act": act}, *pair(
            gate, reference.gated, own_gated, x, dy, act)


# ---- decode attention

def attention_cases(device, dtype, tiny: bool):
    """Yield sizes and the three functions, over rows of unlike length."""
    sizes = ((2, 3, 16, 96),) if tiny else ((2, 7, 64, 1024), (4, 7, 128, 8192), (3, 3, 80, 448), (8, 1, 256, 512))
    kinds = [(sizes[0], window, softcap) for window in (0, 50) for softcap in (0.0, 30.0)]
    for (heads, shared, dim, places), window, softcap in kinds + [(size, 0, 0.0) for size in sizes[1:]]:
        draw = torch.Generator(device).manual_seed(places)
        length = [1, 2, 31, 64, 65, places - 1, places, 0, places // 2 + 1]
        rows = len(length)
        query, keys, values = (torch.randn(*shape, generator=draw, device=device).to(dtype) for shape in (
            (rows, heads, shared, dim), (rows + 2, heads, places, dim), (rows + 2, heads, places, dim)))
        length = torch.tensor(length, device=device)
        options = {"scale": 2 * dim**-0.5, "window": window, "softcap": softcap}

        def ours(query=query, keys=keys, values=values, length=length, options=options):
            (keys, table), (values, _) = (reference.paged(each, PAGE) for each in (keys, values))
            found = {"result": decode_attention(query, keys, values, length, table[:len(query)], **options)}
            if runs_triton(query) and query.shape[-1] <= 128:  # larger heads go through torch on some chips
                alone = [decode_attention(query[i:i + 1], keys, values, length[i:i + 1], table[i:i + 1], **options)
                         for i in range(len(query))]
                if not torch.equal(torch.cat(alone), found["result"]):
                    raise ArithmeticError("a row alone has other bits than in a batch")
            return found
        yield ({"shape": [rows, heads, shared, dim, places], "window": window, "softcap": softcap}, ours,
               lambda q=query, k=keys, v=values, n=length, o=options: {
                   "result": reference.decode_attention(q.double(), k.double(), v.double(), n, **o)},
               lambda q=query, k=keys, v=values, n=length, o=options: {
                   "result": in_torch(q, k[:len(q)], v[:len(q)], n, o["scale"], o["window"], o["softcap"])})
