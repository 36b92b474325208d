"""Keys and values of the rollouts being decoded, in storage allocated once, and the layout that reads and writes it.

A pass of the model always runs the same number of rows, whatever is in them (a GEMM's result for one row may change
with the number of rows beside it); attention of one row reads a stretch of keys whose length depends on that row only.
So a rollout gets the same bits alone and among others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.kernels.tree_layout import Scores, dense, explicit

_STRETCH = 64  # keys are read in multiples of this many columns
PROMPT_BLOCK = 16  # queries of a prompt answered together: positions 0..15, 16..31, ...


class KVCache:
    """Keys and values (slots, Hkv, columns, D) of every layer; a slot holds one text, column p its position p.

    Args:
        slots: texts held at once.
        columns: tokens of the longest one.
    """

    def __init__(self, slots: int, columns: int):
        self.slots = slots
        self.columns = -(-columns // _STRETCH) * _STRETCH
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Storage of one layer, allocated at first use in the dtype and on the device of `like` (1, Hkv, L, D)."""
        if index not in self.layers:
            shape = (self.slots, like.shape[1], self.columns, like.shape[3])
            self.layers[index] = (like.new_zeros(shape), like.new_zeros(shape))
        return self.layers[index]

    def copy(self, source: KVCache, slot: int, to: list[int], start: int, stop: int) -> None:
        """Copies columns start..stop of one slot of `source` (this or another cache) into the slots `to` of this."""
        for index, stored in source.layers.items():
            for mine, other in zip(self.layer(index, stored[0]), stored, strict=True):
                mine[to, :, start:stop] = other[slot, :, start:stop]


class Rows:
    """One pass over token rows: row i is the token of slot[i] at position[i]; rows beyond these are padding.

    Args:
        cache: where keys and values are kept.
        slot: (n,) int64 on the host; rows of one slot stand together.
        position: (n,) int64 on the host, rising within a slot.
        block: rows of one slot answered together, from multiples of it on: 1 to decode, `PROMPT_BLOCK` for prompts.
        device: of the model.
    """

    def __init__(self, cache: KVCache, slot: Tensor, position: Tensor, block: int, device: torch.device):
        self.cache = cache
        self.slot, self.position = slot.to(device), position.to(device)
        self.served: set[int] = set()
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self._stretches = list(self._plan(slot, position, block, device))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
        """Stores the rows' keys and values, then lets each row see its slot up to its own position."""
        if query.shape[0] != 1:
            raise ValueError(f"attend: query must have batch 1; got {tuple(query.shape)}. Give input_ids (1, rows)")
        self.served.add(layer)
        keys, values = self.cache.layer(layer, key)
        n = len(self.slot)
        keys[self.slot, :, self.position] = key[0, :, :n].transpose(0, 1)
        values[self.slot, :, self.position] = value[0, :, :n].transpose(0, 1)
        out = torch.zeros_like(query)
        for stretch, (width, slots, row, filled) in enumerate(self._stretches):
            answer = self._answer(query, keys[slots, :, :width], values[slots, :, :width], stretch, scores)
            out[0, :, row[filled]] = answer[filled].transpose(0, 1)
        return out

    def _answer(self, query: Tensor, keys: Tensor, values: Tensor, stretch: int, scores: Scores) -> Tensor:
        """Attention of one stretch's blocks, (U, block, H, D); query heads are folded into rows of their key head."""
        width, _, row, _ = self._stretches[stretch]
        (blocks, block), heads, kv_heads = row.shape, query.shape[1], keys.shape[1]
        asked = query[0][:, row].transpose(0, 1).reshape(blocks, kv_heads, -1, query.shape[3])
        mask = self._masks.get((stretch, scores.window))
        if mask is None:
            behind = self.position[row][:, None, :, None] - torch.arange(width, device=row.device)
            mask = behind >= 0 if scores.window is None else (behind >= 0) & (behind < scores.window)
            mask = self._masks[stretch, scores.window] = mask.repeat(1, 1, heads // kv_heads, 1)
        # torch's CPU attention gives a batch element other bits beside others than alone; the plain products do not.
        attend = explicit if query.device.type == "cpu" else dense
        return attend(asked, keys, values, mask, scores).view(blocks, heads, block, -1).transpose(1, 2)

    def _plan(self, slot: Tensor, position: Tensor, block: int, device: torch.device):
        """Per stretch of keys: (width, slots (U,) or all of them, rows (U, block), which of these are of this pass)."""
        unit = slot * self.cache.columns + position // block
        units, member = torch.unique_consecutive(unit, return_inverse=True)
        row = torch.zeros(len(units), block, dtype=torch.int64)
        filled = torch.zeros(len(units), block, dtype=torch.bool)
        row[member, position % block] = torch.arange(len(slot))
        filled[member, position % block] = True
        holder = units // self.cache.columns
        width = ((units % self.cache.columns) * block // _STRETCH + 1) * _STRETCH
        for w in width.unique().tolist():
            here = (width == w).nonzero()[:, 0]
            every = torch.equal(holder[here], torch.arange(self.cache.slots))
            slots = slice(None) if every else holder[here].to(device)
            yield w, slots, row[here].to(device), filled[here].to(device)
