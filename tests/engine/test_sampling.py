"""Drawing tokens: frequencies, cuts against transformers' own, and random streams."""

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fuserl.engine.sampling import Sampling, uniforms


def peaky(rows, vocabulary):
    return 4 * torch.randn(rows, vocabulary)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_every_token_is_drawn_as_often_as_it_is_likely(settings):
    """An even grid of uniforms must give each token its share to within one draw: exact, no statistics."""
    sampling, logits, count = Sampling(**settings), peaky(1, 40), 20_000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ids, logprobs = sampling.draw(logits.expand(count, -1), grid)
    p = sampling.cut(logits.double() / sampling.temperature).softmax(-1)[0]
    assert (torch.bincount(ids, minlength=40) - count * p).abs().max() <= 1
    assert torch.allclose(logprobs.double(), p.log()[ids], atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_cuts_equal_transformers(temperature):
    logits = peaky(50, 3000) / temperature
    for ours, theirs in (
        ({"top_k": 7}, TopKLogitsWarper(7)),
        ({"top_p": 0.9}, TopPLogitsWarper(0.9)),
        ({"top_p": 0.01}, TopPLogitsWarper(0.01)),
        ({"min_p": 0.05}, MinPLogitsWarper(0.05)),
    ):
        assert torch.equal(Sampling(**ours).cut(logits), theirs(None, logits)), ours
    chained = MinPLogitsWarper(0.2)(None, TopPLogitsWarper(0.7)(None, TopKLogitsWarper(40)(None, logits)))
    assert torch.equal(Sampling(top_k=40, top_p=0.7, min_p=0.2).cut(logits), chained)


def test_a_nucleus_wider_than_the_first_look_is_found():
    logits = 0.1 * torch.randn(3, 5000)
    assert torch.equal(Sampling(top_p=0.95).cut(logits), TopPLogitsWarper(0.95)(None, logits))


def test_greedy_takes_the_largest_and_reports_the_plain_logprob():
    logits = peaky(9, 100)
    ids, logprobs = Sampling(temperature=0).draw(logits, torch.rand(9, dtype=torch.float64))
    assert torch.equal(ids, logits.argmax(-1))
    assert torch.allclose(logprobs, logits.log_softmax(-1).amax(-1), atol=1e-6)


def test_the_ends_of_the_unit_interval_draw_tokens_that_can_be_drawn():
    logits = peaky(200, 5000)
    logits[:, :3] = -torch.inf
    logits[:, -3:] = -torch.inf
    for u in (0.0, 1 - 2**-53):
        ids, logprobs = Sampling().draw(logits, torch.full((200,), u, dtype=torch.float64))
        assert ((ids >= 3) & (ids < 4997)).all()
        assert logprobs.isfinite().all()


def test_a_row_does_not_depend_on_the_others():
    logits, u = peaky(32, 5000), torch.rand(32, dtype=torch.float64)
    sampling = Sampling(temperature=0.8, top_k=500, top_p=0.9)
    ids, logprobs = sampling.draw(logits, u)
    for row in (0, 13, 31):
        alone, logprob = sampling.draw(logits[row : row + 1], u[row : row + 1])
        assert alone == ids[row]
        assert logprob == logprobs[row]


def test_streams_are_functions_of_their_names_and_differ():
    names = [(seed, stream, member) for seed in (0, 1, 2**40) for stream in (0, 1) for member in (0, 1)]
    drawn = {name: uniforms(*name, 1000) for name in names}
    for name, numbers in drawn.items():
        assert np.array_equal(numbers, uniforms(*name, 1000))
        assert np.array_equal(numbers[:10], uniforms(*name, 10))
        assert 0 <= numbers.min() < 0.02 and 0.98 < numbers.max() < 1
    together = np.concatenate(list(drawn.values()))
    assert len(np.unique(together)) == len(together)


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": 2}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
