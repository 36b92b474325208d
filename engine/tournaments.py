"""Tournaments among the completions of a group: who meets whom, and what reward the standing at the end is.

    standing = await held(single_elimination, count, match, seed=0)

`match(i, j)` is a coroutine that returns the scores of the two; the matches of a round are awaited together. Of N
completions `single_elimination` plays 2 N - 2 matches, `anchored` N - 1, `round_robin` N (N - 1) / 2, `swiss` about
N / 2 log2 N, `double_elimination` 2 N - 2.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from fuserl.engine import problems

RUBRIC = (
    "Look first at whether the reasoning is sound and leads to the answer, then at whether tools are called where they "
    "help and their results are used, then at the final answer: right, complete, and what was asked for."
)


@dataclass(frozen=True)
class Standing:
    """How a tournament ended."""

    rewards: list[float]  # of each, from 0 (last) to 1 (first)
    points: list[float]  # mean score of each over its matches
    matches: int


class Field:
    """Who takes part, and what they have scored.

    Args:
        count: completions, at least 2.
        match: async (i, j) -> (score of i, score of j).
        seed: of the lots drawn where a tournament draws some.
    """

    def __init__(self, count: int, match: Callable[[int, int], Awaitable[tuple[float, float]]], *, seed: int = 0):
        self.count, self.match, self.random = count, match, random.Random(seed)
        self.points: list[list[float]] = [[] for _ in range(count)]
        self.matches = 0

    async def play(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[float, float]]:
        """The scores of these matches, held together, which also count as points."""
        found = await asyncio.gather(*(self.match(one, other) for one, other in pairs))
        self.matches += len(pairs)
        for pair, scores in zip(pairs, found, strict=True):
            for member, score in zip(pair, scores, strict=True):
                self.points[member].append(score)
        return found

    async def knocked_out(self, pairs: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
        """The winners and the losers of these matches; the one that is named first wins a tie."""
        scores = await self.play(pairs)
        won = [pair if one >= other else pair[::-1] for pair, (one, other) in zip(pairs, scores, strict=True)]
        return [winner for winner, _ in won], [loser for _, loser in won]

    async def against_first(self) -> None:
        """Everyone meets number 0, whose points are the mean of what it scored."""
        await self.play([(member, 0) for member in range(1, self.count)])
        self.points[0] = [statistics.fmean(self.points[0])]

    def mean(self, member: int) -> float:
        """A member's points so far, averaged; 0 without any."""
        return statistics.fmean(self.points[member]) if self.points[member] else 0.0

    def sorted(self, members: Iterable[int]) -> list[int]:
        """The members by mean points, the best first; those with equal points stay in their order."""
        return sorted(members, key=self.mean, reverse=True)


async def held(topology: Callable, count: int, match: Callable, *, seed: int = 0) -> Standing:
    """Hold a tournament; where every score is the same, all rewards are 0: nothing is known of who is better.

    Args:
        topology: one of TOPOLOGIES: async (Field) -> rewards.
        count, match, seed: as of `Field`.
    """
    field = Field(count, match, seed=seed)
    rewards = await topology(field) if count > 1 else [0.0]
    if len({score for points in field.points for score in points}) < 2:
        rewards = [0.0] * count
    return Standing(rewards, [field.mean(member) for member in range(count)], field.matches)


async def single_elimination(field: Field, *, seeded: bool = True) -> list[float]:
    """A bracket in which the two best seeds can only meet in the final; the seeds come from meeting number 0.

    Those who lose in one round are ranked by their mean points over all that they have played (arXiv:2601.06487).

    Args:
        field: who takes part.
        seeded: False leaves the seeding out: the bracket is in the order of the numbers.
    """
    if seeded:
        await field.against_first()
    order = field.sorted(range(field.count)) if seeded else list(range(field.count))
    places, out = [order[seed] if seed < field.count else None for seed in _bracket(field.count)], []
    while len(places) > 1:
        pairs = list(zip(places[::2], places[1::2], strict=True))
        winners, losers = await field.knocked_out([pair for pair in pairs if None not in pair])
        going = iter(winners)
        # Whose opponent would have been one too many goes on without a match: the best seeds, in the first round.
        places = [
            next(going) if None not in pair else next(each for each in pair if each is not None) for pair in pairs
        ]
        out.append(losers)
    return _quantiles([*places, *_ranked(field, out)])


async def anchored(field: Field) -> list[float]:
    """Everyone meets number 0 only; ranked by the scores there, of number 0 by the mean of its own."""
    await field.against_first()
    return _by_score([points[0] for points in field.points])


async def round_robin(field: Field) -> list[float]:
    """Everyone meets everyone; ranked by wins, a tie being half of one."""
    pairs = list(itertools.combinations(range(field.count), 2))
    wins = [0.0] * field.count
    for pair, scores in zip(pairs, await field.play(pairs), strict=True):
        for member, won in zip(pair, _won(*scores), strict=True):
            wins[member] += won
    return _by_score(wins)


async def swiss(field: Field) -> list[float]:
    """log2 N rounds between those with as many wins who have not met, a bye being a win.

    Ranked by wins, then by the wins of those met; who is equal in both shares the mean of the places.
    """
    wins, met = [0.0] * field.count, [set() for _ in range(field.count)]
    members = list(range(field.count))
    for _ in range(min((field.count - 1).bit_length(), field.count - 1)):
        field.random.shuffle(members)
        waiting = sorted(members, key=wins.__getitem__, reverse=True)
        if len(waiting) % 2:
            wins[waiting.pop()] += 1.0
        pairs = []
        while waiting:
            one = waiting.pop(0)
            other = next((each for each in waiting if each not in met[one]), waiting[0])
            waiting.remove(other)
            pairs.append((one, other))
        for pair, scores in zip(pairs, await field.play(pairs), strict=True):
            for member, other, won in zip(pair, pair[::-1], _won(*scores), strict=True):
                wins[member] += won
                met[member].add(other)
    keys = [(wins[member], sum(wins[other] for other in met[member])) for member in range(field.count)]
    worse = [sum(other < key for other in keys) for key in keys]
    return [(below + (keys.count(key) - 1) / 2) / (field.count - 1) for below, key in zip(worse, keys, strict=True)]


async def double_elimination(field: Field) -> list[float]:
    """Out with the second defeat: who loses in the bracket plays on among the losers, whose best meets its winner."""

    async def round_of(members: list[int]) -> tuple[list[int], list[int]]:
        field.random.shuffle(members)
        left_over = members[len(members) & ~1 :]
        winners, losers = await field.knocked_out(list(zip(members[::2], members[1::2], strict=False)))
        return winners + left_over, losers

    unbeaten, beaten_once = list(range(field.count)), []
    while len(unbeaten) > 1:
        unbeaten, losers = await round_of(unbeaten)
        beaten_once.append(losers)
    alive, out = [], []
    while beaten_once or len(alive) > 1:
        alive = alive + (beaten_once.pop(0) if beaten_once else [])
        if len(alive) > 1:
            alive, losers = await round_of(alive)
            out.append(losers)
    winners, losers = await round_of([*unbeaten, *alive])
    return _quantiles([*winners, *losers, *_ranked(field, out)])


TOPOLOGIES = {
    "single_elimination": single_elimination,
    "anchor": anchored,
    "round_robin": round_robin,
    "swiss": swiss,
    "double_elimination": double_elimination,
}


def tournament(judge, topology: str, rubric: str) -> Callable:
    """An async reward of whole groups: the standing of a tournament whose matches `judge` scores in both orders.

    Args:
        judge: as of `judges`.
        topology: among TOPOLOGIES.
        rubric: what makes a completion the better one, in words.

    Returns:
        A reward whose facts are "points", a completion's mean score, and "matches" of its group.
    """

    async def reward(prompt: str, completions: list[str], answer: str | None, metadata: dict) -> list[dict]:
        known = {"rubric": rubric, "answer": answer, "metadata": metadata}

        async def match(one: int, other: int) -> tuple[float, float]:
            return await judge.both_orders(prompt, completions[one], completions[other], **known)

        seed = problems.far_seed(prompt, *completions)
        found = await held(TOPOLOGIES[topology], len(completions), match, seed=seed)
        return [
            {"reward": reward, "points": points, "matches": found.matches}
            for reward, points in zip(found.rewards, found.points, strict=True)
        ]

    return reward


def _bracket(count: int) -> list[int]:
    """The seeds 0 to the next power of 2 in an order in which neighbours meet, and 0 and 1 only at the end."""
    order = [0]
    while len(order) < count:
        last = 2 * len(order) - 1
        order = [seed for each in order for seed in (each, last - each)]
    return order


def _ranked(field: Field, out: list[list[int]]) -> list[int]:
    """Those who went out, the last round first, each round by mean points."""
    return [member for losers in reversed(out) for member in field.sorted(losers)]


def _quantiles(ranking: list[int]) -> list[float]:
    """1 for the first of a ranking without ties, to 0 for the last."""
    rewards = [0.0] * len(ranking)
    for rank, member in enumerate(ranking):
        rewards[member] = 1.0 - rank / (len(ranking) - 1)
    return rewards


def _by_score(scores: list[float]) -> list[float]:
    """(largest rank - rank) / (largest rank - 1), rank being 1 + how many are better; 0 where all are equal."""
    better = [sum(other > score for other in scores) for score in scores]
    return [(max(better) - each) / max(better) if max(better) else 0.0 for each in better]


def _won(one: float, other: float) -> tuple[float, float]:
    """Wins of both in a match."""
    return (0.5, 0.5) if one == other else (float(one > other), float(other > one))
