"""token_logprob: against one read of the logits (forward), and against torch, eager and compiled (with backward)."""

import head_shape
import torch
from measure import Provider, compare

from fuserl.kernels.token_logprob import reference, token_logprob


def inputs(device, smoke):
    """Peaky logits and the chosen tokens."""
    logits = head_shape.logits(device, smoke)
    rows, vocabulary = logits.shape
    return logits, torch.randint(vocabulary, (rows,), device=device)


def gate(logits, ids):
    """Compare (logprob, entropy) of a few rows with float64."""
    truth = reference(logits[:8].double(), ids[:8])

    def check(result):
        for got, expected in zip(result, truth, strict=True):
            torch.testing.assert_close(got[:8].double(), expected, rtol=1e-5, atol=2e-5)

    return check


def test_token_logprob_forward(benchmark, device, smoke):
    logits, ids = inputs(device, smoke)
    right = gate(logits, ids)
    compare(
        benchmark,
        Provider("read the logits: x.sum()", logits.sum),
        Provider("fuserl", lambda: token_logprob(logits, ids), right),
        Provider("torch eager", lambda: reference(logits, ids), right),
        Provider("torch.compile", lambda: compiled(logits, ids), right),
        smoke=smoke,
        rounds=15,
    )


def test_token_logprob_forward_backward(benchmark, device, smoke):
    logits, ids = inputs(device, smoke)
    logits.requires_grad_()
    truth = with_backward(reference, logits, ids)()[:8].double()

    def right(gradient):
        torch.testing.assert_close(gradient[:8].double(), truth, rtol=2e-2, atol=1e-5)

    compare(
        benchmark,
        Provider("read the logits: x.sum()", lambda: logits.detach().sum()),
        Provider("fuserl", with_backward(token_logprob, logits, ids), right),
        Provider("torch eager", with_backward(reference, logits, ids), right),
        Provider("torch.compile", with_backward(compiled, logits, ids), right),
        smoke=smoke,
    )


compiled = torch.compile(reference)


def with_backward(function, logits, ids):
    """One forward and backward of log-prob and entropy."""

    def run():
        logprob, entropy = function(logits, ids)
        return torch.autograd.grad((logprob - 0.01 * entropy).sum(), logits)[0]

    return run
