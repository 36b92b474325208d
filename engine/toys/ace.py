"""Bandits that have grown overconfident of a wrong arm: what ACE does to it beside GRPO, and its gradient, exactly."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fuserl.engine import checks, evaluation
from fuserl.engine.advantages import standardized
from fuserl.engine.checks import Figure, at_least, at_most
from fuserl.engine.losses import Loss
from fuserl.engine.tabular import Table, learnt

ARMS, CORRECT, STEPS, GROUPS, GROUP_SIZE = 64, 8, 100, 16, 8


def unlearnt(advantage: Callable, loss: Loss, seed: int) -> tuple[float, float]:
    """Probabilities of the arm that the start is overconfident of, and of all correct ones, after on-policy steps.

    Args:
        advantage, loss: a recipe's slots; the batches have old_logprobs and ref_logprobs.
        seed: of the reference's logits, N(0, 0.5), and of the draws. The policy starts as it, one wrong arm 4 higher.
    """
    random = torch.Generator().manual_seed(seed)
    reference = 0.5 * torch.randn(1, ARMS, generator=random, dtype=torch.float64)
    raised = torch.zeros_like(reference)
    raised[0, -1] = 4
    table = Table(reference + raised, lr=0.5, seed=seed)
    for _ in range(STEPS):
        batch = table.drawn([0] * GROUPS, GROUP_SIZE, lambda _, said: bool(said[0] < CORRECT))
        scored = table.outputs(batch, reference).logprob
        learnt(table, batch.replace(old_logprobs=batch.rollout_logprobs, ref_logprobs=scored), advantage, loss)
    p = table.probabilities[0]
    return float(p[-1]), float(p[:CORRECT].sum())


def decomposition_error(credit: Callable, loss: Loss, *, arms: int = 16, wrong: int = 12, seed: int = 0) -> float:
    """Largest difference of ACE's own gradient on a softmax from that of its regulariser without the residual.

        E[wrong softplus(c) grad log pi] = grad E[wrong softplus(c)] - E[wrong sigmoid(c) grad log pi]

    Args:
        credit: `overconfident`, which is given what to weigh: -pi for wrong arms, so that sums are expectations.
        loss: -A logprob, averaged over rollouts.
    """
    random = torch.Generator().manual_seed(seed)
    drawn, reference = (torch.randn(1, arms, generator=random, dtype=torch.float64) for _ in range(2))
    table, is_wrong = Table(2 * drawn), torch.arange(arms) < wrong
    batch = table.given(torch.arange(arms)[:, None], torch.zeros(arms, dtype=torch.int64), ~is_wrong, arms)
    batch = batch.replace(
        old_logprobs=batch.rollout_logprobs, ref_logprobs=table.outputs(batch, reference).logprob.detach()
    )

    def weighed(alpha: float) -> Tensor:
        advantage = credit(lambda batch: -batch.rollout_logprobs.exp() * is_wrong, alpha=alpha)
        return arms * table.gradient(batch.with_advantages(advantage(batch)), loss)

    logs = table.logits.log_softmax(-1)[0]
    shift = logs - batch.ref_logprobs
    regulariser = (logs.exp() * softplus(shift) * is_wrong).sum()
    residual = ((logs.exp() * shift.sigmoid() * is_wrong).detach() * logs).sum()
    expected = torch.autograd.grad(regulariser - residual, table.logits)[0]
    return float((weighed(1.0) - weighed(0.0) - expected).abs().max())


def factors(advantage: Callable) -> tuple[Tensor, Tensor]:
    """What ACE multiplies an advantage with: of 32 wrong rollouts, by rising c, and of as many right ones.

    Args:
        advantage: ACE's own, of standardised ones.
    """
    batch = checks.example((1,) * 64)
    shift = torch.cat([torch.tensor([-100.0, 0]), torch.linspace(-8, 30, 30)]).repeat_interleave(2)
    factor = advantage(batch.replace(old_logprobs=batch.ref_logprobs + shift)) / standardized(batch)
    return factor[batch.rewards <= 0], factor[batch.rewards > 0]


def figures(overconfident: Callable, loss: Loss) -> list[Figure]:
    """The figures of `fuserl check ace`.

    Args:
        overconfident: makes the recipe's advantage, of another one and alpha.
        loss: the recipe's.
    """
    ace = overconfident(standardized, alpha=1.0)
    wrong, right = factors(ace)
    n, k, p = 10, 4, 0.3
    chances = torch.tensor([math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)], dtype=torch.float64)
    found = evaluation.pass_at_k(torch.arange(n + 1), n, k)
    runs = [[unlearnt(each, loss, seed)[0] for each in (ace, standardized)] for seed in range(5)]
    return [
        at_most("gradient apart from its decomposition", decomposition_error(overconfident, loss), 1e-10),
        Figure("largest change of a correct rollout's advantage", float((right - 1).abs().max()), 0),
        Figure("factor of a wrong one at c = -100", float(wrong[0]), 1),
        Figure("factor of a wrong one at c = 0, 1 + log 2", float(wrong[1]), 1 + math.log(2)),
        Figure("rises of the factor over 29 rises of c", int((wrong[2:].diff() > 0).sum()), 29),
        Figure("mean pass@4 of 10 tries at chance 0.3", float((chances * found).sum()), 1 - (1 - p) ** k, 1e-12),
        at_least("seeds of 5 where less is left on the overconfident arm", sum(a < b for a, b in runs), 5),
    ]
