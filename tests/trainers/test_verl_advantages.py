"""Advantages and returns beside verl's loops, on batches of any groups and masks, both against verl's in float64."""

import importlib
import uuid

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rivals import VerlConfig, verl_losses
from tolerance import check

core = verl_losses()
module = importlib.import_module("fuserl.trainers.verl_advantages")
GROUPED = ["grpo", "rloo", "opo", "gpg", "grpo_passk", "reinforce_plus_plus_baseline"]
CONFIG = VerlConfig(gamma=0.97, norm_adv_by_std_in_grpo=True)


class Batch:
    """Rewards of ragged samples by token, some of them a tool's, in groups of unequal size, in any order."""

    def __init__(self, count=24, length=17, groups=7, lone=True):
        group = torch.randint(groups, (count,))
        if lone:
            group[0] = groups
        else:
            group[: 2 * groups] = torch.arange(2 * groups) // 2
        group = group[torch.randperm(count)]
        names = np.array([str(uuid.UUID(int=n * 7919)) for n in range(groups + 1)], dtype=object)
        self.index = names[group.numpy()]
        lengths = torch.randint(1, length + 1, (count,))
        self.mask = ((torch.arange(length) < lengths[:, None]) & (torch.rand(count, length) < 0.9)).float()
        self.mask[:, 0] = 1.0
        last = torch.arange(length) == lengths[:, None] - 1
        self.rewards = torch.where(last, torch.randn(count, 1), 0.01 * torch.randn(count, length) * self.mask)
        self.values = torch.randn(count, length)


def theirs(name):
    """verl's own function, whatever is patched."""
    drop_in = importlib.import_module("fuserl.trainers.verl")
    drop_in.unpatch()
    return core.get_adv_estimator_fn(name)


def compare(function, other, mask, *leaves):
    """Ours at most twice as far from float64 as theirs, and 0 where the mask is."""
    names = "advantages", "returns"
    plain, got = other(*(x.clone() for x in leaves)), function(*(x.clone() for x in leaves))
    true = other(*(x.double() for x in leaves))
    for name, a, b, c in zip(names, got, true, plain, strict=True):
        assert a.dtype == c.dtype and not a.requires_grad
        b, c = (torch.where(mask.bool(), x, 0.0) for x in (b, c))
        torch.testing.assert_close(c.double(), b.double(), rtol=1e-4, atol=1e-4)
        check(name, a, b, c, torch.float32)


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("normalised", [True, False])
def test_of_groups(name, normalised):
    batch, settings = Batch(lone=name != "grpo_passk"), VerlConfig(norm_adv_by_std_in_grpo=normalised)
    option = {"norm_adv_by_std_in_grpo": normalised} if name == "grpo" else {}
    given = {"index": batch.index, "config": settings}
    other, ours = theirs(name), module.ESTIMATORS[f"fuserl_{name}"]
    compare(
        lambda x: ours(x, batch.mask, **given), lambda x: other(x, batch.mask.to(x.dtype), **given, **option),
        batch.mask, batch.rewards,
    )  # fmt: skip


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from(GROUPED), st.integers(14, 60), st.integers(1, 40), st.integers(1, 7))
def test_random_batches(seed, name, count, length, groups):
    torch.manual_seed(seed)
    batch = Batch(count, length, groups, lone=name != "grpo_passk")
    other, ours = theirs(name), module.ESTIMATORS[f"fuserl_{name}"]
    given = {"index": batch.index, "config": CONFIG}
    compare(
        lambda x: ours(x, batch.mask, **given), lambda x: other(x, batch.mask.to(x.dtype), **given),
        batch.mask, batch.rewards,
    )  # fmt: skip


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (1, 0)])
@pytest.mark.parametrize("length", [1, 2, 17, 130])
def test_gae(gamma, lam, length):
    batch = Batch(length=length)
    other = theirs("gae")
    compare(
        lambda *x: module.gae_advantage(*x, batch.mask, gamma, lam),
        lambda *x: other(*x, batch.mask.to(x[0].dtype), gamma, lam), batch.mask, batch.rewards, batch.values,
    )  # fmt: skip


def test_reinforce_plus_plus():
    batch, other = Batch(), theirs("reinforce_plus_plus")
    compare(
        lambda x: module.reinforce_plus_plus(x, batch.mask, config=CONFIG, index=batch.index),
        lambda x: other(x, batch.mask.to(x.dtype), config=CONFIG, index=batch.index), batch.mask, batch.rewards,
    )  # fmt: skip


def test_a_group_without_spread_has_zeros():
    """verl divides what the mean was rounded by through epsilon."""
    rewards, mask, index = torch.full((16, 1), 0.7), torch.ones(16, 1), np.array(["a"] * 16, dtype=object)
    assert theirs("grpo")(rewards.clone(), mask, index)[0].abs().max() > 1e-3
    assert not module.grpo(rewards, mask, index)[0].any()


@pytest.mark.parametrize("index", [
    [3, 1, 3, 1], np.array([7, 2, 7, 2]), torch.tensor([4, 0, 4, 0]), np.array(["b", "a", "b", "a"]),
    np.array(["b", 1, "b", 1], dtype=object),
])  # fmt: skip
def test_labels_of_any_kind(index):
    rewards = torch.tensor([[1.0], [2.0], [3.0], [6.0]])
    found = module.rloo(rewards, torch.ones(4, 1), index)[0]
    assert found.flatten().tolist() == [-2.0, -4.0, 2.0, 4.0]


def test_rewards_and_inputs_are_left_as_they_were():
    batch = Batch()
    before = batch.rewards.clone(), batch.values.clone()
    module.grpo(batch.rewards, batch.mask, batch.index)
    module.gae_advantage(batch.rewards, batch.values, batch.mask, 1.0, 0.9)
    assert torch.equal(batch.rewards, before[0]) and torch.equal(batch.values, before[1])


def test_refusals():
    batch = Batch()
    with pytest.raises(ValueError, match=r"index must have a label per sample, \(24,\); got \(3,\)"):
        module.grpo(batch.rewards, batch.mask, batch.index[:3])
    with pytest.raises(ValueError, match="every group must have at least 2 samples"):
        module.grpo_passk(batch.rewards, batch.mask, batch.index, config=CONFIG)
    with pytest.raises(ValueError, match=r"alpha must be 1\.0"):
        module.gpg(batch.rewards, batch.mask, batch.index, alpha=2.0)
    with pytest.raises(ValueError, match=r"response_mask must have at least 2 tokens .*; got 0"):
        module.gae_advantage(batch.rewards, batch.values, torch.zeros_like(batch.mask), 1.0, 0.9)
