"""Statistics of an update, summed on the device and read once."""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.engine import mismatch, ranks
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

    def agreed(self, **totals: Tensor) -> None:
        """Add scalars that every rank has alike: they count once."""
        if ranks.first():
            self.add(**totals)

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

    def _join(self) -> None:
        """Bring in what the other ranks have, in place of what this one has alone."""
        if ranks.world() == 1:
            return
        kinds = (self._totals, self._sums, self._counts)
        own = [{name: float(value) for name, value in kind.items()} for kind in kinds]
        rows = [torch.cat(self._policy).tolist() if self._policy else [], [x.tolist() for x in self._mismatch]]
        *several, chunks, compared = zip(*ranks.everyones([*own, *rows]), strict=True)
        for kind, parts in zip(kinds, several, strict=True):
            kind.clear()
            for name, value in (pair for part in parts for pair in part.items()):
                kind[name] = kind.get(name, 0) + torch.tensor(value, dtype=torch.float64)
        self._policy = [torch.tensor(part) for part in chunks if part]
        self._mismatch = [torch.tensor(x, dtype=torch.float64) for part in compared for x in part]

    def means(self) -> dict[str, float]:
        """Every statistic by name, of all ranks, NaN where nothing was counted; the one wait for the device."""
        self._join()
        found = {name: total / max(self.steps, 1) for name, total in self._totals.items()}
        found |= {name: total / self._counts[name] for name, total in self._sums.items()}
        if self._mismatch:
            found |= mismatch.named(mismatch.merged(torch.stack(self._mismatch)))
        if self._policy:
            found |= policy_loss.named(policy_loss.merged(torch.cat(self._policy)))
        values = torch.stack([torch.as_tensor(value).float().cpu() for value in found.values()]) if found else []
        return dict(zip(found, values.tolist() if found else [], strict=True))
