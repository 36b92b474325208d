"""A vocabulary head whose rows lie on several ranks: the statistics of each rank's logits, merged into those of all.

    w_r = e^(lse_r - lse),  lse = log sum_r e^lse_r    logprob = logprob_o + log w_o, with rank o the owner of the id
    entropy = sum_r w_r (entropy_r - log w_r)          sum_sq_prob = sum_r w_r^2 sum_sq_prob_r
    mean_logit = sum_r V_r mean_logit_r / V            mean_logprob = sum_r V_r (mean_logprob_r + log w_r) / V
    d_hidden = sum_r du_r @ weight_r

No term of logprob, entropy or sum_sq_prob has another sign than the rest, so nothing cancels. A chunk's statistics
cross in one gather and are merged in rank order, in float64, by every rank: all see the same bits. d_hidden is summed
once a call, in float32.

Rank r of the group gives V_r consecutive rows of the head, and of its bias, B and grad_weight, in rank order; V_r may
differ, and be 0. All give the same hidden states, ids of the whole vocabulary, outputs, chunk and mask. Outputs,
d_hidden and the gradients of params are those of the whole vocabulary on every rank, d_weight and d_bias those of its
rows.
linear_policy_loss evaluates token_loss on every rank, so it must be deterministic: one that draws random numbers draws
them before the call, or from a generator that is in the same state everywhere.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuserl.kernels import softmax_rows
from fuserl.kernels.registration import register

_CHUNK = 2048  # rows at a time on a GPU: from V_r, which may differ, ranks would choose different ones


@dataclass(frozen=True)
class VocabularyShards:
    """Which rows of the head each rank of a group holds, and what is exchanged between them."""

    sizes: Tensor  # (R,) int64, on the device of the tokens: reading them would wait
    group: str

    @functools.cached_property
    def ends(self) -> Tensor:
        """(R, 1) one past the last token of each rank."""
        return self.sizes.cumsum(0)[:, None]

    @functools.cached_property
    def vocabulary(self) -> Tensor:
        """The number of tokens, ()."""
        return self.sizes.sum()

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) places of the tokens among this rank's, 0 for those of other ranks; whether they are this rank's."""
        rank = _process_group(self.group).rank()
        places = ids - (self.ends[rank] - self.sizes[rank])
        own = (places >= 0) & (places < self.sizes[rank])
        return places.where(own, 0), own

    def statistics(
        self,
        x: Tensor,
        ids: Tensor,
        temperature: float,
        row_temperature: Tensor | None,
        kinds: int,
        backend: str,
        *,
        top: bool,
    ) -> Tensor:
        """(kinds, n) rows of softmax_rows.forward of the logits of all ranks, from this rank's x (n, V_r).

        Args:
            ids: (n,) int64 in [0, V).
            top: whether each row's maximum is needed: for is_top1, and where all of a rank's logits may be -inf.
        """
        if ids.device.type == "cpu" and not ((ids >= 0) & (ids < self.vocabulary)).all():
            raise ValueError(
                f"softmax_rows_forward: ids must lie in [0, {int(self.vocabulary)}); got {int(ids.min())} to "
                f"{int(ids.max())}. Map ignored tokens to any valid id and mask them."
            )
        # Of no logit, or none above -inf, the kernel makes NaN: such a rank has no weight.
        nothing = x.new_zeros(kinds, 1)
        nothing[2] = -torch.inf
        nothing[4:5] = -torch.inf if x.shape[1] else 0.0
        greatest = x.amax(1) if x.shape[1] and top else x.new_full((len(x),), -torch.inf)
        found = nothing.expand(-1, len(x))
        if x.shape[1]:
            found = softmax_rows.forward(x[None], self.local(ids)[0], temperature, row_temperature, kinds, backend)
            found = torch.where(greatest == -torch.inf, nothing, found) if top else found
        every = _gathered(torch.cat([found, greatest[None]]) if top else found.contiguous(), self.group)
        return self._merged(every.double(), ids, kinds, x.dtype)

    def _merged(self, every: Tensor, ids: Tensor, kinds: int, dtype: torch.dtype) -> Tensor:
        """The statistics of all logits, (kinds, n), from those of each rank, (R, kinds or one more, n) float64."""
        own = (ids < self.ends) & (ids >= self.ends - self.sizes[:, None])
        logprob, entropy, lse, lse_error, *more = every.unbind(1)
        # The greatest lse keeps its digits, and differences of them are exact: it is added last.
        greatest = lse.amax(0)
        gap = (lse - greatest) + lse_error
        log_sum = gap.exp().sum(0).log()
        log_share = gap - log_sum
        share = log_share.exp()
        rounded = (greatest + log_sum).to(dtype).double()
        rows = [
            torch.where(own, logprob + log_share, 0.0).sum(0),
            torch.where(share == 0, 0.0, share * (entropy - log_share)).sum(0),
            rounded,
            (greatest - rounded) + log_sum,
        ]
        if kinds > 4:
            mean_logit, sum_sq_prob, is_top1, mean_logprob, *top = more
            first = own & (is_top1 == 1)
            first = first & (top[0] == top[0].amax(0)) if top else first
            part = (self.sizes.double() / self.vocabulary)[:, None]
            rows.append((mean_logit * part).sum(0))
            rows += [(share.square() * sum_sq_prob).sum(0), first.any(0).double()]
            rows.append(torch.where(part == 0, 0.0, part * (mean_logprob + log_share)).sum(0))
        return torch.stack(rows).masked_fill(rounded.isnan() | ~own.any(0), torch.nan).to(dtype)

    def owned(self, ids: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
        """ids (n,) and coefficients (5, n) of softmax_rows.gradient on this rank: no id but its own."""
        places, own = self.local(ids)
        return places, torch.cat([coefficients[:4], coefficients[4:].where(own, 0.0)])

    def summed(self, partial: Tensor | None) -> Tensor | None:
        """The sum over the ranks, in place; of nothing, nothing."""
        if partial is None:
            return None
        torch.distributed.all_reduce(partial, group=_process_group(self.group))
        return partial


def sizes(op: str, group, ids: Tensor, mask: Tensor | None, size: int, *, agreed: list[int]) -> Tensor:
    """(R,) int64 rows of the head on each rank, of which this one has `size`.

    Args:
        group: a torch.distributed.ProcessGroup.
        agreed: numbers that must be the same on every rank, as must be the tokens (N,) and the mask.

    Raises:
        ValueError: where they are not; on a GPU, where looking would wait, under FUSERL_DEBUG=1 only.
    """
    return _vocabulary_sizes(ids, mask, size, agreed, op, group.group_name)


def chunk_of(chunk: int | None, group, ids: Tensor) -> int | None:
    """Rows at a time, which all ranks must agree on."""
    return chunk if group is None or ids.device.type == "cpu" else chunk or _CHUNK


def _sizes(ids: Tensor, mask: Tensor | None, size: int, agreed: Sequence[int], op: str, group: str) -> Tensor:
    kept = -1 if mask is None else mask.sum()
    if mask is not None and mask.device.type == "cpu":
        kept = int(kept)  # of a mask on the host; elsewhere reading it would wait
    own = [n[None] if isinstance(n, Tensor) else ids.new_full((1,), n) for n in (size, len(ids), kept, *agreed)]
    own.append((ids * torch.arange(1, len(ids) + 1, device=ids.device)).sum()[None])
    every = _gathered(torch.cat(own), group)
    if ids.device.type == "cpu" or os.environ.get("FUSERL_DEBUG"):
        different = (every[:, 1:] != every[:1, 1:]).any(1)
        if different.any():
            raise ValueError(
                f"{op}: every rank of group= must be given the same tokens, mask, outputs, chunk and need of d_hidden; "
                f"got other ones on {different.nonzero().flatten().tolist()} than on 0. Pass the group that cuts the "
                "vocabulary, not one that cuts the data."
            )
    return every[:, 0].contiguous()


def _fake_sizes(ids, _mask, _size, _agreed, _op, group):
    return ids.new_empty(_process_group(group).size())


_vocabulary_sizes = register(
    "vocabulary_sizes(Tensor ids, Tensor? mask, SymInt size, SymInt[] agreed, str op, str group) -> Tensor",
    _sizes,
    _fake_sizes,
)


def _gathered(own: Tensor, group: str) -> Tensor:
    """(R, *own.shape) of every rank."""
    group = _process_group(group)
    every = own.new_empty(group.size(), *own.shape)
    torch.distributed.all_gather(list(every), own, group=group)
    return every


def _process_group(name: str):
    return torch.distributed.distributed_c10d._resolve_process_group(name)
