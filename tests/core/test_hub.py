"""Without a network: commands that name a hub model say so in one line, soon, and imports are silent."""
import os
import socket
import subprocess
import sys
import time

import huggingface_hub.constants as constants
import pytest

from minimath.config.schema import EvalConfig
from minimath.core import hub
from minimath.core.errors import UserError
from minimath.data.examples import load_examples
from minimath.models.policy import load_policy
from minimath.plan.needs import Planner


@pytest.fixture(params=["refused", "silent", "unknown"])
def no_network(request, monkeypatch, tmp_path):
    """A hub that refuses, one that never answers, one without an address."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = 9 if request.param == "refused" else server.getsockname()[1]
        address = "http://no-such-host.invalid" if request.param == "unknown" else f"http://127.0.0.1:{port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        hub.without_network.cache_clear()
        yield address
        hub.without_network.cache_clear()


def test_what_needs_the_hub_says_within_five_seconds_that_there_is_none(no_network, capfd):
    start = time.monotonic()
    cfg = EvalConfig(model="nobody/nothing", device="cpu", data="nobody/nothing")
    for work in (lambda: load_policy(cfg, train=False), lambda: Planner(cfg.model.name, "cpu")):
        with pytest.raises(UserError, match=f"no network: {no_network}") as caught:
            work()
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="Check the name and the network"):
        load_examples(cfg.data)
    assert Planner("Qwen/Qwen2.5-0.5B-Instruct", "cpu").config.hidden_size == 896  # of the shapes that it ships with
    assert time.monotonic() - start < 5 and constants.HF_HUB_OFFLINE and capfd.readouterr().err == ""


def test_a_hub_that_answers_is_used(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: type("Session", (), {"head": lambda *a, **k: 404})())
    hub.without_network.cache_clear()
    assert hub.without_network() == "" and not constants.HF_HUB_OFFLINE
    hub.without_network.cache_clear()


def test_imports_print_nothing(tmp_path):
    (tmp_path / "kernels").mkdir()  # as in the repository: bitsandbytes takes it for a package that it wants
    code = "import minimath.models.load, minimath.train.rlaif, minimath.eval.evaluate, minimath.export.merge"
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path},
                          capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
