"""Losses of preferences between rollouts, functions of (out, batch) over one op: of pairs, and of rollouts alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fuserl.engine.batch import Batch
from fuserl.engine.contracts import WEIGHT, require
from fuserl.engine.losses import Loss
from fuserl.kernels.preference_loss import preference_loss
from fuserl.kernels.preferences import CPO, DPO, IPO, KTO, ORPO, BradleyTerry, Form, SimPO


def preference(*, beta: float, label_smoothing: float = 0.0) -> Loss:
    """Direct preference optimisation of pairs (arXiv:2305.18290, eq. 7; smoothing: conservative DPO).

        margin = beta [sum over chosen of (logprob - ref) - sum over rejected of (logprob - ref)]
        loss = -(1 - label_smoothing) log sigmoid(margin) - label_smoothing log sigmoid(-margin)

    A group holds one pair; its rollout with the larger reward is the chosen one.
    """
    require("preference", "beta", beta, 0 < beta < math.inf, "a finite number > 0")
    require("preference", "label_smoothing", label_smoothing, 0 <= label_smoothing <= 0.5, "in [0, 0.5]")
    return paired(DPO(beta, label_smoothing))


def value_bonus(*, beta: float, alpha: float, bound: float = math.inf, chosen: bool = False) -> Loss:
    """alpha times the mean of what a policy implies of calibrating rollouts, within bounds (VPO, arXiv:2405.19320).

        loss = alpha clip(beta sum over the rollout of (logprob - ref), -bound, bound)

    Where rewards are 0 on average over the rollouts that calibrate, that is -alpha times the largest regularised value
    J* = beta log Z of the rewards that the policy implies: alpha > 0 is optimism, which makes these rollouts less
    likely, alpha < 0 pessimism, which anchors the policy to them. A rollout beyond the bounds has no gradient.

    Args:
        chosen: only the chosen rollout of each pair calibrates, those of the larger reward; else all do.
    """
    require("value_bonus", "beta", beta, 0 < beta < math.inf, "a finite number > 0")
    require("value_bonus", "alpha", alpha, abs(alpha) < math.inf, "a finite number")
    require("value_bonus", "bound", bound, bound > 0, "a number > 0; inf bounds nothing")

    def loss(out, batch: Batch):
        implied = beta * batch.rollout_sum(out.logprob - batch.ref_logprobs)
        each, mean = alpha * implied.clamp(-bound, bound), batch.counts.rollouts
        if chosen:
            calibrates = torch.zeros_like(batch.group, dtype=torch.bool).index_fill(0, _pairs(batch)[0], True)
            each, mean = torch.where(calibrates, each, 0.0), batch.counts.groups
            implied = torch.where(calibrates, implied, torch.nan)
        per_token = torch.where(batch.last, batch.to_tokens(each), 0.0) / mean
        return per_token, {"calibration_reward": batch.at_last(implied.detach())}

    return Loss(loss, scope="group" if chosen else "rollout", reads=("ref_logprobs",))


def ipo(*, beta: float = 0.1) -> Loss:
    """Identity preference optimisation of pairs (arXiv:2310.12036, eq. 17), of means over tokens.

    loss = (mean over chosen of (logprob - ref) - mean over rejected of (logprob - ref) - 1 / (2 beta))^2
    """
    return paired(IPO(beta))


def simpo(*, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0) -> Loss:
    """Simple preference optimisation of pairs (arXiv:2405.14734, eq. 6), without a reference.

    loss = -log sigmoid(beta (mean logprob of chosen - mean logprob of rejected) - gamma), labels smoothed as in DPO
    """
    return paired(SimPO(beta, gamma, label_smoothing))


def cpo(*, beta: float = 0.1, nll: float = 1.0, label_smoothing: float = 0.0) -> Loss:
    """Contrastive preference optimisation of pairs (arXiv:2401.08417, eq. 6), without a reference.

    loss = -log sigmoid(beta (sum logprob of chosen - sum logprob of rejected)) - nll (mean logprob of chosen)
    """
    return paired(CPO(beta, nll, label_smoothing))


def orpo(*, lam: float = 0.1) -> Loss:
    """Odds-ratio preference optimisation of pairs (arXiv:2403.07691, eq. 6 and 7), without a reference.

    loss = -(mean logprob of chosen) - lam log sigmoid(odds of chosen - odds of rejected)
    odds = s - log(1 - exp(s)), s = mean logprob
    """
    return paired(ORPO(lam))


def paired(form: Form) -> Loss:
    """The loss of pairs in any form of `preference_loss` that has them, the mean over pairs.

    A group holds one pair; its rollout with the larger reward is the chosen one.
    """
    form.rule()

    def loss(out, batch: Batch):
        return _of_pairs(batch, out.logprob, form, batch.ref_logprobs if form.reference else None)

    return Loss(loss, scope="group", reads=("ref_logprobs",) if form.reference else ())


def bradley_terry(*, centre: float = 0.0) -> Loss:
    """Negative log-likelihood of pairs under scores, the head at the last token (arXiv:2203.02155, eq. 1).

    loss = -log sigmoid(score of chosen - score of rejected) + centre (score of chosen + score of rejected)^2
    """
    require("bradley_terry", "centre", centre, 0 <= centre < math.inf, WEIGHT)

    def loss(out, batch: Batch):
        return _of_pairs(batch, torch.where(batch.last, out.score, 0.0), BradleyTerry(centre), None)

    return Loss(loss, outputs=("score",), scope="group")


def kto(
    *,
    beta: float = 0.1,
    desirable: float = 1.0,
    undesirable: float = 1.0,
    baseline: float = 0.0,
    threshold: float = 0.0,
) -> Loss:
    """Kahneman-Tversky optimisation of rollouts, those with a reward above `threshold` desirable (arXiv:2402.01306).

        loss = desirable   sigmoid(beta (baseline - score))    score = sum over the rollout of (logprob - ref)
               undesirable sigmoid(beta (score - baseline))    where it is not desirable

    `baseline` is the mean score of mismatched rollouts, at least 0: an estimate of KL(policy || reference).
    """
    form = KTO(beta, desirable, undesirable)
    form.rule()
    require("kto", "baseline", baseline, 0 <= baseline < math.inf, WEIGHT)

    def loss(out, batch: Batch):
        packed, wanted = _packed(batch), batch.rewards > threshold
        good = torch.zeros_like(packed.offsets[1:], dtype=torch.bool).index_put((packed.place,), wanted)
        each, rewards, _ = preference_loss(
            out.logprob,
            form,
            offsets=packed.offsets,
            ref_logprobs=batch.ref_logprobs,
            desirable=good,
            baseline=baseline,
        )
        per_token = torch.where(batch.last, batch.to_tokens(each[packed.place]), 0.0) / batch.counts.rollouts
        reward = rewards[packed.place]
        seen = {"chosen_reward": torch.where(wanted, reward, torch.nan)}
        seen["rejected_reward"] = torch.where(wanted, torch.nan, reward)
        return per_token, {name: batch.at_last(value) for name, value in seen.items()}

    return Loss(loss, scope="rollout", reads=("ref_logprobs",))


class _Packed(NamedTuple):
    """Where the rollouts of a part of a batch lie: those without a token in it share the last place, which is empty."""

    offsets: Tensor  # (B + 2,) int64
    place: Tensor  # (B,) int64, of each rollout


def _packed(batch: Batch) -> _Packed:
    count, rollout = len(batch.group), batch.rollout
    new = torch.ones_like(rollout)
    new[1:] = rollout[1:] != rollout[:-1]
    place = new.cumsum(0) - 1
    offsets = torch.searchsorted(place, torch.arange(count + 2, device=rollout.device))
    return _Packed(offsets, torch.full_like(batch.group, count).index_put((rollout,), place))


def _pairs(batch: Batch) -> tuple[Tensor, Tensor]:
    """(chosen, rejected) rollouts of each group of two, (groups,), wherever they stand; of those that have tokens."""
    index = batch.group.argsort(stable=True)
    if not bool(batch.offsets.diff().all()):
        index = index[batch.group_sum(batch.lengths)[index] > 0]  # the others are for another loss
    one, two = index.view(-1, 2).unbind(1)
    first = batch.rewards[one] > batch.rewards[two]
    return torch.where(first, one, two), torch.where(first, two, one)


def _of_pairs(batch: Batch, values: Tensor, form: Form, ref_logprobs: Tensor | None):
    """The loss of each token, a pair's in equal parts at the ends of both rollouts; margins, rewards, what is right."""
    packed, (chosen, rejected) = _packed(batch), _pairs(batch)
    places = {"chosen": packed.place[chosen], "rejected": packed.place[rejected]}
    each, rewards, _ = preference_loss(values, form, offsets=packed.offsets, ref_logprobs=ref_logprobs, **places)
    margin = rewards[places["chosen"]] - rewards[places["rejected"]]
    number = torch.arange(len(chosen), device=chosen.device)
    pair = torch.zeros_like(batch.group).index_put(
        (torch.cat([chosen, rejected]),), number.repeat(2)
    )  # of each rollout
    per_token = torch.where(batch.last, batch.to_tokens(each[pair]), 0.0) / (2 * batch.counts.groups)
    seen = {"margin": margin, "pair_accuracy": (margin > 0).float()}
    seen = {name: value[pair] for name, value in seen.items()}
    for name, some in (("chosen_reward", chosen), ("rejected_reward", rejected)):
        seen[name] = torch.full_like(seen["margin"], torch.nan).index_put((some,), rewards[packed.place[some]])
    return per_token, {name: batch.at_last(value) for name, value in seen.items()}
