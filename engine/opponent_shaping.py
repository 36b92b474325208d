"""Credit in games of two agents: what an agent earned, and what it should make the other one learn (arXiv:2511.19405).

    G[t]      = sum over later rounds s >= t of gamma^(s - t) r[s]
    A[t]      = G[t] - mean of G[t] over the other games of the group, at the same round
    w[t]      = gamma sum over k < t of gamma^(t - k) A1[k]
    credit[t] = A1[t] + shaping w[t] A2[t]

All of it (games, rounds), without a gradient. An agent whose past moves did well for itself gains from moves that do
well for the other one: what the other learns then does it good (Advantage Alignment, arXiv:2406.14662).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.engine.batch import Batch
from fuserl.engine.contracts import WEIGHT, require, require_one_of
from fuserl.kernels.discounted_scan import discounted_scan
from fuserl.kernels.group_advantage import group_advantage


def returns(rewards: Tensor, gamma: float) -> Tensor:
    """Discounted sums of the rewards (games, rounds) from each round on."""
    return discounted_scan(rewards.double(), gamma).to(rewards.dtype)


def round_advantages(values: Tensor, group: Tensor) -> Tensor:
    """Values (games, rounds) minus the mean over the other games of the group (games,) at the same round."""
    games, rounds = values.shape
    each = group.repeat_interleave(rounds)
    at = torch.arange(rounds).repeat(games)
    # A group is at least one game, so there are no more of them than of values.
    found = group_advantage(values.flatten(), each, rounds=at.to(each.device), baseline="leave_one_out", scale=None)
    return found.view(games, rounds)


def shaping_weights(
    advantages: Tensor,
    gamma: float,
    *,
    now: bool = False,
    sign: bool = False,
    clip: float | None = None,
    over_time: bool = False,
) -> Tensor:
    """How much an agent's own past advantages (games, rounds) make it care for what the other one gains.

    Args:
        advantages: the agent's own.
        gamma: discount.
        now: count the round itself too, sum over k <= t of gamma^(t - k) A1[k], without the factor gamma in front.
        sign: of that only -1, 0 or 1.
        clip: bound of its size; None is none.
        over_time: divided by t + 1.
    """
    past = discounted_scan(advantages.double(), gamma, forward=True, exclusive=not now)
    weights = past if now else gamma * past
    weights = weights.sign() if sign else weights
    weights = weights if clip is None else weights.clamp(-clip, clip)
    if over_time:
        weights = weights / torch.arange(1, weights.shape[1] + 1).to(weights)
    return weights.to(advantages.dtype)


def credits(
    own: Tensor,
    other: Tensor,
    group: Tensor,
    *,
    gamma: float,
    shaping: float,
    alternatives: Tensor | None = None,
    **how,
) -> Tensor:
    """The credit of an agent's moves, (games, rounds).

    Args:
        own, other: rewards of the agent and of the other one, (games, rounds).
        group: (games,) below games; games of one start.
        gamma: discount.
        shaping: weight of the second term; 0 is REINFORCE with a leave-one-out baseline.
        alternatives: (games, rounds, A) returns of other moves of the agent's; the weights are then of the mean of
            these and the one played, less its leave-one-out mean, in the place of A1.
        how: as of `shaping_weights`.
    """
    gains = returns(own, gamma)
    a1 = round_advantages(gains, group)
    if not shaping:
        return a1
    a2, expected = round_advantages(returns(other, gamma), group), a1
    if alternatives is not None:
        expected = round_advantages(torch.cat([gains[..., None], alternatives.to(gains)], -1).mean(-1), group)
    return a1 + shaping * shaping_weights(expected, gamma, **how) * a2


def annealed(shaping: float, step: int, *, every: int, rate: float, least: float) -> float:
    """The weight times `rate` after each `every` steps, until it is `least`; every 0 leaves it as it is."""
    require("annealed", "rate", rate, 0 < rate <= 1, "in (0, 1]")
    return max(shaping * rate ** ((step - 1) // every), min(least, shaping)) if every else shaping


def views(batch: Batch, scale: float, *, summed: bool = False) -> tuple[Tensor, ...]:
    """Rewards of the agents of a batch's turns, over `scale`: a row for each agent of each match.

    Returns:
        own, other (V, T) of the batch's dtype; group (V,), of the same start and agent; row and round of each rollout,
        (B,); alternatives (V, T, A) or None. With `summed` own is what both earned.
    """
    seat = batch.facts["seat"]
    kinds, row = (seat[:, 1] * 2 + seat[:, 2]).unique(return_inverse=True)
    rounds, at = int(seat[:, 3].max()) + 1, seat[:, 3]
    own = batch.rewards.new_zeros(len(kinds), rounds)
    other, group = torch.zeros_like(own), torch.zeros_like(kinds)
    own[row, at] = batch.rewards / scale
    other[row, at] = batch.facts["other"][:, 0].to(own) / scale
    group[row] = seat[:, 0] * 2 + seat[:, 2]
    group = group.unique(return_inverse=True)[1]
    tried = None
    if "alternatives" in batch.facts:
        each = batch.facts["alternatives"].to(own) / scale
        tried = own.new_zeros(*own.shape, each.shape[1])
        tried[row, at] = each
    return (own + other if summed else own), other, group, row, at, tried


def aligned(
    objective: str = "alignment",
    *,
    gamma: float,
    shaping: float,
    scale: float,
    anneal: tuple[int, float, float] = (0, 1, 0),
    **how,
) -> Callable:
    """The advantage slot of turns in games (`matches.collected`): every token of a turn has the credit of its round.

    Args:
        objective: alignment; naive, without shaping; or sum, without it, where both agents get what both earned.
        gamma, shaping: as of `credits`.
        scale: rewards are divided by it.
        anneal: every, rate and least of `annealed`.
        how: as of `shaping_weights`.
    """
    require_one_of("aligned", "objective", objective, ("alignment", "naive", "sum"))
    require("aligned", "gamma", gamma, 0 <= gamma <= 1, "in [0, 1]")
    require("aligned", "shaping", shaping, 0 <= shaping < math.inf, WEIGHT)
    require("aligned", "scale", scale, 0 < scale < math.inf, "a finite number > 0")
    require("aligned", "clip", how.get("clip"), how.get("clip") is None or how["clip"] > 0, "above 0, or None")
    every, rate, least = anneal

    def advantage(batch: Batch) -> Tensor:
        own, other, group, row, at, tried = views(batch, scale, summed=objective == "sum")
        weight = objective == "alignment" and annealed(shaping, batch.step, every=every, rate=rate, least=least)
        return credits(own, other, group, gamma=gamma, shaping=weight, alternatives=tried, **how)[row, at]

    return advantage
