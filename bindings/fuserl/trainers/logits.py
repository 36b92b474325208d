"""Numbers of logits that several hosts ask for under names of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.kernels.token_logprob import token_logprob

__all__ = ["entropy_from_logits"]


def entropy_from_logits(logits: Tensor, chunk_size: int | None = None) -> Tensor:
    """Entropy of softmax(logits) in nats by token_logprob.

    Args:
        logits: (..., V) of a floating dtype; -inf marks a token that cannot be drawn.
        chunk_size: a host's rows at a time; nothing is copied here, and no result depends on it.

    Returns:
        (...), float32 (float64 from float64).

    Raises:
        ValueError: as `token_logprob`.
    """
    return token_logprob(logits, torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device))[1]
