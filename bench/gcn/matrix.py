"""v_mfma: d (M, M) = a (M, K) b (K, M) + c, spread over the 64 lanes of a wave."""
import re

import numpy as np

from ..ptx.formats import elements
from .wave import LANES, Operand


def read_matrix(w, source: Operand, kind: str, size: int, depth: int):
    """(size, depth) float64: lane l holds row l % size, and of it numbers p (l // size) to the next."""
    per = size * depth // 64
    if kind == "f32":
        numbers = w.v[source.index].view(np.float32).astype(np.float64)[:, None]
    else:
        words = np.stack([w.v[source.index + word] for word in range(source.words)], 1)  # (64, words)
        numbers = elements(words, "tf32" if kind == "xf32" else kind).reshape(64, -1)
    assert numbers.shape[1] == per, source.text
    out = np.empty((size, depth))
    for index in range(per):
        out[LANES % size, per * (LANES // size) + index] = numbers[:, index]
    return out


def build(name: str, operands: list[Operand], modifiers: str):
    size, depth, kind = re.fullmatch(r"v_mfma_f32_(?:16x16|32x32)x\d+_(?:x?f32|b?f16)", name) and re.search(
        r"_(\d+)x\d+x(\d+)_(\w+)$", name).groups() or (0, 0, name)
    size, depth = int(size), int(depth)
    to, a, b, c = operands
    if not size or modifiers:
        raise NotImplementedError(name + modifiers)
    column, first = LANES % size, 4 * (LANES // size)

    def act(w):
        if not w.mask.all():
            raise NotImplementedError("v_mfma with lanes that are not active")
        out = read_matrix(w, a, kind, size, depth) @ read_matrix(w, b, kind, size, depth).T
        results = []
        for index in range(to.words):
            row = index // 4 * (4 * 64 // size) + first + index % 4
            old = w.v[c.index + index].view(np.float32) if c.value is None else np.zeros(64)
            results.append((out[row, column] + old.astype(np.float64)).astype(np.float32).view(np.uint32))
        for index, value in enumerate(results):
            w.v[to.index + index] = value

    return act
