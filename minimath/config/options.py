"""What an option is: its place in a stage's config, its type with choices and bounds, its default and its help."""
import ast
import contextlib
import dataclasses
import datetime
import importlib
import inspect
import math
import os
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Annotated, Literal, NamedTuple, Union, get_args, get_origin

from minimath.config.renamed import REMOVED, RENAMED, RENAMED_VALUES
from minimath.core.errors import UserError
from minimath.core.text import KEEPS_SECRETS_OUT, comma_list, did_you_mean, mask, named_values, url_fault

HOOK = re.compile(r"python:([^\W\d]\w*\.)+[^\W\d]\w*")


class Main:
    """Marks the field of a group that goes by the name of the group."""


class Hook(str):
    """The type of an option that may be `python:module.fn`, or in Python a callable."""


class Bound(NamedTuple):
    """Limits of a number: above < value, least <= value, value < below, value <= most."""
    above: float = -math.inf
    least: float = 0.0  # no option is meaningful below zero
    below: float = math.inf
    most: float = math.inf

    def fault(self, value: float) -> str:
        """ "must be above 0", or "" for a value within the limits."""
        limits = ((math.isfinite(value), "be a number"), (value > self.above, f"be above {self.above:g}"),
                  (value >= self.least, f"be at least {self.least:g}" if self.least else "not be negative"),
                  (value < self.below, f"be below {self.below:g}"), (value <= self.most, f"be at most {self.most:g}"))
        return next((f"must {limit}" for kept, limit in limits if not kept), "")


Positive = Annotated[float, Bound(above=0)]
Count = Annotated[int, Bound(above=0)]
Share = Annotated[float, Bound(most=1)]
Fraction = Annotated[float, Bound(below=1)]


class Option(NamedTuple):
    """Describes one option; group: the stage's attribute that holds it, or ""."""
    name: str
    group: str
    attribute: str
    kind: type
    choices: tuple[str, ...]
    hook: bool
    listed: bool  # a comma list of choices
    in_python: tuple[type, ...]  # further types that only Python code can give
    bound: Bound
    default: object
    doc: str

    def parse(self, text: str, where: str):
        """Return the value that a text stands for, or raise UserError with `where`."""
        try:
            value = PARSERS[self.kind](text)
        except (ValueError, KeyError):
            expected = {bool: "true or false", int: "a whole number", float: "a number"}[self.kind]
            raise UserError(f"{where}: {self.name} must be {expected}, not {mask(text)!r}") from None
        return self.check(value, where)

    def check(self, value, where: str):
        """Return a value of the right type, bounds and choices, or raise UserError."""
        where = where and f"{where}: "
        if isinstance(value, self.in_python) or (self.hook and callable(value)):
            return value
        if self.kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, self.kind) or (self.kind is int and isinstance(value, bool)):
            raise UserError(f"{where}{self.name} must be of type {self.kind.__name__}, not {type(value).__name__}")
        if self.kind in (int, float) and (fault := self.bound.fault(value)):
            raise UserError(f"{where}{self.name} {fault}, not {value}")
        for item in comma_list(value) if self.listed else [value] if self.choices else []:
            if item in self.choices or (self.hook and HOOK.fullmatch(item)):
                continue
            if now := RENAMED_VALUES.get((self.name, item)):
                raise UserError(f"{where}{self.name}={item} is now called {self.name}={now}")
            allowed = ", ".join([*self.choices, *(["python:module.function"] if self.hook else [])])
            near = did_you_mean(item, self.choices)
            raise UserError(f"{where}{self.name} must be one of {allowed}, not {item!r}{near}")
        if (check := CHECKS.get(self.name)) and (fault := check(value)):
            secret = self.name in KEEPS_SECRETS_OUT
            raise UserError(f"{self.name}: {fault}" if secret else f"{where}{self.name} {fault}")
        return value


def parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)  # 1e3 is a whole number too
        if not number.is_integer():  # also true of nan and inf
            raise
        return int(number)


BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
PARSERS = {str: str, bool: lambda text: BOOLS[text.strip().lower()], int: parse_int, float: float}


# ---- texts that must have a form

def template_fault(value: str) -> str:
    with contextlib.suppress(LookupError, ValueError, AttributeError):
        if "problem-text" in value.format(problem="problem-text"):
            return ""
    return "must contain {problem}, and other braces doubled, as in \\boxed{{}}"


def key_env_fault(value: str) -> str:
    return "" if not value or value.isascii() and value.isidentifier() else (
        "must be the NAME of an environment variable (what you gave is not shown, it may be the key): export the key "
        "under a name of letters, digits and _")


def budgets_fault(value: str) -> str:
    whole = all(item.strip().isdecimal() for item in value.split(","))
    return "" if whole or not value.strip() else "must be a comma list of token counts (128,256)"


def template_args_fault(value: str) -> str:
    try:
        day = named_values(value).get("date", datetime.date.min)
    except ValueError:
        return "must be a comma list of NAME=VALUE (reasoning_effort=high,date=2026-01-31)"
    return "" if type(day) is datetime.date else "must give its date as YYYY-MM-DD"


CHECKS = {"judge_url": url_fault, "vllm_url": url_fault, "prompt_template": template_fault,
          "teacher": lambda value: url_fault(value) if "://" in value else "", "judge_key_env": key_env_fault,
          "budgets": budgets_fault, "template_args": template_args_fault}


# ---- the user's own functions: python:module.fn on the command line, a callable in Python

def as_number(value) -> float | None:
    """Read a bool, number, numpy number or 0-d tensor as a finite float, or None."""
    try:
        number = value if isinstance(value, (bool, int, float)) else value.item()
        return float(number) if abs(number) < float("inf") else None  # a NaN fails the comparison
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None


def user_function(value: str | Callable, option: str) -> tuple[Callable, str]:
    """The function that an option gives or names, and its name.

    Of "python:module.fn" the module is looked for in the current folder too. It is code that runs with all rights of
    this process, as a recipe that names it says openly. Raises UserError."""
    if callable(value):
        return value, getattr(value, "__name__", type(value).__name__)
    module_name, _, name = value.removeprefix("python:").rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # at the end: it must not shadow an installed package
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(f"{option}={value}: importing {module_name} failed ({type(error).__name__}: {error}); start "
                        "minimath in the folder that holds it, or install it") from error
    if not callable(fn := getattr(module, name, None)):
        raise UserError(f"{option}={value}: {module.__file__} has no function {name}")
    return fn, value


# ---- a stage, and its options

class Stage:
    """Holds the groups of options of a config as attributes, and its own options."""

    def __init__(self, **options):
        """Take options by their names; the rest have their defaults. Raises UserError."""
        for name, (_, default) in _members(type(self)).items():
            setattr(self, name, default() if callable(default) else default)
        known = options_of(type(self))
        for name, value in options.items():
            if name not in known:
                raise UserError(unknown_option(name, known))
            setattr(self._holder(known[name]), known[name].attribute, known[name].check(value, ""))

    def _holder(self, option: Option):
        return getattr(self, option.group) if option.group else self

    def value(self, name: str):
        """The value of an option by its name."""
        option = options_of(type(self))[name]
        return getattr(self._holder(option), option.attribute)

    def replace(self, **options):
        """A copy with some options changed. Raises UserError."""
        return type(self)(**(self.to_dict() | options))

    def shared(self, cls, *groups: str) -> dict:
        """Option name -> value here, of what another stage has in some groups."""
        return {name: self.value(name) for name, option in options_of(cls).items() if option.group in groups}

    def to_dict(self) -> dict:
        """Option name -> value, in the order of the help."""
        return {name: self.value(name) for name in options_of(type(self))}

    def check(self) -> str:
        """What is wrong with options together, or ""."""
        return ""

    def __eq__(self, other) -> bool:
        return type(self) is type(other) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        defaults = {name: option.default for name, option in options_of(type(self)).items()}
        changed = [f"{name}={value!r}" for name, value in self.to_dict().items() if value != defaults[name]]
        return f"{type(self).__name__}({', '.join(changed)})"


def options_of(cls) -> dict[str, Option]:
    """The options of a stage by name, in the order of its help."""
    if "_options" not in cls.__dict__:
        cls._options = {option.name: option for option in _walk(cls)}
    return cls._options


def unknown_option(name: str, known) -> str:
    """Say of no option's name what it is now, why it left, or the nearest one."""
    if name in RENAMED:
        return f"{name!r} is now called {RENAMED[name]!r}"
    if name in REMOVED:
        return f"{name!r} is no longer an option: {REMOVED[name]}"
    return f"unknown key {name!r}{did_you_mean(name, known)}"


def _members(cls) -> dict[str, tuple]:
    """Map each attribute of a stage and its bases to its annotation and default."""
    members = {}
    for base in reversed(cls.__mro__):
        for name, kind in inspect.get_annotations(base).items():
            default = base.__dict__.get(name, kind)  # a group without a default makes itself
            if isinstance(default, dataclasses.Field):
                default = default.default_factory
            members[name] = (kind, default)
    return members


def _walk(cls) -> Iterator[Option]:
    docs = _docs(cls)
    for name, (kind, default) in _members(cls).items():
        if not dataclasses.is_dataclass(kind):
            yield _option(name, "", name, kind, default, docs.get(name, ""))
            continue
        group, docs_of_group, prefix = default(), _docs(kind), getattr(kind, "prefix", "")
        for field in dataclasses.fields(kind):
            own = name if Main in get_args(field.type) else prefix + field.name
            yield _option(own, name, field.name, field.type, getattr(group, field.name),
                          docs_of_group.get(field.name, ""))


def _option(name: str, group: str, attribute: str, annotation, default, doc: str) -> Option:
    annotated = get_origin(annotation) is Annotated
    inner, *extras = get_args(annotation) if annotated else [annotation]
    parts = get_args(inner) if get_origin(inner) in (Union, types.UnionType) else (inner,)
    literals = [part for part in (*parts, *extras) if get_origin(part) is Literal]
    kind, *others = [part for part in parts if isinstance(part, type) and part is not Hook] or [str]
    bound = next((extra for extra in extras if isinstance(extra, Bound)), Bound())
    return Option(name, group, attribute, kind, get_args(literals[0]) if literals else (), hook=Hook in parts,
                  listed=bool(literals) and literals[0] in extras, in_python=tuple(others), bound=bound,
                  default=default, doc=doc)


def _docs(cls) -> dict[str, str]:
    """Field -> the text below it, read from the source of a class and its bases."""
    docs = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for field, text in zip(body, body[1:]):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                docs[field.target.id] = text.value.value
    return docs
