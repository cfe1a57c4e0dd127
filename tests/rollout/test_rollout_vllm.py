"""Rollouts by vLLM: against a server that speaks its protocol, a module in its place, and, where installed, vLLM."""

import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engines import all_facts, generate, policy_with
from fake_vllm import SAMPLES, asked, prompts_of
from peft import LoraConfig, get_peft_model
from toy import policy_of, wake_adapter
from transformers import AutoConfig, AutoModelForCausalLM

from minimath.config.schema import EngineOptions, SamplingOptions
from minimath.core.errors import UserError
from minimath.core.state import stream_seed
from minimath.rollout.transformers_engine import TransformersEngine, logp_difference
from minimath.rollout.vllm import VLLMEngine

pytest_plugins = ["vllm_fixtures"]


def of_rollout(server):
    """The requests for completions that are no probes."""
    return [body for body in asked(server) if body["seed"] != 0]


# ---- a server


def test_completions_come_back_in_order_with_a_stable_seed_each(server, opened, trained):
    engine, prompts = opened(eos=[17]), prompts_of(trained.tokenizer)
    server.delay_s = 0.05
    groups = engine.generate(prompts, SAMPLES, [40, 41, 42])
    bodies = {(tuple(b["prompt"]), b["seed"]): b for b in of_rollout(server)}
    assert bodies.keys() == {(tuple(prompts[p]), stream_seed(5, 40 + p, s)) for p in range(3) for s in range(3)}
    assert len({b["seed"] for b in bodies.values()}) == 9
    for p, group in enumerate(groups):
        for s, sample in enumerate(group):
            [[wanted]] = generate(trained.model, trained.tokenizer, [prompts[p]], kind=TransformersEngine,
                                  max_new_tokens=12, temperature=0.7, eos=[17], seed=stream_seed(5, 40 + p, s))
            assert (sample.ids, sample.finished, sample.text) == (wanted.ids, wanted.finished, wanted.text)
    server.seen.clear()
    again = opened(eos=[17], max_num_seqs=2).generate(prompts, SAMPLES, [40, 41, 42])
    assert all_facts(again) == all_facts(groups)
    assert {(tuple(b["prompt"]), b["seed"]) for b in of_rollout(server)} == bodies.keys()


def test_completions_are_yielded_as_they_end(server, opened, trained):
    server.delay_s = 0.2
    engine, prompts = opened(max_num_seqs=2), prompts_of(trained.tokenizer)
    told = [finished for finished in engine.stream(prompts, SAMPLES) if finished]
    assert len(told) > 3 and sorted((p, s) for p, s, _ in sum(told, [])) == [(p, s) for p in range(3) for s in range(3)]


def test_requests_leave_no_setting_to_the_server(server, opened, trained):
    opened(temperature=0.5, top_p=0.9, min_p=0.1, max_new_tokens=9, eos=[17, 2]).generate([[5, 6, 7]])
    [body] = of_rollout(server)
    assert body["prompt"] == [5, 6, 7] and body["stop_token_ids"] == [17, 2] and body["ignore_eos"] is True
    assert (body["temperature"], body["top_p"], body["min_p"], body["top_k"]) == (0.5, 0.9, 0.1, -1)
    assert body["repetition_penalty"] == 1.0 and body["presence_penalty"] == body["frequency_penalty"] == 0.0
    assert body["logprobs"] == 0 and body["return_token_ids"] is True and body["max_tokens"] == 9


def test_logps_are_those_of_the_training_forward(opened, trained):
    for temperature in (0.7, 1.0, 0.0):
        groups = opened(temperature=temperature).generate(prompts_of(trained.tokenizer), SAMPLES)
        for prompt, group in zip(prompts_of(trained.tokenizer), groups, strict=True):
            for sample in group:
                assert sample.full_logp is None
                assert logp_difference(trained.model, prompt, sample, temperature) < 1e-4


def test_an_end_token_ends_and_the_limit_truncates(opened, trained):
    engine, prompt = opened(temperature=1.0), prompts_of(trained.tokenizer)[0]
    [free] = engine.generate([prompt], 4)
    assert all(len(c.ids) == 12 and not c.finished for c in free)
    engine.eos = [free[0].ids[4]]
    [cut] = engine.generate([prompt], 4)
    for whole, sample in zip(free, cut, strict=True):
        assert sample.finished == (engine.eos[0] in whole.ids)
        n = whole.ids.index(engine.eos[0]) + 1 if sample.finished else 12
        assert sample.ids == whole.ids[:n] and len(sample.logp) == n


def test_each_rollout_loads_the_new_adapter_then_unloads_the_old(server, opened, trained, tmp_path):
    engine, prompts, told = opened(), prompts_of(trained.tokenizer), []
    for step in range(3):
        wake_adapter(trained.model, seed=step)
        told.append(all_facts(engine.generate(prompts, SAMPLES)))
    assert told[0] != told[1] != told[2]
    moves = [(path.split("/")[-1][:4], body["lora_name"]) for path, body, _ in server.seen if "lora" in path]
    names = [name for move, name in moves if move == "load"]
    assert moves == [("load", names[0]), ("load", names[1]), ("unlo", names[0]), ("load", names[2]), ("unlo", names[1])]
    assert len(set(names)) == 3 and list(server.adapters) == [names[2]]
    paths = [Path(body["lora_path"]) for body in asked(server, "/v1/load_lora_adapter")]
    assert all(path.is_absolute() for path in paths) and [path.is_dir() for path in paths] == [False, False, True]
    assert all(path.is_relative_to(tmp_path) for path in paths)  # in the run folder
    used = [body["model"] for body in asked(server)]
    assert used == [server.name] + [name for name in names for _ in range(10)]  # a probe, then swap's look and nine
    engine.close()
    assert not server.adapters and not paths[2].exists() and not paths[2].parent.exists()


@pytest.mark.parametrize("how", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_a_server_of_raw_logprobs_is_found_out_at_the_start(server, opened, how):
    server.processed = False
    with pytest.raises(UserError, match="--logprobs-mode processed_logprobs"):
        opened(**{"temperature": 1.0, **how})


def test_raw_logprobs_will_do_where_nothing_changes_them(server, opened):
    server.processed = False
    for temperature in (1.0, 0.0):
        opened(temperature=temperature).generate([[5, 6]])


def test_a_server_that_does_not_apply_the_adapter_is_noticed(server, opened):
    engine, server.applies = opened(), False
    with pytest.raises(UserError, match="away from this model's: the server .* does not apply the adapter"):
        engine.generate([[5, 6]])


def test_what_is_there_is_not_asked_for_again(server, opened, trained):
    engine, prompts = opened(), prompts_of(trained.tokenizer)
    plain = engine.generate(prompts, SAMPLES)
    server.seen.clear()
    skip = {(0, 1), (2, 2)}
    told = sum(engine.stream(prompts, SAMPLES, skip=skip), [])
    assert {(p, s) for p, s, _ in told} == {(p, s) for p in range(3) for s in range(3)} - skip
    assert len(of_rollout(server)) == 7 and all(sample.ids == plain[p][s].ids for p, s, sample in told)
    server.seen.clear()
    assert engine.generate([]) == [] and not server.seen


@pytest.mark.parametrize("change, says", [({"use_dora": True}, "dora"), ({"init_lora_weights": "pissa"}, "pissa"),
                                          ({"modules_to_save": ["lm_head"]}, "modules_to_save")])
def test_adapters_that_vllm_cannot_serve_are_refused_at_the_start(opened, trained, change, says):
    for name, value in change.items():
        setattr(trained.model.peft_config["default"], name, value)
    with pytest.raises(UserError, match=f"cannot serve an adapter of.*{says}"):
        opened()


def test_a_model_without_an_adapter_is_served_as_the_base(opened, server, folder):
    opened(policy_of(folder)).generate([[5, 6]])
    assert not any("lora" in path for path, _, _ in server.seen)
    assert {body["model"] for body in asked(server)} == {server.name}


# ---- this process


def test_vllm_in_this_process_gives_the_same_completions(module, opened, trained):
    prompts, told = prompts_of(trained.tokenizer), []
    for url in ({"vllm_url": ""}, {}):
        told.append(all_facts(opened(eos=[17], top_p=0.9, **url).generate(prompts, SAMPLES)))
    assert told[0] == told[1]
    params = module.calls[-1][2]
    assert [p.seed for p in params] == [stream_seed(5, p, s) for p in range(3) for s in range(3)]
    for p in params:
        assert (p.n, p.max_tokens, p.stop_token_ids, p.ignore_eos, p.logprobs) == (1, 12, [17], True, 0)
        assert (p.temperature, p.top_p, p.min_p, p.top_k) == (0.7, 0.9, 0.0, -1)


def test_vllm_in_this_process_is_started_for_the_model_that_trains(module, opened, folder):
    torch.manual_seed(3)
    random.seed(3)
    wanted = torch.rand(3).tolist(), random.random()
    torch.manual_seed(3)
    random.seed(3)
    opened(vllm_url="")
    assert (torch.rand(3).tolist(), random.random()) == wanted  # the run's random streams go on
    assert module.options == {
        "model": folder, "trust_remote_code": False, "seed": 5, "dtype": "float32", "max_model_len": 128,
        "gpu_memory_utilization": 0.3, "enable_sleep_mode": torch.cuda.is_available(),
        "logprobs_mode": "processed_logprobs", "generation_config": "vllm",
        "enable_lora": True, "max_loras": 1, "max_lora_rank": 8}


def test_vllm_in_this_process_sleeps_between_rollouts(module, opened, trained):
    engine, folders = opened(vllm_url=""), []
    engine.backend.sleeps = True  # as with a GPU
    for step in range(2):
        wake_adapter(trained.model, seed=step)
        engine.generate([[5, 6]])
        folders.append(engine.folder / engine.adapter)
        engine.backend.sleep()  # already
    moves = [call[:2] for call in module.calls]
    assert moves == [("generate", 1), ("generate", 1), ("sleep", 1),
                     ("wake",), ("remove", 1), ("generate", 2), ("generate", 2), ("sleep", 1)]
    assert [folder.exists() for folder in folders] == [False, True]
    engine.close()
    assert not folders[1].exists() and engine.backend.llm is None


def test_faults_of_vllm_in_this_process_are_one_line(module, opened, trained, monkeypatch):
    engine = opened(vllm_url="", max_new_tokens=2)
    monkeypatch.setattr(engine, "swap", lambda: None)
    module.alter = lambda output: output.outputs.append(output.outputs[0])
    with pytest.raises(UserError, match="another number of completions"):
        engine.generate([[5, 6]])
    module.alter = lambda output: output.outputs[0].logprobs.pop()
    with pytest.raises(UserError, match="1 log-probs for 2 tokens"):
        engine.generate([[5, 6]])
    monkeypatch.setattr(engine.backend.llm, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="cannot sample .division by zero"):
        engine.generate([[5, 6]])
    module.error = RuntimeError("Free memory on device is less than desired\nTraceback")
    with pytest.raises(UserError, match="Free memory .*vllm_gpu_share= .now 0.3") as caught:
        opened(vllm_url="")
    assert "\n" not in str(caught.value)
    trained.model.peft_config["default"].r = 1024
    with pytest.raises(UserError, match="rank 1024, above lora_r=512"):
        opened(vllm_url="")


@pytest.mark.parametrize("package, options, says", [
    ("vllm", {"vllm_url": ""}, "pip install vllm .*vllm_url="), ("openai", {}, r"pip install -e '.\[judge\]'")])
def test_a_missing_package_is_said_with_what_to_install(opened, monkeypatch, package, options, says):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with pytest.raises(UserError, match=says):
        opened(**options)


def test_importing_the_engines_imports_neither_vllm_nor_openai(tmp_path):
    for name in ("vllm", "openai"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import minimath.rollout.open
assert "minimath.rollout.vllm_client" in sys.modules and not {{"vllm", "openai"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---- the real thing


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_the_real_vllm_samples_with_the_adapter_that_trains(tiny_tokenizer, tmp_path):
    """In this process. Heads of 64, which its CPU kernels ask for."""
    made = AutoConfig.for_model("llama", vocab_size=len(tiny_tokenizer), hidden_size=128, intermediate_size=128,
                                num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=64,
                                max_position_embeddings=512, initializer_range=0.2, bos_token_id=None,
                                eos_token_id=tiny_tokenizer.eos_token_id)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    for part in (base, tiny_tokenizer):
        part.save_pretrained(tmp_path / "model")
    policy = policy_with(get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")),
                         tiny_tokenizer)
    policy.options.name = str(tmp_path / "model")
    engine = VLLMEngine(EngineOptions(vllm_gpu_share=0.3), SamplingOptions(max_new_tokens=12, temperature=0.7), policy,
                        seed=5, run_dir=tmp_path)
    prompts, told, engine.eos = prompts_of(tiny_tokenizer), [], [17]
    for step in range(2):
        wake_adapter(policy.model, seed=step)
        told.append(engine.generate(prompts, SAMPLES))
        for prompt, group in zip(prompts, told[-1], strict=True):
            for sample in group:
                assert logp_difference(policy.model, prompt, sample, 0.7) < 1e-3
        [alone] = engine.generate(prompts[1:2], SAMPLES, [1])
        assert [c.ids for c in alone] == [c.ids for c in told[-1][1]]
    assert all_facts(told[0]) != all_facts(told[1])
    engine.close()
