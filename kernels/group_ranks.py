"""Rank of each rollout's reward within its group, as a score in [0, 1]; and the order it is read from.

    score[b] = (worse[b] + ties[b] / 2) / (n - 1)

of n members, worse[b] have less than rewards[b] and ties[b] others have as much. In torch two stable sorts, no wait.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fuserl.kernels.discounted_scan import discounted_scan
from fuserl.kernels.dispatch import choose
from fuserl.kernels.registration import register

__all__ = ["group_ranks"]

TIES = ("mean", "best")


@dataclass(frozen=True)
class Ordered:
    """Rollouts sorted by group, and by falling reward within a group; NaN first. Tensors are (B,) in that order.

    Args:
        rewards: float64.
        inverse: where each rollout went.
        offsets: (B + 1,) where each group begins, one entry per possible id.
        size, place: of the group, and of the rollout in it, counted from 0.
        first, last: positions of the first and the last rollout of the group with the same reward.
        begin, end: positions of the group's first rollout, and of the one after its last.
    """

    rewards: Tensor
    inverse: Tensor
    offsets: Tensor
    size: Tensor
    place: Tensor
    first: Tensor
    last: Tensor
    begin: Tensor
    end: Tensor

    @classmethod
    def of(cls, rewards: Tensor, group: Tensor) -> Ordered:
        """Sort them."""
        order = rewards.argsort(descending=True, stable=True)
        order = order[group[order].argsort(stable=True)]
        at = torch.arange(len(rewards), device=rewards.device)
        r, ids = rewards[order].double(), group[order]
        new = torch.ones_like(ids, dtype=torch.bool)
        new[1:] = (ids[1:] != ids[:-1]) | (r[1:] != r[:-1])
        block = new.long().cumsum(0)
        begin, end = (torch.searchsorted(ids, ids, right=right) for right in (False, True))
        first, beyond = (torch.searchsorted(block, block, right=right) for right in (False, True))
        offsets = torch.searchsorted(ids, torch.arange(len(ids) + 1, device=ids.device))
        return cls(r, order.argsort(), offsets, end - begin, at - begin, first, beyond - 1, begin, end)

    def scan(self, b: Tensor, a: float | Tensor = 1.0, **options) -> Tensor:
        """`discounted_scan` along each group."""
        return discounted_scan(b, a, offsets=self.offsets, **options)

    def total(self, x: Tensor, backend: str | None = None) -> Tensor:
        """Sum over the group, for each of its rollouts."""
        return self.scan(x, forward=True, backend=backend)[self.end - 1]


def reference(rewards: Tensor, group: Tensor, best: bool) -> Tensor:
    """The definition, in plain torch."""
    x = Ordered.of(rewards, group)
    most, least = x.end - 1 - x.first, x.end - 1 - x.last
    score = most if best else (most + least) / 2
    score = torch.where(x.size > 1, score / (x.size - 1).clamp(min=1).double(), 0.5)
    return torch.where(x.rewards[x.begin].isnan(), torch.nan, score).to(rewards.dtype)[x.inverse]


def _cpu(rewards, group, best):
    from fuserl import _C

    out = torch.empty_like(rewards)
    _C.group_ranks(rewards, group, best, out)
    return out


IMPLS = {"triton": reference, "cpu": _cpu, "reference": reference}  # on a GPU torch's sorts do


def _dispatch(rewards, group, best, backend):
    backend = choose("group_ranks", IMPLS, rewards.device, backend)
    return IMPLS[backend](rewards.contiguous(), group.contiguous(), best) if len(rewards) else rewards.clone()


def _fake(rewards, *_):
    return rewards.new_empty(rewards.shape)


_group_ranks = register(
    "group_ranks(Tensor rewards, Tensor group, bool best, str? backend) -> Tensor",
    _dispatch,
    _fake,
)


def group_ranks(rewards: Tensor, group: Tensor, *, ties: str = "mean", backend: str | None = None) -> Tensor:
    """Score of each rollout by the rank of its reward in its group: 1 the best, 0 the worst, whatever their size.

        score = (worse + ties / 2) / (n - 1)

    Args:
        rewards: (B,) float32 or float64.
        group: (B,) int64 in [0, B): equal for rollouts of one prompt, in any order. On CPU an id outside raises; on
            GPU, where a check would wait, it gives wrong numbers.
        ties: "mean" gives equal rewards the mean of their scores; "best" the highest of them.
        backend: "triton", "cpu" or "reference"; the fastest that runs here by default.

    Returns:
        (B,) of rewards' dtype, without gradient; 0.5 for a group of one; NaN in a group with a NaN. Give it to
        `group_advantage` as rewards.

    Raises:
        ValueError: on a wrong shape, dtype, device, name or group id.

    Memory: a few numbers per rollout. Source: quantile rewards of a tournament (ArenaRL).
    Sibling: `group_advantage`.
    """
    check_grouped("group_ranks", rewards, group)
    if ties not in TIES:
        raise ValueError(f"group_ranks: ties must be one of {list(TIES)}; got {ties!r}. Correct the name.")
    return _group_ranks(rewards, group, ties == "best", backend)


def check_grouped(function: str, rewards: Tensor, group: Tensor) -> None:
    """Refuse what is not one reward and one group id per rollout."""
    if rewards.dim() != 1 or rewards.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{function}: rewards must be (B,) float32 or float64; got {tuple(rewards.shape)} {rewards.dtype}. "
            "Give one number per rollout."
        )
    check_group(function, group, len(rewards), rewards.device)


def check_group(function: str, group: Tensor, rollouts: int, device: torch.device) -> None:
    """Refuse what is not one group id per rollout."""
    if group.shape != (rollouts,) or group.dtype != torch.int64 or group.device != device:
        raise ValueError(
            f"{function}: group must be ({rollouts},) int64 on {device}; got {tuple(group.shape)} {group.dtype} on "
            f"{group.device}. Number the prompts and give each rollout its prompt's number."
        )
