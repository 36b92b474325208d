"""Heads that ZeRO-3 holds in parts, TRL's, verl's and transformers': the same numbers as where they are whole."""

import contextlib
import importlib

import patched_models
import pytest
import torch
import torch.distributed as dist
import trl_runs
import zero_3
from ranks import on_ranks
from rivals import rival, verl_losses
from tolerance import check, check_rows
from torch import nn

RANKS, FIELDS = 2, ("log_probs", "entropy")


def rows():
    """Ids with labels of a part, the first rank's fewer."""
    ids = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(1))
    return ids, ids.masked_fill(torch.arange(9) < torch.tensor([[7], [5], [2], [3]]), -100)


def loss_of(model, ids, labels):
    found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    return (torch.linspace(-1, 1, 8) * found.log_probs + 0.1 * found.entropy).sum()


def scored(dtype):
    """A model with TRL's head."""
    utils = importlib.import_module("trl.trainer.utils")
    model = trl_runs.model(dtype)
    utils.add_fused_lm_head(model, temperature=0.8, outputs=FIELDS)
    return model


def whole_step(dtype):
    """Loss and gradients of all rows on one rank, by TRL, or as defined where that is float64."""
    with contextlib.ExitStack() as stack:
        for definition in trl_runs.defined() if dtype == torch.float64 else []:
            stack.enter_context(definition)
        model = scored(dtype)
        loss = loss_of(model, *rows())
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def trl_head(available, frozen):
    """available: the model's own forward has gathered the head, as DeepSpeed does with one that it knows of."""
    true, plain = whole_step(torch.float64), whole_step(torch.float32)
    importlib.import_module("fuserl.trainers.trl").patch()
    model = scored(torch.float32)
    head = model.lm_head.weight.requires_grad_(not frozen)
    zero_3.partition(head)
    with zero_3.enabled():
        if available:
            zero_3.gather(head)
        loss = loss_of(model, *(x.chunk(RANKS)[dist.get_rank()] for x in rows()))
        if available:
            zero_3.release(head)
        assert head.numel() == 0, "nobody holds the parameter"
        if not frozen:
            loss.register_hook(lambda _: zero_3.gather(head))
        loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for x in (loss.detach_(), *found.values()):
        dist.all_reduce(x)
    if not frozen:
        found["lm_head.weight"] = RANKS * head.ds_grad
    check("loss", loss, true[0], plain[0], torch.float32)
    assert found.keys() == true[1].keys() - ({"lm_head.weight"} if frozen else set())
    for name, got in found.items():
        check_rows(name, *(x.reshape(len(x), -1) for x in (got, true[1][name], plain[1][name])), torch.float32)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("available", [False, True])
def test_trl_gathers_the_head(available, frozen):
    rival("trl", "trl.trainer.utils")
    on_ranks(RANKS, trl_head, available, frozen)


def operands():
    """Student's states, weight and bias, and the teacher's, of another width."""
    draw = torch.Generator().manual_seed(2)
    shapes = (14, 24), (61, 24), (61,), (14, 16), (61, 16), (61,)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]


def divergence(gathered, *heads):
    """TRL's own function gathers both heads itself."""
    from fuserl.trainers.trl import ChunkedDivergence

    return ChunkedDivergence.apply(*heads, 0.3, 0.9, 0.5, None, 0.7, 6.0)


def verl_head(gathered, hidden, weight, *_):
    """Its caller gathers."""
    verl_losses()
    from fuserl.trainers.verl import FusedLinearForPPO

    with zero_3.gathered([weight]) if gathered else contextlib.nullcontext():
        return FusedLinearForPPO()(hidden, weight, torch.arange(14))


def heads_in_parts(name, partitioned):
    """The same numbers, bit for bit, as of heads that are whole."""
    function, whole, parts = globals()[name], operands(), operands()
    expected = function(False, *whole)
    sum(x.sum() for x in expected if x.requires_grad).backward()
    zero_3.partition(*(parts[at] for at in partitioned))
    with zero_3.enabled():
        found = function(True, *parts)
        assert all(parts[at].numel() == 0 for at in partitioned)
        zero_3.gather(*(parts[at] for at in partitioned))
        sum(x.sum() for x in found if x.requires_grad).backward()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for at, (part, one) in enumerate(zip(parts, whole, strict=True)):
        got = part.ds_grad if at in partitioned else part.grad
        assert got is one.grad is None or torch.equal(got, one.grad)


@pytest.mark.parametrize(("package", "name", "partitioned"), [
    ("trl", "divergence", [1, 2, 4, 5]), ("verl", "verl_head", [1]),
])  # fmt: skip
def test_heads_in_parts(package, name, partitioned):
    rival(package, {"trl": "trl.trainer.utils", "verl": "verl.utils.torch_functional"}[package])
    on_ranks(RANKS, heads_in_parts, name, partitioned)


def transformers_head(more):
    """The head is read between DeepSpeed's hooks."""
    given = {name: torch.cat([x, x.flip(0)])[:4] for name, x in patched_models.batch().items()}
    options = {"num_items_in_batch": (given["labels"][:, 1:] != -100).sum()}
    makers = patched_models.defined(patched_models.tiny(dtype=torch.float64)), patched_models.tiny()
    true, plain = (patched_models.step(model, given, **options) for model in makers)
    model = patched_models.patched(patched_models.tiny())
    zero_3.hooked(model.lm_head)
    loss = model(**{name: x.chunk(RANKS)[dist.get_rank()] for name, x in given.items()}, **options, **more).loss
    assert model.lm_head.weight.numel() == 0
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for x in (loss.detach_(), *found.values()):
        dist.all_reduce(x)
    patched_models.same((loss, found | {"lm_head.weight": RANKS * model.lm_head.weight.ds_grad}), true, plain)


@pytest.mark.parametrize("more", [{}, {"outputs": ("logprob",)}], ids=["loss", "outputs"])
def test_transformers_head(more):
    on_ranks(RANKS, transformers_head, more)
