"""A run's folder as every rank but the first has it: nobody's to write."""

from __future__ import annotations

import contextlib
from pathlib import Path


class Follower:
    """Stands for `metrics.Run` on the ranks that write nothing: the first one has the same rows."""

    folder: Path | None = None

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_) -> None:
        """Nothing is left open."""

    def log(self, row: dict) -> None:
        """Nothing."""

    def note(self, line: str) -> None:
        """Nothing."""

    def traced(self, step: int) -> contextlib.AbstractContextManager:
        """Nothing: a trace is of the first rank."""
        return contextlib.nullcontext()

    def evaluated(self, step: int, row: dict) -> None:
        """Nothing."""

    def sampled(self, *_) -> None:
        """Nothing."""

    def failed(self, step: int, *_) -> Path:
        """Where the first rank saves the completions of a step whose reward failed."""
        return self.folder / f"failed-step-{step}.jsonl"

    def position(self) -> dict:
        """Nothing: the first rank writes the checkpoint."""
        return {}

    def saved_every(self) -> int:
        """0: what was lost is the first rank's to find."""
        return 0

    def rewind(self, position: dict | None) -> None:
        """Nothing."""
