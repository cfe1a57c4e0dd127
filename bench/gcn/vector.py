"""Vector instructions of single lanes, and those that move numbers between lanes."""
import re

import numpy as np

from ..ptx.arithmetic import blurred
from .wave import LANES, Operand, bits_of_lanes, lanes_of

f32, f64, u32, u64, i32 = np.float32, np.float64, np.uint32, np.uint64, np.int32


def fused(a, b, c):
    return (np.asarray(a, f64) * b + c).astype(f32)



def permuted(a, b, selector):
    """v_perm_b32: each byte of the result is one of the eight of (a, b), or 0."""
    data, out = np.asarray(b, u64) | np.asarray(a, u64) << u64(32), u32(0)
    for byte in range(4):
        chosen = np.asarray(selector >> u32(8 * byte) & u32(255), u64)
        if ((chosen > 7) & (chosen != 12)).any():
            raise NotImplementedError("v_perm_b32 of signs")
        picked = data >> np.minimum(chosen, u64(7)) * u64(8) & u64(255)
        out = out | np.where(chosen == 12, u64(0), picked).astype(u32) << u32(8 * byte)
    return out


def field(a, start, width):
    return a >> (start & u32(31)) & ((u32(1) << (width & u32(31))) - u32(1))


def signed_field(a, start, width):
    left = u32(32) - (width & u32(31))
    return ((field(a, start, width) << left).view(i32) >> left.astype(i32)).view(u32)


def arithmetic_shift(by, a):
    return (np.asarray(a).view(i32) >> (by & u32(31)).astype(i32)).view(u32)


def of_signed(function):
    return lambda *sources: function(*(np.asarray(each, u32).view(i32) for each in sources)).view(u32)


BITS = {  # of uint32
    "v_mov_b32": lambda a: a, "v_not_b32": lambda a: ~a, "v_and_b32": lambda a, b: a & b,
    "v_or_b32": lambda a, b: a | b, "v_xor_b32": lambda a, b: a ^ b, "v_or3_b32": lambda a, b, c: a | b | c,
    "v_and_or_b32": lambda a, b, c: a & b | c,
    "v_lshlrev_b32": lambda a, b: b << (a & u32(31)), "v_lshrrev_b32": lambda a, b: b >> (a & u32(31)),
    "v_ashrrev_i32": arithmetic_shift, "v_lshl_or_b32": lambda a, b, c: a << (b & u32(31)) | c,
    "v_lshl_add_u32": lambda a, b, c: (a << (b & u32(31))) + c,
    "v_add_lshl_u32": lambda a, b, c: (a + b) << (c & u32(31)),
    "v_add_u32": lambda a, b: a + b, "v_sub_u32": lambda a, b: a - b, "v_subrev_u32": lambda a, b: b - a,
    "v_add3_u32": lambda a, b, c: a + b + c, "v_xad_u32": lambda a, b, c: (a ^ b) + c,
    "v_bfi_b32": lambda a, b, c: a & b | ~a & c, "v_bfe_u32": field, "v_bfe_i32": signed_field,
    "v_mul_lo_u32": lambda a, b: a * b, "v_mul_hi_u32": lambda a, b: (np.asarray(a, u64) * b >> u64(32)).astype(u32),
    "v_mul_u32_u24": lambda a, b: (a & u32(0xFFFFFF)) * (b & u32(0xFFFFFF)),
    "v_mad_u32_u24": lambda a, b, c: (a & u32(0xFFFFFF)) * (b & u32(0xFFFFFF)) + c, "v_perm_b32": permuted,
    "v_max_i32": of_signed(np.maximum), "v_min_i32": of_signed(np.minimum), "v_max_u32": np.maximum,
    "v_min_u32": np.minimum, "v_cvt_f32_u32": lambda a: np.asarray(a, f32).view(u32),
    "v_cvt_f32_i32": lambda a: a.view(i32).astype(f32).view(u32),
    "v_bfrev_b32": lambda a: u32(int(f"{int(a):032b}"[::-1], 2)),
}
REALS = {  # of float32, to float32
    "v_add_f32": np.add, "v_sub_f32": np.subtract, "v_subrev_f32": lambda a, b: b - a, "v_mul_f32": np.multiply,
    "v_max_f32": np.fmax, "v_min_f32": np.fmin, "v_max3_f32": lambda a, b, c: np.fmax(np.fmax(a, b), c),
    "v_rcp_iflag_f32": lambda a: 1 / a.astype(f64),  # an integer division builds on its last bit
    "v_fma_f32": fused, "v_fmaak_f32": fused, "v_fmamk_f32": lambda a, k, b: fused(a, k, b), "v_div_fmas_f32": fused,
}
ROUGH = {  # a card approximates them
    "v_exp_f32": np.exp2, "v_log_f32": np.log2, "v_rcp_f32": lambda a: 1 / a, "v_rsq_f32": lambda a: 1 / np.sqrt(a),
}
TESTS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
         "ge": np.greater_equal, "lg": lambda a, b: (a < b) | (a > b), "neq": np.not_equal,
         "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "u": lambda a, b: np.isnan(a) | np.isnan(b),
         "nlt": lambda a, b: ~(a < b), "nle": lambda a, b: ~(a <= b),
         "ngt": lambda a, b: ~(a > b), "nge": lambda a, b: ~(a >= b)}


def lists(modifiers: str) -> dict[str, list[int]]:
    """Read "op_sel:[0,1] neg_lo:[1,0]"."""
    return {name: [int(each) for each in values.split(",")]
            for name, values in re.findall(r"(\w+):\[([\d,]+)\]", modifiers)}


def build(name: str, operands: list[Operand], modifiers: str):
    """Make the action (wave) of a vector instruction."""
    if "clamp" in modifiers or "mul:" in modifiers or "div:" in modifiers:
        raise NotImplementedError(modifiers)
    if name.endswith("_dpp"):
        return moved_between_lanes(name, operands, modifiers)
    sdwa = name.endswith("_sdwa")
    name = re.sub(r"_(e32|e64|sdwa)$", "", name)
    if name.startswith("v_cmp_"):
        return compare(name, operands)
    if name.startswith("v_pk_"):
        return packed(name, operands, lists(modifiers))
    if name in SPECIAL:
        return SPECIAL[name](name, operands, modifiers)
    to, *sources = operands
    reads = [part_of(each, f"src{index}_sel", modifiers) if sdwa else each.bits for index, each in enumerate(sources)]
    if sdwa and ("dst_sel:DWORD" not in modifiers or any(each.negative or each.absolute for each in sources)):
        raise NotImplementedError(name + modifiers)
    if name == "v_cndmask_b32":
        chosen = sources[2].index if len(sources) > 2 else 106
        return lambda w: w.put(to.index, np.where(lanes_of(w.scalar(chosen, 2)), reads[1](w), reads[0](w)))
    if name == "v_cvt_f32_f16":
        read = (lambda w: reads[0](w).astype(np.uint16).view(np.float16)) if sdwa else sources[0].f16
        return lambda w: w.put(to.index, read(w).astype(f32).view(u32))
    function = function_of(name)
    return lambda w: w.put(to.index, function(w, *(read(w) for read in reads)))


def function_of(name: str):
    """Find the function (wave, *uint32) -> uint32 of an instruction."""
    if name in BITS:
        return lambda w, *sources: BITS[name](*sources)
    if name in REALS:
        return lambda w, *sources: np.asarray(REALS[name](*(each.view(f32) for each in sources)), f32).view(u32)
    if name in ROUGH:
        return lambda w, a: blurred(np.asarray(ROUGH[name](a.view(f32).astype(f64)), f32), w.machine.noise).view(u32)
    raise NotImplementedError(name)


def part_of(operand: Operand, which: str, modifiers: str):
    part = re.search(rf"{which}:(\w+)", modifiers)
    shift, mask = {"DWORD": (0, 0xFFFFFFFF), "WORD_0": (0, 0xFFFF), "WORD_1": (16, 0xFFFF), "BYTE_0": (0, 0xFF),
                   "BYTE_1": (8, 0xFF), "BYTE_2": (16, 0xFF), "BYTE_3": (24, 0xFF)}[part.group(1) if part else "DWORD"]
    return lambda w: operand.word(w) >> u32(shift) & u32(mask)


def compare(name: str, operands: list[Operand]):
    _, _, test, kind = name.split("_")
    to, *sources = operands
    read = {"f32": Operand.f32, "u32": Operand.bits, "i32": lambda each, w: each.bits(w).view(i32),
            "u64": Operand.wide, "i64": lambda each, w: each.wide(w).view(np.int64)}[kind]

    def act(w):
        found = np.broadcast_to(TESTS[test](*(read(each, w) for each in sources)), 64)
        w.set_scalar(to.index, bits_of_lanes(found & w.mask), 2)

    return act


def packed(name: str, operands: list[Operand], given: dict):
    """v_pk_*_f32: two numbers a lane; op_sel and op_sel_hi say which half of each source goes into which."""
    to, *sources = operands
    count = len(sources)
    low, high = given.get("op_sel", [0] * count), given.get("op_sel_hi", [1] * count)
    if name == "v_pk_mov_b32":
        return lambda w: put_pair(w, to, sources[0].word(w, low[0]), sources[1].word(w, low[1]))
    if name not in ("v_pk_add_f32", "v_pk_mul_f32", "v_pk_fma_f32"):
        raise NotImplementedError(name)
    function = REALS[name.replace("pk_", "")]
    negated = given.get("neg_lo", [0] * count), given.get("neg_hi", [0] * count)

    def half(w, chosen, signs):
        values = [each.word(w, at).view(f32) for each, at in zip(sources, chosen)]
        return np.asarray(function(*(-each if sign else each for each, sign in zip(values, signs))), f32).view(u32)

    return lambda w: put_pair(w, to, half(w, low, negated[0]), half(w, high, negated[1]))


def put_pair(w, to: Operand, low, high) -> None:
    low, high = np.array(low), np.array(high)  # both are read before one is written
    w.put(to.index, low)
    w.put(to.index + 1, high)


def source_lanes(modifiers: str):
    """(lane that each lane reads, whether there is one) of a dpp modifier."""
    row, place = LANES // 16, LANES % 16
    if match := re.search(r"quad_perm:\[(\d),(\d),(\d),(\d)\]", modifiers):
        return LANES // 4 * 4 + np.array([int(each) for each in match.groups()])[LANES % 4], LANES >= 0
    kind, step = re.search(r"(row_shr|row_shl|row_ror|row_bcast):(\d+)", modifiers).groups()
    step = int(step)
    if kind == "row_bcast":
        return (row * 16 - 1, row % 2 == 1) if step == 15 else (np.full(64, 31), row >= 2)
    if kind == "row_ror":
        return row * 16 + (place - step) % 16, LANES >= 0
    other = place - step if kind == "row_shr" else place + step
    return row * 16 + other, (other >= 0) & (other < 16)


def moved_between_lanes(name: str, operands: list[Operand], modifiers: str):
    """A first operand from another lane; where there is none: 0 with bound_ctrl, else the lane is left alone."""
    lane, there = source_lanes(modifiers)
    lane = np.clip(lane, 0, 63)
    rows, banks = (int(re.search(rf"{each}_mask:(0x\w+)", modifiers).group(1), 0) for each in ("row", "bank"))
    enabled = (rows >> LANES // 16 & 1 == 1) & (banks >> LANES % 16 // 4 & 1 == 1)
    zero, function = "bound_ctrl" in modifiers, function_of(name.removesuffix("_dpp"))
    to, first, *others = operands

    def act(w):
        has = there & w.mask[lane]
        value = np.where(has, first.bits(w)[lane], u32(0))
        value = function(w, value, *(each.bits(w) for each in others))
        np.copyto(w.v[to.index], value, where=w.mask & enabled & (has | zero))

    return act


def mixed(name, operands, modifiers):
    """v_fma_mix: each source fp32, or a half where op_sel_hi says so."""
    to, *sources = operands
    given = lists(modifiers)
    halves, high = given.get("op_sel_hi", [0, 0, 0]), given.get("op_sel", [0, 0, 0])

    def act(w):
        a, b, c = (np.asarray(each.f16(w, bool(up)) if half else each.f32(w), f64)
                   for each, half, up in zip(sources, halves, high))
        if name == "v_fma_mix_f32":
            return w.put(to.index, (a * b + c).astype(f32).view(u32))
        half = (a * b + c).astype(np.float16).view(np.uint16).astype(u32)
        w.put(to.index, w.v[to.index] & u32(0xFFFF0000) | half)

    return act


def to_half(name, operands, modifiers):
    to, source = operands
    return lambda w: w.put(to.index, source.f32(w).astype(np.float16).view(np.uint16).astype(u32))


def pack_halves(name, operands, modifiers):
    to, *sources = operands
    return lambda w: w.put(to.index, sources[0].f16(w).view(np.uint16).astype(u32)
                           | sources[1].f16(w).view(np.uint16).astype(u32) << u32(16))


def to_unsigned(name, operands, modifiers):
    to, source = operands
    return lambda w: w.put(to.index, np.clip(np.nan_to_num(source.f32(w).astype(f64)), 0, 2**32 - 1).astype(u32))


def load_exponent(name, operands, modifiers):
    to, a, b = operands
    return lambda w: w.put(to.index, np.ldexp(np.asarray(a.f32(w), f64), np.asarray(b.bits(w)).view(i32))
                           .astype(f32).view(u32))


def accumulated(name, operands, modifiers):
    to, a, b = operands
    return lambda w: w.put(to.index, fused(a.f32(w), b.f32(w), w.v[to.index].view(f32)).view(u32))


def scaled(name, operands, modifiers):
    """v_div_scale without the scaling, see the package."""
    to, mask, first, *_ = operands

    def act(w):
        w.put(to.index, first.bits(w))
        w.set_scalar(mask.index, 0, 2)

    return act


def fixed(name, operands, modifiers):
    """v_div_fixup: the quotient given, or the right one where a step on the way would have needed a scale."""
    to, *sources = operands

    def act(w):
        quotient, below, above = (np.asarray(each.f32(w), f64) for each in sources)
        exact = above / below
        sizes = [np.abs(each) for each in (above, below, exact)]
        plain = np.all([(2.0**-60 < each) & (each < 2.0**60) for each in np.broadcast_arrays(*sizes)], 0)
        w.put(to.index, np.where(plain, quotient, exact).astype(f32).view(u32))

    return act


def wide_product(name, operands, modifiers):
    """v_mad_u64_u32, v_mad_i64_i32."""
    to, carry, a, b, c = operands

    def extended(x):
        return np.asarray(x).view(i32).astype(np.int64).view(u64) if "i64" in name else np.asarray(x, u64)

    def act(w):
        value = extended(a.bits(w)) * extended(b.bits(w)) + c.wide(w)
        put_pair(w, to, value.astype(u32), (value >> u64(32)).astype(u32))

    return act


def wide_shift_add(name, operands, modifiers):
    to, a, b, c = operands

    def act(w):
        value = (a.wide(w) << np.asarray(b.bits(w), u64)) + c.wide(w)
        put_pair(w, to, value.astype(u32), (value >> u64(32)).astype(u32))

    return act


def wide_shift(name, operands, modifiers):
    to, a, b = operands

    def act(w):
        value = b.wide(w) << np.asarray(a.bits(w) & u32(63), u64)
        put_pair(w, to, value.astype(u32), (value >> u64(32)).astype(u32))

    return act


def read_lane(name, operands, modifiers):
    to, source, *which = operands

    def act(w):
        lane = which[0].scalar(w) if which else int(np.argmax(w.mask))
        w.set_scalar(to.index, int(w.v[source.index][lane]))

    return act


SPECIAL = {
    "v_fma_mix_f32": mixed, "v_fma_mixlo_f16": mixed, "v_cvt_f16_f32": to_half, "v_pack_b32_f16": pack_halves,
    "v_cvt_u32_f32": to_unsigned, "v_ldexp_f32": load_exponent, "v_fmac_f32": accumulated, "v_div_scale_f32": scaled,
    "v_div_fixup_f32": fixed, "v_mad_u64_u32": wide_product, "v_mad_i64_i32": wide_product,
    "v_lshl_add_u64": wide_shift_add, "v_lshlrev_b64": wide_shift, "v_readlane_b32": read_lane,
    "v_readfirstlane_b32": read_lane,
    "v_mov_b64": lambda name, operands, modifiers: lambda w: put_pair(w, operands[0], operands[1].word(w),
                                                                      operands[1].word(w, 1)),
}
