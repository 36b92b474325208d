"""discounted_scan of ragged segments with a link per token, forward and backward: against a copy and torch."""

import pytest
import torch
from measure import Provider, compare

from fuserl.kernels.discounted_scan import discounted_scan


def with_backward(function, b, a, offsets):
    """The scan, and its gradients in b and a."""

    def run():
        x = function(b, a, offsets)
        return x.detach(), *torch.autograd.grad(x.sum(), (b, a))

    return run


@pytest.mark.parametrize("segments", [64, 1])
def test_discounted_scan_forward_backward(benchmark, device, smoke, segments):
    tokens = 500 if smoke else 1 << 18 if device == "cpu" else 1 << 21
    cuts = torch.randint(tokens, (segments - 1,)).sort().values
    offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([tokens])]).to(device)
    b = torch.randn(tokens, device=device, requires_grad=True)
    a = (0.9 + 0.1 * torch.rand(tokens, device=device)).requires_grad_()

    def scan(backend):
        return lambda b, a, offsets: discounted_scan(b, a, offsets=offsets, backend=backend)

    doubles = [x.detach().double().requires_grad_() for x in (b, a)]
    truth = with_backward(scan(None if segments == 1 else "reference"), *doubles, offsets)()

    def right(found):
        for got, expected in zip(found, truth, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-3)

    # Forward reads two vectors and writes one; backward reads three and writes two.
    source = torch.randn(4 * tokens, device=device)
    target = torch.empty_like(source)
    providers = [
        Provider("copy the same bytes", lambda: target.copy_(source)),
        Provider("fuserl", with_backward(scan(None), b, a, offsets), right),
    ]
    if segments > 1:
        rival = with_backward(scan("reference"), b, a, offsets)
        providers.append(Provider("torch, a loop over time of all segments", rival, right))
    compare(benchmark, *providers, rounds=5, smoke=smoke)
