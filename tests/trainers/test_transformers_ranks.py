"""Patched models on two ranks, under DDP and FSDP2, against one rank that has the whole batch in float64."""

import os

import pytest
import torch
import torch.distributed as dist
from patched_models import batch, defined, same, step, tiny
from ranks import on_ranks
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fuserl.trainers import transformers as ours

RANKS, ROWS = 2, 4


def rows():
    """Two rows for each rank."""
    given = {name: torch.cat([x, x.flip(0)])[:ROWS] for name, x in batch().items()}
    return given, (given["labels"][:, 1:] != -100).sum()


def part(given):
    """This rank's."""
    return {name: x.chunk(RANKS)[dist.get_rank()] for name, x in given.items()}


def whole(model, **more):
    given, items = rows()
    return step(model, given, num_items_in_batch=items, **more)


def gradients(model):
    """Every gradient put together, by its name unwrapped."""
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items()}


def trained(model, expected, dtypes, **more):
    """Two steps of a wrapped model, each as the whole batch has it."""
    given, items = rows()
    for _ in range(2):
        model.zero_grad()
        found = model(**part(given), num_items_in_batch=items, **more)
        assert found.logits is None
        (RANKS * found.loss).backward()
        loss = found.loss.detach().clone()
        dist.all_reduce(loss)
        same((loss, gradients(model)), *expected, *dtypes)


def ddp(tied, more):
    options = dict(tie_word_embeddings=tied)
    expected = whole(defined(tiny(dtype=torch.float64, **options))), whole(tiny(**options))
    model = tiny(**options)
    ours.patch(model)
    trained(DistributedDataParallel(model), expected, [], **more)


def sharded(tied, layers, head, reshard, mixed, more):
    options = dict(tie_word_embeddings=tied)
    expected = [whole(defined(tiny(dtype=torch.float64, **options))), whole(tiny(**options))]
    model = tiny(**options)
    ours.patch(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    given = {"mp_policy": policy} if mixed else {}
    if mixed:
        expected[1] = whole(tiny(dtype=torch.bfloat16, **options))
    for layer in model.model.layers if layers else []:
        fully_shard(layer, reshard_after_forward=reshard, **given)
    if head:
        fully_shard(model.lm_head, reshard_after_forward=reshard, **given)
    fully_shard(model, reshard_after_forward=reshard, **given)
    trained(model, expected, [torch.bfloat16] if mixed else [], **more)


def zero_3(tied, more):
    import deepspeed

    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(RANKS), "DS_ACCELERATOR": "cpu"}
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    options = dict(tie_word_embeddings=tied)
    true, plain = whole(defined(tiny(dtype=torch.float64, **options))), whole(tiny(**options))
    model = tiny(**options)
    ours.patch(model)
    settings = {
        "train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)[0]
    given, items = rows()
    assert model.lm_head.weight.numel() == 0, "the head is partitioned"
    loss = engine(**part(given), num_items_in_batch=items, **more).loss
    engine.backward(RANKS * loss)
    found = {name: deepspeed.utils.safe_get_full_grad(p) for name, p in model.named_parameters()}
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    same((loss, found), true, plain)


MORE = pytest.mark.parametrize("more", [{}, {"outputs": ("logprob",)}], ids=["loss", "outputs"])


@MORE
@pytest.mark.parametrize("tied", [False, True])
def test_ddp(tied, more):
    on_ranks(RANKS, ddp, tied, more)


@MORE
@pytest.mark.parametrize(("tied", "layers", "head", "reshard", "mixed"), [
    (False, False, False, True, False), (False, True, True, True, False), (False, True, True, False, False),
    (True, True, False, True, False), (False, True, True, True, True), (True, True, False, True, True),
])  # fmt: skip
def test_fsdp2(tied, layers, head, reshard, mixed, more):
    on_ranks(RANKS, sharded, tied, layers, head, reshard, mixed, more)


@MORE
@pytest.mark.parametrize("tied", [False, True])
def test_zero_3(tied, more):
    pytest.importorskip("deepspeed", reason="pip install deepspeed")
    on_ranks(RANKS, zero_3, tied, more)
