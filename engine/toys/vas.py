"""A bank of bandits, most of them solved and some beyond reach, and who finds the few at the frontier."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fuserl.engine import diversity, tabular
from fuserl.engine.checks import Figure, at_least, at_most
from fuserl.engine.losses import Loss
from fuserl.engine.tabular import Table
from fuserl.engine.variance_sampling import VarianceSampler, between_at_most, variance_parts

SOLVED, IMPOSSIBLE, FRONTIER = 80, 15, 5
STEPS, GROUPS, GROUP_SIZE = 60, 8, 8
LEARNT = STEPS * GROUPS * GROUP_SIZE  # completions
PROBES, EVERY = 8, 28  # as in the paper's ablations


def bank(seed: int) -> Table:
    """100 bandits of four arms, the first of which is right.

    Solved ones take it, those beyond reach another one, each once in 50,000 times not; at the frontier the odds are
    drawn around a third.
    """
    random = torch.Generator().manual_seed(seed)
    logits = torch.zeros(SOLVED + IMPOSSIBLE + FRONTIER, 4)
    logits[:SOLVED, 0] = logits[SOLVED : SOLVED + IMPOSSIBLE, 1] = 12.0
    logits[-FRONTIER:, 0] = 0.5 + 0.2 * torch.randn(FRONTIER, generator=random)
    return Table(logits, lr=0.5, seed=seed)


def right(_context: int, said: torch.Tensor) -> bool:
    """The reward of an arm."""
    return bool(said[0] == 0)


def trained(seed: int, lam: float, advantage: Callable, loss: Loss) -> tuple[float, float, int]:
    """Share of groups without an advantage, the chance of the right arm at the frontier, and completions for scores.

    `lam` of the prompts are drawn by score; the steps and the completions that are learnt from are the same for all.
    """
    table = bank(seed)
    size = len(table.logits)
    sampler = VarianceSampler(size, groups=GROUPS, seed=seed, lam=lam, a=0.8, b=0.2)
    flat = 0
    for step in range(1, STEPS + 1):
        places = sampler.places(step)
        if lam and step % EVERY == 1:
            probes = table.drawn(range(size), PROBES, right)
            samples = probes.tokens.view(size, PROBES, 1).tolist()
            scores = torch.tensor([diversity.METRICS["self_bleu"](each) for each in samples])
            sampler.refresh(probes.rewards.view(size, PROBES) == 1, scores)
        batch = table.drawn(places, GROUP_SIZE, right)
        rewards = batch.rewards.view(GROUPS, GROUP_SIZE)
        flat += int((rewards.amax(1) == rewards.amin(1)).sum())
        tabular.learnt(table, batch, advantage, loss)
    return flat / (STEPS * GROUPS), float(table.probabilities[-FRONTIER:, 0].mean()), sampler.spent


def two_actions(p: float, loss: Loss) -> float:
    """|grad J|^2 of a softmax over two actions of which the one with probability p is rewarded: 2 (p (1 - p))^2."""
    table = Table(torch.tensor([[p, 1 - p]], dtype=torch.float64).log())
    batch = table.given(torch.tensor([[0], [1]]), torch.zeros(2, dtype=torch.int64), torch.tensor([1.0, 0.0]), 2)
    weighted = batch.with_advantages(2 * batch.rewards * table.probabilities[0])
    return float(table.gradient(weighted, loss).square().sum())


def frequencies() -> float:
    """How far 10^5 draws of 20 prompts are from lam VPS / sum VPS + (1 - lam) / n, in their standard errors."""
    sampler = VarianceSampler(20, groups=10, seed=0, lam=0.5, a=1.0, b=0.0)
    sampler.refresh(torch.arange(20)[:, None] > torch.arange(20), torch.zeros(20))
    expected = 0.5 * sampler.scores / sampler.scores.sum() + 0.5 / 20
    drawn = torch.tensor([sampler.places(step) for step in range(1, 10001)]).flatten().bincount(minlength=20) / 1e5
    return float(((drawn - expected).abs() / (expected * (1 - expected) / 1e5).sqrt()).max())


def two_levels() -> tuple[float, float, float]:
    """Of rewards behind 50 trajectories: P (1 - P) less its parts; the part between over its bound; and that of equals.

    The last one is 0 though the trajectories are apart: no distance bounds it from below.
    """
    random = torch.Generator().manual_seed(0)
    weights, rates, places = torch.rand(3, 50, generator=random, dtype=torch.float64)
    weights = weights / weights.sum()
    mean, equal = (weights * rates).sum(), torch.full_like(weights, 1 / 50)
    most = between_at_most(0.5, (places[:, None] - places).abs())
    near, flat = (variance_parts(equal, each)[1] for each in (0.5 * places.sin(), torch.full_like(equal, 0.3)))
    return float(mean * (1 - mean) - sum(variance_parts(weights, rates))), float(near / most), float(flat)


def figures(advantage: Callable, loss: Loss) -> list[Figure]:
    """What is true of the variance, how often a prompt is drawn, and ten banks of bandits of which few teach."""
    total, near, flat = two_levels()
    runs = [[trained(seed, lam, advantage, loss) for lam in (0.5, 0.0)] for seed in range(10)]
    share = sum(ours[0] for ours, _ in runs) / sum(plain[0] for _, plain in runs)
    better = sum(ours[1] > plain[1] for ours, plain in runs)
    return [
        Figure("P (1 - P) apart from within + between", total, 0, 1e-12),
        Figure("|grad J|^2 of two actions, p = 0.3", two_actions(0.3, loss), 2 * (0.3 * 0.7) ** 2, 1e-12),
        at_most("variance between, over its bound", near, 1),
        at_most("variance between where a lower bound in d would be above 0", flat, 1e-30),
        at_most("largest error of 1e5 draws, in standard errors", frequencies(), 3),
        at_most("groups without advantage, over those of uniform draws", share, 0.6),
        at_least("banks of ten with a better frontier", better, 8),
        Figure("completions for scores, over those learnt from", runs[0][0][2] / LEARNT, 3 * 800 / 3840),
    ]
