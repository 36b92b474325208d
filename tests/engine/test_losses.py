"""Token losses: their gradients by hand, and the limits that tie them together."""

from types import SimpleNamespace

import pytest
import torch
from test_batch import rollouts

from fuserl.engine.advantages import standardized, uniform
from fuserl.engine.batch import batch_of
from fuserl.engine.losses import clipped, k3, negative_logprob, rollout_mean, token_mean


@pytest.fixture
def batch():
    batch = batch_of(rollouts(), torch.tensor([1.0, 3.0, 5.0]))
    return batch.replace(advantages=torch.tensor([1.0, 1.0, -1.0, 2.0, 0.0, -0.5]), ref_logprobs=-torch.rand(6))


def gradient(loss, batch, logprobs, **others):
    leaf = logprobs.clone().requires_grad_()
    per_token, statistics = loss(SimpleNamespace(logprob=leaf, **others), batch)
    assert per_token.shape == leaf.shape and all(value.shape == leaf.shape for value in statistics.values())
    return torch.autograd.grad(per_token.sum(), leaf)[0]


def test_on_policy_clipping_is_reinforce_exactly(batch):
    logprobs = -torch.rand(6)
    expected = -batch.advantages / (3 * torch.tensor([2.0, 2, 1, 3, 3, 3]))
    assert torch.equal(gradient(clipped(), batch, logprobs), expected)
    assert torch.equal(gradient(clipped(), batch.replace(old_logprobs=logprobs), logprobs), expected)
    assert torch.equal(gradient(clipped(reduce=token_mean), batch, logprobs), -batch.advantages / 6)


def test_clipping_stops_only_the_side_that_gains(batch):
    old = torch.full((6,), -1.0)
    batch = batch.replace(old_logprobs=old, advantages=torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0, -1.0]))
    ratio = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.1, 0.9])
    got = gradient(clipped(low=0.2, high=0.3, reduce=token_mean), batch, old + ratio.log())
    expected = -ratio * batch.advantages / 6 * torch.tensor([0.0, 1, 1, 0, 1, 1])
    assert torch.allclose(got, expected)


def test_kl_and_entropy_terms(batch):
    logprobs, entropy = -torch.rand(6), torch.rand(6)
    silent = batch.replace(advantages=torch.zeros(6))
    got = gradient(clipped(beta=0.1, reduce=token_mean), silent, logprobs)
    assert torch.allclose(got, 0.1 * (1 - (batch.ref_logprobs - logprobs).exp()) / 6)
    leaf = entropy.clone().requires_grad_()
    per_token, _ = clipped(entropy_coef=0.2, reduce=token_mean)(SimpleNamespace(logprob=logprobs, entropy=leaf), silent)
    assert torch.allclose(torch.autograd.grad(per_token.sum(), leaf)[0], torch.tensor(-0.2 / 6))
    assert (k3(logprobs, batch.ref_logprobs) >= 0).all() and (k3(logprobs, logprobs) == 0).all()


def test_live_says_which_gradients_vanish(batch):
    assert clipped().live(batch).tolist() == [True, True, True, True, False, True]
    assert clipped(beta=0.1).live(batch) is None and clipped(entropy_coef=0.1).live(batch) is None
    assert clipped(beta=0.1).reference and not clipped().reference
    assert (gradient(clipped(), batch, -torch.rand(6))[~clipped().live(batch)] == 0).all()


def test_likelihood_of_equal_weights_is_the_mean_cross_entropy(batch):
    batch = batch.replace(advantages=batch.to_tokens(uniform(batch)))
    logprobs = -torch.rand(6)
    per_token, _ = negative_logprob()(SimpleNamespace(logprob=logprobs), batch)
    assert torch.allclose(per_token.sum(), -logprobs.mean())


def test_reductions_do_not_depend_on_the_cut(batch):
    logprobs = -torch.rand(6)
    for reduce in (token_mean, rollout_mean):
        whole = gradient(clipped(reduce=reduce), batch, logprobs)
        for rows in (torch.tensor([0, 3]), torch.tensor([5, 4, 2, 1])):
            assert torch.equal(gradient(clipped(reduce=reduce), batch.take(rows), logprobs[rows]), whole[rows])


def test_standardized_sums_to_zero_in_each_group(batch):
    advantages = standardized(batch)
    assert advantages[:2].sum().abs() < 1e-6 and advantages[2] == 0
