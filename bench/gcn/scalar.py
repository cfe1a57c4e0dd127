"""Scalar instructions."""
from .wave import FULL, Operand


def signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> bits - 1 & 1 else value


def field(a: int, b: int) -> tuple[int, int]:
    """The bits of a that s_bfe selects, and how many."""
    width = b >> 16 & 0x7F
    return a >> (b & 31) & (1 << width) - 1, width


def extended(a: int, b: int) -> int:
    value, width = field(a, b)
    return signed(value, width) if width else 0


# name -> function of unsigned operands; what it returns is cut to the width, scc as listed
ANY = {  # scc: the result is not 0
    "s_and": lambda a, b: a & b, "s_or": lambda a, b: a | b, "s_xor": lambda a, b: a ^ b,
    "s_andn2": lambda a, b: a & ~b, "s_orn2": lambda a, b: a | ~b, "s_not": lambda a: ~a,
    "s_lshl": lambda a, b: a << (b & 63), "s_lshr": lambda a, b: a >> (b & 63),
}
PLAIN = {
    "s_mov_b32": lambda a: a, "s_mov_b64": lambda a: a, "s_mul_i32": lambda a, b: a * b,
    "s_mul_hi_u32": lambda a, b: a * b >> 32, "s_mul_hi_i32": lambda a, b: signed(a) * signed(b) >> 32,
    "s_brev_b32": lambda a: int(f"{a:032b}"[::-1], 2),
}
SIGNED = {"s_ashr_i32": lambda a, b: signed(a) >> (b & 31), "s_abs_i32": lambda a: abs(signed(a)),
          "s_bfe_i32": extended, "s_bfe_u32": lambda a, b: field(a, b)[0]}
COMPARE = {"eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lg": lambda a, b: a != b, "lt": lambda a, b: a < b,
           "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b}
TAKEN = {"s_branch": lambda w: True, "s_cbranch_scc0": lambda w: not w.scc, "s_cbranch_scc1": lambda w: w.scc,
         "s_cbranch_vccz": lambda w: not w.scalar(106, 2), "s_cbranch_vccnz": lambda w: bool(w.scalar(106, 2)),
         "s_cbranch_execz": lambda w: not w.scalar(126, 2), "s_cbranch_execnz": lambda w: bool(w.scalar(126, 2))}


def result(operand: Operand, words: int, value: int, w) -> int:
    value &= (1 << 32 * words) - 1
    w.set_scalar(operand.index, value, words)
    return value


def build(name: str, operands: list[Operand]):
    """Make the action (wave) of a scalar instruction."""
    to, *sources = operands
    words = 2 if name.endswith("64") else 1
    stem = name.rpartition("_")[0]
    if name.startswith("s_cmp_"):
        test, kind = COMPARE[name.split("_")[2]], name.split("_")[3]
        read = (lambda each, w: signed(each.scalar(w))) if kind[0] == "i" else (lambda each, w: each.scalar(w))
        return lambda w: setattr(w, "scc", test(read(to, w), read(sources[0], w)))
    if name.startswith("s_bitcmp"):
        wanted = int(name[8])
        return lambda w: setattr(w, "scc", to.scalar(w) >> (sources[0].scalar(w) & 31) & 1 == wanted)
    if name.endswith("_saveexec_b64"):
        return lambda w: save_exec(w, to, sources[0], name)
    if name.startswith("s_cselect"):
        return lambda w: result(to, words, sources[0 if w.scc else 1].scalar(w, words), w) and None
    if name in PLAIN:
        return lambda w: result(to, words, PLAIN[name](*(each.scalar(w, words) for each in sources)), w) and None
    if stem in ANY or name in SIGNED:
        function, counts = ANY.get(stem) or SIGNED[name], (words, 1) if stem in ("s_lshl", "s_lshr") else (words, words)
        return lambda w: setattr(w, "scc", bool(result(
            to, words, function(*(each.scalar(w, count) for each, count in zip(sources, counts))), w)))
    if name in ("s_movk_i32", "s_addk_i32", "s_mulk_i32"):
        number = signed(sources[0].value & 0xFFFF, 16)
        kind = {"m": lambda old: number, "a": lambda old: old + number, "u": lambda old: old * number}
        function = kind["u" if name == "s_mulk_i32" else name[2]]
        return lambda w: result(to, 1, function(w.scalar(to.index)), w) and None
    if name.startswith("s_lshl") and name.endswith("_add_u32"):
        return lambda w: result(to, 1, (sources[0].scalar(w) << int(name[6])) + sources[1].scalar(w), w) and None
    return arithmetic(name, to, sources)


def save_exec(w, to: Operand, source: Operand, name: str) -> None:
    old, new = w.scalar(126, 2), source.scalar(w, 2)
    result(to, 2, old, w)
    w.set_scalar(126, {"and": old & new, "or": old | new, "andn2": new & ~old & FULL}[name.split("_")[1]], 2)
    w.scc = w.scalar(126, 2) != 0


def arithmetic(name: str, to: Operand, sources: list[Operand]):
    """add, sub, min, max: scc is the carry, the overflow, or that the first one was taken."""
    head, kind = name.split("_")[1:]

    def act(w):
        a, b = (each.scalar(w) for each in sources)
        if head in ("min", "max"):
            x, y = (signed(a), signed(b)) if kind == "i32" else (a, b)
            w.scc = x < y if head == "min" else x > y
            result(to, 1, a if w.scc else b, w)
            return
        carry = int(w.scc) if head in ("addc", "subb") else 0
        value = a + b + carry if head.startswith("add") else a - b - carry
        got = result(to, 1, value, w)
        exact = signed(a) + signed(b) if head == "add" else signed(a) - signed(b)
        w.scc = signed(got) != exact if kind == "i32" else value != got

    if head not in ("add", "sub", "addc", "subb", "min", "max"):
        raise NotImplementedError(name)
    return act
