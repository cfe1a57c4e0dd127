"""Loads and stores of a wave. Each is a piece of work that waits in a queue until the program waits for it."""
import re

import numpy as np

from .wave import LANES, NAN, Operand

WORDS = {"dword": 1, "dwordx2": 2, "dwordx3": 3, "dwordx4": 4, "dwordx8": 8, "dwordx16": 16,
         "b32": 1, "b64": 2, "b96": 3, "b128": 4}
NARROW = {"ushort": 2, "short": 2, "ubyte": 1, "byte": 1, "u16": 2, "b16": 2, "u8": 1, "b8": 1}


def offset_of(modifiers: str, name: str = "offset") -> int:
    match = re.search(rf"\b{name}:(\d+)", modifiers)
    return int(match.group(1)) if match else 0


def width_of(kind: str) -> int:
    """Bytes that a lane moves."""
    return 4 * WORDS[kind] if kind in WORDS else NARROW[kind]


def poison(w, to: Operand, words: int) -> None:
    for word in range(words):
        w.put(to.index + word, NAN)


def deliver(w, to: Operand, lanes, raw) -> None:
    """Write bytes (n, width) into the registers of lanes (n,)."""
    if raw.shape[1] < 4:
        raw = np.pad(raw, ((0, 0), (0, 4 - raw.shape[1])))
    words = np.ascontiguousarray(raw).view(np.uint32)
    for word in range(words.shape[1]):
        w.v[to.index + word][lanes] = words[:, word]


def taken(w, source: Operand, lanes, width: int):
    """Bytes (n, width) of the registers of lanes (n,)."""
    words = np.stack([np.broadcast_to(source.word(w, word), 64)[lanes] for word in range(-(-width // 4))], 1)
    return np.ascontiguousarray(words).view(np.uint8)[:, :width]


def queue_global(w, load: bool, data: Operand, width: int, address, within) -> None:
    """Queue an access of the active lanes; those not `within` load 0, and store nothing."""
    lanes = LANES[w.mask]
    at, real = np.broadcast_to(address, 64)[lanes].astype(np.uint64), np.broadcast_to(within, 64)[lanes]
    memory = w.machine.memory
    if load:
        poison(w, data, -(-width // 4))

        def work(w):
            raw = np.zeros((len(lanes), width), np.uint8)
            if real.any():
                raw[real] = memory.read(at[real], width)
            deliver(w, data, lanes, raw)
    else:
        raw = taken(w, data, lanes, width)

        def work(w):
            if real.any():
                memory.write(at[real], raw[real])

    w.loads.append(work)


def build_buffer(name: str, operands: list[Operand], modifiers: str):
    """buffer_load, buffer_store: by descriptor (base, bytes), what lies beyond is not touched."""
    load, width = "_load_" in name, width_of(name.rpartition("_")[2])
    data, index, descriptor, extra = operands
    inner = offset_of(modifiers)
    if "offen" not in modifiers or "idxen" in modifiers or "lds" in modifiers or extra.value != 0:
        raise NotImplementedError(name + modifiers)

    def act(w):
        base = w.scalar(descriptor.index, 2) & (1 << 48) - 1
        at = np.asarray(index.word(w), np.uint64) + np.uint64(inner)
        within = at + np.uint64(width) <= np.uint64(w.scalar(descriptor.index + 2))
        queue_global(w, load, data, width, at + np.uint64(base), within)

    return act


def build_global(name: str, operands: list[Operand], modifiers: str):
    load, width = "_load_" in name, width_of(name.rpartition("_")[2])
    first, second, base = operands
    data, address = (first, second) if load else (second, first)
    inner = re.search(r"\boffset:(-?\d+)", modifiers)
    inner = int(inner.group(1)) if inner else 0

    def act(w):
        at = address.wide(w) if base.index is None else address.word(w).astype(np.uint64) + np.uint64(
            w.scalar(base.index, 2))
        queue_global(w, load, data, width, at + np.uint64(inner & (1 << 64) - 1), True)

    return act


def build_scalar(name: str, operands: list[Operand], modifiers: str):
    words = WORDS[name.rpartition("_")[2]]
    to, base, offset = operands

    def act(w):
        address = np.array([w.scalar(base.index, 2) + offset.scalar(w)], np.uint64)
        w.set_scalar(to.index, sum(int(NAN) << 32 * word for word in range(words)), words)

        def work(w):
            # 4 bytes at a time: a load of 32 need not be aligned to 32
            steps = np.uint64(4) * np.arange(words, dtype=np.uint64)
            raw = w.machine.memory.read(address + steps, 4)
            w.set_scalar(to.index, int.from_bytes(raw.tobytes(), "little"), words)

        w.others.append(work)

    return act


def places(name: str, modifiers: str, width: int) -> list[int]:
    """Byte offsets of the one or two accesses of a ds instruction."""
    if "read2" not in name and "write2" not in name:
        return [offset_of(modifiers)]
    step = width * (64 if "st64" in name else 1)
    return [offset_of(modifiers, "offset0") * step, offset_of(modifiers, "offset1") * step]


def build_shared(name: str, operands: list[Operand], modifiers: str):
    if name in ("ds_bpermute_b32", "ds_swizzle_b32"):
        return build_exchange(name, operands, modifiers)
    width = width_of(name.rpartition("_")[2])
    offsets, load = places(name, modifiers, width), "read" in name
    words = -(-width // 4)

    def act(w):
        lanes = LANES[w.mask]
        address = np.broadcast_to((operands[1] if load else operands[0]).word(w), 64)[lanes].astype(np.int64)
        shared, number = w.machine.shared, np.full(len(lanes), w.number)
        block = np.zeros(len(lanes), np.int64)
        if load:
            poison(w, operands[0], words * len(offsets))

            def work(w):
                for index, offset in enumerate(offsets):
                    raw = shared.read(shared.place(address + offset, width, block), number)
                    deliver(w, shifted(operands[0], index * words), lanes, raw)
        else:
            data = [taken(w, each, lanes, width) for each in operands[1:]]

            def work(w):
                for offset, raw in zip(offsets, data):
                    shared.write(shared.place(address + offset, width, block), number, raw)

        if len(lanes):
            w.others.append(work)

    return act


def shifted(operand: Operand, by: int) -> Operand:
    return Operand(f"v{operand.index + by}")


def build_exchange(name: str, operands: list[Operand], modifiers: str):
    """ds_bpermute, ds_swizzle: numbers between lanes, 0 from a lane that is not active."""
    to = operands[0]
    swap = re.search(r"swizzle\(SWAP,(\d+)\)", modifiers)
    if name == "ds_swizzle_b32" and not swap:
        raise NotImplementedError(name + modifiers)

    def act(w):
        lane = LANES ^ int(swap.group(1)) if swap else operands[1].word(w).astype(np.int64) + offset_of(modifiers) >> 2
        source = (operands[1] if swap else operands[2]).word(w)
        lane = lane % 64
        value, mask = np.where(w.mask[lane], source[lane], np.uint32(0)), w.mask
        poison(w, to, 1)
        w.others.append(lambda w: np.copyto(w.v[to.index], value, where=mask))

    return act


def build_wait(modifiers: str):
    counts = {name: int(count) for name, count in re.findall(r"(\w+)\((\d+)\)", modifiers)}

    def act(w):
        if "vmcnt" in counts:
            w.wait(w.loads, counts["vmcnt"])
        if "lgkmcnt" in counts:
            w.wait(w.others, counts["lgkmcnt"])

    return act
