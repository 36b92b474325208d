"""Chrome traces of chosen steps: every op on a time line, with a range around each phase, for ui.perfetto.dev.

Ranges: generate, within it prefill and decode; reward; score; update, within it optimizer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from fuserl.engine import atomic

NAME = "trace-step-{}.json"


def chosen(profile: Sequence[str] | None, last: int, *, start: int = 0) -> set[int]:
    """The steps to record of a run that takes the steps after `start` up to `last`.

    Args:
        profile: their numbers; none is the second one to be taken (the first one warms up), None is no step at all.

    Raises:
        ValueError: a number that is no step of the run.
    """
    for each in profile or ():
        if not each.isdecimal() or not 1 <= int(each) <= last:
            raise ValueError(
                f"config: profile must name steps from 1 to {last}; got {each!r}. --profile alone is the second step."
            )
    if profile is None:
        return set()
    return {int(each) for each in profile} if profile else {min(start + 2, last)}


@contextlib.contextmanager
def recorded(path: Path, device: str) -> Iterator[None]:
    """Record what runs inside on this thread and on the device, and write it as `path`, whole or not at all.

    Raises:
        RuntimeError: the trace cannot be written.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device != "cpu" else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        yield
    try:
        with atomic.draft_file(path) as draft:
            profiler.export_chrome_trace(str(draft))
    except OSError as error:
        raise RuntimeError(
            f"profile: {path} must be writable; it is not ({error.strerror or error}). Make room, or leave --profile."
        ) from error
