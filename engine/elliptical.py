"""How novel each of several responses is among the others, by their features: elliptical bonuses (arXiv:2510.11686).

    b[i] = h[i]^T C^-1 h[i]          C = lamb I + sum_i h[i] h[i]^T, h centred: the leverage of i, in [0, 1)
    b[i] / (1 - b[i])                the same where C leaves i itself out

All in float64. C^-1 is built one response at a time (Sherman and Morrison 1950).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fuserl.engine.contracts import require


def sparse_projection(dimensions: int, k: int, *, seed: int) -> Tensor:
    """A random matrix (dimensions, k), float64, that keeps distances on average, 1 / sqrt(dimensions) of it not 0.

    Entries are +-sqrt(sqrt(dimensions) / k), each with chance 1 / (2 sqrt(dimensions)), else 0 (Li et al. 2006).
    """
    require("sparse_projection", "k", k, k >= 1, "an integer >= 1")
    random, density = torch.Generator().manual_seed(seed), dimensions**-0.5
    drawn = torch.rand(dimensions, k, generator=random, dtype=torch.float64)
    signs = (drawn < density / 2).double() - (drawn > 1 - density / 2).double()
    return signs / math.sqrt(density * k)


def leverages(h: Tensor, lamb: float) -> Tensor:
    """h[i]^T (lamb I + sum_j h[j] h[j]^T)^-1 h[i] of features (n, k) centred here, (n,) float64; their sum is below n.

    Args:
        h: features of the responses to one prompt.
        lamb: ridge, > 0; far below the features' own spread all leverages go to (n - 1) / n where n <= k.
    """
    return Covariance(h.shape[1], lamb).joined(h)


def left_out(b: Tensor) -> Tensor:
    """h[i]^T (C - h[i] h[i]^T)^-1 h[i] out of leverages b (n,): b / (1 - b)."""
    return b / (1 - b)


class Covariance:
    """The inverse of lamb I + sum (h - mean) (h - mean)^T over all features seen, mean the running one.

    Memory: k^2 + k numbers.

    Args:
        k: dimensions.
        lamb: ridge, > 0.
    """

    def __init__(self, k: int, lamb: float):
        require("Covariance", "lamb", lamb, 0 < lamb < math.inf, "a finite number > 0")
        self.count, self.mean = 0, torch.zeros(k, dtype=torch.float64)
        self.inverse = torch.eye(k, dtype=torch.float64) / lamb

    def joined(self, h: Tensor) -> Tensor:
        """Add features (n, k) and return their leverages among all that were ever added, (n,) float64.

        Both sums about their own means make that about the common one with one term more, n m / (n + m) d d^T, d the
        difference of the means (Chan et al. 1979): a later step's mean corrects the earlier ones.
        """
        h = h.double()
        mean, n = h.mean(0), len(h)
        apart = (mean - self.mean) * math.sqrt(self.count * n / (self.count + n))
        for each in (*(h - mean), apart):
            ahead = self.inverse @ each
            self.inverse = self.inverse - torch.outer(ahead, ahead) / (1 + each @ ahead)
        self.mean = (self.count * self.mean + n * mean) / (self.count + n)
        self.count += n
        centred = h - self.mean
        return ((centred @ self.inverse) * centred).sum(-1)


class Covariances:
    """A covariance of each prompt, by name, which lasts over the steps.

    Memory: (k^2 + k) numbers for each prompt that was ever answered.
    """

    def __init__(self, k: int, lamb: float):
        self.k, self.lamb, self.known = k, lamb, {}

    def of(self, name: str) -> Covariance:
        """That of a prompt, empty at first."""
        return self.known.setdefault(name, Covariance(self.k, self.lamb))

    def state_dict(self) -> dict:
        """All of them."""
        if not self.known:
            return {}
        every = self.known.values()
        return {
            "names": list(self.known),
            "counts": [each.count for each in every],
            "means": torch.stack([each.mean for each in every]),
            "inverses": torch.stack([each.inverse for each in every]),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on with those of a `state_dict`."""
        self.known = {}
        for at, name in enumerate(state.get("names", [])):
            each = self.of(name)
            each.count, each.mean = state["counts"][at], state["means"][at].clone()
            each.inverse = state["inverses"][at].clone()


def coreset(h: Tensor, size: int, lamb: float) -> list[int]:
    """The order in which `size` of N responses are picked, each the one of the largest bonus among those left.

        A = I / lamb; repeat: i = argmax h[i]^T A h[i], A -= (A h[i]) (A h[i])^T / (1 + h[i]^T A h[i])

    Args:
        h: (N, k) features, centred here.
        size: at most N.
        lamb: ridge, > 0.

    Returns:
        Indices in the order of the picks; of equal bonuses the first. Cost: size N k.
    """
    require("coreset", "size", size, 0 <= size <= len(h), f"an integer in [0, {len(h)}]")
    require("coreset", "lamb", lamb, 0 < lamb < math.inf, "a finite number > 0")
    h = h.double() - h.double().mean(0)
    inverse = torch.eye(h.shape[1], dtype=torch.float64) / lamb
    bonus, picked = h.square().sum(-1) / lamb, []
    left = torch.ones(len(h), dtype=torch.bool)
    for _ in range(size):
        picked.append(int(torch.where(left, bonus, -math.inf).argmax()))
        left[picked[-1]] = False
        ahead = inverse @ h[picked[-1]]
        scale = 1 + h[picked[-1]] @ ahead
        inverse = inverse - torch.outer(ahead, ahead) / scale
        bonus = bonus - (h @ ahead).square() / scale
    return picked
