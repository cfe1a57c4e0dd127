"""bench.gpu without a card: every line of it on tiny sizes; parts that crash, hang or find something wrong."""
import contextlib
import io
import json
import time
from pathlib import Path

import pytest
import torch

import bench.gpu.__main__ as gpu
from bench.gpu import exactness
from bench.gpu.common import Found

FAULTS = '''
import os, time

def good(found):
    found.row("numbers", value=1)
    found.check("sum", 1 + 1 == 2, "is not 2")

def wrong(found):
    found.check("sum", 1 + 1 == 3, "is 2")

def raises(found):
    found.row("before it", value=7)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def dies(found):
    found.row("before it", value=7)
    os.abort()

def hangs(found):
    found.row("before it", value=7)
    print("waiting for the card", flush=True)
    time.sleep(600)

def ends(found):
    os._exit(0)
'''


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """parts(NAMES) -> (exit status, gpu.json) of a run of such parts, in that order."""
    (tmp_path / "faulty_parts.py").write_text(FAULTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(*names, seconds=30.0, minutes=1.0):
        limits = {"hangs": 1.5}
        monkeypatch.setattr(gpu, "PARTS", {
            name: gpu.Part(f"faulty_parts:{name}", limits.get(name, seconds)) for name in names})
        status = gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "out"), "--minutes", str(minutes)])
        return status, json.loads((tmp_path / "out" / "gpu.json").read_text())

    return run


def test_a_part_that_crashes_or_hangs_is_told_and_the_others_go_on(parts, capsys):
    started = time.monotonic()
    status, found = parts("raises", "dies", "hangs", "ends", "wrong", "good")
    assert status == 1 and time.monotonic() - started < 60
    assert found["good"]["failed"] == [] and found["good"]["checks"] == 1
    assert "illegal memory access" in found["raises"]["failed"][0] and "Traceback" in found["raises"]["log"]
    assert found["dies"]["failed"] == ["killed by SIGABRT"]
    assert found["hangs"]["failed"] == ["no end within 3 s"] and "waiting for the card" in found["hangs"]["log"]
    assert found["ends"]["failed"] == ["ended before its end"] and found["wrong"]["failed"] == ["sum: is 2"]
    for name in ("raises", "dies", "hangs"):
        assert found[name]["rows"] == [{"what": "before it", "value": 7}]  # what it had until then
    said = capsys.readouterr().out
    assert "wrong: raises, dies, hangs, ends, wrong" in said and "good     ok" in said


def test_parts_that_do_not_fit_are_left_out_and_said(parts, capsys):
    status, found = parts("good", seconds=90.0, minutes=0.5)
    assert status == 0 and "30 s are left, it may need 90" in found["good"]["left out"]
    assert "left out" in capsys.readouterr().out


def test_json_is_written_after_every_part(monkeypatch, tmp_path):
    states = []
    monkeypatch.setattr(gpu, "run_part", lambda part, limit, spec: {"failed": []})
    options = gpu.parse(["--device", "cpu", "--tiny", "--only", "kernels", "env"])
    gpu.run_parts(options, tmp_path, lambda results: states.append(list(results)))
    assert states == [["env"], ["env", "kernels"]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_the_first_part_says_so_and_no_other_begins(tmp_path, capsys):
    assert gpu.main(["--only", "env", "kernels", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found) == ["env"] and "sees no card here" in found["env"]["failed"][0]


@pytest.mark.parametrize("spoil, words", [
    (lambda got: got.index_fill(0, torch.tensor([2]), 0.0), "times what is allowed"),
    (lambda got: got * torch.nan, "nan times what is allowed"),
    (lambda got: got + 1e-3 * torch.rand(got.shape), "other bits the second time")])
def test_a_wrong_kernel_is_found(tmp_path, spoil, words):
    found = Found({"device": "cpu", "tiny": True, "found": str(tmp_path / "found.json")})
    case = exactness.head_cases(True)[1]
    ours, *others = exactness.log_prob("cpu", torch.float32, case)
    exactness.compare(found, torch.float32, "linear_logp", {}, ours, *others)
    assert found.all["failed"] == []
    exactness.compare(found, torch.float32, "linear_logp", {},
                      lambda: {name: spoil(value) for name, value in ours().items()}, *others)
    assert any(words in each for each in found.all["failed"])


def test_the_whole_command_on_tiny_sizes(tmp_path, monkeypatch, capsys):
    """The first part in a process of its own, as all have; the others here, since each process imports torch."""
    in_a_process = gpu.run_part

    def run_part(part, limit, spec):
        if part == gpu.PARTS["env"]:
            return in_a_process(part, limit, spec)
        with contextlib.redirect_stdout(io.StringIO()):
            gpu.run_child(spec | {"target": part.target})
        return json.loads(Path(spec["found"]).read_text()) | {"seconds": 0.0}

    monkeypatch.setattr(gpu, "run_part", run_part)
    assert gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found) == list(gpu.PARTS)
    for name, result in found.items():
        assert result["ended"] and result["rows"] and result["failed"] == [], name
        assert {"device", "commit", "date", "versions"} <= set(result["machine"]), name
    assert found["kernels"]["checks"] > 200 and {row.get("kernel") for row in found["kernels"]["rows"]} >= {
        "linear_token_loss", "linear_logp", "linear_kl", "linear_cross_entropy", "rms_norm", "rotate", "gated",
        "decode_attention"}
    said = capsys.readouterr().out
    assert "all that ran is right" in said and "tokens/s" in said and "the resumed run: the same bits" in said
