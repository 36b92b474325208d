"""TRL's passes over rollouts on two ranks, patched and packed, under DDP and FSDP2, against one rank with all rows."""

import contextlib
import importlib
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import trl_runs
from ranks import on_ranks
from rivals import rival
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

rival("trl", "trl.trainer.utils")
rival("trl", "trl.trainer.grpo_trainer")
RANKS, KEPT = 2, 5
ADVANTAGES = torch.tensor([[1.0], [-1.0], [0.5], [0.0]])  # the first rank has no idle row, the second has one


def rows(short):
    """Two completions of each of two prompts, padded as TRL has them; a rank has a prompt, the first a short one."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (4, 6 + KEPT), generator=draw)
    ids[1, :6], ids[3, :6] = ids[0, :6], ids[2, :6]
    mask = torch.ones_like(ids)
    mask[2:, :2] = 0
    mask[:2, :5] = 1 - short
    for row, length in enumerate((5, 2, 3, 4)):
        mask[row, 6 + length :] = 0
    return ids * mask, mask, ADVANTAGES


def made(dtype, packed, patched=True):
    """A model with TRL's head, and what scores rows by it."""
    from trl import GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    from fuserl import attention
    from fuserl.trainers.trl_grpo import FuserlGRPOTrainer

    if patched:
        importlib.import_module("fuserl.trainers.trl").patch()
    model = trl_runs.model(dtype)
    add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", "entropy"))
    kind = FuserlGRPOTrainer if packed else GRPOTrainer
    accelerator = SimpleNamespace(
        autocast=contextlib.nullcontext, is_main_process=False, num_processes=RANKS, gather=gathered
    )
    trainer = object.__new__(kind)
    trainer.accelerator, trainer._teaching = accelerator, None
    if packed:
        attention.attach(model)
        trainer._teaching = trainer._rows_that_teach(ADVANTAGES[:, 0].chunk(RANKS)[dist.get_rank()])
    return model, trainer._get_per_token_logps_and_entropies


def gathered(x):
    every = [torch.empty_like(x) for _ in range(RANKS)]
    dist.all_gather(every, x)
    return torch.cat(every)


def loss_of(score, model, ids, mask, advantages):
    logps, entropy, _ = score(model, ids, mask, KEPT, compute_entropy=True)
    return (advantages * (torch.linspace(-1, 1, KEPT) * logps + 0.1 * entropy)).sum()


def gradients(model):
    named = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in named.items()}


def train(packed, short, wrap):
    """Every gradient of the wrapped model is the mean over ranks; errors as those of TRL's own head on one rank."""
    with contextlib.ExitStack() as stack:
        for definition in trl_runs.defined():
            stack.enter_context(definition)
        model, score = made(torch.float64, False, patched=False)
        loss_of(score, model, *rows(short)).backward()
        true = gradients(model)
    model, score = made(torch.float32, False, patched=False)
    loss_of(score, model, *rows(short)).backward()
    plain = gradients(model)
    model, score = made(torch.float32, packed)
    wrapped = wrap(model)
    for _ in range(2):
        wrapped.zero_grad()
        loss_of(score, wrapped, *(x.chunk(RANKS)[dist.get_rank()] for x in rows(short))).backward()
        for name, got in gradients(wrapped).items():
            error, allowed = ((x - true[name]).norm() for x in (RANKS * got, plain[name]))
            assert error <= 2 * allowed + 8 * 2**-23 * true[name].norm(), f"{name}: {error} where {allowed}"


def ddp(packed, short):
    train(packed, short, DistributedDataParallel)


def sharded(packed, short):
    def wrap(model):
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)

    train(packed, short, wrap)


@pytest.mark.parametrize("short", [0, 1])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("run", [ddp, sharded])
def test_two_ranks(run, packed, short):
    """Also where the first rank's prompt is of one token, which takes TRL's pass."""
    on_ranks(RANKS, run, packed, short)
