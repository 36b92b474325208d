"""sampled_divergence with its gradient: against a copy of the same bytes and against torch, eager and compiled."""

import pytest
import torch
from measure import Provider, compare

from fuserl.kernels.sampled_divergence import sampled_divergence


def eager(logprobs, reference, kind):
    """The estimate as trainers write it."""
    d = logprobs - reference
    if kind == "k3":
        return (-d).exp() - 1 + d
    mixture = torch.log(0.5 * (1 + d.exp()))
    return 0.5 * (d.exp() * (d - mixture) - mixture)


compiled = torch.compile(eager)


def with_backward(function, logprobs, reference, kind):
    """One forward and backward of the summed estimates."""

    def run():
        values = function(logprobs, reference, kind)
        return values.detach(), torch.autograd.grad(values.sum(), logprobs)[0]

    return run


@pytest.mark.parametrize("kind", ["k3", "jensen_shannon"])
@pytest.mark.parametrize("count", [1 << 20, 1 << 14])
def test_sampled_divergence_forward_backward(benchmark, device, smoke, count, kind):
    count = 1000 if smoke else count
    reference = -3 * torch.rand(count, device=device)
    logprobs = (reference + 0.2 * torch.randn(count, device=device)).requires_grad_()
    truth = with_backward(eager, logprobs.detach().double().requires_grad_(), reference.double(), kind)()

    def right(results):
        for got, expected in zip(results, truth, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-6)

    # Two vectors are read, and values, derivative and gradient written.
    source = torch.randn(5 * count // 2, device=device)
    target = torch.empty_like(source)
    compare(
        benchmark,
        Provider("copy the same bytes", lambda: target.copy_(source)),
        Provider("fuserl", with_backward(sampled_divergence, logprobs, reference, kind), right),
        Provider("torch eager", with_backward(eager, logprobs, reference, kind), right),
        Provider("torch.compile", with_backward(compiled, logprobs, reference, kind), right),
        rounds=30,
        smoke=smoke,
    )
