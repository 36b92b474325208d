"""A run's folder, runs/RECIPE-TIME by default: its configuration, its metrics, and what is made of them at the end.

config.json           settings in force, reasons of the automatic ones, versions, machine, commit, when it was resumed
metrics.jsonl         one JSON object a step, and one per evaluation (it has `accuracy`)
samples.jsonl         some completions of every step, with the credit of their tokens
trace-step-N.json     what ran when in a step, as Chrome and Perfetto show it
failed-step-N.jsonl   all completions of a step whose reward failed
checkpoints/          what a run resumes from
reward.png            reward per step, and held-out accuracy
run.lock              held by the process that writes here, and free when it is gone, however it went
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from fuserl.engine import atomic, display, machine, panels, ranks, report, traces
from fuserl.engine.batch import Rollouts
from fuserl.engine.config import Config

_CONFIG, _METRICS, _SAMPLES, _CHECKPOINTS, _LOCK = (
    "config.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "run.lock",
)  # fmt: skip


class Run:
    """The folder and the display of one run, as a context manager.

        with Run(config) as run:
            run.evaluated(0, {"accuracy": 0.55, "problems": 200, "correct": 110})
            run.log({"step": 1, "reward": 0.5, "tokens": 256, "seconds": 4.0})

        with Run(config, resume=folder) as run:
            run.rewind(checkpoint.state["run"])  # what an earlier `run.position()` gave, before anything else

    Leaving it, by an error or an interrupt too, draws the plot and prints the table of what was measured. An error gets
    a note on how to go on; where it came before anything was measured, a new folder is not left behind.

    Args:
        config: the run's settings, resolved.
        resume: the folder of a run to continue; None starts a new one in `config.out`.

    Raises:
        ValueError: the folder already holds a run (or, to resume, none), another process writes it, or nobody can.
        RuntimeError: a tracker's package is missing.
    """

    def __init__(self, config: Config, *, resume: Path | None = None):
        self.config, self.rows, self._files = config, [], {}
        self._display, self._entered, self._measured = None, False, False
        self._started, self._earlier = time.perf_counter(), 0.0
        self.folder, made = (_run_folder(resume), False) if resume is not None else _new_folder(config)
        with contextlib.ExitStack() as held:
            held.enter_context(_lock(self.folder))
            for name in (_CONFIG, traces.NAME.format("*")):
                atomic.remove_drafts(self.folder, name)
            self._described = _described(config) if resume is None else _read_described(self.folder)
            self._resumed, self._held = resume is not None, held
            if not self._resumed:
                _refuse_taken(self.folder)
                held.push(functools.partial(self._withdraw, made))
                self.rewind(None)
            self._held = held.pop_all()

    def __enter__(self) -> Run:
        self._entered = True
        if self._display is not None:
            self._display.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if self._display is not None:
                self._display.stop()
            if error is not None and self._measured:
                folder = shlex.quote(str(self.folder))
                error.add_note(f"What was measured is in {folder}; fuserl train --resume {folder} goes on.")
            if any(not panels.is_evaluation(row) for row in self.rows):
                report.show(report.summary(self.rows), self.folder, self._plotted())
        finally:
            self._held.__exit__(kind, error, traceback)

    def log(self, row: dict[str, float]) -> None:
        """Append the metrics of a step (`step`, `reward`, `tokens`, `seconds`, ...) and show them.

        The line is on the disk when this returns. JSON has no NaN or infinity: they are written as null. `elapsed`
        counts from the start of the run, the time between a stop and a resume left out.

        Raises:
            RuntimeError: the disk is full, or the like; no part of the line stays.
        """
        memory = machine.peak_memory()
        row = {**row, "elapsed": round(self._elapsed(), 3), **{f"{at}_gb": round(gb, 3) for at, gb in memory.items()}}
        self._append(_METRICS, [row])
        self.rows.append(row)
        self._display.show(row)
        for tracker in self._trackers:
            tracker.log(row["step"], row)

    def evaluated(self, step: int, row: dict[str, float]) -> None:
        """Append what an evaluation after `step` steps found; nothing where the row is empty."""
        if row:
            self.log({"step": step, **row})

    def sampled(
        self, step: int, rollouts: Rollouts, rewards: Tensor | Sequence, count: int | None = None,
        more: Callable = lambda count: (),
    ) -> None:  # fmt: skip
        """Append the first `count` (default `config.samples`) completions of a step, with their rewards (B,).

        What `more(count)` has of each goes beside. All is in samples.jsonl, on the disk, on return; raises as `log`.
        """
        count = self.config.samples if count is None else count
        rows = itertools.zip_longest(_completions(step, rollouts, rewards)[:count], more(count), fillvalue={})
        self._append(_SAMPLES, [row | each for row, each in rows])

    def failed(self, step: int, rollouts: Rollouts, rewards: Tensor | Sequence | None) -> Path:
        """Save every completion of a step whose reward failed, and return the file.

        Args:
            step: the step that was not finished.
            rollouts: everything generated for it, B completions.
            rewards: (B,) numbers, None where one is not known; anything else when none is.

        Raises:
            RuntimeError: the disk is full, or the like.
        """
        path = self.folder / f"failed-step-{step}.jsonl"
        rewards = rewards.tolist() if isinstance(rewards, Tensor) else rewards
        if not isinstance(rewards, Sequence) or len(rewards) != len(rollouts):
            rewards = [None] * len(rollouts)
        try:
            atomic.write_text(path, _lines(_completions(step, rollouts, rewards)))
        except OSError as error:
            raise _unwritable("failed", path, error) from error
        self._measured = True
        return path

    def note(self, text: str) -> None:
        """Show a line."""
        self._display.note(text)

    @contextlib.contextmanager
    def traced(self, step: int) -> Iterator[None]:
        """Record what runs inside as the Chrome trace of a step, trace-step-N.json; raises as `traces.recorded`."""
        path = self.folder / traces.NAME.format(step)
        with traces.recorded(path, self.config.device):
            yield
        self.note(f"step {step}/{self.config.steps}  trace in {path}; ui.perfetto.dev shows it")

    def position(self) -> dict[str, float]:
        """Where the run stands: steps and seconds so far, and bytes of both files; a checkpoint keeps it."""
        sizes = {name: os.fstat(file.fileno()).st_size for name, file in self._files.items()}
        return {"step": self.rows[-1]["step"] if self.rows else 0, "elapsed": self._elapsed(), **sizes}

    def saved_every(self) -> int:
        """Steps between the checkpoints of the run as it was started, or last resumed; 0 is none but the last."""
        every = self._described["config"].get("save_every")
        return every if isinstance(every, int) else 0

    def rewind(self, position: dict[str, float] | None) -> None:
        """Cut metrics and samples back to what they were at `position`, None being the start, and go on from there.

        A resumed run must be rewound before anything is logged. Being stopped half-way does no harm: the cut is made
        again by the next resume. Where a file has lost lines from before the position, a warning says so.
        """
        position = position or {"step": 0, "elapsed": 0.0, _METRICS: 0, _SAMPLES: 0}
        self._trackers = self._tracked(position["step"])
        if self._resumed:
            _note_resume(self._described, self.config, position["step"])
        try:
            self._files = {name: _cut(self.folder / name, position[name]) for name in (_METRICS, _SAMPLES)}
            atomic.write_text(self.folder / _CONFIG, json.dumps(self._described, indent=1) + "\n")
        except OSError as error:
            raise _unwritable("rewind", self.folder, error) from error
        for opened in [*self._files.values(), *map(contextlib.closing, self._trackers)]:
            self._held.enter_context(opened)
        self.rows = read(self.folder)
        self._started, self._earlier = time.perf_counter(), position["elapsed"]
        self._display = display.of(self.config, self.folder, step=position["step"])
        if self._entered:
            self._display.start()

    def _withdraw(self, made: bool, kind, error, traceback) -> None:
        """Undo the start of a new run that ended before it had measured anything."""
        if error is None or self._measured:
            return
        if made:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            for name in (_CONFIG, _METRICS, _SAMPLES, _LOCK):
                (self.folder / name).unlink(missing_ok=True)

    def _elapsed(self) -> float:
        return self._earlier + time.perf_counter() - self._started

    def _tracked(self, step: int) -> list:
        if not self.config.trackers:
            return []
        from fuserl.engine import trackers

        return trackers.of(self.config.trackers, self.folder, self.config.to_dict(), step=step)

    def _append(self, name: str, rows: list[dict]) -> None:
        if name not in self._files:
            raise ValueError("log: a resumed run must be rewound before anything is logged; it was not. Call rewind.")
        file, rest = self._files[name], memoryview(_lines(rows).encode())
        before = os.fstat(file.fileno()).st_size
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise _unwritable("log", self.folder / name, error) from error
        self._measured = True

    def _plotted(self) -> str:
        try:
            return report.plot(self.rows, self.folder / "reward.png", title=report.title(self.config))
        except OSError as error:
            return f"none: {error.strerror or error}"


def read(folder: str | Path) -> list[dict]:
    """The rows of a run's metrics.jsonl; a last line that was cut off by a crash is left out.

    Raises:
        ValueError: there is no such file, or a line before the last is damaged.
    """
    path = Path(folder) / _METRICS
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"read: {folder} must hold a run; {_METRICS} cannot be read ({error.strerror}).") from error
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"read: every line of {path} must be JSON; line {number} is not ({error}). Remove that line."
            ) from error
        if not isinstance(rows[-1], dict) or not isinstance(rows[-1].get("step"), int):
            raise ValueError(
                f"read: every line of {path} must be of a step or an evaluation; line {number} is not. Remove it."
            )
    return rows


def _described(config: Config) -> dict:
    return {
        "config": config.to_dict(),
        "reasons": config.reasons,
        "versions": machine.versions(),
        "machine": machine.machine(),
        "ranks": ranks.world(),
        "commit": machine.commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _read_described(folder: Path) -> dict:
    try:
        described = json.loads((folder / _CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"resume: {folder / _CONFIG} must be readable JSON; it is not ({error}).") from error
    parts = {"config": None, "reasons": {}, "resumed": []} | (described if isinstance(described, dict) else {})
    if not all(
        isinstance(parts[name], kind) for name, kind in (("config", dict), ("reasons", dict), ("resumed", list))
    ):
        raise ValueError(f"resume: {folder / _CONFIG} must be the settings of a run; it is something else.")
    return described


def _note_resume(described: dict, config: Config, step: int) -> None:
    """Put the settings now in force into `described`, and what they were into its list of resumes."""
    before, now = described["config"], config.to_dict()
    names = [name for name in {**before, **now} if name != "out" and before.get(name) != now.get(name)]
    changes = {name: [before.get(name), now.get(name)] for name in names}
    resume = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "changes": changes}
    reasons = {name: reason for name, reason in described.get("reasons", {}).items() if name not in changes}
    described.update(config=now, reasons={**reasons, **config.reasons}, resumed=[*described.get("resumed", []), resume])


def _new_folder(config: Config) -> tuple[Path, bool]:
    """The folder of a new run, and whether it has been made for it."""
    folder = Path(config.out) if config.out else Path("runs") / f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: {folder} must be writable; it is not ({error.strerror}). Choose another.") from error
    _refuse_taken(folder)
    return folder, made


def _refuse_taken(folder: Path) -> None:
    written = any((folder / name).exists() and (folder / name).stat().st_size for name in (_METRICS, _SAMPLES))
    if written or (folder / _CONFIG).exists() or (folder / _CHECKPOINTS).exists():
        raise ValueError(
            f"out: it must be a new folder; {folder} is taken. Choose another with --out, or go on with --resume."
        )


def _run_folder(folder: str | Path) -> Path:
    if not (Path(folder) / _CONFIG).is_file():
        raise ValueError(
            f"resume: {folder} must hold a run; it has no {_CONFIG}. Name the folder that the run printed."
        )
    return Path(folder)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system frees it when the process ends, by SIGKILL too."""
    try:
        file = (folder / _LOCK).open("a+b", buffering=0)
    except OSError as error:
        raise ValueError(f"out: {folder} must be writable; it is not ({error.strerror}). Choose another.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip()
            raise ValueError(
                f"out: one run at a time may write {folder}; process {holder or 'unknown'} does. "
                "Wait for it, or choose another folder."
            ) from error
        try:
            file.truncate(0)
            file.write(b"%d\n" % os.getpid())
        except OSError as error:
            raise _unwritable("out", folder, error) from error
        yield


def _cut(path: Path, size: int) -> BinaryIO:
    """Open a file of lines for appending, cut back to its first `size` bytes, or fewer where it has lost some."""
    file = path.open("a+b", buffering=0)
    file.seek(0)
    whole = file.read(size).rfind(b"\n") + 1
    if whole < size:
        print(f"fuserl: {path} has lost lines from before the checkpoint; going on without them", file=sys.stderr)
    file.truncate(whole)
    os.fsync(file.fileno())
    return file


def _completions(step: int, rollouts: Rollouts, rewards: Tensor | Sequence) -> list[dict]:
    rewards = rewards.tolist() if isinstance(rewards, Tensor) else rewards
    return [
        {
            "step": step,
            "prompt": rollouts.prompt_of(index).text,
            "completion": text,
            "answer": rollouts.prompt_of(index).answer,
            "reward": _plain(reward),
            "finish": finish,
        }
        for index, (text, finish, reward) in enumerate(zip(rollouts.texts, rollouts.finish, rewards, strict=True))
    ]


def _lines(rows: list[dict]) -> str:
    return "".join(
        json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False) + "\n" for row in rows
    )


def _plain(value: object) -> object:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _unwritable(function: str, path: Path, error: OSError) -> RuntimeError:
    return RuntimeError(
        f"{function}: {path} must be writable; it is not ({error.strerror or error}). Make room, and resume."
    )
