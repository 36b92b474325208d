"""Advantage of each rollout from how it compares with every other of its group, without a score of its own.

    A[b] = (sum_j margins[b, j] / n) / sqrt(sum over the group of margins^2 / (2 n (n - 1)) + eps)

For margins[i, j] = r[i] - r[j] this is (r - mean) / std, of n - 1 degrees of freedom.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.kernels.group_ranks import check_group
from fuserl.kernels.segment_sum import segment_sum

__all__ = ["pair_advantage"]


def pair_advantage(
    margins: Tensor, group: Tensor | None = None, *, scale: bool = True, eps: float = 1e-6, backend: str | None = None
) -> Tensor:
    """Advantage of each rollout from judged margins between the members of its group.

        A[b] = (sum_j margins[b, j] / n) / sqrt(sum over the group of margins^2 / (2 n (n - 1)) + eps)

    Args:
        margins: (G, K, K) float32 or float64, by how much member i of group g is better than j, negative where it is
            worse; margins[g, j, i] = -margins[g, i, j] makes advantages sum to 0. With `group` (B, M), for each rollout
            the margins over others of its group in any order, 0 where there are fewer than M or a pair was not judged.
        group: (B,) int64 in [0, B): equal for rollouts of one prompt. Ids outside give wrong numbers.
        scale: False for the numerator alone.
        eps: added under the root.
        backend: of `segment_sum`.

    Returns:
        (G, K), or (B,), of margins' dtype, without gradient. A cycle of equal margins, and a group without any, get
        exact zeros; NaN shows in its group.

    Raises:
        ValueError: on a wrong shape, dtype or device.

    Memory: margins in float64. Source: Think-RM (arXiv:2505.16265). Sibling: `group_advantage`.
    """
    square = margins.dim() == 3 and margins.shape[1] == margins.shape[2]
    if not (square if group is None else margins.dim() == 2) or margins.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"pair_advantage: margins must be (G, K, K), or (B, M) with group, float32 or float64; got "
            f"{tuple(margins.shape)} {margins.dtype}. Give a square of margins per group, or a row per rollout."
        )
    wide = margins.double()
    above, squares = wide.sum(-1), wide.square().sum(-1)
    if group is None:
        n, spread = float(max(margins.shape[1], 1)), squares.sum(1, keepdim=True)
        pairs = max(2 * n * (n - 1), 1.0)
    else:
        check_group("pair_advantage", group, len(margins), margins.device)
        order = group.argsort(stable=True)
        offsets = torch.searchsorted(group[order], torch.arange(len(group) + 1, device=group.device))
        n = offsets.diff()[group].double()
        spread, pairs = segment_sum(squares[order], offsets, backend=backend)[group], (2 * n * (n - 1)).clamp(min=1)
    above = above / n
    found = torch.where(spread == 0, 0.0, above / (spread / pairs + eps).sqrt()) if scale else above
    return found.to(margins.dtype)
