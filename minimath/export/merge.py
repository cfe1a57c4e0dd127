"""Merge an adapter into its base and write a model that other programs run:

    minimath export adapter=runs/x out=FOLDER [to=safetensors|gguf] [gguf_type=f16|bf16|q8_0] [push=owner/name]

The base is the one that the run's config.yaml names (model= for another place), loaded without quantisation: an adapter
trained on 4-bit weights is merged into the 16-bit ones, never into the 4-bit ones. W + delta is computed in fp32 and
rounded once, to the base's dtype or to gguf_type. What that changes is measured before anything is written: live
adapter against rounded weights, on completions of the run's own problems; above max_drift nothing is written.

to=gguf writes one GGUF file and a Modelfile for Ollama (gguf_file.py, model_card.py). push= uploads the folder to a
private repository of the hub, with the login of `hf auth login` or HF_TOKEN.
"""
import contextlib
import os
import re
import shlex
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from transformers import AutoConfig

from minimath.export import gguf
from minimath.core.run_folder import find_adapter
from minimath.data.chat import eos_ids, turn_end
from minimath.core.files import flush_to_disk, free_bytes, read_json
from minimath.config.load import config_dict, fields_of, load_config
from minimath.config.schema import EvalConfig
from minimath.core.errors import UserError
from minimath.config.load import mask as without_secrets
from minimath.export.drift import compare, completion_logits, drift_texts, nf4_drift
from minimath.models.load import base_causal_lm, describe, load_model
from minimath.export.model_card import card, modelfile
from minimath.core.run import keep_freed_memory

FORMATS = ("safetensors", "gguf")


# Mean KL on SmolLM2-135M after 10 steps of the demo's SFT: f16 8e-7, bf16 1e-4, the arithmetic of bf16 alone 6e-4, q8_0
# 1e-3; and what must not go out: 5 bit 0.07, half the adapter's scale 0.15, 4 bit 0.2, no adapter 0.83.
MAX_DRIFT = 0.01


@dataclass
class ExportConfig:
    """Options of `minimath export`."""
    adapter: str = ""
    """run folder, checkpoint or adapter folder to merge"""
    model: str = ""
    """base model, a folder or a hub id; empty: the one that the run's config.yaml or the adapter names"""
    out: str = ""
    """new folder for the model"""
    to: str = "safetensors"
    """safetensors (a folder for transformers, vLLM, ...) or gguf (a file for llama.cpp, and a Modelfile for Ollama)"""
    gguf_type: str = "f16"
    """type of the matrices with to=gguf: f16, bf16 or q8_0 (half the size; llama.cpp rounds activations too, then)"""
    max_drift: float = MAX_DRIFT
    """nothing is written when the mean KL from the live adapter to the merged model, in nats a token, is above this"""
    drift_problems: int = 16
    """problems on which the drift is measured: the run's own where they are found, else made ones"""
    drift_tokens: int = 48
    """longest completion of each, in tokens"""
    device: str = "auto"
    """where merge and measurement run: auto, cpu, cuda, cuda:N or mps"""
    dtype: str = "fp32"
    """of merge and measurement: fp32; bf16 or fp16 take half the memory, and the drift then holds their noise"""
    trust_remote_code: bool = False
    """run Python code that ships with the model; only for models you trust"""
    push: str = ""
    """owner/name of a private hub repository to upload the folder to; empty: nothing leaves this machine"""


def export(words: list[str]) -> dict:
    """The command. Returns {"folder": path, "drift": {...}}. Raises UserError, with nothing written."""
    cfg = load_config(ExportConfig, None, words, section="export")
    keep_freed_memory()
    check(cfg)
    folder = find_adapter(cfg.adapter.path)
    run = run_options(folder)
    base = cfg.model.name or run.get("model") or read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise UserError(f"{folder} does not say which base it was trained on; add model=FOLDER or a hub id")
    load = EvalConfig(model=base, adapter=str(folder), device=cfg.model.device, dtype=cfg.model.dtype, temperature=0.0,
                      max_new_tokens=cfg.drift_tokens, trust_remote_code=cfg.model.trust_remote_code,
                      attn=run["attn"] if run.get("attn") == "eager" else "sdpa",  # never a GPU's, which may be missing
                      **{key: run[key] for key in ("system", "prompt_template") if key in run})
    try:
        return export_model(cfg, load, run, folder, words)
    except torch.OutOfMemoryError:
        raise UserError(f"the merge does not fit into the memory of device={cfg.model.device}; use device=cpu, or dtype=bf16 "
                        "for half of it") from None


def export_model(cfg: ExportConfig, load: EvalConfig, run: dict, folder: Path, words: list[str]) -> dict:
    """Load, merge, measure, write, push."""
    model, tokenizer = load_model(load, train=False)
    print(describe(model, load) + f", adapter {folder}")
    config = base_causal_lm(model).config
    script = why_not = None
    if cfg.to == "gguf" and (why_not := gguf_file.reason_against(config, tokenizer)):
        script = gguf_file.find_script()
        if script is None:
            raise UserError(f"to=gguf: {why_not}. Use to=safetensors, then llama.cpp's convert_hf_to_gguf.py on that "
                            "folder; with LLAMA_CPP set to a checkout of llama.cpp this command runs it")
    texts, source = drift_texts(model, tokenizer, load, run, cfg.drift_problems)
    live = completion_logits(model, texts)
    model, dtype = merge(model), base_dtype(load)
    if cfg.to == "gguf":
        gguf_file.round_as_gguf(model, cfg.gguf_type)
    else:
        round_to(model, dtype)
    merged = completion_logits(model, texts)
    drift = compare(live, merged)
    kind = cfg.gguf_type if cfg.to == "gguf" else str(dtype).removeprefix("torch.")
    said = [f"drift, live adapter to merged {kind} weights, on {source}: {drift}"]
    print(said[0])
    if not drift.kl <= cfg.max_drift:  # also nan
        raise UserError(f"the merged model is not the one that was trained: mean KL {drift.kl:.2e} is above max_drift="
                        f"{cfg.max_drift:g}, nothing was written. Look at the adapter (a rate that was too high makes "
                        "weights that no 16-bit type holds), or raise max_drift if these answers are good enough")
    if run.get("quant") == "nf4":
        said.append(nf4_drift(load, run, texts, merged))
        print(said[1])
    out = Path(cfg.run.out)
    with new_folder(out) as partial:
        usage = write_gguf_folder(model, tokenizer, partial, cfg, load, dtype, script) if cfg.to == "gguf" else \
            write_safetensors(model, tokenizer, partial, cfg, load, dtype)
        text = card(name=out.name, base=load.model, adapter=read_json(folder / "adapter_config.json"), run=run,
                    drift=said,
                    evaluation=evaluation_of(folder.parent if folder.name == "adapter" else Path(cfg.adapter.path)),
                    usage=usage.format(folder=out.name),
                    command="minimath export " + " ".join(map(public_word, words)))
        (partial / "README.md").write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))} ({size / 1e6:.0f} MB)\n"
          f"to use it:\n{usage.format(folder=shlex.quote(cfg.run.out))}")
    if cfg.push:
        push(out, cfg.push)
    return {"folder": str(out), "drift": drift._asdict()}


# ---- before anything is loaded

def check(cfg: ExportConfig) -> None:
    """UserError for what would fail only after the work."""
    if not cfg.adapter.path or not cfg.run.out:
        raise UserError("minimath export needs the run and a new folder: minimath export adapter=runs/x out=FOLDER")
    for key, allowed in (("to", FORMATS), ("gguf_type", tuple(gguf_file.FILE_TYPES))):
        if getattr(cfg, key) not in allowed:
            raise UserError(f"{key} must be one of {', '.join(allowed)}, not {getattr(cfg, key)!r}")
    if min(cfg.drift_problems, cfg.drift_tokens) < 1:
        raise UserError("drift_problems and drift_tokens must be at least 1: no merge goes out unmeasured")
    out = Path(cfg.run.out)
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already and is not an empty folder; choose another out=")
    if cfg.to == "gguf":
        gguf_file.import_gguf()
    if cfg.push:
        check_push(cfg.push)


def run_options(folder: Path) -> dict:
    """Options of the run that made the adapter in `folder`, out of the config.yaml above it; {} when there is none.

    Only what can't do harm is read from it: a run folder may come from someone else (trust_remote_code is not taken).
    """
    known = fields_of(EvalConfig).keys() - {"trust_remote_code"} | {"lora_r", "steps", "lr"}
    for place in (folder, *list(folder.absolute().parents)[:2]):
        try:
            options = yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue
        if isinstance(options, dict) and "lora_r" in options:
            defaults = config_dict(EvalConfig())
            return {key: value for key, value in options.items() if key in known
                    and isinstance(value, type(defaults.get(key, value)))}
    return {}


def base_dtype(load: EvalConfig) -> torch.dtype:
    """The dtype that the base's weights are saved in, by its config.json."""
    config = AutoConfig.from_pretrained(load.model, trust_remote_code=load.trust_remote_code)
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


# ---- merge

def merge(model):
    """peft model -> the plain model with W + delta as weights, added in fp32 whatever the model's dtype.

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
    """Yield a hidden folder that becomes `out` when everything in it is on the disk; else nothing is left of it."""
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


def write_safetensors(model, tokenizer, folder: Path, cfg: ExportConfig, load: EvalConfig, dtype: torch.dtype) -> str:
    """A folder that transformers reads, in the base's dtype; returns how to use it, {folder} for its place."""
    model.to(dtype)
    model.config.use_cache = True  # load_model switches it off
    options = model.generation_config
    if turn_end(tokenizer) not in (options.eos_token_id if isinstance(options.eos_token_id, list) else
                                   [options.eos_token_id]):
        options.eos_token_id = eos_ids(tokenizer, model)  # of a base model: the end that was trained is new to it
    try:
        options.validate(strict=True)
    except ValueError:
        options.do_sample = True  # a temperature without it: transformers reads such a file but does not save it
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    asked = " ".join(shlex.quote(f"{key}={getattr(load, key)}") for key in ("system", "prompt_template"))
    return 'minimath solve "PROBLEM" model={folder} ' + asked.replace("{", "{{").replace("}", "}}")


def write_gguf_folder(model, tokenizer, folder: Path, cfg: ExportConfig, load: EvalConfig, dtype: torch.dtype,
                      script: Path | None) -> str:
    """The GGUF file, by llama.cpp's script where there is one, and the Modelfile; returns how to use them,
    {folder} for their place."""
    name = Path(cfg.run.out).name
    file = folder / f"{name}-{cfg.gguf_type}.gguf"
    if script:
        plain = folder / "safetensors"
        plain.mkdir()
        write_safetensors(model, tokenizer, plain, cfg, load, dtype)
        gguf_file.run_script(script, plain, file, cfg.gguf_type)
        shutil.rmtree(plain)
    else:
        gguf_file.write_gguf(model, tokenizer, file, kind=cfg.gguf_type, name=name)
    text = modelfile(tokenizer, file.name, system=load.system, prompt_template=load.prompt_template)
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    return f"cd {{folder}} && ollama create {name} -f Modelfile && ollama run {name} \"PROBLEM\"\n" \
           f"llama-server -m {{folder}}/{file.name}   # or llama.cpp alone"


def evaluation_of(run: Path) -> dict:
    """eval.json of the run folder, or of its evaluation in a `minimath run` (eval-sft beside sft); {} for none."""
    for place in (run, run.parent / f"eval-{run.name}"):
        with contextlib.suppress(OSError, ValueError):
            if isinstance(found := read_json(place / "eval.json"), dict):
                return found
    return {}


def public_word(word: str) -> str:
    """A word of the command as the model card shows it: without secrets and without folders of this machine."""
    key, equals, value = without_secrets(word).partition("=")
    return key + equals + (Path(value).name if value.startswith(("/", "~")) else value)


# ---- hub

def check_push(name: str) -> None:
    """UserError for a name that is none, or without a login."""
    from huggingface_hub import constants, get_token
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"push={name!r}: give owner/name of a hub repository")
    if constants.HF_HUB_OFFLINE:
        raise UserError("push= needs the network, and HF_HUB_OFFLINE is set; leave one of them out")
    if not get_token():
        raise UserError("push= needs a login: run `hf auth login`, or put a write token into HF_TOKEN")


def push(folder: Path, name: str) -> None:
    """Upload the folder to the private repository owner/name, made if it isn't there. UserError; the folder stays."""
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
        raise UserError(f"push={name} failed ({without_secrets(first)[:200]}); {folder} is complete, `hf upload {name} "
                        f"{folder}` tries again") from None
    print(f"uploaded to https://huggingface.co/{name} (private)")


if __name__ == "__main__":
    from minimath.cli import dispatch, run_command
    sys.exit(run_command(lambda: dispatch("export", sys.argv[1:])))
