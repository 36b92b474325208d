"""The numerics rows: what an error is, and that the measured ones are of every op in every backend."""

import json
import math
import sys
from pathlib import Path

import pytest
import subjects
import torch

import fuserl

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import numerics


def test_errors_are_the_largest_and_the_largest_of_a_row():
    truth = torch.tensor([[3.0, 4.0], [1e-5, 0.0], [0.0, 30.0]])
    got = truth + torch.tensor([[0.0, 0.5], [1.0, 0.0], [0.6, 0.0]])
    assert numerics.errors(got, truth) == pytest.approx({"absolute": 1.0, "relative": 0.1})
    assert numerics.errors(torch.tensor([3.0, 4.5]), truth[0]) == pytest.approx({"absolute": 0.5, "relative": 0.1})
    statistics = torch.tensor([[1.0], [1e-6]]), torch.tensor([[1.0], [2e-6]])
    assert numerics.errors(*statistics)["relative"] == pytest.approx(0.5)
    assert numerics.errors(truth[0], truth[0]) == {"absolute": 0, "relative": 0}
    assert numerics.errors(torch.tensor(math.nan), torch.tensor(1.0)) == {"absolute": None, "relative": None}


def test_every_op_is_a_subject():
    assert set(fuserl.OPS) <= set(numerics.SUBJECTS) <= set(fuserl.__all__)


@pytest.mark.parametrize("op", numerics.SUBJECTS)
def test_ours_are_small_and_plain_ones_are_seen(op, monkeypatch):
    monkeypatch.setattr(subjects, "VOCABULARY", 600)
    subject = numerics.SUBJECTS[op]
    for kind in subject.kinds:
        ours = numerics.measured(op, kind, torch.float32, "cpu", rows=16)
        plain = numerics.measured(op, kind, subject.dtypes[-1], "torch", rows=16)
        assert ours.keys() == plain.keys() and any(figures["absolute"] > 0 for figures in plain.values())
        assert all(figures["absolute"] < 0.1 or figures["relative"] < 1e-6 for figures in ours.values()), (kind, ours)


@pytest.mark.parametrize("op", numerics.SUBJECTS)
def test_plain_torch_means_the_same(op, monkeypatch):
    monkeypatch.setattr(subjects, "VOCABULARY", 600)
    figures = numerics.measured(op, "usual", torch.float32, "torch", rows=16)
    assert all(each["relative"] < 1e-4 for each in figures.values()), figures


@pytest.mark.parametrize("op", ["token_logprob", "linear_policy_loss"])
def test_in_float64_nothing_is_left(op, monkeypatch):
    monkeypatch.setattr(subjects, "VOCABULARY", 600)
    for backend in ("cpu", "torch"):
        figures = numerics.measured(op, "usual", torch.float64, backend, rows=16)
        assert all(each["absolute"] < 1e-12 for each in figures.values())


def test_the_same_inputs_go_to_every_backend():
    for backend in ("cpu", "reference"):
        figures = numerics.measured("token_logprob", "usual", torch.bfloat16, backend, rows=4)
        assert figures["logprob"]["absolute"] < 1e-5 < figures["dlogits"]["absolute"]


def test_the_kept_rows_cover_every_op_and_kind():
    rows = [json.loads(line) for line in numerics.RESULTS.read_text().splitlines()]
    for op, subject in numerics.SUBJECTS.items():
        found = {(row["inputs"], row["dtype"], row["backend"]) for row in rows if row["op"] == op}
        backends = [*({"triton", "cpu", "reference"} & set(subject.implemented)), "torch"]
        dtypes = [str(dtype).removeprefix("torch.") for dtype in subject.dtypes]
        assert found >= {(kind, dtype, each) for kind in subject.kinds for dtype in dtypes for each in backends}
    assert all(row["torch"] and row["machine"] and row["commit"] for row in rows)
