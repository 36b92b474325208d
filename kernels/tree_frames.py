"""Plans of tree_decode that stay where they are, for passes that are recorded once and replayed, as CUDA graphs are.

A recorded pass launches again what it launched: as many programs, on the same arrays. So the plan of each pass is
written over the last one's, into arrays with room for more: items beyond its own have no members, and queries beyond
its own see nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from fuserl.kernels.tree_lines import Lines, Plan

_ALIGNED = 4  # int32 of 16 bytes: where an array begins changes nothing that Triton compiles


class FixedLines:
    """Stands for the `Lines` of one pass after another.

    Args:
        queries: of a pass, those that see nothing included.
        device: of the arrays.
    """

    def __init__(self, queries: int, device: torch.device):
        self._queries, self._device = queries, device
        self._frames: dict[int | None, _Frame] = {}

    def take(self, lines: Lines, windows: Iterable[int | None]) -> bool:
        """Let the plan of every window be that of these lines; False, with any of them, where one outgrows its room."""
        for window in windows:
            plan = lines.plan(window)
            if window not in self._frames:
                self._frames[window] = _Frame(plan, self._queries, self._device)
            if not self._frames[window].fits(plan):
                return False
            self._frames[window].write(plan)
        return True

    def plan(self, window: int | None) -> Plan:
        """That of a window which was taken; the same ever after."""
        return self._frames[window].plan


class _Frame:
    """The arrays of a plan and of those after it, end to end, so that one copy brings all of them to a device."""

    def __init__(self, plan: Plan, queries: int, device: torch.device):
        item, member, *_, page = plan.arrays
        items, pairs, pages = (_room(len(x)) for x in (item, member, page))
        sizes = (5 * items, pairs, pairs, queries + 1, queries, pages)
        ends = list(itertools.accumulate(size + -size % _ALIGNED for size in sizes))
        self._host = torch.zeros(ends[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
        self._there = torch.zeros_like(self._host, device=device)
        begins = [0, *ends[:-1]]
        self._parts, fixed = (_parts(x, begins, sizes) for x in (self._host, self._there))
        self.plan = Plan(tuple(fixed), _room(plan.most))

    def fits(self, plan: Plan) -> bool:
        """Whether there is room."""
        lengths = zip(plan.arrays, self.plan.arrays, strict=True)
        return plan.most <= self.plan.most and all(len(x) <= len(room) for x, room in lengths)

    def write(self, plan: Plan) -> None:
        """Replaces what was there; the copy from the host has ended when what the last pass gave was read."""
        self._host.zero_()
        for part, x in zip(self._parts, plan.arrays, strict=True):
            part[: len(x)] = x
        bounds = plan.arrays[3]
        self._parts[3][len(bounds) :] = bounds[-1]
        self._there.copy_(self._host, non_blocking=True)


def _parts(x: Tensor, begins: list[int], sizes: tuple[int, ...]) -> list[Tensor]:
    item, *others = (x[begin : begin + size] for begin, size in zip(begins, sizes, strict=True))
    return [item.view(-1, 5), *others]


def _room(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length() if count else 0
