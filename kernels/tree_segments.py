"""Segments of tokens, each continuing an earlier text or none, as the integer arrays that attention walks along.

    p0 p1 p2 | a0 a1 | b0 b1 b2 | q0 q1 | c0 c1        parent -1 0 0 -1 3: a1 sees p0 p1 p2 a0 a1, c1 sees q0 q1 c0 c1

In preorder (a segment, then each child with all of its own) what sees a token stands in one stretch after it:

    query i sees key j    iff    j <= i < last[j]

so that no table of pairs is ever built, and every array is linear in tokens or in segments.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

_NAME = "tree_attention"


class Rule(NamedTuple):
    """The numbers of a call of tree_attention."""

    scale: float
    window: int | None
    softcap: float | None


class Saved(NamedTuple):
    """What its backward has of the forward, tokens in preorder; lse is (L, 2, H), rounded and what rounding took."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


@dataclass(frozen=True, eq=False)
class Layout:
    """S segments of L tokens in preorder, on the host; int32 unless said.

    Args:
        parent: (S,) the segment that each one continues, -1 for a root.
        start: (S + 1,) the first token of each, and the end of the last.
        last: (L,) the token after the last one that sees this one.
        position: (L,) of each token in its own text.
        order: (L,) int64, where each token stands in the caller's order; None where that is preorder.
        depth: (S,) ancestors of each.
    """

    parent: Tensor
    start: Tensor
    last: Tensor
    position: Tensor
    order: Tensor | None
    depth: Tensor
    _elsewhere: dict = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> int:
        """L."""
        return len(self.last)

    def on(self, name: str, device: torch.device) -> Tensor:
        """One of the arrays on `device`, copied there once."""
        if (name, device) not in self._elsewhere:
            self._elsewhere[name, device] = getattr(self, name).to(device, non_blocking=True)
        return self._elsewhere[name, device]

    def gathered(self, x: Tensor) -> Tensor:
        """Rows of tokens in preorder."""
        return x if self.order is None else x[self.on("order", x.device)]

    def scattered(self, x: Tensor) -> Tensor:
        """Rows of tokens back in the caller's order."""
        if self.order is None:
            return x
        out = torch.empty_like(x)
        out[self.on("order", x.device)] = x
        return out

    def owner(self) -> Tensor:
        """(L,) int64, the segment of each token."""
        return torch.repeat_interleave(torch.arange(len(self.parent)), self.start.diff().long())


def arrays(segments) -> tuple[Tensor, Tensor]:
    """(parent, length), int64 (S,) on the host, of a pair of them or of what has attributes of these names.

    Raises:
        ValueError: they are not two rows of integers of one length on the host.
    """
    given = (segments.parent, segments.length) if hasattr(segments, "parent") else tuple(segments)
    if len(given) != 2:
        raise ValueError(f"{_NAME}: segments must be (parent, length); got {len(given)} arrays. Give one of each.")
    parent, length = (torch.as_tensor(x, dtype=torch.int64) for x in given)
    if parent.dim() != 1 or parent.shape != length.shape or not parent.device.type == length.device.type == "cpu":
        raise ValueError(
            f"{_NAME}: segments must be two (S,) arrays on the host; got {tuple(parent.shape)} on {parent.device} and "
            f"{tuple(length.shape)} on {length.device}. Keep the sizes where they were made."
        )
    return parent, length


def layout(parent: Tensor, length: Tensor) -> Layout:
    """The arrays of a forest; those of the last few are kept, for every layer of a model asks for the same.

    Raises:
        ValueError: a parent that is no segment, a segment among its own ancestors, or a negative length.
    """
    return _layout(tuple(parent.tolist()), tuple(length.tolist()))


@functools.lru_cache(maxsize=16)
def _layout(parent: tuple[int, ...], length: tuple[int, ...]) -> Layout:
    _check(parent, length)
    preorder = _preorder(parent)
    place = {segment: at for at, segment in enumerate(preorder)}
    up = [place[parent[segment]] if parent[segment] >= 0 else -1 for segment in preorder]
    sizes = [length[segment] for segment in preorder]
    start = [0]
    for size in sizes:
        start.append(start[-1] + size)
    base, depth, end = [0] * len(up), [0] * len(up), start[1:]
    for at, parent_at in enumerate(up):
        if parent_at >= 0:
            base[at] = base[parent_at] + sizes[parent_at]
            depth[at] = depth[parent_at] + 1
    for at in reversed(range(len(up))):
        if up[at] >= 0:
            end[up[at]] = max(end[up[at]], end[at])
    counts = torch.tensor(sizes, dtype=torch.int64)

    def each(values: Sequence[int]) -> Tensor:
        return torch.repeat_interleave(torch.tensor(values, dtype=torch.int32), counts)

    token = torch.arange(start[-1], dtype=torch.int32)
    order = None
    if preorder != sorted(preorder):
        given = torch.tensor([0, *length]).cumsum(0)
        begin = torch.repeat_interleave(given[torch.tensor(preorder)], counts)
        order = begin + (token - each(start[:-1]))
    numbers = (torch.tensor(x, dtype=torch.int32) for x in (up, start))
    return Layout(
        *numbers, each(end), each(base) + token - each(start[:-1]), order, torch.tensor(depth, dtype=torch.int32)
    )


def _preorder(parent: tuple[int, ...]) -> list[int]:
    """The segments, each followed by its children with all of theirs, siblings in the given order."""
    children: list[list[int]] = [[] for _ in parent]
    waiting = []
    for segment in reversed(range(len(parent))):
        (children[parent[segment]] if parent[segment] >= 0 else waiting).append(segment)
    found = []
    while waiting:
        found.append(waiting.pop())
        waiting += children[found[-1]]
    if len(found) < len(parent):
        lost = min(set(range(len(parent))) - set(found))
        raise ValueError(
            f"{_NAME}: parent must lead from every segment to a root; got a circle at {lost}. Use -1 for a root."
        )
    return found


def _check(parent: tuple[int, ...], length: tuple[int, ...]) -> None:
    for segment, (up, size) in enumerate(zip(parent, length, strict=True)):
        if not -1 <= up < len(parent):
            raise ValueError(
                f"{_NAME}: parent must name one of {len(parent)} segments, or be -1; got {up} for segment {segment}. "
                "Number the segments as they are laid out."
            )
        if size < 0:
            raise ValueError(
                f"{_NAME}: length must not be negative; got {size} for segment {segment}. Use 0 for an empty one."
            )
    if sum(length) >= 2**31:
        raise ValueError(f"{_NAME}: length must sum to less than 2^31; got {sum(length)}. Split the batch.")
