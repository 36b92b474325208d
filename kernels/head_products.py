"""The three matrix products of a vocabulary head over chunks of rows: logits, d_hidden, d_weight.

    u = hidden @ weight.T + low @ up.T + bias           low = scale hidden @ down.T        x = u, or tanh(inner u)
    d_hidden = du @ weight + scale d_low @ down         d_low = du @ up                    d_bias = sum_n du[n]
    d_weight = du.T @ hidden        d_up = du.T @ low   d_down = scale d_low.T @ hidden

`down` (r, D) and `up` (V, r), the A and B of an adapter on the head, are optional; weight + scale up @ down is never
formed, and their products cost r / D of the head's.

The bias and the factor `inner` ride on the product; the tanh is one more pass over the chunk, in place. Products are of
float32 (float64 from float64 inputs): on GPU the vendor's, with float32 output of the 16-bit inputs; on CPU those of
`matmul`, or torch's, which widens a 16-bit weight a tile of the vocabulary at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fuserl.kernels.allowed import Allowed
from fuserl.kernels.matmul import matmul, native
from fuserl.kernels.vocabulary_shards import VocabularyShards

BUCKET = 64  # rows of every product where a row must not depend on how many there are
_TILE = 8192  # vocabulary rows widened at a time: 19 MB at D = 576, read back from cache


def default_chunk(hidden: Tensor, weight: Tensor) -> int:
    """Rows per chunk: enough for the products to run at full speed, few enough that one chunk of logits is small."""
    if hidden.device.type == "cpu":
        return 512  # below, d_weight's read and write per chunk dominates; above, nothing is gained
    return max(256, (512 << 20) // (4 * weight.shape[0]) // 128 * 128)


class Lora(NamedTuple):
    """An adapter on the head: down (r, D) and up (V, r), of any floating dtype, and its scale."""

    down: Tensor
    up: Tensor
    scale: float


def taken_rows(
    mask: Tensor | None, hidden: Tensor, weight: Tensor, chunk: int | None
) -> tuple[Tensor | None, int, int]:
    """The rows that the mask keeps, None for all; their number; how many of them run together."""
    rows = None if mask is None else mask.nonzero().squeeze(-1).to(hidden.device)
    count = len(hidden) if rows is None else len(rows)
    return rows, count, max(1, min(chunk or default_chunk(hidden, weight), count))


def pieces(begin: int, end: int, chunk: int) -> list[slice]:
    """The rows from begin to end, `chunk` at a time; fewer in the last."""
    return [slice(at, min(at + chunk, end)) for at in range(begin, end, chunk)]


def rows_alive(coefficients: Tensor, rows: Tensor | None) -> Tensor | None:
    """Those of `rows`, or of all, to which (K, N) coefficients give a gradient."""
    places = places_alive(coefficients, rows)
    if places is None:
        return rows
    return places if rows is None else rows[places]


def places_alive(coefficients: Tensor, rows: Tensor | None = None) -> Tensor | None:
    """Where among `rows`, or all, those stand to which (K, N) coefficients give a gradient; None for everywhere."""
    if coefficients.device.type != "cpu":  # elsewhere their number would have to be waited for
        return None
    alive = (coefficients if rows is None else coefficients[:, rows]).any(dim=0)
    return None if alive.all() else alive.nonzero().squeeze(-1)


def through_tanh(gradient: Tensor, x: Tensor, out: Tensor) -> None:
    """Write the gradient to u, `inner` apart, from that to x = tanh(inner u); out may be either."""
    torch.ops.aten.tanh_backward.grad_input(gradient, x, grad_input=out)


class HeadProducts:
    """Logits of chunks of (live) rows, and the accumulation of the gradients that come back.

    Args:
        rows: those of hidden that take part, (n,) int64; None for all.
        needs: whether d_hidden, d_weight, d_bias, d_down and d_up are wanted; as many as `gradients` is to return.
        bias, lora, inner: see above; inner None for x = u.
        allowed: lists of the tokens that keep their logits, for the rows that take part; None for all tokens.
        shards: where other ranks hold the rest of the vocabulary; d_hidden and d_down are then summed over them.
        batch_invariant: give every product BUCKET rows, zeros where there are fewer, so that a row of the logits and of
            d_hidden has the same bits whatever its neighbours; chunk is at most BUCKET then.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        rows: Tensor | None,
        *,
        chunk: int,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        lora: Lora | None = None,
        inner: float | None = None,
        allowed: Allowed | None = None,
        needs: Sequence[bool] = (),
        grad_weight: Tensor | None = None,
        shards: VocabularyShards | None = None,
        batch_invariant: bool = False,
    ):
        hidden_grad, weight_grad, bias_grad, down_grad, up_grad = (*needs, *[False] * 5)[:5]
        self.asked = len(needs)
        self.hidden, self.weight, self.rows, self.dtype, self.inner = hidden, weight, rows, dtype, inner
        self.factor = 1.0 if inner is None else inner
        self.bias = None if bias is None else bias.to(dtype) * self.factor
        self.d_bias = torch.zeros_like(self.bias) if bias_grad else None
        # Of few columns, so they are as precise as the accumulator wherever that costs no copy of a chunk.
        self.lora = None if lora is None else Lora(lora.down.to(dtype), lora.up.to(dtype), lora.scale)
        self.d_down = torch.zeros_like(self.lora.down) if down_grad else None
        self.d_up = torch.zeros_like(self.lora.up) if up_grad else None
        self.allowed = allowed
        self.device_products = hidden.device.type != "cpu" and hidden.dtype != dtype
        self.widened = hidden.device.type == "cpu" and hidden.dtype != dtype and not native(hidden.device, dtype)
        self.bucket = BUCKET if batch_invariant else 0
        self.buffer = hidden.new_empty(max(chunk, self.bucket), weight.shape[0], dtype=dtype)
        self.d_hidden, self.shards = None, shards
        if hidden_grad:
            precise = hidden.dtype if shards is None else dtype
            self.d_hidden = (torch.empty_like if rows is None else torch.zeros_like)(hidden, dtype=precise)
        self.weight_grad = weight_grad or grad_weight is not None
        self.returns_weight = weight_grad and grad_weight is None
        self.d_weight = grad_weight

    def row_numbers(self, piece: slice) -> Tensor:
        """The rows of hidden that a slice of the live rows stands for."""
        if self.rows is not None:
            return self.rows[piece]
        return torch.arange(piece.start, piece.stop, device=self.hidden.device)

    def logits(self, piece: slice, out: Tensor | None = None) -> Tensor:
        """(n, V) x of a slice of the live rows, in the buffer or in `out`."""
        count, hidden = piece.stop - piece.start, self._padded(self._hidden(piece))
        target, out = out, self.buffer[: len(hidden)] if out is None or len(hidden) > count else out
        if self.device_products:
            if self.inner is None:
                torch.mm(hidden, self.weight.T, out_dtype=self.dtype, out=out)
            else:
                scale = {"beta": 0, "alpha": self.factor, "out_dtype": self.dtype}
                torch.addmm(out, hidden, self.weight.T, **scale, out=out)
            out = out if self.bias is None else out.add_(self.bias)
        else:
            hidden = hidden.to(self.dtype)
            for tile, weight in self._tiles() if self.widened else [(slice(None), self.weight)]:
                bias = None if self.bias is None else self.bias[tile]
                matmul(hidden, weight.T, bias=bias, alpha=self.factor, out=out[:, tile])
        if self.lora is not None:
            matmul(self._low(hidden), self.lora.up.T, alpha=self.factor, out=out, add=True)
        out = out[:count] if self.inner is None else out[:count].tanh_()
        if self.allowed is not None:
            self.allowed.restrict(out, piece)
        return out if target is None or len(hidden) == count else target.copy_(out)

    def gradient_buffers(self, piece: slice) -> tuple[Tensor, Tensor]:
        """The chunk's logits, and where their gradient goes: the same memory, or 16-bit memory for device products."""
        logits = self.buffer[: piece.stop - piece.start]
        return logits, torch.empty_like(logits, dtype=self.hidden.dtype) if self.device_products else logits

    def accumulate(self, gradient: Tensor, piece: slice, alive: Tensor | None) -> None:
        """Add the products of a chunk's logit gradient (n, V), whose rows are `alive` of the piece, or all of it."""
        d_low, padded, count = None, self._padded(gradient), len(gradient)
        if self.lora is not None and (self.d_hidden is not None or self.d_down is not None):
            d_low = self._added(None, padded, self.lora.up).mul_(self.lora.scale)
        if self.d_hidden is not None:
            product = self._times_weight(padded)
            product = product if d_low is None else self._added(product, d_low, self.lora.down)
            self._write_hidden(product[:count], piece, alive)
        if self.d_bias is not None:
            self.d_bias += gradient.sum(0, dtype=self.dtype)
        if not self.weight_grad and self.d_down is None and self.d_up is None:
            return
        hidden = self._hidden(piece)
        hidden = hidden if alive is None else hidden[alive]
        if self.weight_grad:
            self._add_weight(gradient, hidden)
        if self.d_down is not None:
            matmul(d_low[:count].T, hidden, out=self.d_down, add=True)
        if self.d_up is not None:
            self._added(self.d_up, gradient.T, self._low(hidden))

    def gradients(self) -> tuple[Tensor | None, ...]:
        """d_hidden, d_weight (None where it went to grad_weight), d_bias, d_down, d_up, as far as they are wanted."""
        d_weight = None
        if self.returns_weight:
            zeros = self.d_weight is None
            d_weight = torch.zeros_like(self.weight) if zeros else self.d_weight.to(self.weight.dtype)
        d_hidden = self.d_hidden
        if self.shards is not None:
            d_hidden, self.d_down = map(self.shards.summed, (d_hidden, self.d_down))
        d_hidden = None if d_hidden is None else d_hidden.to(self.hidden.dtype)
        return (d_hidden, d_weight, self.d_bias, self.d_down, self.d_up)[: self.asked]

    def _hidden(self, piece: slice) -> Tensor:
        return self.hidden[piece] if self.rows is None else self.hidden[self.rows[piece]]

    def _padded(self, x: Tensor) -> Tensor:
        """The rows, and zeros up to as many as every product is to have."""
        return F.pad(x, (0, 0, 0, self.bucket - len(x))) if len(x) < self.bucket else x

    def _times_weight(self, gradient: Tensor) -> Tensor:
        if self.device_products and self.shards is not None:
            return torch.mm(gradient, self.weight, out_dtype=self.dtype)
        if not self.widened:
            return matmul(gradient, self.weight) if self.lora is None else self._added(None, gradient, self.weight)
        product = gradient.new_zeros(len(gradient), self.weight.shape[1])
        for tile, weight in self._tiles():
            product.addmm_(gradient[:, tile], weight)
        return product

    def _write_hidden(self, product: Tensor, piece: slice, alive: Tensor | None) -> None:
        if self.rows is None and alive is None:
            self.d_hidden[piece] = product
            return
        if self.rows is None:
            self.d_hidden[piece] = 0
        rows = self.row_numbers(piece)
        self.d_hidden[rows if alive is None else rows[alive]] = product.to(self.d_hidden.dtype)

    def _low(self, hidden: Tensor) -> Tensor:
        return matmul(hidden.to(self.dtype), self.lora.down.T, alpha=self.lora.scale)

    def _add_weight(self, gradient: Tensor, hidden: Tensor) -> None:
        self.d_weight = self._added(self.d_weight, gradient.T, hidden)

    def _added(self, total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
        """The total, or nothing, plus left @ right, in place and in the accumulator's dtype."""
        if not self.device_products:
            return matmul(left, right, out=total, add=total is not None)
        right = right.to(left.dtype)
        if total is None:
            return torch.mm(left, right, out_dtype=self.dtype)
        return torch.addmm(total, left, right, out_dtype=self.dtype, out=total)

    def _tiles(self):
        for begin in range(0, len(self.weight), _TILE):
            tile = slice(begin, begin + _TILE)
            yield tile, self.weight[tile].to(self.dtype)
