"""minimath doctor: what it finds is what would be used, and what does not work is said and fails the command."""

import pytest
import torch

from minimath import doctor as d
from minimath.config import ModelConfig


def report(capsys, *words):
    status = d.doctor(list(words))
    return status, capsys.readouterr().out


def test_the_report_names_the_device_the_dtype_with_its_reason_and_every_self_test(here):
    status, out, _ = here("doctor", "device=cpu", "dtype=fp32")
    assert status == 0 and "all that would be used works" in out
    for words in ("CPU", "float32: as configured", "chunked torch", "GiB free", "test: linear_logp", "test: NF4",
                  "test: 8-bit AdamW", "math-verify answers in its child process", "can be written"):
        assert words in out, words
    assert "FAIL" not in out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", list(d.KERNELS))
def test_kernel_tests_pass_in_every_dtype_and_fail_for_a_wrong_gradient(kernel, dtype):
    assert "gradient within" in d.kernel_test(d.KERNELS[kernel], torch.device("cpu"), dtype)

    def wrong(x, weight, target):
        return d.KERNELS[kernel](1.2 * x, weight, target)

    with pytest.raises(ArithmeticError, match="off by"):
        d.kernel_test(wrong, torch.device("cpu"), dtype)


def test_a_kernel_that_fails_is_named_and_fails_the_command(capsys, monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel image is available\nmore lines")

    monkeypatch.setitem(d.KERNELS, "linear_logp", broken)
    status, out = report(capsys, "device=cpu")
    assert status == 1 and "does not work: test: linear_logp" in out and "no kernel image is available" in out


def test_a_missing_package_comes_with_the_command_that_installs_it(monkeypatch):
    real = d.version_of
    monkeypatch.setattr(d, "version_of", lambda name: None if name == "peft" else real(name))
    found = {f.what: f for f in d.package_findings()}
    assert found["peft"].state == "FAIL" and "pip install 'peft" in found["peft"].words
    assert found["torch"].state == "ok"


def test_a_version_outside_the_range_is_a_note(monkeypatch):
    real = d.version_of
    monkeypatch.setattr(d, "version_of", lambda name: "3.0.0" if name == "transformers" else real(name))
    found = {f.what: f for f in d.package_findings()}
    assert found["transformers"].state == "note" and "outside" in found["transformers"].words


def test_a_dtype_that_is_emulated_is_not_chosen(monkeypatch):
    monkeypatch.setattr("minimath.model._cpu_flag", lambda *names: False)
    words = {f.what: f.words for f in d.machine_findings(ModelConfig(device="cpu"))}
    assert words["dtype"] == "float32: no fast bf16 on this cpu"


def test_a_cache_folder_that_cannot_be_written_fails(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("MINIMATH_CACHE", str(tmp_path / "file"))
    assert d.tested("test: cache folder", d.cache_test).state == "FAIL"
