"""Groups whose completions have known qualities, and a judge that reads them with noise: which ranking is how right."""

from __future__ import annotations

import asyncio
import random

import torch

from fuserl.engine import tournaments
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
