"""bench.roofline: counts against numbers worked out by hand, the tile's bound, the command."""

import functools
import json
import subprocess
import sys

import pytest

from bench import roofline
from bench.cards import CARDS, MIB, SHAPES, card_named
from bench.measure import ROOT
from bench.work import (
    LAUNCH_SECONDS,
    POLICY_LAUNCHES,
    SWEEP_LAUNCHES,
    chunk_passes,
    cut_cross_entropy,
    eager,
    held,
    liger,
    liger_rows,
    ours,
    product,
    share_of_roofline,
    tile_passes,
)

ADA = card_named("RTX 4090")
SMALL, LARGE = SHAPES[0], SHAPES[-1]  # D 896 and 5120, V 151,936 and 152,064
N = 4096
PRODUCT = 2 * 4096 * 151_936 * 896  # flops of one product of N V D
TILE = roofline.BUILT_IN


def seconds(card, head, rows, columns, tokens=N):
    return ours(card, head, tokens, rows, columns, POLICY_LAUNCHES).seconds(card)


@functools.cache
def row_of(card, head):
    return roofline.row_of(card, head, N)


def test_products_of_each_method_are_two_or_three():
    def products(method):
        return method.tensor_flops() / PRODUCT

    for columns in (8192, 10_000, 200_000):  # the last tile is narrower, or the only one
        assert products(ours(ADA, SMALL, N, 2048, columns, 0)) == pytest.approx(2)
    assert products(eager(ADA, SMALL, N, True)) == pytest.approx(2)
    assert products(liger(ADA, SMALL, N, True)) == pytest.approx(2)
    assert products(cut_cross_entropy(ADA, SMALL, N, True)) == pytest.approx(3)
    assert products(cut_cross_entropy(ADA, SMALL, N, True, 0.2)) == pytest.approx(2.2)
    assert products(eager(ADA, SMALL, N, False)) == products(liger(ADA, SMALL, N, False)) == pytest.approx(1)


def test_a_tile_moves_four_bytes_a_logit_and_ten_a_number_of_the_sum():
    ampere = card_named("RTX 3090")  # 6 MiB of L2 hold no tile of 32 MiB, nor the part of D = 5120
    passes = {each.name: each for each in tile_passes(ampere, LARGE, *TILE)}
    assert passes["tile"].hbm == passes["tile"].l2 == 4 * 2048 * 8192
    assert passes["sum"].hbm == passes["sum"].l2 == 10 * 2048 * 5120
    assert passes["tile"].seconds(ampere) == pytest.approx(4 * 2048 * 8192 / 936e9 + LAUNCH_SECONDS)
    cached = {each.name: each for each in tile_passes(ADA, SMALL, *TILE)}  # 34 + 4 + 7 MB of 53
    assert cached["tile"].hbm == cached["sum"].hbm == 0 and cached["tile"].l2 == 4 * 2048 * 8192
    sum_outside = {
        each.name: each for each in tile_passes(ADA, SHAPES[3], *TILE)
    }  # 34 + 15 fit, 29 more do not
    assert sum_outside["tile"].hbm == 0 and sum_outside["sum"].hbm == 8 * 2048 * 3584


def test_buffers_stay_in_cache_in_the_order_given():
    card = ADA._replace(l2_bytes=100)  # 70 of them for what is reused
    assert held(card, [30, 30, 20, 10]) == [True, True, False, True]
    assert held(card, [80, 70]) == [False, True]


def test_weight_in_cache_is_not_read_again():
    far, near = (product(ADA, "x", 64, 896, 8192, cached=cached) for cached in ("", "b"))
    assert far.hbm - near.hbm == 2 * 896 * 8192 and far.flops == near.flops


def test_chunk_has_every_column_and_one_loss_call():
    passes = chunk_passes(ADA, SMALL, *TILE, 39)
    tiles = [each for each in passes if each.name == "tile"]
    assert sum(each.l2 for each in tiles) == 4 * 2048 * 151_936 and len(tiles) == 2
    assert [each.launches for each in tiles] == [18, 1]  # 151,936 = 18 x 8192 + 4480
    assert [each.launches for each in passes if each.name.startswith("ends")] == [SWEEP_LAUNCHES + 39]


def test_one_wave_of_tiles_counts_every_operand_once():
    # 128 tiles of 128 x 128 on 128 processors
    one = product(ADA, "x", 128, 128 * 128, 1024, tiles=((128, 128),), split_k=False)
    assert one.fill == 1 and one.flops == 2 * 128 * 16_384 * 1024
    assert one.hbm == 2 * (16_384 * 1024 + 128 * 1024 + 128 * 16_384)
    assert one.l2 == 2 * (1024 * (16_384 + 128 * 128) + 128 * 16_384)
    more = product(ADA, "x", 128, 129 * 128, 1024, tiles=((128, 128),), split_k=False)
    assert more.fill == pytest.approx(129 / 256)  # the 129th tile costs a second wave


def test_cutting_the_inner_dimension_fills_the_chip():
    whole = product(ADA, "dX", 128, 896, 151_936, cached="a", split_k=False)
    cut = product(ADA, "dX", 128, 896, 151_936, cached="a")
    assert whole.fill < 0.25 < cut.fill and cut.seconds(ADA) < whole.seconds(ADA) / 2


def test_memory_is_one_tile_or_fourteen_bytes_a_logit():
    assert ours(ADA, SMALL, N, *TILE, 0).extra_bytes == 32 * MIB + 14 * 2048 * 896
    assert ours(ADA, SMALL, 1024, *TILE, 0).extra_bytes == 16 * MIB + 14 * 1024 * 896
    assert eager(ADA, SMALL, N, True).extra_bytes == 14 * 4096 * 151_936  # 8.7 GB


def test_liger_chunk_is_its_own_rule():
    class Doc:  # the example in its source
        d, v = 4096, 32_000

    assert liger_rows(Doc, 4 * 4096) == 2048
    assert liger_rows(SMALL, 4096) == 32  # ceil(4096 / ceil(151936 / 896)) = 25


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_no_exact_method_beats_two_products(card):
    for head in SHAPES:
        row = row_of(card, head)
        for phase in ("forward", "loss+gradient"):
            assert min(row[phase]["ms"].values()) >= row[phase]["floor"]


def test_time_follows_tokens_and_bandwidth():
    times = [seconds(ADA, SMALL, *TILE, tokens) for tokens in (1024, 4096, 16_384)]
    assert times == sorted(times) and times[2] == pytest.approx(4 * times[1], rel=0.02)
    ampere = card_named("RTX 3090")
    slow = ampere._replace(bandwidth=ampere.bandwidth / 2)
    for head in SHAPES:
        assert seconds(slow, head, *TILE) > 1.04 * seconds(ampere, head, *TILE)
    slow = ADA._replace(bandwidth=ADA.bandwidth / 2)  # whose cache holds all that a small head reuses
    assert seconds(slow, SMALL, *TILE) == seconds(ADA, SMALL, *TILE)


def test_built_in_tile_is_what_the_kernel_takes():
    common = pytest.importorskip("minimath.kernels.common")
    assert common.WORKSPACE_BYTES["cuda"] == roofline.WORKSPACE
    for head in SHAPES:
        rows, columns = common.tile_shape(N, head.v, 2, None, "cuda")
        assert (rows[0], columns) == TILE
        rows, columns = common.tile_shape(N, head.v, 2, 64 * MIB, "cuda")  # "64 as is"
        assert (rows[0], columns) == (2 * TILE[0], TILE[1])


@pytest.mark.parametrize("tokens", [4096, 16_384])
def test_built_in_tile_is_within_five_percent_of_the_best_but_on_an_l4(tokens):
    worst = {}
    for card in CARDS:
        best = [roofline.best_tile(card, head, tokens).seconds for head in SHAPES]
        own = [seconds(card, head, *TILE, tokens) for head in SHAPES]
        worst[card.name] = max(mine / least for mine, least in zip(own, best))
    assert min(worst.values()) >= 1  # the built-in tile is one of those tried
    assert 1.10 < worst.pop("L4") < 1.14 and max(worst.values()) < 1.05


def test_best_tile_keeps_the_workspace_and_gains_from_a_larger_one():
    for card in CARDS:
        tiles = [roofline.best_tile(card, SMALL, N, size * MIB) for size in (2, 8, 32, 256)]
        for tile, size in zip(tiles, (2, 8, 32, 256)):
            assert 2 * tile.rows * tile.columns <= size * MIB
        times = [tile.seconds for tile in tiles]
        assert times == sorted(times, reverse=True) and times[0] > times[-1]
    assert roofline.best_tile(ADA, SMALL, N, 1)[:2] == (512, 2048)


def test_larger_workspaces_pay_where_the_readme_says():
    def speedup(name, head, size):
        return row_of(card_named(name), head)["tiles"][size]["speedup"]

    for head in SHAPES:
        assert 1.04 <= speedup("A100 SXM 80GB", head, "256") < 1.12
        assert (
            1.05 < speedup("H100 SXM", head, "256") < 1.12 and 1.08 <= speedup("H200 SXM", head, "256") < 1.14
        )
        assert speedup("RTX 4090", head, "256") == speedup("RTX 4090", head, "32")
        assert speedup("RTX 4090", head, "64 as is") < 1 and speedup("L4", head, "64 as is") < 0.98


def test_share_of_roofline_is_one_at_the_floor():
    def share(n, name, gradient, time):
        return share_of_roofline(ADA, (n, 896, 151_936), name, gradient, time)

    assert share(N, "bf16", True, 2 * PRODUCT / 165.2e12) == pytest.approx(1)
    assert share(N, "fp16", False, PRODUCT / 165.2e12) == pytest.approx(1)
    assert share(N, "fp32", True, 2 * PRODUCT / 82.6e12) == pytest.approx(1)
    assert share(N, "bf16", True, 4 * PRODUCT / 165.2e12) == pytest.approx(0.5)
    few = (151_936 + 2 * 8) * 896  # eight rows: reading the weight is what takes time
    assert share(8, "bf16", True, 2 * few / 1008e9) == pytest.approx(1)
    assert share(8, "fp32", True, 4 * few / 1008e9) == pytest.approx(1)


def test_tile_grows_with_the_rate_that_l2_must_feed():
    area = [rows * columns for rows, columns in (roofline.choose_tile(card, "bf16") for card in CARDS)]
    named = dict(zip((card.name for card in CARDS), area))
    assert named["RTX 3060 12GB"] <= named["RTX 3090"] <= named["RTX 4090"] <= named["A100 SXM 40GB"]
    for card in CARDS:
        rows, columns = roofline.choose_tile(card, "fp32")
        assert rows * columns <= 128 * 128 and roofline.choose_tile(card, "fp16") == roofline.choose_tile(
            card, "bf16"
        )


NO_KERNEL = (  # operators that only move a pointer, set a shape or allocate
    "detach view as_strided expand to _to_copy empty empty_strided empty_like ones_like zeros_like "
    "resize_ alias unsqueeze squeeze select slice reshape _unsafe_view result_type lift_fresh item "
    "_local_scalar_dense promote_types resolve_conj resolve_neg unbind transpose is_nonzero split_with_sizes "
    "as_strided_").split()


def count_launches(step) -> int:
    """Count the kernels that a call of step() launches by torch's profiler: operators that call no other."""
    import torch

    def launches(event) -> bool:
        return event.name.startswith("aten::") and event.name[6:] not in NO_KERNEL

    def within(event) -> bool:
        return any(launches(child) or within(child) for child in event.cpu_children)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    return sum(launches(event) and not within(event) for event in profile.events())


def test_policy_launches_are_what_the_profiler_counts():
    import torch

    from minimath.config.schema import LossOptions
    from minimath.kernels import TokenStats
    from minimath.train.losses import PolicyRows, policy_loss

    count = 64
    ones, rows = torch.ones(count), torch.arange(count)
    loss_fn = policy_loss(PolicyRows(advantage=ones, weight=ones, sampled_logp=-ones), LossOptions())
    leaves = TokenStats(*(torch.randn(count).requires_grad_() for _ in TokenStats._fields))
    found = count_launches(lambda: torch.autograd.grad(loss_fn(leaves, rows).sum(), leaves, allow_unused=True))
    assert abs(found - POLICY_LAUNCHES) <= 6  # torch versions differ by a few


def test_sweep_launches_are_what_the_profiler_counts():
    """What a second chunk adds less what a second tile adds, with the plainest loss, which is four of them."""
    import torch

    from minimath.kernels import linear_token_loss

    rows, columns, width = 64, 4096, 32  # columns: a whole tile on a CPU

    def count(chunks: int, tiles: int) -> int:
        hidden = torch.randn(rows * chunks, width).bfloat16().requires_grad_()
        weight = torch.randn(columns * tiles, width).bfloat16()
        target = torch.arange(rows * chunks)

        def step():
            loss_fn = lambda stats, index: -stats.logp
            linear_token_loss(hidden, weight, target, loss_fn, workspace_bytes=rows * columns * 2)[0].backward()

        return count_launches(step)

    one = count(1, 1)
    assert abs(count(2, 1) - one - (count(1, 2) - one) - 4 - SWEEP_LAUNCHES) <= 8


def test_command_writes_one_row_a_line_and_a_plot(tmp_path, capsys):
    words = ["--cards", "RTX 3090", "NVIDIA L4", "--shapes", "qwen2.5-7b", "1024x32000", "--tokens", "1000"]
    words += ["--workspace-mib", "16"]
    assert roofline.main([*words, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "roofline.json").read_text()
    rows = json.loads(text)
    assert len(rows) == 2 * 2 == len(text.splitlines()) - 2
    assert rows[0]["card"] == "RTX 3090" and rows[0]["head"] == "Qwen2.5-7B" and rows[0]["tokens"] == 1000
    assert list(rows[0]["tiles"]) == ["16", "64", "128", "256", "64 as is"]
    assert rows[0]["loss+gradient"]["ms"]["ours"] > rows[0]["loss+gradient"]["floor"] > 0
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "RTX 3090: 71 TFLOP/s" in shown and "L4: 121" in shown and "64 as is" in shown


def test_unknown_card_gets_the_nearest_names(capsys):
    with pytest.raises(SystemExit) as stopped:
        roofline.main(["--cards", "RTX 4080"])
    assert stopped.value.code == 2 and "nearest: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--shapes", "7B"], ["--shapes", "0x10"], ["--tokens", "0"], ["--workspace-mib", "many"]]
)
def test_bad_arguments_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        roofline.main(words)
    assert stopped.value.code == 2 and "expected" in capsys.readouterr().err


def test_importing_it_needs_neither_torch_nor_a_plotter():
    code = (
        "import sys, bench.roofline; print([n for n in ('torch', 'rich', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
