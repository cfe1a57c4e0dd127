"""Keys and values in blocks of a pool: who holds which, what rows share, and a pool that is too small for all."""
import random

import pytest
import tiny
from engines import engine_of
from test_rollout import prompts_of
from toy import load, wake_adapter

from minimath.rollout import blocks as pool
from minimath.rollout import decode as decoding
from minimath.rollout import kv_cache, passes
from minimath.rollout import open as own_engine
from minimath.rollout.blocks import Blocks, Row
from minimath.rollout.engine import Job

LONGEST = 1000


def row(prompt: int, length: int, begins: int = 10) -> Row:
    made = Row(Job((prompt, 0), [0] * begins, 0))
    made.length = length
    return made


def assert_whole(blocks: Blocks, rows: list[Row]) -> None:
    """Every row has cells for its tokens, no cell is two rows' beyond a common prompt, and none is lost."""
    owner = {}
    for i, each in enumerate(rows):
        cells = blocks.table[i]
        assert len(cells) >= blocks.pages_of(each) and len(set(cells)) == len(cells)
        for page, cell in enumerate(cells):
            who = (each.job.place[0], page) if page < blocks.common(each) else each
            assert owner.setdefault(cell, who) == who and 0 <= cell < blocks.cells
    assert not any(blocks.table[len(rows):])
    used = {block for held in blocks.held.values() for block in held}
    assert len(used) + len(blocks.free) == blocks.total and not used & set(blocks.free)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("places", [40 * LONGEST, 6 * LONGEST])
def test_rows_that_come_grow_and_go_leave_no_block_behind(alone, places):
    draw, rows = random.Random(0), []
    blocks, device = Blocks(40, LONGEST, places, alone=alone), {}
    for _ in range(300):
        new = [row(prompt := draw.randrange(8), length := 20 * prompt + 30, length) for _ in range(draw.randrange(9))]
        while rows + new and not (len(rows + new) <= 40 and blocks.fit(rows + new, 60)):
            (new or rows).pop()
        rows += new
        blocks.hold(rows, 60)
        for each in rows:
            each.length = min(LONGEST, each.length + draw.randrange(60))
        assert_whole(blocks, rows)
        rows = sorted(draw.sample(rows, draw.randrange(len(rows) + 1)), key=lambda each: -each.length)
        blocks.hold(rows)
        assert_whole(blocks, rows)
        device |= dict(zip(*blocks.take_changes()))
        assert {at: cell for at, cell in device.items() if cell} == {
            i * blocks.pages + page: cell for i, cells in enumerate(blocks.table)
            for page, cell in enumerate(cells) if cell}
    blocks.hold([])
    assert len(blocks.free) == blocks.total


def test_samples_of_a_prompt_share_the_blocks_that_it_fills():
    blocks = Blocks(8, LONGEST, 8 * LONGEST, alone=True)
    rows = [row(0, 200, 200), row(0, 200, 200), row(1, 200, 200)]
    blocks.hold(rows)
    one, two, other = blocks.table[:3]
    assert one[:3] == two[:3] and one[3] != two[3] and not set(one) & set(other)
    assert [each.shared for each in rows] == [0, 3, 0]
    blocks.hold(rows[1:2])  # the one that they were filled for has ended
    assert blocks.table[0] == two and len(blocks.free) == blocks.total - 4
    late = row(0, 230, 200)  # a third sample, with the tokens that it had when it was put back
    blocks.hold([rows[1], late])
    assert blocks.table[1][:3] == two[:3] and late.shared == 3


def test_short_rows_take_few_places_and_long_ones_as_many_as_they_have():
    """A tenth of them is ten times as long as the others; a rectangle takes 64 times the longest."""
    for alone, most in ((True, 0.26), (False, 0.4)):
        rows = [row(i, 1000 if i < 6 else 100) for i in range(64)]
        blocks = Blocks(64, LONGEST, 32 * LONGEST, alone=alone)
        blocks.hold(rows)
        assert sum(map(len, blocks.held.values())) * blocks.width * blocks.page < most * 64 * LONGEST


# ---- rollouts


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model, tokenizer = load(tiny.write_tiny(tmp_path_factory.mktemp("llama")), train=True)
    wake_adapter(model)
    return model, tokenizer


PROMPTS = prompts_of((5, 41, 23, 12))
OPTIONS = {"max_new_tokens": 90, "seed": 7, "eos": list(range(20, 26))}


@pytest.fixture(scope="module")
def whole(llama):
    return engine_of(*llama, **OPTIONS).generate(PROMPTS, 3)


def ids_of(groups) -> list:
    return [[sample.ids for sample in group] for group in groups]


def rollout(model, tokenizer, monkeypatch, rows: int, places: int, prompts=PROMPTS):
    """(completions, metrics, blocks) in a pool of so many places."""
    engine, seen = engine_of(model, tokenizer, **OPTIONS), []
    start = decoding.Decode.start
    with monkeypatch.context() as patch:
        patch.setattr(own_engine, "fitting_rows", lambda *args, **more: (rows, places))
        patch.setattr(decoding.Decode, "start", lambda self, *args: (start(self, *args), seen.append(self.blocks)))
        return engine.generate(prompts, 3), engine.metrics(), seen[0]


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("places", [400, 1])
def test_a_pool_too_small_for_all_changes_no_completion(llama, whole, monkeypatch, fixed, places):
    """Rows are put back and computed again from their tokens; pages are small, so that rows have several."""
    monkeypatch.setattr(kv_cache, "FIXED_SHAPES", ("cpu",) if fixed else ())
    monkeypatch.setitem(decoding.SYNC, "cpu", 4 if fixed else 1)
    for name, value in {"PAGE_MULTIPLE": 32, "ONE_PAGE": 32, "PAGES_OF": 32, "PAGE": 32}.items():
        monkeypatch.setattr(pool, name, value)
    monkeypatch.setattr(decoding, "AHEAD", 8)  # so that they soon run out
    again, metrics, blocks = rollout(*llama, monkeypatch, 16, places)
    assert ids_of(again) == ids_of(whole)
    for one, two in zip(sum(whole, []), sum(again, []), strict=True):
        assert two.logp == pytest.approx(one.logp, abs=1e-5) and two.finished == one.finished
    assert metrics["preempted"] > 0 and len(blocks.free) == blocks.total and blocks.pages == 5


def test_a_long_prompt_is_read_in_pieces(llama, monkeypatch):
    prompts, widths, base = prompts_of((5, 141, 23)), [], passes.base_causal_lm(llama[0]).base_model
    before, _, _ = rollout(*llama, monkeypatch, 16, 10_000, prompts)
    hook = base.register_forward_pre_hook(lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape),
                                          with_kwargs=True)
    monkeypatch.setattr(passes, "PREFILL_TOKENS", 50)
    for fixed in ((), ("cpu",)):
        monkeypatch.setattr(kv_cache, "FIXED_SHAPES", fixed)
        again, _, _ = rollout(*llama, monkeypatch, 16, 10_000, prompts)
        assert ids_of(again) == ids_of(before)
    hook.remove()
    assert max(tokens for _, tokens in widths) == 50 and (1, 41) in widths
