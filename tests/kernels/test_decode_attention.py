"""Decode attention against the float64 reference: in torch, and in Triton under its interpreter, for which this file
runs itself again in a process of its own."""
import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
from interpreter import assert_passes_under_interpreter
from torch._subclasses.fake_tensor import FakeTensorMode

from minimath.kernels import decode_attention_triton as fused
from minimath.kernels import reference
from minimath.kernels.common import INTERPRET
from minimath.kernels.decode_attention import decode_attention as attend

dispatch = sys.modules[attend.__module__]
triton_alone = pytest.mark.skipif(not INTERPRET, reason="what the Triton kernels promise")
torch_alone = pytest.mark.skipif(INTERPRET, reason="once is enough")


def drawn(rows, heads, group, size, places, dtype=torch.float32, spare=1):
    """(query, keys, values) of a cache with `spare` more rows than the query, nan in them."""
    draw = torch.Generator().manual_seed(rows * 31 + size)
    query = torch.randn(rows, heads, group, size, generator=draw)
    keys, values = (torch.full((rows + spare, heads, places, size), torch.nan, dtype=dtype) for _ in range(2))
    for buffer in (keys, values):
        buffer[:rows] = torch.randn(rows, heads, places, size, generator=draw)
    return query.to(dtype), keys, values


def decode_attention(query, keys, values, length, **options):
    """Attend over the same keys and values in blocks of a pool, in no order; nan behind them where nothing reads it."""
    unheld = torch.nan if INTERPRET else 0.0
    (keys, table), (values, _) = (reference.paged(each, fused.PAGE, unheld) for each in (keys, values))
    return attend(query, keys, values, length, table[:len(query)], **options)


def exact(query, keys, values, length, **options):
    return reference.decode_attention(query.double(), keys.double(), values.double(), length, **options)


def close(got, want, dtype=torch.float32):
    assert got.dtype == dtype and got.shape == want.shape
    size = want.abs().amax(-1, keepdim=True)
    # twice the rounding of a result, as the interpreter truncates; a score of 10 is rounded to 1e-6 in fp32
    assert ((got.double() - want).abs() <= torch.finfo(dtype).eps * (want.abs() + 1e-3 * size) + 6e-6 * size).all()


# lengths of rows: none, one, a whole part, one place more, all
SHAPES = [((5, 1, 3, 80, 600), (0, 1, 256, 257, 600)), ((2, 1, 1, 32, 70), (70, 64)), ((2, 1, 17, 96, 290), (31, 290)),
          ((1, 3, 4, 8, 5), (3,)), ((1, 1, 8, 256, 300), (299,)), ((1, 2, 2, 65, 513), (513,))]


@pytest.mark.parametrize("shape, length", SHAPES)
@pytest.mark.parametrize("options", [{}, {"window": 100, "softcap": 2.0}], ids=["full", "window-softcap"])
def test_each_row_sees_its_own_places(shape, length, options):
    tensors, length = drawn(*shape), torch.tensor(length)
    close(decode_attention(*tensors, length, scale=0.3, **options), exact(*tensors, length, scale=0.3, **options))


@pytest.mark.parametrize("window", [1, 7, 256, 10**6])
def test_windows_that_end_at_and_between_parts(window):
    tensors, length = drawn(3, 1, 2, 16, 520), torch.tensor([6, 512, 515], dtype=torch.int32)
    want = exact(*tensors, length, scale=0.25, window=window)
    close(decode_attention(*tensors, length, scale=0.25, window=window), want)


def test_scores_far_from_zero_are_finite():
    query, keys, values = drawn(2, 1, 2, 16, 300)
    length = torch.tensor([300, 40])
    got = decode_attention(query * 300, keys, values, length, scale=1.0)
    torch.testing.assert_close(got.double(), exact(query * 300, keys, values, length, scale=1.0), rtol=1e-3, atol=1e-3)


@triton_alone
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_results_of_triton_are_rounded_once(dtype):
    tensors, length = drawn(2, 2, 3, 80, 300, dtype), torch.tensor([300, 17])
    close(decode_attention(*tensors, length, scale=0.1, softcap=5.0),
          exact(*tensors, length, scale=0.1, softcap=5.0), dtype)


@torch_alone
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_results_of_torch_are_as_close_as_eager_attention(dtype):
    from transformers.models.llama.modeling_llama import eager_attention_forward

    (query, keys, values), length = drawn(4, 2, 3, 80, 300, dtype, spare=0), torch.tensor([300, 17, 128, 1])
    mask = torch.where(torch.arange(300) < length[:, None], 0.0, float("-inf")).to(dtype)[:, None, None]
    module = SimpleNamespace(num_key_value_groups=3, training=False)
    theirs, _ = eager_attention_forward(module, query.reshape(4, 6, 1, 80), keys, values, mask, scaling=0.1)
    want = exact(query, keys, values, length, scale=0.1)
    ours = decode_attention(query, keys, values, length, scale=0.1)
    assert (ours.double() - want).norm() <= 1.02 * (theirs.reshape(want.shape).double() - want).norm()


def test_a_query_that_is_part_of_a_wider_product():
    query, keys, values = drawn(3, 2, 3, 16, 40)
    product = torch.randn(3, 2 * 3 * 16 + 7)
    inside = product[:, 5:5 + 96].view(3, 2, 3, 16)
    heads_last = query.transpose(2, 3).contiguous().transpose(2, 3)
    inside.copy_(query)
    length = torch.tensor([40, 3, 9])
    want = decode_attention(query, keys, values, length, scale=0.3)
    for other in (inside, heads_last):
        torch.testing.assert_close(decode_attention(other, keys, values, length, scale=0.3), want, rtol=1e-6, atol=1e-6)


@triton_alone
def test_no_bit_depends_on_other_rows_or_on_the_size_of_the_buffer():
    query, keys, values = drawn(4, 2, 3, 16, 600)
    length = torch.tensor([600, 300, 5, 0])
    want = decode_attention(query, keys, values, length, scale=0.3)
    assert torch.equal(decode_attention(query, keys, values, length, scale=0.3), want)
    alone = decode_attention(query[1:2], keys[1:2, :, :301].contiguous(), values[1:2, :, :301].contiguous(),
                             length[1:2], scale=0.3)
    assert torch.equal(alone, want[1:2])


@triton_alone
@pytest.mark.parametrize("window, seen", [(0, 100), (30, 30)])
def test_a_row_of_100_places_reads_100_of_1000(window, seen, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder as builder

    read = []
    load = builder.create_masked_load

    def counted(pointers, mask, *others):
        read.append((pointers.data.copy(), mask.data.copy()))
        return load(pointers, mask, *others)

    monkeypatch.setattr(builder, "create_masked_load", counted)
    query, keys, values = drawn(2, 2, 3, 16, 1000)
    keys[:, :, 100:] = values[:, :, 100:] = torch.nan  # places that are not read can't spoil the sums
    length = torch.tensor([100, 100])
    want = exact(query, keys, values, length, scale=0.3, window=window)
    (keys, table), (values, _) = (reference.paged(each, fused.PAGE) for each in (keys, values))
    close(attend(query, keys, values, length, table[:2], scale=0.3, window=window), want)
    first, last = keys.data_ptr(), keys.data_ptr() + keys.nbytes
    blocks = [mask.sum() for at, mask in read if ((at >= first) & (at < last)).any()]
    assert sum(blocks) == 2 * 2 * seen * 16  # rows, heads, places, numbers
    tile = fused.attend_config("interpreter", torch.float32, 3, 16)["BLOCK_T"]
    assert len(blocks) == 2 * 2 * (-(-100 // tile) - (100 - seen) // tile)


@torch_alone
def test_nothing_is_read_back_and_the_launches_are_on_the_tensors_device(monkeypatch):
    """Under tensors without data a read-back raises; grids and buffers can only follow shapes."""
    pytest.importorskip("triton")
    launched, devices = [], []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **constants: launched.append((self.name, grid, len(devices)))

    @contextlib.contextmanager
    def device_of(tensor):
        devices.append(tensor.get_device())
        yield

    for name in ("attend_kernel", "merge_kernel"):
        monkeypatch.setattr(fused, name, Recorder(name))
    for module in (fused, dispatch):
        monkeypatch.setattr(module, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    with FakeTensorMode():
        query = torch.empty(6, 2, 7, 64, device="cuda:1", dtype=torch.bfloat16)
        keys, values = (torch.empty(90, 2, 64, 64, device="cuda:1", dtype=torch.bfloat16) for _ in range(2))
        length, table = (torch.empty(*shape, device="cuda:1", dtype=torch.int64) for shape in ((6,), (6, 16)))
        got = attend(query, keys, values, length, table, scale=0.125)
    assert got.shape == query.shape and got.device == query.device and devices == [1]
    assert launched == [("attend_kernel", (12, 4), 1), ("merge_kernel", (84,), 1)]


@torch_alone
@pytest.mark.parametrize("arch, size, dtype, large, takes", [
    ("gfx1100", 128, torch.float32, True, True), ("gfx1100", 256, torch.float32, False, False),
    ("gfx1100", 256, torch.bfloat16, False, True), ("gfx1100", 256, torch.bfloat16, True, False),
    ("sm_75", 256, torch.float32, True, True), ("sm_90", 257, torch.bfloat16, False, False)])
def test_heads_that_no_tile_holds_are_left_to_torch(arch, size, dtype, large, takes, monkeypatch):
    assert fused.takes(arch, dtype, size, large) is takes
    tensors = torch.empty(1, 1, 1, size, dtype=dtype), *torch.empty(2, 1, 1, 8, size, dtype=dtype)
    sizes = []
    monkeypatch.setattr(dispatch, "runs_triton", lambda tensor: True)
    monkeypatch.setattr(dispatch, "architecture", lambda device: arch)
    monkeypatch.setattr(dispatch.fused, "decode_attention", lambda query, *others: sizes.append(query.shape[-1]))
    attend(*tensors, torch.tensor([3]), torch.zeros(1, 1, dtype=torch.long), scale=1.0)
    assert bool(sizes) is fused.takes(arch, dtype, size, False)


def test_no_rows():
    query, keys, values = drawn(0, 2, 3, 16, 10)
    assert decode_attention(query, keys, values, torch.empty(0, dtype=torch.int64), scale=1.0).shape == query.shape


def test_rows_share_blocks():
    """A group's samples read their prompt from one place."""
    query, keys, values = drawn(3, 2, 3, 16, 200, spare=0)
    keys[:, :, :128], values[:, :, :128] = keys[:1, :, :128], values[:1, :, :128]
    length = torch.tensor([200, 129, 128])
    want = exact(query, keys, values, length, scale=0.3)
    (keys, table), (values, _) = (reference.paged(each, fused.PAGE) for each in (keys, values))
    table[1:, :2] = table[0, :2]
    close(attend(query, keys, values, length, table, scale=0.3), want)


@torch_alone
def test_what_does_not_fit_is_refused():
    query, keys, values = drawn(2, 2, 3, 16, 10)
    length, table = torch.tensor([3, 4]), torch.zeros(2, 1, dtype=torch.long)
    for bad in ((query, keys[:1], values, length, table), (query, keys, values[:, :1], length, table),
                (query, keys, values, length[:1], table), (query, keys, values, length.float(), table),
                (query, keys, values, length, table[:1]), (query, keys, values, length, table.float()),
                (query.half(), keys, values, length, table)):
        with pytest.raises(ValueError, match="expected"):
            attend(*bad, scale=1.0)


@torch_alone
def test_the_same_in_triton_under_its_interpreter():
    assert_passes_under_interpreter(__file__, 21)
