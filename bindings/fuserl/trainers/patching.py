"""Our functions in the place of a host's, wherever the host bound them, and out again.

    _HOST = Host("trl", since="1.16", below="1.17", replacements={"trl.trainer.utils:entropy_from_logits": ours})
    _HOST.patch()                    # until _HOST.unpatch()
    with _HOST.patch(): ...          # or so long

A host's modules bind a function by name wherever they import it. A path into the module that defines the function
stands for all these places, which are found by identity: modules loaded when the patch is made are rebound then, those
loaded later import ours, and taking it out rebinds both. A path into a module that imports it stands for that place.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import re
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import NamedTuple

__all__ = ["Host", "Report"]


class Report(NamedTuple):
    """What a drop-in did to its host; printed as a list."""

    host: str
    """Name and version."""
    replaced: dict[str, list[str]]
    """Each replaced "module:attribute", and every place where ours is bound; empty where the patch is out."""
    left: dict[str, str]
    """What the host computes itself, and why."""

    def __str__(self):
        done = [f"  {path}  bound as {', '.join(places)}" for path, places in self.replaced.items()]
        left = [f"  {what}: {why}" for what, why in self.left.items()]
        return "\n".join([f"{self.host}: replaced", *(done or ["  nothing"]), "left", *(left or ["  nothing"])])


class Host:
    """A package, and what is to stand in the place of its functions.

    Args:
        package: its name, as pip knows it.
        since, below: the versions that the replacements were written for, as "1.16" and "1.17".
        replacements: "module:attribute" or "module:Class.attribute" to what replaces it; no two the same object.
        left: what is not replaced, to why.

    Raises:
        ModuleNotFoundError: the package is not installed; with the line for pip.
    """

    def __init__(
        self, package: str, *, since: str, below: str, replacements: Mapping[str, object],
        left: Mapping[str, str] | None = None,
    ):  # fmt: skip
        self.package, self.since, self.below = package, since, below
        self.replacements, self.left = dict(replacements), dict(left or {})
        self._wanted, self._originals = f"{package}>={since},<{below}", {}
        self.version = self._installed()

    def patch(self) -> contextlib.ExitStack:
        """Put the replacements in; the returned context, where it is entered, takes them out at its end.

        Where they are in already nothing happens, and only the first call's context takes them out.

        Raises:
            RuntimeError: the version is another, or lacks what would be replaced; nothing is changed then.
        """
        context = contextlib.ExitStack()
        if not self._originals:
            self._check_version()
            originals = {path: self._bound(path) for path in self.replacements}
            for path, ours in self.replacements.items():
                _rebind(path, originals[path], ours, originals[path])
            self._originals = originals
            context.callback(self.unpatch)
        return context

    def unpatch(self) -> None:
        """Restore the host's own functions wherever ours are bound; no error where none are."""
        for path, original in self._originals.items():
            _rebind(path, self.replacements[path], original, original)
        self._originals = {}

    def original(self, path: str) -> object:
        """What the host itself has at a path, whether or not it is replaced."""
        return self._originals[path] if path in self._originals else self._bound(path)

    def report(self) -> Report:
        """What is replaced now, at which places, and what is left."""
        replaced = {}
        for path, original in self._originals.items():
            owners = _places(path, self.replacements[path], original)
            replaced[path] = sorted(f"{_name(owner)}.{name}" for owner, name in owners)
        return Report(f"{self.package} {self.version}", replaced, dict(self.left))

    def _installed(self) -> str:
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            sentence = f"fuserl.trainers: {self.package} must be installed; it is not. pip install '{self._wanted}'"
            raise ModuleNotFoundError(sentence, name=self.package) from None

    def _check_version(self) -> None:
        if not _numbers(self.since) <= _numbers(self.version) < _numbers(self.below):
            raise RuntimeError(
                f"patch: {self.package} must be >= {self.since} and < {self.below}, which the replacements were "
                f"written for; got {self.version}. pip install '{self._wanted}', or use it unpatched."
            )

    def _bound(self, path: str) -> object:
        owner, name = _owner(path)
        if name not in vars(owner):
            raise RuntimeError(
                f"patch: {self.package} must have {path}; got {self.version}, which has not. Install an unmodified "
                f"{self._wanted}."
            )
        return vars(owner)[name]


def _owner(path: str) -> tuple[object, str]:
    """The module or class that has the last name of a path, and that name."""
    module, _, attributes = path.partition(":")
    owner = importlib.import_module(module)
    *outer, name = attributes.split(".")
    for each in outer:
        owner = getattr(owner, each)
    return owner, name


def _places(path: str, value: object, original: object) -> Iterator[tuple[object, str]]:
    """Where a value stands among the places that a path to `original` stands for."""
    owner, name = _owner(path)
    if not isinstance(owner, ModuleType) or _home(original) != owner.__name__:
        if vars(owner)[name] is value:
            yield owner, name
        return
    root = owner.__name__.partition(".")[0]
    for at, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and (at == root or at.startswith(f"{root}.")):
            yield from ((module, each) for each, bound in list(vars(module).items()) if bound is value)


def _home(value: object) -> str | None:
    """The module that defines a function, or the class whose bound method it is."""
    return getattr(getattr(value, "__self__", value), "__module__", None)


def _rebind(path: str, old: object, new: object, original: object) -> None:
    for owner, name in list(_places(path, old, original)):
        setattr(owner, name, new)


def _name(owner: object) -> str:
    return owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with."""
    return tuple(int(number) for number in re.match(r"[\d.]*", version)[0].split(".") if number)
