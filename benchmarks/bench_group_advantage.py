"""group_advantage of 64 groups of 16, against one plain addition of the same size and against plain torch."""

import torch
from measure import Provider, compare

from fuserl.kernels.group_advantage import group_advantage


def vectorised(rewards):
    """The dense form that a fixed group size allows, in torch."""
    dense = rewards.view(64, 16)
    return ((dense - dense.mean(1, keepdim=True)) / (dense.std(1, keepdim=True) + 1e-6)).view(-1)


def trl(rewards):
    """GRPOTrainer's lines, which pass over rewards that are NaN."""
    from trl.trainer.utils import nanstd

    dense = rewards.view(64, 16)
    mean = torch.nanmean(dense, dim=1).repeat_interleave(16)
    advantage = (rewards - mean) / (nanstd(dense, dim=1).repeat_interleave(16) + 1e-6)
    return torch.nan_to_num(advantage, nan=0.0)


def loop(rewards, group):
    """One group at a time, as trainers with ragged groups do."""
    out = torch.empty_like(rewards)
    for g in range(64):
        members = group == g
        out[members] = (rewards[members] - rewards[members].mean()) / (rewards[members].std() + 1e-6)
    return out


def test_group_advantage(benchmark, device, smoke):
    rewards, group = torch.randn(1024, device=device), torch.arange(64, device=device).repeat_interleave(16)
    truth = vectorised(rewards.double())

    def right(advantage):
        torch.testing.assert_close(advantage.double(), truth, rtol=1e-5, atol=1e-5)

    compare(
        benchmark,
        Provider("one addition", lambda: rewards + 1),
        Provider("fuserl", lambda: group_advantage(rewards, group), right),
        Provider("torch, fixed group size", lambda: vectorised(rewards), right),
        Provider("fuserl, rows", lambda: group_advantage(rewards.view(64, 16)).view(-1), right),
        Provider("TRL", lambda: trl(rewards), right),
        Provider("a loop over groups (verl)", lambda: loop(rewards, group), right),
        rounds=200,
        smoke=smoke,
    )
