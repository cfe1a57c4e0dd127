"""Change values of a YAML recipe in its text, so that its comments and order stay."""
from pathlib import Path

import yaml

from minimath.config.load import SECTIONS, find_recipe
from minimath.core.errors import UserError


def new_file(recipe: str, target: str, suffix: str) -> Path:
    """Where a changed recipe is written: `target`, or beside the recipe under its name and suffix (a shipped one: in
    the current folder). Raises UserError when there is something already."""
    beside = Path(recipe).parent if Path(recipe).is_file() else Path()
    path = Path(target) if target else beside / f"{find_recipe(recipe).stem}-{suffix}.yaml"
    if path.exists():
        raise UserError(f"{path} is there already and is not overwritten; remove it or give another name: --apply FILE")
    return path


def apply(recipe: str, changes: dict[str, dict], path: Path) -> None:
    """Write the recipe with changes ({section: {key: value}}, "" for the keys of all stages). Raises UserError."""
    text = find_recipe(recipe).read_text(encoding="utf-8")
    for section, options in changes.items():
        for key, value in options.items():
            text = set_value(text, section, key, written(value))
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give another name: --apply FILE") from None


def written(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def set_value(text: str, section: str, key: str, value: str) -> str:
    """The recipe's text with key: value in a section; in "" also wherever a section has a value of its own."""
    root = yaml.compose(text, Loader=yaml.BaseLoader)
    top = {k.value: (k, v) for k, v in root.value} if isinstance(root, yaml.MappingNode) else {}
    inside = {name: {k.value: v for k, v in top[name][1].value} for name in top
              if name in SECTIONS and isinstance(top[name][1], yaml.MappingNode)}
    spots = []
    if section:
        spots = [inside.get(section, {}).get(key)]
    else:
        spots = [top[key][1] if key in top else None, *(v[key] for v in inside.values() if key in v)]
    nodes = [node for node in spots if node is not None]
    for node in sorted(nodes, key=lambda n: -n.start_mark.index):
        text = text[:node.start_mark.index] + value + text[node.end_mark.index:]
    if spots[0] is not None:
        return text
    if section in inside and inside[section]:
        first = next(iter(top[section][1].value))[0].start_mark
        return f"{text[:first.index]}{key}: {value}\n{' ' * first.column}{text[first.index:]}"
    if section:
        if section in top:  # it is empty
            text = text[:top[section][0].start_mark.index] + text[top[section][1].end_mark.index:]
        return f"{text.rstrip()}\n\n{section}:\n  {key}: {value}\n"
    start = min((k.start_mark.index for k, _ in top.values()), default=len(text))
    return f"{text[:start]}{key}: {value}\n{text[start:]}"
