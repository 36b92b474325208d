"""What a run came to: intervals, a short table, and the plot of its reward."""

from __future__ import annotations

import math
from pathlib import Path

from fuserl.engine import display, lookup, machine

_Z = 1.959964  # of a two-sided interval of 95 %
_EDGE = 8  # steps averaged at each end of a run
_BLUE, _ORANGE, _GREY = "#2f6fdb", "#d9610a", "#8b949e"
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": "#24292f",
    "axes.labelcolor": "#57606a",
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
}


def interval(correct: int, problems: int) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy p = correct / n (E. B. Wilson, JASA 1927).

    centre = (p + z^2 / 2n) / (1 + z^2 / n)        half = z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n)
    """
    p, n, square = correct / problems, problems, _Z**2
    centre = (p + square / (2 * n)) / (1 + square / n)
    half = _Z * math.sqrt(p * (1 - p) / n + square / (4 * n * n)) / (1 + square / n)
    # At the ends the bound is the end itself, which rounding would miss.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == problems else centre + half)


def rise_interval(before: dict, after: dict) -> tuple[float, float]:
    """Newcombe's 95 % interval of after - before, from two evaluations (Statistics in Medicine 1998, method 10).

    It treats the two as independent. Both are of the same problems, so the truth is rather narrower.
    """
    p, q = before["correct"] / before["problems"], after["correct"] / after["problems"]
    (p_low, p_high), (q_low, q_high) = (interval(each["correct"], each["problems"]) for each in (before, after))
    low = q - p - math.hypot(q - q_low, p_high - p)
    return low, q - p + math.hypot(q_high - q, p - p_low)


def summary(rows: list[dict]) -> list[tuple[str, str]]:
    """The final table, name and value, of a run's rows."""
    steps, tests = [row for row in rows if "reward" in row], [row for row in rows if "accuracy" in row]
    table = []
    if len(tests) > 1:
        before, after = tests[0], tests[-1]
        low, high = rise_interval(before, after)
        table += [
            ("held-out accuracy before", _with_interval(before)),
            ("held-out accuracy after", _with_interval(after)),
            ("rise", f"{after['accuracy'] - before['accuracy']:+.3f}  (95 %: {low:+.3f} to {high:+.3f})"),
        ]
    if steps:
        edge = min(_EDGE, max(1, len(steps) // 2))
        first, last = (_mean(row["reward"] for row in part) for part in (steps[:edge], steps[-edge:]))
        table.append((f"reward, first and last {edge} step{'s' if edge > 1 else ''}", f"{first:.3f} to {last:.3f}"))
        table += _speed(rows, steps)
    peak = ", ".join(f"{name} {value:.2f} GB" for name, value in machine.peak_memory().items())
    return [*table, ("peak memory", peak)]


def show(table: list[tuple[str, str]], folder: Path, plot: str) -> None:
    """Print the final table."""
    rich_table, console = lookup.package("rich.table", "engine"), lookup.package("rich.console", "engine")
    drawn = rich_table.Table(show_header=False, box=lookup.package("rich.box", "engine").SIMPLE_HEAD, pad_edge=False)
    drawn.add_column(style="bold", no_wrap=True)
    drawn.add_column(overflow="fold")
    for name, value in [*table, ("folder", str(folder)), ("plot", plot)]:
        drawn.add_row(name, value)
    console.Console(highlight=False).print(drawn)


def title(config) -> str:
    """The plot's title: what was trained on what."""
    model = Path(config.model).name if config.model else "SmolLM2-135M-Instruct"
    return f"{config.recipe} · {model} · {config.data or config.task}"


def plot(rows: list[dict], path: Path, title: str) -> str:
    """Draw reward per step and held-out accuracy with its intervals; return the path, or why there is no plot."""
    try:
        matplotlib = lookup.package("matplotlib", "tasks")
    except RuntimeError as error:
        return f"none: {error}"
    steps, tests = [row for row in rows if "reward" in row], [row for row in rows if "accuracy" in row]
    figure = lookup.package("matplotlib.figure", "tasks").Figure(figsize=(9, 4.8), layout="constrained")
    with matplotlib.rc_context(_STYLE):
        axes = figure.add_subplot()
        x, y = [row["step"] for row in steps], [row["reward"] for row in steps]
        axes.plot(x, y, ".-", color=_BLUE, alpha=0.3, linewidth=1, markersize=6, markeredgewidth=0, label="reward")
        axes.plot(x, smoothed(y), color=_BLUE, linewidth=2.4, solid_capstyle="round", label="reward, smoothed")
        # Accuracy is a share; it gets an axis of its own where the rewards are something else.
        apart = bool(tests) and not 0.0 <= min(y) <= max(y) <= 1.0
        right = axes.twinx() if apart else axes
        if tests:
            _draw_accuracy(right, tests)
        for each in {axes, right}:
            each.spines[["top"] if apart else ["top", "right"]].set_visible(False)
            each.spines[:].set_color(_GREY)
        axes.set_xmargin(0.08)
        axes.set(xlabel="step", ylabel="reward" if apart or not tests else "reward, accuracy")
        axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if tests or 0.0 <= min(y) <= max(y) <= 1.0:
            right.set_ylim(-0.02, 1.02)
        axes.set_title(title, loc="left", fontsize=11, pad=26, color="#24292f")
        handles = [handle for each in dict.fromkeys([axes, right]) for handle in each.get_legend_handles_labels()[0]]
        axes.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=3,
            frameon=False, borderaxespad=0.2, handlelength=1.6, columnspacing=1.6,
        )  # fmt: skip
        figure.savefig(path, dpi=150)
    return str(path)


def smoothed(values: list[float]) -> list[float]:
    """A centred mean over about a fifth of the run, narrower towards the ends."""
    half = max(1, len(values) // 10)
    reach = [min(half, at, len(values) - 1 - at) for at in range(len(values))]
    return [_mean(values[at - wide : at + wide + 1]) for at, wide in enumerate(reach)]


def _draw_accuracy(axes, tests: list[dict]) -> None:
    x, y = [row["step"] for row in tests], [row["accuracy"] for row in tests]
    below = [row["accuracy"] - row["accuracy_low"] for row in tests]
    above = [row["accuracy_high"] - row["accuracy"] for row in tests]
    axes.errorbar(
        x, y, yerr=[below, above], fmt="o", color=_ORANGE, markersize=7, markeredgecolor="white", elinewidth=1.4,
        capsize=3, label=f"held-out accuracy, greedy, {tests[-1]['problems']} problems (95 %)", zorder=5,
    )  # fmt: skip
    for row in (tests[0], tests[-1])[: len(tests)]:
        outside = {"ha": "right", "xytext": (-9, 0)} if row is tests[0] else {"ha": "left", "xytext": (9, 0)}
        axes.annotate(
            f"{row['accuracy']:.2f}", (row["step"], row["accuracy"]), textcoords="offset points", va="center",
            color=_ORANGE, fontweight="bold", zorder=6, **outside,
        )  # fmt: skip
    axes.set_ylabel("accuracy")


def _speed(rows: list[dict], steps: list[dict]) -> list[tuple[str, str]]:
    seconds = sum(row.get("seconds", 0.0) for row in steps)
    if not seconds:
        return []
    total = max(rows[-1].get("elapsed", 0.0), seconds)
    parts = {
        "generating": sum(row.get("generate_s", 0.0) for row in steps),
        "updating": sum(row.get("update_s", 0.0) for row in steps),
    }
    parts["evaluating and the rest"] = total - sum(parts.values())
    split = ", ".join(f"{name} {value / total:.0%}" for name, value in parts.items())
    return [
        ("tokens/s", f"{sum(row.get('tokens', 0) for row in steps) / seconds:,.0f}"),
        ("time", f"{display.clock(total)}  ({split})"),
    ]


def _with_interval(row: dict) -> str:
    low, high = interval(row["correct"], row["problems"])
    return f"{row['accuracy']:.3f}  ({row['correct']} of {row['problems']}; 95 %: {low:.3f} to {high:.3f})"


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)
