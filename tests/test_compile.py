"""Every Triton kernel compiles for every supported chip, without spills and within its shared memory. No GPU
needed."""

import os

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
)


def test_no_kernel_spills_or_exceeds_shared_memory_on_any_chip():
    from bench.compile import SHARED_LIMIT, compile_all

    rows = compile_all(quick=True)
    assert (
        {row["arch"] for row in rows}
        == set(SHARED_LIMIT)
        == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "gfx1100", "gfx942"}
    )
    assert {row["kernel"] for row in rows} == kernels_in_the_package()
    bad = [row for row in rows if not row["ok"]]
    assert not bad, "\n".join(map(str, bad))


def kernels_in_the_package() -> set[str]:
    """Names of all Triton functions of the package, so that a new kernel can't be left out of the gate."""
    import importlib
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
        if isinstance(value, triton.JITFunction)
    }


def test_the_gate_sees_spills_and_too_much_shared_memory():
    from bench.compile import cases, compile_case

    case = next(each for each in cases("sm_86", quick=True) if each.kernel == "logp_kernel")
    spilling = case._replace(
        options={"num_warps": 4, "num_stages": 2},
        constants=case.constants | {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": 32},
    )
    assert compile_case(spilling)["spills"] > 0
    large = case._replace(
        options={"num_warps": 8, "num_stages": 5},
        constants=case.constants | {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": 64},
    )
    row = compile_case(large)
    assert row["shared"] > row["shared_limit"] and not row["ok"]
