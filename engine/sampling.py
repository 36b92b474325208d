"""Drawing tokens: how a policy draws them, and what names the random number of each.

The draws are those of `fuserl.sample`: a token depends on its logits, the settings, and its name alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fuserl.kernels.sample import check_settings, sample


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits; the cuts apply in the order top_k, top_p, min_p, each to what is left.

    Args:
        temperature: divides the logits; 0 takes the largest logit.
        top_k: keep the k most likely tokens (and ties with the k-th); 0 keeps all.
        top_p: keep the fewest tokens whose probabilities reach this sum; 1 keeps all.
        min_p: keep tokens at least this times as likely as the likeliest; 0 keeps all.
        seed: of the random numbers.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self):
        check_settings(self.temperature, self.top_k, self.top_p, self.min_p)

    def draw(self, logits: Tensor, streams: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """One token per row.

        Args:
            logits: (n, V), any float dtype.
            streams: (n,) int64, the name of each row's rollout: see `stream_of`.
            positions: (n,) int64, how many tokens of its completion come before.

        Returns:
            ids (n,) int64, and logprobs (n,) float32 under the distribution drawn from; for greedy, where that would be
            0 throughout, under the uncut distribution at temperature 1.
        """
        ids, logprobs, _ = sample(
            logits.float() if logits.dtype == torch.float64 else logits,
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            seed=self.seed, rollout_ids=streams, positions=positions,
        )  # fmt: skip
        return ids, logprobs


def stream_of(prompt: int, member: int) -> int:
    """The name of a rollout as 64 bits of an int64: a prompt's stream, of 32 bits, above its number in the group."""
    return ((prompt << 32 | member) + 2**63) % 2**64 - 2**63
