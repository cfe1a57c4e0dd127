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
    text: str | None     # None: a list or a mapping stood where one value belongs
    where: str           # file:line, or the word of the command line
    bare: bool = False   # a word without =


def load_config(cls, recipe: str | None, words: list[str], section: str = "", *, allow_other=False):
    """Build `cls` from defaults, a recipe and `key=value` words.

    section: the recipe section read; default: the one that STAGES gives for `cls`. `other.key=value` words of other
    sections are checked and ignored. allow_other: so are words of other stages (for `run`, which loads several stages
    from one command line). Raises UserError."""
    section = section or next((name for name, stage in STAGES.items() if stage is cls), "")
    classes, values = STAGES | ({section: cls} if section else {}), {}
    for settings, of_any in ((read_recipe(recipe), True), (read_words(words), allow_other)):
        for part in sorted(settings, key=lambda part: part == section):  # its own section wins
            if part and part not in classes:  # another command reads it
                continue
            owners = [classes[part]] if part else [cls, *(classes.values() if of_any else ())]
            for name, setting in settings[part].items():  # a wrong value is reported now, not when its stage starts
                owner, value = typed(owners, name, setting, part)
                if owner is cls and part in ("", section):
                    values[name] = value
    cfg = cls(**values)
    if fault := cfg.check():
        raise UserError(fault)
    return cfg


def words_of_own_judge(recipe: str | None, words: list[str], folder) -> list[str]:
    """Words by which RLAIF asks the judge that a whole run trains in `folder`.

    None without a section judge_train, where the words name another judge, or anything a judge_adapter. UserError:
    the recipe asks a server all the same."""
    made, said = read_recipe(recipe), read_words(words)
    asked = said.get("", {}) | said.get("rlaif", {})
    if "judge_train" not in {*made, *said} or "judge" in asked and asked["judge"].text != "self" or \
            "judge_adapter" in {*asked, *made.get("", {}), *made.get("rlaif", {})}:
        return []
    there = (made.get("", {}) | made.get("rlaif", {})).get("judge")
    if there and there.text == "openai" and "judge" not in asked:
        raise UserError(f"{there.where}: judge: openai, but RLAIF asks the judge that the section judge_train trains: "
                        "leave one of the two out, or say which by judge=openai or judge=self")
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


def read_recipe(recipe: str | None, above: tuple[Path, ...] = ()) -> dict[str, dict[str, Setting]]:
    """Read the untyped settings of a recipe by section; "": those of the top level.

    `like: RECIPE` takes over what the recipe does not set itself. above: those that are like it."""
    if not recipe:
        return {}
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
    settings = {"": {}}
    for key, (node, where) in mapping_items(root, path).items():
        if key not in SECTIONS:
            settings[""][key] = Setting(scalar_text(node), where)
        elif isinstance(node, yaml.MappingNode) or scalar_text(node) == "":
            settings[key] = {k: Setting(scalar_text(n), w) for k, (n, w) in mapping_items(node, path).items()}
        else:
            raise UserError(f"{where}: {key!r} is a section: indent its 'key: value' lines below it")
    if (like := settings[""].pop("like", None)) is None:
        return settings
    if not like.text or find_recipe(like.text) in (*above, path):
        raise UserError(f"{like.where}: like names another recipe, a file or one of the shipped ones")
    of_like = read_recipe(like.text, (*above, path))
    kept = {name: {key: value for key, value in section.items() if key not in settings[""]}  # also not in a section
            for name, section in of_like.items()}
    return {name: kept.get(name, {}) | settings.get(name, {}) for name in {**kept, **settings}}


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


def mapping_items(node, path) -> dict[str, tuple[yaml.Node, str]]:
    """Map each key of a YAML mapping to its value's node and "file:line"."""
    items = {}
    if node is None or scalar_text(node) == "":
        return items
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:{node.start_mark.line + 1}: expected lines of 'key: value'")
    for key_node, value in node.value:
        where, key = f"{path}:{key_node.start_mark.line + 1}", scalar_text(key_node)
        if not key:
            raise UserError(f"{where}: a key must be a plain word")
        if key in items:
            raise UserError(f"{where}: key {key!r} appears twice; keep one of the two lines")
        items[key] = value, where
    return items


def scalar_text(node) -> str | None:
    """Return the text of a YAML value, "" for null, None for a list or mapping."""
    if not isinstance(node, yaml.ScalarNode):
        return None
    return "" if node.style is None and node.value in ("null", "~") else node.value


def read_words(words: list[str]) -> dict[str, dict[str, Setting]]:
    """Read the untyped values of the command line by section; "": those without one."""
    settings: dict[str, dict[str, Setting]] = {}
    for word in words:
        key, equals, text = word.removeprefix("--").partition("=")
        section, dot, name = key.rpartition(".")
        if dot and section not in SECTIONS:
            raise UserError(f"{mask(word)!r}: unknown section {section!r}{did_you_mean(section, SECTIONS)}")
        name = name.replace("-", "_")
        where = name if name in KEEPS_SECRETS_OUT else repr(mask(word))
        settings.setdefault(section, {})[name] = Setting(text, where, bare=not equals)
    return settings


def typed(owners: list, name: str, setting: Setting, section: str):
    """Find whose option a setting is: the class, and the option's value. Raises UserError."""
    owner = next((cls for cls in owners if name in options_of(cls)), None)
    option = options_of(owner)[name] if owner else None
    if setting.bare and (option is None or option.kind is not bool):
        raise UserError(f"{setting.where}: expected key=value")
    if option is None:
        stages = [stage for stage, cls in STAGES.items() if name in options_of(cls)]
        known = [*(SECTIONS if len(owners) > 1 else ()), *(name for cls in owners for name in options_of(cls))]
        hint = f"unknown key {name!r} (it is an option of {', '.join(stages)})" if stages else \
            unknown_option(name, known)
        raise UserError(f"{setting.where}: {hint}" + (f" in section {section!r}" if section else ""))
    if setting.text is None:
        comma = "; write a comma list: a,b" if option.kind is str else ""
        raise UserError(f"{setting.where}: {name} takes one value ({option.kind.__name__}), no list or mapping{comma}")
    return owner, option.parse("true" if setting.bare else setting.text, setting.where)


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
