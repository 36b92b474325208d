"""Token losses: functions of (out, batch) that return one normalised loss per token, and its statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fuserl.engine.batch import Batch


def every_token(batch: Batch) -> None:
    """`live` of a loss that no token leaves without a gradient."""
    return None


def with_advantage(batch: Batch) -> Tensor:
    """`live` of a loss that vanishes, with its gradient, where the advantage is zero: (N,) bool."""
    return batch.advantages != 0


@dataclass(frozen=True)
class Loss:
    """A per-token loss, and what an update must know of it before calling it."""

    function: Callable  # (out, Batch) -> (loss (n,), statistics {name: (n,)})
    outputs: tuple[str, ...] = ("logprob",)  # of linear_policy_loss
    scope: str = "token"  # or "rollout"
    live: Callable = every_token  # (Batch) -> (N,) bool, or None for all: tokens whose gradient is not known to be zero
    reference: bool = False  # reads batch.ref_logprobs

    def __call__(self, out, batch: Batch):
        return self.function(out, batch)


def token_mean(batch: Batch) -> Tensor:
    """Weight 1 / N of each token: the average over all tokens of the batch (DAPO), 0-dim."""
    return torch.ones((), device=batch.tokens.device) / batch.counts.tokens


def rollout_mean(batch: Batch) -> Tensor:
    """Weight 1 / (B length) of each token: the average over rollouts of their average (GRPO), (n,)."""
    return 1.0 / (batch.counts.rollouts * batch.to_tokens(batch.lengths))


def clipped(
    *,
    low: float = 0.2,
    high: float = 0.2,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
    reduce: Callable = rollout_mean,
) -> Loss:
    """The clipped surrogate of PPO (arXiv:1707.06347, eq. 7), with a KL and an entropy term when weighted.

        loss = -min(ratio A, clip(ratio, 1 - low, 1 + high) A) + beta k3 - entropy_coef entropy
        ratio = exp(logprob - old_logprobs)        k3 = exp(ref - logprob) - (ref - logprob) - 1

    Without old_logprobs in the batch the update is on-policy: they are the current ones, detached, and the ratio is 1.
    """

    def loss(out, batch: Batch):
        old = out.logprob.detach() if batch.old_logprobs is None else batch.old_logprobs
        ratio = (out.logprob - old).exp()
        gain, bounded = ratio * batch.advantages, ratio.clamp(1 - low, 1 + high) * batch.advantages
        per_token = -torch.minimum(gain, bounded)
        statistics = {"ratio": ratio, "clipped": (bounded < gain).float()}
        if beta:
            statistics["kl"] = k3(out.logprob, batch.ref_logprobs)
            per_token = per_token + beta * statistics["kl"]
        if entropy_coef:
            statistics["entropy"] = out.entropy
            per_token = per_token - entropy_coef * out.entropy
        return per_token * reduce(batch), statistics

    return Loss(
        loss,
        outputs=("logprob", "entropy") if entropy_coef else ("logprob",),
        live=every_token if beta or entropy_coef else with_advantage,
        reference=bool(beta),
    )


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's non-negative estimator of KL(policy, reference) per token, for tokens drawn from the policy."""
    difference = ref_logprobs - logprobs
    return difference.exp() - difference - 1


def negative_logprob(*, reduce: Callable = token_mean) -> Loss:
    """Maximum likelihood of the batch's tokens, weighted by their advantages: -A logprob."""

    def loss(out, batch: Batch):
        return -out.logprob * batch.advantages * reduce(batch), {"nll": -out.logprob}

    return Loss(loss, live=with_advantage)
