"""What a warp does together: shuffles, matrix loads, and the products of tensor cores."""
import re

import numpy as np

from .access import words
from .formats import Fault, elements, from_bf16


def shuffle(machine, opcode, operands):
    mode = opcode.split(".")[2]
    put, read = machine.sink(operands[0]), machine.source(operands[1], np.uint32)
    by = machine.source(operands[2], np.uint32)
    assert operands[3:] == ["31", "-1"] and mode in ("bfly", "idx"), operands

    def act(active):
        machine.whole_warps(active)
        lane, step = machine.lane % 32, by().astype(np.int64)
        put(read()[machine.lane - lane + (lane ^ step if mode == "bfly" else step % 32)], active)

    return act


def matrix_rows(machine, address, warps, index: int):
    """Place the eight rows of 16 bytes of matrix `index`, which lanes 8 index to 8 index + 7 address."""
    rows, of_warp = address().reshape(-1, 32)[warps][:, 8 * index:8 * index + 8].ravel(), np.repeat(warps, 8)
    return machine.shared.place(rows, 16, machine.block[of_warp * 32]), of_warp


def load_matrix(machine, opcode, operands):
    """ldmatrix: lane l receives elements 2 (l % 4) and the next of row l / 4, or of column l / 4."""
    puts, address = [machine.sink(each) for each in words(operands[0])], machine.address(operands[1])
    assert len(puts) == int(re.search(r"\.x(\d)", opcode).group(1)), opcode
    lane = np.arange(32)

    def act(active):
        warps = machine.whole_warps(active)
        for index, put in enumerate(puts):
            where, of_warp = matrix_rows(machine, address, warps, index)
            raw = np.ascontiguousarray(machine.shared.read(where, of_warp))
            halves = raw.view(np.uint16).reshape(len(warps), 8, 8)
            if ".trans" in opcode:
                halves = halves.transpose(0, 2, 1)
            low, high = (halves[:, lane // 4, 2 * (lane % 4) + half].astype(np.uint32) for half in (0, 1))
            full = np.zeros((machine.n // 32, 32), np.uint32)
            full[warps] = low | high << np.uint32(16)
            put(full.ravel(), active)

    return act


def store_matrix(machine, opcode, operands):
    """stmatrix: ldmatrix the other way."""
    address, reads = machine.address(operands[0]), [machine.source(each, np.uint32) for each in words(operands[1])]
    assert len(reads) == int(re.search(r"\.x(\d)", opcode).group(1)), opcode
    lane = np.arange(32)

    def act(active):
        warps = machine.whole_warps(active)
        for index, read in enumerate(reads):
            value, halves = read().reshape(-1, 32)[warps], np.zeros((len(warps), 8, 8), np.uint16)
            for half in (0, 1):
                halves[:, lane // 4, 2 * (lane % 4) + half] = (value >> np.uint32(16 * half)).astype(np.uint16)
            if ".trans" in opcode:
                halves = halves.transpose(0, 2, 1)
            where, of_warp = matrix_rows(machine, address, warps, index)
            machine.shared.write(where, of_warp, np.ascontiguousarray(halves).view(np.uint8).reshape(-1, 16))

    return act


def product(machine, opcode, operands):
    """mma.sync: d (16, 8) = a (16, k) b (k, 8) + c in fp32, spread over the lanes of a warp."""
    parts = opcode.split(".")
    shape, kind = parts[3], parts[-2]
    known = (("m16n8k16", "f16"), ("m16n8k16", "bf16"), ("m16n8k8", "tf32"), ("m16n8k8", "f16"))
    if (shape, kind) not in known or parts[4:6] != ["row", "col"] or parts[-1] != "f32" or parts[-4] != "f32":
        raise NotImplementedError(opcode)
    d, a, b, c = (words(each) for each in operands)
    puts = [machine.sink(each) for each in d]
    reads_a, reads_b = ([machine.source(each, np.uint32) for each in group] for group in (a, b))
    reads_c = [machine.source(each, np.float32) for each in c]
    depth, per = int(shape.split("k")[1]), 1 if kind == "tf32" else 2
    group, place = np.arange(32) // 4, np.arange(32) % 4

    def act(active):
        warps = machine.whole_warps(active)
        left, right = np.zeros((len(warps), 16, depth)), np.zeros((len(warps), depth, 8))
        for i, read in enumerate(reads_a):
            value = elements(read().reshape(-1, 32)[warps], kind)
            for j in range(per):
                left[:, group + 8 * (i % 2), place * per + j + 4 * per * (i // 2)] = value[:, :, j]
        for i, read in enumerate(reads_b):
            value = elements(read().reshape(-1, 32)[warps], kind)
            for j in range(per):
                right[:, place * per + j + 4 * per * i, group] = value[:, :, j]
        out, results = left @ right, []
        for i, read in enumerate(reads_c):
            full = np.zeros((machine.n // 32, 32), np.float32)
            at = (slice(None), group + 8 * (i // 2), place * 2 + i % 2)
            full[warps] = out[at] + read().reshape(-1, 32)[warps].astype(np.float64)
            results.append(full.ravel())
        for put, value in zip(puts, results):
            put(value, active)

    return act


def operand(machine, descriptor, block: int, group: int, shape: tuple[int, int], kind: str):
    """Read the matrix (rows, k) float64 of a wgmma descriptor: K-major in shared memory, swizzled."""
    d, (rows, k) = int(descriptor), shape
    start, stride, mode = (d & 0x3FFF) << 4, ((d >> 32) & 0x3FFF) << 4, d >> 62
    if (d >> 49) & 7 or not mode:
        raise NotImplementedError(f"wgmma descriptor {d:#x}")
    span, row = {1: 128, 2: 64, 3: 32}[mode], np.arange(rows)[:, None]
    at = start + row // 8 * stride + row % 8 * span + np.arange(k * (4 if kind == "tf32" else 2))[None, :]
    at = at ^ (((at >> 7) & (span // 16 - 1)) << 4)
    if at.max() >= machine.shared.span:
        raise Fault("wgmma outside shared memory")
    raw = machine.shared.read_group(at + block * machine.shared.span, group)
    if kind == "tf32":
        return elements(raw.view(np.uint32), kind)[..., 0]
    return (from_bf16(raw.view(np.uint16)) if kind == "bf16" else raw.view(np.float16)).astype(np.float64)


def group_product(machine, opcode, operands):
    """wgmma: d (64, n) (+)= a (64, k) b (n, k), both in shared memory, by four warps, at the wait."""
    m, n, k = map(int, re.search(r"m(\d+)n(\d+)k(\d+)", opcode).groups())
    kind = opcode.split(".")[-1]
    registers = [machine.registers[each] for each in words(operands[0])]
    left, right = (machine.source(each, np.uint64) for each in operands[1:3])
    keep = machine.source(operands[3], np.bool_)
    if operands[4:] not in (["1", "1", "0", "0"], ["1", "1"]):
        raise NotImplementedError(f"{opcode} {operands[4:]}")
    lane = np.arange(128)
    row, column = 16 * (lane // 32) + lane % 32 // 4, 2 * (lane % 4)

    def work(group, a, b, kept):
        block = group * 128 // machine.threads
        out = operand(machine, a, block, group, (m, k), kind) @ operand(machine, b, block, group, (n, k), kind).T
        for i, register in enumerate(registers):
            view = register[group * 128:group * 128 + 128].view(np.float32)
            view[:] = out[row + 8 * (i // 2 % 2), column + 8 * (i // 4) + i % 2] + np.where(kept, view, 0.0)

    def act(active):
        machine.whole_warps(active)
        for group in range(machine.n // 128):
            lanes = slice(group * 128, group * 128 + 128)
            if active is not None and not active[lanes].any():
                continue
            a, b = left()[lanes], right()[lanes]
            if (a != a[0]).any() or (b != b[0]).any():
                raise Fault("wgmma descriptors differ within a group of warps")
            machine.products[-1].append((work, group, a[0], b[0], keep()[lanes].copy()))

    return act


def commit_products(machine, opcode, operands):
    return lambda active: machine.products.append([])


def wait_for_products(machine, opcode, operands):
    keep = int(operands[0])

    def act(active):
        while len(machine.products) > keep + 1:
            for work, *arguments in machine.products.pop(0):
                work(*arguments)

    return act
