"""minimath doctor: what it finds is what would be used, and what does not work is said and fails the command."""

from types import SimpleNamespace

import pytest
import torch

from minimath.commands import doctor as d
from minimath.models.load import pick_device, pick_dtype


def found(name="auto"):
    """{what: words} of the findings about the machine."""
    device = pick_device(name)
    return {f.what: f.words for f in d.machine_findings(device, *pick_dtype("auto", device))}


def report(capsys, *words):
    status = d.doctor(list(words))
    return status, capsys.readouterr().out


def test_the_report_names_the_device_the_dtype_with_its_reason_and_every_kernel_test(here):
    status, out, _ = here("doctor", "device=cpu", "dtype=fp32")
    assert status == 0 and "all that would be used works" in out
    for words in ("CPU", "float32: as configured", "chunked torch", "GiB free",
                  *(f"test: {name}" for name in d.KERNELS)):
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
    packages = {f.what: f for f in d.package_findings()}
    assert packages["peft"].state == "FAIL" and "pip install 'peft" in packages["peft"].words
    assert packages["torch"].state == "ok"


def test_a_version_outside_the_range_is_a_note(monkeypatch):
    real = d.version_of
    monkeypatch.setattr(d, "version_of", lambda name: "3.0.0" if name == "transformers" else real(name))
    packages = {f.what: f for f in d.package_findings()}
    assert packages["transformers"].state == "note" and "outside" in packages["transformers"].words


def test_a_dtype_that_is_emulated_is_not_chosen(monkeypatch):
    monkeypatch.setattr("minimath.models.load._cpu_flag", lambda *names: False)
    assert found("cpu")["dtype"] == "float32: no fast bf16 on this cpu"


MACHINES = {  # what torch says of a machine -> (device, words of the findings about device, dtype, kernels and memory)
    "Turing": ({"name": "Tesla T4", "major": 7, "minor": 5}, "cuda", "Tesla T4 (sm_75), 16.0 GiB",
               "float16: the card does not compute bf16, with a loss scale", "Triton", "12.0 GiB free"),
    "Ampere": ({"name": "RTX 3090", "major": 8, "minor": 6}, "cuda", "RTX 3090 (sm_86), 16.0 GiB",
               "bfloat16: the card computes bf16", "Triton", "12.0 GiB free"),
    "ROCm": ({"name": "Radeon", "major": 11, "minor": 0, "gcnArchName": "gfx1100"}, "cuda", "Radeon (gfx1100), 16",
             "bfloat16: the card computes bf16", "Triton", "12.0 GiB free"),
    "Apple": ("mps", "mps", "Apple GPU (mps): plain torch kernels, no NF4", "float32: no fast bf16 on this mps",
              "chunked torch: Triton serves CUDA and ROCm", "how much of mps is free is not known: set max_num_seqs="),
    "no GPU": (None, "cpu", "threads: this torch is built for the CPU only", "float32: no fast bf16 on this cpu",
               "chunked torch: Triton serves CUDA and ROCm", "GiB free"),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_device_dtype_and_kernels_follow_what_the_machine_has_and_say_why(monkeypatch, machine):
    card, device, *words = MACHINES[machine]
    props = SimpleNamespace(total_memory=16 << 30, **card) if isinstance(card, dict) else None
    monkeypatch.setattr(torch.version, "hip", "7.1" if machine == "ROCm" else None)
    monkeypatch.setattr(torch.version, "cuda", "12.8" if machine in ("Turing", "Ampere") else None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: card == "mps")
    for name, value in {"is_available": bool(props), "device_count": int(bool(props)), "current_device": 0,
                        "get_device_properties": props, "mem_get_info": (12 << 30, 16 << 30), "memory_reserved": 0,
                        "memory_allocated": 0, "set_device": None,
                        "_check_bf16_tensor_supported": True}.items():  # the emulation, which must not count
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    # instead of a tensor on a device that is not here
    monkeypatch.setattr(torch, "empty", lambda *size, device: SimpleNamespace(
        is_cuda=torch.device(device).type == "cuda", dtype=torch.float32))
    monkeypatch.setattr("minimath.kernels.common.triton", object())
    monkeypatch.setattr("minimath.models.load._cpu_flag", lambda *names: False)
    assert pick_device("auto").type == device
    findings = found()
    for what, want in zip(("device", "dtype", "kernels", "memory"), words, strict=True):
        assert want in findings[what]


@pytest.mark.parametrize("system, release, state, words", [
    ("Windows", "11", "note", "install it in WSL instead"),
    ("Linux", "5.15.167.4-microsoft-standard-WSL2", "ok", "(WSL)"),
    ("Linux", "6.8.0", "ok", "Python 3."),
])
def test_windows_is_sent_to_wsl_and_wsl_is_named(monkeypatch, system, release, state, words):
    monkeypatch.setattr(d.platform, "system", lambda: system)
    monkeypatch.setattr(d.platform, "release", lambda: release)
    finding = d.machine_findings(torch.device("cpu"), torch.float32, "")[0]
    assert finding.state == state and words in finding.words and ("WSL" in words) == ("WSL" in finding.words)


def test_a_processor_without_onednn_is_not_asked_about_it(monkeypatch):
    monkeypatch.setattr("minimath.models.load._cpu_flag", lambda *names: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert d.pick_dtype("auto", torch.device("cpu"))[0] == torch.float32
