"""The same advantages as TRL and verl, whose functions take equal groups, or loop: both against ours in float64."""

import importlib.util
import sys
import types

import pytest
import torch
from rivals import rival

from fuserl.kernels.group_advantage import group_advantage
from fuserl.kernels.pass_at_k_advantage import pass_at_k_advantage

G, K, T = 6, 8, 5


@pytest.fixture
def verl(monkeypatch):
    """verl's core_algos, what only its configuration and its launcher need left out."""
    functional, groupwise = (rival("verl", f"verl.utils.{name}") for name in ("torch_functional", "groupwise"))
    wanted = {
        "omegaconf": ["DictConfig"],
        "verl.trainer": [],
        "verl.trainer.config": ["AlgoConfig"],
        "verl.workers": [],
        "verl.workers.config": ["ActorConfig"],
    }
    for name, classes in wanted.items():
        module = types.ModuleType(name)
        vars(module).update({each: type(each, (), {}) for each in classes})
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("as_torch_index", "group_mean_std"):
        monkeypatch.setattr(sys.modules["verl.utils"], name, getattr(groupwise, name), raising=False)
    (folder,) = {path.removesuffix("/utils") for path in sys.modules["verl.utils"].__path__}
    spec = importlib.util.spec_from_file_location("verl_core_algos", f"{folder}/trainer/ppo/core_algos.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "verl_core_algos", module)
    spec.loader.exec_module(module)
    assert functional
    return module


def case():
    """Rewards, groups in any order, and rewards and mask by token as verl takes them."""
    rewards, group = torch.randn(G * K), torch.arange(G).repeat_interleave(K)[torch.randperm(G * K)]
    lengths = torch.randint(1, T + 1, (G * K,))
    mask = (torch.arange(T) < lengths[:, None]).float()
    return rewards, group, torch.where(torch.arange(T) == lengths[:, None] - 1, rewards[:, None], 0.0), mask


def close(theirs, ours):
    torch.testing.assert_close(theirs.double(), ours.double(), rtol=1e-5, atol=2e-6)


def test_verl_within_groups(verl):
    rewards, group, by_token, mask = case()
    index = group.numpy()
    config = {"norm_adv_by_std_in_grpo": True}
    forms = {
        "grpo": group_advantage(rewards, group),
        "grpo_vectorized": group_advantage(rewards, group),
        "rloo": group_advantage(rewards, group, baseline="leave_one_out", scale=None),
        "rloo_vectorized": group_advantage(rewards, group, baseline="leave_one_out", scale=None),
        "opo": group_advantage(rewards, group, scale=None, weights=mask.sum(1)),
        "gpg": group_advantage(rewards, group, scale=None),
        "grpo_passk": pass_at_k_advantage(rewards, group, K, baseline="rest", scale="group"),
    }
    for name, ours in forms.items():
        found = verl.get_adv_estimator_fn(name)(by_token.clone(), mask, index=index, config=config)[0]
        close(found, ours[:, None] * mask)
    given = torch.randn(G * K)
    first = verl.get_adv_estimator_fn("remax")(by_token.clone(), given, mask)[0][:, 0]
    close(first, group_advantage(rewards, group, baseline=given, scale=None))


def test_verl_over_the_tokens_of_the_batch(verl):
    rewards, group, by_token, mask = case()
    for name, ours in (
        ("reinforce_plus_plus_baseline", group_advantage(rewards, group, scale=None)),
        ("gdpo", group_advantage(rewards, group)),
    ):
        found = verl.get_adv_estimator_fn(name)(by_token.clone(), mask, index=group.numpy())[0]
        every = ours.repeat_interleave(mask.sum(1).long())  # of each token: length weighs the batch's statistics
        close(found[mask > 0], group_advantage(every[None], baseline="mean", scale="group", eps=0.0)[0])


def trl_rewards(functions, rewards, weights, how):
    """GRPOTrainer's lines, with its nanstd; rewards (G * K, C), NaN where not scored."""
    unscored = rewards.isnan().all(1)
    if how == "normalize_then_sum":
        grouped = rewards.view(-1, K, rewards.shape[1])
        apart = (grouped - grouped.nanmean(1, keepdim=True)) / (functions.nanstd(grouped, dim=1, keepdim=True) + 1e-4)
        total = (apart.view_as(rewards) * weights).nansum(1).masked_fill(unscored, torch.nan)
        return ((total - total.nanmean()) / (functions.nanstd(total) + 1e-4)).nan_to_num(0.0)
    total = (rewards * weights).nansum(1).masked_fill(unscored, torch.nan)
    rows = total.view(-1, K)
    std = functions.nanstd(rows, dim=1, keepdim=True) if how == "group" else functions.nanstd(total)
    return ((rows - rows.nanmean(1, keepdim=True)) / (1 if how == "none" else std + 1e-4)).nan_to_num(0.0).view(-1)


@pytest.mark.parametrize("missing", [False, True])
def test_trl(missing):
    functions = rival("trl", "trl.trainer.utils")
    rewards, weights = torch.randn(G * K, 2), torch.tensor([1.0, 0.3])
    if missing:
        rewards[3] = torch.nan
        rewards[9] = torch.nan
    group, scored = torch.arange(G).repeat_interleave(K), (~rewards.isnan()).float()
    total = (rewards * weights).sum(1)
    for how, scale in (("group", "group"), ("batch", "batch"), ("none", None)):
        ours = group_advantage(total.view(G, K), weights=scored[:, 0].view(G, K), scale=scale, eps=1e-4)
        close(trl_rewards(functions, rewards, weights, how), ours.view(-1))
    apart = group_advantage(rewards, group, weights=scored, channel_weights=weights, eps=1e-4)
    kept = {"baseline": "batch_mean", "scale": "batch", "weights": scored[:, 0], "eps": 1e-4}
    ours = torch.where(scored[:, 0] > 0, group_advantage(apart, group, **kept), 0.0)
    close(trl_rewards(functions, rewards, weights, "normalize_then_sum"), ours)
