"""Log-probabilities of whole completions, from hidden states, as the preference losses need them.

A loss of a group of completions (a chosen and a rejected one, or one alone) is a function of their log-probs:

    logp[b] = sum over the tokens of b of logprob, or their mean        loss = sum over groups of f(logp of its members)

A group's tokens are brought next to each other, so that linear_policy_loss sees whole groups, in three products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fuserl.kernels.head_outputs import requirer
from fuserl.kernels.linear_logprob import linear_logprob
from fuserl.kernels.linear_policy_loss import linear_policy_loss
from fuserl.kernels.segment_sum import segment_sum, to_tokens
from fuserl.kernels.softmax_rows import accumulator


class Completions:
    """Completions in groups, and the tokens of theirs that count.

    Args:
        op: the class in whose name to raise.
        hidden: (B, T, D); with `members` 2 the first half of B is chosen, the second rejected, pair by pair.
        target: (B, T) int64, ignore_index where there is no token.
        average: take the mean over a completion's tokens instead of the sum; of no token it is 0.
        nll_target: (B, T) int64, targets of the likelihood term; None for `target`.
    """

    def __init__(self, op, hidden, target, *, ignore_index, members, average, nll_target=None):
        require, shape = requirer(op), tuple(hidden.shape[:2])
        require(
            hidden.dim() == 3 and target.shape == shape, "_input must be (B, T, D) beside target (B, T)",
            f"{tuple(hidden.shape)} and {tuple(target.shape)}", "Leave the batch and the tokens two dimensions.",
        )  # fmt: skip
        require(
            len(target) % members == 0, "_input must hold as many chosen as rejected", f"{len(target)} completions",
            "Stack them: all chosen, then all rejected.",
        )  # fmt: skip
        require(
            nll_target is None or nll_target.shape == shape, f"nll_target must be {shape}",
            None if nll_target is None else tuple(nll_target.shape), "Pass one per token.",
        )  # fmt: skip
        self.hidden, self.members, self.groups = hidden, members, len(target) // members
        self.dtype, device = accumulator(hidden.dtype), hidden.device

        def in_groups(x):
            return x.reshape(members, self.groups, -1).transpose(0, 1)  # (groups, members, T)

        valid = in_groups(target != ignore_index)
        wanted = valid
        likely = valid if nll_target is None else in_groups(nll_target != ignore_index)
        if nll_target is not None:
            wanted = valid.clone()
            wanted[:, 0] |= likely[:, 0]
        wanted = wanted.cpu()  # on a GPU this waits, as the number of rows is needed
        if wanted.shape[-1]:
            wanted[:, 0, 0] |= ~wanted.flatten(1).any(1)  # a group without tokens has a loss, too
        places = in_groups(torch.arange(target.numel()).view(shape))[wanted].to(device)
        counts = wanted.sum(-1)
        self.offsets = _ends(counts.sum(1))
        self.group_offsets, self.segments = self.offsets.to(device), _ends(counts.flatten()).to(device)
        self.rows = places
        self.ids = target.flatten()[places]
        self.valid = (self.ids != ignore_index).to(self.dtype)
        self.ids = self.ids.where(self.valid != 0, 0)
        self.lengths = segment_sum(self.valid, self.segments).clamp(min=1) if average else None
        self.extra_ids, self.likely = None, self.valid
        if nll_target is not None:
            extra = nll_target.flatten()[places]
            self.likely = (extra != ignore_index).to(self.dtype)
            self.extra_ids = extra.where(self.likely != 0, 0)
        chosen = torch.zeros(self.groups, members, dtype=self.dtype, device=device)
        chosen[:, 0] = 1
        self.likely = self.likely * to_tokens(chosen.flatten(), self.segments, len(places))
        self.likely = self.likely / self.likely.sum().clamp(min=1)

    def logps(self, logprob: Tensor, rows: Tensor | None = None) -> Tensor:
        """(groups, members) of the log-probs of all rows, or of some, other completions being empty."""
        logprob = logprob * (self.valid if rows is None else self.valid[rows])
        if rows is not None:
            logprob = logprob.new_zeros(len(self.rows)).index_copy(0, rows, logprob)
        total = segment_sum(logprob, self.segments)
        return (total if self.lengths is None else total / self.lengths).view(self.groups, self.members)

    def reference(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(groups, members) by another model, whose states (B, T, D_r) stand at the same tokens; without gradient."""
        with torch.no_grad():
            rows = hidden.flatten(0, 1).index_select(0, self.rows)
            return self.logps(linear_logprob(rows, weight, self.ids, bias=bias).logprob.to(self.dtype))

    def loss(
        self, weight: Tensor, bias: Tensor | None, group_losses: Callable[[Tensor], Tensor], nll: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, differentiable in hidden, weight and bias; logps (groups, members) and the likelihood term.

        Args:
            group_losses: (groups, members) logps to one loss per group, already normalised; elementwise in groups.
            nll: weight of the mean negative log-probability of the chosen tokens, 0 for none.
        """
        spread = self.group_offsets.diff().clamp(min=1)
        name = "logprob" if self.extra_ids is None else "extra_logprob"

        def token_loss(out, rows):
            per_group = group_losses(self.logps(out.logprob, rows)) / spread
            losses = to_tokens(per_group, self.group_offsets, len(self.rows))[rows]
            return losses - nll * getattr(out, name) * self.likely[rows] if nll else losses

        hidden = self.hidden.flatten(0, 1).index_select(0, self.rows)
        terms = {"bias": bias, "extra_ids": self.extra_ids, "scope": "rollout", "offsets": self.offsets}
        outputs = ("logprob",) if self.extra_ids is None else ("logprob", "extra_logprob")
        loss, out, _ = linear_policy_loss(hidden, weight, self.ids, token_loss, outputs=outputs, **terms)
        return loss, self.logps(out.logprob), -(getattr(out, name) * self.likely).sum()


def sums_of_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, of: Tensor) -> Tensor:
    """(2,) sums of all logits, padding included, of some completions and of the rest.

    They are linear in the states, so none is needed: sum z = (sum of hidden) @ (sum over v of weight[v]) + n sum bias.

    Args:
        of: (B,) bool, the completions.
    """
    with torch.no_grad():
        members = torch.stack([of, ~of]).double()
        total = members @ (torch.stack([_column_sums(each) for each in hidden]) @ _column_sums(weight))
        if bias is not None:
            total = total + members.sum(1) * hidden.shape[1] * bias.sum(dtype=torch.float64)
    return total.to(accumulator(hidden.dtype))


def _column_sums(x: Tensor) -> Tensor:
    """(D,) float64 sums of (n, D); on a CPU, where such a sum copies its operand, by tiles that stay in the cache."""
    if x.device.type != "cpu":
        return x.sum(0, dtype=torch.float64)
    return torch.stack([tile.double().sum(0) for tile in x.split(512)]).sum(0)


def _ends(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
