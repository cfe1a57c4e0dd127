"""Fixtures for tests of rollouts by vLLM; a test file says pytest_plugins = ["vllm_fixtures"]."""

import sys
from types import SimpleNamespace

import pytest
import tiny
from fake_vllm import Engine, fake_modules, start_server
from toy import load, wake_adapter

from minimath.config.schema import AdapterConfig
from minimath.rollout.vllm import open_vllm
from minimath.rollout.vllm_client import Server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.write_tiny(tmp_path_factory.mktemp("tiny") / "llama"))


@pytest.fixture(scope="module")
def engine(folder, tiny_tokenizer):
    return Engine(folder, tiny_tokenizer)


@pytest.fixture
def server(engine, folder):
    made = start_server(engine, folder)
    yield made
    made.closing.set()
    made.shutdown()
    made.server_close()


@pytest.fixture
def trained(folder):
    """(model, tokenizer) with a live adapter, in train mode."""
    model, tokenizer = load(folder, AdapterConfig, train=True, lora_r=4)
    wake_adapter(model)
    return model, tokenizer


@pytest.fixture
def config(folder, server):
    """config(**changes) -> the options that open_vllm reads."""

    def make(**changes):
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        fields = {"model": folder, "seed": 0, "trust_remote_code": False, "max_prompt_len": 64,
                  "max_new_tokens": 24, "temperature": 0.7, "top_p": 1.0, "min_p": 0.0, "top_k": 0,
                  "vllm_url": url, "vllm_model": "", "vllm_key_env": "", "vllm_timeout_s": 20.0,
                  "vllm_adapter_dir": "", "vllm_gpu_share": 0.3}  # fmt: skip
        return SimpleNamespace(**{**fields, **changes})

    return make


@pytest.fixture
def opened(config, trained, tmp_path, monkeypatch):
    """opened(**changes) -> VLLM whose retries hardly wait."""
    handles = []
    monkeypatch.setattr(Server, "pause_s", 0.01)

    def make(**changes):
        handles.append(open_vllm(config(**changes), *trained, tmp_path))
        return handles[-1]

    yield make
    for handle in handles:
        handle.close()


@pytest.fixture
def module(engine, monkeypatch):
    """A module in vllm's place that records what is done with it."""
    made, modules = fake_modules(engine)
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, content)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return made
