"""The tokens that sampling could have drawn, listed so that training can renormalise over the same ones.

kept = {v: logits[v] >= cut}, the cut that `sample` draws under
sample's logprob = linear_logprob(..., allowed=kept(...)).logprob
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fuserl.kernels.sample import drawn, weight_bits

__all__ = ["kept"]


def kept(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The tokens that temperature, top-k, top-p and min-p left in each row of logits, by the very rule of `sample`.

    Without a cut these are all tokens, at many numbers a row: leave `allowed` out instead.

    Args:
        logits, temperature, top_k, top_p, min_p, backend: as `sample` is given them. A row of temperature 0 keeps all
            tokens, as its log-prob is of all.

    Returns:
        (ids, offsets), the form of `allowed`: (M,) int64 on logits' device, rising within a row, beside (N + 1,) int64
        on the host; row n kept ids[offsets[n] : offsets[n + 1]]. Tokens that `sample` never draws, less likely than
        the likeliest by 2^-34 or more, are no part of it.

    Raises:
        ValueError: as `sample` does.

    Memory: a bool per logit. On a GPU the lengths of the lists are waited for. Siblings: `sample`; `linear_logprob`.
    """
    nobody = torch.zeros(logits.shape[:1], dtype=torch.int64, device=logits.device)  # whose draw is not looked at
    _, numbers = drawn(logits, temperature, (top_k, top_p, min_p), 0, nobody, nobody, backend)
    t = torch.as_tensor(temperature, dtype=torch.float32, device=logits.device)
    weighing = logits.amax(-1).float() - (weight_bits(logits.shape[1]) + 2) * math.log(2) * t
    cut = torch.where(t == 0, -torch.inf, numbers[2].maximum(weighing)).clamp_min(torch.finfo(torch.float32).min)
    left = logits >= cut[:, None]
    offsets = torch.zeros(len(logits) + 1, dtype=torch.int64)
    offsets[1:] = left.sum(1).cumsum(0)
    return left.nonzero()[:, 1], offsets
