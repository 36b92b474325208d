"""verl's advantages by our ops, without a loop over tokens, samples or groups; `fuserl.trainers.verl` registers them.

Each takes verl's arguments and returns (advantages, returns), (B, T) and without gradient, 0 where the mask is. A
group's advantages do not depend on where its samples lie. A group of one has its reward as advantage, as in verl.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fuserl.kernels.gae import gae
from fuserl.kernels.group_advantage import group_advantage
from fuserl.kernels.pass_at_k_advantage import pass_at_k_advantage
from fuserl.kernels.returns import returns

__all__ = ["ESTIMATORS", "gae_advantage", "grpo"]


@torch.no_grad()
def gae_advantage(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """GAE's advantages, whitened over the tokens of the mask, and returns, by `gae`.

    Args:
        token_level_rewards, values: (B, T) of a floating dtype.
        response_mask: (B, T); a token of 0, such as a tool's, is passed over.
        gamma, lam: numbers.

    Raises:
        ValueError: the mask has fewer than two tokens.
    """
    rewards, mask = _wide(token_level_rewards), response_mask.bool()
    found = gae(rewards, values.to(rewards.dtype), gamma=float(gamma), lam=float(lam), mask=mask)
    return _whitened(found[0], response_mask), found[1]


@torch.no_grad()
def grpo(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool | None = None, config: object = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """GRPO's advantages: rewards less the mean of their group, over its standard deviation.

    Args:
        token_level_rewards: (B, T); a sample's reward is their sum.
        response_mask: (B, T).
        index: (B,) of labels, equal for samples of a group.
        epsilon: added to the standard deviation.
        norm_adv_by_std_in_grpo: whether to divide; None as config has it, and True where it has not.
        config: verl's AlgoConfig, or a mapping.

    Raises:
        ValueError: another number of labels than samples.
    """
    scores, groups = _wide(token_level_rewards.sum(-1)), _Groups(index, token_level_rewards)
    if norm_adv_by_std_in_grpo is None:
        norm_adv_by_std_in_grpo = config is None or config.get("norm_adv_by_std_in_grpo", True)
    if not norm_adv_by_std_in_grpo:
        return _spread(groups.of(scores, scores, scale=None), response_mask)
    return _spread(groups.of(scores, scores / (1 + epsilon), eps=float(epsilon)), response_mask)


@torch.no_grad()
def rloo(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, epsilon: float = 1e-6, config: object = None
) -> tuple[Tensor, Tensor]:
    """RLOO's advantages: rewards less the mean of the others of their group; arguments as `grpo` has them."""
    scores, groups = _wide(token_level_rewards.sum(-1)), _Groups(index, token_level_rewards)
    return _spread(groups.of(scores, scores, baseline="leave_one_out", scale=None), response_mask)


@torch.no_grad()
def opo(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, epsilon: float = 1e-6, config: object = None
) -> tuple[Tensor, Tensor]:
    """OPO's advantages: rewards less their mean weighted by length over the group; arguments as `grpo` has them."""
    scores, groups = _wide(token_level_rewards.sum(-1)), _Groups(index, token_level_rewards)
    lengths = response_mask.sum(-1).to(scores.dtype)
    return _spread(groups.of(scores, scores, scale=None, weights=lengths), response_mask)


@torch.no_grad()
def gpg(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, epsilon: float = 1e-6,
    f_norm: float = 1.0, alpha: float = 1.0, config: object = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """GPG's advantages: rewards less the mean of their group, times the share of samples with a reward, inverted.

    Args:
        token_level_rewards, response_mask, index, config: as `grpo` has them.
        epsilon: not of GPG.
        f_norm: what to divide by.
        alpha: 1; verl computes it from the rewards whatever is given.

    Raises:
        ValueError: another alpha, or as `grpo`.
    """
    if alpha != 1.0:
        raise ValueError(f"fuserl_gpg: alpha must be 1.0, since it follows from the rewards; got {alpha}. Use f_norm.")
    scores, groups = _wide(token_level_rewards.sum(-1)), _Groups(index, token_level_rewards)
    factor = len(scores) / scores.count_nonzero().clamp(min=1) / f_norm
    return _spread(factor * groups.of(scores, scores, scale=None), response_mask)


@torch.no_grad()
def grpo_passk(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool | None = None, config: object = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Pass@k's advantages: the best of a group has its lead over the second, the others 0; arguments as `grpo`.

    Raises:
        ValueError: a group of one, or as `grpo`.

    Source: arXiv:2503.19595.
    """
    scores, groups = _wide(token_level_rewards.sum(-1)), _Groups(index, token_level_rewards)
    if groups.any_lone:
        raise ValueError(
            "fuserl_grpo_passk: every group must have at least 2 samples; got one of 1. Set rollout.n to 2 or more."
        )
    if norm_adv_by_std_in_grpo is None:
        norm_adv_by_std_in_grpo = config is None or config.get("norm_adv_by_std_in_grpo", True)
    scale = "group" if norm_adv_by_std_in_grpo else None
    k = max(2, len(scores))
    found = pass_at_k_advantage(scores, groups.id, k, baseline="rest", scale=scale, eps=float(epsilon))
    return _spread(found, response_mask)


@torch.no_grad()
def reinforce_plus_plus(
    token_level_rewards: Tensor, response_mask: Tensor, config: object, index: np.ndarray | None = None,
    epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """REINFORCE++'s advantages: discounted rewards to come, whitened over the tokens of the mask.

    Args:
        token_level_rewards, response_mask: (B, T); a token of mask 0 is passed over.
        config: verl's AlgoConfig, for gamma.
        index, epsilon: not of REINFORCE++.

    Raises:
        ValueError: the mask has fewer than two tokens.
    """
    found = returns(_wide(token_level_rewards), gamma=float(config.gamma), mask=response_mask.bool())
    return _whitened(found, response_mask), found


@torch.no_grad()
def reinforce_plus_plus_baseline(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, epsilon: float = 1e-6, config: object = None
) -> tuple[Tensor, Tensor]:
    """REINFORCE++'s advantages with a baseline: rewards less the mean of their group, whitened; arguments as `grpo`."""
    scores, groups = _wide(token_level_rewards.sum(-1)), _Groups(index, token_level_rewards)
    found = _spread(groups.of(scores, scores, scale=None), response_mask)[0]
    found = _whitened(found, response_mask)
    return found, found


ESTIMATORS = {
    "fuserl_grpo": grpo,
    "fuserl_rloo": rloo,
    "fuserl_opo": opo,
    "fuserl_gpg": gpg,
    "fuserl_grpo_passk": grpo_passk,
    "fuserl_reinforce_plus_plus": reinforce_plus_plus,
    "fuserl_reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
}


class _Groups:
    """The samples' groups, numbered."""

    def __init__(self, index: np.ndarray | Tensor, like: Tensor):
        labels = np.asarray(index.cpu() if isinstance(index, Tensor) else index).reshape(-1)
        if len(labels) != len(like):
            raise ValueError(
                f"fuserl.trainers.verl: index must have a label per sample, ({len(like)},); got ({len(labels)},)."
            )
        # A group is known by the place of its first member: hashing strings takes a tenth of the time of sorting them.
        id = np.fromiter(map({}.setdefault, labels.tolist(), range(len(labels))), np.int64, len(labels))
        lone = np.bincount(id, minlength=1)[id] == 1
        self.any_lone = bool(lone.any())
        self.id = torch.from_numpy(id).to(like.device)
        self._lone = torch.from_numpy(lone).to(like.device) if self.any_lone else None

    def of(self, scores: Tensor, alone: Tensor, **rule) -> Tensor:
        """group_advantage, and `alone` for a sample that has no other in its group."""
        found = group_advantage(scores, self.id, **rule)
        return torch.where(self._lone, alone, found) if self.any_lone else found


def _spread(advantages: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of samples to their tokens."""
    found = advantages[:, None] * response_mask
    return found, found


def _whitened(x: Tensor, response_mask: Tensor) -> Tensor:
    """Of mean 0 and variance 1 over the tokens of the mask, by verl's formula; 0 where the mask is, as x must be.

    (x - mean) / sqrt(var + 1e-8),    var with the count less one
    """
    count = int(response_mask.sum())
    if count < 2:
        raise ValueError(
            f"fuserl.trainers.verl: response_mask must have at least 2 tokens to whiten advantages; got {count}. Use "
            "a larger batch."
        )
    centred = torch.where(response_mask.bool(), x - x.sum() / count, 0.0)
    return centred.mul_((centred.square().sum() / (count - 1) + 1e-8).rsqrt())


def _wide(x: Tensor) -> Tensor:
    """Rewards of 16 bits in float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
