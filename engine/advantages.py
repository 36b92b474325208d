"""Credit: functions of a batch that return one advantage per rollout (B,) or per token (N,), without gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine.batch import Batch
from fuserl.engine.contracts import WEIGHT, require, require_one_of
from fuserl.kernels.discounted_scan import discounted_scan
from fuserl.kernels.gae import gae
from fuserl.kernels.group_advantage import group_advantage
from fuserl.kernels.group_ranks import group_ranks
from fuserl.kernels.pass_at_k_advantage import pass_at_k_advantage


def standardized(batch: Batch) -> Tensor:
    """Reward minus the group's mean, over the group's standard deviation (GRPO, arXiv:2402.03300), (B,)."""
    return group_advantage(batch.rewards, batch.group)


def centred(batch: Batch) -> Tensor:
    """Reward minus the group's mean (Dr. GRPO, arXiv:2503.20783), (B,)."""
    return group_advantage(batch.rewards, batch.group, scale=None)


def leave_one_out(batch: Batch) -> Tensor:
    """Reward minus the mean of the group's other members (RLOO, arXiv:2402.14740), (B,)."""
    return group_advantage(batch.rewards, batch.group, baseline="leave_one_out", scale=None)


def over_batch(batch: Batch) -> Tensor:
    """Reward minus the batch's mean, over the batch's standard deviation: no groups, (B,)."""
    return group_advantage(batch.rewards, batch.group, baseline="batch_mean", scale="batch")


def ranked(batch: Batch) -> Tensor:
    """Rank of the reward within the group, standardised there: the rewards' sizes do not matter (ArenaRL), (B,)."""
    return group_advantage(group_ranks(batch.rewards, batch.group), batch.group)


def length_centred(batch: Batch) -> Tensor:
    """Reward minus the group's mean weighted by length, which has least variance (OPO, arXiv:2505.23585), (B,)."""
    return group_advantage(batch.rewards, batch.group, scale=None, weights=batch.lengths.to(batch.rewards.dtype))


def best_of(k: int) -> Callable:
    """Credit for pass@k, or max@k: analytic over all k-subsets of a group (arXiv:2508.10751), (B,)."""
    require("best_of", "k", k, k >= 1, "a number of tries >= 1")
    return lambda batch: pass_at_k_advantage(batch.rewards, batch.group, k, scale="best")


def signed(*, threshold: float = 0.5, keep: str | None = None) -> Callable:
    """+1 for a reward above the threshold, -1 below, whatever the group has; `keep` "positive" or "negative", (B,).

    So every wrong answer counts, in a group that is all wrong too (PSR and NSR, arXiv:2506.01347).
    """
    return lambda batch: group_advantage(batch.rewards, batch.group, baseline=threshold, scale="sign", keep=keep)


PENALTIES = {"softplus": torch.nn.functional.softplus, "relu": torch.relu}


def overconfident(
    advantage: Callable, *, alpha: float, penalty: str = "softplus", mean: bool = False, cap: float | None = None
) -> Callable:
    """The advantages of wrong rollouts (reward <= 0) times 1 + alpha softplus(c), the others as they are (ACE), (B,).

    c is the rollout's sum of old_logprobs - ref_logprobs, or with `mean` their mean, at most `cap` where there is one:
    how much more confident of it the policy has grown. `penalty` "relu" is max(c, 0) in the place of softplus(c), which
    is log(1 + e^c).
    """
    require("overconfident", "alpha", alpha, 0 <= alpha < math.inf, WEIGHT)
    require_one_of("overconfident", "penalty", penalty, PENALTIES)
    require("overconfident", "cap", cap, cap is None or cap >= 0, "a number >= 0, or None for no bound")

    def found(batch: Batch) -> Tensor:
        within = batch.rollout_mean if mean else batch.rollout_sum
        grown = within(batch.old_logprobs - batch.ref_logprobs)
        grown = grown if cap is None else grown.clamp(max=cap)
        factor = 1 + alpha * PENALTIES[penalty](grown)
        return torch.where(batch.rewards <= 0, factor, 1.0) * advantage(batch)

    return found


def several(rewards: Tensor, group: Tensor, weights: Tensor) -> Tensor:
    """Rewards (B, C) standardised in each group and channel, summed by weights (C,), standardised in the batch, (B,).

    No channel drowns another one (GDPO, arXiv:2601.05242).
    """
    total = group_advantage(rewards, group, channel_weights=weights)
    return group_advantage(total, group, baseline="batch_mean", scale="batch")


def over_mean(batch: Batch) -> Tensor:
    """Reward minus the group's mean, over that mean; 0 where the mean is 0 (MaxRL, arXiv:2602.02710, alg. 1), (B,).

    It is defined for rewards that are not negative. A group of one has nothing to compare with: its advantage is r.
    """
    if bool((batch.rewards < 0).any()):
        raise ValueError(
            f"over_mean: rewards must not be negative; got {float(batch.rewards.min())}. Use rewards of 0 and 1."
        )
    mean = batch.group_mean(batch.rewards)
    alone = batch.group_sum(torch.ones_like(mean)) == 1
    over = torch.where(mean > 0, centred(batch) / torch.where(mean > 0, mean, 1.0), 0.0)
    return torch.where(alone, batch.rewards, over)


def uniform(batch: Batch) -> Tensor:
    """Advantage one for every rollout: imitation, (B,)."""
    return torch.ones_like(batch.rewards)


def implicit(batch: Batch, beta: float) -> Tensor:
    """The rewards of tokens that a policy and its reference imply, beta (old_logprobs - ref_logprobs), (N,).

    Where the policy is optimal under a reward r, held to the reference by beta, that is r + V(next state) - V(state):
    the same reward, with what is still to come moved forward (arXiv:2404.12358).
    """
    require("implicit", "beta", beta, 0 < beta < math.inf, "a finite number > 0")
    return beta * (batch.old_logprobs - batch.ref_logprobs)


def token_rewards(batch: Batch, beta: float) -> Tensor:
    """The rollout's reward at its last token, minus beta (old_logprobs - ref_logprobs) at every token, (N,)."""
    at_end = torch.where(batch.last, batch.to_tokens(batch.rewards), 0.0)
    return at_end - beta * (batch.old_logprobs - batch.ref_logprobs) if beta else at_end


def rewards_to_go(dense: Callable) -> Callable:
    """Token rewards `dense` (Batch) -> (N,), standardised over the group's tokens, summed to the end, (N,).

    GRPO with a reward of each step (arXiv:2402.03300, section 4.1.3); tokens whose rewards all agree have advantage 0.
    """

    def advantage(batch: Batch) -> Tensor:
        given = dense(batch).to(batch.dtype)
        group = batch.to_tokens(batch.group)
        return discounted(group_advantage(given, group), batch, 1.0)

    return advantage


def penalised(beta: float) -> Callable:
    """The batch with beta times each rollout's summed log-ratio to the reference taken off its reward."""
    require("penalised", "beta", beta, 0 <= beta < math.inf, WEIGHT)

    def shaped(batch: Batch) -> Batch:
        if not beta:
            return batch
        return batch.replace(rewards=batch.rewards - beta * batch.rollout_sum(batch.old_logprobs - batch.ref_logprobs))

    return shaped


def discounted(x: Tensor, batch: Batch, factor: float) -> Tensor:
    """The sum of factor^(s - t) x[s] over the later tokens s >= t of each rollout, (N,) of x's dtype, in float64."""
    return discounted_scan(x.double(), factor, offsets=batch.offsets.to(x.device)).to(x.dtype)


def generalised(
    *, gamma: float, lam: float, beta: float, whiten: bool = True, dense: Callable | None = None
) -> Callable:
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16) of token rewards under the batch's values.

        delta[t] = r[t] + gamma V[t + 1] - V[t],   A[t] = delta[t] + gamma lam A[t + 1],   returns = A + V

    V beyond a rollout's last token is 0. With `whiten` A is brought to mean 0 and standard deviation 1 over the batch.
    `dense` (Batch) -> (N,) is added to the rewards: what another policy implies of tokens, as of `credit.judged_by`.
    """
    for name, value in (("gamma", gamma), ("lam", lam)):
        require("generalised", name, value, 0 <= value <= 1, "in [0, 1]; 1 is no discount")
    require("generalised", "beta", beta, 0 <= beta < math.inf, WEIGHT)

    def advantage(batch: Batch) -> Batch:
        rewards, values = token_rewards(batch, beta).double(), batch.values.double()
        rewards = rewards if dense is None else rewards + dense(batch)
        found = gae(rewards, values, gamma=gamma, lam=lam, offsets=batch.offsets.to(values.device))
        advantages, returns = (x.to(batch.dtype) for x in found)
        return batch.replace(advantages=whitened(advantages) if whiten else advantages, returns=returns)

    return advantage


def normalised(*, beta: float, over_group: bool = False) -> Callable:
    """REINFORCE++ (arXiv:2501.03262, eq. 7-9): token rewards summed to the end, mean 0 and std 1 over tokens.

    With `over_group` the group's mean reward is taken off first (its "baseline" variant).
    """
    require("normalised", "beta", beta, 0 <= beta < math.inf, WEIGHT)

    def advantage(batch: Batch) -> Tensor:
        if over_group:
            batch = batch.replace(rewards=centred(batch))
        return whitened(discounted(token_rewards(batch, beta), batch, 1.0))

    return advantage


def whitened(x: Tensor) -> Tensor:
    """x minus its mean, over its standard deviation (population); zeros where all values are equal."""
    if not len(x) or bool(x.min() == x.max()):
        return torch.zeros_like(x)
    wide = x.double()
    return ((wide - wide.mean()) / wide.std(correction=0)).to(x.dtype)
