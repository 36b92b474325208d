"""Importance weights of tokens that were sampled by another engine, or policy, than the one that an update starts from.

    log weight of a token = old_logprob - rollout_logprob

old_logprobs are the model's own at the start of the update (the proximal policy), rollout_logprobs those that the
tokens were drawn with (the behaviour policy). A weight multiplies the surrogate of a loss; what KL and entropy terms
say of the policy does not depend on who sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fuserl.engine.batch import Batch
from fuserl.kernels.surrogates import Truncate, Within


@dataclass(frozen=True)
class Importance:
    """How a loss weighs what it was given: what a weight may be, and of what it is the weight."""

    bounds: Truncate | Within
    scope: str = "token"  # as of a loss: what must be seen together
    log_weights: Callable | None = None  # (Batch, old - rollout (n,)) -> (n,); None for the tokens' own

    def of_tokens(self, batch: Batch, old: Tensor) -> dict:
        """Arguments of policy_loss for tokens whose log-probs at the start of the update are `old` (n,)."""
        if self.log_weights is None:
            return {"rollout_logprobs": batch.rollout_logprobs, "importance": self.bounds}
        return self.of_rollouts(batch, old)

    def of_rollouts(self, batch: Batch, old: Tensor) -> dict:
        """The same where policy_loss is given no old_logprobs of tokens."""
        gap = old - batch.rollout_logprobs
        return {
            "log_weights": gap if self.log_weights is None else self.log_weights(batch, gap),
            "importance": self.bounds,
        }


def token_importance(bounds: Truncate | Within) -> Importance:
    """A weight per token: truncated importance sampling with Truncate(most), IcePop (arXiv:2510.18855) with Within."""
    return Importance(bounds)


def rollout_importance(bounds: Truncate | Within) -> Importance:
    """A weight per rollout, the product of its tokens': right on average without bounds, and of large variance."""
    return Importance(bounds, "rollout", lambda batch, gap: batch.to_tokens(batch.rollout_sum(gap)))


def mean_importance(bounds: Truncate | Within) -> Importance:
    """A weight per rollout, the geometric mean of its tokens', so that its size does not grow with the length."""
    return Importance(bounds, "rollout", lambda batch, gap: batch.to_tokens(batch.rollout_mean(gap)))
