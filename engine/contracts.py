"""How what a caller may not give is refused: in one sentence."""

from __future__ import annotations

from collections.abc import Iterable

from fuserl.engine import lookup

WEIGHT = "a finite number >= 0"
BOUND = "a number >= 0; inf bounds nothing"


def require(function: str, name: str, value: object, good: bool, contract: str) -> None:
    """Raise ValueError that `name` of `function` must be `contract`, unless the value is `good`."""
    if not good:
        raise ValueError(f"{function}: {name} must be {contract}; got {value}. Correct the number.")


def numbers(function: str, name: str, text: str, kind: type = float) -> list:
    """The numbers, of a kind, of an option that has several in its text; ValueError where one is none."""
    try:
        return [kind(each) for each in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{function}: {name} must be numbers, separated by commas; got {text!r}. {error}.") from error


def require_one_of(function: str, name: str, value: str, known: Iterable[str]) -> None:
    """Raise ValueError that `name` of `function` must be one of `known`, unless the value is."""
    known = list(known)
    if value not in known:
        raise ValueError(
            f"{function}: {name} must be one of {', '.join(known)}; got {value!r}. {lookup.nearest(value, known)}"
        )


def one_token(name: str, tokenizer, text: str) -> int:
    """The id of the token that a text is; ValueError that `name` must be one where it is none, or several."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"{name}: it must be one token; {text!r} is {len(ids)}. Name a token of the tokenizer.")
    return int(ids[0])
