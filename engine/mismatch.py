"""How far the log-probs that tokens were drawn with are from the model's own when the update starts.

    gap[n] = logprob[n] - rollout_logprob[n]              0, but for rounding, where one policy did both
    mismatch = mean |gap|        mismatch_max = max |gap|
    mismatch_ess = (sum w)^2 / (n sum w^2)                w = exp(gap) of n tokens
    mismatch_rollout_ess, the same of rollouts            w = exp(sum of a rollout's gaps)

The last two are effective sample sizes as a share (Kish, Survey Sampling, 1965): of so many of the samples an average
that is corrected by their importance weights is worth. Sums of weights are kept as logarithms, in float64, so that no
weight overflows; those of parts merge into those of the whole, however it was cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of tokens, then of rollouts: how many, log sum w and log sum w^2.
STATISTICS = ("absolute", "largest", "tokens", "log_w", "log_w_sq", "rollouts", "log_rollout_w", "log_rollout_w_sq")
_SUMS, _LOGS = [0, 2, 5], [3, 4, 6, 7]


def statistics(logprobs: Tensor, rollout_logprobs: Tensor, rollout: Tensor, rollouts: int) -> Tensor:
    """Statistics of the tokens whose two log-probs are known, for `merged` and `named`.

    Args:
        logprobs: (n,) of the model when the update starts; NaN leaves a token out.
        rollout_logprobs: (n,) as the tokens were drawn; NaN leaves a token out.
        rollout: (n,) int64, the rollout of each token; all of a rollout's tokens are in one part.
        rollouts: how many there are.

    Returns:
        (8,) float64, in the order of `STATISTICS`, on the tokens' device, which is not waited for.
    """
    gap = logprobs.detach().double() - rollout_logprobs.double()
    known = ~gap.isnan()
    absolute = torch.where(known, gap.abs(), 0.0)
    largest = torch.where(known, absolute, -torch.inf)
    whole = gap.new_zeros(rollouts).index_add(0, rollout, torch.where(known, gap, 0.0))
    seen = gap.new_zeros(rollouts).index_add(0, rollout, known.double()) > 0
    most = largest.amax() if len(gap) else gap.new_tensor(-torch.inf)
    return torch.stack([absolute.sum(), most, *_weighed(gap, known), *_weighed(whole, seen)])


def merged(parts: Tensor) -> Tensor:
    """The statistics (8,) of all tokens out of those of parts, (C, 8), C > 0."""
    whole = parts.amax(0)
    whole[_SUMS] = parts[:, _SUMS].sum(0)
    whole[_LOGS] = parts[:, _LOGS].logsumexp(0)
    return whole


def named(whole: Tensor) -> dict[str, Tensor]:
    """What a run logs of statistics (8,), by name, scalars; NaN where nothing was counted."""
    part = dict(zip(STATISTICS, whole.unbind(), strict=True))
    return {
        "mismatch": part["absolute"] / part["tokens"],
        "mismatch_max": torch.where(part["tokens"] > 0, part["largest"], torch.nan),
        "mismatch_ess": (2 * part["log_w"] - part["log_w_sq"]).exp() / part["tokens"],
        "mismatch_rollout_ess": (2 * part["log_rollout_w"] - part["log_rollout_w_sq"]).exp() / part["rollouts"],
    }


def _weighed(log_weights: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How many weights there are, log sum w, and log sum w^2."""
    kept = torch.where(known, log_weights, -torch.inf)
    return known.double().sum(), kept.logsumexp(0), (2 * kept).logsumexp(0)
