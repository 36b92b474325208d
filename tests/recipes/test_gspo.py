"""gspo: the gradient is that of the paper's objective, with one ratio per rollout; its clip takes whole rollouts."""

import pytest
import torch
from batches import each_rollout, gradient, ragged, recipe


def objective(logprob, batch, advantages, low, high):
    """Equation 5 of the paper, negated."""
    total = 0.0
    for span, a in zip(each_rollout(batch), advantages.tolist(), strict=True):
        ratio = (logprob[span] - batch.old_logprobs[span].double()).mean().exp()
        total = total + torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
    return -total / len(batch.group)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", [{}, {"low": 0.1, "high": 0.3}])
def test_the_gradient_is_that_of_the_papers_objective(seed, options, tmp_path):
    batch, gspo = ragged((3, 1, 5, 2, 4, 1), (0, 1, 0, 1, 1, 0), seed=seed), recipe(tmp_path, "gspo", **options)
    logprob = batch.rollout_logprobs.double().requires_grad_()
    value = objective(logprob, batch, gspo.advantage(batch), options.get("low", 3e-4), options.get("high", 4e-4))
    (expected,) = torch.autograd.grad(value, logprob)
    got = gradient(gspo, batch, batch.rollout_logprobs)
    assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-8) and expected.any()
    assert gspo.loss.scope == "rollout"


def test_a_rollout_is_clipped_with_all_its_tokens(tmp_path):
    batch = ragged((3, 5), (0, 0)).replace(rewards=torch.tensor([1.0, 0.0]))
    old = batch.rollout_logprobs
    shift = torch.tensor([0.3, -0.1, 0.0, *[0.001] * 5])  # the first goes up by e^(0.2 / 3) on the whole
    got = gradient(recipe(tmp_path, "gspo"), batch.replace(old_logprobs=old - shift), old)
    assert not got[:3].any() and (got[3:] > 0).all() and (got[3:] == got[3]).all()
