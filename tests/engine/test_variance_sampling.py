"""Prompts by variance: what scores are made of, what a checkpoint keeps, and what is true of the variance."""

import pytest
import torch

from fuserl.engine import variance_sampling
from fuserl.engine.variance_sampling import VarianceSampler, claimed_gain, optimal_variance, variance_parts


def sampler(**changes):
    return VarianceSampler(**{"size": 6, "groups": 4, "seed": 1, "lam": 0.5, "a": 0.8, "b": 0.2, **changes})


CORRECT = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 0], [0, 0], [1, 1]])
DIVERSE = torch.tensor([0.0, 0.5, 1.0, 0.0, 0.5, 0.0], dtype=torch.float64)


def test_scores_are_the_weighted_sum_brought_to_0_and_1_with_momentum():
    plain, whole, slow = sampler(min_max=False), sampler(), sampler(momentum=0.75)
    for each in (plain, whole, slow):
        each.refresh(CORRECT, DIVERSE)
    vps = torch.tensor([0, 0.2 + 0.1, 0.2, 0.2, 0.1, 0], dtype=torch.float64)
    torch.testing.assert_close(plain.scores, vps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.scores, vps / (0.3 + 1e-8), rtol=1e-12, atol=1e-12)
    assert torch.equal(slow.scores, whole.scores)  # there is nothing to keep yet
    slow.refresh(torch.ones(6, 3), torch.zeros(6))
    torch.testing.assert_close(slow.scores, 0.75 * whole.scores, rtol=1e-12, atol=1e-12)
    assert slow.spent == 12 + 18 and whole.spent == 12


def test_drawn_and_walked_prompts_take_turns_and_the_walk_visits_all():
    one = sampler()
    one.refresh(torch.tensor([[0, 1]] + [[0, 0]] * 5), torch.zeros(6))
    steps = [one.places(step) for step in range(1, 4)]
    assert all(places[0] == places[2] == 0 for places in steps)
    assert sorted(place for places in steps for place in places[1::2]) == list(range(6))
    assert sampler(lam=1.0).places(1) and len(sampler(lam=0.3).places(1)) == 4


def test_a_checkpoint_goes_on_with_the_same_prompts():
    one, other = sampler(), sampler()
    one.refresh(CORRECT, DIVERSE)
    drawn = list(one.places(7))
    one.refresh(torch.tensor([[0, 1]] + [[0, 0]] * 5), torch.zeros(6))  # as when step 7's rollouts are drawn ahead
    other.load_state_dict(one.state_dict())
    assert other.places(7) == one.places(7) == drawn and other.places(8) == one.places(8) and other.spent == 24
    fresh = sampler()
    fresh.load_state_dict(sampler().state_dict())
    assert fresh.scores is None
    smaller = sampler(size=5)
    smaller.load_state_dict(one.state_dict())
    assert smaller.scores is None and max(smaller.places(7)) < 5


@pytest.mark.parametrize(
    ("name", "value"), [("size", 0), ("lam", 1.5), ("momentum", 1.0), ("a", -1.0), ("b", float("inf"))]
)
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"VarianceSampler: {name} must be"):
        sampler(**{name: value})


def test_the_best_baseline_has_the_least_second_moment():
    random = torch.Generator().manual_seed(0)
    p = torch.rand(5, generator=random, dtype=torch.float64).softmax(0)
    rewards, scores = torch.rand(5, generator=random, dtype=torch.float64), torch.eye(5, dtype=torch.float64) - p
    moment, gamma = optimal_variance(p, rewards, scores)

    def at(baseline):
        return (p * (rewards - baseline).square() * scores.square().sum(-1)).sum()

    assert all(at(b) >= moment - 1e-12 for b in torch.linspace(0, 1, 101, dtype=torch.float64))
    assert float(moment / gamma) == pytest.approx(float((p * (rewards - p @ rewards).square()).sum()), rel=1e-12)


def test_no_lower_bound_is_offered_and_the_claim_says_what_it_is():
    rates, weights = torch.full((3,), 0.3), torch.full((3,), 1 / 3)
    assert float(variance_parts(weights, rates)[1]) == pytest.approx(0, abs=1e-12)  # however far apart they are
    public = [name for name in vars(variance_sampling) if not name.startswith("_")]
    assert not [name for name in public if "least" in name or "lower" in name]
    assert "a claim, not a bound" in claimed_gain.__doc__
    assert claimed_gain(0.2, eta=0.1, c_min=1.0, gamma=1.0, smoothness=1.0) == pytest.approx(0.005)
    with pytest.raises(ValueError, match="eta must be in"):
        claimed_gain(0.2, eta=0.3, c_min=1.0, gamma=1.0, smoothness=1.0)
