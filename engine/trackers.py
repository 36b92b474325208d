"""Trackers beside a run's own files: TensorBoard and Weights & Biases, when they are asked for and installed."""

from __future__ import annotations

import contextlib
import json
import math
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from fuserl.engine import atomic, lookup

_PLACES = (
    ("speed", r".*(_per_s|_tflops|_share)"),
    ("time", r"seconds|elapsed|.*_s"),
    ("memory", r".*_gb"),
    ("eval", r"accuracy.*|pass@.*|problems|correct"),
)


class Tracker(Protocol):
    """Where rows of metrics are shown while a run goes on."""

    def log(self, step: int, row: dict) -> None:
        """Show the numbers of one row; what is no finite number is left out."""

    def close(self) -> None:
        """Write what is left, and end."""


class TensorBoard:
    """Scalars in FOLDER/tensorboard, on the disk when `log` returns."""

    def __init__(self, folder: Path, config: dict, step: int):
        # What an earlier process of this run drew after the checkpoint is drawn again.
        purged = step + 1 if step else 0
        tensorboard = lookup.package("torch.utils.tensorboard", "trackers")
        self._writer = tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=purged)
        if not step:
            lines = json.dumps(config, indent=1).splitlines()
            self._writer.add_text("config", "\n".join(f"    {line}" for line in lines), 0)

    def log(self, step: int, row: dict) -> None:
        """Draw the numbers of a row as train/reward, eval/accuracy, time/generate_s, speed/update_share, ..."""
        for name, value in _numbers(row).items():
            self._writer.add_scalar(_tag(name), value, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left, and end."""
        self._writer.close()


class WandB:
    """A run of the project `fuserl` at Weights & Biases, called as the folder; resumed by the id kept in the folder."""

    def __init__(self, folder: Path, config: dict, step: int):
        wandb, path = lookup.package("wandb", "trackers"), folder / "wandb-id"
        identity = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
        if not identity:
            identity = secrets.token_hex(4)
            atomic.write_text(path, identity + "\n")
        try:
            self._run = wandb.init(
                project="fuserl", name=folder.resolve().name, id=identity, resume="allow", dir=str(folder),
                config=config, settings=wandb.Settings(console="off"),
            )  # fmt: skip
        except wandb.Error as error:
            raise RuntimeError(
                f"trackers: wandb must start; it does not ({' '.join(str(error).split())}). "
                "Run wandb login, or set WANDB_MODE=offline."
            ) from error

    def log(self, step: int, row: dict) -> None:
        """Send the numbers of a row.

        A step that an earlier process of this run has sent is ignored there: a resumed run repeats it exactly.
        """
        self._run.log({_tag(name): value for name, value in _numbers(row).items()}, step=step)

    def close(self) -> None:
        """Send what is left, and end."""
        self._run.finish()


_KNOWN = {
    "tensorboard": (TensorBoard, ("tensorboard", "torch.utils.tensorboard")),
    "wandb": (WandB, ("wandb",)),
}


def of(names: Sequence[str], folder: Path, config: dict, *, step: int = 0) -> list[Tracker]:
    """Open trackers by name for the run in `folder`.

    Args:
        names: any of tensorboard and wandb.
        folder: the run's folder, which exists.
        config: the settings, ready for JSON; shown with the run.
        step: the step that the run resumes from; 0 is a new run.

    Raises:
        ValueError: no tracker of that name.
        RuntimeError: its package is not installed (the message is the pip line), or it cannot start.
    """
    names = list(dict.fromkeys(names))
    check(names)
    with contextlib.ExitStack() as opened:
        trackers = []
        for name in names:
            trackers.append(_KNOWN[name][0](Path(folder), config, step))
            opened.callback(trackers[-1].close)
        opened.pop_all()
    return trackers


def check(names: Sequence[str]) -> None:
    """Raise as `of` does for unknown names and missing packages, and open nothing."""
    for name in names:
        if name not in _KNOWN:
            known = lookup.nearest(name, _KNOWN)
            raise ValueError(f"trackers: names must be tensorboard or wandb; got {name!r}. {known}")
    for name in names:
        for package in _KNOWN[name][1]:
            lookup.package(package, "trackers")


def _numbers(row: dict) -> dict[str, float]:
    return {
        name: value
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def _tag(name: str) -> str:
    """Metrics of one kind under one heading; `@` is no character of a tag."""
    place = next((place for place, pattern in _PLACES if re.fullmatch(pattern, name)), "train")
    return f"{place}/{name.replace('@', '_at_')}"
