"""Groups whose completions have known qualities, and a judge that reads them with noise: which ranking is how right."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import torch

from fuserl.engine import tournaments
from fuserl.engine.checks import Figure, at_least, example
from fuserl.engine.judges import Judge
from fuserl.kernels.group_ranks import group_ranks

SIZE = 16


class Noisy(Judge):
    """A judge of texts that are numbers: their qualities, each read with normal noise of its own.

    Args:
        noise: standard deviation.
        seed: of the noise.
    """

    def __init__(self, noise: float, seed: int = 0):
        super().__init__(rule=float)
        self.noise, self.random = noise, random.Random(seed)

    async def pairwise(self, prompt: str, first: str, second: str, **others) -> tuple[float, float]:
        """Both qualities, and noise."""
        return self.read(first), self.read(second)

    def read(self, text: str) -> float:
        """One reading."""
        return float(text) + self.random.gauss(0, self.noise)


def groups(count: int, size: int = SIZE) -> list[list[str]]:
    """`count` groups of completions whose qualities are normal."""
    drawn = random.Random(1)
    return [[repr(drawn.gauss(0, 1)) for _ in range(size)] for _ in range(count)]


def correlation(reward, several: list[list[str]]) -> tuple[float, float]:
    """Spearman's correlation of a group reward with the qualities, and the matches of a group: means over groups.

    Args:
        reward: async (prompt, completions, answer, metadata) -> dicts, or floats.
        several: groups of completions.
    """

    async def all_of() -> list:
        return [await reward("", texts, None, {}) for texts in several]

    found = asyncio.run(all_of())
    rewards = torch.tensor([[each["reward"] for each in standing] for standing in found], dtype=torch.float64)
    qualities = torch.tensor([list(map(float, texts)) for texts in several], dtype=torch.float64)
    group = torch.arange(len(several)).repeat_interleave(rewards.shape[1])
    one, other = (group_ranks(x.flatten(), group).view_as(rewards) for x in (rewards, qualities))
    one, other = one - one.mean(1, keepdim=True), other - other.mean(1, keepdim=True)
    each = (one * other).sum(1) / (one.square().sum(1) * other.square().sum(1)).sqrt()
    return float(each.mean()), sum(standing[0].get("matches", 0) for standing in found) / len(found)


def ranking(topology: str, noise: float, count: int) -> tuple[float, float]:
    """`correlation` of the recipe's reward over `count` groups under a judge with `noise`."""
    return correlation(tournaments.tournament(Noisy(noise), topology, ""), groups(count))


def unseeded(noise: float, count: int) -> float:
    """Correlation of the bracket in the order of the numbers."""
    judge = Noisy(noise)

    async def reward(prompt, completions, answer, metadata):
        async def match(i: int, j: int) -> tuple[float, float]:
            return await judge.both_orders(prompt, completions[i], completions[j])

        bracket = tournaments.Field(len(completions), match)
        return [{"reward": each} for each in await tournaments.single_elimination(bracket, seeded=False)]

    return correlation(reward, groups(count))[0]


def pointwise(noise: float, count: int) -> float:
    """Correlation of one reading of each completion alone, rounded to a whole number, as judges give marks."""
    judge = Noisy(noise)

    async def reward(prompt, completions, answer, metadata):
        return [{"reward": round(judge.read(text))} for text in completions]

    return correlation(reward, groups(count))[0]


def figures(advantage: Callable, *, count: int = 200) -> list[Figure]:
    """The figures of `fuserl check arena_rl`.

    Args:
        advantage: the recipe's slot.
        count: groups that a mean with noise is over.
    """
    (exact, matches), (_, all_pairs) = ranking("single_elimination", 0.0, 20), ranking("round_robin", 0.0, 1)
    seeded, robin, anchored = (ranking(name, 0.5, count)[0] for name in ("single_elimination", "round_robin", "anchor"))
    noisy = [ranking(name, 1.0, count)[0] for name in ("single_elimination", "round_robin")]
    ranks = example((1,) * SIZE, group_size=SIZE).replace(rewards=1 - torch.arange(SIZE) / (SIZE - 1))
    largest = 0.5 / ((17 * 16 / 12) ** 0.5 / 15)
    error = 4 * 0.1 / count**0.5  # four standard errors of a mean over groups, whose deviation is below 0.1
    return [
        Figure("matches of 16", matches, 30, 0),
        Figure("matches of 16, everyone against everyone", all_pairs, 120, 0),
        Figure("advantage of the first of 16", float(advantage(ranks).max()), largest, 4e-6),
        Figure("correlation without noise", exact, 1, 1e-12),
        Figure("correlation without noise, no seeds", unseeded(0.0, count), 0.885, error),
        at_least("correlation at noise 0.5", seeded, 0.92),
        at_least("above the anchor's alone", seeded - anchored, 0.01),
        at_least("above pointwise marks", seeded - pointwise(0.5, count), 0.10),
        at_least("above a round robin", seeded - robin, -0.03),
        Figure("correlation at noise 1", noisy[0], 0.826, error),
        Figure("a round robin's at noise 1", noisy[1], 0.905, error),
    ]
