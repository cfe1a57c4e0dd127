"""The PTX of every kernel, run on a CPU, agrees with float64; and the interpreter that runs it sees what a card would
not forgive: a barrier, a mask or a wait that is missing, a stride that is wrong, bytes outside of the arguments."""
import importlib.util
import os
import re
import struct

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton's compiler; the interpreter replaces it", allow_module_level=True)

import numpy as np
from test_compile import kernels_in_the_package

from bench.ptx import Fault, GlobalMemory, Launch, Program, installed
from bench.ptx.cases import FLOAT, HALF, Check, drawn, log_prob, norm
from bench.ptx.compare import CHIPS, dtypes, run_chip, run_operation
from minimath.kernels import elementwise, reference


def check_chip(chip: str, *, quick: bool) -> None:
    rows = [row for dtype in dtypes(chip) for row in run_chip(chip, dtype, quick)]
    assert not [(row["operation"], row["dtype"], text) for row in rows for text in row["wrong"]]
    launched = {name for row in rows for name in row["kernels"]}
    never = {"logp_kernel"} if chip == "sm_75" else set()  # the library's products over tiles take its place
    assert launched == kernels_in_the_package() - never


@pytest.mark.parametrize("chip", CHIPS)
def test_a_cross_section_of_every_kernel_agrees_with_float64(chip):
    check_chip(chip, quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_agrees_with_float64(chip):
    check_chip(chip, quick=False)


def without(pattern: str, by: str = "", count: int = 1):
    """A change of the PTX that must find something to change."""
    def change(ptx):
        changed, found = re.subn(pattern, by, ptx, count=count, flags=re.M)
        assert found, pattern
        return changed

    return change


TWO_ROWS = (norm, {"shape": (2, 1536)})  # each a program of eight warps
DEEP = (log_prob, {"n": 7, "d": 256, "v": 40})  # four steps of a loop that loads two ahead
FAULTS = {
    "a barrier": ("norm", TWO_ROWS, FLOAT, without(r"^\s*bar\.sync\s+0;"), "race in shared memory"),
    "the masks": ("norm", (norm, {"shape": (7, 19)}), FLOAT, without(r"@%p\d+ (ld\.global)", r"\1", 0),
                  "global access outside the arguments"),
    "a lane": ("norm", TWO_ROWS, FLOAT, without(r"^(\s*)(shfl)", r"\1setp.lt.u32 %p1, %laneid, 5;\n@%p1 \2"),
               "a lane is missing"),
    "a wait": ("log-prob", DEEP, HALF, without(r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 3;"), "error inf"),
    "every wait": ("log-prob", DEEP, HALF, without(r"^\s*cp\.async\.wait_group.*", count=0), "left at the end"),
    "a sign": ("norm", TWO_ROWS, FLOAT, without(r"add\.f32", "sub.f32"), r"norm \{.*error"),
}


@pytest.mark.parametrize("missing", FAULTS)
def test_what_is_missing_from_a_kernel_is_seen(missing):
    operation, case, dtype, change, message = FAULTS[missing]
    assert not run_operation(operation, "sm_80", dtype, [case])["wrong"]
    wrong = run_operation(operation, "sm_80", dtype, [case], change=change)["wrong"]
    assert re.search(message, "\n".join(wrong)), wrong


def test_a_wrong_stride_is_seen():
    x, weight = drawn(4, 64, dtype=FLOAT, apart=16), torch.ones(64)
    want = reference.rms_norm(x.double(), weight.double(), 1e-5, 0)
    for step in (0, 1, 64):
        y, r = torch.empty(4, 64), torch.empty(4)
        arguments = x, weight, r, y, x.stride(0) + step, 1e-5
        with installed("sm_86"):
            try:
                elementwise.launch(elementwise.norm_kernel, x, 64, *arguments, OFFSET=0, AGAIN=False)
            except Fault as fault:
                assert step == 64 and "outside the arguments" in str(fault)
                continue
        assert Check("norm", y, want, want.float()).ok() == (step == 0)


def test_afterwards_the_kernels_are_a_cards_again():
    from triton.runtime import driver
    before = driver._active
    with pytest.raises(ZeroDivisionError), installed("sm_80"):
        assert elementwise.architecture(torch.device("cpu")) == "sm_80"
        _ = 1 / 0
    assert driver._active is before and elementwise.architecture(torch.device("cpu")) == "interpreter"


# The interpreter alone, by programs of a few instructions

PROGRAM = """
.visible .entry kernel(.param .u64 .ptr .global .align 1 kernel_param_0, .param .u64 kernel_param_1)
{
    .reg .pred %p<5>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [kernel_param_0];
    mov.u32 %r8, %tid.x;
    mul.wide.u32 %rd2, %r8, 4;
    add.s64 %rd3, %rd1, %rd2;
    ld.global.b32 %r1, [%rd3];
BODY
    st.global.b32 [%rd3], %r2;
    ret;
}
"""


def run(body: str, numbers, threads: int = 32, shared: int = 0):
    """Each thread loads its number into %r1, executes the body and stores %r2; returns what is there then."""
    data = np.array(numbers, copy=True)
    memory = GlobalMemory([(data.ctypes.data, data.nbytes)])
    Program(PROGRAM.replace("BODY", body)).run(Launch([data.ctypes.data], (1, 1, 1), threads, shared, memory))
    return data


def bits(number: float) -> int:
    return struct.unpack("<I", struct.pack("<f", number))[0]


@pytest.mark.parametrize("body, given, want", [
    ("bfe.s32 %r2, %r1, 4, 4;", 0xF5, 0xFFFFFFFF), ("bfe.u32 %r2, %r1, 4, 4;", 0xF5, 0xF),
    ("shl.b32 %r2, %r1, 32;", 5, 0), ("shr.s32 %r2, %r1, 40;", 0x80000000, 0xFFFFFFFF),
    ("div.s32 %r2, %r1, 2;", 0xFFFFFFFD, 0xFFFFFFFF), ("rem.s32 %r2, %r1, 2;", 0xFFFFFFFD, 0xFFFFFFFF),
    ("cvt.rn.bf16x2.f32 %r2, %r1, %r1;", bits(1.00390625), 0x3F803F80),  # a tie goes to the even one
    ("cvt.rn.bf16x2.f32 %r2, 0f3F800000, %r1;", bits(1.01171875), 0x3F803F82),
    ("mov.b32 {%rs1, %rs2}, %r1;\ncvt.f32.f16 %r2, %rs2;", 0x3C000000, bits(1.0)),
    ("mov.b32 {%rs1, %rs2}, %r1;\nmov.b32 %r2, {%rs2, %rs1};", 0x12345678, 0x56781234),
    ("cvt.rna.tf32.f32 %r2, %r1;", 0x3F801000, 0x3F802000),
    ("setp.neu.f32 %p1, %r1, %r1;\nselp.b32 %r2, 7, 9, %p1;", 0x7FC00000, 7),
    ("setp.lt.f32 %p1, %r1, 0f3F800000;\nselp.b32 %r2, 7, 9, %p1;", 0x7FC00000, 9),
    ("max.f32 %r2, %r1, 0f3F800000;", 0x7FC00000, bits(1.0)),
    ("max.f32 %r2, %r1, 0f3F800000, 0f40000000;", bits(3.0), bits(3.0)),
    ("mov.b32 {%rs1, %rs2}, %r1;\nadd.rn.f32.f16 %r2, %rs2, 0f3F800000;", 0x40000000, bits(3.0)),
    ("mov.b32 {%rs1, %rs2}, %r1;\nfma.rn.f32.bf16 %r2, %rs2, %rs2, 0f3F800000;", 0x40000000, bits(5.0)),
    ("mov.b64 %rd4, {%r1, %r1};\nadd.rn.f32x2 %rd5, %rd4, %rd4;\nmov.b64 {%r3, %r2}, %rd5;", bits(2.0), bits(4.0)),
    ("ex2.approx.f32 %r2, %r1;", bits(3.0), bits(8.0)), ("rsqrt.approx.ftz.f32 %r2, %r1;", bits(0.25), bits(2.0)),
    ("rsqrt.approx.ftz.f32 %r2, %r1;", 1, bits(float("inf"))),  # the least of all numbers is flushed to 0
    ("fma.rn.f32 %r2, %r1, %r1, 0fBF800000;", bits(1 + 2**-12), bits(2**-11 + 2**-24)),
    ("mul.wide.s32 %rd4, %r1, -2;\nshr.u64 %rd5, %rd4, 32;\ncvt.u32.u64 %r2, %rd5;", 3, 0xFFFFFFFF)])
def test_an_instruction_gives_what_the_isa_says(body, given, want):
    assert (run(body, np.full(32, given, np.uint32)) == want).all()


def test_threads_part_at_a_branch_and_meet_again():
    body = """
    setp.lt.u32 %p1, %r8, 5;
    mov.u32 %r2, 1;
    @%p1 bra $low;
    mov.u32 %r2, 2;
$low:
    shfl.sync.bfly.b32 %r3, %r2, 16, 31, -1;
    add.s32 %r2, %r2, %r3;
"""
    assert run(body, np.zeros(32, np.uint32)).tolist() == [3 if lane % 16 < 5 else 4 for lane in range(32)]


@pytest.mark.parametrize("body, message", [
    ("st.shared.b32 [global_smem], %r8;\nbar.sync 0;\nmov.u32 %r2, 0;", "different numbers|race"),
    ("st.shared.b32 [global_smem + 128], %r8;\nmov.u32 %r2, 0;", "shared access outside 128 bytes"),
    ("ld.global.b64 %rd4, [%rd3];\nmov.u32 %r2, 0;", "misaligned|outside"),
    ("ld.global.b32 %r2, [%rd3 + 4];", "outside the arguments"),
    ("setp.lt.u32 %p1, %r8, 5;\n@%p1 bra $out;\nbar.sync 0;\n$out:\nbar.sync 0;", "barrier that not all threads reach"),
    ("setp.lt.u32 %p1, %r8, 5;\n@%p1 shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1;", "a lane is missing"),
    ("cp.async.ca.shared.global [global_smem], [%rd1], 4;\ncp.async.commit_group;\nmov.u32 %r2, 0;", "left at the end"),
])
def test_what_is_undefined_on_a_card_raises(body, message):
    with pytest.raises(Fault, match=message):
        run(body, np.zeros(64, np.uint32), threads=64, shared=128)


def test_an_unknown_instruction_raises_and_is_not_skipped():
    for line in ("sin.approx.f32 %r2, %r1;", "add.f32 %r2, %r1, %r1, %r1;", "add.rn.e4m3 %r2, %r1, %r1;"):
        with pytest.raises(NotImplementedError, match="sin|add|e4m3"):
            run(line, np.zeros(32, np.uint32))
