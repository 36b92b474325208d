"""The same advantages as TRL and verl, whose functions take equal groups, or loop.

Theirs in float64 are the truth; ours in float32 may err by twice what theirs do.
"""

import importlib.util
import sys
import types

import pytest
import torch
from rivals import rival
from tolerance import check

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
    """Rewards, groups in any order, and the mask of the tokens."""
    rewards, group = torch.randn(G * K), torch.arange(G).repeat_interleave(K)[torch.randperm(G * K)]
    return rewards, group, torch.arange(T) < torch.randint(1, T + 1, (G * K,))[:, None]


def by_token(rewards, mask):
    """Rewards as verl takes them, at the last token of each rollout."""
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return torch.where(last, rewards[:, None], 0.0)


def parity(name, theirs, ours, *tensors):
    """Compare functions of the tensors."""
    wide = [x.double() for x in tensors]
    check(name, ours(*tensors), theirs(*wide), theirs(*tensors), torch.float32)


def test_verl_within_groups(verl):
    rewards, group, mask = case()
    config = {"norm_adv_by_std_in_grpo": True}
    forms = {
        "grpo": {},
        "grpo_vectorized": {},
        "rloo": {"baseline": "leave_one_out", "scale": None},
        "rloo_vectorized": {"baseline": "leave_one_out", "scale": None},
        "opo": {"scale": None},
        "gpg": {"scale": None},
        "grpo_passk": {"baseline": "rest", "scale": "group"},
    }
    for name, options in forms.items():

        def theirs(r, name=name):
            estimator = verl.get_adv_estimator_fn(name)
            return estimator(by_token(r, mask), mask.to(r), index=group.numpy(), config=config)[0]

        def ours(r, name=name, options=options):
            if name == "grpo_passk":
                return pass_at_k_advantage(r, group, K, **options)[:, None] * mask
            weights = mask.sum(1).to(r) if name == "opo" else None
            return group_advantage(r, group, weights=weights, **options)[:, None] * mask

        parity(name, theirs, ours, rewards)
    parity(
        "remax",
        lambda r, given: verl.get_adv_estimator_fn("remax")(by_token(r, mask), given, mask.to(r))[0][:, 0],
        lambda r, given: group_advantage(r, group, baseline=given, scale=None),
        rewards, torch.randn(G * K),
    )  # fmt: skip


def test_verl_over_the_tokens_of_the_batch(verl):
    rewards, group, mask = case()
    for name, scale in (("reinforce_plus_plus_baseline", None), ("gdpo", "group")):

        def theirs(r, name=name):
            return verl.get_adv_estimator_fn(name)(by_token(r, mask), mask.to(r), index=group.numpy())[0][mask]

        def ours(r, scale=scale):  # of each token: length weighs the batch's statistics
            every = group_advantage(r, group, scale=scale).repeat_interleave(mask.sum(1))
            return group_advantage(every[None], baseline="mean", scale="group", eps=0.0)[0]

        parity(name, theirs, ours, rewards)


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
    group, scored = torch.arange(G).repeat_interleave(K), ~rewards.isnan()
    for how, scale in (("group", "group"), ("batch", "batch"), ("none", None)):

        def ours(r, w, scale=scale):
            each = {"weights": scored[:, 0].to(r).view(G, K), "scale": scale, "eps": 1e-4}
            return group_advantage((r * w).sum(1).view(G, K), **each).view(-1)

        parity(how, lambda r, w, how=how: trl_rewards(functions, r, w, how), ours, rewards, weights)

    def apart(r, w):
        each = group_advantage(r, group, weights=scored.to(r), channel_weights=w, eps=1e-4)
        kept = {"baseline": "batch_mean", "scale": "batch", "weights": scored[:, 0].to(r), "eps": 1e-4}
        return torch.where(scored[:, 0], group_advantage(each, group, **kept), 0.0)

    parity("apart", lambda r, w: trl_rewards(functions, r, w, "normalize_then_sum"), apart, rewards, weights)
