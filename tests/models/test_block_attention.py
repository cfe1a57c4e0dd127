"""Attention of rows on a card, whose flash attention a loop over rows stands for; and what a pass asks of a card."""
import os

import pytest
import torch
from device_work import on_a_card, policy_on_card
from test_fused import assert_same, step
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from toy import make_config, policy_of, wake_adapter

from minimath.config.schema import SFTConfig
from minimath.data.batch import forward_args, micro_batches
from minimath.data.chat import Encoded
from minimath.judges import self_judge
from minimath.models import block_attention, forward
from minimath.models.attention import Heads, Segment, SegmentAttention, Segments
from minimath.models.block_attention import PackedRows, RowAttention
from minimath.models.prefix import shared_batch

HEADS = Heads(queries=4, keys=2, dim=8, scale=0.3, softcap=None)
TOKENS = 150
LAYOUTS = {
    "packed": [Segment(0, 40), Segment(40, 1), Segment(41, 80), Segment(121, 29)],
    "padded": [Segment(0, 30), Segment(50, 50), Segment(100, 7)],
    "shared": [Segment(0, 33), Segment(33, 60, range(33)), Segment(93, 1, range(33)), Segment(94, 30, range(33))],
    "two prompts": [Segment(0, 20), Segment(20, 30, range(20)), Segment(50, 9), Segment(59, 40, range(50, 59)),
                    Segment(99, 11, range(50, 59))]}
TREE = [Segment(0, 20), Segment(20, 15, range(8)), Segment(35, 30, [*range(8), *range(20, 25)]), Segment(65, 5)]


def loop(q, k, v, rows, scale, window):
    """What torch's flash attention computes: bottom-right causal, keys from `left` places before the query's own."""
    (left, right), out = rows.window(window), []
    borders = (zip(each[:-1], each[1:]) for each in (rows.from_q.tolist(), rows.from_k.tolist()))
    for (a, b), (c, d) in zip(*borders, strict=True):
        assert 0 < b - a <= rows.max_q and b - a <= d - c <= rows.max_k and right == 0
        many = q.shape[1] // k.shape[1]
        keys, values = (each[c:d].repeat_interleave(many, 1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
        place = torch.arange(d - c, device=q.device)
        age = place[d - c - (b - a):, None] - place
        unseen = (age < 0) | (age > left if left >= 0 else age < 0)
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), values))
    return torch.cat(out)


@pytest.fixture
def looped(monkeypatch):
    """The loop in place of what only a card can do."""
    def backward(grad, q, k, v, kept, rows, scale, window):
        with torch.enable_grad():
            q, k, v = (each.detach().requires_grad_() for each in (q, k, v))
            return torch.autograd.grad(loop(q, k, v, rows, scale, window), (q, k, v), grad)
    none = torch.zeros(())
    monkeypatch.setattr(block_attention, "flash", lambda *args: (loop(*args), none, none, none))
    monkeypatch.setattr(block_attention, "flash_backward", backward)


def result(attend, rows, window):
    """(output, gradient of qkv) of a loss that weighs every number of the rows differently."""
    qkv = torch.randn(TOKENS, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    counts = torch.zeros(TOKENS, 1)
    for row in rows:
        counts[row.start:row.start + row.length] = 1
    out = attend(qkv, window) * counts
    (out * torch.sin(torch.arange(out.numel())).view_as(out)).sum().backward()
    return out.detach(), qkv.grad


def by_definition(rows):
    """Attention by a mask that says for each token what it sees, one by one."""
    def attend(qkv, window):
        unseen = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
        for row in rows:
            for place in range(row.start, row.start + row.length):
                seen = [*row.before, *range(row.start, place + 1)]
                unseen[place, seen[-window:] if window else seen] = False
        unseen[unseen.all(1)] = False
        q, k, v = HEADS.split(qkv)
        p = (torch.einsum("qhrd,khd->hrqk", q, k) * HEADS.scale).masked_fill(unseen, -torch.inf).softmax(-1)
        return torch.einsum("hrqk,khd->qhrd", p, v).flatten(1)
    return attend


@pytest.mark.parametrize("window", [None, 16, 1, 1000])
@pytest.mark.parametrize("layout", [*LAYOUTS, "tree"])
def test_output_and_gradient_are_those_of_a_mask_and_of_the_cpu(looped, layout, window):
    rows = LAYOUTS.get(layout, TREE)
    packed = PackedRows(rows[::-1], TOKENS, torch.device("cpu"))
    got = result(lambda qkv, window: RowAttention.apply(qkv, HEADS, packed, window), rows, window)
    want = [result(by_definition(rows), rows, window)]
    if layout != "tree":
        segments = Segments(rows, TOKENS)
        want.append(result(lambda qkv, window: SegmentAttention.apply(qkv, HEADS, segments, window), rows, window))
    for each in want:
        torch.testing.assert_close(got, each, atol=1e-5, rtol=1e-5)


def batches():
    """A packed, a padded and a shared pass, each with a tail."""
    rows = [Encoded([(7 * i + n) % 300 for i in range(n)], [False] + [True] * (n - 1), False) for n in (90, 33, 1, 5)]
    for packing in (True, False):
        [(_, batch)] = micro_batches(rows, packing=packing, micro_batch_tokens=4096, pad_id=0)
        yield batch
    ids = [i % 290 for i in range(90)]
    yield shared_batch([Encoded(ids[:20] + ids[-n:], [False] * 20 + [True] * n, False) for n in (9, 60, 1, 62)], 4096)


@pytest.mark.parametrize("family", ["qwen2-window", "qwen3", "gemma3_text"])
def test_a_model_trains_the_same_by_rows_of_a_card(tmp_path, monkeypatch, looped, family):
    model = policy_of(tiny_model(tmp_path, family), SFTConfig, train=True).model
    wake_adapter(model)
    want = [step(model, batch) for batch in batches()]
    monkeypatch.setattr(forward, "Segments", lambda rows, tokens: PackedRows(rows, tokens, torch.device("cpu")))
    for batch, each in zip(batches(), want, strict=True):
        assert_same(step(model, batch), each)


@pytest.mark.parametrize("family", ["qwen2", "qwen2-window", "gemma3_text"])
def test_the_mask_of_rows_is_what_they_see(tmp_path, family):
    model = policy_of(tiny_model(tmp_path, family), SFTConfig, train=True).model
    for rows in (*LAYOUTS.values(), TREE):
        place = torch.full((1, TOKENS), -1)
        for row in rows:
            behind = len(row.before)
            place[0, row.start:row.start + row.length] = behind + torch.arange(row.length)
        masks = forward.rows_mask(model, rows, (1, TOKENS), place)
        masks = masks if isinstance(masks, dict) else {"all": masks}
        for kind, mask in masks.items():
            window = None if kind == "full_attention" else forward.sliding_window(model)

            def attend(qkv, window, mask=mask):
                q, k, v = HEADS.split(qkv)
                p = (torch.einsum("qhrd,khd->hrqk", q, k) * HEADS.scale + mask).softmax(-1)
                return torch.einsum("hrqk,khd->qhrd", p, v).flatten(1)
            torch.testing.assert_close(result(attend, rows, None), result(by_definition(rows), rows, window),
                                       atol=1e-5, rtol=1e-5)


def test_what_no_flash_attention_computes_is_not_asked_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(block_attention, "can_use_flash_attention", lambda params: pytest.fail("asked"))
    block_attention.takes_flash.cache_clear()
    assert not block_attention.takes_flash(torch.device("cpu"), torch.bfloat16, 64)
    assert not block_attention.takes_flash(torch.device("cuda:0"), torch.bfloat16, 12)


def test_cudnn_is_turned_off_for_a_card_and_that_is_said_once(monkeypatch, capsys):
    on = [True]
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: on[0])
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda value: on.__setitem__(0, value))
    block_attention.without_cudnn(torch.device("cpu"))
    assert on == [True]
    for _ in range(2):
        block_attention.without_cudnn(torch.device("cuda:0"))
    assert on == [False] and capsys.readouterr().err.count("cuDNN") == 1


@pytest.mark.skipif(not (os.environ.get("MINIMATH_TEST_CUDA") and torch.cuda.is_available()), reason="needs a card")
@pytest.mark.parametrize("window", [None, 16, 1])
@pytest.mark.parametrize("layout", [*LAYOUTS, "tree"])
@pytest.mark.parametrize("dim", [64, 128])
def test_on_a_card_flash_attention_is_the_loop(layout, window, dim):
    rows, heads, card = LAYOUTS.get(layout, TREE), HEADS._replace(dim=dim, scale=dim ** -0.5), torch.device("cuda:0")
    if not block_attention.takes_flash(card, torch.bfloat16, dim):
        pytest.skip("this card or torch has no flash attention")
    qkv = torch.randn(TOKENS, 8 * dim, generator=torch.Generator().manual_seed(0)).to(card, torch.bfloat16)
    mine, exact = qkv.clone().requires_grad_(), qkv.float().requires_grad_()
    packed = PackedRows(rows, TOKENS, card)
    got = RowAttention.apply(mine, heads, packed, window)
    want = loop(*packed.operands(exact, heads), packed, heads.scale, window).flatten(1)
    for out in (got, want):
        (out * torch.sin(torch.arange(out.numel(), device=card)).view_as(out)).sum().backward()
    for one, other in ((got, want), (mine.grad, exact.grad)):
        assert (one - other).norm() <= 0.01 * other.norm()


# ---- what is asked of a card

class Squares(TorchDispatchMode):
    """Counts the bytes of new tensors of T x T numbers."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens, self.bytes = tokens, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {id(each.untyped_storage()) for each in args if isinstance(each, torch.Tensor)}
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, torch.Tensor) and each.shape[-2:] == (self.tokens, self.tokens):
                self.bytes += 0 if id(each.untyped_storage()) in given else each.nbytes
        return out


def asked(folder, monkeypatch, batch, flash: bool) -> dict:
    """Count what forward and backward of a pass ask of a card: reads, copies, launches, bytes of T x T numbers."""
    with on_a_card() as work:
        model = policy_on_card(make_config(SFTConfig, str(folder), dtype="bf16")).model
        monkeypatch.setattr(forward, "takes_flash", lambda *_: flash)
        batch = {name: value.to("cuda:0") if torch.is_tensor(value) else value for name, value in batch.items()}
        work.clear()
        with Squares(batch["input_ids"].shape[1]) as squares:
            forward.hidden_states(model, **forward_args(batch)).float().sum().backward()
        assert work.launches["_flash_attention_forward"] == (2 if flash else 0)
        return work.counts() | {"squares": squares.bytes}


@pytest.mark.parametrize("flash", [True, False])
def test_what_a_pass_of_two_layers_asks_of_a_card(tmp_path, monkeypatch, flash):
    """By rows nothing of T x T is made. A mask is made once: three of bool and three of 16 bits pass by on the way."""
    folder = tiny_model(tmp_path, "qwen2")
    for kind, batch in zip(("packed", "padded", "shared"), batches()):
        tokens, count = batch["input_ids"].shape[1], asked(folder, monkeypatch, batch, flash)
        many = len(batch["input_ids"])
        assert count["reads"] == count["waits"] == 0 and count["copies"] == 1
        assert count["launches"] <= (LAUNCHES[kind] if flash else LAUNCHES["by a mask"]), (kind, count)
        assert count["squares"] <= (0 if flash else 9 * many * tokens * tokens), kind


LAUNCHES = {"packed": 200, "padded": 200, "shared": 214, "by a mask": 219}  # by transformers' masks: 234, 226, 230


def test_rows_of_a_mask_on_a_card_begin_where_sdpa_takes_them(tmp_path):
    with on_a_card():
        model = policy_on_card(make_config(SFTConfig, str(tiny_model(tmp_path)), dtype="bf16")).model
        mask = forward.rows_mask(model, [Segment(0, 30), Segment(70, 51)], (2, 70), None)
        assert mask.shape == (2, 1, 70, 70) and mask.stride() == (70 * 72, 70 * 72, 72, 1)
        assert mask.dtype == torch.bfloat16


def test_a_judge_shares_prompts_on_a_card_by_rows_under_flash_attention_2_too(tmp_path, monkeypatch):
    with on_a_card():
        model = policy_on_card(make_config(SFTConfig, str(tiny_model(tmp_path)), dtype="bf16")).model
        forward.text_config(model)._attn_implementation = "flash_attention_2"
        for flash in (True, False):
            monkeypatch.setattr(forward, "takes_flash", lambda *_, flash=flash: flash)
            assert self_judge.takes_trees(model, 10) == flash


@pytest.mark.parametrize("tree", [True, False])
def test_a_judgement_is_read_from_a_card_once(tmp_path, monkeypatch, tree):
    prompts = [[1, 2, 3, *range(n)] for n in (3, 9, 20, 31)]
    passes = [([0, 1], 99), ([2, 3], 99)]
    with on_a_card() as work, torch.no_grad():  # before: 3 reads a pass, and 4 or 5 copies that were waited for
        model = policy_on_card(make_config(SFTConfig, str(tiny_model(tmp_path)), dtype="bf16")).model
        monkeypatch.setattr(forward, "takes_flash", lambda *_: True)
        work.clear()
        questions = [self_judge.Question(ids, [(len(ids) - 1, verdict) for verdict in (5, 6, 7)]) for ids in prompts]
        assert [len(each) for each in self_judge.verdict_logps(model, questions, passes, tree)] == [3] * 4
        assert len(work.reads) == 1 and not work.waits, (work.reads, work.waits)
