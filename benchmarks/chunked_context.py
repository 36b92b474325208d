"""Draws chunked context against full attention: time and memory as the thinking grows, from the measured rows.

    fuserl bench chunked_context --save
    python benchmarks/chunked_context.py

Writes results/chunked_context.png, of the device that was measured last.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from fuserl.engine import figures, lookup, panels

RESULTS = Path(__file__).resolve().parent / "results"
CASE = r"test_chunked_context_attention_forward_backward\[(\d+)\]"
PANELS = (("median_s", "seconds, forward and backward"), ("peak_mb", "peak memory in MB"))


def series(rows: list[dict]) -> dict[str, dict[int, dict]]:
    """The newest row by provider and new tokens of thinking, of the device that has the last one.

    Raises:
        ValueError: there is no row of the benchmark.
    """
    rows = [row for row in rows if re.fullmatch(CASE, row.get("case", "")) and not row["reason"]]
    if not rows:
        raise ValueError(
            "series: rows must hold some of chunked_context_attention; got none. Run: fuserl bench chunked_context "
            "--save"
        )
    found: dict[str, dict[int, dict]] = {}
    for row in rows:
        if row["device"] == rows[-1]["device"]:
            found.setdefault(row["provider"], {})[int(re.fullmatch(CASE, row["case"])[1])] = row
    return found


def growth(of: dict[int, dict], metric: str) -> float:
    """The power of the length by which a metric grows between the two longest ones: 1 is linear, 2 quadratic."""
    before, after = sorted(of)[-2:]
    return math.log(of[after][metric] / of[before][metric]) / math.log(after / before)


def picture(rows: list[dict]):
    """A matplotlib figure of both metrics on logarithmic axes; raises as `series`."""
    matplotlib, made = lookup.package("matplotlib", "tasks"), lookup.package("matplotlib.figure", "tasks")
    found = series(rows)
    with matplotlib.rc_context(figures.STYLE):
        figure = made.Figure(figsize=(9, 3.4), layout="constrained", facecolor=panels.PALETTE["paper"])
        for at, (metric, label) in enumerate(PANELS):
            axes = figure.add_subplot(1, 2, at + 1)
            panels.dress(axes)
            for colour, (provider, of) in zip(("orange", "blue"), found.items(), strict=False):
                lengths = sorted(length for length in of if of[length][metric])
                values = [of[length][metric] for length in lengths]
                power = f", as its power {growth(of, metric):.1f}" if len(lengths) > 1 else ""
                axes.loglog(lengths, values, "o-", color=panels.PALETTE[colour], label=f"{provider}{power}")
            axes.set_xticks(lengths, [f"{length:,}" for length in lengths], minor=False)
            axes.minorticks_off()
            axes.set(xlabel="new tokens of thinking", ylabel=label)
            axes.legend(frameon=False)
    return figure


def main() -> None:
    """Write the picture."""
    rows = [json.loads(line) for path in sorted(RESULTS.glob("*.jsonl")) for line in path.read_text().splitlines()]
    (RESULTS / "chunked_context.png").write_bytes(figures.png(picture(rows)))


if __name__ == "__main__":
    main()
