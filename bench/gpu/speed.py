"""Loss and gradient of a linear head, and decode attention, beside peers in turns."""
import itertools
from unittest import mock

import torch
from torch.nn.functional import scaled_dot_product_attention

from bench import kernels
from bench.cards import card_named
from bench.gpu.common import Found, seconds
from minimath.kernels.decode_attention import decode_attention, in_torch
from minimath.kernels.decode_attention_triton import PAGE
from minimath.kernels.reference import paged

SHAPES = (kernels.Shape(4096, 896, 151_936), kernels.Shape(2048, 3584, 152_064))
SLOW_TO_START = ("torch.compile", "cut-cross-entropy")  # a compilation on a CPU takes longer than a tiny run
ATTENTION = {"Qwen2.5-0.5B": (2, 7, 64), "Qwen2.5-7B": (4, 7, 128)}  # key heads, query heads of each, head size


def speed(found: Found) -> None:
    """Measure both; a peer that does not run is a result."""
    card = card_named(torch.cuda.get_device_name()) if found.device == "cuda" else None
    if card is None:
        found.skip("share of the roofline: the device is not in bench/cards.py")
    for shape in (kernels.Shape(16, 8, 300),) if found.tiny else SHAPES:
        with found.guard(f"head {shape}"):
            heads(found, shape, card)
    for name, sizes in ATTENTION.items():
        with found.guard(f"decode attention, {name}"):
            attention(found, name, sizes, card)


def heads(found: Found, shape, card) -> None:
    """Take bench.kernels' turns, but no fresh processes: those take ten minutes."""
    def inputs(shape, dtype, device):
        draw = torch.Generator(device).manual_seed(0)
        hidden, weight = (torch.randn(n, shape.d, generator=draw, device=device) for n in (shape.n, shape.v))
        return (hidden.to(dtype).requires_grad_(), (weight * (2 / shape.d**0.5)).to(dtype),
                torch.randint(0, shape.v, (shape.n,), generator=draw, device=device))

    def warm(name, shape, dtype, phase, device):
        arguments = inputs(shape, kernels.DTYPES[dtype], device)
        peak = kernels.peak_extra_bytes(methods[name], kernels.PHASES[phase], arguments, device)
        return kernels.Cold(peak, float("nan"), float("nan"))
    methods = {name: method for name, method in kernels.methods(found.device).items()
               if not (found.tiny and name in SLOW_TO_START)}
    with mock.patch.multiple(kernels, inputs=inputs, cold_in_child=warm, methods=lambda device: methods):
        rows = kernels.measure(shape, "bf16", found.device, 5, card)
    for row in rows:
        found.row("head", **{name: value for name, value in row.items() if value == value})
        times = ", ".join(f"{phase} {1e3 * row[f'{phase} median s']:.2f} ms" + (
            f" ({row[f'{phase} share of roofline']:.0%} of the roofline)" if card else "") for phase in kernels.PHASES)
        found.figure(f"head {shape} bf16, {row['method']}: {times}, peak "
                     f"{row['forward+backward peak bytes'] / 1e6:.0f} MB")


def attention(found: Found, name: str, sizes: tuple[int, int, int], card) -> None:
    """Time decode attention over rows of 100 to all places, beside torch's."""
    heads, shared, dim = sizes
    rows, places, calls = (3, 128, 1) if found.tiny else (64, 2048, 20)
    draw = torch.Generator(found.device).manual_seed(0)
    layers = 1 if found.tiny else 4  # in turns, as in a model: keys and values of one could stay in the card's cache
    query, *cache = (torch.randn(rows, heads, n, dim, generator=draw, device=found.device).bfloat16()
                     for n in (shared, *[places] * 2 * layers))
    turns = itertools.cycle(zip(cache[::2], cache[1::2]))
    length = torch.linspace(100, places, rows, device=found.device).long()
    seen = torch.arange(places, device=found.device) < length[:, None, None, None]  # (n, 1, 1, T)
    mask = torch.zeros(seen.shape, dtype=query.dtype, device=found.device).masked_fill_(~seen, -1e30)
    flat, scale = query.reshape(rows, heads * shared, 1, dim), dim**-0.5
    *pools, table = *(paged(each, PAGE)[0] for each in cache), paged(cache[0], PAGE)[1]
    blocks = itertools.cycle(zip(pools[::2], pools[1::2]))
    methods = {
        "minimath": lambda: decode_attention(query, *next(blocks), length, table, scale=scale),
        "sdpa, grouped rows": lambda: scaled_dot_product_attention(query, *next(turns), mask, scale=scale),
        "sdpa, enable_gqa": lambda: scaled_dot_product_attention(flat, *next(turns), mask, scale=scale,
                                                                 enable_gqa=True),
        "eager": lambda: in_torch(query, *next(turns), length, scale, 0, 0.0),
    }
    if not found.tiny:
        methods["torch.compile of eager"] = lambda: compiled(query, *next(turns), length, scale, 0, 0.0)
        compiled = torch.compile(in_torch)
    least = 2 * 2 * heads * dim * int(length.sum()) / card.bandwidth if card else None  # keys and values, 16 bit
    for method, run in methods.items():
        try:
            taken = seconds(run, found.device, calls=calls)
        except Exception as error:
            if method == "minimath":
                raise
            found.skip(f"decode attention, {method}: {type(error).__name__}: {error}"[:200])
            continue
        share = least / taken if card else None
        found.row("decode attention", model=name, rows=rows, places=places, method=method, seconds=taken, share=share)
        found.figure(f"decode attention, {name}, {rows} rows of 100 to {places} places, {method}: {1e6 * taken:,.0f} us"
                     + (f" ({share:.0%} of the bandwidth)" if card else ""))
