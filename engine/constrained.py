"""Constrained optimisation of several tasks by judged completions (CGPO, arXiv:2409.20370): three ways without a dual.

Every prompt has K drawn completions and a stored one, the baseline. A batch's facts say of each rollout:

    task      which task it is of              baseline  1 for a stored completion, else 0
    passes    1 where all judges pass it (c)   score     its reward (r)
    calibrated   sigmoid(r - r(baseline of its prompt))

A strategy makes of a task's rollouts the batch that its loss learns from. k is the log-ratio of a rollout to the
reference, summed over its tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuserl.engine import mixtures
from fuserl.engine.batch import Batch
from fuserl.engine.contracts import WEIGHT, numbers, require, require_one_of
from fuserl.engine.losses import Loss, clipped, negative_logprob, rollout_sum, summed
from fuserl.engine.preferences import preference


@dataclass(frozen=True)
class Strategy:
    """How one task is learnt."""

    optimizer: str = "crpg"
    kl_max: float = 5.0
    weight: float = 1.0

    def __post_init__(self):
        require_one_of("Strategy", "optimizer", self.optimizer, OPTIMIZERS)
        require("Strategy", "weights", self.weight, 0 < self.weight < math.inf, "finite numbers > 0")


def reinforced() -> Loss:
    """Policy gradient without a clip of whole rollouts: the mean over rollouts of -A times the sum of logprobs."""
    return clipped(low=math.inf, high=math.inf, reduce=rollout_sum)


def preferred(beta: float, lam: float) -> Loss:
    """DPO of pairs, and lam times the negative mean logprob of the chosen one, as means over pairs."""
    chosen = negative_logprob(
        reduce=lambda batch: 1 / (batch.counts.groups * batch.to_tokens(batch.lengths)).to(batch.dtype)
    )
    return summed(preference(beta=beta), chosen, lam) if lam else preference(beta=beta)


def log_ratios(batch: Batch) -> Tensor:
    """k: the sum over each rollout of old_logprobs - ref_logprobs, (B,)."""
    return batch.rollout_sum(batch.old_logprobs - batch.ref_logprobs)


def regularised(batch: Batch, kl_max: float | Tensor) -> Tensor:
    """c calibrated max(1 - k / kl_max, 0) of each rollout, (B,): the reward of CRPG."""
    return batch.facts["passes"] * batch.facts["calibrated"] * (1 - log_ratios(batch) / kl_max).clamp(min=0)


def crpg(batch: Batch, kl_max: float | Tensor) -> Batch:
    """Calibrated-regularised policy gradient: all drawn rollouts, with that reward less its mean as advantage."""
    drawn = mixtures.only(batch, batch.facts["baseline"] == 0)
    rewards = regularised(drawn, kl_max)
    return drawn.with_advantages(rewards - rewards.mean())


def codpo(batch: Batch, kl_max: float | Tensor = math.inf) -> Batch:
    """Constrained online DPO: a pair of each prompt of which a completion passes, its rewards 1 and 0.

    Chosen is the best that passes; rejected the worst that does not, or where all pass the worst.
    """
    passes, score, drawn = batch.facts["passes"] > 0, batch.facts["score"], batch.facts["baseline"] == 0
    index = []
    for group in batch.group.unique().tolist():
        mine = drawn & (batch.group == group)
        good, bad = mine & passes, mine & ~passes
        if good.any():
            bad = bad if bad.any() else mine
            index.append(int(torch.where(good, score, -torch.inf).argmax()))
            index.append(int(torch.where(bad, score, torch.inf).argmin()))
    pairs = batch.rollouts_at(torch.tensor(index, dtype=torch.int64)).counted()
    rewards = torch.tensor([1.0, 0.0]).repeat(len(index) // 2).to(batch.rewards)
    return pairs.replace(rewards=rewards).with_advantages(rewards)


def crraft(batch: Batch, kl_max: float | Tensor) -> Batch:
    """Calibrated-regularised reward-ranked fine-tuning: the best completion of each prompt, weighted by its reward.

    That is c calibrated where k <= kl_max. Where all have 0 the baseline stands in with 0.5, if it passes itself.
    """
    inside = batch.facts["passes"] * (log_ratios(batch) <= kl_max)
    rewards = inside * batch.facts["calibrated"]
    drawn, index = batch.facts["baseline"] == 0, []
    for group in batch.group.unique().tolist():
        mine = batch.group == group
        best = int(torch.where(mine & drawn, rewards, -torch.inf).argmax())
        stored = (mine & ~drawn & (inside > 0)).nonzero().flatten().tolist()
        index += [best] if rewards[best] > 0 else stored[:1]
    kept = torch.tensor(index, dtype=torch.int64)
    return batch.rollouts_at(kept).counted().with_advantages(rewards[kept])


OPTIMIZERS: dict[str, Callable] = {"crpg": crpg, "codpo": codpo, "crraft": crraft}


def several(strategies: Sequence[Strategy], *, beta: float, lam: float) -> tuple[Callable, Loss]:
    """The advantage slot and the loss of tasks, each learnt by its own strategy, and of pairs to warm up on.

    Task number m is objective m, normalised by its own rollouts, so that the gradient is the weighted sum of theirs.
    Rollouts without a task are pairs of data, under DPO alone.

    Args:
        strategies: of each task.
        beta, lam: of `preferred`.
    """
    require("several", "lam", lam, 0 <= lam < math.inf, WEIGHT)

    def advantage(batch: Batch) -> Batch:
        # Nobody drew what is stored: where weights of rollouts are asked for, its own is 1.
        drawn = torch.where(batch.rollout_logprobs.isnan(), batch.old_logprobs, batch.rollout_logprobs)
        batch = batch.replace(rollout_logprobs=drawn, advantages=torch.zeros_like(batch.old_logprobs))
        if "task" not in batch.facts:
            nothing = [mixtures.emptied(batch)] * len(strategies)
            return mixtures.joined(*nothing, batch.with_advantages(torch.ones_like(batch.rewards)))
        made = []
        for number, each in enumerate(strategies):
            own = mixtures.only(batch, batch.facts["task"] == number)
            made.append(OPTIMIZERS[each.optimizer](own, each.kl_max))
        return mixtures.joined(*made, mixtures.emptied(batch))

    losses = [preferred(beta, lam) if each.optimizer == "codpo" else reinforced() for each in strategies]
    losses = [_weighted(loss, each.weight) for loss, each in zip(losses, strategies, strict=True)]
    return advantage, mixtures.mixture(*losses, preference(beta=beta))


def calibrated(score: Tensor, group: Tensor, baseline: Tensor) -> Tensor:
    """sigmoid(score - score of the baseline of its group), (B,); that of a baseline is one half.

    Args:
        score: (B,).
        group: (B,) int64, with one baseline each.
        baseline: (B,) bool.
    """
    stored = torch.zeros(int(group.max()) + 1, dtype=score.dtype).index_put((group[baseline],), score[baseline])
    return torch.sigmoid(score - stored[group])


def each_of(name: str, text: str, tasks: Sequence[str]) -> list[str]:
    """What an option says of each task, separated by commas; or one for all."""
    return _spread(name, text, [each.strip() for each in text.split(",")], tasks)


def numbers_of(name: str, text: str, tasks: Sequence[str], kind: type = float) -> list:
    """The numbers above 0 of each task, of a kind: as `each_of`."""
    found = numbers("cgpo", name, text, kind)
    require("cgpo", name, text, all(each > 0 for each in found), "numbers > 0")
    return _spread(name, text, found, tasks)


def _spread(name: str, text: str, found: list, tasks: Sequence[str]) -> list:
    require("cgpo", name, text, len(found) in (1, len(tasks)), f"one, or one for each of {len(tasks)} tasks")
    return found * len(tasks) if len(found) == 1 else found


def _weighted(loss: Loss, weight: float) -> Loss:
    """A loss times a number."""
    if weight == 1:
        return loss

    def function(out, batch: Batch):
        each, statistics = loss(out, batch)
        return weight * each, statistics

    again = loss.weighed and (lambda given: _weighted(loss.weighed(given), weight))
    return dataclasses.replace(loss, function=function, weighed=again)
