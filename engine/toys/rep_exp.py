"""Responses in clusters of very different sizes: how many must be looked at until every cluster was seen."""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.engine import elliptical
from fuserl.engine.checks import Figure, at_least, at_most
from fuserl.engine.novelty import ALIKE

POINTS, CLUSTERS, DIMENSIONS = 2000, 20, 32


def clusters(seed: int) -> tuple[Tensor, Tensor]:
    """Features (2000, 32) float64 around 20 centres, and which one each is of: cluster r has a share as r^-1.5."""
    random = torch.Generator().manual_seed(seed)
    share = torch.arange(1, CLUSTERS + 1, dtype=torch.float64) ** -1.5
    sizes = (share / share.sum() * POINTS).floor().clamp(min=1).long()
    sizes[0] += POINTS - sizes.sum()
    member = torch.arange(CLUSTERS).repeat_interleave(sizes)[torch.randperm(POINTS, generator=random)]
    centres = torch.randn(CLUSTERS, DIMENSIONS, generator=random, dtype=torch.float64)
    noise = torch.randn(POINTS, DIMENSIONS, generator=random, dtype=torch.float64)
    return centres[member] + 0.1 * noise, member


def looked_at(order: list[int], member: Tensor) -> int:
    """How many of the first of an order it takes to have seen every cluster."""
    first = torch.full((CLUSTERS,), len(order) + 1).scatter_reduce(
        0, member[order], torch.arange(1, len(order) + 1), "amin"
    )
    return int(first.max())


def until_all(seed: int, lamb: float) -> tuple[int, int]:
    """The same by elliptical picks, and in the order that the responses came in, which is random."""
    h, member = clusters(seed)
    return looked_at(elliptical.coreset(h, 200, lamb), member), looked_at(list(range(POINTS)), member)


def leverages(k: int, lamb: float = 0.01) -> dict[str, float]:
    """What there is to know of the leverages of 8 responses with features of k dimensions.

    Returns:
        Their "sum"; "by_singular_values", what it is where s are those of the centred features, the sum of
        s^2 / (s^2 + lamb); how far they are, at most, after one was left out by the formula from one solved by itself,
        when reordered and when rotated; that of a response there "twice" over its own alone; and their "spread".
    """
    random = torch.Generator().manual_seed(0)
    h = torch.randn(8, k, generator=random, dtype=torch.float64)
    order, turn = torch.randperm(8, generator=random), torch.linalg.qr(torch.randn(k, k, generator=random).double())[0]
    b, centred = elliptical.leverages(h, lamb), h - h.mean(0)
    squares = torch.linalg.svdvals(centred).square()
    whole = lamb * torch.eye(k, dtype=torch.float64) + centred.T @ centred
    solved = torch.stack([each @ torch.linalg.solve(whole - torch.outer(each, each), each) for each in centred])
    found = {
        "sum": b.sum(),
        "by_singular_values": (squares / (squares + lamb)).sum(),
        "left_out_apart": ((elliptical.left_out(b) - solved) / solved).abs().max(),
        "reordered_apart": (elliptical.leverages(h[order], lamb) - b[order]).abs().max(),
        "rotated_apart": (elliptical.leverages(h @ turn, lamb) - b).abs().max(),
        "twice": elliptical.leverages(torch.cat([h, h[:1]]), lamb)[0] / b[0],
        "spread": b.max() - b.min(),
    }
    return {name: float(x) for name, x in found.items()}


def figures() -> list[Figure]:
    """Identities of the leverages, what they do not depend on, clusters seen by elliptical picks, and the caution."""
    counts = torch.tensor([until_all(seed, 0.01) for seed in range(50)]).double().median(0).values
    few, many = leverages(4), leverages(32)  # dimensions of 8 responses
    return [
        Figure("sum of b apart from that of s^2 / (s^2 + lamb)", few["sum"] - few["by_singular_values"], 0, 1e-9),
        Figure("b / (1 - b) apart from the bonus left out", few["left_out_apart"], 0, 1e-9),
        Figure("b of responses in another order, apart", few["reordered_apart"], 0, 1e-9),
        Figure("b of rotated features, apart", few["rotated_apart"], 0, 1e-9),
        at_most("b of a response that is there twice, over that of it alone", few["twice"], 1 - 1e-9),
        at_most("median picks until 20 clusters were seen", float(counts[0]), 80),
        at_least("the same in random order", float(counts[1]), 80),
        at_least("sum of b where n <= k and lamb is small, of at most 7", many["sum"], 6.99),
        at_most("their spread, of which the warning speaks", many["spread"], ALIKE),
    ]
