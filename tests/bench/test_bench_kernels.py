"""bench.kernels without a GPU: arguments, peers that are not there, table, plot, one tiny run."""

import json
import sys

import pytest
import torch

from bench import kernels
from bench.cards import card_named

TWO = {"minimath": kernels.linear_cross_entropy, "eager": kernels.eager}


def run(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["bench.kernels", *map(str, words)])
    return kernels.main()


@pytest.mark.parametrize("words", [["--device", "tpu"], ["--shapes", "12x5"], ["--dtypes", "fp8"], ["--rounds", "0"]])
def test_bad_arguments_are_refused_before_any_work(monkeypatch, capsys, words):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *words)
    assert stopped.value.code == 2 and "error" in capsys.readouterr().err


def test_without_a_gpu_cuda_is_one_line(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert run(monkeypatch, "--device", "cuda") == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def test_peers_that_are_not_installed_are_left_out(monkeypatch):
    for name in ("cut_cross_entropy", "liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    for device in ("cpu", "cuda"):
        found = kernels.methods(device)
        assert {"minimath", "eager", "torch.compile"} <= set(found)
        assert not {"cut-cross-entropy", "liger"} & set(found)


def test_a_peer_that_fails_is_a_result_and_ours_failing_is_an_error(monkeypatch, capsys):
    def fails(hidden, weight, target):
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(kernels, "methods", lambda device: TWO | {"eager": fails})
    monkeypatch.setattr(kernels, "cold_in_child", lambda *words: None)
    (row,) = kernels.measure(kernels.Shape(5, 4, 40), "fp32", "cpu", 1)
    assert row["method"] == "minimath" and "eager does not run" in capsys.readouterr().out
    monkeypatch.setattr(kernels, "methods", lambda device: {"minimath": fails})
    with pytest.raises(RuntimeError, match="no kernel"):
        kernels.measure(kernels.Shape(5, 4, 40), "fp32", "cpu", 1)


def test_until_all_is_timed_a_method_sees_one_number_of_tokens(monkeypatch):
    """Another one would make torch.compile run what it compiles for any number, in place of what is timed."""
    seen = []

    def method(hidden, weight, target):
        seen.append(len(hidden))
        return kernels.eager(hidden, weight, target)

    monkeypatch.setattr(kernels, "methods", lambda device: {"minimath": method})
    monkeypatch.setattr(kernels, "cold_in_child", lambda *words: None)
    kernels.measure(kernels.Shape(300, 4, 40), "fp32", "cpu", 3)
    assert seen[:8] == 8 * [300] and seen[8:] == [kernels.ERROR_ROWS]  # a warm-up and three rounds of two phases


def test_on_a_known_card_times_are_given_as_a_share_of_its_roofline(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "methods", lambda device: TWO)
    monkeypatch.setattr(kernels, "cold_in_child", lambda *words: None)
    card = card_named("NVIDIA GeForce RTX 4090")
    rows = kernels.measure(kernels.Shape(64, 16, 400), "bf16", "cpu", 2, card)
    for row in rows:
        assert 0 < row["forward share of roofline"] < 1 and 0 < row["forward+backward share of roofline"] < 1
    kernels.show(rows)
    assert "roofline" in capsys.readouterr().out


def test_a_tiny_run_writes_table_json_and_plot_with_ratios_and_cold_calls(monkeypatch, capsys, tmp_path):
    """The real command; two methods, since compiling the peers takes minutes, and fresh processes for ours alone."""
    in_child = kernels.cold_in_child
    monkeypatch.setattr(kernels, "methods", lambda device: TWO)
    monkeypatch.setattr(kernels, "cold_in_child", lambda name, *rest: (
        in_child if name == "minimath" else kernels.cold)(name, *rest))
    assert run(monkeypatch, "--shapes", "37x8x203", "--dtypes", "fp32", "--rounds", 2, "--out", tmp_path) == 0
    facts = json.loads((tmp_path / "kernels-cpu.json").read_text())
    assert facts["rounds"] == 2 and facts["versions"]["torch"] == torch.__version__ and facts["date"]
    ours, eager = facts["rows"]
    for phase in kernels.PHASES:
        assert ours[f"{phase} median speed vs fastest peer"] == pytest.approx(
            eager[f"{phase} median s"] / ours[f"{phase} median s"]
        )
        assert ours[f"{phase} first call s"] > 0 and ours[f"{phase} peak bytes"] >= 0
    assert ours["grad_error"] < 1e-5 and (tmp_path / "kernels-cpu.png").stat().st_size > 5000
    assert "minimath" in capsys.readouterr().out
