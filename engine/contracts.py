"""How a number that a caller may not give is refused: in one sentence."""

from __future__ import annotations

WEIGHT = "a finite number >= 0"
BOUND = "a number >= 0; inf bounds nothing"


def require(function: str, name: str, value: object, good: bool, contract: str) -> None:
    """Raise ValueError that `name` of `function` must be `contract`, unless the value is `good`."""
    if not good:
        raise ValueError(f"{function}: {name} must be {contract}; got {value}. Correct the number.")
