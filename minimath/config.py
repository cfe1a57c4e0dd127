"""Reads the options of a stage: class defaults, then the recipe's top-level keys, then the recipe's section
for the stage (`sft:`, `rlaif:`, `eval:`), then the command line's `key=value` words, then
`section.key=value`.

    cfg = load_config(SFTConfig, "my_recipe.yaml", ["lr=1e-4", "sft.epochs=3"])

Whatever is wrong with a value raises UserError with the place (file:line or the word typed), the reason and
the next step. Recipes are read as text and typed by the dataclass, not by YAML: YAML 1.1 reads 1e-4 as a
string, `no` as a boolean and 1:30 as 90.
"""
import ast
import dataclasses
import difflib
import inspect
import math
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import yaml

from minimath.credentials import KEEPS_SECRETS_OUT, mask, url_fault
from minimath.options import (
    AT_MOST_ONE,
    BELOW_ONE,
    CHOICES,
    HOOKS,
    POSITIVE,
    STAGES,
    AdapterConfig,
    EvalConfig,
    ModelConfig,
    RLAIFConfig,
    SFTConfig,
)

__all__ = ["RECIPES", "SECTIONS", "STAGES", "AdapterConfig", "EvalConfig", "ModelConfig", "RLAIFConfig",
           "SFTConfig", "Stopped", "UserError", "config_dict", "describe_config", "did_you_mean", "load_config",
           "save_config"]

RECIPES = Path(__file__).parent / "recipes"
SECTIONS = (*STAGES, "demo", "sample")  # whose classes demo.py and sample.py pass to load_config


class UserError(Exception):
    """Something the user can put right. The message says what was wrong, where, and what to do next."""


class Stopped(Exception):
    """Raised with the number of the signal by runs.Stop.check inside long phases; the loops catch it and save."""


class Setting(NamedTuple):
    """One value as written, before it gets its type."""
    text: str | None  # None: a list or a mapping stood where one value belongs
    where: str        # file:line, or the word of the command line


def load_config(cls, recipe: str | None, overrides: list[str], section: str = "", *, allow_other=False):
    """Build `cls` from defaults, a recipe (a path, or the name of a shipped one) and `key=value` words.

    section: the recipe section read; default: the one that STAGES gives for `cls`. `other.key=value` words of
    other sections are ignored here. allow_other: an unqualified word may also belong to another stage (for
    `run`, which loads several stages from one command line). Raises UserError.
    """
    section = section or next((name for name, stage in STAGES.items() if stage is cls), "")
    classes = {**STAGES, **({section: cls} if section else {})}
    shared, sections = read_recipe(recipe) if recipe else ({}, {})
    for key, setting in shared.items():
        owner = next((c for c in (cls, *classes.values()) if key in fields_of(c)), None)
        if owner is None:
            known = [*SECTIONS, *{f for c in (cls, *classes.values()) for f in fields_of(c)}]
            raise UserError(f"{setting.where}: unknown key {key!r}{did_you_mean(key, known)}")
        coerce(owner, key, setting)  # a wrong value is reported now, not when its stage starts
    for name, settings in sections.items():
        for key, setting in settings.items():
            if name in classes:
                coerce(classes[name], key, setting, section=name)
    plain, qualified = read_overrides(cls, overrides, section, classes, allow_other)
    values = {}
    for layer in (shared, sections.get(section, {}), plain, qualified):
        values |= {key: coerce(cls, key, setting) for key, setting in layer.items() if key in fields_of(cls)}
    cfg = cls(**values)
    check_together(cfg)
    return cfg


def read_recipe(recipe: str) -> tuple[dict[str, Setting], dict[str, dict[str, Setting]]]:
    """Read a YAML recipe without typing its values -> (top-level settings, settings of each section)."""
    path = find_recipe(recipe)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem or error.context}; "
                        "a recipe is lines of 'key: value'") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: lists or mappings in hundreds of others; a recipe is lines of 'key: value'") from None
    shared, sections = {}, {}
    for key, node, where in mapping_items(root, path):
        if key not in SECTIONS:
            shared[key] = Setting(scalar_text(node), where)
        elif isinstance(node, yaml.MappingNode) or scalar_text(node) == "":
            sections[key] = {k: Setting(scalar_text(n), w) for k, n, w in mapping_items(node, path)}
        else:
            raise UserError(f"{where}: {key!r} is a section: indent its 'key: value' lines below it")
    return shared, sections


def find_recipe(recipe: str) -> Path:
    """A path as given, else the shipped recipe of that name."""
    if Path(recipe).is_file():
        return Path(recipe)
    shipped = {path.stem: path for path in RECIPES.glob("*.yaml")}
    name = recipe.removesuffix(".yaml")
    if name in shipped:
        return shipped[name]
    raise UserError(f"no recipe {recipe!r}: not a file, and not one of the shipped recipes "
                    f"({', '.join(sorted(shipped)) or 'none'}){did_you_mean(name, shipped)}")


def mapping_items(node, path):
    """Yield (key, value node, "file:line") of a YAML mapping; an empty document or section has none."""
    if node is None or (isinstance(node, yaml.ScalarNode) and scalar_text(node) == ""):
        return
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:{node.start_mark.line + 1}: expected lines of 'key: value'")
    refuse_tags(f"{path}:{node.start_mark.line + 1}", node)
    seen = set()
    for key_node, value in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        refuse_tags(where, key_node, value)
        key = scalar_text(key_node)
        if not key:
            raise UserError(f"{where}: a key must be a plain word")
        if key in seen:
            raise UserError(f"{where}: key {key!r} appears twice; keep one of the two lines")
        seen.add(key)
        yield key, value, where


def refuse_tags(where: str, *nodes) -> None:
    """UserError for a YAML tag, as in !!python/name:os.system: it would be ignored, and its value with it."""
    for node in nodes:
        if node.tag.removeprefix("tag:yaml.org,2002:") not in ("str", "map", "seq", "int", "float", "bool", "null"):
            raise UserError(f"{where}: a recipe takes no YAML tags ({node.tag}); write the value alone")


def scalar_text(node) -> str | None:
    """Text of one YAML value ("" for null), None for a list or a mapping."""
    if not isinstance(node, yaml.ScalarNode):
        return None
    return "" if node.style is None and node.value in ("null", "~") else node.value


def read_overrides(cls, overrides, section, classes, allow_other):
    """Split command-line words -> (unqualified settings, settings qualified with this section)."""
    plain, qualified = {}, {}
    for word in overrides:
        key, equals, text = word.removeprefix("--").partition("=")
        prefix, dot, name = key.partition(".")
        if dot and prefix not in SECTIONS:
            raise UserError(f"{mask(word)!r}: unknown section {prefix!r}{did_you_mean(prefix, SECTIONS)}")
        name = (name if dot else key).replace("-", "_")
        owner = classes.get(prefix) if dot else cls
        if not dot and allow_other and name not in fields_of(cls):
            owner = next((c for c in classes.values() if name in fields_of(c)), cls)
        if not equals:  # `--resume` means resume=true; for anything but a switch the value is missing
            if owner is None or fields_of(owner).get(name) is not bool:
                raise UserError(f"{mask(word)!r}: expected key=value")
            text = "true"
        setting = Setting(text, name if name in KEEPS_SECRETS_OUT else f"{mask(word)!r}")
        if owner is not None:
            coerce(owner, name, setting, section=prefix if dot else "")
        if dot and prefix == section:
            qualified[name] = setting
        elif not dot and name in fields_of(cls):
            plain[name] = setting
    return plain, qualified


def coerce(cls, key: str, setting: Setting, section: str = ""):
    """Text -> the value that field `key` of `cls` declares; UserError if that can't be done."""
    types = fields_of(cls)
    if key not in types:
        inside = f" in section {section!r}" if section else ""
        stages = [name for name, stage in STAGES.items() if key in fields_of(stage) and stage is not cls]
        hint = f" (it is an option of {', '.join(stages)})" if stages else did_you_mean(key, types)
        raise UserError(f"{setting.where}: unknown key {key!r}{inside}{hint}")
    text, kind = setting.text, types[key]
    if text is None:
        extra = "; write a comma list: a,b" if kind is str else ""
        raise UserError(f"{setting.where}: {key} takes one value ({kind.__name__}), not a list or a mapping"
                        f"{extra}")
    try:
        value = PARSERS[kind](text)
    except ValueError:
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise UserError(f"{setting.where}: {key} must be {expected}, not {mask(text)!r}") from None
    check_value(key, value, setting.where)
    return value


def comma_list(text: str) -> list[str]:
    """"a, b," -> ["a", "b"]."""
    return [item.strip() for item in text.split(",") if item.strip()]


def parse_bool(text: str) -> bool:
    word = text.strip().lower()
    if word not in ("true", "yes", "on", "false", "no", "off"):
        raise ValueError(text)
    return word in ("true", "yes", "on")


def parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)  # 1e3 is a whole number too
        if not number.is_integer():  # also true of nan and inf
            raise
        return int(number)


def parse_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


PARSERS = {str: str, bool: parse_bool, int: parse_int, float: parse_float}


def check_value(key: str, value, where: str) -> None:
    """Raise UserError when a value of the right type is not an allowed one."""
    if key in CHOICES:
        for item in comma_list(value) if key == "trackers" else [value]:
            if key in HOOKS and re.fullmatch(r"python:([^\W\d]\w*\.)+[^\W\d]\w*", item):
                continue
            if item not in CHOICES[key]:
                allowed = [*CHOICES[key], *(["python:module.function"] if key in HOOKS else [])]
                raise UserError(f"{where}: {key} must be one of {', '.join(allowed)}, not {item!r}"
                                f"{did_you_mean(item, CHOICES[key])}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if key in POSITIVE and value <= 0:
            raise UserError(f"{where}: {key} must be above 0, not {value}")
        if value < 0:  # no option is meaningful below zero
            raise UserError(f"{where}: {key} must not be negative, not {value}")
        if (key in AT_MOST_ONE and value > 1) or (key in BELOW_ONE and value >= 1):
            bound = "at most 1" if key in AT_MOST_ONE else "below 1"
            raise UserError(f"{where}: {key} must be {bound}, not {value}")
    if key in ("judge_url", "vllm_url") and (fault := url_fault(value)):
        raise UserError(f"{where}: {key}: {fault}" if where != key else f"{key}: {fault}")
    if key in ("judge_key_env", "vllm_key_env") and not re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]*)?", value):
        raise UserError(f"{where}: {key} must be the NAME of an environment variable (letters, "
                        "digits, _); what you gave is not shown, in case it is a key: export it under a name")
    if key == "budgets" and not re.fullmatch(r"\s*(\d+\s*(,\s*\d+\s*)*)?", value):
        raise UserError(f"{where}: budgets must be a comma list of token counts (128,256), not {value!r}")
    if key == "prompt_template":
        try:
            shows = "problem-text" in value.format(problem="problem-text")
        except (KeyError, IndexError, ValueError):
            shows = False
        if not shows:
            raise UserError(f"{where}: prompt_template must contain {{problem}}, and other braces doubled, "
                            "as in \\boxed{{}}")


def check_together(cfg) -> None:
    """Checks that need two options. Raises UserError."""
    if isinstance(cfg, RLAIFConfig):
        if cfg.group_size < 2:
            raise UserError("group_size must be at least 2: rewards are compared within a group")
        if cfg.temperature <= 0:
            raise UserError("temperature must be above 0 in rlaif: a group of greedy completions is one text")
        if cfg.lam_judge + cfg.lam_length > 0.5:
            raise UserError(f"lam_judge + lam_length is {cfg.lam_judge + cfg.lam_length:g}; keep it at most "
                            "0.5, so that a right answer always beats a wrong one")
        if cfg.min_solve_rate >= cfg.max_solve_rate:
            raise UserError(f"min_solve_rate={cfg.min_solve_rate:g} must be below "
                            f"max_solve_rate={cfg.max_solve_rate:g}")
        check_update(cfg)
        asked = cfg.reward == "judge" or "judge" in cfg.reward_parts
        if asked and cfg.judge == "openai" and not (cfg.judge_url and cfg.judge_model):
            raise UserError("judge=openai needs judge_url=http://.../v1 and judge_model=NAME")
    if isinstance(cfg, EvalConfig) and cfg.samples > 1 and cfg.temperature == 0:
        raise UserError(f"samples={cfg.samples} with temperature=0 would repeat one greedy completion; "
                        "set temperature=0.6, or samples=1")


def check_update(cfg: RLAIFConfig) -> None:
    """Refuse options of the policy update that would do nothing, or make no sense, together."""
    if cfg.clip_dual and cfg.clip_dual <= 1:
        raise UserError(f"clip_dual={cfg.clip_dual:g}: give a number above 1 (3 is usual), or 0 for off")
    if cfg.clip_dual and cfg.loss_type == "cispo":
        raise UserError("clip_dual has no meaning for loss_type=cispo, which bounds every weight itself; leave it out")
    if cfg.importance == "mask" and cfg.importance_cap <= 1:
        raise UserError(f"importance=mask keeps tokens within [1/c, c], c = importance_cap={cfg.importance_cap:g}; "
                        "give importance_cap=2 or more")


def fields_of(cls) -> dict[str, type]:
    """Field name -> type, in order."""
    return {field.name: field.type for field in dataclasses.fields(cls)}


def did_you_mean(name: str, options) -> str:
    """" (did you mean 'x'?)" for the closest option, or nothing."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def describe_config(cls) -> list[tuple[str, str, object, str]]:
    """(name, type name, default, docstring) of every field; docstrings are read from the class's source."""
    docs = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for field, text in zip(body, body[1:]):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                docs[field.target.id] = text.value.value
    return [(f.name, f.type.__name__, f.default, docs.get(f.name, "")) for f in dataclasses.fields(cls)]


def config_dict(cfg) -> dict:
    """Option name -> value, in the order of the class."""
    return dataclasses.asdict(cfg)


def save_config(cfg, path) -> None:
    """Write the resolved options as YAML; the file can be given back as a recipe. It holds no secrets: a
    judge's key is only named (judge_key_env), never stored."""
    text = yaml.safe_dump(config_dict(cfg), sort_keys=False, allow_unicode=True, width=1000)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; check the folder and free space") from None
