"""Moves, conversions, comparisons and arithmetic of single threads."""
from functools import reduce

import numpy as np

from .access import words
from .formats import Fault, S, U, bits_of, flushed, from_bf16, is_real, numpy_type, to_bf16

COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
           "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}
LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
SIMPLE = {"add": np.add, "sub": np.subtract, "neg": np.negative, "abs": np.abs}


def move(machine, opcode, operands):
    """mov, also of a register's parts: {low, high} = register, register = {low, high}."""
    to, source = operands
    if to.startswith("{"):
        puts, register = [machine.sink(each) for each in words(to)], machine.registers[source]
        part = 8 * register.itemsize // len(puts)

        def unpack(active):
            values = [(register >> register.dtype.type(part * i)).astype(U[part]) for i in range(len(puts))]
            for put, value in zip(puts, values):
                put(value, active)

        return unpack
    put = machine.sink(to)
    if not source.startswith("{"):
        read = machine.source(source, numpy_type(opcode.split(".")[1]))
        return lambda active: put(read(), active)
    wide, names = machine.registers[to].dtype.type, words(source)
    part = bits_of(wide) // len(names)
    reads = [machine.source(each, U[part]) for each in names]

    def pack(active):
        value = np.zeros(machine.n, wide)
        for i, read in enumerate(reads):
            value |= read().astype(wide) << wide(part * i)
        put(value, active)

    return pack


def convert(machine, opcode, operands):
    *flags, to, source = opcode.split(".")[1:]
    put = machine.sink(operands[0])
    if to in ("bf16x2", "f16x2"):
        high, low = (machine.source(each, np.float32) for each in operands[1:3])
        half = to_bf16 if to == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
        check(flags == ["rn"] and source == "f32", opcode)
        return lambda active: put(half(low()).astype(np.uint32) | half(high()).astype(np.uint32) << np.uint32(16),
                                  active)
    if source == "bf16":
        check(to == "f32", opcode)
        return unary(machine, operands, np.uint16, from_bf16)
    if to == "bf16":
        check(source == "f32" and flags == ["rn"], opcode)
        return unary(machine, operands, np.float32, to_bf16)
    if to == "tf32":
        check(source == "f32" and flags == ["rna"], opcode)
        return unary(machine, operands, np.uint32, lambda x: (x + np.uint32(0x1000)) & np.uint32(0xFFFFE000))
    of, target = numpy_type(source), numpy_type(to)
    check(is_real(target) or not is_real(of), opcode)
    check(not (is_real(target) and is_real(of)) or "rn" in flags or bits_of(target) > bits_of(of), opcode)
    return unary(machine, operands, of, lambda x: x.astype(target))


def unary(machine, operands, dtype, function):
    put, read = machine.sink(operands[0]), machine.source(operands[1], dtype)
    return lambda active: put(function(read()), active)


def check(known: bool, opcode: str) -> None:
    if not known:
        raise NotImplementedError(opcode)


def test_of(name: str, dtype):
    """Make the function (a, b) -> bool of a comparison; of reals those that end in u are true for NaN."""
    if not is_real(dtype):
        return COMPARE[name]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) ^ (name == "num")
    unordered = name.endswith("u")
    base = COMPARE[name.removesuffix("u")]
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), unordered, base(a, b))


def compare(machine, opcode, operands):
    name, *join, kind = opcode.split(".")[1:]
    dtype, put = numpy_type(kind), machine.sink(operands[0])
    a, b = (machine.source(each, dtype) for each in operands[1:3])
    test = test_of(name, dtype)
    if not join:
        return lambda active: put(test(a(), b()), active)
    check(len(join) == 1 and join[0] in LOGIC, opcode)
    c = machine.source(operands[3], np.bool_)
    return lambda active: put(LOGIC[join[0]](test(a(), b()), c()), active)


def select(machine, opcode, operands):
    dtype, put = numpy_type(opcode.split(".")[1]), machine.sink(operands[0])
    a, b = (machine.source(each, dtype) for each in operands[1:3])
    predicate = machine.source(operands[3], np.bool_)
    return lambda active: put(np.where(predicate(), a(), b()), active)


def shift(machine, opcode, operands):
    """shl, shr: by the width or more gives 0, or the sign."""
    dtype, put = numpy_type(opcode.split(".")[1]), machine.sink(operands[0])
    a, b = machine.source(operands[1], dtype), machine.source(operands[2], np.uint32)
    function = np.left_shift if opcode.startswith("shl") else np.right_shift
    keeps_sign = opcode.startswith("shr") and dtype in S.values()
    bits = bits_of(dtype)

    def act(active):
        by = b()
        value = function(a(), np.minimum(by, bits - 1).astype(dtype))
        put(value if keeps_sign else np.where(by < bits, value, dtype(0)), active)

    return act


def widening(machine, opcode, operands):
    """mul.wide, mad.wide: a product of twice the width."""
    kind = opcode.split(".")[2]
    dtype, put = numpy_type(kind), machine.sink(operands[0])
    double = (S if kind[0] == "s" else U)[2 * bits_of(dtype)]
    a, b = (machine.source(each, dtype) for each in operands[1:3])
    if opcode.startswith("mul"):
        return lambda active: put(a().astype(double) * b().astype(double), active)
    c = machine.source(operands[3], double)
    return lambda active: put(a().astype(double) * b().astype(double) + c(), active)


def elementwise(machine, opcode, operands):
    """Everything whose operands and result have one type, and its forms for pairs and for sums with halves."""
    if opcode.endswith((".f32.f16", ".f32.bf16")):
        return with_halves(machine, opcode, operands)
    if opcode.endswith(".f32x2"):
        return paired(machine, opcode, operands)
    head, *flags, kind = opcode.split(".")
    dtype, put = numpy_type(kind), machine.sink(operands[0])
    function = (of_reals if is_real(dtype) else of_integers)(head, flags, dtype, machine.noise)
    check(function is not None, opcode)
    reads = [machine.source(each, dtype) for each in operands[1:]]
    check(not isinstance(function, np.ufunc) or len(reads) == function.nin, opcode)  # one more would be written to
    if "ftz" in flags:
        return lambda active: put(flushed(function(*(flushed(read()) for read in reads))), active)
    return lambda active: put(function(*(read() for read in reads)), active)


def paired(machine, opcode, operands):
    """add, mul and fma of two fp32 numbers in each register of 64 bits."""
    head, *flags, _ = opcode.split(".")
    function, put = of_reals(head, flags, np.float32, machine.noise), machine.sink(operands[0])
    check(function is not None and "ftz" not in flags, opcode)
    reads = [machine.source(each, np.uint64) for each in operands[1:]]
    return lambda active: put(function(*(np.ascontiguousarray(read()).view(np.float32) for read in reads))
                              .view(np.uint64), active)


def with_halves(machine, opcode, operands):
    """add, sub and fma of fp32 whose operands are 16-bit numbers, but for the last."""
    head, *flags, _, kind = opcode.split(".")
    function, put = of_reals(head, flags, np.float32, machine.noise), machine.sink(operands[0])
    check(function is not None and "ftz" not in flags, opcode)
    halves = [machine.source(each, np.uint16 if kind == "bf16" else np.float16) for each in operands[1:-1]]
    last = machine.source(operands[-1], np.float32)
    widened = from_bf16 if kind == "bf16" else lambda x: x.astype(np.float32)
    return lambda active: put(function(*(widened(read()) for read in halves), last()), active)


def of_reals(head, flags, dtype, noise: float):
    """Find the function of real numbers; rounded once from float64 where a card rounds once or approximates."""
    wide = np.float64
    if not set(flags) <= {"rn", "full", "approx", "NaN"} | ({"ftz"} if dtype is np.float32 else set()):
        return None
    if head in SIMPLE or head == "mul":
        return SIMPLE.get(head, np.multiply)
    if head in ("max", "min"):
        names = {"max": (np.fmax, np.maximum), "min": (np.fmin, np.minimum)}[head]
        return lambda *sources: reduce(names["NaN" in flags], sources)
    if dtype is not np.float32:
        return None
    return {"fma": lambda a, b, c: (a.astype(wide) * b + c).astype(dtype),
            "div": lambda a, b: blurred((a.astype(wide) / b).astype(dtype), noise if "rn" not in flags else 0),
            "ex2": lambda a: blurred(np.exp2(a.astype(wide)).astype(dtype), noise),
            "lg2": lambda a: blurred(np.log2(a.astype(wide)).astype(dtype), noise),
            "rsqrt": lambda a: blurred((1 / np.sqrt(a.astype(wide))).astype(dtype), noise)}.get(head)


def of_integers(head, flags, dtype, noise):
    """Find the function of integers and bits."""
    if head in LOGIC and not flags or head in SIMPLE and not flags:
        return LOGIC.get(head) or SIMPLE[head]
    if head in ("max", "min"):
        return np.maximum if head == "max" else np.minimum
    if head in ("mul", "mad") and flags == ["lo"]:
        return np.multiply if head == "mul" else lambda a, b, c: a * b + c
    if head in ("div", "rem") and bits_of(dtype) <= 32:
        return lambda a, b: divided(a, b, head == "rem")
    return extracted if head == "bfe" and bits_of(dtype) == 32 else None


def divided(a, b, remainder: bool):
    """Divide towards 0."""
    if (b == 0).any():
        raise Fault("integer division by 0")
    wide_a, wide_b = a.astype(np.int64), b.astype(np.int64)
    quotient = np.abs(wide_a) // np.abs(wide_b) * np.sign(wide_a) * np.sign(wide_b)
    return (wide_a - quotient * wide_b if remainder else quotient).astype(a.dtype)


def extracted(a, start, length):
    """bfe: `length` bits of a from bit `start`, extended by their sign where a has one."""
    start, length = (each.astype(np.int64) & 0xFF for each in (start, length))
    if (start + length > 32).any() or (length == 0).any():
        raise NotImplementedError("bfe past the end")
    if a.dtype == np.int32:
        return (a.astype(np.int64) << (64 - start - length) >> (64 - length)).astype(a.dtype)
    return (a.astype(np.int64) >> start & (1 << length) - 1).astype(a.dtype)


def blurred(value, noise: float):
    """Add a relative error of up to `noise`, the same for the same number, as a card's would be."""
    if not noise:
        return value
    spread = (value.view(np.uint32) * np.uint32(2654435761)).astype(np.float64) / 2**31 - 1.0
    return (value * (1.0 + noise * spread)).astype(np.float32)
