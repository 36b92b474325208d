"""A run as it goes: a live progress line on a terminal, a plain line a step elsewhere."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

from fuserl.engine import lookup
from fuserl.engine.config import Config
from fuserl.engine.panels import is_evaluation

_GOALS = {"reward": "reward", "pair_accuracy": "pair accuracy", "nll": "nll", "loss": "loss"}  # the first one there is
_TROUBLE = ("skipped", "timeouts")
_SPEEDS = ("generate", "update")  # last in a line, where a narrow terminal leaves them out
_BESIDE = 14  # columns of a terminal for the spinner, a short bar and what is between


def of(config: Config, folder: Path, *, step: int = 0) -> Lines | Live:
    """The display that standard output can show, of a run that starts after `step` steps (0, or where it resumes)."""
    return (Live if sys.stdout.isatty() else Lines)(config, folder, step=step)


class Lines:
    """One plain line a step, for logs and pipes."""

    def __init__(self, config: Config, folder: Path, *, step: int = 0):
        self.steps, self.accuracy, self._spent, self._done = config.steps, None, 0.0, 0
        self._trouble = dict.fromkeys(_TROUBLE, 0)
        self._started = time.perf_counter()
        self._opening = _opening(config, folder, step)

    def start(self) -> None:
        """Say what runs where, and why each automatic setting is what it is."""
        print("\n".join(self._opening), flush=True)

    def stop(self) -> None:
        """Nothing is left open."""

    def show(self, row: dict) -> None:
        """Show a row of metrics: an evaluation or a step; nothing else, as what a checkpoint took."""
        if is_evaluation(row):
            self.accuracy = row.get("accuracy", self.accuracy)
            self.note(f"step {row['step']}/{self.steps}  {_evaluated(row)}")
        elif "seconds" in row or any(name in row for name in _GOALS):
            self._done, self._spent = self._done + 1, self._spent + row.get("seconds", 0.0)
            for name in _TROUBLE:
                self._trouble[name] += round(row[name]) if _is_number(row.get(name)) else 0
            self._step(row["step"], self._facts(row))

    def note(self, line: str) -> None:
        """Show a line that stays."""
        print(line, flush=True)

    def _step(self, step: int, facts: list[str]) -> None:
        print(f"step {step}/{self.steps}  {'  '.join(facts)}", flush=True)

    def _facts(self, row: dict) -> list[str]:
        # Steps before a resume took another process's time: the average is of this one's.
        left = (self.steps - row["step"]) * self._spent / max(self._done, 1)
        goal = next((name for name in _GOALS if _is_number(row.get(name))), None)
        facts = [f"{_GOALS[goal]} {row[goal]:.3f}"] if goal else []
        facts += [f"held-out {self.accuracy:.3f}"] if _is_number(self.accuracy) else []
        facts += [f"{name} {count}" for name, count in self._trouble.items() if count]
        facts += [f"elapsed {clock(time.perf_counter() - self._started)}", f"left {clock(left)}"]
        return [*facts, *(_speed(row, phase) for phase in _SPEEDS if _is_number(row.get(f"{phase}_tokens_per_s")))]


class Live(Lines):
    """A progress bar with the latest figures, redrawn in place; evaluations stay above it as lines."""

    def __init__(self, config: Config, folder: Path, *, step: int = 0):
        super().__init__(config, folder, step=step)
        progress = lookup.package("rich.progress", "engine")
        self._recipe = config.recipe
        self._progress = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("[bold]{task.description}"),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("{task.fields[facts]}"),
            expand=True,
        )
        self._bar = self._progress.add_task(
            f"{config.recipe} {step}/{self.steps}", total=self.steps, completed=step, facts="starting"
        )

    def start(self) -> None:
        """Say what runs, and draw the bar."""
        super().start()
        self._progress.start()

    def stop(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()

    def note(self, line: str) -> None:
        """Show a line above the bar."""
        self._progress.console.print(line, highlight=False, markup=False)

    def _step(self, step: int, facts: list[str]) -> None:
        description = f"{self._recipe} {step}/{self.steps}"
        room = self._progress.console.width - len(description) - _BESIDE
        while len(" · ".join(facts)) > room and len(facts) > 1:
            facts = facts[:-1]
        self._progress.update(self._bar, completed=step, description=description, facts=" · ".join(facts))


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _evaluated(row: dict) -> str:
    counts = f" ({row['correct']} of {row['problems']})" if "correct" in row and "problems" in row else ""
    held = [f"held-out accuracy {row['accuracy']:.3f}{counts}"] if _is_number(row.get("accuracy")) else []
    tries = [name for name in row if name.startswith("pass@") and _is_number(row[name])]
    held += [f"{tries[-1]} {row[tries[-1]]:.3f}"] if tries else []
    return "  ".join(held) or "evaluated"


def _speed(row: dict, phase: str) -> str:
    """Tokens a second of a phase, and how much of the machine's best that is."""
    share = f" ({row[f'{phase}_share']:.0%})" if _is_number(row.get(f"{phase}_share")) else ""
    return f"{phase} {row[f'{phase}_tokens_per_s']:,.0f} tokens/s{share}"


def _opening(config: Config, folder: Path, step: int) -> list[str]:
    head = f"{config.recipe} on {config.data or config.task}, {config.steps} steps, in {folder}"
    chosen = [f"  {name} = {getattr(config, name)!r}: {reason}" for name, reason in config.reasons.items()]
    return [f"{head}, resumed at step {step}" if step else head, *chosen]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
