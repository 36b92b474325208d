"""Rollouts with values, in float64, on which macro actions are compared with tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from fuserl.engine import checks
from fuserl.engine.advantages import generalised
from fuserl.engine.batch import Batch
from fuserl.engine.checks import Figure, at_most
from fuserl.engine.losses import Loss
from fuserl.engine.macro_actions import every


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


def figures(credit: Callable, loss: Loss) -> list[Figure]:
    """The figures of `fuserl check ma_rlhf`.

    Args:
        credit: makes the recipe's advantage, of a rule and what `macro_generalised` takes.
        loss: of policy and values.
    """
    batch, options = example(), {"gamma": 0.9, "lam": 0.95, "beta": 0.05}
    ours = credit(every(1), **options)(batch)
    ppo = generalised(**options, whiten=False)(batch)
    slopes = [gradient(each, loss) for each in (ours, ppo)]
    sums = credit(every(3), gamma=1.0, lam=1.0, beta=0.05, sigma="unit", reward_agg="sum")
    tokens, macros = (credit(every(n), gamma=1.0, lam=0.95, beta=0.0) for n in (1, 5))
    far = example((100,), values=0.0)
    left = noise(lambda n: credit(every(n), gamma=1.0, lam=0.0, beta=0.0))
    return [
        at_most("loss apart from PPO's, n = 1", abs(checks.value(ours, loss) - checks.value(ppo, loss)), 1e-12),
        at_most("gradients apart from PPO's, n = 1", float((slopes[0] - slopes[1]).abs().max()), 1e-12),
        at_most("A apart from sum of R - V, gamma = lam = 1", telescoped(sums, batch, 3, beta=0.05), 1e-12),
        Figure("A of the first of 100 tokens, 0.95^99", float(tokens(far).advantages[0]), 0.95**99, 1e-12),
        Figure("A of the first of 21 macros, 0.95^20", float(macros(far).advantages[0]), 0.95**20, 1e-12),
        at_most("variance of delta at n = 5 over that at n = 1, apart from 1 / 5", abs(left - 0.2), 0.02),
    ]
