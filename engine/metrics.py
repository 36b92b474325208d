"""A run's folder, runs/RECIPE-TIME by default: its configuration, its metrics, and what is made of them at the end.

config.json      settings, reasons of the automatic ones, versions, machine, commit
metrics.jsonl    one JSON object a step, and one per evaluation (it has `accuracy`)
reward.png       reward per step, and held-out accuracy
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

from fuserl.engine import display, machine, report
from fuserl.engine.config import Config


class Run:
    """The folder and the display of one run, as a context manager.

        with Run(config) as run:
            run.evaluated(0, {"problems": 200, "correct": 110})
            run.log({"step": 1, "reward": 0.5, "tokens": 256, "seconds": 4.0})

    Leaving it, by an error or an interrupt too, draws the plot and prints the table of what was measured.

    Raises:
        ValueError: the folder already holds a run, or cannot be written.
    """

    def __init__(self, config: Config):
        self.config, self.rows, self._started = config, [], time.perf_counter()
        self.folder = _new_folder(config)
        _write_whole(self.folder / "config.json", json.dumps(_described(config), indent=1) + "\n")
        self._lines = (self.folder / "metrics.jsonl").open("x", encoding="utf-8")
        self._display = display.of(config, self.folder)

    def __enter__(self) -> Run:
        self._display.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._display.stop()
        self._lines.close()
        if error is not None:
            print(f"stopped by {kind.__name__}; what was measured is in {self.folder}", flush=True)
        if any("reward" in row for row in self.rows):
            plot = report.plot(self.rows, self.folder / "reward.png", title=report.title(self.config))
            report.show(report.summary(self.rows), self.folder, plot)

    def log(self, row: dict[str, float]) -> None:
        """Append the metrics of a step (`step`, `reward`, `tokens`, `seconds`, ...) and show them.

        The line is on the disk when this returns. JSON has no NaN or infinity: they are written as null.
        """
        elapsed, memory = time.perf_counter() - self._started, machine.peak_memory()
        row = {**row, "elapsed": round(elapsed, 3), **{f"{place}_gb": round(gb, 3) for place, gb in memory.items()}}
        self.rows.append(row)
        self._lines.write(json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False) + "\n")
        self._lines.flush()
        os.fsync(self._lines.fileno())
        self._display.show(row)

    def evaluated(self, step: int, counts: dict[str, int]) -> None:
        """Append the accuracy after `step` steps: `correct` of `problems` held out; nothing where there are none."""
        if counts["problems"]:
            low, high = report.interval(counts["correct"], counts["problems"])
            accuracy = counts["correct"] / counts["problems"]
            self.log({"step": step, "accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, **counts})


def read(folder: str | Path) -> list[dict]:
    """The rows of a run's metrics.jsonl; a last line that was cut off by a crash is left out."""
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _described(config: Config) -> dict:
    return {
        "config": config.to_dict(),
        "reasons": config.reasons,
        "versions": machine.versions(),
        "machine": machine.machine(),
        "commit": machine.commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _new_folder(config: Config) -> Path:
    folder = Path(config.out) if config.out else Path("runs") / f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Exclusive, so that of two runs that start together one stops.
        (folder / "config.json").open("x").close()
    except FileExistsError as error:
        raise ValueError(f"out: it must be a new folder; {folder} is taken. Choose another with --out.") from error
    except OSError as error:
        raise ValueError(f"out: {folder} must be writable; it is not ({error.strerror}). Choose another.") from error
    return folder


def _write_whole(path: Path, text: str) -> None:
    """Write a file that is complete whenever it is there."""
    draft = path.with_suffix(".draft")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _plain(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
