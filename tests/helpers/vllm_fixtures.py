"""Fixtures for tests of rollouts by vLLM; a test file says pytest_plugins = ["vllm_fixtures"]."""

import sys

import pytest
import tiny
from fake_vllm import Engine, fake_modules, start_server
from toy import policy_of, wake_adapter

from minimath.config.schema import EngineOptions, PromptOptions, SamplingOptions
from minimath.rollout.vllm import VLLMEngine


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
    """The policy of a live adapter, in train mode."""
    policy = policy_of(folder, train=True, lora_r=4)
    wake_adapter(policy.model)
    return policy


@pytest.fixture
def opened(server, trained, tmp_path, monkeypatch):
    """opened(**changes) -> VLLMEngine whose retries hardly wait. eos: in place of the model's own."""
    handles = []
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)

    def make(policy=trained, *, eos=(), max_prompt_len=64, seed=5, **changes):
        options = {"vllm_url": f"http://127.0.0.1:{server.server_address[1]}/v1", "vllm_gpu_share": 0.3,
                   "max_new_tokens": 12, "temperature": 0.7, **changes}
        groups = [kind(**{k: v for k, v in options.items() if k in kind.__dataclass_fields__})
                  for kind in (EngineOptions, SamplingOptions)]
        policy.prompt = PromptOptions(max_prompt_len=max_prompt_len)
        engine = VLLMEngine(*groups, policy, seed=seed, run_dir=tmp_path)
        engine.eos = list(eos)
        handles.append(engine)
        return engine

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
