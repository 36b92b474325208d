"""How a number that a caller may not give is refused: in one sentence."""

from __future__ import annotations

from collections.abc import Iterable

from fuserl.engine import lookup

WEIGHT = "a finite number >= 0"
BOUND = "a number >= 0; inf bounds nothing"


def require(function: str, name: str, value: object, good: bool, contract: str) -> None:
    """Raise ValueError that `name` of `function` must be `contract`, unless the value is `good`."""
    if not good:
        raise ValueError(f"{function}: {name} must be {contract}; got {value}. Correct the number.")


def require_one_of(function: str, name: str, value: str, known: Iterable[str]) -> None:
    """Raise ValueError that `name` of `function` must be one of `known`, unless the value is."""
    known = list(known)
    if value not in known:
        raise ValueError(
            f"{function}: {name} must be one of {', '.join(known)}; got {value!r}. {lookup.nearest(value, known)}"
        )
