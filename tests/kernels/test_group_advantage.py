"""group_advantage against float64, ragged groups in any order, and the identities that an advantage owes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import check

from fuserl.kernels.group_advantage import BASELINES, SCALES, group_advantage

DEVICES = [pytest.param("cpu", "cpu"), pytest.param("cuda", "cuda", marks=pytest.mark.gpu)]


def by_hand(rewards, group, baseline, scale, ddof, eps, precision, weights=None):
    """The definition, one rollout at a time, in NumPy's `precision`."""
    r, group = rewards.numpy().astype(precision), group.numpy()
    w = np.ones_like(r) if weights is None else weights.numpy().astype(precision)
    out = np.empty_like(r)

    def moments(chosen):
        x, v = r[chosen & (w > 0)], w[chosen & (w > 0)]
        if not len(x):
            return None, 0.0, True
        mean, flat = (v * x).cumsum()[-1] / v.sum(), x.max() == x.min()  # one after the other, as a loop adds
        rest = v.sum() - ddof * (v * v).sum() / v.sum()
        return x[0] if flat else mean, 0.0 if flat else np.sqrt((v * (x - mean) ** 2).sum() / rest), flat

    for b in range(len(r)):
        own, batch = group == group[b], np.full(len(r), True)
        centre = {"mean": own, "leave_one_out": own, "batch_mean": batch}.get(baseline)
        centre = precision(baseline or 0) if centre is None else moments(centre)[0]
        above = precision(0) if centre is None else r[b] - centre
        if baseline == "leave_one_out" and not moments(own)[2]:
            above = r[b] - ((w * r)[own].cumsum()[-1] - w[b] * r[b]) / (w[own].sum() - w[b])
        _, std, flat = moments({"group": own, "batch": batch}.get(scale, own))
        if scale in ("group", "batch"):
            out[b] = 0.0 if flat else above / (std + precision(eps))
        else:
            out[b] = np.sign(above) if scale == "sign" else above / precision(scale or 1)
    return torch.from_numpy(out.astype(np.float64))


@pytest.mark.parametrize("device,backend", [*DEVICES, pytest.param("cpu", "reference")])
@pytest.mark.parametrize("scale", [*SCALES, 2.5])
@pytest.mark.parametrize("baseline", [*BASELINES, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_definition(baseline, scale, dtype, device, backend):
    sizes = [1, 2, 3, 16, 7, 1, 64]
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[torch.randperm(sum(sizes))]
    rewards = torch.randn(len(group), dtype=dtype) * 3 + 100
    rewards[group == 4] = 0.1
    weighted = torch.where(torch.rand(len(group)) < 0.2, 0.0, torch.rand(len(group)) + 0.1).to(dtype)
    for ddof, weights in ((0, None), (1, None), (0, weighted), (1, weighted)):
        truth = by_hand(rewards, group, baseline, scale, ddof, 1e-6, np.longdouble, weights)
        plain = by_hand(rewards, group, baseline, scale, ddof, 1e-6, rewards.numpy().dtype.type, weights)
        got = group_advantage(
            rewards.to(device), group.to(device), baseline=baseline, scale=scale, ddof=ddof, backend=backend,
            weights=None if weights is None else weights.to(device),
        ).cpu()  # fmt: skip
        check("advantage", got, truth, plain, dtype)
        if (baseline in ("mean", "leave_one_out") and weights is None) or scale == "group":
            assert (got[group == 4] == 0).all()


@pytest.mark.parametrize("device,backend", [*DEVICES, pytest.param("cpu", "reference")])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", None])
def test_rounds_channels_given_tensors_and_rows(baseline, device, backend):
    """Each is a simpler call: a group for each pair with its round, a channel alone, rows numbered."""
    rewards = torch.randn(24, 3, dtype=torch.float64, device=device)
    group, rounds = torch.arange(24, device=device) % 4, torch.randint(-1, 2, (24,), device=device) * 2**40
    options = {"baseline": baseline, "backend": backend}
    pairs = torch.stack([group, rounds]).unique(dim=1, return_inverse=True)[1]
    both = group_advantage(rewards[:, 0], group, rounds=rounds, **options)
    torch.testing.assert_close(both, group_advantage(rewards[:, 0], pairs, **options), rtol=0, atol=1e-14)

    each = group_advantage(rewards, group, **options)
    for c in range(3):
        assert torch.equal(each[:, c], group_advantage(rewards[:, c], group, **options))
    mix = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64, device=device)
    mixed = group_advantage(rewards, group, channel_weights=mix, **options)
    torch.testing.assert_close(mixed, each @ mix, rtol=0, atol=1e-13)

    rows = rewards.view(4, 6, 3)
    numbered = torch.arange(4, device=device).repeat_interleave(6)
    weights = torch.rand(4, 6, dtype=torch.float64, device=device)
    dense = group_advantage(rows, weights=weights, channel_weights=mix, **options)
    ragged = group_advantage(rewards, numbered, weights=weights.flatten(), channel_weights=mix, **options)
    assert dense.shape == (4, 6) and torch.equal(dense.flatten(), ragged)
    assert torch.equal(group_advantage(rows, **options).flatten(0, 1), group_advantage(rewards, numbered, **options))

    given = torch.rand(24, dtype=torch.float64, device=device) + 0.5
    got = group_advantage(rewards[:, 1], group, baseline=given, scale=given, backend=backend)
    assert torch.equal(got, (rewards[:, 1] - given) / given)


@pytest.mark.parametrize("device,backend", [*DEVICES, pytest.param("cpu", "reference")])
def test_weights_signs_and_rollouts_without_a_score(device, backend):
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 3.0, torch.nan], device=device)
    group = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2], device=device)
    options = {"scale": None, "backend": backend}
    scored = (~rewards.isnan()).float()
    got = group_advantage(rewards, group, weights=scored, **options)
    assert got.tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3, 0.5, -0.5, -1.5, 1.5, 0])
    twice = group_advantage(rewards[:3], group[:3], weights=torch.tensor([2.0, 1.0, 1.0], device=device), **options)
    assert twice.tolist() == pytest.approx([0.5, -0.5, -0.5])
    left_out = group_advantage(rewards[:3], group[:3], weights=torch.tensor([0.0, 1, 1], device=device), **options)
    assert left_out.tolist() == [1, 0, 0]  # measured by the others, who agree
    nobody = group_advantage(rewards[:3], group[:3], weights=torch.zeros(3, device=device), backend=backend)
    assert nobody.tolist() == [0, 0, 0]
    for keep, expected in (("positive", [1, 0, 0, 1, 0]), ("negative", [0, -1, -1, 0, -1]), (None, [1, -1, -1, 1, -1])):
        fixed = group_advantage(rewards[:5], group[:5], baseline=0.5, scale="sign", keep=keep, backend=backend)
        assert fixed.tolist() == expected
        some = group_advantage(rewards[:5], group[:5], keep=keep, backend=backend)
        every = group_advantage(rewards[:5], group[:5], backend=backend)
        assert torch.equal(some, torch.where(fixed == 0, 0, every))
    ones = torch.ones(5, device=device)
    assert torch.equal(every, group_advantage(rewards[:5], group[:5], weights=ones, backend=backend))
    assert torch.equal(every, group_advantage(rewards[:5], group[:5], weights=4 * ones, backend=backend))
    assert group_advantage(rewards, group, scale="sign", keep="positive", backend=backend)[5:].isnan().all()


@pytest.mark.parametrize("device,backend", DEVICES)
def test_no_spread_gives_exact_zeros_where_rounding_would_make_noise(device, backend):
    rewards = torch.full((30,), 0.1, device=device)  # 0.1 * 3 / 3 is not 0.1 in float32
    group = torch.arange(10, device=device).repeat(3)
    for baseline in ("mean", "leave_one_out"):
        for scale in SCALES:
            assert (group_advantage(rewards, group, baseline=baseline, scale=scale, backend=backend) == 0).all()
    assert torch.equal(group_advantage(rewards, group, baseline=None, scale=None, backend=backend), rewards)


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8), seed=st.integers(0, 999), factor=st.floats(0.5, 4))
def test_identities(sizes, seed, factor):
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    rewards = torch.randn(len(group), generator=generator, dtype=torch.float64)
    advantage = group_advantage(rewards, group, eps=0.0)
    zeros = torch.zeros(len(sizes), dtype=torch.float64)
    assert torch.allclose(zeros.index_add(0, group, advantage), zeros, atol=1e-12)
    order = torch.randperm(len(group), generator=generator)
    assert torch.allclose(group_advantage(rewards[order], group[order], eps=0.0), advantage[order], atol=1e-12)
    assert torch.allclose(group_advantage(rewards * factor + 3, group, eps=0.0), advantage, atol=1e-9)


def test_nan_stays_in_its_group():
    rewards, group = torch.tensor([1.0, torch.nan, 2.0, 4.0]), torch.tensor([0, 0, 3, 3])
    advantage = group_advantage(rewards, group)
    assert advantage[:2].isnan().all() and advantage[2:].isfinite().all()


def test_empty_and_bad_input():
    assert group_advantage(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    rewards, group = torch.ones(3), torch.tensor([0, 1, 3])
    with pytest.raises(ValueError, match=r"group.*3"):
        group_advantage(rewards, group)
    with pytest.raises(ValueError, match="rewards must be"):
        group_advantage(rewards.half(), group)
    with pytest.raises(ValueError, match="group must be"):
        group_advantage(rewards, group.int())
    with pytest.raises(ValueError, match="baseline must be one of"):
        group_advantage(rewards, group, baseline="median")
    for message, options in {
        "scale must be one of": {"scale": math.nan},
        "keep must be one of": {"keep": "both"},
        "weights must be": {"weights": torch.ones(2)},
        "weights must be at least 0": {"weights": -torch.ones(3)},
        "rounds must be": {"rounds": torch.ones(3)},
        "rewards must have a last": {"channel_weights": torch.ones(1)},
        "ddof must be": {"ddof": 2},
        "eps must be": {"eps": -1.0},
    }.items():
        with pytest.raises(ValueError, match=message):
            group_advantage(rewards, torch.zeros(3, dtype=torch.int64), **options)
    with pytest.raises(ValueError, match="group must be given"):
        group_advantage(rewards)
    with pytest.raises(ValueError, match="channel_weights must be"):
        group_advantage(torch.ones(3, 2), torch.zeros(3, dtype=torch.int64), channel_weights=torch.ones(3))


def test_opcheck_and_compile():
    rewards, group = torch.randn(6), torch.tensor([0, 0, 1, 1, 1, 5])
    rule = 0, 1, 1, 0, 0.0, 1.0, 1, 1e-6, None
    torch.library.opcheck(torch.ops.fuserl.group_advantage, (rewards, group, *[None] * 5, *rule))
    several = torch.randn(6, 2), group, group, torch.rand(6, 2), None, None, torch.randn(2)
    torch.library.opcheck(torch.ops.fuserl.group_advantage, (*several, *rule))
    compiled = torch.compile(lambda r, g: group_advantage(r * 2, g), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rewards, group), group_advantage(rewards * 2, group))
