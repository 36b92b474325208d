"""group_advantage against float64, ragged groups in any order, and the identities that an advantage owes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import check

from fuserl.kernels.group_advantage import BASELINES, SCALES, group_advantage

DEVICES = [pytest.param("cpu", "cpu"), pytest.param("cuda", "cuda", marks=pytest.mark.gpu)]


def by_hand(rewards, group, baseline, scale, ddof, eps, precision):
    """The definition, one rollout at a time, in NumPy's `precision`."""
    r, group = rewards.numpy().astype(precision), group.numpy()
    out = np.empty_like(r)
    for b in range(len(r)):
        members = r[group == group[b]]
        centre = {None: 0.0, "mean": members.mean(), "leave_one_out": 0.0}[baseline]
        if baseline == "leave_one_out" and len(members) > 1:
            centre = (members.sum() - r[b]) / (len(members) - 1)
        flat = members.max() == members.min() if baseline or scale == "group" else scale and r.max() == r.min()
        alone = len(members) == 1  # its spread is undefined, and not needed
        spread = {None: 1.0 - eps, "group": 0.0 if alone else members.std(ddof=ddof), "batch": r.std(ddof=ddof)}[scale]
        out[b] = 0.0 if flat else (r[b] - centre) / (spread + eps)
    return torch.from_numpy(out.astype(np.float64))


@pytest.mark.parametrize("device,backend", [*DEVICES, pytest.param("cpu", "reference")])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_definition(baseline, scale, dtype, device, backend):
    sizes = [1, 2, 3, 16, 7, 1, 64]
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[torch.randperm(sum(sizes))]
    rewards = torch.randn(len(group), dtype=dtype) * 3 + 100
    rewards[group == 4] = 0.1
    for ddof in (0, 1):
        truth = by_hand(rewards, group, baseline, scale, ddof, 1e-6, np.longdouble)
        plain = by_hand(rewards, group, baseline, scale, ddof, 1e-6, rewards.numpy().dtype)
        got = group_advantage(
            rewards.to(device), group.to(device), baseline=baseline, scale=scale, ddof=ddof, backend=backend
        ).cpu()
        check("advantage", got, truth, plain, dtype)
        if baseline or scale == "group":
            assert (got[group == 4] == 0).all()


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


def test_opcheck_and_compile():
    rewards, group = torch.randn(6), torch.tensor([0, 0, 1, 1, 1, 5])
    torch.library.opcheck(torch.ops.fuserl.group_advantage, (rewards, group, 1, 1, 1, 1e-6, None))
    compiled = torch.compile(lambda r, g: group_advantage(r * 2, g), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rewards, group), group_advantage(rewards * 2, group))
