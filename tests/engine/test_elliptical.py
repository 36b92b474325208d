"""Elliptical bonuses: against plain inverses in float64, over steps, and as an order of picks."""

import pytest
import torch

from fuserl.engine import elliptical
from fuserl.engine.elliptical import Covariances


def features(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(h, lamb, among=None):
    """Leverages of h among all features given, by one inverse."""
    among = h if among is None else among
    centred = among - among.mean(0)
    inverse = torch.linalg.inv(lamb * torch.eye(h.shape[1], dtype=torch.float64) + centred.T @ centred)
    return torch.stack([each @ inverse @ each for each in h - among.mean(0)])


@pytest.mark.parametrize(("n", "k"), [(1, 3), (2, 5), (8, 4), (8, 32)])
def test_leverages_are_those_of_the_inverse(n, k):
    h = features(n, k) + 3.0  # a mean that must not count
    torch.testing.assert_close(elliptical.leverages(h, 0.1), plain(h, 0.1), rtol=1e-9, atol=1e-12)


def test_a_lasting_covariance_is_that_of_all_that_was_ever_seen():
    kept = Covariances(4, 0.1)
    first, second, third = features(5, 4, 0), features(3, 4, 1) + 2.0, features(4, 4, 2) - 1.0
    for new, every in ((first, [first]), (second, [first, second])):
        got = kept.of("a").joined(new)
        torch.testing.assert_close(got, plain(new, 0.1, torch.cat(every)), rtol=1e-9, atol=1e-12)
    kept.of("b").joined(third)
    other = Covariances(4, 0.1)
    other.load_state_dict(kept.state_dict())
    expected = plain(third, 0.1, torch.cat([first, second, third]))
    torch.testing.assert_close(other.of("a").joined(third), expected, rtol=1e-9, atol=1e-12)
    assert list(other.known) == ["a", "b"] and Covariances(4, 0.1).state_dict() == {}
    other.load_state_dict({})
    assert not other.known


def test_picks_are_the_largest_bonus_each_time():
    h = features(12, 3)
    centred, left, order = h - h.mean(0), [*range(12)], []
    precision = 0.1 * torch.eye(3, dtype=torch.float64)
    for _ in range(12):
        inverse = torch.linalg.inv(precision)
        order.append(max(left, key=lambda i: float(centred[i] @ inverse @ centred[i])))
        left.remove(order[-1])
        precision += torch.outer(centred[order[-1]], centred[order[-1]])
    assert elliptical.coreset(h, 12, 0.1) == order and elliptical.coreset(h, 5, 0.1) == order[:5]
    with pytest.raises(ValueError, match=r"coreset: size must be an integer in \[0, 12\]; got 13"):
        elliptical.coreset(h, 13, 0.1)


def test_a_projection_is_sparse_and_keeps_lengths_on_average():
    s = elliptical.sparse_projection(400, 64, seed=3)
    assert s.shape == (400, 64) and torch.equal(s, elliptical.sparse_projection(400, 64, seed=3))
    assert not torch.equal(s, elliptical.sparse_projection(400, 64, seed=4))
    # A share of 1/20 of 25600: four standard errors are 0.0055.
    assert abs(float((s != 0).double().mean()) - 1 / 20) < 0.0055
    assert s.abs().max() == pytest.approx((20 / 64) ** 0.5)
    h = features(200, 400)
    kept = ((h @ s).square().sum(1) / h.square().sum(1)).mean()
    assert abs(float(kept) - 1) < 0.11  # four standard errors again: of how many entries there are
    with pytest.raises(ValueError, match="k must be"):
        elliptical.sparse_projection(4, 0, seed=0)


@pytest.mark.parametrize("lamb", [0.0, float("inf")])
def test_the_ridge_must_be_positive(lamb):
    with pytest.raises(ValueError, match="Covariance: lamb must be a finite number > 0"):
        elliptical.leverages(features(2, 2), lamb)
    with pytest.raises(ValueError, match="coreset: lamb must be a finite number > 0"):
        elliptical.coreset(features(2, 2), 1, lamb)
