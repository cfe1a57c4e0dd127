"""Code that comes with a model, an adapter, a chat template or a recipe: it does not run."""
import ast
import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

from harness import ROOT, Tally
from hostile_place import Place, bomb, edit_json, quiet, resign
from toy import load

from minimath.config.load import load_config
from minimath.config.schema import STAGES, SFTConfig
from minimath.train.sft import sft


def write_code(place: Place, folder: Path, name: str) -> None:
    (folder / f"{name}.py").write_text(f"import os\nos.mkdir({str(place.canary)!r})\nclass Evil: pass\n")


def code_of_a_model(place: Place) -> Tally:
    """With trust_remote_code it runs (the control); without, it does not, and nobody is asked at a prompt."""
    tally = Tally("hostile: code in a model folder")
    auto = {"AutoConfig": "evil_config.Evil", "AutoModelForCausalLM": "evil_model.Evil",
            "AutoTokenizer": ["evil_tok.Evil"] * 2}
    for kind in ("llama", "evil-architecture"):
        for places in (("config.json",), ("tokenizer_config.json",), ("config.json", "tokenizer_config.json")):
            folder = place.copy(place.model, "bad")
            for name in ("evil_config", "evil_model", "evil_tok"):
                write_code(place, folder, name)
            for name in places:
                edit_json(folder / name, auto_map=auto)
            edit_json(folder / "config.json", model_type=kind)
            modules, path = place.folder / "modules", list(sys.path)
            with mock.patch("builtins.input", side_effect=AssertionError("asked at a prompt")):
                place.harmless(tally, f"{kind}, auto_map in {places}", lambda folder=folder: load(folder),
                               refuse=kind != "llama")
                if kind == "evil-architecture" and places == ("config.json",):
                    with (mock.patch("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules)),
                          contextlib.suppress(Exception), quiet()):
                        load(folder, trust_remote_code=True)
                    tally.add(place.canary.exists(), "the control: with trust_remote_code=true the code did not run")
            sys.path[:] = path
            shutil.rmtree(place.canary, ignore_errors=True)
    for name, value in (("attn_implementation", "evil/kernel"), ("_attn_implementation", "evil/kernel"),
                        ("quantization_config", {"quant_method": "evil"}), ("torch_dtype", "__import__('os')"),
                        ("custom_pipelines", {"text-generation": {"impl": "evil_model.Evil"}})):
        folder = place.copy(place.model, "bad")
        write_code(place, folder, "evil_model")
        edit_json(folder / "config.json", **{name: value})
        place.harmless(tally, f"{name} in config.json", lambda folder=folder: load(folder))
    return tally


def code_of_an_adapter(place: Place) -> Tally:
    tally = Tally("hostile: code named by an adapter")
    changes = {"megatron": {"megatron_config": {"x": 1}, "megatron_core": "evil_module"},
               "megatron in the path": {"megatron_config": {"x": 1}, "megatron_core": "bad.evil_module"},
               "auto_mapping": {"task_type": None, "auto_mapping": {"base_model_class": "Evil",
                                                                    "parent_library": "evil_module"}},
               "another model": {"base_model_name_or_path": "../evil"},
               "prompt tuning": {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "TEXT", "num_virtual_tokens": 4,
                                 "prompt_tuning_init_text": "x", "tokenizer_kwargs": {"trust_remote_code": True},
                                 "tokenizer_name_or_path": str(place.folder / "bad")},
               "unknown kind": {"peft_type": "EVIL"}, "unknown field": {"evil": "__import__('os')"},
               "corda": {"init_lora_weights": "corda", "corda_config": {"cache_file": "adapter_model.bin"}},
               "loftq": {"init_lora_weights": "loftq", "loftq_config": {}}}
    for words, change in changes.items():
        folder = place.copy(place.run / "adapter", "bad")
        write_code(place, folder, "evil_module")
        write_code(place, folder, "evil_tok")
        (folder / "adapter_model.bin").write_bytes(bomb(place, "torch.save"))
        auto = {"AutoTokenizer": ["evil_tok.Evil"] * 2}
        (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto}))
        edit_json(folder / "adapter_config.json", **change)
        resign(folder)
        path, here = list(sys.path), os.getcwd()
        sys.path += [str(folder), str(place.folder)]
        os.chdir(place.folder)
        try:
            for train in (False, True):
                place.harmless(tally, f"{words}, train={train}", lambda folder=folder, train=train: load(
                    place.model, SFTConfig, train=train, adapter=str(folder)))
        finally:
            os.chdir(here)
            sys.path[:] = path
    return tally


def hostile_template(place: Place) -> Tally:
    tally = Tally("hostile: chat templates")
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    globals_ = f"{{{{ cycler.__init__.__globals__.os.mkdir('{place.canary}') }}}}"
    for template in (escape, globals_, "{{ messages.__init__.__globals__ }}", "{% for x in y %}", "{{ 1 / 0 }}",
                     "{{ raise_exception('no') }}", "{% include '/etc/passwd' %}"):
        folder = place.copy(place.model, "bad")
        edit_json(folder / "tokenizer_config.json", chat_template=template)
        (folder / "chat_template.jinja").write_text(template)
        place.refused(tally, template, lambda folder=folder: place.train(
            place.folder / "templated", model=str(folder), steps=1))
        shutil.rmtree(place.folder / "templated", ignore_errors=True)
    return tally


# ---- recipes

def hostile_recipes(place: Place) -> Tally:
    tally = Tally("hostile: recipes and options")
    touch = f"mkdir {place.canary}"
    tags = (f"!!python/object/apply:os.system ['{touch}']", f"!!python/object/apply:os.mkdir ['{place.canary}']",
            "!!python/name:os.system", "!!python/module:os", f"!!python/object/new:os.system ['{touch}']",
            "!!python/object:os.x {}", "!evil x", "!!python/tuple [1, 2]", f"!!binary {touch}")
    recipes = [f"model: {tag}\n" for tag in tags] + [f"sft:\n  data: {tag}\n" for tag in tags]
    recipes += [f"{tags[0]}: 1\n", f"{tags[0]}\n", f"!!python/object/apply:os.system {{args: ['{touch}']}}\n",
                "--- !!python/object/apply:os.system\nmodel: x\n", "[" * 900, "a: " * 5000, "{" * 900,
                "a: &a [x, x]\nb: &b [*a, *a]\nmodel: [*b, *b]\n", "<<: {model: x}\n", "model: &x [*x]\n",
                "model: x\0\n",
                "\xff\xfe", "a: b: c\n", "- model\n", "model: x\n---\nmodel: y\n", "%YAML 9.9\n---\nmodel: x\n", "\t\n"]
    for text in recipes:
        path = place.folder / "recipe.yaml"
        path.write_text(text, encoding="latin-1")
        for cls in STAGES.values():
            place.refused(tally, repr(text[:60]), lambda cls=cls, path=path: load_config(cls, str(path), []))
    values = (f"$({touch})", f"`{touch}`", f"; {touch} ;", f"| {touch}", f"\n{touch}\n",
              f"__import__('os').mkdir('{place.canary}')", f"{{problem.__class__}} {touch}")
    options = ("model", "data", "adapter", "device", "lora_init", "trackers", "lora_targets", "lora_r", "optimizer",
               "dtype", "attn", "eval_data", "split", "system", "prompt_template")
    here = os.getcwd()
    os.chdir(place.folder)
    try:
        for value in values if place.full else values[:1]:
            for option in options if place.full else options[:6]:
                words = [f"model={place.model}", f"data={place.data}", "steps=1", "out=commands", "max_len=64",
                         f"eval_data={place.data}", f"{option}={value}"]
                place.harmless(tally, f"{option}={value!r}", lambda words=words: sft(
                    load_config(SFTConfig, None, words)),
                               refuse=option not in ("split", "system", "prompt_template"))
                shutil.rmtree("commands", ignore_errors=True)
    finally:
        os.chdir(here)
    return tally


FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
FORBIDDEN_METHODS = {("os", "system"), ("os", "popen"), ("yaml", "load"), ("yaml", "unsafe_load"),
                     ("yaml", "full_load"), ("torch", "load"), ("subprocess", "getoutput"),
                     ("subprocess", "getstatusoutput")}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def no_code_from_text(place: Place) -> Tally:
    """No file of the package reads pickles, evaluates text, or hands a text to a shell."""
    tally = Tally("hostile: nothing in the package evaluates text or starts a shell")
    for path in sorted([*(ROOT / "minimath").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        found = []
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                found += [f"import {name}" for name in names & FORBIDDEN_MODULES]
            if isinstance(node, ast.Call):
                fn = node.func
                if isinstance(fn, ast.Name) and fn.id in FORBIDDEN_CALLS:
                    found.append(f"line {node.lineno}: {fn.id}()")
                if isinstance(fn, ast.Attribute) and (ast.unparse(fn.value), fn.attr) in FORBIDDEN_METHODS:
                    found.append(f"line {node.lineno}: {ast.unparse(fn)}()")
                if any(word.arg == "shell" and getattr(word.value, "value", 1) for word in node.keywords):
                    found.append(f"line {node.lineno}: shell=")
        tally.add(not found, f"{path.name}: {found}")
    return tally


CASES = (code_of_a_model, code_of_an_adapter, hostile_template, hostile_recipes, no_code_from_text)
