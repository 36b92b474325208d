"""What the ops on the members of a group are tried on for the numerics page, and how a trainer writes them."""

from __future__ import annotations

import itertools

import torch
from subjects import Subject
from torch import Tensor

from fuserl.kernels import group_ranks, pair_advantage, pass_at_k_advantage, segment_sum

_SIZE, _TRIES = 8, 3
_MOST = 256  # rollouts: Triton's interpreter takes minutes for more


def rewards_of(kind: str, rows: int) -> tuple[Tensor, ...]:
    """Rewards of groups of eight."""
    rows = min(rows, _MOST)
    rewards = {
        "usual": lambda: torch.randn(rows).mul(2).round().div(3),
        "binary": lambda: torch.randint(2, (rows,)).float(),
        "large": lambda: 1e4 + 3 * torch.randn(rows),
    }[kind]()
    return rewards, torch.arange(rows) // _SIZE


def ranks_run(backend: str, rewards: Tensor, group: Tensor) -> dict[str, Tensor]:
    """The op."""
    return {"score": group_ranks.group_ranks(rewards, group, backend=backend)}


def ranks_eager(rewards: Tensor, _group: Tensor) -> dict[str, Tensor]:
    """Comparisons of each member with each of its group."""
    table = rewards.view(-1, _SIZE, 1)
    worse, same = ((f(table, table.mT)).to(rewards).sum(2) for f in (torch.gt, torch.eq))
    return {"score": ((worse + (same - 1) / 2) / (_SIZE - 1)).flatten()}


def best_of_run(backend: str, rewards: Tensor, group: Tensor) -> dict[str, Tensor]:
    """The op for the best of three, with each baseline."""
    op = pass_at_k_advantage.pass_at_k_advantage
    scales = {"mean": "best", "leave_one_out": None, "rest": "group"}
    return {name: op(rewards, group, _TRIES, baseline=name, scale=scales[name], backend=backend) for name in scales}


def best_of_eager(rewards: Tensor, _group: Tensor) -> dict[str, Tensor]:
    """The definition, over all subsets of a view with eight columns."""
    subsets = torch.tensor(list(itertools.combinations(range(_SIZE), _TRIES)))
    inside = (subsets[:, :, None] == torch.arange(_SIZE)).any(1)
    table = rewards.view(-1, _SIZE)
    best = table[:, subsets].amax(2)
    count = inside.sum(0)
    with_it, without = best @ inside.to(best) / count, best @ (~inside).to(best) / (len(subsets) - count)
    lead = torch.where(inside, best[:, :, None] - _best_without(table, subsets), 0.0).sum(1) / count
    found = {
        "mean": (with_it - best.mean(1, keepdim=True)) / (best.std(1, keepdim=True, correction=0) + 1e-6),
        "leave_one_out": with_it - without,
        "rest": lead / (table.std(1, keepdim=True) + 1e-6),
    }
    return {name: x.flatten() for name, x in found.items()}


def _best_without(table: Tensor, subsets: Tensor) -> Tensor:
    """The best of each subset but for each member, (G, subsets, members)."""
    held = subsets[:, :, None] == torch.arange(_SIZE)
    return torch.where(held, -torch.inf, table[:, subsets][..., None]).amax(2)


def margins_of(kind: str, rows: int) -> tuple[Tensor, ...]:
    """Judged margins between the members of groups of eight."""
    margins = torch.randn(min(rows, _MOST) // _SIZE, _SIZE, _SIZE)
    return ((margins - margins.mT) * (1e-3 if kind == "near" else 1.0),)


def pairs_run(backend: str, margins: Tensor) -> dict[str, Tensor]:
    """The op, on a square a group and on a row a rollout."""
    rows, op = margins.flatten(0, 1), pair_advantage.pair_advantage
    group = torch.arange(len(rows), device=rows.device) // _SIZE
    return {"square": op(margins).flatten(), "rows": op(rows, group, backend=backend)}


def pairs_eager(margins: Tensor) -> dict[str, Tensor]:
    """The same in the dtype of the margins."""
    spread = margins.square().sum((1, 2)) / (2 * _SIZE * (_SIZE - 1)) + 1e-6
    found = (margins.mean(2) / spread.sqrt()[:, None]).flatten()
    return {"square": found, "rows": found}


_REWARDS = {"usual": "rewards with ties", "binary": "of 0 and 1", "large": "1e4 and a spread of 3"}
SUBJECTS = {
    "group_ranks": Subject(rewards_of, ranks_run, ranks_eager, group_ranks.IMPLS, _REWARDS, (torch.float32,)),
    "pass_at_k_advantage": Subject(
        rewards_of, best_of_run, best_of_eager, pass_at_k_advantage.IMPLS, _REWARDS, (torch.float32,)
    ),
    "pair_advantage": Subject(
        margins_of, pairs_run, pairs_eager, segment_sum.IMPLS,
        {"usual": "margins of standard deviation 1.4", "near": "a thousandth of that"}, (torch.float32,),
    ),
}  # fmt: skip
