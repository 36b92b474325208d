"""What the numerics page tries an op on: the form of every entry, and the sizes that families of ops share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

VOCABULARY, WIDTH = 32768, 256
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Subject:
    """An op, what it is tried on, and its outputs by name.

    Args:
        inputs: (kind, rows) -> float32 and integer tensors.
        run: (backend, *inputs) -> outputs of the op.
        eager: (*inputs) -> the same outputs by plain torch.
        implemented: the op's backends.
        kinds: names of inputs, and what they are.
        dtypes: that the op takes.
    """

    inputs: Callable
    run: Callable
    eager: Callable
    implemented: dict
    kinds: dict[str, str]
    dtypes: tuple[torch.dtype, ...] = FLOATS
