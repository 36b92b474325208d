"""P(y|x) and P(y) in one table: a row of answers for each prompt, and a last one for no prompt."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine import checks, openings
from fuserl.engine.advantages import standardized
from fuserl.engine.batch import Batch
from fuserl.engine.checks import Figure, at_most
from fuserl.engine.losses import Loss, clipped, token_mean
from fuserl.engine.mixtures import emptied, joined
from fuserl.engine.tabular import Table

PROMPTS, ANSWERS = 4, 6
SWITCH, WEIGHT, DUAL = 3, 0.01, 10.0


def marginal(loss: Loss) -> float:
    """How far the gradient of log P(y) = log sum_x p(x) P(y|x) is from sum_x P(x|y) grad log P(y|x), at most.

    The first is by finite differences; the second is the loss's, with posteriors for advantages.
    """
    table = _table()
    prior = torch.rand(PROMPTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(-1)

    def log_marginal(logits: Tensor, answer: int) -> Tensor:
        return (prior * logits[:PROMPTS].softmax(-1)[:, answer]).sum().log()

    worst, width = 0.0, 1e-5
    for answer in range(ANSWERS):
        posterior = prior * table.probabilities[:PROMPTS, answer]
        batch = table.given(torch.full((PROMPTS, 1), answer), torch.arange(PROMPTS), torch.ones(PROMPTS), 1)
        batch = batch.with_advantages(posterior / posterior.sum())
        ours = -PROMPTS * table.gradient(joined(batch, emptied(batch)), loss)
        for at in torch.cartesian_prod(torch.arange(PROMPTS + 1), torch.arange(ANSWERS)).tolist():
            moved = [table.logits.detach().clone() for _ in range(2)]
            for each, sign in zip(moved, (1, -1), strict=True):
                each[tuple(at)] += sign * width
            found = (log_marginal(moved[0], answer) - log_marginal(moved[1], answer)) / (2 * width)
            worst = max(worst, abs(float(ours[tuple(at)] - found)))
    return worst


def redistributed(advantage: Callable, loss: Loss) -> float:
    """How far a step of L_P on a wrong token is from taking |A| (1 - p) off it and giving each other one |A| p."""
    table, wrong = _table(), 2
    given = table.given(torch.tensor([[4], [wrong]]), torch.tensor([0, 0]), torch.tensor([1.0, 0.0]), 2)
    batch = placed(advantage(opened(given)))
    p = table.probabilities[-1]
    expected = -0.5 * (torch.eye(ANSWERS, dtype=torch.float64)[wrong] - p)
    step = -table.gradient(batch, loss)
    return max(float((step[-1] - expected).abs().max()), float(step[:-1].abs().max()))


def around_the_switch(advantage: Callable, loss: Loss) -> tuple[float, float, float]:
    """Gradients of the warm-up's last step, and of the one after it.

    Returns:
        Of the first step the largest of a prompt's row, and how far that of no prompt's row is from the weight times
        the wrong answers' mean; of the second how far it is from GRPO's with the mean over tokens.
    """
    table = _table()
    batch = opened(table.drawn([0, 1, 2], 4, lambda context, said: int(said) % 2 == context % 2)).replace(step=SWITCH)
    warm = table.gradient(placed(advantage(batch)), loss)
    credit = batch.rewards - batch.group_mean(batch.rewards)
    wrong = credit < 0
    score = torch.eye(ANSWERS, dtype=torch.float64)[batch.tokens] - table.probabilities[-1]
    expected = -WEIGHT * (credit[wrong, None] * score[wrong]).sum(0) / int(wrong.sum())
    ordinary = table.gradient(checks.credited(batch, standardized), clipped(dual=DUAL, reduce=token_mean))
    after = table.gradient(placed(advantage(batch.replace(step=SWITCH + 1))), loss)
    return float(warm[:-1].abs().max()), checks.apart(warm[-1], expected), float((after - ordinary).abs().max())


def agreed(advantage: Callable, loss: Loss) -> float:
    """The largest of loss and gradients where every group is all right or all wrong; NaN if one is."""
    table, found = _table(), [torch.zeros(1, dtype=torch.float64)]
    batch = opened(table.drawn([0, 1], 4, lambda context, said: context))
    for step in (SWITCH, SWITCH + 1):
        seen = placed(advantage(batch.replace(step=step)))
        found += [table.loss(seen, loss).detach()[None], table.gradient(seen, loss).flatten()]
    return float(torch.cat(found).abs().max())


def figures(phased: Callable, loss_of: Callable) -> list[Figure]:
    """The gradient of log P(y); where L_P moves mass; L_RL at both sides of the switch; groups that all agree."""
    advantage, loss = phased(openings.two_spaces(), switch=SWITCH), loss_of(weight=WEIGHT, dual=DUAL)
    prompted, free, after = around_the_switch(advantage, loss)
    return [
        at_most("grad log P(y) apart from the posterior's mean of grad log P(y|x)", marginal(loss), 1e-6),
        Figure("L_P's step apart from -|A| (onehot - p)", redistributed(advantage, loss_of(weight=1.0, dual=DUAL)), 0),
        Figure("largest gradient of L_RL in the last step of the warm-up", prompted, 0),
        Figure("that step's gradient apart from weight grad L_P", free, 0),
        Figure("the next step's gradient apart from GRPO's", after, 0, 0.0),
        Figure("loss and gradient where all groups agree", agreed(advantage, loss), 0, 0.0),
    ]


def opened(batch: Batch) -> Batch:
    """The batch with a token to open texts with, which a table has no use for."""
    return batch.replace(facts={"opening": torch.zeros(len(batch.group), 1, dtype=torch.int64)})


def placed(batch: Batch) -> Batch:
    """The batch with objective 1, whose prompts are gone, in the row of no prompt."""
    state = torch.where(batch.objective == 1, PROMPTS, batch.extra["state"])
    return batch.replace(extra={"state": state})


def _table() -> Table:
    return Table(torch.randn(PROMPTS + 1, ANSWERS, generator=torch.Generator().manual_seed(0)), seed=2)
