"""How well a text says when, or where, something is: intersections over unions of intervals and of boxes."""

from __future__ import annotations

import re

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_INTERVAL = re.compile(rf"{_NUMBER}\s*-\s*{_NUMBER}")
_BOX = re.compile(rf"(\d+):{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}")

Interval = tuple[float, float]
Boxes = dict[int, tuple[float, float, float, float]]


def interval(text: str) -> Interval | None:
    """The interval that a text is, `begin-end` with begin < end; None where it is none."""
    found = _INTERVAL.fullmatch(text.strip())
    begin, end = map(float, found.groups()) if found else (0.0, 0.0)
    return (begin, end) if begin < end else None


def boxes(text: str) -> Boxes | None:
    """The boxes that a text is, `frame:x1,y1,x2,y2` with spaces between; None where it is none, or one is empty."""
    found = [_BOX.fullmatch(part) for part in text.split()]
    if not found or None in found:
        return None
    given = {int(each[1]): tuple(map(float, each.groups()[1:])) for each in found}
    return given if all(_area(box) > 0 for box in given.values()) else None


def temporal_iou(first: Interval | None, second: Interval | None) -> float:
    """Intersection over union of two intervals, 0 to 1; 0 where one is None."""
    if first is None or second is None:
        return 0.0
    shared = max(0.0, min(first[1], second[1]) - max(first[0], second[0]))
    return shared / (first[1] - first[0] + second[1] - second[0] - shared)


def mean_iou(first: Boxes | None, second: Boxes | None) -> float:
    """The mean over all frames that either names of the boxes' intersection over union, 0 where one has no box."""
    if first is None or second is None:
        return 0.0
    frames = first.keys() | second.keys()
    return sum(_iou(first[each], second[each]) for each in first.keys() & second.keys()) / len(frames)


def _iou(a: tuple, b: tuple) -> float:
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return shared / (_area(a) + _area(b) - shared)


def _area(box: tuple) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])
