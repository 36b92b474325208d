"""The measured ceiling: plausible, quick, the same all through a process, and without a trace in random streams."""

import time

import pytest
import torch

from fuserl.engine import ceiling
from fuserl.engine.ceiling import Ceiling
from fuserl.engine.work import Work


@pytest.fixture
def small(monkeypatch):
    """Small matrices, measured anew."""
    monkeypatch.setattr(ceiling, "_SIDE", {"cpu": 64})
    monkeypatch.setattr(ceiling, "_COPIED", {"cpu": 1 << 16})
    ceiling._measured.cache_clear()
    yield
    ceiling._measured.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_measured_once_and_draws_nothing(small, monkeypatch, dtype):
    before, products = torch.get_rng_state(), []
    linear = ceiling.linear
    monkeypatch.setattr(ceiling, "linear", lambda x, w: products.append((x.dtype, w.dtype, *x.shape)) or linear(x, w))
    first = ceiling.measured("cpu", dtype)
    assert set(products) == {(dtype, dtype, 64, 64)} and len(products) >= 2
    count = len(products)
    assert ceiling.measured("cpu", dtype) is first and len(products) == count
    assert torch.equal(torch.get_rng_state(), before)
    assert 0 < first.tflops < 1e3 and 0 < first.gb_per_s < 1e4


def test_the_rate_is_that_of_the_quickest_round(small, monkeypatch):
    durations = iter([0.5, 0.25, 1.0] * 8)  # of a round: the clock is read before and after it

    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(ceiling.time, "perf_counter", clock)
    monkeypatch.setattr(ceiling, "_PATIENCE", 100.0)

    def run():
        clock.now += next(durations)

    assert ceiling._quickest(run, "cpu") == 0.25
    monkeypatch.setattr(ceiling, "_quickest", lambda run, device: 0.5)
    assert ceiling.measured("cpu", torch.float32) == Ceiling(2 * 64**3 / 0.5 / 1e12, 2 * (1 << 16) / 0.5 / 1e9)


def test_patience_ends(small, monkeypatch):
    monkeypatch.setattr(ceiling, "_PATIENCE", 0.0)
    runs = []
    ceiling._quickest(lambda: runs.append(time.perf_counter()), "cpu")
    assert len(runs) == 2


def test_the_least_time_is_that_of_what_takes_longer():
    best = Ceiling(tflops=2.0, gb_per_s=100.0)
    assert best.seconds(Work(1, 4e12, 1e9)) == 2.0 and best.seconds(Work(1, 1e9, 3e11)) == 3.0
