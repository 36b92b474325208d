"""kept against the float64 definition of the cuts; and a rollout's log-probs replayed over what it lists."""

import math

import pytest
import torch
from backends import INTERPRETING, each_backend, run_interpreted
from drawn_tokens import CUTS, DTYPES, allowed, names, peaky
from tolerance import check

from fuserl.kernels.kept import kept
from fuserl.kernels.linear_logprob import linear_logprob
from fuserl.kernels.sample import sample, weight_bits

SOME_CUTS = CUTS[::3] if INTERPRETING else CUTS  # a program takes a second in the interpreter


def lists(ids, offsets):
    return [ids[a:b].tolist() for a, b in zip(offsets.tolist(), offsets[1:].tolist(), strict=False)]


@each_backend
@pytest.mark.parametrize("dtype", DTYPES[:2] if INTERPRETING else DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 33] if INTERPRETING else [1, 17, 1000, 4097])
def test_equals_the_definition(vocabulary, dtype, device, backend):
    logits = peaky(3 if INTERPRETING else 30, vocabulary, dtype)
    for cuts in SOME_CUTS:
        ids, offsets = kept(logits.to(device), **cuts, backend=backend)
        assert ids.dtype == offsets.dtype == torch.int64 and ids.device.type == device and not offsets.is_cuda
        cut, full = allowed(logits, **cuts)
        drawable = full > full.amax(-1, keepdim=True) - math.log(2) * (weight_bits(vocabulary) + 2)
        possible = full.isfinite() if cuts.get("temperature") == 0 else cut.isfinite() & drawable
        assert lists(ids.cpu(), offsets) == [row.nonzero()[:, 0].tolist() for row in possible], cuts


@each_backend
def test_ties_barred_tokens_and_a_temperature_per_row(device, backend):
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 0.0, 2.0, -torch.inf, 0.0, -0.0]], device=device).repeat(2, 1)
    for cuts, expected in (
        ({"top_k": 1}, [1, 3]), ({"top_k": 3}, [1, 2, 3, 4, 6]), ({"top_k": 7}, [0, 1, 2, 3, 4, 5, 6, 8, 9]),
        ({"top_p": 0.5}, [1, 3]), ({"min_p": 1.0}, [1, 3]), ({}, [0, 1, 2, 3, 4, 5, 6, 8, 9]),
    ):  # fmt: skip
        assert lists(*(x.cpu() for x in kept(logits, **cuts, backend=backend))) == [expected] * 2, cuts
    temperature = torch.tensor([0.0, 0.1], device=device)
    found = lists(*(x.cpu() for x in kept(logits, temperature=temperature, top_p=0.99, backend=backend)))
    assert found == [[0, 1, 2, 3, 4, 5, 6, 8, 9], [1, 3]]
    none = kept(torch.zeros(0, 5, device=device), top_k=2, backend=backend)
    assert none[0].shape == (0,) and none[1].tolist() == [0]


@pytest.mark.skipif(INTERPRETING, reason="compares the other backends")
def test_backends_keep_the_same():
    logits = peaky(40, 3001)
    logits[0] = logits[0].round()
    logits[1] *= 3000
    for cuts in CUTS:
        for a, b in zip(kept(logits, **cuts, backend="cpu"), kept(logits, **cuts, backend="reference"), strict=True):
            assert torch.equal(a, b), cuts


@each_backend
@pytest.mark.parametrize("per_row", [False, True])
def test_a_rollout_replays_its_log_probs(per_row, device, backend):
    """What sample says of the token that it drew is what training says of it over the same tokens."""
    rows, vocabulary = (4, 400) if INTERPRETING else (200, 3001)
    hidden, weight = torch.randn(rows, 24).to(device), torch.randn(vocabulary, 24).to(device)
    temperature, logits = (torch.rand(rows).to(device) + 0.5) if per_row else 0.8, hidden @ weight.T
    for cuts in ({"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 40, "top_p": 0.9, "min_p": 0.01}):
        settings = {"temperature": temperature, **cuts, "backend": backend}
        ids, logprob, full = sample(logits, **settings, **names(rows, device))
        listed = kept(logits, **settings)
        assert listed[1].diff().min() >= 1 and listed[1][-1] < rows * vocabulary / 4
        replayed = linear_logprob(hidden, weight, ids, allowed=listed, temperature=temperature).logprob
        barred = torch.ones(rows, vocabulary, dtype=torch.bool, device=device)
        barred[torch.arange(rows, device=device).repeat_interleave(listed[1].diff().to(device)), listed[0]] = False
        of = temperature[:, None] if per_row else temperature
        truth, plain = (
            (z / of).masked_fill(barred, -torch.inf).log_softmax(-1).gather(1, ids[:, None])[:, 0]
            for z in (hidden.double() @ weight.double().T, logits)
        )
        check("replayed", replayed, truth, plain, torch.float32)
        check("logprob", logprob, truth, plain, torch.float32)
        assert (logprob - full).max() > 1e-3, "or nothing was cut"


@pytest.mark.skipif(INTERPRETING, reason="says nothing of Triton")
def test_bad_input_gets_the_sentence_of_sample():
    for change, message in (({"top_p": 0.0}, "top_p must lie"), ({"logits": torch.zeros(3)}, "logits must be")):
        with pytest.raises(ValueError, match=f"^sample: {message}"):
            kept(**{"logits": torch.zeros(3, 4), **change})


@pytest.mark.skipif(INTERPRETING, reason="starts it")
def test_triton_in_the_interpreter():
    run_interpreted(__file__)
