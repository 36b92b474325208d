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


def trl():
    """SFTTrainer's call of TRL's head."""
    utils = importlib.import_module("trl.trainer.utils")
    results = []
    for patched, dtype in ((False, torch.float64), (False, torch.float32), (True, torch.float32)):
        model = made(dtype, patched)
        utils.add_fused_lm_head(model)
        options = {"fused_lm_head": True, "num_items_in_batch": items()}
        if not patched:
            with pytest.MonkeyPatch.context() as patch:
                if dtype == torch.float64:
                    patch.setattr(utils, "_ChunkedLogProbFunction", trl_runs.Definition)
                results.append(whole(model, **options))
            continue
        importlib.import_module("fuserl.trainers.trl").patch()
        loss = model(**sliced(), **options).loss
        loss.backward()
        loss = loss.detach().clone()
        dist.all_reduce(loss)
        results.append(([loss], gradients(model, total=True)))
    true, plain, got = results
    same(got, true, plain)


def test_trl():
    rival("trl", "trl.trainer.utils")
    on_ranks(RANKS, trl)


def packed():
    """Texts in one row: ids, positions, and the token after each, as verl and OpenRLHF roll them."""
    ids = torch.randint(3, 64, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(2))
    return ids, torch.cat([torch.arange(length) for length in LENGTHS])[None], ids.roll(-1, 1)


def weighed(logprob, entropy):
    """A loss that every rank has whole."""
    weight = torch.linspace(-1, 1, logprob.numel(), dtype=logprob.dtype).view_as(logprob)
    return (weight * logprob + 0.1 * entropy).sum()


def scored_by_verl(model, backend, ids, positions, labels):
    """Log-probs and entropies of a row, as verl's engine takes them with its fused heads and without."""
    if backend == "logits":
        logits = model(input_ids=ids, position_ids=positions).logits.squeeze(0) / 0.8
        functions = importlib.import_module("verl.utils.torch_functional")
        return functions.logprobs_from_logits(logits, labels[0], inplace_backward=False), functions.entropy_from_logits(
            logits
        )
    forward = getattr(
        importlib.import_module("verl.models.transformers.dense_common"), f"forward_with_{backend}_backend"
    )
    found = forward(
        model, ids, None, positions, shift_labels=labels, temperature=0.8, return_dict=True, use_cache=False
    )
    return found.log_probs.view(-1), found.entropy.view(-1)


def verl(backend):
    """Ulysses: verl's slices, and its gather of what the slices gave."""
    verl_losses()
    importlib.import_module("fuserl.trainers.verl").unpatch()  # importing it has patched
    wholes = []
    for dtype in (torch.float64, torch.float32):
        model = made(dtype)
        model.set_attn_implementation("alone")
        found = scored_by_verl(model, "torch" if backend == "triton" else backend, *packed())
        weighed(*found).backward()
        wholes.append((found, {name: p.grad for name, p in model.named_parameters()}))
    importlib.import_module("fuserl.trainers.verl").patch()
    ulysses = importlib.import_module("verl.utils.ulysses")
    ulysses.set_ulysses_sequence_parallel_group(dist.group.WORLD)
    ids, positions, labels = packed()
    ids, positions, padding = ulysses.ulysses_pad_and_slice_inputs(ids, positions, sp_size=RANKS)
    labels = ulysses.ulysses_pad_and_slice_inputs(labels, sp_size=RANKS)[0]
    model = made()
    found = [
        ulysses.gather_outputs_and_unpad(x, gather_dim=0, unpad_dim=0, padding_size=padding)
        for x in scored_by_verl(model, backend, ids, positions, labels)
    ]
    weighed(*found).backward()
    same((found, gradients(model, total=False)), *wholes)


@pytest.mark.parametrize("backend", ["torch", "triton", "logits"])
def test_verl(backend):
    rival("verl", "verl.utils.torch_functional")
    on_ranks(RANKS, verl, backend)


def in_torch(monkeypatch, packing):
    """flash_attn's functions that OpenRLHF packs with and gathers by, and no ring of its own."""

    def unpad(x, mask):
        indices = mask.flatten().nonzero().flatten()
        return x.flatten(0, 1)[indices], indices, F.pad(mask.sum(1).cumsum(0), (1, 0)), None, None

    def pad(x, indices, batch, length):
        return x.new_zeros(batch * length, *x.shape[1:]).index_copy(0, indices, x).view(batch, length, *x.shape[1:])

    functions = {
        "unpad_input": unpad, "pad_input": pad, "index_first_axis": lambda x, indices: x[indices],
        "rearrange": lambda x, _: x.flatten(0, 1), "all_gather": lambda x, group: Gathered.apply(x, 0),
        "update_ring_attn_params": lambda lengths: None,
    }  # fmt: skip
    for name, function in functions.items():
        monkeypatch.setattr(packing, name, function)


def ring():
    """OpenRLHF's actor with a ring of ranks: its slices of the packed samples, and its gather."""
    actors = openrlhf("openrlhf.models.actor")
    drop_in = importlib.import_module("fuserl.trainers.openrlhf")
    draw = torch.Generator().manual_seed(2)
    ids, mask = torch.randint(3, 64, (3, 7), generator=draw), torch.ones(3, 7, dtype=torch.int64)
    mask[0, :2] = mask[1, 6] = 0
    action = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 1, 1]])
    wholes = []
    for dtype in (torch.float64, torch.float32):
        model = made(dtype, slices=False)
        position = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        logp = (model(ids, attention_mask=mask, position_ids=position).logits / 0.8).log_softmax(-1)[:, 3:-1]
        found = logp.gather(-1, ids[:, 4:, None])[..., 0] * action, -(logp.exp() * logp).sum(-1) * action
        weighed(*found).backward()
        wholes.append((found, {f"model.{name}": p.grad for name, p in model.named_parameters()}))
    actor = actors.Actor(made(), temperature=0.8)
    actor.packing_samples = True
    with pytest.MonkeyPatch.context() as monkeypatch, drop_in.patch():
        in_torch(monkeypatch, sys.modules["openrlhf.models.ring_attn_utils"])
        logprob, output = actor(
            ids, action, mask, return_output=True, return_entropy=True, ring_attn_group=dist.group.WORLD
        )
        found = logprob, output.entropy[:, -3:] * action
        weighed(*found).backward()
    same((found, gradients(actor, total=False)), *wholes)


def test_openrlhf():
    openrlhf("openrlhf.models.actor")
    on_ranks(RANKS, ring)


def test_packed_rollouts_in_a_slice_are_refused():
    """They name every token of the input."""
    model = made(slices=False)
    attention.attach(model)
    given = attention.pack([torch.arange(3, 9)], torch.tensor([0]), torch.arange(20, 26), torch.tensor([0, 6])).inputs()
    given = {name: x[:, :6] if name in ("input_ids", "position_ids") else x for name, x in given.items()}
    with pytest.raises(ValueError, match="segments must describe the whole input; got 11 positions"):
        model(**given)


def test_grpo_of_ranks_that_share_a_sequence_is_refused(tmp_path, monkeypatch):
    """By TRL where its arguments ask for it, by us where a launcher does."""
    grpo = rival("trl", "trl.trainer.grpo_trainer")
    from accelerate import ParallelismConfig

    from fuserl.trainers.trl_grpo import FuserlGRPOTrainer

    parallel = ParallelismConfig(sp_size=2)
    with pytest.raises(ValueError, match="GRPOTrainer does not support sequence-dim parallelism"):
        trl_runs.sampled("GRPO", torch.float32, tmp_path, trainer=FuserlGRPOTrainer, parallelism_config=parallel)

    def launched(self):
        self.use_transformers_continuous_batching = False
        self.accelerator = SimpleNamespace(parallelism_config=parallel)

    monkeypatch.setattr(grpo.GRPOTrainer, "__init__", launched)
    with pytest.raises(ValueError, match="cp_size and sp_size must be 1, as packed rollouts are whole"):
        FuserlGRPOTrainer()
