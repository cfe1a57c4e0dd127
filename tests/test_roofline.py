"""bench.roofline: counts against numbers worked out by hand, the chunk rule's bound, card names, the
command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # bench/ is not installed

from bench import roofline  # noqa: E402
from bench.cards import CARDS, SHAPES, card_named, nearest_names  # noqa: E402
from bench.side_kernels import POLICY_LAUNCHES, count_policy_launches, nf4, policy_share  # noqa: E402
from bench.work import (  # noqa: E402
    LAUNCH_SECONDS,
    chunk_passes,
    cut_cross_entropy,
    eager,
    fused,
    fused_rows,
    liger,
    liger_rows,
    ours,
    product,
)

ADA = card_named("RTX 4090")
SMALL = SHAPES[0]  # D 896, V 151,936
N = 4096
PRODUCT = 2 * 4096 * 151_936 * 896  # flops of one product of N V D


def test_products_of_each_method_are_two_or_three():
    def products(method):
        return method.tensor_flops() / PRODUCT

    assert products(ours(ADA, SMALL, N, 1024, 0)) == pytest.approx(2)
    assert products(eager(ADA, SMALL, N, True)) == pytest.approx(2)
    assert products(liger(ADA, SMALL, N, True)) == pytest.approx(2)
    assert products(cut_cross_entropy(ADA, SMALL, N, True)) == pytest.approx(3)
    assert products(cut_cross_entropy(ADA, SMALL, N, True, 0.2)) == pytest.approx(2.2)
    assert products(fused(ADA, SMALL, N, online=True)) == pytest.approx(2)
    assert products(fused(ADA, SMALL, N, online=False)) == pytest.approx(3)
    assert products(eager(ADA, SMALL, N, False)) == products(liger(ADA, SMALL, N, False)) == pytest.approx(1)


def test_row_passes_move_the_workspace_once_and_twice():
    passes = {each.name: each for each in chunk_passes(ADA, SMALL, 1024, 0)}
    assert passes["statistics"].hbm == 2 * 1024 * 151_936  # 311 MB, beyond 72 MiB of L2
    assert passes["gradient"].hbm == 2 * passes["statistics"].hbm
    assert passes["statistics"].seconds(ADA) == pytest.approx(311_164_928 / 1008e9 + LAUNCH_SECONDS)
    cached = {each.name: each for each in chunk_passes(ADA, SMALL, 128, 0)}  # 39 MB
    assert cached["statistics"].hbm == 0 and cached["statistics"].l2 == 2 * 128 * 151_936


def test_one_wave_of_tiles_counts_every_operand_once():
    # 128 tiles of 128 x 128 on 128 processors
    one = product(ADA, "x", 128, 128 * 128, 1024, tiles=((128, 128),), split_k=False)
    assert one.fill == 1 and one.flops == 2 * 128 * 16_384 * 1024
    assert one.hbm == 2 * (16_384 * 1024 + 128 * 1024 + 128 * 16_384)
    assert one.l2 == 2 * (1024 * (16_384 + 128 * 128) + 128 * 16_384)
    more = product(ADA, "x", 128, 129 * 128, 1024, tiles=((128, 128),), split_k=False)
    assert more.fill == pytest.approx(129 / 256)  # the 129th tile costs a second wave


def test_cutting_the_inner_dimension_fills_the_chip():
    whole = product(ADA, "dX", 128, 896, 151_936, a_cached=True, split_k=False)
    cut = product(ADA, "dX", 128, 896, 151_936, a_cached=True)
    assert whole.fill < 0.25 < cut.fill and cut.seconds(ADA) < whole.seconds(ADA) / 2


def test_memory_is_the_workspace_or_fourteen_bytes_a_logit():
    assert ours(ADA, SMALL, N, 1024, 0).extra_bytes == 2 * 1024 * 151_936
    assert eager(ADA, SMALL, N, True).extra_bytes == 14 * 4096 * 151_936  # 8.7 GB


def test_liger_chunk_is_its_own_rule():
    class Doc:  # the example in its source
        d, v = 4096, 32_000

    assert liger_rows(Doc, 4 * 4096) == 2048
    assert liger_rows(SMALL, 4096) == 32  # ceil(4096 / ceil(151936 / 896)) = 25


def test_fused_accumulator_ends_at_d_3072():
    assert [fused_rows(head) for head in SHAPES] == [48, 32, 16, 0, 0, 0]
    assert fused(ADA, SHAPES[-1], N, online=True) is None


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_no_exact_method_beats_two_products(card):
    for head in SHAPES:
        row = roofline.row_of(card, head, N)
        for phase in ("forward", "loss+gradient"):
            assert min(row[phase]["ms"].values()) >= row[phase]["floor"]


def test_time_follows_tokens_and_bandwidth():
    rows = [ours(ADA, SMALL, tokens, 1024, 0).seconds(ADA) for tokens in (1024, 4096, 16_384)]
    assert rows == sorted(rows) and rows[2] == pytest.approx(4 * rows[1], rel=0.02)
    quick = ADA._replace(bandwidth=2 * ADA.bandwidth)
    for head in SHAPES:
        assert roofline.chunk_seconds(quick, head, 1024) < roofline.chunk_seconds(ADA, head, 1024)


def test_rule_is_within_five_percent_of_the_best_chunk():
    off = []
    for card in CARDS:
        for head in SHAPES:
            most = roofline.WORKSPACE_CAP // (2 * head.v)
            best = min(roofline.chunk_seconds(card, head, rows) for rows in range(128, most + 1, 128))
            rows = roofline.rule_rows(card.processors, head.v)
            assert rows <= most and rows % 256 == 0
            off.append(roofline.chunk_seconds(card, head, rows) / best)
    assert max(off) < 1.055 and sum(each > 1.05 for each in off) <= 1


def test_rule_holds_where_rocm_counts_pairs_of_units():
    card = card_named("RX 7900 XTX")
    for head in SHAPES:
        rows = roofline.rule_rows(48, head.v)
        choice = roofline.choose_chunk(card, head)
        assert roofline.chunk_seconds(card, head, rows) < 1.05 * roofline.chunk_seconds(card, head, choice)


def test_chosen_chunk_keeps_the_byte_cap():
    for cap in (64 << 20, 256 << 20, 512 << 20):
        rows = roofline.choose_chunk(ADA, SMALL, cap_bytes=cap)
        assert rows % 128 == 0 and rows * SMALL.v * 2 <= cap
    assert roofline.choose_chunk(ADA, SMALL, cap_bytes=1) == 128


def test_cpu_workspace_is_too_small_for_a_gpu():
    assert roofline.row_of(ADA, SMALL, N)["32 MiB workspace"] > 1.3
    assert roofline.row_of(card_named("L4"), SHAPES[3], N)["32 MiB workspace"] > 2


def test_tile_grows_with_the_rate_that_l2_must_feed():
    area = [rows * columns for rows, columns in (roofline.choose_tile(card, "bf16") for card in CARDS)]
    named = dict(zip((card.name for card in CARDS), area))
    assert named["RTX 3060 12GB"] <= named["RTX 3090"] <= named["RTX 4090"] <= named["A100 SXM 40GB"]
    for card in CARDS:
        rows, columns = roofline.choose_tile(card, "fp32")
        assert rows * columns <= 128 * 128 and roofline.choose_tile(card, "fp16") == roofline.choose_tile(
            card, "bf16"
        )


@pytest.mark.parametrize(
    "printed, name",
    [
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060 12GB"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 SXM 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H200", "H200 SXM"),
        ("AMD Radeon RX 7900 XTX", "RX 7900 XTX"),
        ("rtx 3090", "RTX 3090"),
    ],
)
def test_card_is_found_by_the_name_torch_prints(printed, name):
    assert card_named(printed).name == name


@pytest.mark.parametrize(
    "printed",
    [
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA L40S",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "Tesla T4",
        "",
    ],
)
def test_relatives_of_a_card_are_not_that_card(printed):
    assert card_named(printed) is None


def test_every_card_names_a_source_and_plausible_figures():
    for card in CARDS:
        assert card.source and card.block_shared_bytes <= card.shared_bytes
        assert card.fp32_flops < card.tensor_flops and card.bandwidth < card.l2_bandwidth < 20e12
        assert card.l2_bytes < card.memory_bytes


def test_policy_launches_are_what_the_profiler_counts():
    assert abs(count_policy_launches() - POLICY_LAUNCHES) <= 6  # torch versions differ by a few


def test_policy_loss_is_a_small_share_of_a_full_chunk():
    rows = roofline.rule_rows(ADA.processors, SMALL.v)
    assert policy_share(ADA, SMALL, rows).share < 0.02 and not policy_share(ADA, SMALL, rows).host_bound
    assert policy_share(ADA, SMALL, 110).share > 2 * policy_share(ADA, SMALL, rows).share
    assert policy_share(card_named("H100 SXM"), SMALL, 110).host_bound


def test_nf4_product_pays_for_decoding_only():
    for card in CARDS:
        gains = [nf4(card, tokens).speedup for tokens in (64, 512, 2048, 4096)]
        assert gains == sorted(gains, reverse=True)
        assert nf4(card, 64).worth and not nf4(card, 2048).worth and not nf4(card, 4096).worth


def test_command_writes_one_row_a_line_and_a_plot(tmp_path, capsys):
    words = ["--cards", "RTX 3090", "NVIDIA L4", "--shapes", "qwen2.5-7b", "1024x32000", "--tokens", "1000"]
    assert roofline.main([*words, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "roofline.json").read_text()
    rows = json.loads(text)
    assert len(rows) == 2 * 2 + 2 * 4 == len(text.splitlines()) - 2
    assert rows[0]["card"] == "RTX 3090" and rows[0]["head"] == "Qwen2.5-7B" and rows[0]["tokens"] == 1000
    assert rows[0]["loss+gradient"]["ms"]["ours"] > rows[0]["loss+gradient"]["floor"] > 0
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "RTX 3090: 71 TFLOP/s" in shown and "L4: 121" in shown and "NF4" in shown


def test_unknown_card_gets_the_nearest_names(capsys):
    assert "RTX 4090" in nearest_names("RTX 4080")
    with pytest.raises(SystemExit) as stopped:
        roofline.main(["--cards", "RTX 4080"])
    assert stopped.value.code == 2 and "nearest: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--shapes", "7B"], ["--shapes", "0x10"], ["--tokens", "0"], ["--tokens", "many"]]
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
