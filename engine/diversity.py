"""How far the completions of one prompt differ, on their token ids: n-grams that they share, and edits between them."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence

Tokens = Sequence[int]
_NOTHING = 0.1  # stands for a count of 0 among n-grams, so that one order without a match does not decide alone


def self_bleu(samples: Sequence[Tokens], order: int = 3) -> float:
    """The mean BLEU of each sample with the others as references, 0 (nothing shared) to 1; 0 for a sample alone.

        BLEU = min(1, exp(1 - reference / length)) (prod_{n = 1..order} precision_n)^(1 / order)

    `reference` is the length nearest to the sample's own, the shorter one of two. A precision that is 0 counts 0.1
    n-grams in its place, except that of single tokens, without which BLEU is 0 (Chen and Cherry 2014, method 1).

    Args:
        samples: K sequences of token ids.
        order: of the longest n-grams; all up to it weigh the same.
    """
    if len(samples) < 2:
        return 0.0
    logs = [0.0] * len(samples)
    for n in range(1, order + 1):
        counts = [Counter(_grams(sample, n)) for sample in samples]
        most = defaultdict(lambda: [0, 0])  # the two largest counts of an n-gram in one sample
        for gram, count in itertools.chain.from_iterable(each.items() for each in counts):
            most[gram] = sorted([*most[gram], count])[1:]
        for i, own in enumerate(counts):
            shared = sum(min(count, most[gram][0 if count == most[gram][1] else 1]) for gram, count in own.items())
            matched = shared or (_NOTHING if n > 1 else 0.0)
            logs[i] += math.log(matched / max(1, own.total())) if matched else -math.inf
    return sum(_brevity(samples, i) * math.exp(total / order) for i, total in enumerate(logs)) / len(samples)


def distinct(samples: Sequence[Tokens], order: int = 3) -> float:
    """Different n-grams of the samples over all of theirs (distinct-n, Li et al. 2016), in [0, 1]; 0 without any."""
    grams = [gram for sample in samples for gram in _grams(sample, order)]
    return len({*grams}) / len(grams) if grams else 0.0


def edit_distance(first: Tokens, second: Tokens) -> int:
    """The fewest insertions, deletions and substitutions of one token that make `second` of `first` (Levenshtein)."""
    above = list(range(len(second) + 1))
    for row, token in enumerate(first, 1):
        here = [row]
        for column, other in enumerate(second, 1):
            here.append(min(above[column] + 1, here[-1] + 1, above[column - 1] + (token != other)))
        above = here
    return above[-1]


def squared_edits(samples: Sequence[Tokens]) -> float:
    """The mean over ordered pairs of d^2, d the edit distance over the longer one's length, in [0, 1]; 0 for one alone.

    1 / (K (K - 1)) sum_{i != j} d[i, j]^2. Cost: K^2 products of two lengths, equal samples compared once.
    """
    kinds = Counter(map(tuple, samples))
    pairs = itertools.combinations(kinds.items(), 2)
    total = sum(2 * m * n * (edit_distance(a, b) / max(len(a), len(b))) ** 2 for (a, m), (b, n) in pairs)
    return total / (len(samples) * (len(samples) - 1)) if len(samples) > 1 else 0.0


METRICS = {
    "self_bleu": lambda samples: 1 - self_bleu(samples),
    "distinct": distinct,
    "edit_distance": squared_edits,
    "similarity": self_bleu,
}


def _grams(sample: Tokens, n: int) -> list[tuple]:
    return list(zip(*(sample[at:] for at in range(n)), strict=False))


def _brevity(samples: Sequence[Tokens], i: int) -> float:
    length = len(samples[i])
    others = (len(sample) for j, sample in enumerate(samples) if j != i)
    nearest = min(others, key=lambda other: (abs(other - length), other))
    return 1.0 if length > nearest else math.exp(1 - nearest / length) if length else 0.0
