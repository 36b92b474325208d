"""Lists of the tokens that each row may choose from, as top-k, top-p or min-p left them: ragged, and applied to logits.

    row n may choose ids[offsets[n]], ..., ids[offsets[n + 1] - 1]; every other token's logit becomes -inf

So whatever is read of the row's softmax is of the distribution that it was drawn from, exactly: the same sum, over the
kept tokens only, as the sampler renormalised by.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Allowed:
    """One list of token ids per row.

    Args:
        ids: (M,) int64, the lists one after another, in any order within a row; on the logits' device.
        offsets: (N + 1,) int64 on the host: row n's list is ids[offsets[n] : offsets[n + 1]].
    """

    def __init__(self, ids: Tensor, offsets: Tensor):
        self.ids, self.offsets = ids, offsets
        # One length for all lists, from the host: nothing is waited for.
        self.rows = torch.arange(len(offsets) - 1, device=ids.device).repeat_interleave(
            offsets.diff().to(ids.device), output_size=len(ids)
        )

    def take(self, op: str, rows: Tensor | None) -> Allowed:
        """The lists of some rows, (n,) int64 on the host, in their order; None for all.

        Raises:
            ValueError: one of them is empty.
        """
        counts = self.offsets.diff() if rows is None else self.offsets.diff()[rows]
        if not counts.all():
            row = int((counts == 0).nonzero()[0])
            raise ValueError(
                f"{op}: allowed must list at least one token in every row that is computed; got none in row "
                f"{row if rows is None else int(rows[row])}. List all tokens where nothing was cut."
            )
        if rows is None:
            return self
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        shift = (self.offsets[rows] - offsets[:-1]).repeat_interleave(counts)
        index = torch.arange(int(offsets[-1])) + shift
        return Allowed(self.ids[index.to(self.ids.device)], offsets)

    def barred(self, vocabulary: int) -> Tensor:
        """(N, V) bool, True for what a row may not choose; nothing in a row without a list. For references."""
        barred = torch.ones((len(self.offsets) - 1, vocabulary), dtype=torch.bool, device=self.ids.device)
        barred[self.rows, self.ids] = False
        return barred & (self.offsets.diff() > 0).to(barred.device)[:, None]

    def restrict(self, x: Tensor, piece: slice) -> None:
        """Set to -inf whatever a slice of the rows, whose logits x (n, V) are, may not choose."""
        begin, end = int(self.offsets[piece.start]), int(self.offsets[piece.stop])
        at = self.rows[begin:end] - piece.start, self.ids[begin:end]
        kept = x[at]
        x.fill_(-torch.inf)[at] = kept


def check_form(op: str, allowed: tuple[Tensor, Tensor], ids: Tensor) -> None:
    """Raise ValueError unless `allowed` has the shapes, dtypes and devices of lists for the rows of ids."""
    if not isinstance(allowed, tuple | list) or len(allowed) != 2:
        raise ValueError(
            f"{op}: allowed must be (ids, offsets); got {type(allowed).__name__}. Pass what `kept` returns."
        )
    listed, offsets = allowed
    if listed.dim() != 1 or listed.dtype != torch.int64 or listed.device != ids.device:
        raise ValueError(
            f"{op}: allowed's ids must be (M,) int64 on {ids.device}; got {tuple(listed.shape)} {listed.dtype} on "
            f"{listed.device}. Join the rows' lists in one tensor."
        )
    if offsets.shape != (ids.numel() + 1,) or offsets.dtype != torch.int64 or offsets.device.type != "cpu":
        raise ValueError(
            f"{op}: allowed's offsets must be ({ids.numel() + 1},) int64 on the host; got {tuple(offsets.shape)} "
            f"{offsets.dtype} on {offsets.device}. Give each row of hidden its list."
        )


def check_lists(op: str, allowed: tuple[Tensor, Tensor], vocabulary: int) -> None:
    """Raise ValueError unless the offsets rise from 0 to the number of ids and, on a CPU, each of these is a token."""
    listed, offsets = allowed
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != len(listed) or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"{op}: allowed's offsets must rise from 0 to {len(listed)}, the number of its ids; got {first} to {last}. "
            "Take the cumulative sum of the lists' lengths."
        )
    if listed.device.type == "cpu" and len(listed):
        least, most = int(listed.amin()), int(listed.amax())
        if least < 0 or most >= vocabulary:
            raise ValueError(
                f"{op}: allowed's ids must lie in [0, {vocabulary}); got {least if least < 0 else most}. "
                "List tokens of the head's vocabulary."
            )
