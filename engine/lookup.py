"""Finding by name what a user asked for: the nearest known name, an optional package, a function in a module."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from types import ModuleType

from fuserl.engine import wording
from fuserl.engine.reward_worker import Attempt, one_line

_SHOWN = 12  # names listed in one error


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that points from an unknown `name` to the nearest known one, or lists them where none is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"Did you mean {near[0]!r}?"
    shown = ", ".join(known[:_SHOWN]) or "none"
    return f"Known: {shown}{f' and {len(known) - _SHOWN} more' if len(known) > _SHOWN else ''}."


def package(name: str, extra: str) -> ModuleType:
    """Import the optional package `name`, which the extra `extra` of fuserl brings.

    Raises:
        RuntimeError: it is not installed (the message is the pip line), or cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        line = f'Run: pip install "fuserl[{extra}]"'
        if isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]:
            raise RuntimeError(f"{name} is not installed. {line}") from error
        raise RuntimeError(f"{name} is installed but cannot be imported ({error}). {line}") from error


def function(path: str) -> Callable:
    """The callable at `module:name`, looked for in the working directory too.

    Raises:
        ValueError: no such module, one that raises when it is imported, or nothing callable of that name in it.
    """
    module_name, colon, name = path.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"function: path must read module:function; got {path!r}. Write it like my_rewards:exact.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with Attempt({}) as attempt:  # the module's own code runs, and may raise anything
        attempt.returned = importlib.import_module(module_name)
    module, error = attempt.returned, attempt.error
    if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
        raise ValueError(
            f"function: path must name a module that can be imported; got {path!r}. "
            f"Start fuserl in the folder of {module_name.partition('.')[0]}.py, or install it."
        ) from error
    if error is not None:
        raise ValueError(
            f"function: {path} must be in a module that can be imported; importing {module_name} raised "
            f"{one_line(error)}{wording.place(error)}. Correct it there."
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        callables = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise ValueError(
            f"function: path must name a function of {module_name}; got {name!r}. {nearest(name, callables)}"
        )
    return found
