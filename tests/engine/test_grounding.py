"""Grounding: what is an interval or boxes, and intersections over unions counted by hand."""

import pytest

from fuserl.engine.grounding import boxes, interval, mean_iou, temporal_iou


@pytest.mark.parametrize(
    ("text", "found"),
    [("2-5", (2, 5)), (" 1.5 - 3\n", (1.5, 3)), ("5-2", None), ("2-2", None), ("from 2-5", None), ("", None)],
)
def test_intervals(text, found):
    assert interval(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0:1,1,3,3", {0: (1, 1, 3, 3)}),
        ("0:1,1,3,3 2:0,0,1.5,2", {0: (1, 1, 3, 3), 2: (0, 0, 1.5, 2)}),
        ("0:1,1,1,3", None),
        ("0:1,1,3", None),
        ("", None),
    ],
)
def test_boxes(text, found):
    assert boxes(text) == found


def test_intersections_over_unions():
    assert temporal_iou((0, 4), (2, 6)) == pytest.approx(2 / 6) and temporal_iou((0, 1), (2, 3)) == 0
    assert temporal_iou((1, 3), (1, 3)) == 1 and temporal_iou(None, (1, 2)) == 0
    one = {0: (0, 0, 2, 2), 1: (0, 0, 2, 2)}
    assert mean_iou(one, one) == 1 and mean_iou(one, None) == 0
    assert mean_iou(one, {0: (1, 0, 3, 2)}) == pytest.approx(2 / 6 / 2)  # the frame without a box counts
    assert mean_iou(one, {5: (0, 0, 2, 2)}) == 0
