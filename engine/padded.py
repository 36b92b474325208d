"""One text a row, padded on the right: a forward for models that cannot be given packed rollouts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fuserl.engine.batch import Batch


@dataclass(frozen=True)
class Padded:
    """What one forward needs to score every trained token of B rollouts, as `Packed` has it, a prompt per rollout.

    Args:
        input_ids: (B, T) int64.
        attention_mask: (B, T) bool, False behind the end of a text.
        predictor: (N,) int64, where in the rows laid end to end the hidden state stands that predicts trained token n.
        reader: (N,) int64, where the one stands that has read it.
    """

    input_ids: Tensor
    attention_mask: Tensor
    predictor: Tensor
    reader: Tensor

    @property
    def position_ids(self) -> Tensor:
        """Where each token that is no padding stands in its text, laid end to end."""
        return (self.attention_mask.cumsum(1) - 1)[self.attention_mask]

    def inputs(self) -> dict:
        """Keyword arguments for the model's forward."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "use_cache": False}

    def to(self, device) -> Padded:
        """The same on `device`."""
        return Padded(*(x.to(device) for x in vars(self).values()))


def padded(batch: Batch) -> Padded:
    """Lays out the rollouts of a batch, each chunk of theirs behind its prompt."""
    chunks = [
        (batch.prompt_tokens[g], x) for g, each in zip(batch.group.tolist(), batch.as_read, strict=True) for x in each
    ]
    texts = [torch.cat(pair) for pair in chunks]
    ids = pad_sequence(texts, batch_first=True)
    mask = pad_sequence([torch.ones_like(text, dtype=torch.bool) for text in texts], batch_first=True)
    begins = [row * ids.shape[1] + len(prompt) for row, (prompt, _) in enumerate(chunks)]
    reader = torch.cat([torch.arange(at, at + len(x)) for at, (_, x) in zip(begins, chunks, strict=True)])
    if batch.place is not None:
        starts = batch.sizes.cumsum(0) - batch.sizes
        reader = reader[starts[batch.rollout] + batch.place]
    return Padded(ids, mask, reader - 1, reader)
