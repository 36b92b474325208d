"""The optimizer: against torch's AdamW and clipping, skipped steps and continuation bit for bit, and the schedules."""

import math

import pytest
import torch
import transformers

from fuserl.engine.optimizer import Optimizer, schedule

SHAPES = {"embed": (67, 16), "norm": (16,), "scale": (), "conv": (3, 5, 7)}


def parameters():
    draw = torch.Generator().manual_seed(3)
    return {name: torch.nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in SHAPES.items()}


def give_gradients(tensors, step, size=1.0):
    draw = torch.Generator().manual_seed(step)
    for tensor in tensors.values():
        tensor.grad = size * torch.randn(tensor.shape, generator=draw)


def snapshot(optimizer):
    weights = {name: p.detach().clone() for name, p in optimizer.parameters.items()}
    return {**weights, **{name: tensor.clone() for name, tensor in optimizer.state_dict().items()}}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("warmup", [0, 1, 7, 20])
def test_schedules_are_those_of_transformers(warmup):
    for name in ("constant", "linear", "cosine"):
        given = {"num_warmup_steps": warmup} | ({"num_training_steps": 20} if name != "constant" else {})
        adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = getattr(transformers, f"get_{name}_schedule_with_warmup")(adam, **given).lr_lambdas[0]
        ours = schedule(name, warmup=warmup, total=20)
        assert [ours(step) for step in range(21)] == [theirs(step) for step in range(21)]
        assert ours(50) == ours(20)


@pytest.mark.parametrize(
    ("name", "warmup", "message"),
    [("cosin", 0, "Did you mean 'cosine'"), ("linear", 21, r"from 0 to total \(20\)"), ("linear", -1, "got -1")],
)
def test_a_schedule_that_is_none_is_refused(name, warmup, message):
    with pytest.raises(ValueError, match=message):
        schedule(name, warmup=warmup, total=20)


@pytest.mark.parametrize("size", [1e-3, 3.0])
def test_steps_are_those_of_adamw_after_clipping(size):
    """Against the unfused one, step by step: a gradient larger than the norm and one smaller, and a falling rate."""
    ours, theirs = parameters(), parameters()
    optimizer = Optimizer(
        ours.items(), lr=0.02, weight_decay=0.1, max_grad_norm=1.0, factor=schedule("linear", warmup=2, total=6)
    )
    decayed, kept = ([p for p in theirs.values() if (p.dim() >= 2) is large] for large in (True, False))
    adam = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    for step, factor in enumerate([0.0, 0.5, 1.0, 0.75, 0.5, 0.25]):
        give_gradients(ours, step, size), give_gradients(theirs, step, size)
        taken = optimizer.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        for group in adam.param_groups:
            group["lr"] = 0.02 * factor
        adam.step()
        assert taken["grad_norm"] == norm and taken["skipped"] == 0
        assert math.isclose(taken["lr"], 0.02 * factor, rel_tol=1e-6)
        assert all(p.grad is None for p in ours.values())
    for name, p in ours.items():
        # torch's clipping divides by norm + 1e-6; the rest is rounding of six steps.
        assert torch.allclose(p, theirs[name], rtol=1e-5, atol=1e-6), name
        assert torch.allclose(optimizer.state_dict()[f"exp_avg.{name}"], adam.state[theirs[name]]["exp_avg"], rtol=1e-5)


def test_only_matrices_decay():
    tensors = parameters()
    before = {name: p.detach().clone() for name, p in tensors.items()}
    optimizer = Optimizer(tensors.items(), lr=0.5, weight_decay=0.2)
    for p in tensors.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in tensors.items():
        assert torch.allclose(p, before[name] * (0.9 if p.dim() >= 2 else 1.0))


def test_inf_means_no_clipping():
    tensors = parameters()
    give_gradients(tensors, 0, 1e4)
    first = 0.1 * tensors["embed"].grad
    optimizer = Optimizer(tensors.items(), lr=0.1, max_grad_norm=math.inf)
    optimizer.step()
    assert torch.allclose(optimizer.state_dict()["exp_avg.embed"], first)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("before", [0, 3])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count(bad, before):
    tensors = parameters()
    optimizer = Optimizer(tensors.items(), lr=0.1, weight_decay=0.1, factor=lambda step: 1.0 + step)
    for step in range(before):
        give_gradients(tensors, step)
        optimizer.step()
    frozen = snapshot(optimizer)
    give_gradients(tensors, 9)
    tensors["norm"].grad[3] = bad
    taken = optimizer.step()
    assert taken["skipped"] == 1 and not taken["grad_norm"].isfinite()
    after = snapshot(optimizer)
    assert (frozen.pop("count"), after.pop("count")) == (before, before + 1)
    assert equal(frozen, after)
    give_gradients(tensors, 10)
    taken = optimizer.step()
    assert taken["skipped"] == 0 and optimizer.state_dict()["step.embed"] == before + 1
    assert math.isclose(taken["lr"], 0.1 * (before + 2), rel_tol=1e-6)  # the attempt counted
    assert not equal(after, snapshot(optimizer))


@pytest.mark.parametrize("at", [0, 4])
def test_continuation_is_bit_identical(at, tmp_path):
    from safetensors.torch import load_file, save_file

    def run(optimizer, steps):
        for step in steps:
            give_gradients(optimizer.parameters, step)
            if step == 2:
                optimizer.parameters["conv"].grad[0] = math.nan
            optimizer.step()

    def make(tensors):
        return Optimizer(tensors.items(), lr=0.1, weight_decay=0.1, factor=schedule("cosine", warmup=2, total=8))

    whole, first = make(parameters()), make(parameters())
    run(whole, range(8))
    run(first, range(at))
    save_file(first.state_dict(), tmp_path / "state.safetensors")
    second = make({name: torch.nn.Parameter(p.detach().clone()) for name, p in first.parameters.items()})
    second.load_state_dict(load_file(tmp_path / "state.safetensors"))
    run(second, range(at, 8))
    assert equal(snapshot(whole), snapshot(second))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("exp_avg.norm"), r"lacks exp_avg\.norm\. Train"),
        (lambda state: [state.pop(f"step.{name}") for name in SHAPES], r"lacks step\.conv and 3 more"),
        (lambda state: state.update({"exp_avg.head": torch.zeros(2)}), r"also has exp_avg\.head"),
        (lambda state: state.update({"exp_avg_sq.norm": torch.zeros(17)}), r"shape \(16,\); got .* shape \(17,\)"),
        (lambda state: state.update({"exp_avg.norm": torch.zeros(16).half()}), r"torch.float32 .* got torch.float16"),
    ],
)
def test_a_foreign_state_is_refused_and_nothing_loaded(change, message):
    tensors = parameters()
    optimizer = Optimizer(tensors.items(), lr=0.1)
    give_gradients(tensors, 0)
    optimizer.step()
    state = {name: torch.full_like(tensor, 5) for name, tensor in optimizer.state_dict().items()}
    change(state)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert equal(before, snapshot(optimizer))


def test_a_parameter_without_a_gradient_rests():
    tensors = parameters()
    optimizer = Optimizer(tensors.items(), lr=0.1)
    give_gradients(tensors, 0)
    tensors["norm"].grad = None
    before = tensors["norm"].detach().clone()
    optimizer.step()
    assert torch.equal(tensors["norm"], before)
    with pytest.raises(RuntimeError, match="Call backward before"):
        optimizer.step()


def test_wrong_arguments_are_refused():
    tensors = parameters()
    (name, tensor), *_ = tensors.items()
    frozen = torch.zeros(3)
    for pairs, message in (
        ([], "got 0 pairs"),
        ([(name, tensor), (name, tensors["norm"])], "2 pairs of 1 names"),
        ([(name, tensor), ("other", tensor)], "2 names and 1 tensors"),
        ([(name, tensor), ("still", frozen)], "got still, which does not"),
    ):
        with pytest.raises(ValueError, match=message):
            Optimizer(pairs, lr=0.1)
    for wrong in ({"lr": -1.0}, {"lr": math.nan}, {"weight_decay": -0.1}, {"max_grad_norm": 0.0}):
        with pytest.raises(ValueError, match=f"Optimizer: {next(iter(wrong))} must"):
            Optimizer([(name, tensor)], **{"lr": 0.1, **wrong})


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [1.0, math.nan])
def test_on_a_gpu_nothing_waits(bad):
    tensors = {name: torch.nn.Parameter(p.detach().cuda()) for name, p in parameters().items()}
    optimizer = Optimizer(tensors.items(), lr=0.1, factor=schedule("linear", warmup=0, total=9))
    gradients = {name: torch.randn_like(p) for name, p in tensors.items()}
    gradients["norm"][0] *= bad
    before = snapshot(optimizer)
    for name, p in tensors.items():
        p.grad = gradients[name]
    torch.cuda.set_sync_debug_mode("error")
    try:
        taken = optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    skipped = math.isnan(bad)
    assert taken["skipped"] == skipped
    assert torch.equal(before["embed"], tensors["embed"]) == skipped
    assert optimizer.state_dict()["step.embed"] == 1 - skipped
