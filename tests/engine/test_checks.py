"""What recipes' checks are made of: a figure that holds or does not, a small batch, and gradients on it."""

import math

import pytest
import torch
from batches import each_rollout

from fuserl.engine import checks
from fuserl.engine.advantages import generalised, standardized
from fuserl.engine.checks import EPS, Figure
from fuserl.engine.losses import clipped, squared_value


@pytest.mark.parametrize(
    ("got", "expected", "tolerance", "holds"),
    [
        (0.0, 0, 0, True),
        (15 * EPS, 0, 16 * EPS, True),
        (17 * EPS, 0, 16 * EPS, False),
        (100 + 1000 * EPS, 100, 16 * EPS, True),  # relative
        (100 + 2000 * EPS, 100, 16 * EPS, False),
        (-100 - 1000 * EPS, -100, 16 * EPS, True),
        (-100 - 2000 * EPS, -100, 16 * EPS, False),
        (1e-3, 2e-3, 16 * EPS, False),
        (math.nan, 0, 1, False),
        (math.inf, 0, 1, False),
    ],
)
def test_a_figure_holds_within_its_tolerance(got, expected, tolerance, holds):
    assert Figure("what", got, expected, tolerance).holds is holds
    assert Figure("what", 1.0, 1.0).tolerance == 16 * EPS


def test_the_example_has_a_success_in_every_group():
    batch = checks.example((3, 5, 2, 4, 1, 6), group_size=3)
    assert batch.group.tolist() == [0, 0, 0, 1, 1, 1] and batch.rewards.tolist() == [1, 0, 0, 1, 0, 0]
    assert batch.lengths.tolist() == [3, 5, 2, 4, 1, 6] and [span.stop for span in each_rollout(batch)][-1] == 21
    assert (batch.counts.tokens, batch.counts.rollouts, batch.counts.groups) == (21, 6, 2)
    assert batch.old_logprobs is None and (batch.rollout_logprobs < 0).all() and len(batch.prompt_tokens) == 2
    off = checks.example(off=0.5)
    assert 0.1 < float((off.rollout_logprobs - off.old_logprobs).std()) < 1.0
    assert torch.equal(off.rollout_logprobs, checks.example().rollout_logprobs)
    assert not torch.equal(off.rollout_logprobs, checks.example(seed=1).rollout_logprobs)


def test_credit_comes_from_a_slot_of_either_kind():
    batch = checks.example()
    assert torch.equal(checks.credited(batch, standardized).advantages, batch.to_tokens(standardized(batch)))
    slot = generalised(gamma=1.0, lam=1.0, beta=0.0)
    assert checks.credited(batch.replace(values=torch.zeros(14)), slot).returns is not None


def test_gradient_and_value_are_at_the_batchs_own_logprobs():
    batch = checks.credited(checks.example(), standardized)
    old = batch.rollout_logprobs - math.log(1.1)
    got = checks.gradient(batch.replace(old_logprobs=old), clipped())
    assert torch.allclose(got, 1.1 * checks.gradient(batch, clipped())) and got.any()
    ends = batch.replace(values=torch.zeros(14), returns=torch.full((14,), 2.0))
    assert checks.value(ends, squared_value()) == pytest.approx(2.0)


def test_apart_is_relative_to_the_largest():
    assert checks.apart(torch.tensor([1.0, 4.5]), torch.tensor([1.0, -5.0])) == pytest.approx(1.9)
    assert not Figure("what", checks.apart(torch.ones(2), torch.zeros(2)), 0).holds
