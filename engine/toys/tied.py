"""Distillation that can be enumerated: the score function's expectation, and one student between two teachers.

one vector of logits serves two states, whose teachers are uniform(8) and (.93, .01 x 7):
forward KL -> their arithmetic mean; reverse KL -> their normalised geometric mean; hard labels -> one token
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine.batch import Batch
from fuserl.engine.checks import Figure, at_most
from fuserl.engine.tabular import Table

TOKENS = 8
TEACHERS = torch.tensor([[1 / 8] * 8, [0.93] + [0.01] * 7], dtype=torch.float64)


def identity(advantage: Callable, loss_of: Callable, draws: int = 20000) -> list[Figure]:
    """E over the student's tokens of each form's gradient, apart from that of the exact reverse KL."""
    random = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 1, TOKENS, generator=random, dtype=torch.float64)
    table, p = Table(logits), logits.softmax(-1)[0]
    exact = table.gradient(_scored(table, torch.zeros(1, dtype=torch.int64), teacher), loss_of("reverse_kl"),
                           teacher=teacher)[0]  # fmt: skip
    found, each = [], {}
    for form in ("opd", "ppo", "reinforce"):
        rows = []
        for token in range(TOKENS):
            batch = _scored(table, torch.tensor([token]), teacher)
            rows.append(table.gradient(batch.with_advantages(advantage(batch)), loss_of(form), teacher=teacher)[0])
        each[form] = torch.stack(rows)
        apart = float((p @ each[form] - exact).abs().max())
        found.append(at_most(f"E gradient of {form} apart from that of KL(student || teacher)", apart, 1e-10))
    drawn = torch.multinomial(p, draws, replacement=True, generator=random)
    batch = _scored(table, drawn, teacher)
    mean = table.gradient(batch.with_advantages(advantage(batch)), loss_of("opd"), teacher=teacher)[0]
    error = each["opd"][drawn].std(0) / draws**0.5
    return [
        *found,
        at_most("standard errors that the sampled gradient is off", float(((mean - exact) / error).abs().max()), 3),
    ]


def optima(loss_of: Callable, steps: int = 300) -> list[Figure]:
    """Entropies where each divergence is least; expected ones from the closed forms."""
    arithmetic, geometric = TEACHERS.mean(0), TEACHERS.log().mean(0).softmax(-1)
    known = {"hard_ce": TEACHERS.new_tensor([1.0] + [0.0] * 7), "reverse_kl": geometric, "forward_kl": arithmetic}
    found, entropies = [], []
    for form, best in known.items():
        p = _fitted(loss_of(form), steps)
        entropies.append(_entropy(p))
        found.append(at_most(f"{form}: entropy {entropies[-1]:.4f} apart from {_entropy(best):.4f}",
                             abs(entropies[-1] - _entropy(best)), 1e-3))  # fmt: skip
        found.append(at_most(f"{form}: p0 {float(p[0]):.4f} apart from {float(best[0]):.4f}",
                             abs(float(p[0] - best[0])), 1e-3))  # fmt: skip
    ordered = float(entropies[0] < entropies[1] < entropies[2])
    return [*found, Figure("entropy of hard labels < of reverse KL < of forward KL (1 is yes)", ordered, 1)]


def _scored(table: Table, tokens: Tensor, teacher: Tensor) -> Batch:
    batch = table.given(tokens[:, None], torch.zeros_like(tokens), torch.zeros(len(tokens)), 1)
    scored = table.outputs(batch, teacher).logprob.detach()
    return batch.replace(old_logprobs=batch.rollout_logprobs, extra=batch.extra | {"teacher_logprob": scored})


def _fitted(loss, steps: int) -> Tensor:
    """The student's distribution after steps of Adam on both states at once."""
    table = Table(torch.zeros(1, TOKENS), lr=0.6, optimizer=torch.optim.Adam)
    zeros = torch.zeros(2, dtype=torch.int64)
    batch = table.given(zeros[:, None], zeros, torch.zeros(2), 1)
    batch = batch.replace(extra=batch.extra | {"taught": torch.tensor([0, 1])})
    for _ in range(steps):
        table.update(batch, loss, teacher=TEACHERS.log())
    return table.probabilities[0]


def _entropy(p: Tensor) -> float:
    return float(-torch.xlogy(p, p).sum())
