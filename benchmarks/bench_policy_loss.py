"""policy_loss with its gradient: against a copy of the same bytes and against torch, eager and compiled."""

import pytest
import torch
from measure import Provider, compare

from fuserl.kernels.policy_loss import policy_loss


def inputs(count, device):
    """Log-probs that require a gradient, of three policies not far from each other, advantages and weights."""
    old = -3 * torch.rand(count, device=device)
    logprobs = (old + 0.2 * torch.randn(count, device=device)).requires_grad_()
    reference = old + 0.1 * torch.randn(count, device=device)
    return logprobs, torch.randn(count, device=device), old, reference, torch.rand(count, device=device) / count


def eager(logprobs, advantages, old, reference, weights):
    """The loss as trainers write it, with the statistics that they log."""
    log_ratio = logprobs - old
    ratio = log_ratio.exp()
    gain, bounded = ratio * advantages, ratio.clamp(0.8, 1.28) * advantages
    objective = torch.minimum(gain, bounded)
    objective = torch.where(advantages < 0, torch.maximum(objective, 3 * advantages), objective)
    d = reference - logprobs
    kl = d.exp() - d - 1
    with torch.no_grad():
        low, high = (advantages < 0) & (ratio < 0.8), (advantages > 0) & (ratio > 1.28)
        dual = (advantages < 0) & (ratio > 3)
        sums = [low, high, dual, ratio - 1 - log_ratio, kl, ratio, ratio.square()]
        statistics = torch.stack([*(x.sum(dtype=ratio.dtype) for x in sums), ratio.amax(), ratio.amin()])
    return weights * (0.04 * kl - objective), statistics


def ours(logprobs, advantages, old, reference, weights):
    """The same through the op."""
    return policy_loss(
        logprobs, advantages, old_logprobs=old, ref_logprobs=reference, weights=weights, high=0.28, dual=3.0, beta=0.04
    )


def with_backward(function, arguments):
    """One forward and backward of the summed loss."""

    def run():
        losses, statistics = function(*arguments)
        return losses.detach(), torch.autograd.grad(losses.sum(), arguments[0])[0], statistics[-9:]

    return run


compiled = torch.compile(eager)


@pytest.mark.parametrize("count", [1 << 20, 1 << 14])
def test_policy_loss_forward_backward(benchmark, device, smoke, count):
    arguments = inputs(1000 if smoke else count, device)
    doubles = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in arguments)
    truth = with_backward(eager, doubles)()

    def right(results):
        for got, expected in zip(results, truth, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-11)

    # Five vectors are read and two written.
    source = torch.randn(7 * len(arguments[0]) // 2, device=device)
    target = torch.empty_like(source)
    compare(
        benchmark,
        Provider("copy the same bytes", lambda: target.copy_(source)),
        Provider("fuserl", with_backward(ours, arguments), right),
        Provider("torch eager", with_backward(eager, arguments), right),
        Provider("torch.compile", with_backward(compiled, arguments), right),
        rounds=30,
        smoke=smoke,
    )
