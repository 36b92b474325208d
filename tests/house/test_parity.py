"""The error of a drop-in: gates return it, a row keeps it, README's table of drop-ins prints it."""

import json
import sys
from pathlib import Path

import head_shape
import measure
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "docs"))

import measured_tables


class Once:
    """pytest-benchmark's fixture, for one round."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, run, setup, **_):
        setup()
        run()


def test_the_error_is_the_largest_share_of_a_norm():
    truth = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 10.0])
    found = torch.tensor([3.0, 4.5]), torch.tensor([2.0, 10.0])
    assert measure.near(truth, 1, 2)(found) == pytest.approx(0.2)
    assert measure.relative_error(found[0], truth[0]) == pytest.approx(0.1)
    assert measure.relative_error(torch.tensor([3.0, torch.nan]), truth[0]) == torch.inf
    zero = torch.zeros(2)
    assert measure.relative_error(zero, zero) == 0 and measure.relative_error(truth[0], zero) == torch.inf
    assert measure.relative_error(torch.tensor(torch.nan), torch.tensor(1.0)) != 0


def test_gates_return_it_and_raise_where_it_is_large():
    truth = torch.ones(8, dtype=torch.float64)
    near = truth.float() + 2**-15
    for gate in (lambda x: measure.near([truth])([x]), lambda x: head_shape.check_gradient(x, truth)):
        assert gate(near) == pytest.approx(2**-15)
        with pytest.raises(AssertionError):
            gate(near + 1e-2)


@pytest.mark.parametrize("wrong", [1e-2, torch.nan])
@pytest.mark.parametrize("at", range(3))
def test_a_step_is_wrong_by_any_of_its_results_or_gradients(at, wrong):
    truth = [torch.ones(()), torch.ones(4, 2), torch.ones(3)]
    gate = measure.near(truth, results=1, rtol=1e-4, atol=0, limit=1e-4)
    assert gate([truth[0], truth[1] + 2**-15, truth[2]]) == pytest.approx(2**-15)
    with pytest.raises(AssertionError):
        gate([x + wrong * (n == at) for n, x in enumerate(truth)])
    with pytest.raises(ValueError):
        gate(truth[:2])


def test_the_gradients_of_a_step_are_taken_off_the_model():
    model = torch.nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    weight, bias = measure.gradients(model)
    assert weight.shape == (2, 3) and bool((bias == 1).all()) and model.weight.grad is None


def test_a_row_keeps_what_the_gate_returns():
    case, truth, run = Once(), [torch.ones(2)], lambda: [torch.ones(2) + 2**-15]
    floor, refused = measure.Provider("floor", run), measure.Provider("refused", lambda: [torch.zeros(2)])
    ours = measure.Provider("fuserl", run, measure.near(truth))
    refused.gate = ours.gate
    measure.compare(case, floor, ours, refused, smoke=True)
    rows = {row["provider"]: row for row in case.extra_info["rows"]}
    assert rows["floor"]["error"] is None and rows["fuserl"]["error"] == pytest.approx(2**-15)
    assert rows["refused"]["reason"].startswith("AssertionError") and "median_s" not in rows["refused"]


def cells(rows, folder, monkeypatch):
    """The lines of the table of drop-ins by heading, of rows that lack only what is the same in all."""
    shared = {"case": "test_verl_gae[8-8192]", "reason": None, "median_s": 1e-3, "device": "a CPU"}
    (folder / "a-cpu.jsonl").write_text("".join(json.dumps(shared | row) + "\n" for row in rows))
    monkeypatch.setattr(measured_tables, "RESULTS", folder)
    heads, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")]
                        for line in measured_tables.trainers().splitlines() if line.startswith("|")]  # fmt: skip
    return [dict(zip(heads, line, strict=True)) for line in lines]


@pytest.mark.parametrize(
    "kept,shown",
    [({"error": 3.4e-7}, "3e-7"), ({"error": 1e-10}, "1e-10"), ({"error": 0.0}, "0"), ({"error": None}, ""), ({}, "")],
)
def test_the_table_of_drop_ins_shows_it(kept, shown, tmp_path, monkeypatch):
    rows = [{"provider": "fuserl", "peak_mb": 20.0, **kept}, {"provider": "verl", "peak_mb": 50.0, "error": 1e-2}]
    (line,) = cells(rows, tmp_path, monkeypatch)
    assert line["error"] == shown and line["times less"] == "2.5"


@pytest.mark.parametrize("peak", [None, 0.0, 0.4])
def test_peaks_below_a_megabyte_have_no_ratio(peak, tmp_path, monkeypatch):
    rows = [{"provider": "fuserl", "peak_mb": peak}, {"provider": "verl", "peak_mb": 50.0}]
    assert cells(rows, tmp_path, monkeypatch)[0]["times less"] == ""
