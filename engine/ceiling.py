"""What this machine does at best, measured: operations a second of a matrix product, bytes a second of a copy."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from fuserl.engine.work import Work
from fuserl.kernels.matmul import linear

_SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices: large enough for the library's full speed
_COPIED = {"cpu": 1 << 27, "cuda": 1 << 29}  # bytes: beyond every cache
_ROUNDS, _PATIENCE = 12, 0.15  # rounds of one measurement, and seconds after which it is enough


class Ceiling(NamedTuple):
    """A machine at its best."""

    tflops: float  # 1e12 operations a second
    gb_per_s: float  # 1e9 bytes a second, read and written together

    def seconds(self, work: Work) -> float:
        """The least time that work takes: that of its operations or of its bytes, whichever is longer."""
        return max(work.flops / (1e12 * self.tflops), work.bytes / (1e9 * self.gb_per_s))

    def words(self, dtype: str) -> str:
        """What percentages of it are shares of."""
        return f"  % of this machine's best: {self.tflops:.3g} TFLOP/s in {dtype}, {self.gb_per_s:.3g} GB/s"


def measured(device: str, dtype: torch.dtype) -> Ceiling:
    """The ceiling of a device for products of a dtype, measured once in a process and number of threads.

    It takes a third of a second, twice 128 MiB (512 MiB on a GPU), freed again, and no random number of torch's.
    """
    return _measured(device, dtype, torch.get_num_threads())


@functools.cache
def _measured(device: str, dtype: torch.dtype, threads: int) -> Ceiling:
    kind = torch.device(device).type
    side, random = _SIDE[kind], torch.Generator(device).manual_seed(0)
    # Random numbers: a GPU multiplies zeros with less power, and so faster, than it multiplies anything else.
    x, weight = (torch.randn(side, side, generator=random, device=device).to(dtype) for _ in range(2))
    product = _quickest(functools.partial(linear, x, weight), device)
    del x, weight
    source = torch.zeros(_COPIED[kind], dtype=torch.uint8, device=device)
    copy = _quickest(functools.partial(torch.empty_like(source).copy_, source), device)
    if kind == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the run's most memory is not that of its first second
    return Ceiling(2 * side**3 / product / 1e12, 2 * source.nbytes / copy / 1e9)


def _quickest(run: Callable, device: str) -> float:
    """The shortest time of a few rounds: what else the machine does only adds to it."""
    synchronize = (lambda: None) if device == "cpu" else functools.partial(torch.cuda.synchronize, device)
    taken, started = [], time.perf_counter()
    while len(taken) < _ROUNDS and (len(taken) < 2 or time.perf_counter() - started < _PATIENCE):
        synchronize()
        began = time.perf_counter()
        run()
        synchronize()
        taken.append(time.perf_counter() - began)
    return min(taken)
