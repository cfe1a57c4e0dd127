"""Merge an adapter into its base and write a model that other programs run."""
import contextlib
import copy
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import sys
import warnings
from pathlib import Path
from typing import Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from transformers import AutoConfig

from minimath.config.load import load_config
from minimath.config.options import Stage
from minimath.config.schema import AdapterPath, Count, EvalConfig
from minimath.config.trained import PROMPT, base_of, run_options
from minimath.core.errors import UserError
from minimath.core.files import flush_to_disk, free_bytes
from minimath.core.run_folder import find_adapter
from minimath.data.template import chat_args, template_as_asked
from minimath.export.drift import Drift, compare, completion_logits, drift_texts
from minimath.export.modelfile import modelfile
from minimath.models.load import describe
from minimath.models.policy import Policy, load_policy


class ExportConfig(Stage):
    """Merge an adapter into its base and write a model that other programs run.

    An adapter trained on 4-bit weights is merged into the 16-bit base. W + delta is computed in fp32 and rounded once,
    to the base's dtype or to gguf_type. How far that is from the model that was trained, 4-bit weights included, is
    measured before anything is written, on completions of the run's own problems."""
    adapter: AdapterPath
    model: str = ""
    """base model, a folder or a hub id; empty: the one that the run or the adapter names"""
    out: str = ""
    """new folder for the model"""
    to: Literal["safetensors", "gguf"] = "safetensors"
    """safetensors (a folder for transformers, vLLM, ...) or gguf (a file for llama.cpp, and a Modelfile for Ollama)"""
    gguf_type: Literal["f16", "bf16", "q8_0"] = "f16"
    """type of the matrices with to=gguf; q8_0 has half the size, and llama.cpp then rounds activations too"""
    # Mean KL on SmolLM2-135M after 10 steps of the demo's SFT: f16 8e-7, bf16 1e-4, the arithmetic of bf16 alone 6e-4,
    # q8_0 1e-3; and what must not go out: 5 bit 0.07, half the adapter's scale 0.15, 4 bit 0.2, no adapter 0.83.
    max_drift: float = 0.01
    """nothing is written when the mean KL from the trained to the merged model, in nats a token, is above this"""
    drift_problems: Count = 16
    """problems on which the drift is measured: the run's own where they are found, else made ones"""
    drift_tokens: Count = 48
    """longest completion of each, in tokens"""
    device: str = "auto"
    """where merge and measurement run: auto, cpu, cuda, cuda:N or mps"""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """of merge and measurement; bf16 and fp16 take half the memory, and the drift then holds their noise"""
    trust_remote_code: bool = False
    """run Python code that ships with the model; only for models you trust"""

    def check(self) -> str:
        """What would fail only after the work, or ""."""
        out = Path(self.out)
        if not self.adapter.path or not self.out:
            return "minimath export needs the run and a new folder: minimath export adapter=runs/x out=FOLDER"
        if os.path.lexists(out) and (out.is_symlink() or not out.is_dir() or any(out.iterdir())):
            return f"{out} exists already and is not an empty folder; choose another out="
        place = next(path for path in out.absolute().parents if os.path.lexists(path))
        if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
            return f"{place} is no folder that can be written to; choose another out="
        if self.to == "gguf" and importlib.util.find_spec("gguf") is None:
            return "to=gguf needs the package gguf: pip install -e '.[demo]', or use to=safetensors"
        return ""


def export(words: list[str]) -> dict:
    """Run the command; returns {"folder": path, "drift": {...}}. UserError: no folder."""
    cfg = load_config(ExportConfig, None, words, "export")
    folder = find_adapter(cfg.adapter.path)
    run, base = run_options(folder), cfg.model or base_of(folder)
    if not base:
        raise UserError(f"{folder} does not say which base it was trained on; add model=FOLDER or a hub id")
    load = EvalConfig(**{key: run[key] for key in (*PROMPT, "data", "split") if key in run},
                      model=base, adapter=str(folder), device=cfg.device, dtype=cfg.dtype, temperature=0.0,
                      max_new_tokens=cfg.drift_tokens, trust_remote_code=cfg.trust_remote_code,
                      attn="eager" if run.get("attn") == "eager" else "sdpa")  # a GPU's may be missing here
    try:
        policy, drift = merge_and_measure(cfg, load, "nf4" if run.get("quant") == "nf4" else "none")
    except torch.OutOfMemoryError:
        raise UserError(f"device={cfg.device} lacks the memory; use device=cpu, or dtype=bf16 for half of it") from None
    out = Path(cfg.out).absolute()
    with new_folder(out) as partial:
        write_model(policy, partial, cfg)
    files = sorted(out.iterdir())
    size = sum(path.stat().st_size for path in files)
    print(f"{cfg.out}: {', '.join(path.name for path in files)} ({size / 1e6:.0f} MB)\n"
          f"to share or use it:\nhf upload OWNER/NAME {shlex.quote(cfg.out)} --private\n{usage(cfg, policy)}")
    return {"folder": cfg.out, "drift": drift._asdict()}


def merge_and_measure(cfg: ExportConfig, load: EvalConfig, quant: str) -> tuple[Policy, Drift]:
    """Load what was trained on `quant` weights, merge it, measure and say the drift.

    Raises UserError above max_drift."""
    policy = load_policy(in_training := load.replace(quant=quant), train=False)
    print(f"{describe(policy.model, in_training)}, adapter {load.adapter.path}")
    if cfg.to == "gguf":
        from minimath.export.gguf import reason_against, round_as_gguf  # needs the extra
        if why_not := reason_against(policy.model.config, policy.tokenizer):
            raise UserError(f"to=gguf: {why_not}. Use to=safetensors, then on its folder llama.cpp's "
                            f"`python convert_hf_to_gguf.py FOLDER --outtype {cfg.gguf_type}`")
        modelfile(policy.tokenizer, "", policy.prompt)  # it may hold no such text: said before the work
    texts, source = drift_texts(policy, load, cfg.drift_problems)
    trained = completion_logits(policy.model, texts)
    if quant != "none":
        del policy  # its memory is for the base that it is merged into
        policy = load_policy(load, train=False)
    policy.model = merge(policy.model)
    if cfg.to == "gguf":
        kind = cfg.gguf_type
        round_as_gguf(policy.model, kind)
    else:
        config = AutoConfig.from_pretrained(load.model.name, trust_remote_code=load.model.trust_remote_code)
        dtype = config.dtype or torch.float32  # what the base's weights are saved in
        kind = str(dtype).removeprefix("torch.")
        round_to(policy.model, dtype)
    drift = compare(trained, completion_logits(policy.model, texts))
    before, why = "live adapter", "A rate that was too high makes weights that no 16-bit type holds"
    if quant != "none":
        before, why = "4-bit model in training", ("The base lacks the rounding of the 4-bit weights: evaluate the "
                                                  "adapter with quant=none")
    print(f"drift, {before} to merged {kind} weights, on {source}: mean KL {drift.kl:.2e} nats a token, greedy token "
          f"the same on {drift.agreement:.1%} of {drift.tokens} tokens")
    if not drift.kl <= cfg.max_drift:  # also nan
        raise UserError(f"the merged model is not the one that was trained: mean KL {drift.kl:.2e} is above max_drift="
                        f"{cfg.max_drift:g}, nothing was written. {why}. If its answers are good enough, raise "
                        "max_drift")
    if cfg.to == "safetensors":
        policy.model.to(dtype)
    return policy, drift


def merge(model):
    """Make the plain model of W + delta, added in fp32 whatever the model's dtype."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            base = layer.get_base_layer()
            dtype = base.weight.dtype
            base.float()
            layer.merge()  # peft's own, so rsLoRA, DoRA and biases are what they were in training
            base.to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A.* already merged|Already following adapters")
        return model.merge_and_unload()  # also takes over modules that were trained whole


def round_to(model, dtype: torch.dtype) -> None:
    """Round every weight to `dtype`; the model goes on computing in its own."""
    for weight in model.parameters():
        weight.data.copy_(weight.data.to(dtype))


@contextlib.contextmanager
def new_folder(out: Path):
    """Yield a hidden folder that becomes `out` when all is on the disk, or is removed."""
    partial = out.with_name(f".tmp-{os.getpid()}-{out.name}")
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(ValueError):  # not in the main thread: the caller handles signals
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.iterdir(), partial):
            flush_to_disk(path)
        os.replace(partial, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"out={out}: {error}; {free_bytes(out):,} bytes are free; choose another out=") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, before)


def file_name(cfg: ExportConfig) -> str:
    """Name the model as Ollama takes it: letters, digits, dots, dashes, underscores."""
    return re.sub(r"[^\w.-]+", "-", Path(cfg.out).absolute().name, flags=re.ASCII).strip("-.") or "model"


def usage(cfg: ExportConfig, policy: Policy) -> str:
    """Write the lines that a shell runs to use the model."""
    if cfg.to == "safetensors":
        prompt = policy.prompt
        words = [f"model={cfg.out}", f"system={prompt.system}", f"prompt_template={prompt.prompt_template}"]
        words += [f"thinking={prompt.thinking}"] if prompt.thinking != "auto" else []  # the rest is in the template
        return f'minimath solve "PROBLEM" {shlex.join(words)}'
    name, template = file_name(cfg), str(policy.tokenizer.chat_template)
    args = chat_args(policy.tokenizer, policy.prompt.thinking, policy.prompt.template_args)
    args = {key: value for key, value in args.items() if key in template and key != "date"}
    switches = f" --jinja --chat-template-kwargs {shlex.quote(json.dumps(args))}" if args else ""
    return (f"llama-server -m {shlex.quote(f'{cfg.out}/{name}-{cfg.gguf_type}.gguf')}{switches}   # llama.cpp alone\n"
            f"cd {shlex.quote(cfg.out)} && ollama create {name} -f Modelfile && ollama run {name} \"PROBLEM\"")


def write_model(policy: Policy, folder: Path, cfg: ExportConfig) -> None:
    """Write what transformers reads, or a GGUF file and a Modelfile; the template asks as the run did."""
    tokenizer, prompt = copy.copy(policy.tokenizer), policy.prompt
    tokenizer.chat_template = template_as_asked(tokenizer, prompt.thinking, prompt.template_args)
    if cfg.to == "gguf":
        from minimath.export.gguf import write_gguf  # needs the extra
        name = file_name(cfg)
        file = folder / f"{name}-{cfg.gguf_type}.gguf"
        write_gguf(policy.model, tokenizer, file, kind=cfg.gguf_type, name=name)
        (folder / "Modelfile").write_text(modelfile(policy.tokenizer, file.name, prompt), encoding="utf-8")
        return
    policy.model.config.use_cache = True  # load_model switches it off
    options = policy.model.generation_config
    options.eos_token_id = policy.eos  # to a base model the end that was trained is new
    try:
        options.validate(strict=True)
    except ValueError:
        options.do_sample = True  # a temperature without it: transformers reads such a file but does not save it
    policy.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
