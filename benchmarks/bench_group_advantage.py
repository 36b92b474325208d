"""Advantages of 64 groups of 16, against one plain addition of the same size and against plain torch."""

import torch
from measure import Provider, compare

from fuserl.kernels.group_advantage import group_advantage
from fuserl.kernels.group_ranks import group_ranks
from fuserl.kernels.pass_at_k_advantage import pass_at_k_advantage


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


def ranks(rewards):
    """Comparisons of all with all, which a fixed group size allows, in torch."""
    dense = rewards.view(64, 16, 1)
    worse, same = (dense > dense.mT).sum(2), (dense == dense.mT).sum(2) - 1
    return ((worse + same / 2) / 15).view(-1)


def ranks_loop(rewards, group):
    """A double argsort of one group at a time, which gives equal rewards different ranks."""
    out = torch.empty_like(rewards)
    for g in range(64):
        members = group == g
        out[members] = rewards[members].argsort().argsort() / 15
    return out


def best_of_four(rewards):
    """The sorted rewards of a fixed group size by tables of chances, in torch."""
    dense, order = rewards.view(64, 16).sort(1, descending=True)
    place = torch.arange(16, device=rewards.device)
    every = _chances(16, 4, place)
    others = _chances(15, 3, place)
    better = (others * dense).cumsum(1) - others * dense
    with_it = better + dense * (1 - (others.cumsum(0) - others))
    above = with_it - (every * dense).sum(1, keepdim=True)
    return torch.empty_like(dense).scatter(1, order, above).view(-1)


def _chances(members, tries, place):
    """How likely the best of the tries is the member at each place of so many."""
    wide = (members - 1 - place).double()
    table = torch.stack([wide - t for t in range(tries - 1)]).clamp(min=0).prod(0)
    return (table / table.sum()).float()


def test_group_ranks(benchmark, device, smoke):
    rewards, group = torch.randn(1024, device=device), torch.arange(64, device=device).repeat_interleave(16)
    truth = ranks(rewards.double())

    def right(score):
        torch.testing.assert_close(score.double(), truth.double(), rtol=1e-6, atol=1e-6)

    compare(
        benchmark,
        Provider("one addition", lambda: rewards + 1),
        Provider("fuserl", lambda: group_ranks(rewards, group), right),
        Provider("torch, fixed group size", lambda: ranks(rewards), right),
        Provider("a loop over groups", lambda: ranks_loop(rewards, group), right),
        rounds=200,
        smoke=smoke,
    )


def test_pass_at_k_advantage(benchmark, device, smoke):
    rewards, group = torch.randn(1024, device=device), torch.arange(64, device=device).repeat_interleave(16)
    truth = best_of_four(rewards.double())

    def right(advantage):
        torch.testing.assert_close(advantage.double(), truth, rtol=1e-5, atol=1e-5)

    compare(
        benchmark,
        Provider("one addition", lambda: rewards + 1),
        Provider("fuserl", lambda: pass_at_k_advantage(rewards, group, 4), right),
        Provider("torch, fixed group size", lambda: best_of_four(rewards), right),
        rounds=200,
        smoke=smoke,
    )
