"""What a run came to: intervals, the facts in a few lines, and the plot that stays in its folder."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

from fuserl.engine import atomic, display, figures, lookup
from fuserl.engine.panels import is_evaluation
from fuserl.engine.panels import smoothed as smoothed

_Z = 1.959964  # of a two-sided interval of 95 %
_EDGE = 8  # steps averaged at each end of a run
_PHASES = {
    "generate_s": "generating", "reward_s": "rewarding", "score_s": "scoring", "update_s": "updating",
    "save_s": "saving", "eval_s": "evaluating",
}  # fmt: skip


class Fact(NamedTuple):
    """One thing that a run came to: what it is, its value, and what qualifies the value (or nothing)."""

    name: str
    value: str
    detail: str = ""


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


def facts(rows: list[dict]) -> list[Fact]:
    """What a run's rows come to, most important first; a fact whose metrics are missing is left out."""
    tests = [row for row in rows if _has(row, "accuracy")]
    steps = [row for row in rows if not is_evaluation(row)]
    found = _accuracy(tests) + _tries(tests)
    for name in ("reward", "pair_accuracy", "nll", "loss"):
        ends = _ends(steps, name)
        if ends:
            edge, first, last = ends
            found.append(Fact(f"{name}, first and last {_steps(edge)}", f"{first:.3f} to {last:.3f}"))
            break
    return [*found, *_speed(rows, steps), *_rates(steps), *_mismatch(steps), *_memory(rows), *_trouble(steps)]


def summary(rows: list[dict]) -> list[tuple[str, str]]:
    """The final table, name and value, of a run's rows."""
    return [(fact.name, f"{fact.value}  ({fact.detail})" if fact.detail else fact.value) for fact in facts(rows)]


def show(table: list[tuple[str, str]], folder: Path, plot: str) -> None:
    """Print the final table."""
    rich_table, console = lookup.package("rich.table", "engine"), lookup.package("rich.console", "engine")
    drawn = rich_table.Table(show_header=False, box=lookup.package("rich.box", "engine").SIMPLE_HEAD, pad_edge=False)
    drawn.add_column(style="bold", no_wrap=True)
    drawn.add_column(overflow="fold")
    for name, value in [*table, ("folder", str(folder)), ("plot", plot), ("all plots", f"fuserl report {folder}")]:
        drawn.add_row(name, value)
    console.Console(highlight=False, markup=False).print(drawn)


def title(config) -> str:
    """The plot's title: what was trained on what."""
    model = Path(config.model).name if config.model else "SmolLM2-135M-Instruct"
    return f"{config.recipe} · {model} · {config.data or config.task}"


def plot(rows: list[dict], path: Path, title: str) -> str:
    """Draw reward per step and held-out accuracy with its intervals; return the path, or why there is no plot."""
    try:
        image = figures.png(figures.reward(rows, title))
    except RuntimeError as error:
        return f"none: {error}"
    atomic.write_bytes(path, image)
    return str(path)


def _accuracy(tests: list[dict]) -> list[Fact]:
    if not tests:
        return []
    if len(tests) == 1:
        return [_with_interval(f"held-out accuracy after {_steps(tests[0]['step'])}", tests[0])]
    before, after = tests[0], tests[-1]
    found = [_with_interval("held-out accuracy before", before), _with_interval("held-out accuracy after", after)]
    detail = ""
    if all(row.get("problems") and "correct" in row for row in (before, after)):
        detail = "95 %: {:+.3f} to {:+.3f}".format(*rise_interval(before, after))
    return [*found, Fact("rise", f"{after['accuracy'] - before['accuracy']:+.3f}", detail)]


def _with_interval(name: str, row: dict) -> Fact:
    if not (row.get("problems") and "correct" in row):
        return Fact(name, f"{row['accuracy']:.3f}")
    low, high = interval(row["correct"], row["problems"])
    detail = f"{row['correct']} of {row['problems']}; 95 %: {low:.3f} to {high:.3f}"
    return Fact(name, f"{row['accuracy']:.3f}", detail)


def _tries(tests: list[dict]) -> list[Fact]:
    """pass@k for the largest k, before and after."""
    names = {int(name[5:]): name for row in tests for name in row if re.fullmatch(r"pass@\d{1,9}", name)}
    held = [row for row in tests if names and _has(row, names[max(names)])]
    if not held:
        return []
    values = [f"{row[names[max(names)]]:.3f}" for row in (held[0], held[-1])[: len(held)]]
    detail = f"of {held[-1]['samples']:g} samples" if _has(held[-1], "samples") else ""
    return [Fact(f"held-out {names[max(names)]}", " to ".join(values), detail)]


def _speed(rows: list[dict], steps: list[dict]) -> list[Fact]:
    seconds = _sum(steps, "seconds")
    if not seconds:
        return []
    total = max(max((row["elapsed"] for row in rows if _has(row, "elapsed")), default=0.0), seconds)
    parts = {word: _sum(rows, name) for name, word in _PHASES.items() if any(_has(row, name) for row in rows)}
    rest = "the rest" if "evaluating" in parts else "evaluating and the rest"
    parts[rest] = max(0.0, total - sum(parts.values()))
    split = ", ".join(f"{word} {value / total:.0%}" for word, value in parts.items())
    return [
        Fact("tokens/s", f"{_sum(steps, 'tokens') / seconds:,.0f}"),
        Fact("time", display.clock(total), split),
    ]


def _rates(steps: list[dict]) -> list[Fact]:
    """Generating and updating, each over its own time."""
    found, units = [], {"tflops": "TFLOP", "gb_per_s": "GB"}
    for phase, word in (("generate", "generating"), ("update", "updating")):
        known = [row for row in steps if _has(row, f"{phase}_s") and _has(row, f"{phase}_tokens_per_s")]
        seconds = _sum(known, f"{phase}_s")
        if not seconds:
            continue
        rate = {
            name: sum(row[f"{phase}_s"] * row[f"{phase}_{name}"] for row in known if _has(row, f"{phase}_{name}"))
            for name in ("tokens_per_s", "tflops", "gb_per_s", "share")
            if any(_has(row, f"{phase}_{name}") for row in known)
        }
        told = [f"{_short(rate[name] / seconds)} {unit}/s" for name, unit in units.items() if name in rate]
        told += [f"{rate['share'] / seconds:.0%} of the machine's best"] if "share" in rate else []
        found.append(Fact(word, f"{rate['tokens_per_s'] / seconds:,.0f} tokens/s", ", ".join(told)))
    return found


def _mismatch(steps: list[dict]) -> list[Fact]:
    """How far the policy that drew the tokens was from the one that was updated, at worst."""
    values = {name: [row[name] for row in steps if _has(row, name)] for name in ("mismatch_max", "mismatch_ess")}
    if not all(values.values()):
        return []
    least = f"effective sample size {min(values['mismatch_ess']):.1%} of the tokens at least"
    return [Fact("largest mismatch", f"{max(values['mismatch_max']):.2g} nats", least)]


def _memory(rows: list[dict]) -> list[Fact]:
    found = []
    for place in ("gpu", "host"):
        values = [row[f"{place}_gb"] for row in rows if _has(row, f"{place}_gb")]
        found += [(place, f"{max(values):.2f} GB")] if values else []
    if not found:
        return []
    (place, peak), *others = found
    return [Fact("peak memory", peak, ", ".join([place, *(" ".join(other) for other in others)]))]


def _trouble(steps: list[dict]) -> list[Fact]:
    """What went wrong and did not stop the run: nothing to say of a run without it."""
    named = (("skipped", "skipped updates", "gradients were not finite"), ("timeouts", "reward time-outs", ""))
    return [Fact(says, f"{_sum(steps, name):g}", why) for name, says, why in named if _sum(steps, name)]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _ends(steps: list[dict], name: str) -> tuple[int, float, float] | None:
    """How many steps are averaged at each end, and the averages."""
    values = [row[name] for row in steps if _has(row, name)]
    if not values:
        return None
    edge = min(_EDGE, max(1, len(values) // 2))
    return edge, sum(values[:edge]) / edge, sum(values[-edge:]) / edge


def _steps(count: int) -> str:
    return f"{count} step{'s' if count != 1 else ''}"


def _sum(rows: list[dict], name: str) -> float:
    return sum(row[name] for row in rows if _has(row, name))


def _has(row: dict, name: str) -> bool:
    value = row.get(name)
    return isinstance(value, int | float) and math.isfinite(value)
