"""What an option is: its place in a stage's config, its type with choices and bounds, its default and its help."""
import ast
import dataclasses
import datetime
import functools
import importlib
import inspect
import math
import os
import re
import sys
import textwrap
import types
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple, Union, get_args, get_origin

from minimath.core.errors import UserError
from minimath.core.text import KEEPS_SECRETS_OUT, comma_list, did_you_mean, is_plain_url, mask, named_values

HOOK = re.compile(r"python:([^\W\d]\w*\.)+[^\W\d]\w*")  # what stands for a callable outside of Python
# options of earlier versions: what they are called now
RENAMED = {
    "gate": "verifier", "slots": "max_num_seqs", "micro_tokens": "micro_batch_tokens", "loss_type": "loss",
    "beta": "kl_coef", "lam_judge": "judge_weight", "lam_length": "brevity_weight", "lam_format": "format_weight",
    "judge_plan": "judge_pairs", "suite_data": "data",
}
RENAMED_VALUES = {("judge", "rules"): "heuristic", ("judge_fallback", "rules"): "heuristic",
                  ("reward", "rules"): "paper"}


class Main:
    """Marks the field of a group that goes by the name of the group."""


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
    listed: bool  # a comma list of choices
    in_python: tuple[type, ...]  # further types that only Python code can give
    bound: Bound
    default: object
    doc: str

    @property
    def hook(self) -> bool:
        """Whether it may be python:module.fn, or in Python a callable."""
        return Callable in self.in_python

    def parse(self, text: str, where: str):
        """Return the value that a text stands for, or raise UserError with `where`."""
        read, expected = READERS[self.kind]
        try:
            value = read(text)
        except (ValueError, KeyError):
            raise UserError(f"{where}: {self.name} must be {expected}, not {mask(text)!r}") from None
        return self.check(value, where)

    def check(self, value, where: str):
        """Return a value of the right type, bounds and choices, or raise UserError."""
        where = where and f"{where}: "
        if isinstance(value, self.in_python):
            return value
        if isinstance(value, str) and value.startswith("~/"):  # in a recipe no shell does
            value = os.path.expanduser(value)
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
            raise UserError(f"{where}{self.name} must be one of {allowed}, not {item!r}"
                            f"{did_you_mean(item, self.choices)}")
        has_form, form = FORMS.get(self.name, (lambda _: True, ""))
        try:
            if has_form(value):
                return value
        except (LookupError, ValueError, AttributeError, TypeError):
            pass
        raise UserError(f"{'' if self.name in KEEPS_SECRETS_OUT else where}{self.name} must {form}")


def whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)  # 1e3 is a whole number too
        if not number.is_integer():  # also true of nan and inf
            raise
        return int(number)


BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
READERS = {str: (str, "a text"), bool: (lambda text: BOOLS[text.strip().lower()], "true or false"),
           int: (whole_number, "a whole number"), float: (float, "a number")}
URL = (is_plain_url, "be a URL like http://127.0.0.1:8080/v1, without user, password and everything from a ? on, which "
       "would be saved with the run (so what you gave is not shown); a key goes into an environment variable: that of "
       "judge_key_env, $VLLM_API_KEY, $TEACHER_API_KEY")
FORMS = {  # of texts: whether one has it, by False or an error, and what it must be
    "judge_url": URL, "vllm_url": URL, "teacher": (lambda text: "://" not in text or is_plain_url(text), URL[1]),
    "judge_key_env": (lambda text: not text or text.isascii() and text.isidentifier(),
                      "be the NAME of an environment variable (what you gave is not shown, it may be the key): export "
                      "the key under a name of letters, digits and _"),
    "prompt_template": (lambda text: "problem-text" in text.format(problem="problem-text"),
                        "contain {problem}, and other braces doubled, as in \\boxed{{}}"),
    "step_counts": (lambda text: comma_list(text) and {*comma_list(text)} <= {"1", "2", "3"},
                    "be a comma list of 1, 2 and 3"),
    "budgets": (lambda text: not text.strip() or all(item.strip().isdecimal() for item in text.split(",")),
                "be a comma list of token counts (128,256)"),
    "template_args": (lambda text: type(named_values(text).get("date", datetime.date.min)) is datetime.date,
                      "be a comma list of NAME=VALUE (reasoning_effort=high,date=2026-01-31), the date as YYYY-MM-DD"),
}


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

    def __init_subclass__(cls):
        """Make it a dataclass, of groups that are made of their defaults."""
        for name, kind in inspect.get_annotations(cls).items():
            if dataclasses.is_dataclass(kind) and name not in vars(cls):
                setattr(cls, name, dataclasses.field(default_factory=kind))
        dataclasses.dataclass(init=False, repr=False)(cls)

    def __init__(self, **options):
        """Take options by their names; the rest have their defaults. Raises UserError."""
        for member in dataclasses.fields(self):
            if dataclasses.is_dataclass(member.type):
                setattr(self, member.name, member.default_factory())
        known = options_of(type(self))
        for name, value in options.items():
            if name not in known:
                raise UserError(unknown_option(name, known))
            setattr(self._holder(known[name]), known[name].attribute, known[name].check(value, ""))

    def _holder(self, option: Option):
        return getattr(self, option.group) if option.group else self

    def value(self, name: str):
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

    def __repr__(self) -> str:
        changed = [f"{name}={self.value(name)!r}" for name, option in options_of(type(self)).items()
                   if self.value(name) != option.default]
        return f"{type(self).__name__}({', '.join(changed)})"


@functools.cache
def options_of(cls) -> dict[str, Option]:
    """The options of a stage by name, in the order of its help."""
    options = {}
    for member in dataclasses.fields(cls):
        group, prefix, holder, fields, defaults = "", "", cls, [member], cls
        if dataclasses.is_dataclass(member.type):
            group, holder, defaults = member.name, member.type, member.default_factory()
            prefix, fields = getattr(holder, "prefix", ""), dataclasses.fields(holder)
        for field in fields:
            name = group if Main in get_args(field.type) else prefix + field.name
            options[name] = _option(name, group, field, getattr(defaults, field.name), _docs(holder))
    return options


def _option(name: str, group: str, field: dataclasses.Field, default, docs: dict[str, str]) -> Option:
    inner, *extras = get_args(field.type) if get_origin(field.type) is Annotated else [field.type]
    parts = get_args(inner) if get_origin(inner) in (Union, types.UnionType) else (inner,)
    choices = next((part for part in (*parts, *extras) if get_origin(part) is Literal), None)
    kind, *others = [str if part is choices else part for part in parts]
    bound = next((extra for extra in extras if isinstance(extra, Bound)), Bound())
    return Option(name, group, field.name, kind, get_args(choices), listed=choices in extras, in_python=tuple(others),
                  bound=bound, default=default, doc=docs.get(field.name, ""))


def unknown_option(name: str, known) -> str:
    """Say of no option's name what it is now, or the nearest one."""
    if name in RENAMED:
        return f"{name!r} is now called {RENAMED[name]!r}"
    return f"unknown key {name!r}{did_you_mean(name, known)}"


@functools.cache
def _docs(cls) -> dict[str, str]:
    """Field -> the text below it, read from the source of a class and its bases."""
    docs = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        docs |= {field.target.id: text.value.value for field, text in zip(body, body[1:])
                 if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)}
    return docs
