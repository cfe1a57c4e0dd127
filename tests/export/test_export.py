"""minimath export: the merged model is the live adapter, or it is not written. GGUF: test_gguf_file.py."""
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from awake import PLAIN, SMALL, awake_run, in_bf16, live, texts_of
from tiny import tiny_model
from toy import write_problems
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from minimath.config.schema import EvalConfig, SFTConfig
from minimath.core.errors import UserError
from minimath.export import merge as module
from minimath.export.drift import compare, completion_logits, drift_texts
from minimath.export.merge import export, merge, round_to
from minimath.models.load import load_model
from minimath.models.policy import load_policy


@pytest.fixture(scope="module")
def run(tiny_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    data = write_problems(folder / "problems.jsonl", n=4)
    return awake_run(folder / "run", tiny_dir, data=str(data))


# ---- merge

@pytest.mark.parametrize("family, options", [
    ("llama", {}), ("qwen2", {}), ("llama", {"rslora": True}), ("llama", {"dora": True}), ("qwen2", {"dora": True}),
    ("llama", {"lora_init": "pissa"}), ("phi3", {"lora_targets": "qkv_proj,down_proj"}),
])  # fmt: skip
def test_the_merged_model_gives_the_logits_of_the_live_adapter(tmp_path, family, options):
    run = awake_run(tmp_path / "run", tiny_model(tmp_path / "base", family), **options)
    model, tokenizer = live(run)
    texts = texts_of(tokenizer)
    want = completion_logits(model, texts)
    base = completion_logits(load_model(SFTConfig(model=str(tmp_path / "base"), device="cpu", dtype="fp32"),
                                        train=False)[0], texts)
    merged = merge(model)
    assert not any("lora" in name for name, _ in merged.named_modules())
    got = completion_logits(merged, texts)
    for w, g, b in zip(want, got, base):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)
        assert (w - b).abs().max() > 0.1  # the adapter is awake
    assert compare(want, got).kl < 1e-9 and compare(want, got).agreement == 1


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, {"dora": True}])
def test_weights_are_rounded_once_and_are_no_further_off_than_those_of_pefts_own_merge(tmp_path, tiny_dir, options,
                                                                                    compute):
    base = in_bf16(tmp_path / "base", tiny_dir)
    run = awake_run(tmp_path / "run", base, **options)
    exact = merge(live(run, dtype="fp32")[0]).state_dict()
    ours = merge(live(run, dtype=compute)[0])
    round_to(ours, torch.bfloat16)
    theirs = live(run, dtype="bf16")[0].merge_and_unload(safe_merge=True)
    off, off_theirs = 0.0, 0.0
    for name, weight in ours.state_dict().items():
        if not options:
            assert torch.equal(weight.float(), exact[name].bfloat16().float()), name  # the nearest bf16, exactly
        off += float((weight.float() - exact[name]).square().sum())
        off_theirs += float((theirs.state_dict()[name].float() - exact[name]).square().sum())
    assert 0 < off <= off_theirs and (off < off_theirs or options)  # peft rounds a plain delta, then the sum


# ---- the command

def test_the_folder_is_the_model_with_its_tokenizer_and_the_dtype_of_the_base(tmp_path, tiny_dir, here, monkeypatch):
    base = in_bf16(tmp_path / "base", tiny_dir)
    write_problems(tmp_path / "problems.jsonl", n=4)
    monkeypatch.setenv("HOME", str(tmp_path))
    run = awake_run(tmp_path / "runs" / "sft", base, data="~/problems.jsonl", system="Be brief.")
    status, out, err = here("export", f"adapter={run}", "out=new", *SMALL)
    assert status == 0, err
    assert "on 2 problems of problems.jsonl: mean KL" in out
    folder = tmp_path / "new"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and AutoConfig.from_pretrained(folder).use_cache
    assert AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(base).chat_template
    wanted, tokenizer = live(run)
    assert compare(completion_logits(wanted, texts_of(tokenizer)),
                   completion_logits(model.float(), texts_of(tokenizer))).kl < 1e-3
    assert "minimath solve \"PROBLEM\" model=new 'system=Be brief.'" in out
    assert not list(tmp_path.glob(".tmp*"))


def test_the_end_that_was_trained_is_an_end_of_the_exported_model(tmp_path):
    """A base model's generation config knows other ends than that of the template which the run trained."""
    base = tiny_model(tmp_path / "base")
    options = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(options | {"eos_token_id": 0, "temperature": 0.6}))
    export([f"adapter={awake_run(tmp_path / 'run', base)}", f"out={tmp_path / 'new'}", *SMALL])
    options = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    end = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("<|im_end|>")
    assert options["eos_token_id"] == [end, 0] and options["temperature"] == 0.6 and options["do_sample"]


def test_above_max_drift_nothing_is_written(run, tmp_path, tiny_dir, here):
    coarse = in_bf16(tmp_path / "base", tiny_dir)
    status, _, err = here("export", f"adapter={run}", f"model={coarse}", "out=new", "max_drift=1e-12", *SMALL)
    assert status == 2 and "above max_drift=1e-12, nothing was written" in err
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".tmp*"))


def test_weights_that_are_no_numbers_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "round_to", lambda model, dtype: model.lm_head.weight.data.fill_(float("nan")))
    with pytest.raises(UserError, match="nothing was written"):
        export([f"adapter={run}", f"out={tmp_path / 'new'}", *SMALL])
    assert not (tmp_path / "new").exists()


def test_an_adapter_that_is_no_number_is_refused(tmp_path, tiny_dir):
    run = awake_run(tmp_path / "run", tiny_dir, size=float("inf"))
    with pytest.raises(UserError, match="nothing was written"):
        export([f"adapter={run}", f"out={tmp_path / 'new'}", *SMALL])
    assert not (tmp_path / "new").exists()


def test_a_write_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "flush_to_disk", full)  # when all is written
    with pytest.raises(UserError, match="No space left on device.*bytes are free"):
        export([f"adapter={run}", f"out={tmp_path / 'new'}", *SMALL])
    assert not list(tmp_path.iterdir())


def test_a_sigterm_while_it_writes_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "flush_to_disk", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit, match="143"):
            export([f"adapter={run}", f"out={tmp_path / 'new'}", *SMALL])
        assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_folder_is_written_in_a_thread_too(tmp_path):
    def write():
        with module.new_folder(tmp_path / "new") as partial:
            (partial / "file").write_text("x")

    with ThreadPoolExecutor(1) as pool:
        pool.submit(write).result()
    assert (tmp_path / "new" / "file").read_text() == "x"


@pytest.mark.parametrize("words, said", [
    ([], "adapter=runs/x out=FOLDER"),
    (["adapter=", "out=new"], "adapter=runs/x out=FOLDER"),
    (["out=new", "to=onnx"], "to must be one of safetensors, gguf"),
    (["out=new", "gguf_type=q4_k"], "f16, bf16, q8_0"),
    (["out=new", "drift_tokens=0"], "drift_tokens must be above 0"),
    (["out=."], "not an empty folder"),
    (["out=link"], "link exists already"),
    (["out=mine.txt/new"], "mine.txt is no folder"),
    (["out=new", "quant=nf4"], "unknown key 'quant'"),
])  # fmt: skip
def test_what_cannot_work_is_told_before_anything_loads(run, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(module, "load_policy", lambda *_a, **_k: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=said):
        export([f"adapter={run}", *words])
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", "link"}


@pytest.fixture(scope="module")
def run_on_4_bit(tiny_dir, tmp_path_factory) -> Path:
    pytest.importorskip("bitsandbytes")
    run = awake_run(tmp_path_factory.mktemp("nf4") / "run", tiny_dir)
    options = yaml.safe_load((run / "config.yaml").read_text()) | {"quant": "nf4"}
    (run / "config.yaml").write_text(yaml.safe_dump(options))
    return run


def test_a_run_on_4_bit_weights_is_merged_into_the_16_bit_base_and_held_against_the_4_bit_model(run_on_4_bit, tmp_path,
                                                                                              capsys):
    made = export([f"adapter={run_on_4_bit}", f"out={tmp_path / 'new'}", "max_drift=1", *SMALL])
    assert "drift, 4-bit model in training to merged float32" in capsys.readouterr().out
    merged = merge(live(run_on_4_bit, quant="none")[0])
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "new").state_dict().items():
        torch.testing.assert_close(weight, merged.state_dict()[name])
    # the figure is that of the 4-bit model: measured here on its own, on the same problems
    cfg = EvalConfig(model=yaml.safe_load((run_on_4_bit / "config.yaml").read_text())["model"], device="cpu",
                     dtype="fp32", adapter=str(run_on_4_bit), prompt_template=PLAIN, quant="nf4", temperature=0.0,
                     max_new_tokens=6)
    policy = load_policy(cfg, train=False)
    texts, _ = drift_texts(policy, cfg, 2)
    want = compare(completion_logits(policy.model, texts), completion_logits(merged, texts))
    assert made["drift"]["kl"] == pytest.approx(want.kl, rel=1e-3) and want.kl > 1e-3


def test_a_merge_too_far_from_the_4_bit_model_is_refused(run_on_4_bit, tmp_path, capsys):
    """The 16-bit adapter alone would pass: rounding to fp32 moves nothing."""
    words = [f"adapter={run_on_4_bit}", f"out={tmp_path / 'new'}", "max_drift=1e-3", *SMALL]
    with pytest.raises(UserError, match="max_drift=0.001, nothing was written.*4-bit.*quant=none"):
        export(words)
    assert not list(tmp_path.iterdir())
    options = yaml.safe_load((run_on_4_bit / "config.yaml").read_text())
    try:
        (run_on_4_bit / "config.yaml").write_text(yaml.safe_dump(options | {"quant": "none"}))
        assert export(words)["drift"]["kl"] < 1e-6
    finally:
        (run_on_4_bit / "config.yaml").write_text(yaml.safe_dump(options))


@pytest.mark.parametrize("to, kept", [("safetensors", "model.safetensors"), ("gguf", "It-s-mine-v2-f16.gguf")])
def test_every_line_it_prints_runs_when_pasted_also_for_a_folder_with_blanks_and_quotes(tmp_path, tiny_dir, here, to,
                                                                                      kept):
    run = awake_run(tmp_path / "run", tiny_dir, system='Say "it\'s $HOME".')
    status, out, err = here("export", f"adapter={run}", "out=my models/It's {mine} v2", f"to={to}", *SMALL)
    assert status == 0, err
    folder = tmp_path / "my models" / "It's {mine} v2"
    assert (folder / kept).is_file()
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("hf", "minimath", "ollama", "llama-server"):  # each writes down where it ran, with which words
        (programs / name).write_text(f"#!{sys.executable}\nimport json, os, sys\n"
                                     f"with open({str(tmp_path / 'said')!r}, 'a') as file:\n"
                                     f"    print(json.dumps([{name!r}, os.getcwd(), *sys.argv[1:]]), file=file)\n")
        (programs / name).chmod(0o755)
    lines = out.partition("to share or use it:\n")[2]
    subprocess.run(["bash", "-euc", lines], check=True, cwd=tmp_path, env=os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"})
    hub, *said = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
    assert hub == ["hf", str(tmp_path), "upload", "OWNER/NAME", "my models/It's {mine} v2", "--private"]
    if to == "safetensors":
        assert said == [["minimath", str(tmp_path), "solve", "PROBLEM", "model=my models/It's {mine} v2",
                         'system=Say "it\'s $HOME".', "prompt_template={problem}"]]
    else:
        assert said == [["llama-server", str(tmp_path), "-m", f"my models/It's {{mine}} v2/{kept}"],
                        ["ollama", str(folder), "create", "It-s-mine-v2", "-f", "Modelfile"],
                        ["ollama", str(folder), "run", "It-s-mine-v2", "PROBLEM"]]
        assert (folder / "Modelfile").read_text().startswith(f"FROM ./{kept}\n")


def test_code_of_a_model_is_not_run_because_a_run_folder_says_so(run, tmp_path):
    other = tmp_path / "run"
    other.mkdir()
    options = {"lora_r": 4, "model": "m", "trust_remote_code": True, "system": 3}
    (other / "config.yaml").write_text(yaml.safe_dump(options))
    assert module.run_options(other) == {"lora_r": 4, "model": "m"}
