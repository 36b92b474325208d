"""rloo: the reward less its penalty, less the mean of the others', times the gradient of the rollout's log-prob."""

import pytest
import torch
from batches import each_rollout, gradient, ragged, recipe


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_gradient_is_that_of_the_whole_rollouts_logprob(beta, tmp_path):
    batch, rloo = ragged((3, 1, 5, 2, 4), (0, 1, 0, 1, 0)), recipe(tmp_path, "rloo", beta=beta)
    gap = batch.old_logprobs.double() - batch.ref_logprobs.double()
    rewards = [
        float(r) - beta * float(gap[span].sum()) for r, span in zip(batch.rewards, each_rollout(batch), strict=True)
    ]
    expected = []
    for b, group in enumerate(batch.group.tolist()):
        others = [r for at, r in enumerate(rewards) if at != b and batch.group[at] == group]
        expected.append(rewards[b] - sum(others) / len(others))
    assert rloo.advantage(batch).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    got = gradient(rloo, batch, batch.old_logprobs)  # the ratio is 1
    assert torch.allclose(got, -batch.to_tokens(torch.tensor(expected)) / 5, rtol=1e-5, atol=1e-7)
    assert rloo.reads == (("old_logprobs", "ref_logprobs") if beta else ())
    assert rloo.loss.live(batch) is not None  # the penalty is in the reward
