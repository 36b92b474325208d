"""Tally: averages over optimizer steps or over tokens, and statistics of parts merged: the loss's, the mismatch's."""

import math
import types

import pytest
import torch

from fuserl.engine.tally import Tally
from fuserl.kernels.policy_loss import named, policy_loss


def test_totals_are_averaged_over_steps():
    tally = Tally()
    for loss in (1.0, 2.0, 6.0):  # three micro-batches of two steps
        tally.add(loss=torch.tensor(loss))
    tally.add(skipped=torch.tensor(1.0))
    tally.steps = 2
    assert tally.means() == {"loss": 4.5, "skipped": 0.5}


def test_statistics_are_averaged_over_the_rows_that_have_them():
    tally = Tally()
    tally.observe({"nll": torch.tensor([1.0, torch.nan, 3.0]), "margin": torch.tensor([torch.nan])})
    tally.observe({"nll": torch.tensor([8.0])})
    means = tally.means()
    assert means["nll"] == 4.0 and math.isnan(means["margin"])


def test_mismatch_is_of_all_parts_together():
    tally, drawn, rollout = Tally(), torch.tensor([-1.0, -2.0, torch.nan, -1.0]), torch.tensor([0, 0, 0, 0])
    for gaps in ([0.5, -2.0, 9.0, 0.0], [1.0, 0.0, 9.0, -0.5]):
        part = types.SimpleNamespace(rollout_logprobs=drawn, rollout=rollout, group=torch.zeros(1))
        tally.compare(drawn.nan_to_num(0.0) + torch.tensor(gaps), part)
    means = tally.means()
    assert means["mismatch"] == pytest.approx(4.0 / 6) and means["mismatch_max"] == 2.0
    both = [-1.5, 0.5]
    share = sum(map(math.exp, both)) ** 2 / (2 * sum(math.exp(2 * each) for each in both))
    assert means["mismatch_rollout_ess"] == pytest.approx(share) and 0 < means["mismatch_ess"] < 1


def test_policy_statistics_of_parts_are_those_of_the_whole():
    random = torch.Generator().manual_seed(0)
    logprobs, old, advantages = (torch.randn(60, generator=random) for _ in range(3))
    _, whole = policy_loss(logprobs, advantages, old_logprobs=old)
    tally = Tally()
    parts = [
        policy_loss(logprobs[at], advantages[at], old_logprobs=old[at])[1]
        for at in (slice(0, 1), slice(1, 20), slice(20, 60))
    ]
    tally.observe({"policy": torch.stack(parts[:2])})  # two chunks of a micro-batch
    tally.observe({"policy": parts[2][None], "entropy": torch.ones(40)})
    means = tally.means()
    assert means.pop("entropy") == 1.0 and "policy" not in means
    assert means == pytest.approx({name: float(value) for name, value in named(whole).items()}, rel=1e-5)
    assert {"ratio", "ratio_max", "ratio_min", "clipped_low", "clipped_high", "approx_kl", "kl"} <= set(means)


def test_no_graph_is_kept():
    x = torch.ones(3, requires_grad=True)
    tally = Tally()
    tally.observe({"nll": 2 * x, "policy": (2 * x)[None]})
    kept = [*tally._sums.values(), *tally._policy]
    assert kept and not any(value.requires_grad for value in kept)


def test_nothing_counted_is_nothing():
    assert Tally().means() == {}
    tally = Tally()
    tally.add(live=torch.tensor(0.0))
    tally.steps = 1
    assert tally.means() == {"live": 0.0} and all(type(value) is float for value in tally.means().values())
