"""The kernels on a card that is not here, by torch's fake tensors: which card is the current one at a launch, what the
host waits for, in which precision fp32 is multiplied.
"""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from device_work import CARD, on_a_card
from test_kernels import nll
from torch._subclasses.fake_tensor import FakeTensorMode

from minimath.kernels import common, elementwise, linear_logp, linear_token_loss, tile_triton
from minimath.kernels.common import dot_precision, mm_fp32, mm_widened
from minimath.kernels.head import Chunk, Scaling

KERNELS = Path(common.__file__).parent
N, D, V = 200, 64, 20_000
MATMUL = torch.backends.cuda.matmul


@pytest.fixture
def fresh():
    """What is remembered of a device is forgotten before and after."""
    remembered = common.architecture, common.processors, common.multiplies_into_fp32
    [each.cache_clear() for each in remembered]
    yield
    [each.cache_clear() for each in remembered]


@pytest.fixture
def launches(monkeypatch, fresh):
    """(kernel, cards of its tensors, current card, constants) of each launch; the current card is 0, there are two."""
    pytest.importorskip("triton")
    found, current = [], [0]

    def exchange(index):
        old = current[0]
        current[0] = index if index >= 0 else old
        return old

    def run(kernel, *arguments, grid, warmup, **constants):
        cards = {each.get_device() for each in arguments if isinstance(each, torch.Tensor)}
        found.append((kernel.fn.__name__, cards, current[0], constants))

    chip = SimpleNamespace(major=9, minor=0, multi_processor_count=132, gcnArchName="gfx942")
    for name, value in {"_exchange_device": exchange, "_maybe_exchange_device": exchange,
                        "get_device_properties": lambda device: chip, "get_device_capability": lambda device: (9, 0)
                        }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(common.triton.runtime.jit.JITFunction, "run", run)
    with FakeTensorMode():
        yield found
    assert current == [0]


@pytest.mark.parametrize("capability, arch", [((8, 6), "sm_86"), ((10, 3), "sm_100"), ((12, 1), "sm_120")])
def test_a_later_chip_of_a_generation_has_the_tiles_of_the_first(fresh, monkeypatch, capability, arch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert common.architecture(torch.device("cuda", 0)) == arch


@pytest.mark.parametrize("index", [0, 1])
def test_a_kernel_is_launched_on_the_card_of_its_tensors(launches, index):
    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device=f"cuda:{index}")

    hidden, weight, rows = empty(N, D), empty(V, D), empty(N, dtype=torch.int64)
    linear_logp(hidden, weight, rows, rows=rows)
    wide, sums, logits = empty(N, D, dtype=torch.float32), empty(4, N, dtype=torch.float32), empty(N, 8192)
    numbers, factor, vector = empty(3, N, dtype=torch.float32), empty(N, dtype=torch.float32), empty(D)
    chunk = Chunk(hidden, weight, None, rows, factor, Scaling(), logits, 8192)
    tile_triton.tile(chunk, logits, 0, sums, factor, keep=True)
    tile_triton.pull(wide, logits, empty(8192, D), factor)
    tile_triton.gradient(chunk, logits, 0, numbers, sums)
    y, r = elementwise.rms_norm(hidden, vector, 1e-6, 0)
    elementwise.rms_norm_backward(y, hidden, vector, r, 0)
    elementwise.rotate(hidden.view(N, 2, -1), empty(N, 16), empty(N, 16))
    elementwise.gated_backward(elementwise.gated(hidden, "silu"), hidden, "silu")
    assert {name for name, *_ in launches} == {
        "logp_kernel", "tile_kernel", "pull_kernel", "gradient_kernel", "norm_kernel", "norm_backward_kernel",
        "rotate_kernel", "gated_kernel"}
    assert all((cards, current) == ({index}, index) for _, cards, current, _ in launches)


def launches_in(node, inside=False):
    """Whether each kernel[grid](...) below node stands in a `with on_device(...)`, or torch's device_of."""
    if isinstance(node, ast.With):
        contexts = [ast.unparse(item.context_expr) for item in node.items]
        inside = inside or any(each.startswith(("on_device(", "torch.cuda.device_of(")) for each in contexts)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and "kernel" in ast.unparse(node.func.value):
        yield inside, ast.unparse(node.func)
    for child in ast.iter_child_nodes(node):
        yield from launches_in(child, inside)


def test_every_launch_in_the_sources_is_on_the_tensors_card():
    found = [each for path in KERNELS.glob("*.py") for each in launches_in(ast.parse(path.read_text()))]
    assert len(found) >= 6 and not [call for inside, call in found if not inside]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_with_known_rows_nothing_waits_for_the_card(dtype):
    """Without them nonzero and the range of the targets do, one after the other."""
    pytest.importorskip("triton")
    with on_a_card() as work:
        hidden = torch.empty(N, D, dtype=dtype, device=CARD, requires_grad=True)
        weight, target = torch.empty(V, D, dtype=dtype, device=CARD), torch.empty(N, dtype=torch.int64, device=CARD)

        def with_entropy(stats, rows):
            return stats.entropy - stats.logp

        for call in (lambda **known: linear_token_loss(hidden, weight, target, nll, **known)[0].backward(),
                     lambda **known: linear_token_loss(hidden, weight, target, with_entropy, **known)[0].backward(),
                     lambda **known: linear_token_loss(hidden.detach(), weight, target, nll, **known),
                     lambda **known: linear_logp(hidden, weight, target, **known).sum().backward(),
                     lambda **known: linear_logp(hidden.detach(), weight, target, return_stats=True, **known)):
            call(rows=target)
            assert (work.reads, work.copies) == ([], []) and work.launches
            call()
            assert [line.split()[0] for line in work.reads] == ["nonzero()", "to(cpu)"] and not work.copies
            work.clear()


@pytest.fixture
def switch():
    """The switches of fp32 products, put back afterwards; by the new names, as the old one may no longer be read."""
    old = [torch._C._get_fp32_precision_getter(*each) for each in (("generic", "all"), ("cuda", "matmul"))]
    yield torch.backends
    for each, value in zip((("generic", "all"), ("cuda", "matmul")), old):
        torch._C._set_fp32_precision_setter(*each, value)


NEW = pytest.mark.skipif(not hasattr(MATMUL, "fp32_precision"), reason="torch 2.9 brought the new names")


@NEW
@pytest.mark.parametrize("value", ["ieee", "tf32", "none"])
@pytest.mark.parametrize("where", ["all", "matmul"])
def test_fp32_logp_runs_and_follows_the_new_precision_switch(launches, switch, where, value):
    """Once it is set to tf32, reading allow_tf32 raises."""
    MATMUL.fp32_precision = "none"
    (switch if where == "all" else MATMUL).fp32_precision = value
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = (torch.empty(n, D, dtype=dtype, device="cuda:0") for n in (N, V))
        rows = torch.empty(N, dtype=torch.int64, device="cuda:0")
        linear_logp(hidden, weight, rows, rows=rows)
    assert [constants["PRECISION"] for *_, constants in launches] == ["tf32" if value == "tf32" else "ieee", "ieee"]


@NEW
def test_the_old_switch_is_followed_too_and_chips_without_tf32_never_get_it(switch, monkeypatch):
    for allowed in (True, False):
        MATMUL.allow_tf32 = allowed
        for arch, has in (("sm_86", True), ("gfx942", True), ("gfx1100", False), ("gfx90a", False)):
            assert dot_precision(torch.float32, arch) == ("tf32" if allowed and has else "ieee")
        older = SimpleNamespace(allow_tf32=allowed)  # torch 2.8
        with monkeypatch.context() as patch:
            patch.setattr(torch.backends.cuda, "matmul", older)
            assert dot_precision(torch.float32, "sm_86") == ("tf32" if allowed else "ieee")
            assert dot_precision(torch.float16, "sm_86") == "ieee"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fall_back_of_fp32_results_rounds_nothing(dtype, monkeypatch):
    monkeypatch.setitem(common.WORKSPACE_BYTES, "cuda", 4 * 70 * 100)  # of 1,009 columns 100 at a time
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 70, generator=draw).to(dtype), torch.randn(1009, 70, generator=draw).to(dtype).t()
    got, want = mm_widened(a, b), a.double() @ b.double()
    assert got.dtype == torch.float32 and (got.double() - want).abs().max() < 1e-5
    assert (mm_fp32(a, b).double() - want).abs().max() > 1e-3 and torch.equal(mm_fp32(a, b), (a @ b).float())


@pytest.mark.parametrize("hip, product_of_16_bits, used", [(None, "raises", True), ("7.1", "fp32", True),
                                                           ("7.1", "raises", False), ("6.4", "rounds", False)])
def test_on_rocm_the_product_with_another_result_type_is_tried_once(monkeypatch, fresh, hip, product_of_16_bits, used):
    calls, product = [], torch.mm

    def mm(a, b, out_dtype=None):
        calls.append(a.shape)
        if product_of_16_bits == "raises":
            raise RuntimeError("gemm input type at::BFloat16 and output type float is not supported for ROCm")
        return product(a, b).float() if product_of_16_bits == "rounds" else product(a.float(), b.float())

    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch, "mm", mm)
    for _ in range(2):
        assert common.multiplies_into_fp32(torch.device("cpu"), torch.bfloat16) == used
    assert len(calls) == (hip is not None)
