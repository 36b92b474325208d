"""gaussian_logprob with its gradients: against a copy of the same bytes and against torch, eager and compiled.

The log-prob alone with a scale for every state, as PPO on vectors has it, and with entropy and a KL divergence from a
reference where the scale depends on the state.
"""

import math

import pytest
import torch
from measure import Provider, compare
from torch.distributions import Normal, kl_divergence

from fuserl.kernels.gaussian_logprob import gaussian_logprob

SHAPES = pytest.mark.parametrize(
    "shape", [(65536, 64), (4096, 64), (64, 8)], ids=lambda shape: f"{shape[0]}x{shape[1]}"
)


def inputs(shape, device, alike):
    """Actions, mean and log_std, which require a gradient, and a reference's; scales for all rows where `alike`."""
    mean = torch.randn(shape, device=device)
    log_std = 0.3 * torch.randn(shape[1:] if alike else shape, device=device)
    actions = mean + log_std.exp() * torch.randn(shape, device=device)
    ref_mean, ref_log_std = mean + 0.1 * torch.randn(shape, device=device), log_std + 0.1
    return actions, mean.requires_grad_(), log_std.requires_grad_(), ref_mean, ref_log_std


def eager(actions, mean, log_std, *_):
    """The log-prob as trainers write it."""
    return [Normal(mean, log_std.exp()).log_prob(actions).sum(-1)]


def eager_regularised(actions, mean, log_std, ref_mean, ref_log_std):
    """That, entropy and KL divergence."""
    policy, reference = Normal(mean, log_std.exp()), Normal(ref_mean, ref_log_std.exp())
    found = policy.log_prob(actions), policy.entropy(), kl_divergence(policy, reference)
    return [x.sum(-1) for x in found]


def written(actions, mean, log_std, *_):
    """The log-prob written out, for the compiler."""
    return [-(((actions - mean) * (-log_std).exp()).square() / 2 + log_std + math.log(2 * math.pi) / 2).sum(-1)]


def written_regularised(actions, mean, log_std, ref_mean, ref_log_std):
    """That, entropy and KL divergence written out."""
    t, w = log_std - ref_log_std, (mean - ref_mean) * (-ref_log_std).exp()
    entropy = (log_std + math.log(2 * math.pi) / 2 + 0.5).sum(-1)
    return [*written(actions, mean, log_std), entropy, (((2 * t).exp() - 1 - 2 * t + w.square()) / 2).sum(-1)]


def ours(actions, mean, log_std, *_):
    """The log-prob through the op."""
    return [gaussian_logprob(actions, mean, log_std).logprob]


def ours_regularised(actions, mean, log_std, ref_mean, ref_log_std):
    """That, entropy and KL divergence."""
    return gaussian_logprob(actions, mean, log_std, ref_mean=ref_mean, ref_log_std=ref_log_std, entropy=True)


def with_backward(function, arguments, g):
    """One forward and backward, `g` from above."""

    def run():
        found = function(*arguments)
        gradients = torch.autograd.grad(found, arguments[1:3], [g] * len(found))
        return *(x.detach() for x in found), *gradients

    return run


def compare_with(benchmark, arguments, smoke, providers, vectors):
    """Time the op against the others and a copy of what must be moved, `vectors` of the actions' size of it."""
    doubles = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in arguments)
    actions = arguments[0]
    g = torch.rand(len(actions), device=actions.device) / len(actions)
    function, plain, formula = providers
    truth = with_backward(plain, doubles, g.double())()

    def right(results):
        for got, expected in zip(results, truth, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-5)

    source = torch.randn(vectors * actions.numel() // 2, device=actions.device)
    target = torch.empty_like(source)
    compare(
        benchmark,
        Provider("copy the same bytes", lambda: target.copy_(source)),
        Provider("fuserl", with_backward(function, arguments, g), right),
        Provider("torch.distributions", with_backward(plain, arguments, g), right),
        Provider("torch.compile", with_backward(torch.compile(formula), arguments, g), right),
        rounds=30 if len(actions) > 1000 else 200,
        smoke=smoke,
    )


@SHAPES
def test_gaussian_logprob_forward_backward(benchmark, device, smoke, shape):
    arguments = inputs((10, 8) if smoke else shape, device, alike=True)
    # Actions and mean are read twice, and the mean's gradient is written.
    compare_with(benchmark, arguments, smoke, (ours, eager, written), 5)


@SHAPES
def test_gaussian_logprob_entropy_kl(benchmark, device, smoke, shape):
    arguments = inputs((10, 8) if smoke else shape, device, alike=False)
    # Five tensors are read twice, and two gradients written.
    compare_with(benchmark, arguments, smoke, (ours_regularised, eager_regularised, written_regularised), 12)
