"""Rollouts by vLLM: against a server that speaks its protocol, a module in its place, and, where installed, vLLM."""

import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_vllm import OPTIONS, asked, prompts_of
from peft import LoraConfig, get_peft_model
from toy import load, wake_adapter
from transformers import AutoConfig, AutoModelForCausalLM

from minimath.core.errors import UserError
from minimath.rollout.transformers_engine import generate_hf, logp_difference
from minimath.rollout.vllm import generate_vllm, open_vllm
from minimath.rollout.sampling import stream_seed

pytest_plugins = ["vllm_fixtures"]


# ---- a server


def test_completions_come_back_in_order_with_a_stable_seed_each(server, opened, trained):
    model, tokenizer = trained
    vllm, prompts = opened(), prompts_of(trained[1])
    vllm.swap(model, 0)
    server.delay_s, server.seen[:] = 0.05, []
    groups = generate_vllm(vllm, tokenizer, prompts, eos=[17], keys=[40, 41, 42], **OPTIONS)
    bodies = {(tuple(b["prompt"]), b["seed"]): b for b in asked(server)}
    assert bodies.keys() == {(tuple(prompts[p]), stream_seed(5, 40 + p, s)) for p in range(3) for s in range(3)}
    assert len({b["seed"] for b in bodies.values()}) == 9
    for p, group in enumerate(groups):
        for s, completion in enumerate(group):
            [[wanted]] = generate_hf(model, tokenizer, [prompts[p]], max_new_tokens=12, temperature=0.7, eos=[17],
                                     seed=stream_seed(5, 40 + p, s))  # fmt: skip
            assert (completion.ids, completion.ended) == (wanted.ids, wanted.ended)
    server.seen.clear()
    assert generate_vllm(vllm, tokenizer, prompts, eos=[17], keys=[40, 41, 42], slots=2, **OPTIONS) == groups
    assert {(tuple(b["prompt"]), b["seed"]) for b in asked(server)} == bodies.keys()


def test_requests_leave_no_setting_to_the_server(server, opened, trained):
    vllm = opened(top_p=0.9)
    server.seen.clear()
    vllm.generate([[5, 6, 7]], max_new_tokens=9, temperature=0.5, top_p=0.9, min_p=0.1, top_k=0, eos=[17, 2])
    [body] = asked(server)
    assert body["prompt"] == [5, 6, 7] and body["stop_token_ids"] == [17, 2] and body["ignore_eos"] is True
    assert (body["temperature"], body["top_p"], body["min_p"], body["top_k"]) == (0.5, 0.9, 0.1, -1)
    assert body["repetition_penalty"] == 1.0 and body["presence_penalty"] == body["frequency_penalty"] == 0.0
    assert body["logprobs"] == 0 and body["return_token_ids"] is True and body["max_tokens"] == 9


def test_logps_are_those_of_the_training_forward(opened, trained):
    model, tokenizer = trained
    vllm = opened()
    vllm.swap(model, 0)
    for temperature in (0.7, 1.0, 0.0):
        groups = vllm.generate(prompts_of(tokenizer), **OPTIONS | {"temperature": temperature}, eos=[])
        for prompt, group in zip(prompts_of(tokenizer), groups, strict=True):
            for completion in group:
                assert completion.full_logp is None
                assert logp_difference(model, prompt, completion, temperature) < 1e-4


def test_an_end_token_ends_and_the_limit_truncates(opened, trained):
    vllm, prompt = opened(), prompts_of(trained[1])[0]
    [free] = vllm.generate([prompt], samples=4, max_new_tokens=12, eos=[], seed=1)
    assert all(len(c.ids) == 12 and not c.ended for c in free)
    stop = [free[0].ids[4]]
    [cut] = vllm.generate([prompt], samples=4, max_new_tokens=12, eos=stop, seed=1)
    for whole, completion in zip(free, cut, strict=True):
        assert completion.ended == (stop[0] in whole.ids)
        n = whole.ids.index(stop[0]) + 1 if completion.ended else 12
        assert completion.ids == whole.ids[:n] and len(completion.logp) == n


def test_each_swap_loads_the_new_adapter_then_unloads_the_old(server, opened, trained, tmp_path):
    model, tokenizer = trained
    vllm, prompts, told = opened(), prompts_of(tokenizer), []
    for step in range(3):
        wake_adapter(model, seed=step)
        vllm.swap(model, step)
        told.append(vllm.generate(prompts, eos=[], **OPTIONS))
    assert told[0] != told[1] != told[2]
    moves = [(path.split("/")[-1][:4], body["lora_name"]) for path, body, _ in server.seen if "lora" in path]
    names = [name for move, name in moves if move == "load"]
    assert moves == [("load", names[0]), ("load", names[1]), ("unlo", names[0]), ("load", names[2]), ("unlo", names[1])]
    assert len(set(names)) == 3 and list(server.adapters) == [names[2]]
    paths = [Path(body["lora_path"]) for body in asked(server, "/v1/load_lora_adapter")]
    assert all(path.is_absolute() for path in paths) and [path.is_dir() for path in paths] == [False, False, True]
    used = [body["model"] for body in asked(server)]
    assert used == [server.name] + [name for name in names for _ in range(10)]  # a probe, then swap's look and nine
    vllm.close()
    assert not server.adapters and not paths[2].exists() and not paths[2].parent.exists()


def test_a_folder_that_both_see_can_be_named(server, opened, trained, tmp_path):
    vllm = opened(vllm_adapter_dir=str(tmp_path / "shared"))
    vllm.swap(trained[0], 7)
    [body] = asked(server, "/v1/load_lora_adapter")
    assert Path(body["lora_path"]).is_relative_to(tmp_path / "shared") and "step-7" in body["lora_name"]


@pytest.mark.parametrize("how", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_a_server_of_raw_logprobs_is_found_out_at_the_start(server, opened, how):
    server.processed = False
    with pytest.raises(UserError, match="--logprobs-mode processed_logprobs"):
        opened(**{"temperature": 1.0, **how})


def test_raw_logprobs_will_do_where_nothing_changes_them(server, opened, trained):
    server.processed = False
    vllm = opened(temperature=1.0)
    vllm.swap(trained[0], 0)
    vllm.generate([[5, 6]], max_new_tokens=4, eos=[])
    vllm.generate([[5, 6]], max_new_tokens=4, temperature=0.0, eos=[])
    with pytest.raises(UserError, match="processed_logprobs"):
        vllm.generate([[5, 6]], max_new_tokens=4, temperature=0.5, eos=[])


def test_a_server_that_does_not_apply_the_adapter_is_noticed(server, opened, trained):
    vllm, server.applies = opened(), False
    with pytest.raises(UserError, match="away from this model's: the server .* does not apply the adapter"):
        vllm.swap(trained[0], 3)


def test_what_is_done_is_not_asked_for_again(server, opened, trained):
    vllm, told, prompts = opened(), {}, prompts_of(trained[1])
    plain = vllm.generate(prompts, eos=[], **OPTIONS)
    server.seen.clear()
    done = {(0, 1): plain[0][1], (2, 2): plain[2][2]}
    again = vllm.generate(prompts, eos=[], done=done, on_done=lambda p, s, c: told.update({(p, s): c}), **OPTIONS)
    assert again == plain and len(asked(server)) == 7 and again[0][1] is plain[0][1]
    assert told.keys() == {(p, s) for p in range(3) for s in range(3)} - done.keys()
    assert vllm.generate([], max_new_tokens=4, eos=[]) == []


@pytest.mark.parametrize("change, says", [({"use_dora": True}, "dora"), ({"init_lora_weights": "pissa"}, "pissa"),
                                          ({"modules_to_save": ["lm_head"]}, "whole modules")])  # fmt: skip
def test_adapters_that_vllm_cannot_serve_are_refused_at_the_start(config, trained, tmp_path, change, says):
    for name, value in change.items():
        setattr(trained[0].peft_config["default"], name, value)
    with pytest.raises(UserError, match=f"cannot serve an adapter with.*{says}"):
        open_vllm(config(), *trained, tmp_path)


def test_a_model_without_an_adapter_is_served_as_the_base(config, server, folder, tiny_tokenizer, tmp_path):
    model, tokenizer = load(folder)
    vllm = open_vllm(config(), model, tokenizer, tmp_path)
    vllm.swap(model, 0)
    assert not any("lora" in path for path, _, _ in server.seen)
    assert {body["model"] for body in asked(server)} == {server.name}
    vllm.close()


# ---- this process


def test_vllm_in_this_process_gives_the_same_completions(module, opened, trained):
    model, tokenizer = trained
    here, there, prompts = opened(vllm_url=""), opened(), prompts_of(tokenizer)
    for vllm in (here, there):
        vllm.swap(model, 0)
    options = {**OPTIONS, "eos": [17], "top_p": 0.9}
    assert here.generate(prompts, **options) == there.generate(prompts, **options)
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
        "model": folder, "trust_remote_code": False, "seed": 0, "dtype": "float32", "max_model_len": 128,
        "gpu_memory_utilization": 0.3, "enable_sleep_mode": torch.cuda.is_available(),
        "logprobs_mode": "processed_logprobs", "generation_config": "vllm",
        "enable_lora": True, "max_loras": 1, "max_lora_rank": 8}  # fmt: skip


def test_vllm_in_this_process_sleeps_through_the_update(module, opened, trained):
    model, _ = trained
    vllm, folders = opened(vllm_url=""), []
    vllm.backend.sleeps = True  # as with a GPU
    for step in range(2):
        wake_adapter(model, seed=step)
        vllm.swap(model, step)
        folders.append(vllm.folder / vllm.adapter)
        vllm.generate([[5, 6]], max_new_tokens=3, eos=[])
        vllm.sleep()
        vllm.sleep()  # already
    moves = [call[:2] for call in module.calls]
    assert moves == [("generate", 1), ("generate", 1), ("sleep", 1),
                     ("wake",), ("remove", 1), ("generate", 2), ("generate", 2), ("sleep", 1)]  # fmt: skip
    assert [folder.exists() for folder in folders] == [False, True]
    vllm.close()
    assert not folders[1].exists() and vllm.backend.llm is None


def test_faults_of_vllm_in_this_process_are_one_line(module, opened, config, trained, tmp_path, monkeypatch):
    vllm = opened(vllm_url="")
    module.alter = lambda output: output.outputs.append(output.outputs[0])
    with pytest.raises(UserError, match="another number of completions"):
        vllm.generate([[5, 6]], max_new_tokens=2, eos=[])
    module.alter = lambda output: output.outputs[0].logprobs.pop()
    with pytest.raises(UserError, match="1 log-probs for 2 tokens"):
        vllm.generate([[5, 6]], max_new_tokens=2, eos=[])
    monkeypatch.setattr(vllm.backend.llm, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="cannot sample .division by zero"):
        vllm.generate([[5, 6]], max_new_tokens=2, eos=[])
    module.error = RuntimeError("Free memory on device is less than desired\nTraceback")
    with pytest.raises(UserError, match="Free memory .*vllm_gpu_share= .now 0.3") as caught:
        opened(vllm_url="")
    assert "\n" not in str(caught.value)
    trained[0].peft_config["default"].r = 1024
    with pytest.raises(UserError, match="rank 512 at most, not 1024"):
        opened(vllm_url="")


def test_a_missing_vllm_is_said_with_what_to_install(config, trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with pytest.raises(UserError, match="pip install vllm .*vllm_url="):
        open_vllm(config(vllm_url=""), *trained, tmp_path)


def test_importing_minimath_never_imports_vllm(tmp_path):
    (tmp_path / "vllm.py").write_text("raise SystemExit('vllm was imported')")
    code = f"""
import importlib, pkgutil, sys
import minimath
sys.path.insert(0, {str(tmp_path)!r})
for module in pkgutil.iter_modules(minimath.__path__, "minimath."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert "minimath.rollout.vllm" in sys.modules and "vllm" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=tmp_path)


# ---- the real thing


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_the_real_vllm_samples_with_the_adapter_that_trains(config, tiny_tokenizer, tmp_path):
    """In this process. Heads of 64, which its CPU kernels ask for."""
    made = AutoConfig.for_model("llama", vocab_size=len(tiny_tokenizer), hidden_size=128, intermediate_size=128,
                                num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=64,
                                max_position_embeddings=512, initializer_range=0.2, bos_token_id=None,
                                eos_token_id=tiny_tokenizer.eos_token_id)  # fmt: skip
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    for part in (base, tiny_tokenizer):
        part.save_pretrained(tmp_path / "model")
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    vllm = open_vllm(config(vllm_url="", model=str(tmp_path / "model")), model, tiny_tokenizer, tmp_path)
    prompts, told = prompts_of(tiny_tokenizer), []
    for step in range(2):
        wake_adapter(model, seed=step)
        vllm.swap(model, step)
        told.append(vllm.generate(prompts, eos=[17], **OPTIONS))
        for prompt, group in zip(prompts, told[-1], strict=True):
            for completion in group:
                assert logp_difference(model, prompt, completion, 0.7) < 1e-3
        [alone] = vllm.generate(prompts[1:2], keys=[1], eos=[17], **OPTIONS)
        assert [c.ids for c in alone] == [c.ids for c in told[-1][1]]
        vllm.sleep()
    assert told[0] != told[1]
    vllm.close()
