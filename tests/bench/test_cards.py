"""bench.cards: which card a device's name means, and figures that agree with one another."""


import pytest

from bench.cards import CARDS, DEVICE_NAMES, SHAPES, card_named, nearest_names


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


RELATIVES = """NVIDIA GeForce RTX 3090 Ti, NVIDIA GeForce RTX 4090 Laptop GPU, NVIDIA GeForce RTX 5090 D,
NVIDIA L40S, NVIDIA H100 PCIe, NVIDIA H100 NVL, NVIDIA A100-SXM4-40GB MIG 1g.5gb, Tesla T4, """


@pytest.mark.parametrize("printed", RELATIVES.replace("\n", " ").split(","))
def test_relatives_of_a_card_are_not_that_card(printed):
    assert card_named(printed.strip()) is None


def test_every_card_names_a_source_and_plausible_figures():
    for card in CARDS:
        assert card.source and card.block_shared_bytes <= card.shared_bytes
        assert card.fp32_flops < card.tensor_flops and card.bandwidth < card.l2_bandwidth < 20e12
        assert card.l2_bytes < card.memory_bytes


def test_an_unknown_name_gets_the_nearest_ones():
    assert "RTX 4090" in nearest_names("RTX 4080") and len(nearest_names("")) == 3
    assert set(DEVICE_NAMES.values()) == {card.name for card in CARDS}


def test_heads_are_of_whole_tensor_core_steps():
    assert all(head.d % 16 == 0 and head.v % 16 == 0 for head in SHAPES)
    assert len({head.name for head in SHAPES}) == len(SHAPES)
