"""What the run that made an adapter was trained with, and what of it a command takes over."""
import contextlib
import os
from pathlib import Path

import yaml

from minimath.config.options import options_of
from minimath.config.schema import SFTConfig
from minimath.core.files import read_json
from minimath.core.run_folder import CONFIG, find_adapter, say_once

PROMPT = [name for name, option in options_of(SFTConfig).items()
          if option.group == "prompt" and name != "max_prompt_len"]  # options that make a prompt what it is
SHAPE = [name for name, option in options_of(SFTConfig).items() if option.group == "adapter" and name != "adapter"]
READ = ["model", *PROMPT, *SHAPE, "data", "split", "quant", "attn"]  # of a run, maybe someone else's


def run_options(folder: Path) -> dict:
    """Read of the run that made the adapter in `folder` what READ lists; {} for none."""
    known = options_of(SFTConfig)
    for place in (folder, *list(folder.absolute().parents)[:2]):
        with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
            options = yaml.safe_load((place / CONFIG).read_text(encoding="utf-8"))
            if isinstance(options, dict) and "lora_r" in options:
                return {name: options[name] for name in READ if isinstance(options.get(name), known[name].kind)}
    return {}


def base_of(folder: Path) -> str:
    """Name the base that the adapter in `folder` was trained on, "" when unknown."""
    return run_options(folder).get("model") or read_json(folder / "adapter_config.json").get(
        "base_model_name_or_path") or ""


def as_trained(cfg):
    """Take over the prompt and the base of cfg's adapter; returns the config to use.

    Options at their defaults are taken over, which is said once. Others stay, and a warning shows both values, as of
    a lora_r that the adapter does not have; of the base load_policy warns. UserError: the adapter can't be read."""
    if not cfg.adapter.path:
        return cfg
    folder, taken, known = find_adapter(cfg.adapter.path), {}, options_of(type(cfg))
    made = run_options(folder)
    for name in (name for name in SHAPE if name in known and name in made):
        if (now := cfg.value(name)) not in (known[name].default, made[name]):
            say_once(f"warning: {name}={now!r} has no effect: adapter={cfg.adapter.path} goes on as it was made, with "
                     f"{name}={made[name]!r}")
    trained = {name: value for name, value in made.items() if name in PROMPT} | {"model": base_of(folder)}
    for name, then in trained.items():
        now, given = cfg.value(name), cfg.value(name) != known[name].default
        if then == now or name == "model" and (given or not then or same_place(then, now)):
            continue
        if name == "model" and (then[0] in "./~" or then.count("/") > 1) and not os.path.isdir(then):
            continue  # a folder that is gone
        if given:
            say_once(f"warning: {name}={now!r}, but adapter={cfg.adapter.path} was trained with {name}={then!r}")
        else:
            taken[name] = then
    if not taken:
        return cfg
    words = ", ".join(f"{name}={value!r}" for name, value in taken.items())
    say_once(f"adapter={cfg.adapter.path}: taking over what it was trained with, {words}")
    return cfg.replace(**taken)


def same_place(one: str, other: str) -> bool:
    return os.path.isdir(one) and os.path.realpath(one) == os.path.realpath(other)
