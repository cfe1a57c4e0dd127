"""bench.step: what counts as a launch, its bytes and flops; a small model before and after."""
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import step
from minimath.kernels import elementwise


@pytest.fixture
def counted():
    with FakeTensorMode(), step.Launches({}) as launches:
        yield launches


def noted(launches: step.Launches) -> dict[str, tuple]:
    return {each.name: (each.launches, each.hbm, each.flops) for _, each in launches.passes}


def test_views_and_empty_tensors_launch_nothing(counted):
    x = torch.empty(8, 6)
    x.t()[1:].view(5, 2, 4).transpose(0, 1).detach().expand(3, 2, 5, 4)
    assert not counted.passes


def test_a_pass_moves_its_inputs_and_outputs_once(counted):
    x, row = torch.empty(8, 6), torch.empty(1, 6, dtype=torch.bfloat16)
    x.add_(row.expand(8, 6))
    x.exp()
    assert noted(counted) == {"add_": (1, 2 * 192 + 12, 0), "exp": (1, 2 * 192, 0)}


def test_products_and_attention_count_flops(counted):
    torch.empty(8, 6).addmm_(torch.empty(8, 3), torch.empty(3, 6))
    q = torch.empty(2, 4, 10, 16)
    torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    found = {name.split("_for_cpu")[0]: each[2] for name, each in noted(counted).items()}
    assert found == {"addmm_": 2 * 8 * 3 * 6, "_scaled_dot_product_flash_attention": 2 * 2 * 4 * 10 * 10 * 16}


def test_lists_are_one_launch_where_strides_are_alike(counted):
    some = [torch.empty(4, 6) for _ in range(3)]
    torch._foreach_mul(some, 2.0)
    torch._foreach_copy_([torch.empty(6, 4).t() for _ in range(3)], some)
    assert noted(counted) == {"_foreach_mul": (1, 6 * 96, 0), "_foreach_copy_": (3, 6 * 96, 0)}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    folder, out = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("out")
    fields = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5,
              "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 400}
    (folder / "config.json").write_text(json.dumps(fields))
    assert step.main(["--models", str(folder), "--cards", "RTX 3090", "--tokens", "2048", "--out", str(out)]) == 0
    return json.loads((out / "step.json").read_text())


def test_the_fused_step_launches_moves_and_keeps_less_for_the_same_products(rows):
    plain, nf4 = rows
    for row in rows:
        before, after = row["before"], row["after"]
        for key in before:
            assert "GFLOP" in key or after[key] <= 0.7 * before[key], key
        ms = row["ms"]["RTX 3090"]
        assert ms["loss"] < ms["products"] < ms["after"] < ms["before"]
    d, qkv, f, r = 64, 128, 160, 16
    frozen, adapters = d * (qkv + d + 3 * f), 3 * r * (d + qkv) + 2 * r * d + 2 * r * (d + 2 * f) + r * (f + d)
    attention = step.ROW * d  # queries times keys, and again; half is causal
    assert plain["after"]["forward GFLOP"] == pytest.approx(2 * 2048 * (frozen + adapters + attention) / 1e9, abs=0.01)
    for when, each_way in (("before", 7), ("after", 7)):
        assert nf4[when]["forward launches"] - plain[when]["forward launches"] == each_way


def test_elementwise_is_whole_again(rows):
    y, r = elementwise.rms_norm(torch.ones(2, 4), torch.ones(4), 0.0, 0)
    assert torch.equal(y, torch.ones(2, 4)) and r.shape == (2, 1)
