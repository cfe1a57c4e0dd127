"""Every Triton kernel compiles for every supported chip, without spills, within its shared memory, and with
16-byte loads where operands are aligned; and the readers behind that gate are right. No GPU needed."""

import importlib.util
import os

import pytest

from bench.disassembly import (
    count,
    hot_code,
    inner_loops,
    memory_access,
    moved_wide,
    read_gcn,
    read_sass,
    sass_spills,
)
from bench.occupancy import PROCESSORS, occupancy, resident_blocks

compiles = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or importlib.util.find_spec("triton") is None,
    reason="needs Triton's compiler; the interpreter replaces it",
)


@compiles
def test_no_kernel_spills_or_exceeds_shared_memory_or_loads_narrowly_on_any_chip():
    from bench.compile import SHARED_LIMIT, compile_all

    rows = compile_all(quick=True)
    chips = {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx1100", "gfx942"}
    assert {row["arch"] for row in rows} == set(SHARED_LIMIT) == chips
    assert {row["kernel"] for row in rows} == kernels_in_the_package()
    assert {row["kernel"] for row in rows if row["wide"]} == kernels_in_the_package()  # each is held to it
    bad = [row for row in rows if not row["ok"]]
    assert not bad, "\n".join(map(str, bad))
    for row in rows:  # what a launch on AMD runs: buffer loads from a tensor of less than 2 GiB
        if row["arch"].startswith("gfx") and row["kernel"] in ("logp_kernel", "attend_kernel"):
            buffered = {key.startswith("buffer_") for loop in row["loops"] for key in loop["loads"]
                        if row["kernel"] == "logp_kernel" or key.endswith("128")}  # the table gives one number
            assert buffered == {"large" not in row["variant"]}, row


def kernels_in_the_package() -> set[str]:
    """Names of all Triton functions of the package, so that a new kernel can't be left out of the gate."""
    import pkgutil

    import triton

    import minimath.kernels as package

    modules = [
        importlib.import_module(f"{package.__name__}.{each.name}")
        for each in pkgutil.iter_modules(package.__path__)
    ]
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")  # others are functions of theirs
    }


@pytest.fixture
def logp_case():
    from bench.compile import cases

    return next(each for each in cases("sm_86", quick=True) if each.kernel == "logp_kernel")


@compiles
def test_the_gate_sees_spills_and_too_much_shared_memory(logp_case):
    from bench.compile import compile_case

    spilling = logp_case._replace(
        options={"num_warps": 4, "num_stages": 2},
        constants=logp_case.constants | {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": 32},
    )
    row = compile_case(spilling)
    assert row["spills"] > 0 and not row["ok"]
    large = logp_case._replace(
        options={"num_warps": 8, "num_stages": 5},
        constants=logp_case.constants | {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": 64},
    )
    row = compile_case(large)
    assert row["shared"] > row["shared_limit"] and not row["ok"] and row["occupancy"] == 0


@compiles
def test_a_launch_is_told_what_triton_finds_out_of_its_tensors(monkeypatch):
    import triton

    from bench.compile import build, cases, over_2_gib

    case = next(each for each in cases("gfx942", quick=True) if each.kernel == "attend_kernel")
    told = []
    monkeypatch.setattr(triton, "compile", lambda source, **options: told.append(source))
    build(case)
    build(over_2_gib(case))
    small, large = ({source.fn.arg_names[index]: sorted(name for name, _ in attributes)
                     for (index,), attributes in source.attrs.items()} for source in told)
    assert small == dict.fromkeys(("query", "keys", "values", "length", "table", "means", "lse"),
                                  ["tt.divisibility", "tt.pointer_range"])
    assert large == small | dict.fromkeys(("keys", "values"), ["tt.divisibility"])


@compiles
def test_the_gate_sees_narrow_loads(logp_case):
    from bench.compile import cases, compile_case

    ragged = logp_case._replace(  # strides that may be odd, in a case that promises aligned ones; a tile that fits
        round=(),
        constants=logp_case.constants | {"BLOCK_V": 64, "BLOCK_D": 32},
        options={"num_warps": 8, "num_stages": 2},
    )
    row = compile_case(ragged)
    assert row["wide"] is False and not row["ok"] and row["spills"] == 0
    assert not any(key.endswith(".128") for loop in row["loops"] for key in loop["loads"])
    layer = ("norm_kernel", "norm_backward_kernel", "rotate_kernel", "gated_kernel")
    for kernel in ("tile_kernel", "gradient_kernel", *layer):
        case = next(each for each in cases("sm_86", quick=True) if each.kernel == kernel)
        assert (
            compile_case(case._replace(round=("row_stride",)))["wide"] is False
        )  # the padded width may be odd


@compiles
def test_spills_counted_in_machine_code_are_what_ptxas_reports(logp_case, tmp_path):
    import re
    import subprocess

    from triton.backends.nvidia.compiler import get_ptxas

    from bench.compile import build
    from bench.disassembly import nvidia_resources

    case = logp_case._replace(
        options={"num_warps": 4, "num_stages": 2},
        constants=logp_case.constants | {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": 32},
    )
    built = build(case)
    found, _ = nvidia_resources(built.asm["cubin"])
    (tmp_path / "kernel.ptx").write_text(built.asm["ptx"])
    command = [
        get_ptxas(86).path,
        "-v",
        "--gpu-name=sm_86",
        "--regAllocOptLevel=2",
        str(tmp_path / "kernel.ptx"),
    ]
    done = subprocess.run([*command, "-o", str(tmp_path / "out")], capture_output=True, text=True, check=True)
    stack, stores, loads = map(
        int, re.search(r"(\d+) bytes stack.* (\d+) bytes.* (\d+) bytes", done.stderr).groups()
    )
    assert (found["stack"], found["spills"]) == (stack, stores + loads) and found["spills"] > 0


@compiles
def test_a_constant_of_the_compiler_agrees_with_our_occupancy_on_amd():
    import re

    from bench.compile import build, cases

    for arch in ("gfx1100", "gfx942"):
        for kernel in ("tile_kernel", "gradient_kernel"):
            case = next(each for each in cases(arch, quick=True) if each.kernel == kernel)
            text = build(case).asm["amdgcn"]
            registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text).group(1))
            waves = int(re.search(r"; Occupancy: (\d+)", text).group(1))  # per SIMD
            threads = case.options["num_warps"] * PROCESSORS[arch].warp_size
            assert occupancy(arch, threads, registers, 0) * PROCESSORS[arch].warps / 4 == waves


# Reading machine code. Shortened from what the tools print; two nested loops, of which the inner one works.
SASS = """
	.section	.text.kernel,"ax",@progbits
kernel:
        /*0000*/                   LDG.E.64 R2, [R4.64] ;
.L_x_4:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R24], [R146.64], P4 ;
        /*0020*/              @!P5 BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   HMMA.16816.F32.BF16 R72, R108.reuse, R60, R72 ;
        /*0040*/                   HMMA.16816.F32.BF16 R76, R108, R56, R76 ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R173], [R48.64], P6 ;
        /*0060*/               @P1 LDG.E.U16.CONSTANT R7, desc[UR4][R2.64] ;
        /*0070*/                   LDGDEPBAR ;
        /*0080*/              @!P5 BRA `(.L_x_2) ;
.L_x_1:
        /*0090*/               @P4 CALL.REL.NOINC `(.L_x_3) ;
        /*00a0*/                   BRA `(.L_x_4) ;
.L_x_3:
        /*00b0*/               @P0 STG.E [R2.64], R13 ;
        /*00c0*/                   EXIT ;
.L_x_5:
        /*00d0*/                   BRA `(.L_x_5);
"""
GCN = """
kernel:                                 ; @kernel
	s_load_dwordx2 s[0:1], s[4:5], 0x0
	s_branch .LBB0_2
.LBB0_1:                                ;   in Loop: Header=BB0_2 Depth=1
	v_wmma_f32_16x16x16_bf16 v[9:16], v[69:76], v[1:8], v[17:24]
	buffer_gl0_inv
	s_cbranch_scc0 .LBB0_3
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	global_load_b128 v[1:4], v[83:84], off
	global_load_d16_hi_b16 v5, v[83:84], off
	buffer_load_dwordx2 v[1:2], v0, s[8:11], 0 offen
	ds_load_b128 v[1:4], v0
	s_cbranch_execz .LBB0_1
	s_branch .LBB0_1
.LBB0_3:
	global_store_dword v[0:1], v5, off
	s_endpgm
.Lfunc_end0:
"""


def test_the_inner_loop_of_sass_is_found_and_counted():
    code = read_sass(SASS)
    assert len(code) == 14 and code[-1] == ("BRA", 13)
    (body,) = inner_loops(code)
    assert [each.name for each in body][0] == "HMMA.16816.F32.BF16" and len(body) == 6
    assert hot_code(code) == [(2, {"LDGSTS.128": 1, "LDG.16": 1}, {})]
    assert count(code) == (2, {"LDG.64": 1, "LDGSTS.128": 2, "LDG.16": 1}, {"STG.32": 1})


def test_the_inner_loop_of_amd_assembly_is_found_though_its_end_comes_first():
    (found,) = hot_code(read_gcn(GCN))
    assert found == (1, {"load.128": 1, "load.16": 1, "buffer_load.64": 1}, {})


def test_a_loop_that_is_entered_in_two_places_is_one():
    entry = "\tglobal_load_b128 v[1:4], v[83:84], off\n.LBB0_4:\n\tv_wmma"
    text = GCN.replace("\tv_wmma", entry).replace("\ts_branch .LBB0_1\n", "\ts_branch .LBB0_4\n")
    (found,) = hot_code(read_gcn(text))
    assert found == (1, {"load.128": 2, "load.16": 1, "buffer_load.64": 1}, {})


def test_without_tensor_instructions_the_loop_is_the_one_that_loads_and_without_loops_all_counts():
    no_tensor = SASS.replace("HMMA.16816.F32.BF16", "FFMA")
    assert hot_code(read_sass(no_tensor)) == [(0, {"LDGSTS.128": 1, "LDG.16": 1}, {})]
    no_loop = "\n".join(line for line in SASS.splitlines() if "BRA" not in line)
    assert hot_code(read_sass(no_loop)) == [count(read_sass(SASS))]


@pytest.mark.parametrize(
    ("name", "access"),
    [
        ("LDG.E.128.CONSTANT", ("load", "LDG", 128)),
        ("LDG.E.ENL2.256", ("load", "LDG", 256)),
        ("LDG.E.128.SYS", ("load", "LDG", 128)),
        ("LDG.E", ("load", "LDG", 32)),
        ("LDG.E.U8", ("load", "LDG", 8)),
        ("LDGSTS.E.64", ("load", "LDGSTS", 64)),
        ("STG.E.EF.U16", ("store", "STG", 16)),
        ("UBLKCP", ("load", "UBLKCP", 128)),
        ("UTMALDG.2D", ("load", "UTMALDG", 128)),
        ("LDGDEPBAR", None),
        ("LDS.128", None),
        ("global_load_ushort", ("load", "load", 16)),
        ("global_load_short_d16_hi", ("load", "load", 16)),
        ("global_load_u8", ("load", "load", 8)),
        ("global_load_lds_dwordx4", ("load", "load_lds", 128)),
        ("buffer_store_b64", ("store", "buffer_store", 64)),
        ("buffer_load_dwordx4", ("load", "buffer_load", 128)),
        ("buffer_gl0_inv", None),
        ("ds_load_b128", None),
    ],
)
def test_the_width_of_a_memory_instruction_is_read(name, access):
    assert memory_access(name) == access


def test_wide_bytes_and_spilled_bytes_are_added_up():
    assert moved_wide({"LDGSTS.128": 6, "LDG.256": 1, "LDG.64": 9}, threads=256) == (6 * 16 + 32) * 256
    assert moved_wide({"buffer_load.128": 2, "buffer_load.32": 5}, threads=64) == 2 * 16 * 64
    spilled = "\n".join(
        f"        /*00{index}0*/    {name} R1, [R2] ;"
        for index, name in enumerate(("STL", "STL.64", "LDL.LU", "LDL.LU.128", "LDL.U8", "LDG.E"))
    )
    assert sass_spills(read_sass(spilled)) == 4 + 8 + 4 + 16 + 1


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks", "share"),
    [
        # NVIDIA's best practices guide, "calculating occupancy": 37 registers, blocks of 128 and of 320
        # threads on a multiprocessor of 64 warps: 75% and 63%, because warps are allocated in fours
        ("sm_80", 128, 37, 0, 12, 0.75),
        ("sm_80", 320, 37, 0, 4, 0.625),
        # and what its occupancy calculator gives
        ("sm_86", 1024, 32, 0, 1, 32 / 48),
        ("sm_86", 256, 255, 0, 1, 8 / 48),
        ("sm_75", 1024, 64, 0, 1, 1.0),
        ("sm_89", 256, 64, 48 * 1024, 2, 16 / 48),  # 48 KB and the driver's 1 KB, twice in 100
        ("sm_86", 256, 64, 99 * 1024, 1, 8 / 48),
        ("sm_86", 256, 64, 99 * 1024 + 1, 0, 0.0),
        ("sm_90", 256, 128, 100 * 1024, 2, 16 / 64),
        ("sm_75", 64, 16, 0, 16, 1.0),  # 16 blocks are all that Turing holds
    ],
)
def test_occupancy_is_that_of_the_cuda_calculator(arch, threads, registers, shared, blocks, share):
    assert resident_blocks(arch, threads, registers, shared) == blocks
    assert occupancy(arch, threads, registers, shared) == pytest.approx(share)


def test_tensor_memory_limits_occupancy_on_blackwell():
    assert resident_blocks("sm_100", 128, 32, 0, tensor_columns=256) == 2


def test_absent_peers_are_said_to_be_not_installed(monkeypatch, capsys, tmp_path):
    pytest.importorskip("triton")
    from bench import measure, peer_kernels

    monkeypatch.setattr(
        peer_kernels, "PACKAGES", {"liger": "no_such_liger", "cut-cross-entropy": "no_such_cce"}
    )
    monkeypatch.setattr(
        peer_kernels, "compile_many", lambda cases, workers: [stand_in(case) for case in cases]
    )
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    assert peer_kernels.run(("sm_86",), everything=False, workers=1) == 0
    printed = capsys.readouterr().out
    assert "liger: not installed" in printed and "cut-cross-entropy: not installed" in printed
    assert '"package": "minimath"' in (tmp_path / "compile-peers.json").read_text()


def stand_in(case) -> dict:
    """A row of the table for a case that is not compiled."""
    row = {key: getattr(case, key) for key in ("kernel", "arch", "dtype", "variant")}
    numbers = dict.fromkeys(("registers", "spills", "stack", "shared"), 0)
    rest = {"config": "64x64x32 w4 s2", "shared_limit": 1, "occupancy": 1.0, "loops": [], "ok": True}
    return row | numbers | rest


@compiles
def test_a_peer_is_specialised_as_its_launcher_would():
    pytest.importorskip("cut_cross_entropy")
    pytest.importorskip("liger_kernel")
    from bench.peer_kernels import peer_cases, tuned_cases

    lse = next(case for case in peer_cases("sm_86", "cut-cross-entropy") if "lse" in case.kernel)
    assert lse.constants["EVEN_D"] and lse.constants["stride_ed"] == 1 and lse.constants["softcap"] is None
    assert lse.options == {"num_warps": 8, "num_stages": 3} and "V" in lse.round and "B" not in lse.round
    dots = [case for case in peer_cases("sm_86", "cut-cross-entropy") if "dot" in case.kernel]
    assert [case.constants["EVEN_D"] for case in dots] == [False, True]  # 896 is no multiple of 256
    loss = peer_cases("sm_89", "liger")[0]
    assert loss.constants["BLOCK_SIZE"] == 32768 and loss.options == {"num_warps": 32}
    tuned = tuned_cases("sm_86")
    assert len(tuned) > 10 and {case.kernel for case in tuned} == {
        "_cce_lse_forward_kernel",
        "_cce_backward_kernel",
    }
    assert len({case.constants["BLOCK_B"] for case in tuned}) > 1


def test_tiles_are_pruned_by_what_can_be_told_without_compiling():
    pytest.importorskip("triton")
    from bench.tile_space import all_tiles, plausible, rank

    tile = {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}
    assert plausible(tile, "sm_86") and not plausible(tile | {"num_stages": 4}, "sm_86")  # 128 KB of operands
    assert plausible(tile | {"num_stages": 4}, "sm_90")
    assert not plausible(tile | {"BLOCK_V": 256, "num_warps": 4, "BLOCK_D": 32}, "sm_86")  # 256 registers
    assert not plausible(tile | {"BLOCK_N": 32}, "sm_86")  # loads too much per flop
    assert len(all_tiles()) == 192
    rows = [{"tile": tile | {"BLOCK_V": edge}, "occupancy": share} for edge, share in ((64, 0.5), (128, 0.1))]
    assert sorted(rows, key=rank)[0]["tile"]["BLOCK_V"] == 128


def test_the_tile_search_writes_the_first_tile_that_passes_for_every_head(monkeypatch, capsys, tmp_path):
    pytest.importorskip("triton")
    import json

    from bench import compile as bench_compile
    from bench import measure, tile_space

    def compiled(cases, workers):
        rows = [stand_in(case) | {"config": bench_compile.config_text(case)} for case in cases]
        for row, case in zip(rows, cases):  # the largest tile spills for one head only, the next for none
            row["ok"] = not (case.constants["BLOCK_D"] == 64 and "cap=0" in row["variant"])
        return rows

    monkeypatch.setattr(tile_space, "compile_many", compiled)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    assert tile_space.run(("sm_86", "sm_75"), everything=False, workers=1) == 0
    rows = json.loads((tmp_path / "compile-space.json").read_text())
    winners = {row["arch"]: row["config"] for row in rows if row["winner"]}
    assert winners == {"sm_86": "128x128x32 w8 s4", "sm_75": "128x128x32 w8 s4"}
    assert "128x128x32 w8 s4" in capsys.readouterr().out
    assert {row["dtype"] for row in rows if row["arch"] == "sm_75"} == {"float16"}
