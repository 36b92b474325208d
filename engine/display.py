"""A run as it goes: a live progress line on a terminal, a plain line a step elsewhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from fuserl.engine import lookup
from fuserl.engine.config import Config


def of(config: Config, folder: Path) -> Lines | Live:
    """The display that standard output can show."""
    return Live(config, folder) if sys.stdout.isatty() else Lines(config, folder)


class Lines:
    """One plain line a step, for logs and pipes."""

    def __init__(self, config: Config, folder: Path):
        self.steps, self.accuracy, self._spent, self._done = config.steps, None, 0.0, 0
        self._started = time.perf_counter()
        self._opening = _opening(config, folder)

    def start(self) -> None:
        """Say what runs where, and why each automatic setting is what it is."""
        print("\n".join(self._opening), flush=True)

    def stop(self) -> None:
        """Nothing is left open."""

    def show(self, row: dict) -> None:
        """Print the row as a line."""
        if "accuracy" in row:
            self.accuracy = row["accuracy"]
            print(f"step {row['step']}/{self.steps}  {_accuracy(row)}", flush=True)
            return
        self._done, self._spent = self._done + 1, self._spent + row.get("seconds", 0.0)
        print(f"step {row['step']}/{self.steps}  {'  '.join(self._facts(row))}", flush=True)

    def _facts(self, row: dict) -> list[str]:
        left = (self.steps - row["step"]) * self._spent / max(self._done, 1)
        facts = [f"reward {row['reward']:.3f}"] if "reward" in row else []
        facts += [f"held-out {self.accuracy:.3f}"] if self.accuracy is not None else []
        facts += [f"{tokens_per_second(row):,.0f} tokens/s"] if row.get("seconds") else []
        return [*facts, f"elapsed {clock(time.perf_counter() - self._started)}", f"left {clock(left)}"]


class Live(Lines):
    """A progress bar with the latest figures, redrawn in place; evaluations stay above it as lines."""

    def __init__(self, config: Config, folder: Path):
        super().__init__(config, folder)
        progress = lookup.package("rich.progress", "engine")
        self._progress = progress.Progress(
            progress.SpinnerColumn(),
            progress.TextColumn("[bold]{task.description}"),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("{task.fields[facts]}"),
            expand=True,
        )
        self._bar = self._progress.add_task(f"{config.recipe} 0/{self.steps}", total=self.steps, facts="starting")

    def start(self) -> None:
        """Say what runs, and draw the bar."""
        super().start()
        self._progress.start()

    def stop(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()

    def show(self, row: dict) -> None:
        """Move the bar, or print an evaluation above it."""
        recipe = self._progress.tasks[0].description.partition(" ")[0]
        if "accuracy" in row:
            self.accuracy = row["accuracy"]
            self._progress.console.print(f"step {row['step']}/{self.steps}  {_accuracy(row)}", highlight=False)
            return
        self._done, self._spent = self._done + 1, self._spent + row.get("seconds", 0.0)
        self._progress.update(
            self._bar,
            completed=row["step"],
            description=f"{recipe} {row['step']}/{self.steps}",
            facts=" · ".join(self._facts(row)),
        )


def tokens_per_second(row: dict) -> float:
    """Trained tokens per second of a step, everything included."""
    return row.get("tokens", 0) / row["seconds"]


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _accuracy(row: dict) -> str:
    return f"held-out accuracy {row['accuracy']:.3f} ({row['correct']} of {row['problems']})"


def _opening(config: Config, folder: Path) -> list[str]:
    head = f"{config.recipe} on {config.data or config.task}, {config.steps} steps, in {folder}"
    chosen = [f"  {name} = {getattr(config, name)!r}: {reason}" for name, reason in config.reasons.items()]
    return [head, *chosen]
