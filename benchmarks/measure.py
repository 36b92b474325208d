"""How a benchmark is taken: correctness gate first, providers in turn within one run, medians, spread, peak memory."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch


class Provider:
    """One way to do the work of a case.

    Args:
        name: as the table shows it.
        run: does the work once and returns what `gate` looks at.
        gate: (result) -> the largest `relative_error` in it, or None; raises AssertionError where the result is wrong.
            None for a bare floor.
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
    one run a row has its rate, "tflops", in 1e12 a second; "error" is what the gate returned.
    """
    providers = [floor, ours, *rivals]
    rounds = 1 if smoke else rounds
    rows = {p.name: {"provider": p.name, **_tried(p)} for p in providers}
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
        }
        if operations is not None:
            rows[p.name]["tflops"] = operations / rows[p.name]["median_s"] / 1e12
    benchmark.extra_info["floor"] = floor.name
    benchmark.extra_info["rows"] = list(rows.values())


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """|got - expected| / |expected| in float64, norms of whole tensors; 0 where both are 0, infinite with a nan."""
    wrong, size = (got.double() - expected.double()).norm(), expected.double().norm()
    return float((wrong / size).nan_to_num(torch.inf, torch.inf)) if wrong else 0.0


def near(
    expected: Sequence[torch.Tensor],
    rtol: float = 1e-4,
    atol: float = 1e-4,
    *,
    results: int | None = None,
    limit: float = 1e-4,
) -> Callable:
    """A gate of results by number and of gradients in norm, whose numbers may all be below any absolute tolerance.

    Args:
        expected: results, then gradients.
        rtol, atol: of each number of the results.
        results: how many there are; None for all of `expected`.
        limit: of each gradient's `relative_error`.
    """

    def right(found):
        for got, true in zip(found[:results], expected[:results], strict=True):
            torch.testing.assert_close(got.double(), true.double(), rtol=rtol, atol=atol)
        errors = [relative_error(got, true) for got, true in zip(found, expected, strict=True)]
        worst = max(errors[len(expected[:results]) :], default=0.0)
        assert worst < limit, f"relative error {worst:.1e} of a gradient"
        return max(errors)

    return right


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    """Those of all parameters, taken off the model."""
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return found


def _tried(provider: Provider) -> dict:
    """Why a provider is not timed, or what its first run, which also warms it up, returned: the size and the error."""
    try:
        result = provider.run()
        tensors = [result] if isinstance(result, torch.Tensor) else result or ()
        size = sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor)) / 1e6
        error = provider.gate(result) if provider.gate is not None else None
    except (AssertionError, ImportError, RuntimeError, ValueError) as failed:
        return {"reason": f"{type(failed).__name__}: {str(failed).splitlines()[0] if str(failed) else ''}"}
    return {"reason": None, "returned_mb": size, "error": error}


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
