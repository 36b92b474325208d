"""Sequences in slices on two ranks, as each host gives them to what is replaced: as on one rank that has them whole."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import trl_runs
from patched_models import defined
from ranks import on_ranks
from rivals import openrlhf, rival, verl_losses
from sequence_ranks import RANKS, Gathered, gradients, mine, same

from fuserl import attention
from fuserl.trainers import transformers as ours

LENGTHS = 8, 5, 4  # 17 tokens, which two ranks cannot share alike


def made(dtype=torch.float32, slices=True):
    model = trl_runs.model(dtype).train()
    if slices:
        model.set_attn_implementation("slices")
    return model


def rows():
    """Two rows of 12 tokens with labels of the second half: the first rank's slice has none but its last."""
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    return ids, ids.masked_fill(torch.arange(12) < 8, -100), torch.arange(12).expand(2, 12)


def sliced():
    """What accelerate and transformers give a rank under context and sequence parallelism."""
    ids, labels, positions = rows()
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return {"input_ids": mine(ids), "position_ids": mine(positions), "shift_labels": mine(shifted)}


def whole(model, **more):
    """Loss and gradients on one rank."""
    ids, labels, positions = rows()
    loss = model(input_ids=ids, labels=labels, position_ids=positions, **more).loss
    loss.backward()
    return [loss.detach()], {name: p.grad for name, p in model.named_parameters()}


def items():
    return (rows()[1][:, 1:] != -100).sum()


def context_parallel():
    """transformers' Trainer: each rank's share of the sum over all labels."""
    true, plain = (whole(wrap(made(dtype, False)), num_items_in_batch=items()) for wrap, dtype in BOTH)
    model = made()
    ours.patch(model)
    given = sliced()
    loss = model(**given, labels=given["shift_labels"], num_items_in_batch=items()).loss
    loss.backward()
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    same(([loss], gradients(model, total=True)), true, plain)


BOTH = (defined, torch.float64), (lambda model: model, torch.float32)


def ulysses():
    """transformers' own sum of each rank's mean, where one rank has no label."""
    from transformers.integrations.deepspeed import deepspeed_sp_compute_loss

    true, plain = (whole(wrap(made(dtype, False))) for wrap, dtype in BOTH)
    model = made()
    ours.patch(model)
    given = sliced()
    assert (given["shift_labels"] != -100).any() == bool(dist.get_rank())
    mesh = {"sp": SimpleNamespace(get_group=lambda: dist.group.WORLD)}
    setting = SimpleNamespace(sp_backend="torch", sp_size=RANKS)
    loss = deepspeed_sp_compute_loss(SimpleNamespace(torch_device_mesh=mesh), model, given, False, setting)
    loss.backward()
    same(([loss.detach()], gradients(model, total=False)), true, plain)


@pytest.mark.parametrize("run", [context_parallel, ulysses])
def test_transformers(run):
    on_ranks(RANKS, run)
