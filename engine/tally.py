"""Statistics of an update, summed on the device and read once."""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.engine import mismatch
from fuserl.engine.batch import Batch
from fuserl.kernels import policy_loss


class Tally:
    """Sums of what an update's optimizer steps, micro-batches and chunks report."""

    def __init__(self):
        self.steps = 0  # optimizer steps
        self._totals: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._policy: list[Tensor] = []
        self._mismatch: list[Tensor] = []

    def add(self, **totals: Tensor) -> None:
        """Add scalars, which are averaged over optimizer steps."""
        for name, value in totals.items():
            self._totals[name] = self._totals.get(name, 0) + value

    def observe(self, statistics: dict[str, Tensor]) -> None:
        """Add statistics: (n,), averaged over the rows that are not NaN; or policy_loss's own (chunks, K)."""
        for name, values in statistics.items():
            if values.dim() == 2:
                self._policy.append(values.detach())
                continue
            known = ~values.isnan()
            self._sums[name] = self._sums.get(name, 0) + values.detach().nan_to_num(0.0).sum()
            self._counts[name] = self._counts.get(name, 0) + known.sum()

    def compare(self, logprobs: Tensor, batch: Batch) -> None:
        """Add how far the log-probs (n,) of a batch's tokens are from those that they were drawn with."""
        drawn = batch.rollout_logprobs.to(logprobs.device)
        rollout = batch.rollout.to(logprobs.device)
        self._mismatch.append(mismatch.statistics(logprobs, drawn, rollout, len(batch.group)))

    def means(self) -> dict[str, float]:
        """Every statistic by name, NaN where nothing was counted; the one wait for the device."""
        found = {name: total / max(self.steps, 1) for name, total in self._totals.items()}
        found |= {name: total / self._counts[name] for name, total in self._sums.items()}
        if self._mismatch:
            found |= mismatch.named(mismatch.merged(torch.stack(self._mismatch)))
        if self._policy:
            found |= policy_loss.named(policy_loss.merged(torch.cat(self._policy)))
        values = torch.stack([torch.as_tensor(value).float().cpu() for value in found.values()]) if found else []
        return dict(zip(found, values.tolist() if found else [], strict=True))
