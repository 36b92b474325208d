"""max_rl: over every outcome of a group, the expected gradient is that of log p(success) up to group_size - 1 terms."""

import itertools
import math

import pytest
import torch
from batches import gradient, ragged, recipe

from fuserl.engine.advantages import over_mean


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_expected_gradient_is_the_truncated_one(size, p):
    """For a policy that succeeds with chance p = sigmoid(x): d log p(rollout) / dx is 1 - p, or -p of a failure."""
    expected = 0.0
    for rewards in itertools.product((0.0, 1.0), repeat=size):
        batch = ragged((1,) * size, (0,) * size).replace(rewards=torch.tensor(rewards))
        score = torch.where(batch.rewards > 0, 1 - p, -p)
        chance = math.prod(p if reward else 1 - p for reward in rewards)
        expected += chance * float((over_mean(batch) * score).mean())
    terms = max(size - 1, 1)
    # d/dx of -sum over k <= terms of (1 - p)^k / k
    assert expected == pytest.approx(sum(p * (1 - p) ** k for k in range(1, terms + 1)), rel=1e-5)


def test_the_estimator_is_the_papers(tmp_path):
    """The mean score of the successes minus that of all: per group of one length, over the tokens of the batch."""
    batch = ragged((2,) * 6, (0, 1, 0, 1, 0, 1)).replace(rewards=torch.tensor([1.0, 0, 0, 0, 1, 0]), old_logprobs=None)
    got = gradient(recipe(tmp_path, "max_rl"), batch, batch.rollout_logprobs)
    weight = torch.tensor([1 / 2 - 1 / 3, 0, -1 / 3, 0, 1 / 2 - 1 / 3, 0]) * 3  # no success, no gradient
    assert torch.allclose(got, -batch.to_tokens(weight) / 12)
