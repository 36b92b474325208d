"""Drawing tokens: temperature, top-k, top-p, min-p, and one random stream per rollout.

p = softmax(logits / temperature), cut to the allowed tokens and renormalised
token = the first v with p_1 + ... + p_v > u,  u uniform in [0, 1) from the rollout's own stream
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits; the cuts apply in the order top_k, top_p, min_p, each to what is left.

    Args:
        temperature: divides the logits; 0 takes the largest logit.
        top_k: keep the k most likely tokens (and ties with the k-th); 0 keeps all.
        top_p: keep the fewest tokens whose probabilities reach this sum; 1 keeps all.
        min_p: keep tokens at least this times as likely as the likeliest; 0 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        for name, good, contract in (
            ("temperature", self.temperature >= 0, "be 0 (greedy) or positive"),
            ("top_k", self.top_k >= 0, "be 0 (off) or positive"),
            ("top_p", 0 < self.top_p <= 1, "lie in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "lie in [0, 1]"),
        ):
            if not good:
                raise ValueError(f"Sampling: {name} must {contract}; got {getattr(self, name)}. Change the setting")

    def draw(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """One token per row.

        Args:
            logits: (n, V), any float dtype.
            uniform: (n,) float64 in [0, 1).

        Returns:
            ids (n,) int64, and logprobs (n,) float32 under the distribution drawn from; for greedy, where that would be
            0 throughout, under the uncut distribution at temperature 1.
        """
        logits = logits.float()
        if self.temperature == 0:
            ids = logits.argmax(-1)
            return ids, logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(-1)
        if self.temperature != 1:
            logits = logits / self.temperature
        logits = self.cut(logits)
        logprobs = logits.log_softmax(-1)
        mass = logprobs.exp().cumsum(-1, dtype=torch.float64)
        # u < 1 in float64 keeps the product below the total, and so on a token that has some mass.
        target = uniform.to(mass) * mass[:, -1]
        ids = torch.searchsorted(mass, target[:, None], right=True)
        return ids[:, 0], logprobs.gather(-1, ids)[:, 0]

    def cut(self, logits: Tensor) -> Tensor:
        """Logits (n, V) with -inf where top_k, top_p or min_p forbid the token."""
        if 0 < self.top_k < logits.shape[-1]:
            kth = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p < 1:
            logits = self._nucleus(logits)
        if self.min_p > 0:
            logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + np.log(self.min_p), -torch.inf)
        return logits

    def _nucleus(self, logits: Tensor) -> Tensor:
        vocabulary, size = logits.shape[-1], min(1024, logits.shape[-1])
        lse = logits.logsumexp(-1, keepdim=True)
        while True:
            # A full sort is slow and seldom needed: look at the most likely tokens, at more of them if they fall short.
            top, ids = logits.topk(size, dim=-1)
            mass = (top - lse).exp()
            before = mass.cumsum(-1) - mass
            if size == vocabulary or bool((before[:, -1] >= self.top_p).all()):
                break
            size = min(size * 8, vocabulary)
        kept = top.masked_fill(before >= self.top_p, -torch.inf)
        kept[:, 0] = top[:, 0]
        return torch.full_like(logits, -torch.inf).scatter(-1, ids, kept)


def uniforms(seed: int, stream: int, member: int, count: int) -> np.ndarray:
    """The random numbers of one rollout, (count,) float64 in [0, 1): a function of the arguments and nothing else.

    Args:
        seed: of the run or step.
        stream: which prompt.
        member: which rollout of that prompt.
    """
    mask = 2**64 - 1
    key = np.array([seed & mask, stream & mask], dtype=np.uint64)
    # Members are 2^192 numbers apart on the counter, so that their streams never meet.
    counter = np.array([0, 0, 0, member & mask], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).random(count)
