"""Targets: Z, moments and f-divergences against their definitions, on all sequences at once and on draws."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from fuserl.engine import targets
from fuserl.engine.targets import Moments, Partition, distinct, inferred, reinforced
from fuserl.engine.toys import kl_bayes as toy

F = {
    "forward_kl": lambda t: -t.log(),
    "reverse_kl": lambda t: t * t.log(),
    "jensen_shannon": lambda t: t * (2 * t / (t + 1)).log() + (2 / (t + 1)).log(),
    "total_variation": lambda t: (t - 1).abs() / 2,
}


def slope(world, credit):
    """The gradient of a recipe's loss over every sequence."""
    return world.table.gradient(credit(world.every()), reinforced())


def world(**options):
    return toy.Enumerable(**{"moved": 1.0, **options})


@pytest.mark.parametrize("name", targets.SLOPES)
@pytest.mark.parametrize("baseline", [False, True])
def test_fdpg_has_the_gradient_of_its_divergence(name, baseline):
    ours = world()
    logs, (p, _) = ours.logs(ours.table.logits), ours.posterior(0.7)
    expected = torch.autograd.grad((p.exp() * F[name]((logs - p).exp())).sum(), ours.table.logits)[0]
    got = slope(ours, inferred("fdpg", divergence=name, beta=0.7, baseline=False))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
    if baseline:  # takes nothing off the mean; Z is as good as known
        partition = Partition(1 - 1e-12)
        inferred("dpg", beta=0.7, partition=partition)(ours.every())
        partition.logs = {key: (log_z, 10**12) for key, (log_z, _) in partition.logs.items()}
        credit = inferred("fdpg", divergence=name, beta=0.7, partition=partition)
        assert toy.sampled_error(ours, credit, reinforced(), expected, draws=20_000) < 4


def test_dpg_is_the_forward_kl_and_kl_rl_the_reverse():
    ours = world()
    p, _ = ours.posterior(0.7)
    forward = torch.autograd.grad(-(p.exp() * ours.logs(ours.table.logits)).sum(), ours.table.logits)[0]
    for baseline in (False, True):
        got = slope(ours, inferred("dpg", beta=0.7, baseline=baseline))
        torch.testing.assert_close(got, forward, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(
        slope(ours, inferred("fdpg", divergence="forward_kl", beta=0.7, baseline=False)), forward
    )
    reverse = slope(ours, inferred("fdpg", divergence="reverse_kl", beta=0.7, baseline=False))
    torch.testing.assert_close(slope(ours, inferred(beta=0.7, baseline=False)), 0.7 * reverse, rtol=1e-11, atol=1e-13)


def test_the_baseline_of_dpg_is_one_on_policy():
    ours = world()
    batch = ours.given(torch.arange(64))
    p, z = ours.posterior(0.7)[0], Partition()
    plain, held = (inferred("dpg", beta=0.7, baseline=each, partition=z)(batch) for each in (False, True))
    torch.testing.assert_close(held.advantages, plain.advantages - 1, rtol=1e-12, atol=1e-12)
    weights = (p - ours.logs(ours.table.logits.detach())).exp()
    torch.testing.assert_close(plain.advantages[::2], weights / weights.mean(), rtol=1e-12, atol=1e-12)


def test_diagnostics_are_the_numbers_that_they_estimate():
    ours = world()
    logs, prior, (p, _) = ours.logs(ours.table.logits.detach()), ours.logs(ours.prior), ours.posterior(0.7)
    uniform = torch.full((64,), -math.log(64), dtype=torch.float64)
    expected = {
        "kl_to_prior": toy.divergence(logs, prior),
        "kl_to_target": toy.divergence(logs, p),
        "kl_from_target": toy.divergence(p, logs),
        "sequence_entropy": toy.entropy(logs),
        "effective_sample_size": 1 / float((2 * p - uniform).exp().sum()),
    }
    credited = inferred(beta=0.7)(ours.every())
    assert {name: float(x[0]) for name, x in credited.facts.items()} == pytest.approx(expected, rel=1e-12)
    _, statistics = reinforced()(ours.table.outputs(credited), credited)
    assert {name: float(statistics[name].nanmean()) for name in expected} == pytest.approx(expected, rel=1e-12)
    nowhere = inferred("dpg", "pointwise")(ours.every())
    assert nowhere.facts["kl_to_target"].isnan().all() and nowhere.facts["kl_from_target"].isfinite().all()


def test_pointwise_is_the_prior_where_the_reward_is_one():
    ours = world()
    right, prior = ours.rewards >= 1, ours.logs(ours.prior)
    share = (prior.exp() * right) / (prior.exp() * right).sum()
    expected = torch.autograd.grad(-(share * ours.logs(ours.table.logits)).sum(), ours.table.logits)[0]
    got = slope(ours, inferred("dpg", "pointwise", baseline=False))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
    for divergence in ("forward_kl", "jensen_shannon", "total_variation"):
        assert slope(ours, inferred("fdpg", "pointwise", divergence=divergence)).isfinite().all()
    without = ours.every()
    without = inferred("dpg", "pointwise", baseline=False)(without.replace(rewards=0 * without.rewards))
    assert not without.advantages.any()  # nothing of the target is there to learn from


def test_moments_are_met_by_the_tilted_prior():
    ours, moments = world(), Moments([0.5], lr=1.0, steps=200)
    batch = ours.every()
    _, log_prior, log_q = targets.sums(batch)
    fitted = moments.fitted(batch, batch.rewards[:, None], log_prior - log_q)
    p = (log_prior + fitted * ours.rewards).softmax(0)
    assert float((p * ours.rewards).sum()) == pytest.approx(0.5, abs=1e-9)
    got = slope(ours, inferred("dpg", "moments", baseline=False, moments=moments))
    expected = torch.autograd.grad(-(p * ours.logs(ours.table.logits)).sum(), ours.table.logits)[0]
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)
    again = Moments([0.0], lr=1.0, steps=1)
    again.load_state_dict(moments.state_dict())
    assert torch.equal(again.coefficients, moments.coefficients)


def test_moments_of_several_features_and_groups():
    ours, moments = world(), Moments([0.3, 0.1], lr=1.0, steps=2000)
    batch = ours.every()
    phi = torch.stack([ours.rewards, (toy.EVERY[:, 0] == 0).double()], 1)
    batch = batch.replace(group=torch.arange(64) % 3, facts={"phi": phi})
    _, log_prior, log_q = targets.sums(batch)
    score = targets.with_moments(moments)(batch, log_prior - log_q)
    means = [((log_prior + score)[batch.group == g].softmax(0) @ phi[batch.group == g]) for g in range(3)]
    assert (sum(means) / 3).tolist() == pytest.approx([0.3, 0.1], abs=1e-6)
    with pytest.raises(ValueError, match="moments must be one per feature, 2; got 1"):
        targets.with_moments(Moments([0.3], lr=1.0, steps=1))(batch, log_prior)


def test_z_is_a_mean_that_becomes_a_moving_average():
    batch, partition = world().every(), Partition(0.75)
    logs = [torch.full((64,), math.log(z), dtype=torch.float64) for z in (2.0, 4.0, 6.0, 8.0, 16.0)]
    means, expected = [], [2.0, 3.0, 4.0, 5.0, 5.0 + 11.0 / 4]
    for each in logs:
        means.append(float(partition.seen(batch, each)[0].exp()))
    assert means == pytest.approx(expected, rel=1e-12)
    again = Partition(0.75)
    again.load_state_dict(json.loads(json.dumps(partition.state_dict())))
    assert torch.equal(again.seen(batch, logs[0]), partition.seen(batch, logs[0]))
    apart = batch.replace(group=torch.arange(64) // 32, prompt_tokens=[torch.tensor([1]), torch.tensor([2])])
    weights = torch.cat([logs[0][:32], torch.full((32,), -math.inf)])
    found = Partition().seen(apart, weights)
    assert found[:32].tolist() == pytest.approx([math.log(2)] * 32) and (found[32:] == -math.inf).all()


def test_distinct_counts_no_gram_of_two_rollouts():
    tokens, offsets = torch.tensor([1, 2, 1, 2, 2, 2, 3]), torch.tensor([0, 3, 3, 6, 7])
    assert distinct(tokens, offsets, 1) == 3 / 7 and distinct(tokens, offsets, 2) == 3 / 4
    assert distinct(tokens, offsets, 3) == 1.0 and math.isnan(distinct(tokens, offsets, 4))
    assert math.isnan(distinct(tokens[:1], torch.tensor([0, 1]), 2))


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        (("kl",), {}, "objective must be one of kl_rl, dpg, fdpg; got 'kl'"),
        (("dpg", "moment"), {}, "target must be one of posterior, moments, pointwise; got 'moment'"),
        (("fdpg",), {"divergence": "kl"}, "divergence must be one of forward_kl"),
        (("dpg",), {"beta": 0.0}, "beta must be > 0; 0 for kl_rl to a posterior"),
        (("kl_rl", "pointwise"), {}, "target must be above 0 everywhere for a reverse KL"),
        (("fdpg", "pointwise"), {"divergence": "reverse_kl"}, "target must be above 0 everywhere"),
    ],
)
def test_what_has_no_gradient_is_refused(arguments, options, says):
    with pytest.raises(ValueError, match=f"^inferred: {says}"):
        inferred(*arguments, **options)


def test_what_tells_distinct_ends_the_workers_of_its_reward():
    closed = []

    def reward(rollouts):
        return torch.ones(2), {"words": 1}

    reward.close = lambda: closed.append(True)
    rollouts = SimpleNamespace(tokens=torch.tensor([1, 2, 1, 2]), offsets=torch.tensor([0, 2, 4]))
    told = targets.with_distinct(reward)
    assert told(rollouts)[1] == {"words": 1, "distinct_1": 0.5, "distinct_2": 0.5}
    told.close()
    assert closed == [True]
    targets.with_distinct(lambda rollouts: None).close()  # a reward without workers


def test_moments_are_finite():
    with pytest.raises(ValueError, match="Moments: moments must be finite numbers"):
        Moments([0.5, math.nan], lr=0.1, steps=1)
