"""policy_loss with its gradient: against a copy of the same bytes and against torch, eager and compiled.

The clipped loss with a KL term, and beside it what else it can be in its one pass: weights in the place of a clip, a
soft gate, and importance weights with an entropy bonus.
"""

import pytest
import torch
from measure import Provider, compare

from fuserl.kernels.policy_loss import policy_loss
from fuserl.kernels.surrogates import Clip, Gate, Weight, Within

COUNTS = pytest.mark.parametrize("count", [1 << 20, 1 << 14])


def inputs(count, device):
    """Log-probs that require a gradient, of three policies not far from each other, advantages and weights."""
    old = -3 * torch.rand(count, device=device)
    logprobs = (old + 0.2 * torch.randn(count, device=device)).requires_grad_()
    reference = old + 0.1 * torch.randn(count, device=device)
    return logprobs, torch.randn(count, device=device), old, reference, torch.rand(count, device=device) / count


def sampled(count, device):
    """Those, the log-probs of the engine that sampled, and entropies that require a gradient."""
    rest = inputs(count, device)
    rollout = rest[2] + 0.1 * torch.randn(count, device=device)
    return *rest, rollout, torch.rand(count, device=device).requires_grad_()


def watched(log_ratio, ratio, low, high, dual, kl):
    """The statistics that trainers log, without a gradient."""
    sums = [low, high, dual, ratio - 1 - log_ratio, kl, ratio, ratio.square()]
    return torch.stack([*(x.sum(dtype=ratio.dtype) for x in sums), ratio.amax(), ratio.amin()]).detach()


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
        statistics = watched(log_ratio, ratio, low, high, (advantages < 0) & (ratio > 3), kl)
    return weights * (0.04 * kl - objective), statistics


def eager_weight(logprobs, advantages, old, reference, weights):
    """CISPO's."""
    log_ratio, d = logprobs - old, reference - logprobs
    ratio, kl = log_ratio.exp().detach(), d.exp() - d - 1
    with torch.no_grad():
        beyond, below = ratio > 1.28, (advantages != 0) & (ratio < 0.8)
        statistics = watched(log_ratio, ratio, below, beyond & (advantages > 0), beyond & (advantages < 0), kl)
    return weights * (0.04 * kl - ratio.clamp(0.8, 1.28) * advantages * logprobs), statistics


def eager_gate(logprobs, advantages, old, reference, weights):
    """SAPO's."""
    log_ratio, d = logprobs - old, reference - logprobs
    ratio, kl = log_ratio.exp(), d.exp() - d - 1
    tau = torch.where(advantages > 0, 1.0, 1.05)
    with torch.no_grad():
        nothing = torch.zeros_like(ratio)
        statistics = watched(log_ratio, ratio, nothing, nothing, nothing, kl)
    return weights * (0.04 * kl - torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages), statistics


def eager_corrected(logprobs, advantages, old, reference, weights, rollout, entropy):
    """The clipped loss of samples of another engine, masked as in IcePop, with a bonus, and DeepSeek-V3.2's KL term."""
    log_ratio, d, weight = logprobs - old, reference - logprobs, (old - rollout).exp()
    ratio, weight = log_ratio.exp(), weight.where((weight >= 0.8) & (weight <= 1.25), 0.0)
    objective = weight * torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.28) * advantages)
    kl = ratio * (d.exp() - d - 1)
    with torch.no_grad():
        low, high = (weight * advantages < 0) & (ratio < 0.8), (weight * advantages > 0) & (ratio > 1.28)
        statistics = watched(log_ratio, ratio, low, high, torch.zeros_like(ratio), kl)
    return weights * (0.04 * kl - objective - 0.01 * entropy), statistics


def ours(surrogate, logprobs, advantages, old, reference, weights, **more):
    """The same through the op."""
    given = {"old_logprobs": old, "ref_logprobs": reference, "weights": weights, **more}
    losses, seen = policy_loss(logprobs, advantages, **given, surrogate=surrogate, beta=0.04)
    return losses, torch.cat([seen[1:6], seen[8:]])


def ours_corrected(*tokens):
    """The corrected form through the op."""
    *tokens, rollout, entropy = tokens
    more = {"rollout_logprobs": rollout, "entropy": entropy, "importance": Within(0.8, 1.25), "entropy_coef": 0.01}
    return ours(Clip(0.2, 0.28), *tokens, kl_weighted=True, **more)


def with_backward(function, arguments):
    """One forward and backward of the summed loss."""
    leaves = [x for x in arguments if x.requires_grad]

    def run():
        losses, statistics = function(*arguments)
        return losses.detach(), *torch.autograd.grad(losses.sum(), leaves), statistics

    return run


def compare_with(benchmark, device, smoke, arguments, function, written, vectors):
    """Time the op against the written-out loss and a copy of what must be moved, (N,) vectors of it."""
    doubles = tuple(x.detach().double().requires_grad_(x.requires_grad) for x in arguments)
    truth = with_backward(written, doubles)()

    def right(results):
        for got, expected in zip(results, truth, strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-11)

    source = torch.randn(vectors * len(arguments[0]) // 2, device=device)
    target = torch.empty_like(source)
    compare(
        benchmark,
        Provider("copy the same bytes", lambda: target.copy_(source)),
        Provider("fuserl", with_backward(function, arguments), right),
        Provider("torch eager", with_backward(written, arguments), right),
        Provider("torch.compile", with_backward(torch.compile(written), arguments), right),
        rounds=30,
        smoke=smoke,
    )


@COUNTS
def test_policy_loss_forward_backward(benchmark, device, smoke, count):
    arguments = inputs(1000 if smoke else count, device)
    # Five vectors are read and two written.
    compare_with(benchmark, device, smoke, arguments, lambda *x: ours(Clip(0.2, 0.28, 3.0), *x), eager, 7)


@COUNTS
def test_policy_loss_weight(benchmark, device, smoke, count):
    bounds, arguments = (0.8, 1.28), inputs(1000 if smoke else count, device)
    compare_with(benchmark, device, smoke, arguments, lambda *x: ours(Weight(bounds, bounds), *x), eager_weight, 7)


@COUNTS
def test_policy_loss_gate(benchmark, device, smoke, count):
    arguments = inputs(1000 if smoke else count, device)
    compare_with(benchmark, device, smoke, arguments, lambda *x: ours(Gate(), *x), eager_gate, 7)


@COUNTS
def test_policy_loss_corrected(benchmark, device, smoke, count):
    arguments = sampled(1000 if smoke else count, device)
    # Seven vectors are read and two written; the gradient to the entropies is one pass more, over two.
    compare_with(benchmark, device, smoke, arguments, ours_corrected, eager_corrected, 11)
