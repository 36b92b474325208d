"""reinforce_pp: returns of token rewards, normalised over the tokens of the batch."""

import math

import pytest
import torch
from batches import each_rollout, gradient, ragged, recipe


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("baseline", [False, True])
def test_advantages_are_normalised_returns(beta, baseline, tmp_path):
    batch = ragged((3, 1, 5, 2, 4), (0, 1, 0, 1, 0))
    ours = recipe(tmp_path, "reinforce_pp", beta=beta, group_baseline=baseline)
    returns = []
    for span, reward, group in zip(each_rollout(batch), batch.rewards, batch.group, strict=True):
        reward = float(reward) - baseline * float(batch.rewards[batch.group == group].double().mean())
        for t in range(span.start, span.stop):
            later = batch.old_logprobs[t : span.stop].double() - batch.ref_logprobs[t : span.stop].double()
            returns.append(reward - beta * float(later.sum()))
    mean = sum(returns) / 15
    deviation = math.sqrt(sum((each - mean) ** 2 for each in returns) / 15)
    expected = torch.tensor([(each - mean) / deviation for each in returns])
    assert torch.allclose(ours.advantage(batch), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(gradient(ours, batch, batch.old_logprobs), -expected / 15, rtol=1e-5, atol=1e-7)
    assert ours.reads == (("old_logprobs", "ref_logprobs") if beta else ())
