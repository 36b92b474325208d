"""Which keys each query of tree_decode sees, as the integer arrays that its kernels walk along.

A query sees its line, a segment and all above it, up to its own position. Keys are read in stretches of one segment:
all queries that see a stretch read it together, in items of at most _TOGETHER of them, and what each query found in its
stretches is added from the root down. Where a stretch ends follows from the segment alone, never from who reads it.
"""

from __future__ import annotations

import array
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_NAME = "tree_decode"
NO_WINDOW = 2**31 - 1
PAGE = 64  # rows
_SPLIT = 512  # keys, a multiple of PAGE
_TOGETHER = 64  # queries


@dataclass(frozen=True, eq=False)
class Plan:
    """Stretches of keys and who sees them: item, member, slot, bounds, last, page: `DecodePlan` of csrc/ops.h.

    most: queries of one item.
    """

    arrays: tuple[Tensor, ...]
    most: int


@dataclass(frozen=True, eq=False)
class Lines:
    """B queries and what each sees, made once for all layers of a model; integers on the host.

    Args:
        parent, start, length: (S,) the segment that each one continues, its first row and its tokens.
        leaf, last: (B,) the segment at the end of each query's line, and the query's position in that text.
        page: (M,) row r of a segment is row r % PAGE of the storage's PAGE rows number page[r // PAGE]; none: row r.
    """

    parent: tuple[int, ...]
    start: tuple[int, ...]
    length: tuple[int, ...]
    leaf: tuple[int, ...]
    last: tuple[int, ...]
    page: tuple[int, ...] = ()
    _plans: dict = field(default_factory=dict, repr=False)

    def line(self, segment: int) -> list[int]:
        """A segment and its ancestors, from the root down."""
        found = []
        while segment >= 0:
            found.append(segment)
            segment = self.parent[segment]
            if len(found) > len(self.parent):
                raise ValueError(
                    f"{_NAME}: parent must lead from every segment to a root; got a circle at {segment}. Use -1 for a "
                    "root."
                )
        return found[::-1]

    def rows(self, query: int, window: int | None) -> Tensor:
        """The rows of the storage that a query sees, in their order."""
        line = self.line(self.leaf[query])
        rows = torch.cat([torch.arange(self.start[s], self.start[s] + self.length[s]) for s in line])
        end = self.last[query] + 1
        rows = rows[max(0, end - (window or NO_WINDOW)) : end]
        return torch.tensor(self.page)[rows // PAGE] * PAGE + rows % PAGE if self.page else rows

    def plan(self, window: int | None) -> Plan:
        """What the kernels want, for the layers with this window."""
        if window not in self._plans:
            self._plans[window] = self._planned(window)
        return self._plans[window]

    @property
    def windows(self) -> list[int | None]:
        """Those that plans were wanted for."""
        return list(self._plans)

    def _planned(self, window: int | None) -> Plan:
        base: dict[int, int] = {}
        members: dict[int, list[int]] = {}
        above: dict[int, list[int]] = {}
        for query, segment in enumerate(self.leaf):
            if segment not in above:
                above[segment] = self.line(segment)
                for up, s in itertools.pairwise([-1, *above[segment]]):
                    base[s] = base[up] + self.length[up] if up >= 0 else 0
            for s in above[segment]:
                members.setdefault(s, []).append(query)
        last, items, member, most = self.last, [], [], 0
        seen: list[list[int]] = [[] for _ in last]
        stretches = [(base[s] + at, s, at) for s in members for at in range(0, self.length[s], _SPLIT)]
        for place, s, at in sorted(stretches):
            keys = min(_SPLIT, self.length[s] - at)
            far = NO_WINDOW if window is None else place + keys - 1 + window
            near = [query for query in members[s] if place <= last[query] < far]
            for begin in range(0, len(near), _TOGETHER):
                some = near[begin : begin + _TOGETHER]
                # No row that none of them sees is read: what a text has not reached yet may be anything.
                reached = max(last[query] for query in some) + 1 - place
                items += (self.start[s] + at, min(keys, reached), place, len(member), len(member) + len(some))
                most = max(most, len(some))
                for query in some:
                    seen[query].append(len(member))
                    member.append(query)
        bounds = [0, *itertools.accumulate(map(len, seen))]
        slot = [pair for pairs in seen for pair in pairs]
        item, *others = map(_int32, (items, member, slot, bounds, last, self.page))
        return Plan((item.view(-1, 5), *others), most)


def _int32(numbers: Sequence[int]) -> Tensor:
    """A third of the time that torch.tensor takes, for every pass that decodes."""
    return (
        torch.frombuffer(array.array("i", numbers), dtype=torch.int32) if numbers else torch.empty(0, dtype=torch.int32)
    )


@functools.lru_cache(maxsize=16)
def lines(parent, start, length, leaf, position, page, rows: int) -> Lines:
    """`Lines` of tuples, checked; every layer of a model asks for the same: those of the last few calls are kept.

    Args:
        position: (B,) or None, the end of each query's line.
        rows: of the storage.

    Raises:
        ValueError: on a segment, query or page that is not there.
    """
    _check(parent, start, length, leaf, page, rows)
    found = Lines(parent, start, length, leaf, (), page)
    ends = [sum(length[s] for s in found.line(segment)) for segment in leaf]
    if position is None:
        position = tuple(end - 1 for end in ends)
    elif len(position) != len(leaf) or not all(-1 <= at < end for at, end in zip(position, ends, strict=True)):
        raise ValueError(
            f"{_NAME}: position must be one for each of {len(leaf)} queries, below the length of its line; got "
            f"{len(position)} for lines of {ends[:8]}. Store a query's own key first."
        )
    return Lines(parent, start, length, leaf, position, page)


def _check(parent, start, length, leaf, page, rows: int) -> None:
    if not len(parent) == len(start) == len(length):
        raise ValueError(
            f"{_NAME}: segments must be three arrays of one length; got {len(parent)}, {len(start)} and {len(length)}. "
            "Name the parent, the first row and the tokens of each."
        )
    if page and not 0 <= PAGE * min(page) <= PAGE * max(page) <= rows - PAGE:
        raise ValueError(
            f"{_NAME}: page must number the {rows // PAGE} pages of {PAGE} rows that the storage has; got {min(page)} "
            f"to {max(page)}. Check the sizes of the cache."
        )
    held = PAGE * len(page) if page else rows
    for segment, (up, first, size) in enumerate(zip(parent, start, length, strict=True)):
        if not -1 <= up < len(parent) or first < 0 or size < 0 or first + size > held or (page and first % PAGE):
            raise ValueError(
                f"{_NAME}: segments must continue one of {len(parent)}, or -1, in rows 0 to {held}, paged ones from a "
                f"multiple of {PAGE} on; got parent {up}, start {first} and length {size} for segment {segment}. Check "
                "the sizes of the cache."
            )
    if not all(0 <= segment < len(parent) for segment in leaf):
        raise ValueError(f"{_NAME}: leaf must name segments 0 to {len(parent) - 1}; got {min(leaf)} to {max(leaf)}.")
