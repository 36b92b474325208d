"""Credit: functions of a batch that return one advantage per rollout (B,) or per token (N,), without gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.engine.batch import Batch
from fuserl.kernels.group_advantage import group_advantage


def standardized(batch: Batch) -> Tensor:
    """Reward minus the group's mean, over the group's standard deviation (GRPO, arXiv:2402.03300), (B,)."""
    return group_advantage(batch.rewards, batch.group)


def uniform(batch: Batch) -> Tensor:
    """Advantage one for every rollout: imitation, (B,)."""
    return torch.ones_like(batch.rewards)
