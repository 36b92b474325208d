"""Credit in games: against double loops in float64, option by option."""

import pytest
import torch
from batches import ragged

from fuserl.engine.opponent_shaping import (
    aligned,
    annealed,
    credits,
    returns,
    round_advantages,
    shaping_weights,
    views,
)


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def discounted(rewards, gamma):
    rounds = rewards.shape[1]
    found = torch.zeros_like(rewards)
    for t in range(rounds):
        found[:, t] = sum(gamma ** (s - t) * rewards[:, s] for s in range(t, rounds))
    return found


def weights(a, gamma, now):
    found = torch.zeros_like(a)
    for t in range(a.shape[1]):
        past = range(t + 1) if now else range(t)
        found[:, t] = (1 if now else gamma) * sum(gamma ** (t - k) * a[:, k] for k in past)
    return found


def left_out(x, group):
    found = torch.zeros_like(x)
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i and group[j] == group[i]]
        found[i] = x[i] - x[others].mean(0)
    return found


GROUP = torch.tensor([0, 1, 0, 1, 1, 0])


def test_returns_and_their_baseline_of_the_same_round():
    x = values(6, 5)
    torch.testing.assert_close(returns(x, 0.9), discounted(x, 0.9), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(round_advantages(x, GROUP), left_out(x, GROUP), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("now", [False, True])
def test_weights_are_those_of_a_double_loop(now):
    a = values(4, 7)
    plain = weights(a, 0.9, now)
    torch.testing.assert_close(shaping_weights(a, 0.9, now=now), plain, rtol=1e-10, atol=1e-10)
    time = torch.arange(1, 8, dtype=torch.float64)
    for options, expected in (
        ({"sign": True}, plain.sign()),
        ({"clip": 0.5}, plain.clamp(-0.5, 0.5)),
        ({"over_time": True}, plain / time),
        ({"sign": True, "over_time": True}, plain.sign() / time),
    ):
        torch.testing.assert_close(shaping_weights(a, 0.9, now=now, **options), expected, rtol=1e-10, atol=1e-10)


def test_credit_adds_what_the_other_gains():
    own, other = values(6, 5), values(6, 5, seed=1)
    a1, a2 = (left_out(discounted(x, 0.9), GROUP) for x in (own, other))
    got = credits(own, other, GROUP, gamma=0.9, shaping=0.5)
    torch.testing.assert_close(got, a1 + 0.5 * weights(a1, 0.9, False) * a2, rtol=1e-10, atol=1e-10)
    tried = values(6, 5, 3, seed=2)
    mean = left_out(torch.cat([discounted(own, 0.9)[..., None], tried], -1).mean(-1), GROUP)
    got = credits(own, other, GROUP, gamma=0.9, shaping=0.5, alternatives=tried)
    torch.testing.assert_close(got, a1 + 0.5 * weights(mean, 0.9, False) * a2, rtol=1e-10, atol=1e-10)


def test_annealing():
    found = [annealed(2.0, step, every=10, rate=0.5, least=0.3) for step in (1, 10, 11, 25, 90)]
    assert found == [2.0, 2.0, 1.0, 0.5, 0.3]
    assert annealed(0.1, 50, every=10, rate=0.5, least=0.3) == 0.1  # nothing rises
    assert annealed(0.5, 50, every=0, rate=0.5, least=0.1) == 0.5
    with pytest.raises(ValueError, match="rate must be"):
        annealed(1.0, 1, every=1, rate=2.0, least=0.0)


def turns(own, other, order):
    """The batch of two starts, two matches each, both agents, a turn a round, in some order."""
    seats = [(m // 2, m, a, t) for m in range(4) for a in (0, 1) for t in range(3)]
    seat = torch.tensor([seats[at] for at in order])
    rows = seat[:, 1] * 2 + seat[:, 2]
    batch = ragged((1, 2) * 12, range(24))
    return batch.replace(
        rewards=own[rows, seat[:, 3]].float(), facts={"seat": seat, "other": other[rows, seat[:, 3]][:, None].float()}
    )


def test_a_batch_of_turns_in_any_order_has_the_credit_of_its_rounds():
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    own = values(8, 3)
    other = own.view(4, 2, 3).flip(1).reshape(8, 3)
    batch = turns(own, other, order)
    group = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])
    expected = credits(own / 5, other / 5, group, gamma=0.9, shaping=1.0)
    seat = batch.facts["seat"]
    got = aligned(gamma=0.9, shaping=1.0, scale=5.0)(batch)
    torch.testing.assert_close(got.double(), expected[seat[:, 1] * 2 + seat[:, 2], seat[:, 3]], rtol=1e-4, atol=1e-5)
    summed = views(batch, 5.0, summed=True)[0]
    torch.testing.assert_close(summed.double(), (own + other) / 5, rtol=1e-5, atol=1e-6)
    again = batch.replace(step=21)
    halved = aligned(gamma=0.9, shaping=1.0, scale=5.0, anneal=(10, 0.5, 0.1))(again)
    torch.testing.assert_close(halved, aligned(gamma=0.9, shaping=0.25, scale=5.0)(batch))
    more = again.replace(facts=batch.facts | {"alternatives": torch.randn(24, 2)})
    assert views(more, 5.0)[5].shape == (8, 3, 2)
    assert not torch.allclose(aligned(gamma=0.9, shaping=1.0, scale=5.0)(more), got)


@pytest.mark.parametrize(("name", "value"), [("gamma", 1.5), ("shaping", -1.0), ("scale", 0.0), ("clip", 0.0)])
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"aligned: {name} must be"):
        aligned(**{"gamma": 0.9, "shaping": 1.0, "scale": 1.0, name: value})
