"""Token losses: functions of (out, batch) that return one normalised loss per token, and its statistics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fuserl.engine.batch import Batch
from fuserl.engine.contracts import BOUND, WEIGHT, require
from fuserl.kernels.policy_loss import policy_loss


def every_token(batch: Batch) -> None:
    """`live` of a loss that no token leaves without a gradient."""
    return None


def with_advantage(batch: Batch) -> Tensor:
    """`live` of a loss that vanishes, with its gradient, where the advantage is zero: (N,) bool."""
    return batch.advantages != 0


def with_any_advantage(batch: Batch) -> Tensor:
    """`live` of a loss of whole rollouts that vanishes where the advantage is zero at every token of one: (N,) bool."""
    return batch.to_tokens(batch.rollout_sum(with_advantage(batch).float()) > 0)


@dataclass(frozen=True)
class Loss:
    """A per-token loss, and what an update must know of it before calling it."""

    function: Callable  # (out, Batch) -> (loss (n,), statistics {name: (n,), NaN where there is none; or (1, K)})
    # Of linear_policy_loss; "value", the value head at the state before each token; "score", at the state after it.
    outputs: tuple[str, ...] = ("logprob",)
    scope: str = "token"  # what must be seen together: a "token", a "rollout", or all rollouts of a "group"
    live: Callable = every_token  # (Batch) -> (N,) bool, or None for all: tokens whose gradient is not known to be zero
    reads: tuple[str, ...] = ()  # fields of the batch: old_logprobs, ref_logprobs, values

    def __call__(self, out, batch: Batch):
        return self.function(out, batch)


def token_mean(batch: Batch) -> Tensor:
    """Weight 1 / N of each token: the average over all tokens of the batch (DAPO), (n,)."""
    return torch.full(batch.tokens.shape, 1.0 / batch.counts.tokens, device=batch.tokens.device)


def rollout_mean(batch: Batch) -> Tensor:
    """Weight 1 / (B length) of each token: the average over rollouts of their average (GRPO), (n,)."""
    return 1.0 / (batch.counts.rollouts * batch.to_tokens(batch.lengths))


def rollout_sum(batch: Batch) -> Tensor:
    """Weight 1 / B of each token: the average over rollouts of their sum (REINFORCE), (n,)."""
    return torch.full(batch.tokens.shape, 1.0 / batch.counts.rollouts, device=batch.tokens.device)


def mean_over(length: int) -> Callable:
    """A reduction to sums over rollouts, divided by one constant length (Dr. GRPO): weight 1 / (B length)."""
    return lambda batch: rollout_sum(batch) / length


def clipped(
    *,
    low: float = 0.2,
    high: float = 0.2,
    dual: float | None = None,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
    reduce: Callable = rollout_mean,
) -> Loss:
    """The clipped surrogate of PPO (arXiv:1707.06347, eq. 7), with a KL and an entropy term when weighted.

        loss = -min(ratio A, clip(ratio, 1 - low, 1 + high) A) + beta k3 - entropy_coef entropy
        ratio = exp(logprob - old_logprobs)        k3 = exp(ref - logprob) - (ref - logprob) - 1

    Without old_logprobs in the batch the update is on-policy: they are the current ones, detached, and the ratio is 1.
    With `dual` (> 1) the loss of a token with A < 0 is at most dual |A| (arXiv:1912.09729).
    """
    _require_clip("clipped", low, high)
    require("clipped", "dual", dual, dual is None or dual > 1, "above 1, or None for no such bound")
    require("clipped", "beta", beta, 0 <= beta < math.inf, WEIGHT)
    require("clipped", "entropy_coef", entropy_coef, abs(entropy_coef) < math.inf, "a finite number")

    def loss(out, batch: Batch):
        weights = reduce(batch)
        losses, statistics = policy_loss(
            out.logprob,
            batch.advantages,
            old_logprobs=batch.old_logprobs,
            ref_logprobs=batch.ref_logprobs,  # for its statistic where beta is 0
            weights=weights,
            low=low,
            high=high,
            dual=dual,
            beta=beta,
        )
        if entropy_coef:
            losses = losses - entropy_coef * weights * out.entropy
        return losses, {"policy": statistics[None]}

    return Loss(
        loss,
        outputs=("logprob", "entropy") if entropy_coef else ("logprob",),
        live=every_token if beta or entropy_coef else with_advantage,
        reads=("ref_logprobs",) if beta else (),
    )


def clipped_rollouts(*, low: float, high: float, reduce: Callable = rollout_mean) -> Loss:
    """The clipped surrogate with one ratio per rollout, the geometric mean of its tokens' (arXiv:2507.18071, eq. 5-7).

    ratio[b] = exp(mean over its tokens of logprob - old_logprobs)
    """
    _require_clip("clipped_rollouts", low, high)

    def loss(out, batch: Batch):
        old = out.logprob.detach() if batch.old_logprobs is None else batch.old_logprobs
        log_ratio = batch.to_tokens(batch.rollout_mean(out.logprob - old))
        losses, statistics = policy_loss(
            log_ratio,
            batch.advantages,
            old_logprobs=torch.zeros_like(log_ratio),
            weights=reduce(batch),
            low=low,
            high=high,
        )
        return losses, {"policy": statistics[None]}

    return Loss(loss, scope="rollout", live=with_any_advantage)


def truncated(*, low: float, high: float, reduce: Callable = token_mean) -> Loss:
    """Log-probs weighted by the truncated importance ratio, which carries no gradient (arXiv:2506.13585, eq. 4-5).

        loss = -clip(ratio, 1 - low, 1 + high) A logprob

    Unlike under clipping, every token keeps a gradient.
    """
    _require_clip("truncated", low, high)

    def loss(out, batch: Batch):
        old = out.logprob if batch.old_logprobs is None else batch.old_logprobs
        ratio = (out.logprob - old).exp().detach()
        weight = ratio.clamp(1 - low, 1 + high)
        statistics = {
            "ratio": ratio,
            "clipped_low": (ratio < weight).float(),
            "clipped_high": (ratio > weight).float(),
        }
        return -weight * batch.advantages * out.logprob * reduce(batch), statistics

    return Loss(loss, live=with_advantage)


def negative_logprob(*, reduce: Callable = token_mean) -> Loss:
    """Maximum likelihood of the batch's tokens, weighted by their advantages: -A logprob."""

    def loss(out, batch: Batch):
        return -out.logprob * batch.advantages * reduce(batch), {"nll": -out.logprob}

    return Loss(loss, live=with_advantage)


def squared_value(*, clip: float = math.inf, reduce: Callable = token_mean) -> Loss:
    """Half the squared error of the value head to the returns, clipped around the old values (arXiv:2005.12729, 3).

    loss = max((value - returns)^2, (clip(value, values - clip, values + clip) - returns)^2) / 2
    """
    require("squared_value", "clip", clip, clip > 0, "a number > 0; inf bounds nothing")

    def loss(out, batch: Batch):
        near = torch.clamp(out.value, batch.values - clip, batch.values + clip)
        error = torch.maximum((out.value - batch.returns).square(), (near - batch.returns).square()) / 2
        return error * reduce(batch), {"value_loss": error}

    return Loss(loss, outputs=("value",), reads=("values",))


def summed(first: Loss, second: Loss, coefficient: float) -> Loss:
    """first + coefficient second, in one pass over the model: a policy's loss and that of a head on its trunk."""
    require("summed", "coefficient", coefficient, 0 <= coefficient < math.inf, WEIGHT)

    def loss(out, batch: Batch):
        (one, one_statistics), (two, two_statistics) = first(out, batch), second(out, batch)
        return one + coefficient * two, {**one_statistics, **two_statistics}

    outputs, reads = (tuple(dict.fromkeys(a + b)) for a, b in zip(_needs(first), _needs(second), strict=True))
    scope = max(first.scope, second.scope, key=("token", "rollout", "group").index)
    return Loss(loss, outputs=outputs, reads=reads, scope=scope)


def preference(*, beta: float, label_smoothing: float = 0.0) -> Loss:
    """Direct preference optimisation of pairs (arXiv:2305.18290, eq. 7; smoothing: conservative DPO).

        margin = beta [sum over chosen of (logprob - ref) - sum over rejected of (logprob - ref)]
        loss = -(1 - label_smoothing) log sigmoid(margin) - label_smoothing log sigmoid(-margin)

    A group holds one pair; its rollout with the larger reward is the chosen one.
    """
    require("preference", "beta", beta, 0 < beta < math.inf, "a finite number > 0")
    require("preference", "label_smoothing", label_smoothing, 0 <= label_smoothing <= 0.5, "in [0, 0.5]")

    def loss(out, batch: Batch):
        margin = beta * batch.pair_difference(batch.rollout_sum(out.logprob - batch.ref_logprobs))
        return _pairwise(batch, margin, label_smoothing)

    return Loss(loss, scope="group", reads=("ref_logprobs",))


def bradley_terry(*, centre: float = 0.0) -> Loss:
    """Negative log-likelihood of pairs under scores, the head at the last token (arXiv:2203.02155, eq. 1).

    loss = -log sigmoid(score of chosen - score of rejected) + centre (score of chosen + score of rejected)^2
    """
    require("bradley_terry", "centre", centre, 0 <= centre < math.inf, WEIGHT)

    def loss(out, batch: Batch):
        scores = batch.rollout_sum(torch.where(batch.last, out.score, 0.0))
        losses, statistics = _pairwise(batch, batch.pair_difference(scores), 0.0)
        if centre:
            both = 2 * batch.group_mean(scores)
            losses = losses + _at_pairs(batch, centre * both.square())
        return losses, statistics

    return Loss(loss, outputs=("score",), scope="group")


def _pairwise(batch: Batch, margin: Tensor, label_smoothing: float):
    """The loss of the pairs' margins (B,), each given to both of its rollouts, and how many are on the right side."""
    per_pair = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    seen = {"margin": margin.detach(), "pair_accuracy": (margin > 0).float()}
    return _at_pairs(batch, per_pair), {name: batch.at_last(value) for name, value in seen.items()}


def _at_pairs(batch: Batch, per_pair: Tensor) -> Tensor:
    """The mean over pairs of values that both rollouts of a pair have (B,), as one number per token (n,)."""
    return torch.where(batch.last, batch.to_tokens(per_pair), 0.0) / (2 * batch.counts.groups)


def _needs(loss: Loss) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return loss.outputs, loss.reads


def _require_clip(function: str, low: float, high: float) -> None:
    require(function, "low", low, low >= 0, BOUND)
    require(function, "high", high, high >= 0, BOUND)
