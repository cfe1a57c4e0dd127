"""Read the options of a stage: class defaults, then the recipe's top-level keys, then the recipe's section for the
stage (`sft:`, `rlaif:`, `eval:`), then the command line's `key=value` words, then `section.key=value`.

    cfg = load_config(SFTConfig, "my_recipe.yaml", ["lr=1e-4", "sft.epochs=3"])

Whatever is wrong with a value raises UserError with the place (file:line or the word typed), the reason and the next
step. Recipes are typed by the schema, not by YAML, which reads 1e-4 as a string, `no` as a boolean and 1:30 as 90.
"""
import os
from pathlib import Path
from typing import NamedTuple

import yaml

from minimath.config.options import Stage, options_of, unknown_option
from minimath.config.schema import STAGES
from minimath.core.errors import UserError
from minimath.core.text import KEEPS_SECRETS_OUT, did_you_mean, mask

RECIPES = Path(__file__).parent.parent / "recipes"
SECTIONS = (*STAGES, "demo", "sample", "judge_train")  # the classes of the last three come from their commands


class Setting(NamedTuple):
    """One value as written, before it gets its type."""
    text: str | None  # None: a list or a mapping stood where one value belongs
    where: str        # file:line, or the word of the command line


def load_config(cls, recipe: str | None, words: list[str], section: str = "", *, allow_other=False):
    """Build `cls` from defaults, a recipe and `key=value` words.

    section: the recipe section read; default: the one that STAGES gives for `cls`. `other.key=value` words of other
    sections are checked and ignored. allow_other: so are words of other stages (for `run`, which loads several stages
    from one command line). Raises UserError."""
    section = section or next((name for name, stage in STAGES.items() if stage is cls), "")
    classes = {**STAGES, **({section: cls} if section else {})}
    shared, sections = read_recipe(recipe) if recipe else ({}, {})
    values, own = {}, {}
    for key, setting in shared.items():
        owner = next((c for c in (cls, *classes.values()) if key in options_of(c)), None)
        if owner is None:
            known = [*SECTIONS, *{name for c in (cls, *classes.values()) for name in options_of(c)}]
            raise UserError(f"{setting.where}: {unknown_option(key, known)}")
        value = typed(owner, key, setting)  # a wrong value is reported now, not when its stage starts
        if owner is cls:
            values[key] = value
    for name, settings in sections.items():
        if name in classes:
            of_section = {key: typed(classes[name], key, setting, name) for key, setting in settings.items()}
            own = of_section if name == section else own
    plain, qualified = read_words(cls, words, section, classes, allow_other)
    cfg = cls(**values | own | plain | qualified)
    if fault := cfg.check():
        raise UserError(fault)
    return cfg


def words_of_own_judge(recipe: str | None, words: list[str], folder) -> list[str]:
    """Words by which RLAIF asks the judge that a whole run trains in `folder`.

    None without a section judge_train, where the words name another judge, or anything a judge_adapter."""
    shared, sections = read_recipe(recipe) if recipe else ({}, {})
    pairs = (word.removeprefix("--").partition("=") for word in words)
    said = {name.removeprefix("rlaif.").replace("-", "_"): text for name, _, text in pairs}
    if "judge_train" not in sections and not any(name.startswith("judge_train.") for name in said):
        return []
    if said.get("judge", "self") != "self" or "judge_adapter" in {*said, *shared, *sections.get("rlaif", {})}:
        return []
    return ["judge=self", f"judge_adapter={folder}"]


def config_of_words(cls, words: list[str], section: str = ""):
    """Build the config of an optional recipe and `key=value` words, or UserError."""
    return load_config(cls, take_recipe(words := list(words)), words, section)


def take_recipe(words: list[str]) -> str | None:
    """Take a leading word that is no option from `words`."""
    return words.pop(0) if words and not is_option(words[0]) else None


def is_option(word: str) -> bool:
    """Tell key=value and --key from a path, which may hold = itself: runs/lr=1e-4."""
    return word.startswith("--") or "=" in word and not os.path.exists(word)


def read_recipe(recipe: str) -> tuple[dict[str, Setting], dict[str, dict[str, Setting]]]:
    """Read the untyped settings of a recipe: those of the top level, and by section."""
    path = find_recipe(recipe)
    try:
        text = path.read_text(encoding="utf-8")
        root, tokens = yaml.compose(text, Loader=yaml.BaseLoader), list(yaml.scan(text, Loader=yaml.BaseLoader))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem or error.context}; a recipe is lines of "
                        "'key: value'") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}; a recipe is lines of 'key: value'") from None
    for token in tokens:  # it would be ignored, and its value with it
        if isinstance(token, yaml.TagToken):
            raise UserError(f"{path}:{token.start_mark.line + 1}: a recipe takes no YAML tags; write the value alone")
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
    """Yield each key, value node and "file:line" of a YAML mapping."""
    if node is None or scalar_text(node) == "":
        return
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:{node.start_mark.line + 1}: expected lines of 'key: value'")
    seen = set()
    for key_node, value in node.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        key = scalar_text(key_node)
        if not key:
            raise UserError(f"{where}: a key must be a plain word")
        if key in seen:
            raise UserError(f"{where}: key {key!r} appears twice; keep one of the two lines")
        seen.add(key)
        yield key, value, where


def scalar_text(node) -> str | None:
    """Return the text of a YAML value, "" for null, None for a list or mapping."""
    if not isinstance(node, yaml.ScalarNode):
        return None
    return "" if node.style is None and node.value in ("null", "~") else node.value


def read_words(cls, words, section, classes, allow_other):
    """Read the command line's values: without a section, and of this section."""
    plain, qualified = {}, {}
    for word in words:
        key, equals, text = word.removeprefix("--").partition("=")
        prefix, dot, name = key.partition(".")
        if dot and prefix not in SECTIONS:
            raise UserError(f"{mask(word)!r}: unknown section {prefix!r}{did_you_mean(prefix, SECTIONS)}")
        name = (name if dot else key).replace("-", "_")
        owner = classes.get(prefix) if dot else cls
        if not dot and allow_other and name not in options_of(cls):
            owner = next((c for c in classes.values() if name in options_of(c)), cls)
        if not equals:  # `--resume` means resume=true; for anything but a switch the value is missing
            if owner is None or name not in options_of(owner) or options_of(owner)[name].kind is not bool:
                raise UserError(f"{mask(word)!r}: expected key=value")
            text = "true"
        if owner is None:  # a section that another command reads
            continue
        where = name if name in KEEPS_SECRETS_OUT else f"{mask(word)!r}"
        value = typed(owner, name, Setting(text, where), prefix if dot else "")
        if owner is cls and (not dot or prefix == section):
            (qualified if dot else plain)[name] = value
    return plain, qualified


def typed(cls, key: str, setting: Setting, section: str = ""):
    """The value of option `key` of `cls` that a setting stands for. Raises UserError."""
    known = options_of(cls)
    if key not in known:
        stages = [name for name, stage in STAGES.items() if key in options_of(stage) and stage is not cls]
        inside = f" in section {section!r}" if section else ""
        hint = f"unknown key {key!r} (it is an option of {', '.join(stages)})" if stages else unknown_option(key, known)
        raise UserError(f"{setting.where}: {hint}{inside}")
    option = known[key]
    if setting.text is None:
        comma = "; write a comma list: a,b" if option.kind is str else ""
        raise UserError(f"{setting.where}: {key} takes one value ({option.kind.__name__}), no list or mapping{comma}")
    return option.parse(setting.text, setting.where)


def plain_values(cfg: Stage) -> dict:
    """Map option names to values as JSON and YAML hold them; functions by name."""
    def plain(value):
        if callable(value):
            return f"python:{value.__module__}.{value.__qualname__}"
        return f"{len(value)} rows given in Python" if isinstance(value, list) else value
    return {name: plain(value) for name, value in cfg.to_dict().items()}


def config_text(cfg: Stage) -> str:
    """Write the resolved options as YAML: a recipe, without a judge's key."""
    return yaml.safe_dump(plain_values(cfg), sort_keys=False, allow_unicode=True, width=1000)


def save_config(cfg: Stage, path) -> None:
    """Write `config_text` to a file. Raises UserError."""
    try:
        Path(path).write_text(config_text(cfg), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; check the folder and free space") from None
