"""grpo: its limit, exactly."""

from types import SimpleNamespace

import torch
from test_batch import rollouts

from fuserl.engine import catalogue
from fuserl.engine.batch import batch_of
from fuserl.engine.config import Config


def test_with_one_epoch_and_beta_zero_the_gradient_is_reinforce_with_the_group_baseline():
    recipe = catalogue.recipe(Config(recipe="grpo").resolved())
    batch = batch_of(rollouts(), torch.tensor([1.0, 3.0, 5.0]))
    advantages = recipe.advantage(batch)
    batch = batch.replace(advantages=batch.to_tokens(advantages))
    logprobs = (-torch.rand(6)).requires_grad_()
    per_token, _ = recipe.loss(SimpleNamespace(logprob=logprobs), batch)
    (gradient,) = torch.autograd.grad(per_token.sum(), logprobs)
    assert torch.equal(gradient, -batch.advantages / (3 * batch.to_tokens(batch.lengths)))
    assert advantages[2] == 0 and torch.allclose(advantages[:2], torch.tensor([-1.0, 1.0]) / 2**0.5)
