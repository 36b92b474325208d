"""Tournaments: who meets whom, what standing comes of it, and what a judge is asked on the way."""

import asyncio
import random

import pytest

from fuserl.engine import tournaments
from fuserl.engine.tournaments import TOPOLOGIES, Field, held, single_elimination, tournament

EVERY = pytest.mark.parametrize("name", TOPOLOGIES)


def played(topology, qualities, *, seed=0, noise=0.0):
    """The standing of completions of these qualities, and who met whom in order."""
    met, lots = [], random.Random(seed)

    async def match(i, j):
        met.append((i, j))
        return tuple(qualities[each] + noise * lots.gauss(0, 1) for each in (i, j))

    return asyncio.run(held(topology, len(qualities), match, seed=seed)), met


def qualities(count, seed=0):
    return random.Random(seed).sample(range(100), count)


def ranks(found):
    """The reward of each by its true place."""
    worst = sorted(found)
    return [worst.index(each) / max(len(found) - 1, 1) for each in found]


@pytest.mark.parametrize("count", [2, 3, 5, 6, 7, 8, 11, 16, 17])
@pytest.mark.parametrize("name", ["single_elimination", "anchor", "round_robin"])
def test_without_noise_the_ranking_is_the_truth(name, count):
    for seed in range(5):
        given = qualities(count, seed)
        standing, met = played(TOPOLOGIES[name], given, seed=seed)
        assert standing.rewards == pytest.approx(ranks(given), abs=1e-15)
        assert standing.matches == len(met)
        assert standing.matches == {"anchor": count - 1, "round_robin": count * (count - 1) // 2}.get(
            name, 2 * count - 2
        )


@EVERY
@pytest.mark.parametrize("count", [2, 3, 6, 7, 16])
def test_the_best_wins_and_rewards_are_between_0_and_1(name, count):
    for seed in range(5):
        given = qualities(count, seed)
        standing, met = played(TOPOLOGIES[name], given, seed=seed)
        assert max(standing.rewards) == standing.rewards[given.index(max(given))] <= 1 and min(standing.rewards) >= 0
        assert sum(standing.rewards) == pytest.approx(count / 2)
        assert all(i != j for i, j in met)
        assert played(TOPOLOGIES[name], given, seed=seed)[1] == met


@EVERY
def test_who_is_alone_or_cannot_be_told_apart_gets_nothing(name):
    assert played(TOPOLOGIES[name], [3.0])[0] == tournaments.Standing([0.0], [0.0], 0)
    assert played(TOPOLOGIES[name], [3.0] * 6)[0].rewards == [0.0] * 6


@pytest.mark.parametrize("count", range(3, 18))
def test_the_two_best_seeds_meet_in_the_final_only(count):
    given = list(range(count, 0, -1))
    _, met = played(single_elimination, given)
    bracket = met[count - 1 :]
    assert bracket.count((0, 1)) == 1 and bracket[-1] == (0, 1)
    byes = [
        seed
        for seed in range(count)
        if seed not in {each for pair in bracket[: count - (1 << (count - 1).bit_length()) // 2] for each in pair}
    ]
    assert byes == list(range((1 << (count - 1).bit_length()) - count))


def test_the_one_named_first_wins_a_tie():
    async def match(i, j):
        return (1.0, 1.0) if {i, j} == {0, 1} else (float(-i), float(-j))

    assert asyncio.run(held(single_elimination, 2, match)).rewards == [0.0, 0.0]
    field = Field(2, match)
    assert asyncio.run(field.knocked_out([(1, 0)])) == ([1], [0]) and field.points == [[1.0], [1.0]]


def test_the_points_of_the_one_that_seeds_count_once():
    standing, _ = played(single_elimination, [5, 1, 9], noise=0.0)
    assert standing.points == [5, 1, 9]
    field = Field(3, lambda i, j: asyncio.sleep(0, (7.0, float(i))))
    asyncio.run(field.against_first())
    assert field.points == [[1.5], [7.0], [7.0]]


def test_losers_of_a_round_are_ranked_by_all_their_points():
    """Seeds are 0 > 1 > 2 > 3; of the losers of the first round number 2 has fewer points there."""
    scores = {(1, 0): (7, 9), (2, 0): (6, 9), (3, 0): (5, 9), (0, 3): (9, 8), (1, 2): (9, 0), (0, 1): (9, 8)}
    standing = asyncio.run(held(single_elimination, 4, lambda i, j: asyncio.sleep(0, scores[i, j])))
    assert standing.rewards == pytest.approx([1, 2 / 3, 0, 1 / 3])
    assert standing.points[2:] == [3, 6.5]


def test_a_round_robin_shares_the_better_rank_and_scales_by_the_worst():
    """Wins 2, 0.5, 0.5 of three: ranks 1, 2, 2; (2 - rank) / (2 - 1)."""
    scores = {(0, 1): (2, 1), (0, 2): (2, 1), (1, 2): (1, 1)}
    standing = asyncio.run(held(tournaments.round_robin, 3, lambda i, j: asyncio.sleep(0, scores[i, j])))
    assert standing.rewards == [1, 0, 0]


@pytest.mark.parametrize(("count", "rounds"), [(2, 1), (3, 2), (8, 3), (9, 4), (16, 4)])
def test_swiss_rounds_are_few_and_nobody_meets_twice(count, rounds):
    for seed in range(5):
        standing, met = played(tournaments.swiss, qualities(count, seed), seed=seed)
        assert standing.matches == rounds * (count // 2) == len({frozenset(pair) for pair in met})


def test_swiss_equals_share_the_mean_of_their_places():
    standing, _ = played(tournaments.swiss, [1, 1, 0, 0])
    assert sorted(standing.rewards) == pytest.approx([1 / 6, 1 / 6, 5 / 6, 5 / 6])


@pytest.mark.parametrize("count", [2, 3, 5, 8, 13])
def test_in_double_elimination_all_but_two_lose_twice(count):
    given = qualities(count)
    standing, met = played(tournaments.double_elimination, given)
    defeats = [min(pair, key=given.__getitem__) for pair in met]
    assert len(met) == 2 * count - 2
    lost = [defeats.count(member) for member in range(count)]
    assert sorted(lost) == [0, *[2] * (count - 1)]
    assert {lost.index(0)} == {given.index(max(given))} == {standing.rewards.index(1.0)}


@EVERY
def test_matches_of_a_round_run_together(name):
    running = most = 0

    async def match(i, j):
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0)
        running -= 1
        return float(i), float(j)

    asyncio.run(held(TOPOLOGIES[name], 8, match))
    assert most == {"single_elimination": 7, "anchor": 7, "round_robin": 28}.get(name, 4)


class Asked:
    """A judge that notes what it is asked, and prefers the longer one."""

    def __init__(self):
        self.calls = []

    async def both_orders(self, prompt, first, second, **known):
        self.calls.append((prompt, first, second, known))
        return 2 * len(first), 2 * len(second)


def test_the_reward_is_the_standing_with_points_and_matches():
    judge = Asked()
    reward = tournament(judge, "anchor", "Be long.")
    found = asyncio.run(reward("Why?", ["aa", "a", "aaaa"], "yes", {"n": 1}))
    assert [each["reward"] for each in found] == [0.5, 0, 1]
    assert [each["points"] for each in found] == [4, 2, 8] and {each["matches"] for each in found} == {2}
    known = {"rubric": "Be long.", "answer": "yes", "metadata": {"n": 1}}
    assert judge.calls == [("Why?", "a", "aa", known), ("Why?", "aaaa", "aa", known)]
