"""Statistics of policy_loss: sums and extremes over tokens, so that those of parts merge into those of the whole."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["EXTREMES", "STATISTICS", "merged", "named", "of_no_token"]

# Sums over tokens, then extremes: clipped_low counts tokens below their bound, clipped_high and clipped_dual those
# above it with w A > 0 and w A < 0; approx_kl sums ratio - 1 - log_ratio, an estimate of KL(old || policy); importance
# sums w, and importance_cut counts where a bound of it was met.
STATISTICS = (
    "tokens", "clipped_low", "clipped_high", "clipped_dual", "approx_kl", "kl", "importance", "importance_cut",
    "ratio", "ratio_sq", "ratio_max", "ratio_min",
)  # fmt: skip
EXTREMES = STATISTICS.index("ratio_max")  # where the sums end


def merged(statistics: Tensor) -> Tensor:
    """Statistics of all tokens out of those of C parts: sums added, extremes compared.

    Args:
        statistics: (C, 12) as `policy_loss` returned them, on any device, which is not waited for.

    Returns:
        (12,) of the same dtype; those of no token when C is 0.
    """
    if len(statistics) == 0:
        return of_no_token(statistics)
    extremes = statistics[:, EXTREMES].amax(0, keepdim=True), statistics[:, EXTREMES + 1].amin(0, keepdim=True)
    return torch.cat([statistics[:, :EXTREMES].sum(0), *extremes])


def named(statistics: Tensor) -> dict[str, Tensor]:
    """What a trainer logs, by name: means per token, extremes, and the effective sample size as a share.

        ess = (sum ratio)^2 / (tokens sum ratio^2)

    Args:
        statistics: (12,) as `policy_loss` or `merged` returned them, on any device, which is not waited for.

    Returns:
        ratio, ratio_max, ratio_min, clipped_low, clipped_high, clipped_dual, approx_kl, kl, importance, importance_cut
        and ess as scalar tensors; 0 where there is no token.
    """
    parts = dict(zip(STATISTICS, statistics.unbind(), strict=True))
    count = parts.pop("tokens")
    means = {name: value / count for name, value in parts.items() if name not in ("ratio_max", "ratio_min")}
    means["ess"] = means["ratio"].square() / means.pop("ratio_sq")
    every = means | {name: parts[name] for name in ("ratio_max", "ratio_min")}
    return {name: torch.where(count > 0, value, 0.0) for name, value in every.items()}


def of_no_token(like: Tensor) -> Tensor:
    """(12,) of an empty batch, of like's dtype and device: sums 0, the maximum -inf and the minimum +inf."""
    statistics = like.new_zeros(len(STATISTICS))
    statistics[EXTREMES].fill_(-torch.inf)
    statistics[EXTREMES + 1].fill_(torch.inf)
    return statistics
