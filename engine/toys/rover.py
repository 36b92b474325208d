"""Trees with right and wrong leaves: what the values of a uniform policy are good for, and what regressing them keeps.

Q(s, a) = mean over the A actions a' below of Q(s', a'),   at a leaf 1 where it is right, else 0
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from fuserl.engine import checks
from fuserl.engine.advantages import standardized
from fuserl.engine.batch import Batch
from fuserl.engine.checks import Figure, at_least, at_most
from fuserl.engine.losses import Loss, clipped, negative_logprob
from fuserl.engine.tabular import Table, learnt
from fuserl.kernels.linear_policy_loss import linear_policy_loss

ACTIONS, DEPTH = 4, 5  # of the random trees
BITS, RIGHT = 4, (0, 5, 10, 15)  # of the tree that is learnt: 16 leaves by 4 choices of two, and those that are right
MOST = 200  # batches; some 20 are enough


def uniform_values(trees: int, share: float, *, seed: int = 0) -> list[Tensor]:
    """Q of the uniform policy in random trees of 4 actions and depth 5, each with a right leaf: (trees, 4^d), d = 1..5.

    Args:
        share: chance of a leaf to be right; trees without a right one are drawn again.
    """
    random, solvable = torch.Generator().manual_seed(seed), []
    while len(solvable) < trees:
        leaves = (torch.rand(ACTIONS**DEPTH, generator=random) < share).double()
        solvable += [leaves] if leaves.any() else []
    levels = [torch.stack(solvable)]
    while levels[-1].shape[1] > ACTIONS:
        levels.append(levels[-1].view(trees, -1, ACTIONS).mean(-1))
    return levels[::-1]


def greedy_success(levels: list[Tensor]) -> Tensor:
    """Whether taking the action of the largest value leads to a right leaf, (trees,) of 0 and 1."""
    node = torch.zeros(len(levels[0]), 1, dtype=torch.int64)
    for values in levels:
        best = values.view(len(values), -1, ACTIONS).argmax(-1)
        node = ACTIONS * node + best.gather(1, node)
    return levels[-1].gather(1, node)[:, 0]


def softmax_success(levels: list[Tensor], rho: float) -> Tensor:
    """Chance of a right leaf where actions are drawn from softmax(Q / rho), (trees,)."""
    below = levels[-1]
    for values in levels[::-1]:
        chances = (values.view(len(values), -1, ACTIONS) / rho).softmax(-1)
        below = (chances * below.view_as(chances)).sum(-1)
    return below[:, 0]


def snapshot(table: Table, batch: Batch) -> Batch:
    """The batch with old_logprobs and old_mean_logprob of the table as it is."""
    out = table.outputs(batch)
    extra = batch.extra | {"old_mean_logprob": out.mean_logprob.detach()}
    return batch.replace(old_logprobs=out.logprob.detach(), extra=extra)


def learner(*, epochs: int = 4, lr: float = 4.0, seed: int = 0) -> Table:
    """A softmax policy of the learnt tree's 15 inner nodes, uniform at the start."""
    return Table(torch.zeros(2**BITS - 1, 2), state=_node, length=BITS, lr=lr, epochs=epochs, seed=seed)


def drawn(table: Table, group_size: int = 32) -> Batch:
    """A group of rollouts of the learnt tree, with the snapshot of the table."""
    return snapshot(table, table.drawn([0], group_size, lambda _, said: _leaf(said) in RIGHT))


def leaves(table: Table) -> Tensor:
    """The chance of each leaf, (16,)."""
    p, found = table.probabilities, torch.ones(1, dtype=torch.float64)
    for depth in range(BITS):
        found = (found[:, None] * p[2**depth - 1 : 2 ** (depth + 1) - 1]).flatten()
    return found


def spread(advantage: Callable, loss: Loss, seed: int, **options) -> float:
    """The entropy over right leaves, as a share of log 4, when their chance has reached 95 %, or after 200 batches.

    Args:
        advantage, loss: a recipe's slots.
        seed: of the draws.
        options: of `learner`.
    """
    table = learner(seed=seed, **options)
    for _ in range(MOST):
        if (right := leaves(table)[list(RIGHT)]).sum() >= 0.95:
            break
        learnt(table, drawn(table), advantage, loss)
    share = right / right.sum()
    return float(torch.special.entr(share).sum() / math.log(len(RIGHT)))


def fused(loss: Loss) -> list[Figure]:
    """The recipe's loss on a head of random weights: the mean log-prob, and the gradient beside that of autograd."""
    random = torch.Generator().manual_seed(0)
    batch = checks.example((3, 5, 2, 4))
    hidden, weight = (torch.randn(rows, 8, generator=random, dtype=torch.float64) for rows in (14, 11))
    old = torch.randn(2, 14, generator=random, dtype=torch.float64)
    batch = batch.replace(
        rewards=batch.rewards.double(), tokens=torch.arange(14) % 11, advantages=old[0].roll(1), old_logprobs=old[0],
        extra={"old_mean_logprob": old[1]},
    )  # fmt: skip
    leaf = hidden.clone().requires_grad_()
    value, out, _ = linear_policy_loss(
        leaf, weight, batch.tokens, lambda out, rows: loss(out, batch.take(rows)),
        outputs=loss.outputs, scope=loss.scope, offsets=batch.offsets,
    )  # fmt: skip
    logits = hidden.clone().requires_grad_()
    x = logits @ weight.T
    logs = x.log_softmax(-1)
    plain = SimpleNamespace(logprob=logs.gather(1, batch.tokens[:, None])[:, 0], mean_logprob=logs.mean(-1))
    (expected,) = torch.autograd.grad(loss(plain, batch)[0].sum(), logits)
    off = (out.mean_logprob - (x.mean(-1) - x.logsumexp(-1)).detach()).abs().max()
    return [
        at_most("mean log-prob apart from mean(x) - logsumexp(x)", float(off), 1e-12),
        at_most(
            "gradient through the head apart from autograd's",
            checks.apart(torch.autograd.grad(value, leaf)[0], expected),
            1e-12,
        ),
    ]


def off_target(loss: Loss) -> float:
    """The largest gradient where every log-ratio is its reward and the next state's value, none after the last."""
    random, batch = torch.Generator().manual_seed(0), checks.example((3, 5, 2, 4))
    values, logprob, old_mean = torch.randn(3, 14, generator=random, dtype=torch.float64)
    ahead = torch.cat([values[1:], values[:1]]).index_fill(0, batch.offsets[1:] - 1, 0.0)
    advantages = batch.to_tokens(batch.rewards.double())
    batch = batch.replace(
        rewards=batch.rewards.double(), advantages=advantages, old_logprobs=logprob - advantages - ahead,
        extra={"old_mean_logprob": old_mean},
    )  # fmt: skip
    leaf = logprob.clone().requires_grad_()
    each = loss(SimpleNamespace(logprob=leaf, mean_logprob=old_mean + values), batch)[0]
    return float(torch.autograd.grad(each.sum(), leaf)[0].abs().max())


def figures(advantage: Callable, valued: Callable) -> list[Figure]:
    """The figures of `fuserl check rover`.

    Args:
        advantage: the recipe's slot.
        valued: makes the recipe's loss, given rho.
    """
    values = uniform_values(300, 0.004)
    others, known = uniform_values(100, 0.01), {1.0: 0.024, 0.1: 0.206, 0.01: 0.873}
    success = {rho: softmax_success(others, rho) for rho in (*known, 0.001)}
    off = {
        rho: float((success[rho].mean() - mean).abs() / (success[rho].var() / 50).sqrt()) for rho, mean in known.items()
    }
    table, loss = learner(), valued(1.0)
    batch = checks.credited(drawn(table), advantage)
    ours, plain = (table.gradient(batch, each) for each in (loss, negative_logprob()))
    kept = [spread(advantage, loss, seed) - spread(standardized, clipped(), seed) for seed in range(5)]
    return [
        Figure("trees of 300 where greedy on uniform values ends right", int(greedy_success(values).sum()), 300),
        *(at_most(f"softmax(Q / {rho:g}) ends right: standard errors from {known[rho]}", off[rho], 4) for rho in known),
        at_least("softmax(Q / 0.001) ends right", float(success[0.001].mean()), 0.999),
        *fused(loss),
        at_most("on-policy gradient apart from twice REINFORCE's", checks.apart(ours, 2 * plain), 1e-10),
        at_most("gradient where log-ratios are on target", off_target(loss), 1e-12),
        at_least("entropy over right leaves above GRPO's, mean of 5", sum(kept) / 5, 0),
    ]


def _node(_context: int, said: Tensor) -> int:
    return 2 ** len(said) - 1 + _leaf(said)


def _leaf(said: Tensor) -> int:
    return sum(bit << at for at, bit in enumerate(said.tolist()[::-1]))
