"""Two problems with different answers share one softmax over ten: learning the likelier one unlearns the other.

Each row of the table is a run of its own: all seeds are trained at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine.batch import Batch
from fuserl.engine.checks import Figure, at_least, at_most
from fuserl.engine.evaluation import pass_at_k
from fuserl.engine.interference import matrix, negative_mass, unsolved, winners
from fuserl.engine.losses import Loss, clipped, negative_logprob
from fuserl.engine.tabular import Table, learnt

ANSWERS, GROUP, LR, STEPS, TRIES = 10, 16, 0.5, 400, 8
START = torch.tensor([1.0] + [0.0] * (ANSWERS - 1), dtype=torch.float64)


def per_problem(batch: Batch) -> Tensor:
    """The mean over the group of each problem, summed over problems, (n,)."""
    return batch.rewards.new_full(batch.tokens.shape, 1.0 / GROUP)


@torch.no_grad()
def drawn(table: Table, greedy_pass: bool) -> Batch | None:
    """A group of each problem of each run, without those that greedy decoding solves; None where that is all."""
    p = table.probabilities
    run, problem = (x.flatten() for x in torch.meshgrid(torch.arange(len(p)), torch.arange(2), indexing="ij"))
    if greedy_pass:
        left = unsolved((p.argmax(-1)[run] == problem).double())
        run, problem = run[left], problem[left]
    if not len(run):
        return None
    tokens = torch.multinomial(p[run], GROUP, replacement=True, generator=table.random).flatten()
    rewards = (tokens == problem.repeat_interleave(GROUP)).double()
    return table.given(tokens[:, None], run.repeat_interleave(GROUP), rewards, GROUP)


def trained(advantage: Callable, loss: Loss, *, greedy_pass: bool, seeds: int = 20) -> Tensor:
    """p of the two answers after training, (seeds, 2)."""
    table = Table(START.expand(seeds, -1), lr=LR)
    for _ in range(STEPS):
        batch = drawn(table, greedy_pass)
        if batch is not None:
            learnt(table, batch, advantage, loss)
    return table.probabilities[:, :2]


def solved(p: Tensor) -> float:
    """The mean over runs and problems of the chance that one of TRIES answers is right."""
    return float((1 - (1 - p) ** TRIES).mean())


def _enumerated() -> float:
    """How far pass@k is from counting every choice of k out of 6 answers."""
    apart = 0.0
    for correct, k in itertools.product(range(7), range(1, 7)):
        choices = list(itertools.combinations([at < correct for at in range(6)], k))
        counted = sum(map(any, choices)) / len(choices)
        apart = max(apart, abs(float(pass_at_k(torch.tensor([correct]), 6, k)[0]) - counted))
    return apart


def _richer() -> tuple[float, Tensor]:
    """How far the growth of log p1/p2 is from its formula, by a small step; and the interference matrix."""
    table, p = Table(START[None]), START.softmax(-1)
    tokens, problem = torch.arange(ANSWERS).repeat(2), torch.arange(2).repeat_interleave(ANSWERS)
    zeros = torch.zeros(2 * ANSWERS, dtype=torch.int64)
    batch = table.given(tokens[:, None], zeros, (tokens == problem).double(), ANSWERS)
    batch = batch.with_advantages(batch.rewards)
    size = 1e-6
    steps = []
    for mask in (problem == 0, problem == 1):
        weights = p[tokens] * mask
        steps.append(-table.gradient(batch, negative_logprob(reduce=lambda part, w=weights: w))[0])
    after = (START + size * sum(steps)).log_softmax(-1)
    grown = float((after[0] - after[1] - 1.0) / size)
    towards = torch.eye(ANSWERS, dtype=torch.float64)[:2] - p
    return abs(grown - float((p[0] - p[1]) * (1 - p[0] - p[1]))), matrix(towards, torch.stack(steps))


def figures(advantage: Callable, loss_of: Callable) -> list[Figure]:
    """pass@k, the divergence's gradient, what training does with and without the greedy pass, and why."""
    random = torch.Generator().manual_seed(0)
    logits, initial = torch.randn(2, 1, ANSWERS, generator=random, dtype=torch.float64)
    table, zero = Table(logits), torch.zeros(1, dtype=torch.int64)
    batch = table.given(zero[:, None], zero, torch.zeros(1), 1).with_advantages(torch.zeros(1))
    gradient = table.gradient(batch, loss_of(1.0), teacher=initial)
    apart = float((gradient - (logits.softmax(-1) - initial.softmax(-1))).abs().max())
    start, plain = START.softmax(-1)[:2], clipped(reduce=per_problem)
    grpo, ours = (trained(advantage, plain, greedy_pass=greedy) for greedy in (False, True))
    after, held = (", ".join(f"{x:.3f}" for x in p.mean(0).tolist()) for p in (grpo, ours))
    growth, found = _richer()
    change = winners(start, grpo.mean(0).log() - start.log(), (0.0, 0.1, 1.0))
    return [
        at_most("pass@k apart from enumeration, n = 6", _enumerated(), 1e-12),
        at_most("gradient of the forward KL apart from policy - initial", apart, 1e-6),
        at_most(
            f"pass@{TRIES} before training, {solved(start):.4f}, apart from 0.695", abs(solved(start) - 0.695), 1e-3
        ),
        at_most(f"pass@{TRIES} of GRPO, p {after}: below the start", solved(grpo), solved(start)),
        at_least(f"pass@{TRIES} with the greedy pass, p {held}: above it", solved(ours), 0.9),
        at_most("growth of log p1/p2 apart from (p1 - p2)(1 - p1 - p2)", growth, 1e-5),
        at_most("negative mass of the interference matrix", negative_mass(found), 0.0),
        at_least("winner: change of log p of the likelier answer under GRPO", change["change_from_0.1_to_1"], 0.0),
        at_most("loser: of the other", change["change_from_0_to_0.1"], 0.0),
    ]
