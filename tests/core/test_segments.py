"""Growing segments of a card's memory: where they are asked for, and that a user's own setting stays."""
import os
import subprocess
import sys

import pytest

from minimath.core import segments

NVIDIA = {"__version__": "2.11.0+cu129", "cuda": "12.9"}


@pytest.fixture
def asked(monkeypatch):
    """asked(build, release, **environ) -> what is in the environment afterwards, of NAMES."""
    def run(build, release="6.18.0-generic", **environ):
        for name in segments.NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(segments, "torch_build", lambda: build)
        monkeypatch.setattr(os, "uname", lambda: type("", (), {"release": release}))
        monkeypatch.setattr(sys, "platform", "linux")
        segments.grow_segments()
        return {name: os.environ[name] for name in segments.NAMES if name in os.environ}
    return run


def test_a_card_of_nvidia_gets_growing_segments_under_the_name_that_its_torch_reads(asked):
    assert asked(NVIDIA) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for version, name in (("2.9.0a0+nv25.09", "PYTORCH_ALLOC_CONF"), ("2.8.1+cu126", "PYTORCH_CUDA_ALLOC_CONF")):
        assert asked(NVIDIA | {"__version__": version}) == {name: "expandable_segments:True"}


@pytest.mark.parametrize("build", [{"__version__": "2.11.0+cpu"}, {"__version__": "2.11.0", "hip": "6.4"}, {}])
def test_other_builds_of_torch_get_none(asked, build):
    assert asked(build) == {}


@pytest.mark.parametrize("release", ["6.6.87.2-microsoft-standard-WSL2", "5.15.148-tegra"])
def test_nor_do_wsl_and_jetson(asked, release):
    assert asked(NVIDIA, release) == {}


@pytest.mark.parametrize("name", segments.NAMES)
def test_what_the_user_set_stays_and_is_left_alone(asked, name):
    assert asked(NVIDIA, **{name: "max_split_size_mb:64"}) == {name: "max_split_size_mb:64"}
    segments.fix_segments()
    assert os.environ[name] == "max_split_size_mb:64"


def test_vllm_takes_it_back(asked):
    assert asked(NVIDIA)
    segments.fix_segments()
    assert not any(name in os.environ for name in segments.NAMES)


def test_it_is_set_before_torch_is_imported_and_the_build_is_read_without_it():
    code = ("import sys\nfrom minimath.core import segments\nprint(segments.torch_build()['__version__'])\n"
            "segments.grow_segments = lambda: print('torch' in sys.modules)\nimport minimath.cli")
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    import torch
    assert seen == [torch.__version__, "False"]
