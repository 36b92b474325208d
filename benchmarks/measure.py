"""How a benchmark is taken: correctness gate first, providers in turn within one run, medians, spread, peak memory."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


class Provider:
    """One way to do the work of a case.

    Args:
        name: as the table shows it.
        run: does the work once and returns what `gate` looks at.
        gate: (result) -> None, raises AssertionError where the result is wrong; None for a bare floor.
    """

    def __init__(self, name: str, run: Callable, gate: Callable | None = None):
        self.name, self.run, self.gate = name, run, gate


def compare(
    benchmark,
    floor: Provider,
    ours: Provider,
    *rivals: Provider,
    rounds: int = 9,
    operations: int | None = None,
    smoke: bool = False,
) -> None:
    """Time `ours` as the benchmark and `floor` and `rivals` between its rounds; leave rows in extra_info.

    A provider whose gate fails, or that does not load, is not timed: its row says why. With the useful `operations` of
    one run a row has its rate, "tflops", in 1e12 a second.
    """
    providers = [floor, ours, *rivals]
    rounds = 1 if smoke else rounds
    returned = {}
    rows = {p.name: {"provider": p.name, "reason": _failure(p, returned)} for p in providers}
    timed = [p for p in providers if rows[p.name]["reason"] is None]
    taken = {p.name: [] for p in timed}

    def others():
        for p in timed:
            if p is not ours:
                taken[p.name].append(seconds(p.run))

    def ours_once():
        taken[ours.name].append(seconds(ours.run))

    if rows[ours.name]["reason"]:
        raise AssertionError(f"{ours.name}: {rows[ours.name]['reason']}")
    benchmark.pedantic(ours_once, setup=others, rounds=rounds, warmup_rounds=0)
    for p in timed:
        times = taken[p.name]
        quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
        ratios = [a / b for a, b in zip(times, taken[floor.name], strict=True)]
        rows[p.name] |= {
            "median_s": statistics.median(times),
            "iqr_s": quartiles[2] - quartiles[0],
            "rounds": rounds,
            "ratio": statistics.median(ratios),
            "peak_mb": _peak_mb(p.run),
            "returned_mb": returned[p.name],
        }
        if operations is not None:
            rows[p.name]["tflops"] = operations / rows[p.name]["median_s"] / 1e12
    benchmark.extra_info["floor"] = floor.name
    benchmark.extra_info["rows"] = list(rows.values())


def _failure(provider: Provider, returned: dict[str, float]) -> str | None:
    """Why a provider is not timed; its first run also warms it up, and leaves the size of what it returns."""
    try:
        result = provider.run()
        tensors = [result] if isinstance(result, torch.Tensor) else result or ()
        returned[provider.name] = sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor)) / 1e6
        if provider.gate is not None:
            provider.gate(result)
    except (AssertionError, ImportError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def seconds(run: Callable) -> float:
    """What one run takes."""
    if torch.cuda.is_available():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _peak_mb(run: Callable) -> float | None:
    """Peak memory of one run above what was held before it, results included."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # memory that was freed but kept would hide as much of the peak
    try:
        Path("/proc/self/clear_refs").write_text("5")  # restart the kernel's record of the peak
    except OSError:
        return None
    before = _status_kb("VmRSS")
    run()
    return max(0, _status_kb("VmHWM") - before) * 1024 / 1e6


def _status_kb(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])
