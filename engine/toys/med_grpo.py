"""Two tasks of temporal grounding whose metrics are of unlike scales, for a policy that is one table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine import grounding, tabular
from fuserl.engine.checks import Figure, at_least, at_most, credited, example
from fuserl.engine.losses import Loss
from fuserl.engine.tabular import Table
from fuserl.engine.task_rewards import Quantiles

# How many hundredths of what is to be found each answer covers: medians of 0.5 and 0.12.
ANSWERS = ((15, 25, 35, 45, 50, 55, 65, 75, 85), (4, 6, 8, 10, 12, 14, 16, 18, 20))
STEPS, GROUPS, GROUP_SIZE = 20, 4, 8


def metric(context: int, said: Tensor) -> float:
    """Temporal IoU of an answer `0-width` with what is to be found, `0-100`."""
    answer = f"0-{ANSWERS[context][int(said[0])]}"
    return grounding.temporal_iou(grounding.interval(answer), grounding.interval("0-100"))


def balance(seed: int, advantage: Callable, loss: Loss) -> dict[str, dict[str, float]]:
    """With raw and with normalised rewards: the first task's gradient norm over the second's, and what is learnt.

    Returns:
        "raw" and "normalised", each with "ratio", at the start, and "least", the smaller one of the two tasks'
        improvements of their expected metric, relative to the start.
    """
    found = {}
    for name in ("raw", "normalised"):
        table, quantiles = Table(torch.zeros(2, 9), lr=8.0, seed=seed), Quantiles()
        start = expected(table)
        baseline = table.drawn([0, 1], 128, metric)
        for task in (0, 1):
            quantiles.fit(str(task), baseline.rewards[baseline.group == task])

        def batch(table=table, quantiles=quantiles, name=name):
            drawn = table.drawn([0, 1] * GROUPS, GROUP_SIZE, metric)
            if name == "raw":
                return drawn
            task = drawn.group % 2
            both = torch.stack([quantiles.normalised(str(each), drawn.rewards) for each in (0, 1)])
            return drawn.replace(rewards=both[task, torch.arange(len(task))])

        norms = sum(table.gradient(credited(batch(), advantage), loss).norm(dim=1) for _ in range(12))
        for _ in range(STEPS):
            tabular.learnt(table, batch(), advantage, loss)
        found[name] = {"ratio": float(norms[0] / norms[1]), "least": float((expected(table) / start - 1).min())}
    return found


def expected(table: Table) -> Tensor:
    """The expected metric of each task, (2,) float64."""
    return (table.probabilities * torch.tensor(ANSWERS, dtype=torch.float64) / 100).sum(1)


def logistic(slope: float = 1.0, shift: float = 0.0) -> list[float]:
    """Rewards of a quarter, the median and three quarters of a baseline, each metric slope x + shift."""
    values = slope * torch.linspace(0, 1, 9, dtype=torch.float64) + shift
    quantiles = Quantiles()
    quantiles.fit("task", values)
    return quantiles.normalised("task", values[[2, 4, 6]]).tolist()


def rescaled(advantage: Callable) -> tuple[float, float]:
    """How far advantages move when rewards are multiplied by 100, at most, and their largest ratio to before."""
    batch = example((3, 5, 2, 4, 1, 6), 3)
    batch = batch.replace(rewards=torch.tensor([0.1, 0.7, 0.4, 0.9, 0.2, 0.3], dtype=torch.float64))
    before, after = advantage(batch), advantage(batch.replace(rewards=100 * batch.rewards))
    return float((after - before).abs().max()), float((after / before).max())


def figures(advantages: dict[str, Callable], loss: Loss, seeds: int = 5) -> list[Figure]:
    """The logistic, what it does not depend on, what each advantage sees of a scale, and two tasks of unlike scales."""
    plain, scaled = logistic(), logistic(slope=7.0, shift=-3.0)
    runs = [balance(seed, advantages["group_mean"], loss) for seed in range(seeds)]
    ratios = {name: sum(run[name]["ratio"] for run in runs) / seeds for name in ("raw", "normalised")}
    better = sum(run["normalised"]["least"] > run["raw"]["least"] for run in runs)
    std, mean = (rescaled(advantages[name]) for name in ("group_std", "group_mean"))
    return [
        Figure("rnorm at the median", plain[1], 0.5, 1e-12),
        Figure("rnorm half an interquartile range above", plain[2], 0.817574476193644, 1e-12),
        Figure("rnorm half an interquartile range below", plain[0], 0.182425523806356, 1e-12),
        Figure("rnorm of 7 x - 3, apart", max(abs(a - b) for a, b in zip(plain, scaled, strict=True)), 0, 1e-12),
        at_most("change of group_std advantages under rewards x 100", std[0], 1e-5),
        Figure("group_mean advantages under rewards x 100, over before", mean[1], 100, 1e-9),
        at_least("raw: gradient of the task of median 0.5 over that of 0.12", ratios["raw"], 3),
        at_least("normalised: the same", ratios["normalised"], 0.67),
        at_most("normalised: the same, from above", ratios["normalised"], 1.5),
        at_least("seeds of five whose least improved task improves more", better * 5 / seeds, 4),
    ]
