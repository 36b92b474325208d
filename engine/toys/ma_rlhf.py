"""Rollouts with values, in float64, on which macro actions are compared with tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from fuserl.engine import checks
from fuserl.engine.batch import Batch
from fuserl.engine.losses import Loss


def example(lengths: Sequence[int] = (7, 1, 12, 4), *, values: float = 1.0, seed: int = 0) -> Batch:
    """The batch of `checks.example` in float64, off-policy, with values drawn from N(0, values^2).

    The rollouts of even number have the reward 1, the others 0.
    """
    batch = checks.example(lengths, group_size=1, off=0.3, seed=seed)
    random = torch.Generator().manual_seed(seed)
    named = {name: getattr(batch, name).double() for name in ("rollout_logprobs", "old_logprobs", "ref_logprobs")}
    rewards = (torch.arange(len(lengths)) % 2 == 0).double()
    drawn = values * torch.randn(len(batch.tokens), generator=random, dtype=torch.float64)
    return batch.replace(**named, rewards=rewards, values=drawn)


def gradient(batch: Batch, loss: Loss) -> Tensor:
    """d loss / d (log-prob, value), (2, N), at the batch's own log-probs and half its values."""
    both = torch.stack([batch.rollout_logprobs, batch.values / 2]).requires_grad_()
    each = loss(SimpleNamespace(logprob=both[0], value=both[1]), batch)[0]
    return torch.autograd.grad(each.sum(), both)[0]


def telescoped(advantage: Callable, batch: Batch, n: int, *, beta: float) -> float:
    """How far A is from the rewards still to come less the value of the macro's last token, at most over tokens."""
    found, expected = advantage(batch).advantages, []
    penalties = -beta * (batch.old_logprobs - batch.ref_logprobs)
    for b, (begin, end) in enumerate(zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True)):
        for t in range(begin, end):
            first = end - 1 if t == end - 1 else begin + (t - begin) // n * n
            last = end - 1 if t == end - 1 else min(first + n, end - 1) - 1
            expected.append(penalties[first:end].sum() + batch.rewards[b] - batch.values[last])
    return float((found - torch.stack(expected)).abs().max())


def noise(advantages: Callable, *, n: int = 5, macros: int = 10_000) -> float:
    """Variance of delta at macros of n tokens over that at single ones, in a rollout whose values are drawn apart."""
    batch = example((n * macros + 1,))
    many, single = (advantages(each)(batch).advantages[:-1].view(-1, n)[1:-1] for each in (n, 1))
    return float(many[:, 0].var() / single.var())
