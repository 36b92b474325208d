"""Bandits that have grown overconfident of a wrong arm: what ACE does to it beside GRPO, and its gradient, exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

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
