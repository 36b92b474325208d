"""The meter of a step: every moment in one phase, rates of what was done in it, and shares of a known ceiling."""

import types

import pytest

from fuserl.engine import meter
from fuserl.engine.ceiling import Ceiling
from fuserl.engine.meter import Meter
from fuserl.engine.work import Work


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves by hand."""
    moment = types.SimpleNamespace(now=100.0)
    monkeypatch.setattr(meter.time, "perf_counter", lambda: moment.now)
    return moment


def seconds(row):
    return {name: value for name, value in row.items() if name.endswith("_s") and "per" not in name}


def test_a_moment_is_in_the_innermost_phase_only(clock):
    taken = Meter()
    with taken.phase("generate"):
        clock.now += 2
        with taken.phase("reward"):
            clock.now += 1
            with taken.phase("score"):
                clock.now += 8
        clock.now += 4
        with taken.phase("reward"):
            clock.now += 128
    clock.now += 16
    with taken.phase("update"), taken.phase("score"):
        clock.now += 32
    with taken.phase("update"):
        clock.now += 64
    found = seconds(taken.row(clock.now - 100))
    assert found == {"generate_s": 6, "reward_s": 129, "score_s": 40, "update_s": 64, "other_s": 16}


def test_a_phase_that_fails_counts_and_leaves_the_outer_one_as_it_was(clock):
    taken = Meter()
    with taken.phase("generate"):
        with pytest.raises(KeyError), taken.phase("reward"):
            clock.now += 3
            raise KeyError
        clock.now += 5
    assert taken.seconds["reward"] == 3 and taken.seconds["generate"] == 5
    taken.clear()
    assert not any(taken.seconds.values()) and not taken.work


def test_rates_are_of_the_phase_and_shares_of_the_ceiling(clock):
    taken = Meter(Ceiling(tflops=2.0, gb_per_s=100.0))
    with taken.phase("generate"):
        clock.now += 4
        for _ in range(2):
            taken.add(read=Work(50, 1e12, 1e9), drawn=Work(10, 1e11, 5e10))
    with taken.phase("update"):
        clock.now += 2
        taken.add(update=Work(300, 3e12))
    row = taken.row(10.0)
    assert row["generate_tokens_per_s"] == 5 and row["read_tokens_per_s"] == 25 and row["update_tokens_per_s"] == 150
    assert row["generate_tflops"] == pytest.approx(2.2 / 4) and row["generate_gb_per_s"] == pytest.approx(102 / 4)
    assert row["update_tflops"] == pytest.approx(1.5) and "update_gb_per_s" not in row
    # 2e12 operations of reading take a second, 1e11 bytes of drawing take another: of four.
    assert row["generate_share"] == pytest.approx(2 / 4) and row["update_share"] == pytest.approx(1.5 / 2)


def test_a_phase_without_work_has_no_rates(clock):
    taken = Meter()
    with taken.phase("update"):
        clock.now += 1
    assert set(taken.row(1.0)) == {f"{name}_s" for name in ("generate", "reward", "score", "update", "other")}
    taken.add(drawn=Work(10, 1.0, 1.0))
    assert "generate_tokens_per_s" not in taken.row(1.0)  # no time was taken, so nothing is known
    with taken.phase("generate"):
        clock.now += 1
    assert taken.row(2.0)["generate_tokens_per_s"] == 10 and "generate_share" not in taken.row(2.0)


def test_a_method_is_a_phase(clock):
    class Worker:
        def __init__(self):
            self.meter = Meter()

        @meter.phase("score")
        def work(self, amount, *, more=0):
            """Takes a while."""
            clock.now += amount + more
            return amount

    worker = Worker()
    assert worker.work(2, more=1) == 2 and worker.meter.seconds["score"] == 3
    assert Worker.work.__doc__ == "Takes a while."
