"""Where a step's time goes: seconds of each phase, what was computed in it, and how near that is to the machine's best.

Every moment of a step is in one phase; where one phase is inside of another, as the scoring of an update, it is in the
inner one. In a trace each is a range of its name. The machine's best is measured when a run starts: a matrix product
and a copy, the quickest of a few.

    share = least time / time taken        least time = max(operations / product's rate, bytes / copy's rate)

In generation the least time is that of reading the prompts plus that of drawing the tokens. An update's bytes do not
count: its products are large.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator

import torch
from torch.profiler import record_function

from fuserl.engine import ranks
from fuserl.engine.ceiling import Ceiling
from fuserl.engine.work import Work

PHASES = ("generate", "reward", "score", "update")


class Meter:
    """Seconds by phase, and work by kind, since the last `clear`.

    Args:
        ceiling: what the machine does at best; None leaves shares of it out.
    """

    def __init__(self, ceiling: Ceiling | None = None):
        self.ceiling = ceiling
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.work: dict[str, Work] = {}
        self._within = 0.0  # spent in the phases inside of the one that runs

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside as `name`, one of PHASES."""
        began, before = time.perf_counter(), self._within
        self._within = 0.0
        try:
            with span(name):
                yield
        finally:
            spent = time.perf_counter() - began
            self.seconds[name] += spent - self._within
            self._within = before + spent

    def add(self, **work: Work) -> None:
        """Add work: `read` and `drawn` in generation, `update`."""
        for name, done in work.items():
            self.work[name] = self.work.get(name, Work()) + done

    def row(self, seconds: float) -> dict[str, float]:
        """The metrics of a step that took `seconds`: those of its phases, and rates of phases that did some work.

        docs/metrics.md says what each is. Seconds are this rank's, rates those of all ranks together: all must ask.
        """
        done, ranked = self._everyones(), ranks.world()
        found = {f"{name}_s": spent for name, spent in self.seconds.items()}
        found["other_s"] = max(0.0, seconds - sum(self.seconds.values()))
        for phase, rates in (("generate", {"drawn": "generate", "read": "read"}), ("update", {"update": "update"})):
            parts = {name: done[kind] for kind, name in rates.items() if kind in done}
            spent, whole = self.seconds[phase], sum(parts.values(), Work())
            if not spent or not whole.tokens:
                continue
            found |= {f"{name}_tokens_per_s": part.tokens / spent for name, part in parts.items()}
            found[f"{phase}_tflops"] = whole.flops / spent / 1e12
            if whole.bytes:
                found[f"{phase}_gb_per_s"] = whole.bytes / spent / 1e9
            if self.ceiling is not None:
                found[f"{phase}_share"] = sum(map(self.ceiling.seconds, parts.values())) / spent / ranked
        return found

    def _everyones(self) -> dict[str, Work]:
        parts = ranks.everyones({kind: list(done) for kind, done in self.work.items()})
        kinds = dict.fromkeys(kind for part in parts for kind in part)
        return {kind: sum((Work(*part[kind]) for part in parts if kind in part), Work()) for kind in kinds}


def phase(name: str) -> Callable:
    """A decorator for methods of something that has a `meter`: the whole call counts as a phase."""

    def decorated(method: Callable) -> Callable:
        @functools.wraps(method)
        def timed(self, *arguments, **options):
            with self.meter.phase(name):
                return method(self, *arguments, **options)

        return timed

    return decorated


def span(name: str) -> contextlib.AbstractContextManager:
    """A range of this name in the trace that is recorded, if one is; else nothing."""
    return record_function(name) if torch.autograd._profiler_enabled() else contextlib.nullcontext()
