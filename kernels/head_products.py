"""The three matrix products of a vocabulary head over chunks of rows: logits, d_hidden, d_weight.

Products go through the vendor's library in float32 (float64 from float64 inputs): on GPU with float32 output of the
16-bit inputs; on CPU, which has no such product, by widening the weight a tile of the vocabulary at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TILE = 8192  # vocabulary rows widened at a time: 19 MB at D = 576, read back from cache


def default_chunk(hidden: Tensor, weight: Tensor) -> int:
    """Rows per chunk: enough for the products to run at full speed, few enough that one chunk of logits is small."""
    if hidden.device.type == "cpu":
        return 512  # below, d_weight's read and write per chunk dominates; above, nothing is gained
    return max(256, (512 << 20) // (4 * weight.shape[0]) // 128 * 128)


class HeadProducts:
    """Logits of chunks of (live) rows, and the accumulation of the gradients that come back."""

    def __init__(self, hidden, weight, rows, *, chunk, dtype, hidden_grad, weight_grad, grad_weight):
        self.hidden, self.weight, self.rows, self.dtype = hidden, weight, rows, dtype
        self.device_products = hidden.device.type != "cpu" and hidden.dtype != dtype
        self.widened = hidden.device.type == "cpu" and hidden.dtype != dtype
        self.buffer = hidden.new_empty(chunk, weight.shape[0], dtype=dtype)
        self.d_hidden = None
        if hidden_grad:
            self.d_hidden = torch.empty_like(hidden) if rows is None else torch.zeros_like(hidden)
        self.weight_grad = weight_grad or grad_weight is not None
        self.returns_weight = weight_grad and grad_weight is None
        self.d_weight = grad_weight

    def row_numbers(self, piece: slice) -> Tensor:
        """The rows of hidden that a slice of the live rows stands for."""
        if self.rows is not None:
            return self.rows[piece]
        return torch.arange(piece.start, piece.stop, device=self.hidden.device)

    def logits(self, piece: slice) -> Tensor:
        """(n, V) logits of a slice of the live rows, in the buffer."""
        hidden, out = self._hidden(piece), self.buffer[: piece.stop - piece.start]
        if self.device_products:
            return torch.mm(hidden, self.weight.T, out_dtype=self.dtype, out=out)
        if not self.widened:
            return torch.mm(hidden, self.weight.T, out=out)
        hidden = hidden.to(self.dtype)
        for tile, weight in self._tiles():
            out[:, tile] = hidden @ weight.T
        return out

    def gradient_buffers(self, piece: slice) -> tuple[Tensor, Tensor]:
        """The chunk's logits, and where their gradient goes: the same memory, or 16-bit memory for device products."""
        logits = self.buffer[: piece.stop - piece.start]
        return logits, torch.empty_like(logits, dtype=self.hidden.dtype) if self.device_products else logits

    def accumulate(self, gradient: Tensor, piece: slice, alive: Tensor | None) -> None:
        """Add the products of a chunk's logit gradient (n, V), whose rows are `alive` of the piece, or all of it."""
        if self.d_hidden is not None:
            self._write_hidden(self._times_weight(gradient), piece, alive)
        if self.weight_grad:
            hidden = self._hidden(piece)
            self._add_weight(gradient, hidden if alive is None else hidden[alive])

    def finished_weight(self) -> Tensor | None:
        """d_weight in weight's dtype; None when it was not asked for or went to grad_weight."""
        if not self.returns_weight:
            return None
        if self.d_weight is None:
            return torch.zeros_like(self.weight)
        return self.d_weight.to(self.weight.dtype)

    def _hidden(self, piece: slice) -> Tensor:
        return self.hidden[piece] if self.rows is None else self.hidden[self.rows[piece]]

    def _times_weight(self, gradient: Tensor) -> Tensor:
        if not self.widened:
            return gradient @ self.weight
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

    def _add_weight(self, gradient: Tensor, hidden: Tensor) -> None:
        if self.device_products:
            if self.d_weight is None:
                self.d_weight = torch.mm(gradient.T, hidden, out_dtype=self.dtype)
            else:
                torch.addmm(self.d_weight, gradient.T, hidden, out_dtype=self.dtype, out=self.d_weight)
        elif self.d_weight is None:
            self.d_weight = gradient.T @ hidden.to(self.dtype)
        else:
            self.d_weight.addmm_(gradient.T, hidden.to(self.dtype))

    def _tiles(self):
        for begin in range(0, len(self.weight), _TILE):
            tile = slice(begin, begin + _TILE)
            yield tile, self.weight[tile].to(self.dtype)
