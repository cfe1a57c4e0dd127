"""The user's own functions: `python:module.fn` on the command line, a callable in Python."""
import importlib
import os
import sys
from collections.abc import Callable

from minimath.core.errors import UserError


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
    this process, as a recipe that names it says openly. Raises UserError.
    """
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
