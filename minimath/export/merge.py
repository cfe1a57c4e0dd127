"""Merge an adapter into its base and write a model that other programs run."""
import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import Literal

import torch
import yaml
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from transformers import AutoConfig

from minimath.config.load import load_config
from minimath.config.options import Stage, options_of
from minimath.config.schema import AdapterPath, Count, EvalConfig
from minimath.core.credentials import mask
from minimath.core.entry import run_command
from minimath.core.errors import UserError
from minimath.core.files import flush_to_disk, free_bytes, read_json
from minimath.core.run import keep_freed_memory
from minimath.core.run_folder import ADAPTER, CONFIG, EVAL, evaluation_folder, find_adapter
from minimath.data.chat import turn_end
from minimath.export.drift import compare, completion_logits, drift_texts, nf4_drift
from minimath.export.model_card import card
from minimath.models.load import base_causal_lm, describe
from minimath.models.policy import Policy, load_policy


class ExportConfig(Stage):
    """Merge an adapter into its base and write a model that other programs run.

    The base is the one that the run names, loaded without quantisation: an adapter trained on 4-bit weights is merged
    into the 16-bit ones. W + delta is computed in fp32 and rounded once, to the base's dtype or to gguf_type. What that
    changes is measured before anything is written: live adapter against rounded weights, on completions of the run's
    own problems. to=gguf writes one GGUF file and a Modelfile for Ollama.
    """
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
    """nothing is written when the mean KL from the live adapter to the merged model, in nats a token, is above this"""
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
    push: str = ""
    """owner/name of a private hub repository to upload the folder to; empty: nothing leaves this machine"""

    def check(self) -> str:
        """What would fail only after the work, or ""."""
        out = Path(self.out)
        if not self.adapter.path or not self.out:
            return "minimath export needs the run and a new folder: minimath export adapter=runs/x out=FOLDER"
        if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
            return f"{out} exists already and is not an empty folder; choose another out="
        if self.to == "gguf" and importlib.util.find_spec("gguf") is None:
            return "to=gguf needs the package gguf: pip install -e '.[demo]', or use to=safetensors"
        return fault_of_push(self.push) if self.push else ""


def export(words: list[str]) -> dict:
    """Run the command; returns {"folder": path, "drift": {...}}.

    Raises UserError, with nothing written unless it says so.
    """
    cfg = load_config(ExportConfig, None, words, "export")
    keep_freed_memory()
    folder = find_adapter(cfg.adapter.path)
    run, adapter = run_options(folder), read_json(folder / "adapter_config.json")
    base = cfg.model or run.get("model") or adapter.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{folder} does not say which base it was trained on; add model=FOLDER or a hub id")
    load = EvalConfig(**{key: run[key] for key in ("system", "prompt_template", "data", "split") if key in run},
                      model=base, adapter=str(folder), device=cfg.device, dtype=cfg.dtype, temperature=0.0,
                      max_new_tokens=cfg.drift_tokens, trust_remote_code=cfg.trust_remote_code,
                      attn="eager" if run.get("attn") == "eager" else "sdpa")  # a GPU's may be missing here
    try:
        policy, drift, script = merge_and_measure(cfg, load, nf4=run.get("quant") == "nf4")
    except torch.OutOfMemoryError:
        raise UserError(f"the merge does not fit into the memory of device={cfg.device}; use device=cpu, or dtype=bf16 "
                        "for half of it") from None
    out = Path(cfg.out)
    with new_folder(out) as partial:
        usage = write_model(policy, partial, cfg, base_dtype(load), script)
        made = folder.parent if folder.name == ADAPTER else Path(cfg.adapter.path)
        text = card(name=out.name, base=base, adapter=adapter, run=run, drift=drift["said"],
                    evaluation=evaluation_of(made), usage=usage.format(folder=out.name),
                    command="minimath export " + " ".join(map(public_word, words)))
        (partial / "README.md").write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))} ({size / 1e6:.0f} MB)\n"
          f"to use it:\n{usage.format(folder=shlex.quote(cfg.out))}")
    if cfg.push:
        push(out, cfg.push)
    return {"folder": str(out), "drift": {key: value for key, value in drift.items() if key != "said"}}


def merge_and_measure(cfg: ExportConfig, load: EvalConfig, *, nf4: bool) -> tuple[Policy, dict, Path | None]:
    """Load, merge, round and measure.

    Returns (the merged model, its drift with what is `said` of it, llama.cpp's script where that must write). nf4: the
    run trained on 4-bit weights. Raises UserError above max_drift.
    """
    policy, script = load_policy(load, train=False), None
    print(f"{describe(policy.model, load)}, adapter {load.adapter.path}")
    if cfg.to == "gguf":
        from minimath.export.gguf import find_writer, round_as_gguf  # needs the extra
        script = find_writer(base_causal_lm(policy.model).config, policy.tokenizer)
    texts, source = drift_texts(policy, load, cfg.drift_problems)
    live, dtype = completion_logits(policy.model, texts), base_dtype(load)
    policy.model = merge(policy.model)
    if cfg.to == "gguf":
        round_as_gguf(policy.model, cfg.gguf_type)
    else:
        round_to(policy.model, dtype)
    merged = completion_logits(policy.model, texts)
    drift = compare(live, merged)
    kind = cfg.gguf_type if cfg.to == "gguf" else str(dtype).removeprefix("torch.")
    said = [f"drift, live adapter to merged {kind} weights, on {source}: {drift}"]
    print(said[0])
    if not drift.kl <= cfg.max_drift:  # also nan
        raise UserError(f"the merged model is not the one that was trained: mean KL {drift.kl:.2e} is above max_drift="
                        f"{cfg.max_drift:g}, nothing was written. Look at the adapter (a rate that was too high makes "
                        "weights that no 16-bit type holds), or raise max_drift if these answers are good enough")
    if nf4:
        said.append(nf4_drift(load, texts, merged))
        print(said[1])
    return policy, drift._asdict() | {"said": said}, script


# ---- where the adapter is from

def run_options(folder: Path) -> dict:
    """Read the options of the run that made the adapter in `folder`; {} when unknown.

    Only what can't do harm is read from it: a run folder may come from someone else (trust_remote_code is not taken).
    """
    kinds = {name: option.kind for name, option in options_of(EvalConfig).items() if name != "trust_remote_code"}
    for place in (folder, *list(folder.absolute().parents)[:2]):
        try:
            options = yaml.safe_load((place / CONFIG).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue
        if isinstance(options, dict) and "lora_r" in options:
            kinds |= {"lora_r": int, "steps": int, "lr": float}
            return {key: value for key, value in options.items() if key in kinds and isinstance(value, kinds[key])}
    return {}


def base_dtype(load: EvalConfig) -> torch.dtype:
    """Read the dtype that the base's weights are saved in."""
    config = AutoConfig.from_pretrained(load.model.name, trust_remote_code=load.model.trust_remote_code)
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def evaluation_of(run: Path) -> dict:
    """Read the evaluation in the run folder, or beside it in a whole run; {} for none."""
    for place in (run, evaluation_folder(run.parent, run.name)):
        with contextlib.suppress(OSError, ValueError):
            if isinstance(found := read_json(place / EVAL), dict):
                return found
    return {}


def public_word(word: str) -> str:
    """Take secrets and folders of this machine out of a word of the command."""
    key, equals, value = mask(word).partition("=")
    return key + equals + (Path(value).name if value.startswith(("/", "~")) else value)


# ---- merge

def merge(model):
    """Make the plain model of W + delta, added in fp32 whatever the model's dtype.

    delta is peft's own, so rsLoRA, DoRA and biases are what they were in training. Raises UserError for NaN.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        weights = [p for p in (layer.get_base_layer().weight, getattr(layer.get_base_layer(), "bias", None))
                   if p is not None]
        dtypes = [weight.dtype for weight in weights]
        for weight in weights:
            weight.data = weight.data.float()
        try:
            layer.merge(safe_merge=True)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise UserError(f"{name}: the adapter can't be merged ({str(error).splitlines()[0]})") from None
        for weight, dtype in zip(weights, dtypes):
            weight.data = weight.data.to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A.* already merged|Already following adapters")
        return model.merge_and_unload()  # also takes over modules that were trained whole


def round_to(model, dtype: torch.dtype) -> None:
    """Round every weight to `dtype`, in place; the model goes on computing in its own."""
    for weight in model.parameters():
        weight.data.copy_(weight.data.to(dtype))


# ---- writing

@contextlib.contextmanager
def new_folder(out: Path):
    """Yield a hidden folder that becomes `out` when all is on the disk, or is removed."""
    partial = out.with_name(f".tmp-{os.getpid()}-{out.name}")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.iterdir(), partial):
            flush_to_disk(path)
        os.replace(partial, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out} ({error}); {free_bytes(out):,} bytes are free there: free some space, "
                        "check the permissions, or choose another out=") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_model(policy: Policy, folder: Path, cfg: ExportConfig, dtype: torch.dtype, script: Path | None) -> str:
    """Write the merged model; returns how to use it, {folder} for its place."""
    if cfg.to == "safetensors":
        return write_safetensors(policy, folder, dtype)
    from minimath.export.gguf import write_folder  # needs the extra
    return write_folder(policy, folder, Path(cfg.out).name, cfg.gguf_type, script,
                        lambda place: write_safetensors(policy, place, dtype))


def write_safetensors(policy: Policy, folder: Path, dtype: torch.dtype) -> str:
    """Write a folder that transformers reads; returns how to use it, as write_model."""
    policy.model.to(dtype)
    policy.model.config.use_cache = True  # load_model switches it off
    options = policy.model.generation_config
    known = options.eos_token_id if isinstance(options.eos_token_id, list) else [options.eos_token_id]
    if turn_end(policy.tokenizer) not in known:  # of a base model: the end that was trained is new to it
        options.eos_token_id = policy.eos
    try:
        options.validate(strict=True)
    except ValueError:
        options.do_sample = True  # a temperature without it: transformers reads such a file but does not save it
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    asked = " ".join(shlex.quote(f"{key}={getattr(policy.prompt, key)}") for key in ("system", "prompt_template"))
    return 'minimath solve "PROBLEM" model={folder} ' + asked.replace("{", "{{").replace("}", "}}")


# ---- hub

def fault_of_push(name: str) -> str:
    """Say what is wrong with a repository's name, or with pushing from here, or ""."""
    from huggingface_hub import constants, get_token
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return f"push={name!r}: give owner/name of a hub repository"
    if constants.HF_HUB_OFFLINE:
        return "push= needs the network, and HF_HUB_OFFLINE is set; leave one of them out"
    return "" if get_token() else "push= needs a login: run `hf auth login`, or put a write token into HF_TOKEN"


def push(folder: Path, name: str) -> None:
    """Upload to the private repository owner/name. UserError; the folder stays."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        if not api.repo_info(name).private:
            raise UserError(f"push={name}: that repository is public; minimath uploads to private ones only, you make "
                            f"them public on the hub. {folder} is complete: `hf upload {name} {folder}` does it")
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="minimath export")
    except (*HfHubHTTPError.__bases__, OSError, ValueError) as error:  # its bases: of the HTTP library in use
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"push={name} failed ({mask(first)[:200]}); {folder} is complete, `hf upload {name} {folder}` "
                        "tries again") from None
    print(f"uploaded to https://huggingface.co/{name} (private)")


if __name__ == "__main__":
    sys.exit(run_command(lambda: export(sys.argv[1:])))
