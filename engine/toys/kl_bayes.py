"""All 64 sequences of two tokens out of 8: objectives, their gradients and what they end at, without sampling.

A batch of every sequence once is one of a uniform proposal, q = 1 / 64, whose means are expectations.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine.batch import Batch
from fuserl.engine.checks import Figure, at_most
from fuserl.engine.losses import Loss
from fuserl.engine.tabular import Table

VOCABULARY = 8
EVERY = torch.cartesian_prod(torch.arange(VOCABULARY), torch.arange(VOCABULARY))
STATES = torch.stack([torch.zeros(len(EVERY), dtype=torch.int64), 1 + EVERY[:, 0]], 1)


class Enumerable:
    """A prior and a reward of every sequence, drawn at random, and a policy that starts as the prior.

    Args:
        seed: of logits N(0, 1) / 2 and rewards N(0, 1).
        moved: how far the policy starts from the prior, as a standard deviation of its logits.
        lr: of the policy's gradient steps.
    """

    def __init__(self, *, seed: int = 0, moved: float = 0.0, lr: float = 1.0):
        random = torch.Generator().manual_seed(seed)
        self.prior, away = torch.randn(2, 1 + VOCABULARY, VOCABULARY, generator=random, dtype=torch.float64)
        self.prior = self.prior / 2
        self.rewards = torch.randn(len(EVERY), generator=random, dtype=torch.float64)
        self.table = Table(self.prior + moved * away, length=2, lr=lr)

    def every(self) -> Batch:
        """Every sequence once."""
        batch = self.given(torch.arange(len(EVERY)))
        return batch.replace(rollout_logprobs=torch.full_like(batch.rollout_logprobs, -math.log(VOCABULARY)))

    def given(self, index: Tensor) -> Batch:
        """The sequences `index` (B,) as one group, with the log-probs of policy and prior."""
        batch = self.table.given(EVERY[index], STATES[index].flatten(), self.rewards[index], len(index))
        prior = self.table.outputs(batch, self.prior).logprob
        return batch.replace(old_logprobs=batch.rollout_logprobs, ref_logprobs=prior)

    def logs(self, logits: Tensor) -> Tensor:
        """The log-prob of every sequence under logits (9, 8), (64,) with its graph."""
        each = logits.log_softmax(-1)[STATES, EVERY]
        return each.sum(-1)

    def objective(self, beta: float) -> Tensor:
        """E r - beta KL(policy || prior), with its graph."""
        logs = self.logs(self.table.logits)
        return (logs.exp() * (self.rewards - beta * (logs - self.logs(self.prior)))).sum()

    def posterior(self, beta: float) -> tuple[Tensor, float]:
        """log p of every sequence, (64,), and log Z."""
        scores = self.logs(self.prior) + self.rewards / beta
        log_z = scores.logsumexp(0)
        return scores - log_z, float(log_z)

    def trained(self, advantage: Callable, loss: Loss, steps: int) -> Tensor:
        """The log-prob of every sequence, (64,), after steps along the exact gradient."""
        batch = self.every()
        for _ in range(steps):
            batch = batch.replace(old_logprobs=self.table.outputs(batch).logprob.detach())
            self.table.update(advantage(batch), loss)
        return self.logs(self.table.logits.detach())


def entropy(logs: Tensor) -> float:
    """In nats, of log-probs."""
    return float(-(logs.exp() * logs).sum())


def divergence(first: Tensor, second: Tensor) -> float:
    """KL(first || second) of log-probs, in nats."""
    return float((first.exp() * (first - second)).sum())


def sampled_error(world: Enumerable, advantage: Callable, loss: Loss, exact: Tensor, *, draws: int = 100_000) -> float:
    """How far the gradient of a batch of draws is from the exact one, in standard errors, at most over the logits.

    Args:
        exact: d loss / d logits, (9, 8).
    """
    random = torch.Generator().manual_seed(0)
    logits = world.table.logits
    index = torch.multinomial(world.logs(logits).exp().detach(), draws, replacement=True, generator=random)
    batch = advantage(world.given(index))
    slopes = torch.stack([torch.autograd.grad(each, logits, retain_graph=True)[0] for each in world.logs(logits)])
    squares = torch.zeros(len(EVERY), dtype=torch.float64).index_add(0, index, batch.advantages[::2].square())
    mean = world.table.gradient(batch, loss)
    error = (((squares[:, None, None] * slopes.square()).sum(0) / draws - mean.square()) / draws).sqrt()
    return float(((mean - exact).abs() / error).max())


def figures(inferred: Callable, loss: Loss) -> list[Figure]:
    """The figures of `fuserl check kl_bayes`.

    Args:
        inferred: makes the recipe's advantage, of an objective and options as of `targets.inferred`.
        loss: the recipe's.
    """
    world, beta = Enumerable(moved=1.0), 0.5
    p, log_z = world.posterior(beta)
    bound = beta * (log_z - divergence(world.logs(world.table.logits).detach(), p))
    value = float(world.objective(beta).detach())
    exact = inferred(beta=beta, baseline=False)
    slope = -torch.autograd.grad(world.objective(beta), world.table.logits)[0]
    batch = exact(world.every())
    ours = world.table.gradient(batch, loss)
    drawn = sampled_error(world, inferred(beta=beta), loss, slope)
    free = Enumerable(lr=400.0).trained(inferred(beta=0.0, baseline=False), loss, 300)
    held = Enumerable(lr=10.0).trained(exact, loss, 2000)
    forward = Enumerable(lr=4.0).trained(inferred("dpg", beta=beta, baseline=False), loss, 2000)
    return [
        at_most("E r - beta KL apart from beta (log Z - KL(pi || p))", abs(value - bound), 1e-12),
        at_most("the mean credit of a batch apart from it", abs(float(batch.advantages.mean()) - bound), 1e-12),
        at_most("its gradient apart from autograd's", float((ours - slope).abs().max()), 1e-10),
        at_most("entropy where beta is 0", entropy(free), 0.01),
        at_most("KL(pi || p) where beta is 0.5", divergence(held, p), 1e-4),
        at_most("entropy apart from that of p", abs(entropy(held) - entropy(p)), 0.01),
        at_most("KL(p || pi) after dpg", divergence(p, forward), 1e-3),
        at_most("gradient of 100,000 draws: standard errors from the exact one", drawn, 4),
    ]
