"""The picture of chunked context against full attention: the rows it is drawn from, and that it is drawn."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import chunked_context

from fuserl.engine import figures


def row(thinking, provider, seconds, device="here", reason=None):
    case = f"test_chunked_context_attention_forward_backward[{thinking}]"
    return dict(case=case, provider=provider, median_s=seconds, peak_mb=seconds, device=device, reason=reason)


ROWS = [
    row(9, "fuserl, chunks", 1.0, device="elsewhere"), row(1024, "fuserl, chunks", 9.0),
    *(row(n, "one context", (n / 1024) ** 2) for n in (1024, 2048, 4096)),
    *(row(n, "fuserl, chunks", n / 1024) for n in (1024, 2048, 4096)),
    row(1024, "broken", 0.0, reason="wrong"), {"case": "test_gae"}, {"op": "gae"},
]  # fmt: skip


def test_the_newest_rows_of_one_device():
    found = chunked_context.series(ROWS)
    assert sorted(found) == ["fuserl, chunks", "one context"]
    assert all(sorted(of) == [1024, 2048, 4096] for of in found.values())
    assert found["fuserl, chunks"][1024]["median_s"] == 1.0
    assert chunked_context.growth(found["fuserl, chunks"], "median_s") == pytest.approx(1)
    assert chunked_context.growth(found["one context"], "peak_mb") == pytest.approx(2)
    with pytest.raises(ValueError, match="rows must hold some of chunked_context_attention"):
        chunked_context.series(ROWS[-2:])


def test_it_is_drawn():
    figure = chunked_context.picture(ROWS)
    assert [line.get_label() for line in figure.axes[0].lines] == [
        "fuserl, chunks, as its power 1.0", "one context, as its power 2.0",
    ]  # fmt: skip
    assert figures.png(figure).startswith(b"\x89PNG")
