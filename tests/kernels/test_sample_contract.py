"""sample as an op: it compiles, passes no gradient, and answers wrong arguments in one sentence."""

import math

import pytest
import torch
from drawn_tokens import names, peaky

import fuserl
from fuserl.kernels.sample import sample


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic):
    def draw(logits, rollout_ids, positions):
        ids, logprob, full = sample(logits * 2, top_k=9, seed=3, rollout_ids=rollout_ids, positions=positions)
        return ids + 1, logprob, full

    compiled = torch.compile(draw, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 5, 6):
        given = names(rows)
        arguments = peaky(rows, 50), given["rollout_ids"], given["positions"]
        got, expected = compiled(*arguments), draw(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_opcheck():
    given = names(3)
    for row_temperature in (None, torch.tensor([0.0, 1.0, 2.0])):
        for backend in ("cpu", "reference"):
            numbers = (1.0, 5, 0.9, -3.0, 7, given["rollout_ids"], given["positions"], backend)
            torch.library.opcheck(torch.ops.fuserl.sample, (peaky(3, 20), row_temperature, *numbers))


def test_a_gradient_does_not_pass():
    logits = peaky(2, 5).requires_grad_()
    assert not any(x.requires_grad for x in sample(logits, **names(2)))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"logits": torch.zeros(3, 4).double()}, r"logits must be \(N, V\) float32, bfloat16 or float16; got \(3, 4\)"),
        ({"logits": torch.zeros(4)}, "logits must be"),
        ({"logits": torch.zeros(3, 0)}, "logits must be"),
        ({"rollout_ids": torch.zeros(2, dtype=torch.int64)}, r"rollout_ids must be \(3,\) int64"),
        ({"positions": torch.zeros(3, dtype=torch.int32)}, "positions must be"),
        ({"positions": torch.zeros(3, dtype=torch.int64, device="meta")}, "positions must be .* on cpu"),
        ({"temperature": -0.5}, "temperature must be 0 .* got -0.5"),
        ({"temperature": math.nan}, "temperature must be 0"),
        ({"temperature": torch.ones(2)}, r"temperature must be a number or \(3,\)"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 0.0}, "top_p must lie"),
        ({"top_p": 1.5}, "top_p must lie"),
        ({"min_p": -0.1}, "min_p must lie"),
        ({"min_p": 1.1}, "min_p must lie"),
        ({"backend": "cudnn"}, "backend must be one of"),
    ],
)
def test_bad_input_gets_one_sentence(change, message):
    with pytest.raises(ValueError, match=f"^sample: .*{message}"):
        fuserl.sample(**{"logits": torch.zeros(3, 4), **names(3), **change})


def test_a_bad_temperature_in_a_row_is_named():
    with pytest.raises(ValueError, match=r"^sample: temperature must be 0 or .*in row 1"):
        sample(torch.zeros(3, 4), temperature=torch.tensor([1.0, -1.0, 0.0]), **names(3), backend="cpu")
