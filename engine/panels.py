"""What a run can be asked, one panel a question: which metrics answer it, and how they are drawn into axes.

A panel is there when a run has its metrics. Several runs are drawn over one another, a colour each; a null (JSON has
no NaN or infinity) is a gap in its line.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fuserl.engine import lookup

# By name, so that a page can put colours of its own in their place.
PALETTE = {
    "ink": "#1f2429", "soft": "#5c6670", "axis": "#9aa3ac", "rule": "#e4e7eb", "paper": "#fefefd",
    "blue": "#2f6fdb", "orange": "#d9610a", "green": "#1a8f6b", "purple": "#8456c9", "red": "#c93a4b",
    "teal": "#2596ae", "ochre": "#a8820f", "slate": "#76808b",
}  # fmt: skip
SERIES = ("blue", "orange", "green", "purple", "red", "teal", "ochre", "slate")
DASHES = ("-", "--", ":", "-.")
_MOST = 320  # points of a line; more are averaged in bins
_PHASES = {
    "generate_s": "generate", "reward_s": "reward", "score_s": "score", "update_s": "update", "other_s": "other",
    "save_s": "save", "eval_s": "evaluate",
}  # fmt: skip
_OTHERS = 24  # panels of metrics that only one recipe or reward has
_FAR = 1e30  # beyond what axes can be laid out for
_UNDRAWN = {"step", "seconds", "elapsed", "tokens", "skipped", "staleness", "ahead_s"}
_EVALUATION = {
    "step", "accuracy", "accuracy_low", "accuracy_high", "problems", "correct", "samples", "eval_s", "elapsed",
    "host_gb", "gpu_gb",
}  # fmt: skip

Runs = Mapping[str, list[dict]]  # name -> rows of metrics.jsonl


@dataclass(frozen=True)
class Panel:
    """One question: its title, the metrics that answer it with their labels, and how the axes behave."""

    name: str
    title: str
    note: str  # what the numbers are
    series: Mapping[str, str]  # metric -> label
    section: str
    share: bool = False  # a share: from 0 to 1
    zero: bool = False  # from 0 where nothing is negative
    log: bool = False  # logarithmic where everything is positive and spans decades
    smooth: bool = True
    draw: Callable | None = field(default=None, repr=False)  # (panel, axes, runs); None draws lines

    def labels(self, runs: Runs) -> dict[str, str]:
        """The metrics of this panel that some run has a number for, with their labels, in order."""
        found = {name for rows in runs.values() for row in rows for name in row if _has(row, name)}
        listed = {name: label for name, label in self.series.items() if name in found}
        if "pass@k" in self.series:
            tries = sorted(int(name[5:]) for name in found if re.fullmatch(r"pass@\d{1,9}", name))
            # One try each is legible for one run; between runs the most tries tell most.
            listed |= {f"pass@{k}": f"pass@{k}" for k in (tries if len(runs) == 1 else tries[-1:])}
        return listed

    def keys(self, runs: Runs) -> list[tuple[str, str, str]]:
        """The legend: label, colour name and dash of each series; empty where there is nothing to tell apart."""
        labels = list(self.labels(runs).values())
        if len(labels) < 2:
            return []
        if len(runs) > 1 and self.draw is not _time:
            return [(label, "soft", DASHES[turn % len(DASHES)]) for turn, label in enumerate(labels)]
        return [(label, SERIES[turn % len(SERIES)], "-") for turn, label in enumerate(labels)]


def present(runs: Runs) -> list[Panel]:
    """The panels that the prepared rows have numbers for, in reading order; last what no panel was made for."""
    found = {name: None for rows in runs.values() for row in rows for name in row if _has(row, name)}
    known = {name for panel in PANELS for name in panel.series} | _UNDRAWN | _EVALUATION
    others = [name for name in found if name not in known and not name.startswith("pass@")]
    made = [
        Panel(f"other{at}", name[:1].upper() + name[1:].replace("_", " "), "", {name: ""}, "more", zero=True)
        for at, name in enumerate(others[:_OTHERS])
    ]
    return [panel for panel in PANELS if panel.labels(runs)] + made


def is_evaluation(row: dict) -> bool:
    """Whether a row of metrics is an evaluation, and not a step."""
    return any(name in row for name in ("accuracy", "problems", "eval_s"))


def prepared(runs: Runs) -> dict[str, list[dict[str, float]]]:
    """The rows with their numbers only, tokens per second added.

    Null, and what is too large for an axis, become NaN; rows without a step are left out. What an evaluation measures
    beside accuracy is named `held-out ...`, apart from the same metric of the steps.
    """
    return {
        name: [_derived(row) for row in map(_numbers, rows) if _has(row, "step")] for name, rows in runs.items()
    }  # fmt: skip


def draw(panel: Panel, axes, runs: Runs) -> None:
    """Draw a panel of prepared rows into matplotlib axes, without its title and legend."""
    (panel.draw or _curves)(panel, axes, runs)
    dress(axes, "x" if panel.draw is _time and len(runs) > 1 else "y")
    values = [float(value) for line in axes.lines for value in line.get_ydata() if math.isfinite(value)]
    if not values:
        return
    least, most = min(values), max(values)
    if panel.share and least >= 0 and most <= 1:
        axes.set_ylim(-0.02, 1.02)
    elif panel.log and least > 0 and most > 100 * least:
        _logarithmic(axes)
    elif panel.zero and least >= 0:
        axes.set_ylim(bottom=0, top=None if most > 0 else 1)


def dress(axes, values: str = "y") -> None:
    """Thin rules across the axis of the values, few ticks, plain numbers."""
    ticker = lookup.package("matplotlib.ticker", "tasks")
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(PALETTE["axis"])
    axes.tick_params(length=0, pad=5)
    axes.set_axisbelow(True)
    axes.grid(axis=values, color=PALETTE["rule"], linewidth=0.8)
    axis = getattr(axes, f"{values}axis")
    axis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, place: number(value)))
    if values == "y":
        axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))


def accuracies(axes, tests: list[dict], colour: str, label: str | None = None, *, named: bool = True) -> None:
    """Held-out accuracies with their intervals; `named` writes the first and the last beside their points."""
    x, y = [row["step"] for row in tests], [row["accuracy"] for row in tests]
    below = [_length(row["accuracy"] - row.get("accuracy_low", math.nan)) for row in tests]
    above = [_length(row.get("accuracy_high", math.nan) - row["accuracy"]) for row in tests]
    axes.errorbar(
        x, y, yerr=[below, above], fmt="o", color=PALETTE[colour], markersize=7, markeredgecolor=PALETTE["paper"],
        elinewidth=1.4, capsize=3, label=label, zorder=5,
    )  # fmt: skip
    for row in (tests[0], tests[-1])[: len(tests) if named else 0]:
        outside = {"ha": "right", "xytext": (-9, 0)} if row is tests[0] else {"ha": "left", "xytext": (9, 0)}
        axes.annotate(
            f"{row['accuracy']:.2f}", (row["step"], row["accuracy"]), textcoords="offset points", va="center",
            color=PALETTE[colour], fontweight="bold", zorder=6, **outside,
        )  # fmt: skip


def points(rows: list[dict], metric: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, of the prepared rows that have it."""
    held = [row for row in rows if metric in row]
    return [row["step"] for row in held], [row[metric] for row in held]


def smoothed(values: list[float]) -> list[float]:
    """A centred mean over about a fifth of the run, narrower towards the ends; NaN stay and count in no mean."""
    half = max(1, len(values) // 10)
    reach = [min(half, at, len(values) - 1 - at) for at in range(len(values))]
    return [
        _mean(values[at - wide : at + wide + 1]) if math.isfinite(values[at]) else math.nan
        for at, wide in enumerate(reach)
    ]


def number(value: float) -> str:
    """A number as short as it reads: 0.25, 12k, 3M, 1.5e-5."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size <= abs(value) < 1e12:
            return f"{value / (1e3 if unit == 'k' else size):.6g}{unit}"
    return re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{value:.6g}").replace("e+", "e").replace("-", "\u2212")


def _curves(panel: Panel, axes, runs: Runs) -> None:
    for place, rows in enumerate(runs.values()):
        for turn, metric in enumerate(panel.labels(runs)):
            x, y = _thinned(*points(rows, metric))
            look = _look(place, turn, len(runs) > 1)
            if panel.smooth and len(x) > 4:
                axes.plot(x, y, color=look["color"], alpha=0.28, linewidth=0.9)
                axes.plot(x, smoothed(y), linewidth=2, **look)
            elif x:
                axes.plot(x, y, linewidth=1.7, marker="o" if len(x) < 12 else None, markersize=3.5, **look)


def _accuracy(panel: Panel, axes, runs: Runs) -> None:
    several = len(runs) > 1
    for place, rows in enumerate(runs.values()):
        for turn, metric in enumerate(panel.labels(runs)):
            tests, look = [row for row in rows if _has(row, metric)], _look(place, turn, several)
            axes.plot(*points(tests, metric), linewidth=1.5, marker="o", markersize=4, **look)
            if metric == "accuracy" and tests:
                accuracies(axes, tests, SERIES[place % len(SERIES)], named=not several)
    axes.set_xmargin(0.14)  # room for the numbers at both ends


def _ratio(panel: Panel, axes, runs: Runs) -> None:
    axes.axhline(1.0, color=PALETTE["axis"], linewidth=0.8)
    _curves(panel, axes, runs)
    for rows in runs.values() if len(runs) == 1 else ():
        both = [row for row in rows if _has(row, "ratio_min") and _has(row, "ratio_max")]
        x, low, high = ([row[name] for row in both] for name in ("step", "ratio_min", "ratio_max"))
        axes.fill_between(x, low, high, color=PALETTE[SERIES[0]], alpha=0.1, linewidth=0)


def _gradient(panel: Panel, axes, runs: Runs) -> None:
    _curves(panel, axes, runs)
    for rows in runs.values():
        for row in rows:
            if row.get("skipped", 0) > 0:
                axes.axvline(row["step"], color=PALETTE["red"], linewidth=1.2, alpha=0.7, zorder=1)


def _time(panel: Panel, axes, runs: Runs) -> None:
    """Seconds of every step, stacked; for several runs the total of each, one bar a run."""
    labels = panel.labels(runs)
    if len(runs) > 1:
        return _totals(labels, axes, runs)
    [rows] = runs.values()
    first, last = (math.floor(edge(row["step"] for row in rows)) for edge in (min, max))
    wide = max(1, math.ceil((last - first + 1) / _MOST))
    bins = (last - first) // wide + 1
    edges, below = [first - 0.5 + wide * at for at in range(bins + 1)], [0.0] * bins
    for turn, metric in enumerate(labels):
        above = list(below)
        for row in rows:
            above[math.floor(row["step"] - first) // wide] += row[metric] / wide if _has(row, metric) else 0.0
        axes.stairs(above, edges, baseline=below, fill=True, color=PALETTE[SERIES[turn % len(SERIES)]], linewidth=0)
        below = above
    axes.set_ylim(0, 1.05 * max(below) or 1)


def _totals(labels: dict[str, str], axes, runs: Runs) -> None:
    lefts = [0.0] * len(runs)
    for turn, metric in enumerate(labels):
        widths = [sum(row[metric] for row in rows if _has(row, metric)) for rows in runs.values()]
        axes.barh(range(len(runs)), widths, 0.6, left=lefts, color=PALETTE[SERIES[turn % len(SERIES)]])
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    axes.set_yticks(range(len(runs)), [name if len(name) < 14 else f"…{name[-12:]}" for name in runs])
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    axes.invert_yaxis()


def _logarithmic(axes) -> None:
    ticker = lookup.package("matplotlib.ticker", "tasks")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(numticks=5))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, place: number(value)))
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def _look(run: int, turn: int, several: bool) -> dict[str, str]:
    """Colours tell series apart, or runs where there are several; then dashes tell the series."""
    colour, dash = (run, DASHES[turn % len(DASHES)]) if several else (turn, "-")
    return {"color": PALETTE[SERIES[colour % len(SERIES)]], "linestyle": dash}


def _thinned(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    wide = math.ceil(len(x) / _MOST)
    if wide < 2:
        return x, y
    cuts = range(0, len(x), wide)
    return [_mean(x[at : at + wide]) for at in cuts], [_mean(y[at : at + wide]) for at in cuts]


def _numbers(row: dict) -> dict[str, float]:
    plain = {name: value for name, value in row.items() if value is None or isinstance(value, int | float)}
    return {name: math.nan if value is None or not abs(value) < _FAR else value for name, value in plain.items()}


def _derived(row: dict[str, float]) -> dict[str, float]:
    if is_evaluation(row):
        plain = {name for name in row if name in _EVALUATION or name.startswith("pass@")}
        return {name if name in plain else f"held-out {name}": value for name, value in row.items()}
    if _has(row, "seconds") and row["seconds"] > 0 and _has(row, "tokens"):
        return {**row, "tokens_per_second": row["tokens"] / row["seconds"]}
    return row


def _has(row: dict, name: str) -> bool:
    return math.isfinite(row.get(name, math.nan))


def _length(value: float) -> float:
    return max(0.0, value) if math.isfinite(value) else 0.0


def _mean(values: list[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


_learning = functools.partial(Panel, section="learning")
_policy = functools.partial(Panel, section="policy")
_optimizer = functools.partial(Panel, section="optimizer")
_machine = functools.partial(Panel, section="machine")

PANELS = (
    _learning("reward", "Reward", "mean of a step's completions; bold is smoothed", {"reward": ""}, share=True),
    _learning(
        "accuracy", "Held-out accuracy", "problems never trained on; bars are 95 % intervals",
        {"accuracy": "greedy", "pass@k": ""}, share=True, smooth=False, draw=_accuracy,
    ),
    _learning("nll", "Negative log-likelihood", "nats a token of the data", {"nll": ""}),
    _learning("pairs", "Pair accuracy", "share of pairs ranked as they should be", {"pair_accuracy": ""}, share=True),
    _learning("margin", "Margin", "chosen minus rejected", {"margin": ""}),
    _learning(
        "groups", "What teaches", "share of groups, share of completions",
        {"mixed": "groups with unequal rewards", "live": "completions with a gradient"}, share=True,
    ),
    _learning("spread", "Spread of rewards", "standard deviation within a step", {"reward_std": ""}, zero=True),
    _policy("entropy", "Entropy", "nats a token; near 0 nothing is explored", {"entropy": ""}, zero=True),
    _policy(
        "divergence", "KL divergence", "nats a token",
        {"kl": "to the reference", "approx_kl": "within the step"}, zero=True,
    ),
    _policy(
        "clipped", "Clipped", "share of trained tokens",
        {"clipped_low": "low", "clipped_high": "high", "clipped_dual": "dual"}, zero=True,
    ),
    _policy(
        "ratio", "Probability ratio", "new over old, per token",
        {"ratio": "mean", "ratio_max": "largest", "ratio_min": "smallest"}, log=True, smooth=False, draw=_ratio,
    ),
    _policy(
        "mismatch", "Mismatch", "log-prob at the update against as drawn, nats a token",
        {"mismatch": "mean", "mismatch_max": "largest"}, log=True, zero=True,
    ),
    _policy(
        "ess", "Effective sample size", "share of the samples that importance weights leave",
        {"mismatch_ess": "tokens", "mismatch_rollout_ess": "rollouts", "ess": "tokens, within the step"}, share=True,
    ),
    _policy(
        "importance", "Importance correction", "weight of a token's loss, share of them at a bound",
        {"importance": "mean weight", "importance_cut": "at a bound"}, zero=True,
    ),
    _policy("length", "Completion length", "tokens", {"length": ""}, zero=True),
    _policy("truncated", "Truncated", "share of completions cut for length", {"truncated": ""}, zero=True),
    _optimizer("loss", "Loss", "of the policy", {"loss": ""}),
    _optimizer("value", "Value loss", "of the value model", {"value_loss": ""}, zero=True, log=True),
    _optimizer("explained", "Explained variance", "of returns, by the value model", {"explained_variance": ""}),
    _optimizer(
        "gradient", "Gradient norm", "before clipping; a red line is a skipped step",
        {"grad_norm": ""}, zero=True, log=True, draw=_gradient,
    ),
    _optimizer("lr", "Learning rate", "", {"lr": ""}, zero=True, smooth=False),
    _machine("phases", "Time", "seconds", _PHASES, draw=_time),
    _machine(
        "throughput", "Throughput", "tokens a second of the phase; trained ones, of the whole step",
        {
            "generate_tokens_per_s": "generated", "read_tokens_per_s": "prompts read",
            "update_tokens_per_s": "updated", "tokens_per_second": "trained",
        },
        log=True, zero=True,
    ),
    _machine(
        "compute", "Computed", "TFLOP a second of the phase",
        {"generate_tflops": "generate", "update_tflops": "update"}, log=True, zero=True,
    ),
    _machine("bandwidth", "Memory traffic", "GB a second of generation", {"generate_gb_per_s": ""}, zero=True),
    _machine(
        "shares", "Share of the machine", "least time by its measured speed, over the time taken",
        {"generate_share": "generate", "update_share": "update"}, share=True,
    ),
    _machine("memory", "Peak memory", "GB", {"host_gb": "host", "gpu_gb": "GPU"}, zero=True, smooth=False),
    _machine("timeouts", "Reward time-outs", "completions a step", {"timeouts": ""}, zero=True, smooth=False),
)  # fmt: skip
