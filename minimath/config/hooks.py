"""The user's own functions: `python:module.fn` on the command line, a callable in Python."""
import importlib
import os
import sys
from collections.abc import Callable

from minimath.core.errors import UserError

HOOK = "python:"


def as_number(value) -> float | None:
    """A bool, Python number, numpy number or 0-d tensor as a finite float; None for anything else."""
    try:
        number = value if isinstance(value, (bool, int, float)) else value.item()
        return float(number) if abs(number) < float("inf") else None  # a NaN fails the comparison
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None


def user_function(value: str | Callable, option: str) -> tuple[Callable, str]:
    """The function that an option gives or names, and its name. Raises UserError."""
    if callable(value):
        return value, getattr(value, "__name__", type(value).__name__)
    return load_function(value, option), value


def load_function(spec: str, option: str) -> Callable:
    """Load the function that "python:module.fn" names; the module is looked for in the current folder too.

    It is code that runs with all rights of this process, as a recipe that names it says openly. Raises UserError.
    """
    module_name, _, name = spec.removeprefix(HOOK).rpartition(".")
    if not spec.startswith(HOOK) or not module_name or not name:
        raise UserError(f"{option}={spec}: write python:module.function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # at the end: it must not shadow an installed package
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(f"{option}={spec}: importing {module_name} failed ({type(error).__name__}: {error}); start "
                        "minimath in the folder that holds it, or install it") from error
    fn = getattr(module, name, None)
    if not callable(fn):
        raise UserError(f"{option}={spec}: {module.__file__} has no function {name}")
    return fn
