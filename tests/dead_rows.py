"""Tokens that a loss says have no gradient have none, and leaving them out changes nothing of the others."""

from types import SimpleNamespace

import torch


def dropped(loss, batch, **outputs):
    """How many of a batch's tokens `live` leaves out; that they do not matter is asserted.

    `batch` has its advantages, and `outputs` are those that the loss asks for, (N,) each.
    """
    leaves = {name: x.detach().clone().requires_grad_() for name, x in outputs.items()}
    each = loss(SimpleNamespace(**leaves), batch)[0]
    whole = torch.autograd.grad(each.sum(), leaves.values(), allow_unused=True)
    live = loss.live(batch)
    rows = torch.arange(len(batch.tokens)) if live is None else live.nonzero().squeeze(-1)
    few = {name: x.detach()[rows].requires_grad_() for name, x in outputs.items()}
    part = loss(SimpleNamespace(**few), batch.take(rows))[0]
    alone = torch.autograd.grad(part.sum(), few.values(), allow_unused=True)
    assert torch.equal(part, each[rows])
    dead = torch.ones(len(batch.tokens), dtype=torch.bool).index_fill(0, rows, False)
    assert not each[dead].any()
    for ours, theirs in zip(alone, whole, strict=True):
        if theirs is not None:
            assert torch.equal(ours, theirs[rows]) and not theirs[dead].any()
    return int(dead.sum())
