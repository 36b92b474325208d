"""Sampling: the op with its settings, against transformers' own cuts, and the names of rollouts."""

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fuserl.engine.sampling import Sampling, stream_of


def peaky(rows, vocabulary):
    return 4 * torch.randn(rows, vocabulary)


def names(rows):
    return torch.tensor([stream_of(row // 3, row % 3) for row in range(rows)]), torch.arange(rows) % 5


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_cuts_equal_transformers(temperature):
    """What may be drawn, and how likely, is what transformers leaves."""
    logits = peaky(400, 300)
    every = [TopKLogitsWarper(40), TopPLogitsWarper(0.7), MinPLogitsWarper(0.2)]
    for ours, theirs in (
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_p": 0.9}, [TopPLogitsWarper(0.9)]),
        ({"top_p": 0.01}, [TopPLogitsWarper(0.01)]),
        ({"min_p": 0.05}, [MinPLogitsWarper(0.05)]),
        ({"top_k": 40, "top_p": 0.7, "min_p": 0.2}, every),
    ):
        cut = logits / temperature
        for warper in theirs:
            cut = warper(None, cut)
        ids, logprobs = Sampling(temperature, **ours).draw(logits, *names(400))
        expected = cut.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        assert torch.allclose(logprobs, expected, atol=1e-5), ours


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_greedy_takes_the_largest_and_reports_the_plain_logprob(dtype):
    logits = peaky(9, 100).to(dtype)
    ids, logprobs = Sampling(temperature=0).draw(logits, *names(9))
    assert torch.equal(ids, logits.argmax(-1))
    assert torch.allclose(logprobs, logits.float().log_softmax(-1).amax(-1), atol=1e-6)


def test_a_row_does_not_depend_on_the_others():
    logits, (streams, positions) = peaky(32, 5000), names(32)
    sampling = Sampling(temperature=0.8, top_k=500, top_p=0.9, seed=4)
    ids, logprobs = sampling.draw(logits, streams, positions)
    for row in (0, 13, 31):
        at = slice(row, row + 1)
        alone, logprob = sampling.draw(logits[at], streams[at], positions[at])
        assert alone == ids[row]
        assert logprob == logprobs[row]


def test_every_rollout_has_a_name_of_its_own():
    made = {stream_of(prompt, member) for prompt in (0, 1, 2**31, 2**32 - 1, -1) for member in (0, 1, 2**32 - 1)}
    assert len(made) == 12  # -1 is 2^32 - 1
    assert all(torch.tensor(name).dtype == torch.int64 for name in made)


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
