"""OpenRLHF's actor, loss and advantages with the drop-in and without, as its trainers call them.

The floor is what any way must do: a copy of the bytes, or the actor's backbone. Weights are random; no time depends on
them.
"""

import contextlib
import importlib

import pytest
import torch
import transformers
from bench_trl_step import SMOLLM2, TINY
from measure import Provider, compare, gradients, near
from rivals import openrlhf


@pytest.fixture
def drop_in():
    """The drop-in, out."""
    openrlhf("openrlhf.models.actor")
    openrlhf("openrlhf.trainer.ppo_utils.experience_maker")
    return importlib.import_module("fuserl.trainers.openrlhf")


def against(benchmark, smoke, floor, ours, theirs, right, rounds):
    """Time what stands in the place of a function, and the function."""
    providers = Provider("fuserl", ours, right), Provider("openrlhf", theirs, right)
    compare(benchmark, floor, *providers, rounds=rounds, smoke=smoke)


def test_openrlhf_gae(benchmark, device, smoke, drop_in):
    """Advantages and returns of 64 x 4096 tokens."""
    maker = openrlhf("openrlhf.trainer.ppo_utils.experience_maker").RemoteExperienceMaker
    values, rewards = torch.randn(2, 64, 64 if smoke else 4096, device=device)
    mask, target = torch.ones_like(values), torch.empty(2, *values.shape, device=device)

    def run(function, dtype=torch.float32):
        return function(None, *(x.to(dtype) for x in (values, rewards, mask)), 1.0, 0.95)

    theirs, ours = maker.get_advantages_and_returns, drop_in.get_advantages_and_returns
    floor = Provider("copy the same bytes", lambda: target.copy_(torch.stack([values, rewards])))
    right = near(run(theirs, torch.float64), atol=1e-5)
    against(benchmark, smoke, floor, lambda: run(ours), lambda: run(theirs), right, 5)


@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_openrlhf_policy_loss(benchmark, device, smoke, drop_in, kind):
    """A policy loss of 64 x 4096 tokens with its gradient and statistics."""
    loss_of = openrlhf("openrlhf.models.loss").PolicyLoss(policy_loss_type=kind)
    shape = 64, 64 if smoke else 4096
    old, advantages = -torch.rand(shape, device=device), torch.randn(shape, device=device)
    policy, mask = old + 0.1 * torch.randn(shape, device=device), torch.ones(shape, device=device)

    def run(forward, dtype=torch.float32):
        new = policy.to(dtype).requires_grad_()
        loss = forward(loss_of, new, old.to(dtype), advantages.to(dtype), action_mask=mask.to(dtype))[0]
        return loss.detach(), *torch.autograd.grad(loss, new)

    target, theirs, ours = torch.empty(4, *shape, device=device), type(loss_of).forward, drop_in.policy_loss_forward
    floor = Provider("copy the same bytes", lambda: target.copy_(old.expand_as(target)))
    right = near(run(theirs, torch.float64), atol=1e-5, results=1)
    against(benchmark, smoke, floor, lambda: run(ours), lambda: run(theirs), right, 10)


def test_openrlhf_actor(benchmark, device, smoke, drop_in):
    """Log-probs and entropies of 128 actions behind 128 tokens of a prompt, with their gradients."""
    config = TINY if smoke else SMOLLM2 | dict(num_hidden_layers=4)
    torch.manual_seed(0)
    made = openrlhf("openrlhf.models.actor").Actor(transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)))
    made.packing_samples, made.model = False, made.model.to(device)  # as it sets it where it loads the model itself
    ids = torch.randint(3, config["vocab_size"], (4, 256), device=device)
    attention, action = torch.ones_like(ids), torch.ones_like(ids[:, :128])

    def step(forward):
        logprobs, found = forward(made, ids, action, attention, return_output=True, return_entropy=True)
        entropy = found.entropy[:, -action.shape[1] :]
        (entropy.mean() - logprobs.mean()).backward()
        return logprobs.detach(), entropy.detach(), *gradients(made.model)

    def backbone():
        states = made.model.model(input_ids=ids, use_cache=False).last_hidden_state
        states.backward(torch.ones_like(states))
        made.model.zero_grad()

    theirs, ours, floor = type(made).forward, drop_in.actor_forward, Provider("the backbone alone", backbone)
    with torch.compiler.set_stance("force_eager") if smoke else contextlib.nullcontext():
        right = near(step(theirs), atol=1e-5, results=2)
        against(benchmark, smoke, floor, lambda: step(ours), lambda: step(theirs), right, 3)
