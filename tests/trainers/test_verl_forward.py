"""A Llama with the forward that verl gives it, on verl's head and on ours: log-probs, entropies, every gradient."""

import copy
import importlib

import pytest
import torch
import trl_runs
from rivals import rival, verl_losses
from tolerance import check, check_rows

verl_losses()
common = rival("verl", "verl.models.transformers.dense_common")
ours = importlib.import_module("fuserl.trainers.verl")
ours.unpatch()  # importing it has patched
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def run(model, backend="torch", dtype=torch.float32):
    """(log-probs, entropy, gradients by name) of a forward and backward as verl's engine calls them."""
    model = copy.deepcopy(model).to(dtype)
    forward = getattr(common, f"forward_with_{backend}_backend")
    found = forward(model, input_ids=IDS, temperature=0.8, return_dict=True, use_cache=False)
    (found.log_probs.sum() + found.entropy.sum()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found.log_probs.detach().view(IDS.shape), found.entropy.detach().view(IDS.shape), grads


def compare(got, true, plain):
    for at, name in enumerate(("log-probs", "entropy")):
        check(name, got[at], true[at], plain[at], torch.float32)
    assert got[2].keys() == true[2].keys()
    for name, gradient in true[2].items():
        check_rows(name, got[2][name], gradient, plain[2][name], torch.float32)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_forward(backend):
    """The Triton backend, which wants a GPU of verl's, runs on a CPU with ours."""
    model = trl_runs.model(torch.float32)
    plain, true = run(model), run(model, dtype=torch.float64)
    with ours.patch():
        compare(run(model, backend), true, plain)


def test_beside_a_compiled_backbone():
    model = trl_runs.model(torch.float32)
    plain, true = run(model), run(model, dtype=torch.float64)
    model.model.compile(backend="aot_eager")
    with ours.patch():
        compare(run(model), true, plain)


def test_beside_adapters():
    """The head is frozen, and the adapters' gradients are those of verl."""
    peft = pytest.importorskip("peft", reason="pip install peft")
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(trl_runs.model(torch.float32), settings).base_model.model
    plain, true = run(model), run(model, dtype=torch.float64)
    assert plain[2] and all("lora" in name for name in plain[2])
    with ours.patch():
        compare(run(model), true, plain)
