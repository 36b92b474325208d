"""Diversity of token ids: BLEU and edit distances as their definitions say, in other words than the code's."""

import functools
import itertools
import math
import random

import pytest

from fuserl.engine import diversity


def bleu(sample, others, order=3):
    """Sentence BLEU by its definition, n-gram by n-gram."""
    logs = 0.0
    for n in range(1, order + 1):
        grams = [tuple(sample[i : i + n]) for i in range(len(sample) - n + 1)]
        seen = [[tuple(other[i : i + n]) for i in range(len(other) - n + 1)] for other in others]
        shared = sum(min(grams.count(gram), max(each.count(gram) for each in seen)) for gram in {*grams})
        if not shared and n == 1:
            return 0.0
        logs += math.log((shared or 0.1) / max(1, len(grams))) / order
    length = sorted(map(len, others), key=lambda other: (abs(other - len(sample)), other))[0]
    return math.exp(logs + min(0.0, 1 - length / len(sample)))


@pytest.mark.parametrize("seed", range(5))
def test_self_bleu_is_the_mean_of_each_ones(seed):
    draw = random.Random(seed)
    samples = [[draw.randrange(4) for _ in range(draw.randrange(1, 9))] for _ in range(6)]
    expected = [bleu(each, samples[:i] + samples[i + 1 :]) for i, each in enumerate(samples)]
    assert diversity.self_bleu(samples) == pytest.approx(sum(expected) / 6, rel=1e-12)


def test_equal_samples_differ_in_nothing_and_strangers_in_all():
    same, apart = [[1, 2, 3, 4]] * 3, [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert diversity.self_bleu(same) == pytest.approx(1) and diversity.self_bleu(apart) == 0
    assert diversity.squared_edits(same) == 0 and diversity.squared_edits(apart) == 1
    assert diversity.distinct(same) == pytest.approx(1 / 3) and diversity.distinct(apart) == 1
    assert diversity.METRICS["self_bleu"](same) == pytest.approx(0) and diversity.METRICS["similarity"](apart) == 0


def test_one_alone_and_nothing():
    for metric in (diversity.self_bleu, diversity.squared_edits):
        assert metric([[1, 2, 3]]) == 0
    assert diversity.distinct([[1], []]) == 0 and diversity.self_bleu([[], [1]]) == 0
    assert diversity.squared_edits([[], [1]]) == 1


@pytest.mark.parametrize("seed", range(5))
def test_edits_are_those_of_the_recursion(seed):
    draw = random.Random(seed)
    samples = [tuple(draw.randrange(3) for _ in range(draw.randrange(1, 7))) for _ in range(4)]

    @functools.cache
    def edits(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))

    pairs = list(itertools.permutations(samples, 2))
    assert all(diversity.edit_distance(a, b) == edits(a, b) for a, b in pairs)
    squares = [(edits(a, b) / max(len(a), len(b))) ** 2 for a, b in pairs]
    assert diversity.squared_edits(samples) == pytest.approx(sum(squares) / 12, rel=1e-12)
