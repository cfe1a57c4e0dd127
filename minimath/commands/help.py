"""Help texts, made without importing what a command needs: they come at once."""
import ast
import textwrap
from pathlib import Path

from minimath.config.options import Option, options_of

WIDTH, COLUMN = 116, 34  # of a line, and where the meaning of an option begins


def docstring_of(module: str) -> str:
    """Read the docstring of a module of minimath, which is not imported."""
    path = Path(__file__).parents[2] / f"{module.replace('.', '/')}.py"
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def options_help(cls, title: str, names=None) -> str:
    """Describe every option of a config by group: default, meaning, choices.

    title: heads the options that belong to no group. names: of these only."""
    groups: dict[str, list[str]] = {}
    for name, option in options_of(cls).items():
        if names is None or name in names:
            groups.setdefault(option.group, []).append(option_help(option))
    order = sorted(groups, key=bool)  # the stage's own first
    return "\n\n".join("\n".join([f"{group or title}:", *groups[group]]) for group in order)


def option_help(option: Option) -> str:
    """Word one option, in lines of WIDTH."""
    default = str(option.default).lower() if option.kind is bool else str(option.default).replace("\n", "\\n")
    choices = [*option.choices, *(["python:module.fn"] if option.hook else [])]
    meaning = option.doc + (f" [{' | '.join(choices)}]" if choices else "")
    head = f"  {option.name}={default}".ljust(COLUMN - 1)
    return textwrap.fill(f"{head} {' '.join(meaning.split())}", WIDTH, subsequent_indent=" " * COLUMN,
                         break_long_words=False, break_on_hyphens=False)
