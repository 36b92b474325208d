"""Words that name one mistake, beside a reward that is all or nothing: the policy that has read them teaches itself.

8 problems x 6 tokens x 8 letters; feedback names the first wrong position and its letter
teacher = the policy's own logits, raised by 3 at that letter there
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine.advantages import standardized
from fuserl.engine.batch import Batch
from fuserl.engine.checks import Figure, at_least, at_most
from fuserl.engine.losses import Loss, clipped
from fuserl.engine.tabular import Table

PROBLEMS, LENGTH, LETTERS, GROUP, STEPS, RAISED = 8, 6, 8, 8, 150, 3.0


class Problems:
    """A policy of all problems, and their answers, of a seed."""

    def __init__(self, seed: int, lr: float = 120.0):
        random = torch.Generator().manual_seed(seed)
        self.answers = torch.randint(LETTERS, (PROBLEMS, LENGTH), generator=random)
        self.table = Table(torch.zeros(PROBLEMS * LENGTH, LETTERS), lr=lr, seed=seed)

    @property
    def success(self) -> float:
        """The mean chance of a right answer, exactly."""
        p = self.table.probabilities.gather(1, self.answers.reshape(-1, 1))
        return float(p.view(PROBLEMS, LENGTH).prod(-1).mean())

    def drawn(self, count: int = GROUP) -> tuple[Batch, Tensor]:
        """Groups of rollouts, and the teacher's logits at each of their tokens (n, LETTERS)."""
        problem = torch.arange(PROBLEMS).repeat_interleave(count)
        states = problem[:, None] * LENGTH + torch.arange(LENGTH)
        p = self.table.probabilities[states.flatten()]
        tokens = torch.multinomial(p, 1, generator=self.table.random).view(states.shape)
        wrong = tokens != self.answers[problem]
        batch = self.table.given(tokens, states.flatten(), (~wrong.any(-1)).double(), count)
        teacher = self.table.logits.detach()[states].clone()
        rows, at = wrong.any(-1).nonzero().squeeze(-1), wrong.double().argmax(-1)
        teacher[rows, at[rows], self.answers[problem[rows], at[rows]]] += RAISED
        facts = {"taught": wrong.any(-1).double()}
        extra = batch.extra | {"taught": torch.arange(len(batch.tokens))}
        return batch.replace(facts=facts, extra=extra), teacher.flatten(0, 1)

    def step(self, advantage: Callable, loss: Loss) -> None:
        """One update."""
        batch, teacher = self.drawn()
        if batch.facts["taught"].any():
            self.table.update(batch.with_advantages(advantage(batch)), loss, teacher=teacher)


def learnt(seed: int, advantage: Callable, loss: Loss, steps: int = STEPS) -> float:
    """The chance of right answers after training."""
    problems = Problems(seed)
    for _ in range(steps):
        problems.step(advantage, loss)
    return problems.success


def discovered(seed: int, advantage: Callable, loss: Loss, most: int = 60) -> int:
    """Attempts until the first right answer to any of the problems, by training between groups."""
    problems = Problems(seed)
    for turn in range(1, most + 1):
        batch, teacher = problems.drawn()
        if batch.rewards.any():
            return turn
        problems.table.update(batch.with_advantages(advantage(batch)), loss, teacher=teacher)
    return most


def limits(loss_of: Callable) -> list[Figure]:
    """The score function's expectation, both ends of the family, and a list of all tokens."""
    random = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 1, LETTERS, generator=random, dtype=torch.float64)
    table, p = Table(logits), logits.softmax(-1)[0]
    zero = torch.zeros(1, dtype=torch.int64)

    def given(token: int) -> Batch:
        return table.given(torch.tensor([[token]]), zero, torch.zeros(1), 1).with_advantages(torch.ones(1))

    def value(alpha: float, **options) -> float:
        return float(table.loss(given(0), loss_of(alpha, **options), teacher=teacher).detach())

    score = loss_of(1.0, sampled=True)
    rows = torch.stack([table.gradient(given(token), score, teacher=teacher)[0] for token in range(LETTERS)])
    exact = table.gradient(given(0), loss_of(1.0), teacher=teacher)[0]
    found = [
        at_most(
            "E of the sampled form apart from the gradient of KL(p || q)", float((p @ rows - exact).abs().max()), 1e-12
        )
    ]
    near = 1e-4
    for end, alpha in ((0.0, near), (1.0, 1 - near)):
        ratio = value(alpha) / near / value(end)
        found.append(
            at_most(f"family at {alpha:g} over 1e-4, apart from its end {end:g}, relative", abs(ratio - 1), 1e-3)
        )
    for alpha in (0.0, 0.5, 1.0):
        gap = abs(value(alpha, k=LETTERS) - value(alpha))
        found.append(at_most(f"topk of all tokens apart from the whole, alpha {alpha:g}", gap, 1e-6))
    return found


def figures(advantage: Callable, loss: Loss, seeds: int = 4) -> list[Figure]:
    """The least of ours and the most of GRPO over seeds; and attempts at a first answer beside drawing on."""
    ours = min(learnt(seed, advantage, loss) for seed in range(seeds))
    grpo = max(learnt(seed, standardized, clipped()) for seed in range(seeds))
    turns = max(discovered(seed, advantage, loss) for seed in range(seeds))
    drawing = 1 / (1 - (1 - LETTERS**-LENGTH) ** (PROBLEMS * GROUP))
    return [
        at_least(f"least success of {seeds} seeds", ours, 0.85),
        at_most("most success of GRPO", grpo, 0.05),
        at_most("most turns until a first right answer; drawing alone needs on average", float(turns), drawing / 3),
    ]
