"""preference_loss with its gradient, as DPO: against a copy of the same bytes, torch and what trainers call."""

import importlib.metadata

import pytest
import torch
import torch.nn.functional as F
from measure import Provider, compare

from fuserl.kernels.preference_loss import preference_loss
from fuserl.kernels.preferences import DPO


def inputs(pairs, length, device):
    """Log-probs that require a gradient and those of a reference, padded (R, T), a mask, and the packed ones."""
    lengths = torch.randint(length // 2, length + 1, (2 * pairs,))
    mask = torch.arange(length) < lengths[:, None]
    ref = torch.where(mask, -3 * torch.rand(2 * pairs, length), 0.0)
    logprobs = torch.where(mask, ref + 0.1 * torch.randn(2 * pairs, length), 0.0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    padded = tuple(x.to(device) for x in (logprobs, ref, mask))
    packed = tuple(x.to(device) for x in (logprobs[mask], ref[mask], offsets))
    return padded, packed


def ours(logprobs, ref, offsets):
    """The op on packed tokens."""
    losses, rewards, statistics = preference_loss(logprobs, DPO(), offsets=offsets, ref_logprobs=ref)
    return losses, rewards, statistics


def ours_padded(logprobs, ref, mask):
    """The op on padded tokens."""
    losses, rewards, statistics = preference_loss(logprobs, DPO(), mask=mask, ref_logprobs=ref)
    return losses, rewards, statistics


def eager(logprobs, ref, mask):
    """The loss and the figures that are logged, as TRL's DPOTrainer writes them, from padded log-probs."""
    scores, refs = (torch.where(mask, x, 0.0).sum(1) for x in (logprobs, ref))
    ratios = scores - refs
    chosen, rejected = ratios.chunk(2)
    losses = -F.logsigmoid(0.1 * (chosen - rejected))
    with torch.no_grad():
        won, lost = 0.1 * chosen, 0.1 * rejected
        statistics = torch.stack([(won - lost).sum(), (won > lost).sum(dtype=won.dtype), won.sum(), lost.sum()])
    return losses, 0.1 * ratios.detach(), statistics


compiled = torch.compile(eager)


def liger(logprobs, ref, mask):
    """Liger's function of the sums of log-probs, which it calls on each chunk of pairs."""
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction as Function

    scores, refs = (torch.where(mask, x, 0.0).sum(1) for x in (logprobs, ref))
    loss, won, lost = Function.preference_loss_fn(*scores.chunk(2), mask, *refs.chunk(2), beta=0.1)
    return loss * (len(mask) // 2), torch.cat([won, lost]).detach(), None


def with_backward(function, arguments):
    """One forward and backward of the summed loss."""
    leaf = arguments[0].clone().requires_grad_()

    def run():
        losses, rewards, _ = function(leaf, *arguments[1:])
        total = losses.sum()
        return total.detach(), torch.autograd.grad(total, leaf)[0], rewards

    return run


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@pytest.mark.parametrize("pairs,length", [(512, 1024), (16, 256)])
def test_preference_loss_forward_backward(benchmark, device, smoke, pairs, length):
    padded, packed = inputs(4 if smoke else pairs, 32 if smoke else length, device)
    wide = [x.double() if x.is_floating_point() else x for x in padded]
    truth = with_backward(eager, wide)()

    def right(results):  # float32 sums of a thousand log-probs lose four digits of their differences
        total, gradient, rewards = results
        torch.testing.assert_close(total.double(), truth[0], rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(rewards.double(), truth[2], rtol=1e-3, atol=1e-3)
        kept = truth[1] if gradient.dim() == 2 else truth[1][padded[2]]
        torch.testing.assert_close(gradient.double(), kept, rtol=1e-3, atol=1e-5)

    # Two vectors of the packed tokens are read and one written.
    source = torch.randn(3 * len(packed[0]) // 2, device=device)
    target = torch.empty_like(source)
    compare(
        benchmark,
        Provider("copy the same bytes", lambda: target.copy_(source)),
        Provider("fuserl", with_backward(ours, packed), right),
        Provider("fuserl, padded", with_backward(ours_padded, padded), right),
        Provider("torch eager, padded", with_backward(eager, padded), right),
        Provider("torch.compile, padded", with_backward(compiled, padded), right),
        Provider(
            f"liger-kernel {_version('liger-kernel')} preference_loss_fn, padded", with_backward(liger, padded), right
        ),
        rounds=30,
        smoke=smoke,
    )
