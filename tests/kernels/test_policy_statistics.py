"""What is read off policy_loss's statistics: means by name, and those of parts merged into those of the whole."""

import math

import pytest
import torch
from clipped_policy import tokens

from fuserl.kernels.policy_loss import policy_loss
from fuserl.kernels.policy_statistics import STATISTICS, merged, named
from fuserl.kernels.surrogates import Clip, Within

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_named_are_the_means_of_the_tokens_in_the_mask(device):
    x = tokens(1000, device=device)
    x["rollout_logprobs"] = x["old_logprobs"] + 0.4 * torch.randn(1000).to(device)
    statistics = policy_loss(**x, surrogate=Clip(dual=1.5), importance=Within(0.5, 2.0))[1]
    x = {name: value[x["mask"]].double() for name, value in x.items()}
    a, log_ratio, d = x["advantages"], x["logprobs"] - x["old_logprobs"], x["ref_logprobs"] - x["logprobs"]
    ratio, weight = log_ratio.exp(), (x["old_logprobs"] - x["rollout_logprobs"]).exp()
    cut = (weight < 0.5) | (weight > 2)
    a = a.masked_fill(cut, 0.0)
    expected = {
        "ratio": ratio.mean(),
        "ratio_max": ratio.max(),
        "ratio_min": ratio.min(),
        "clipped_low": ((a < 0) & (ratio < 0.8)).double().mean(),
        "clipped_high": ((a > 0) & (ratio > 1.2)).double().mean(),
        "clipped_dual": ((a < 0) & (ratio > 1.5)).double().mean(),
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "kl": (d.exp() - 1 - d).mean(),
        "importance": weight.masked_fill(cut, 0.0).mean(),
        "importance_cut": cut.double().mean(),
        "ess": ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum()),
    }
    got = named(statistics)
    assert got.keys() == expected.keys() and all(value > 0 for value in got.values())
    for name, value in got.items():
        assert value.shape == () and torch.allclose(value.double(), expected[name], rtol=1e-5), name


@pytest.mark.parametrize("device", DEVICES)
def test_merged_adds_the_sums_and_compares_the_extremes(device):
    parts = torch.tensor([[*range(10), 3.0, 0.5], [*range(8, 18), 2.0, 0.25], [0.0] * 10 + [-math.inf, math.inf]])
    assert merged(parts.to(device)).tolist() == [8.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0, 22.0, 24.0, 26.0, 3.0, 0.25]
    assert torch.equal(merged(parts[2:]), parts[2]) and len(STATISTICS) == parts.shape[1]


def test_no_part_and_no_token():
    nothing = merged(torch.ones(0, 12, dtype=torch.float64))
    assert nothing.dtype == torch.float64 and nothing.tolist() == [0.0] * 10 + [-math.inf, math.inf]
    assert all(value == 0 for value in named(nothing).values())


def test_the_effective_sample_size_is_a_share():
    equal, lone = torch.zeros(50), torch.full((50,), -30.0)
    lone[3] = 30.0
    for logprobs, share in ((equal, 1.0), (lone, 1 / 50)):
        statistics = policy_loss(logprobs, torch.ones(50), old_logprobs=torch.zeros(50))[1]
        assert named(statistics)["ess"].item() == pytest.approx(share)
