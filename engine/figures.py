"""Pictures of runs as matplotlib figures: one a panel for a page, all in one, and the one that every run keeps."""

from __future__ import annotations

import io
import math
import re
import warnings

from fuserl.engine import lookup, panels
from fuserl.engine.panels import PALETTE, SERIES, Panel, Runs

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": PALETTE["ink"],
    "axes.labelcolor": PALETTE["soft"],
    "xtick.color": PALETTE["soft"],
    "ytick.color": PALETTE["soft"],
    "svg.fonttype": "none",  # letters stay letters, in the font of the page
}
_LARGE, _SMALL = (5.6, 2.8), (4.5, 2.5)  # inches
_ACROSS = 3


def figures(runs: Runs, *, large: int = 2) -> list[tuple[Panel, object]]:
    """Every panel that the runs have metrics for, each with a matplotlib figure of it, in reading order.

    Titles and legends are not drawn: they are `panel.title`, `panel.note` and `panel.keys(prepared(runs))`.

    Args:
        runs: name -> rows of metrics.jsonl; several runs are drawn over one another, each in its own colour.
        large: how many of the first figures are larger than the rest.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    matplotlib, figure = lookup.package("matplotlib", "tasks"), lookup.package("matplotlib.figure", "tasks")
    runs, drawn = panels.prepared(runs), []
    with matplotlib.rc_context(STYLE):
        for panel in panels.present(runs):
            made = figure.Figure(figsize=_LARGE if len(drawn) < large else _SMALL, layout="constrained")
            panels.draw(panel, made.add_subplot(), runs)
            drawn.append((panel, made))
    return drawn


def overview(runs: Runs, title: str):
    """All panels in one figure, three in a row, with their titles and legends; raises as `figures`."""
    matplotlib, figure = lookup.package("matplotlib", "tasks"), lookup.package("matplotlib.figure", "tasks")
    runs = panels.prepared(runs)
    shown = panels.present(runs)
    across = min(_ACROSS, max(1, len(shown)))
    down = math.ceil(max(1, len(shown)) / across)
    with matplotlib.rc_context(STYLE):
        size = (4.8 * across, 2.9 * down + 0.8)
        made = figure.Figure(figsize=size, layout="constrained", facecolor=PALETTE["paper"])
        made.get_layout_engine().set(w_pad=0.16, h_pad=0.14)
        made.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold").set_parse_math(False)
        for at, panel in enumerate(shown):
            axes = made.add_subplot(down, across, at + 1)
            axes.set_facecolor(PALETTE["paper"])
            panels.draw(panel, axes, runs)
            keys = panel.keys(runs)
            axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold", pad=24 if keys else 8)
            _legend(axes, _handles(keys), 8)
        if len(runs) > 1:
            named = _handles([(name[-32:], SERIES[place % len(SERIES)], "-") for place, name in enumerate(runs)])
            for text in made.legend(handles=named, loc="outside lower left", ncols=5, frameon=False).get_texts():
                text.set_parse_math(False)
    return made


def reward(rows: list[dict], title: str):
    """One run at a glance: its reward (or else its loss) per step, and held-out accuracy; raises as `figures`."""
    matplotlib, figure = lookup.package("matplotlib", "tasks"), lookup.package("matplotlib.figure", "tasks")
    [rows] = panels.prepared({"": rows}).values()
    made = figure.Figure(figsize=(9, 4.8), layout="constrained")
    metric = next((name for name in ("reward", "pair_accuracy", "nll", "loss") if any(name in row for row in rows)), "")
    tests = [row for row in rows if math.isfinite(row.get("accuracy", math.nan))]
    x, y = panels.points(rows, metric)
    share = all(0.0 <= value <= 1.0 for value in y if math.isfinite(value))
    apart = bool(tests) and not share  # accuracy is a share; it gets an axis of its own where the rewards are not
    with matplotlib.rc_context({**STYLE, "font.size": 10}):
        axes = made.add_subplot()
        right = axes.twinx() if apart else axes
        for each in {axes, right}:
            panels.dress(each)
        if metric:
            faint = {"alpha": 0.3, "linewidth": 1, "markersize": 6, "markeredgewidth": 0}
            axes.plot(x, y, ".-", color=PALETTE["blue"], label=metric, **faint)
            bold = {"linewidth": 2.4, "solid_capstyle": "round"}
            axes.plot(x, panels.smoothed(y), color=PALETTE["blue"], label=f"{metric}, smoothed", **bold)
        if tests:
            count = f", {tests[-1]['problems']:g} problems" if "problems" in tests[-1] else ""
            panels.accuracies(right, tests, "orange", f"held-out accuracy, greedy{count} (95 %)")
        axes.set_xmargin(0.08)
        axes.set(xlabel="step", ylabel=metric if apart or not tests else f"{metric}, accuracy".removeprefix(", "))
        if apart:
            right.grid(visible=False)
            right.set_ylabel("accuracy")
        if tests or share:
            right.set_ylim(-0.02, 1.02)
        axes.set_title(title, loc="left", fontsize=11, pad=26).set_parse_math(False)
        _legend(axes, [one for each in dict.fromkeys([axes, right]) for one in each.get_legend_handles_labels()[0]], 10)
    return made


def svg(figure, name: str) -> str:
    """A figure as an SVG element to put into a page, without addresses, in the colours and the font of the page.

    The colours of the palette become CSS variables of their names, so that a page can have a dark face too.

    Args:
        figure: a matplotlib figure.
        name: what tells its inner ids from those of the other figures on the page.
    """
    saved = _saved(figure, {"svg.hashsalt": name}, format="svg", transparent=True, metadata={"Date": None}).decode()
    drawn = saved[saved.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", drawn, flags=re.DOTALL)
    wide, high = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn).groups()
    drawn = re.sub(r"<svg[^>]*>", f'<svg viewBox="0 0 {wide} {high}" role="img">', drawn, count=1)
    drawn = re.sub(r' font-family: [^;"]*;', "", drawn.replace("xlink:href", "href"))
    drawn = re.sub(r'font: ([\d.]+px) [^;"]*', r"font-size: \1", drawn)  # as matplotlib wrote it before 3.10
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn)
    for colour, value in PALETTE.items():
        drawn = drawn.replace(value, f"var(--{colour})")
    return re.sub(r"\s*\n\s*", " ", drawn).strip()


def png(figure, dots: int = 150) -> bytes:
    """A figure as the bytes of a PNG image of so many dots an inch."""
    return _saved(figure, {}, format="png", dpi=dots)


def _saved(figure, style: dict, **options) -> bytes:
    matplotlib, data = lookup.package("matplotlib", "tasks"), io.BytesIO()
    with matplotlib.rc_context({**STYLE, **style}), warnings.catch_warnings():
        # A run may be called in letters that the font lacks; they are drawn as boxes.
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from font")
        figure.savefig(data, **options)
    return data.getvalue()


def _handles(keys: list[tuple[str, str, str]]) -> list:
    lines = lookup.package("matplotlib.lines", "tasks")
    return [
        lines.Line2D([], [], color=PALETTE[colour], linestyle=dash, linewidth=2, label=label)
        for label, colour, dash in keys
    ]


def _legend(axes, handles: list, size: float) -> None:
    if not handles:
        return
    legend = axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=min(len(handles), 6),
        frameon=False, borderaxespad=0.2, handlelength=1.3, handletextpad=0.5, columnspacing=1.2, fontsize=size,
    )  # fmt: skip
    legend.set_in_layout(False)  # a wide one would push its neighbours away
    for text in legend.get_texts():
        text.set_parse_math(False)
