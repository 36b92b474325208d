"""Mirror descent in tables: the inner problem solved to its end, and random decision processes with exact returns."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine.advantages import whitened
from fuserl.engine.batch import Batch
from fuserl.engine.checks import Figure, at_least, at_most
from fuserl.engine.losses import Loss, clipped, negative_logprob
from fuserl.engine.mirror import annealed, constant
from fuserl.engine.tabular import Table
from fuserl.kernels.gae import gae

STATES, ACTIONS, LENGTH, ROLLOUTS = 20, 4, 32, 64
GAMMA, LAM, TURNS, EPOCHS, LR = 0.95, 0.95, 30, 10, 0.05


def solution(loss_of: Callable, t: float = 0.7) -> list[Figure]:
    """The loss of every (state, action) of 5 x 3, weighted as pi_k draws them: its minimum and its first gradient."""
    random = torch.Generator().manual_seed(0)
    logits, a = torch.randn(2, 5, 3, generator=random, dtype=torch.float64)
    table, old = Table(logits), logits.softmax(-1)
    tokens, states = torch.arange(3).repeat(5), torch.arange(5).repeat_interleave(3)
    batch = table.given(tokens[:, None], states, torch.zeros(15), 1).with_advantages(a.flatten())
    batch = batch.replace(old_logprobs=batch.rollout_logprobs)

    def weights(part: Batch) -> Tensor:
        return old[part.extra["state"], part.tokens] / 5

    loss = loss_of(t=constant(t), reduce=weights)
    plain = table.gradient(batch, negative_logprob(reduce=weights))
    first = float((table.gradient(batch, loss, teacher=logits) - plain).abs().max())
    solver = torch.optim.LBFGS(
        [table.logits], lr=1, max_iter=500, tolerance_grad=1e-15, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def value() -> Tensor:
        solver.zero_grad()
        found = table.loss(batch, loss, teacher=logits)
        found.backward()
        return found

    solver.step(value)
    exact = (old * (t * a).exp()) / (old * (t * a).exp()).sum(-1, keepdim=True)
    apart = float((table.probabilities - exact).abs().max())
    return [
        at_most("policy that solves the inner problem, apart from pi_k e^{t A} / Z", apart, 1e-8),
        at_most("first gradient apart from the policy gradient", first, 1e-10),
    ]


class Process:
    """A random decision process of a seed: transitions (S, A, S), rewards (S, A), and where it begins, uniform."""

    def __init__(self, seed: int):
        random = torch.Generator().manual_seed(seed)
        draws = torch.rand(STATES, ACTIONS, STATES, generator=random, dtype=torch.float64)
        self.moves = draws.pow(8) / draws.pow(8).sum(-1, keepdim=True)
        self.rewards = torch.rand(STATES, ACTIONS, generator=random, dtype=torch.float64)

    def values(self, policy: Tensor) -> Tensor:
        """The discounted returns of a policy (S, A) from each state, (S,), exactly."""
        moves = torch.einsum("sa,sat->st", policy, self.moves)
        return torch.linalg.solve(torch.eye(STATES).double() - GAMMA * moves, (policy * self.rewards).sum(-1))

    @torch.no_grad()
    def drawn(self, table: Table) -> Batch:
        """Rollouts, each cut off after LENGTH steps, with standardised advantages under the policy's own values."""
        policy, state = table.probabilities, torch.randint(STATES, (ROLLOUTS,), generator=table.random)
        states, tokens = [], []
        for _ in range(LENGTH):
            states.append(state)
            tokens.append(torch.multinomial(policy[state], 1, generator=table.random).squeeze(-1))
            state = torch.multinomial(self.moves[state, tokens[-1]], 1, generator=table.random).squeeze(-1)
        at, taken, values = torch.stack(states, 1), torch.stack(tokens, 1), self.values(policy)
        found = gae(self.rewards[at, taken], values[at], gamma=GAMMA, lam=LAM, bootstrap=values[state])[0]
        batch = table.given(taken, at.flatten(), torch.zeros(ROLLOUTS), ROLLOUTS)
        return batch.with_advantages(whitened(found.flatten()))


def trained(seed: int, loss: Loss) -> float:
    """The mean return after TURNS turns of EPOCHS whole-batch steps of Adam."""
    process = Process(seed)
    table = Table(torch.zeros(STATES, ACTIONS), lr=LR, optimizer=torch.optim.Adam, epochs=EPOCHS, seed=seed)
    for _ in range(TURNS):
        table.update(process.drawn(table), loss, teacher=table.logits.detach().clone())
    return float(process.values(table.probabilities).mean())


def searched(seed: int, radius: float = 0.01) -> float:
    """The same by natural steps of a line search within a mean divergence, as TRPO's."""
    process, table = Process(seed), Table(torch.zeros(STATES, ACTIONS), seed=seed)
    for _ in range(TURNS):
        batch = process.drawn(table)
        states = batch.extra["state"]
        # Of a softmax table the natural direction is the advantage itself.
        sums, counts = torch.zeros(2, STATES, ACTIONS, dtype=torch.float64)
        sums.index_put_((states, batch.tokens), batch.advantages, accumulate=True)
        counts.index_put_((states, batch.tokens), torch.ones_like(batch.advantages), accumulate=True)
        direction, old = sums / counts.clamp(min=1), table.logits.detach()
        for size in (2.0**-n for n in range(-4, 12)):
            new = old + size * direction
            seen = table.outputs(batch, new, teacher=old, kinds=["reverse_kl"])
            gain = ((seen.logprob - batch.rollout_logprobs).exp() * batch.advantages).mean()
            if seen.reverse_kl.mean() <= radius and gain > 0:
                table = Table(new, seed=seed)
                table.random.manual_seed(seed + 1000 * (1 + batch.step))
                table.updates = batch.step
                break
    return float(process.values(table.probabilities).mean())


def returns(loss_of: Callable, seeds: int = 5) -> list[Figure]:
    """Mean returns over random processes, of this, of a line search, of a clip."""
    ours, lines, clips = (
        math.fsum(run(seed) for seed in range(seeds)) / seeds
        for run in (
            lambda seed: trained(seed, loss_of(t=annealed(TURNS))),
            searched,
            lambda seed: trained(seed, clipped()),
        )
    )
    return [
        at_least(f"return beside {lines:.4f} of a line search", ours, 0.98 * lines),
        at_least(f"return beside {clips:.4f} of a clip", ours, 0.98 * clips),
    ]
