"""The drop-in for Liger beside Liger's own classes: one forward and backward, and the bare products of its shapes.

Liger runs as it is by default (compiled, after its compilation) and with compiled=False. On a CPU the sizes are those
of the other benchmarks of a head, and a small one, 256 tokens; half of the tokens are padding where `padded`.
"""

import head_shape
import pytest
import torch
from measure import Provider, compare
from rivals import rival

from fuserl.kernels.linear_logprob import linear_logprob
from fuserl.trainers import liger

LENGTH = 64
SIZES = {"small": (256, 256, 32000), "head": (2048, 576, 49152)}


class Case:
    """Rollouts of 64 tokens, a head, and what the losses want besides; every provider returns the gradients."""

    def __init__(self, device, smoke, size="head", padded=False):
        rows, width, vocabulary = SIZES[size] if device == "cpu" else (16384, 4096, 128256)
        if smoke:
            rows, width, vocabulary = 256, 16, 500
        dtype, self.rollouts = torch.bfloat16 if device == "cuda" else torch.float32, rows // LENGTH
        shape = self.rollouts, LENGTH
        self.hidden = torch.randn(*shape, width, device=device).to(dtype).requires_grad_()
        self.weight = (torch.randn(vocabulary, width, device=device) * 0.1).to(dtype).requires_grad_()
        self.other = torch.randn(*shape, width, device=device).to(dtype), self.weight.detach().flip(0).contiguous()
        self.ids = torch.randint(vocabulary, shape, device=device)
        lengths = torch.linspace(4, LENGTH if padded else 2 * LENGTH, self.rollouts).int()
        lengths = lengths if padded else lengths.clamp(min=LENGTH)
        self.mask = (torch.arange(LENGTH) < lengths[:, None]).float().to(device)
        self.target = self.ids.masked_fill(self.mask == 0, -100)
        self.advantages = torch.randn(self.rollouts, device=device)
        # Near the policy's, so that hardly a token is clipped: those would cost ours no product.
        with torch.no_grad():
            logprob = linear_logprob(self.hidden, self.weight, self.ids).logprob
        self.old = logprob + 0.02 * torch.randn(shape, device=device)

    def products(self, reference=False):
        """The bare library products: logits, d_hidden and d_weight, and a second model's logits."""
        hidden, weight = self.hidden.detach().flatten(0, 1), self.weight.detach()
        with torch.no_grad():
            logits = hidden @ weight.T
            if reference:
                logits = self.other[0].flatten(0, 1) @ self.other[1].T
            return logits @ weight, logits.T @ hidden

    def grpo(self, cls, **init):
        """The clipped loss without a KL term."""
        loss = cls(beta=0.0, use_ref_model=False, loss_type="bnpo", **init)
        given = self.hidden, self.weight, self.ids, self.mask, self.advantages
        return self.gradients(loss(*given, old_per_token_logps=self.old)[0])

    def dpo(self, cls, **init):
        """The sigmoid loss with a reference."""
        return self.gradients(cls(**init)(self.weight, self.hidden, self.target, None, *self.other)[0])

    def jsd(self, cls, **init):
        """Half and half of the divergence and the labels."""
        hidden, other = self.hidden.flatten(0, 1), self.other[0].flatten(0, 1)
        return self.gradients(cls(**init)(hidden, self.weight, other, self.other[1], self.target.flatten()))

    def gradients(self, loss):
        """Of the states and of the head."""
        return torch.autograd.grad(loss, (self.hidden, self.weight))


def same(expected):
    """A gate: the gradients that Liger gives."""

    def gate(gradients):
        both = zip(("d_hidden", "d_weight"), gradients, expected, strict=True)
        return max(head_shape.check_gradient(got, true, of=name, coarse=3e-2) for name, got, true in both)

    return gate


def _compare(benchmark, smoke, case, run, name, reference=False):
    host = getattr(rival("liger-kernel", "liger_kernel.chunked_loss"), name)
    right = same(run(host, compiled=False))
    theirs = [] if smoke else [Provider("liger-kernel", lambda: run(host), right)]
    compare(
        benchmark,
        Provider("the bare products", lambda: case.products(reference)),
        Provider("fuserl", lambda: run(getattr(liger, name)), right),
        Provider("liger-kernel, compiled=False", lambda: run(host, compiled=False), right),
        *theirs,
        rounds=5,
        smoke=smoke,
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_liger_grpo(benchmark, device, smoke, size, padded):
    case = Case(device, smoke, size, padded)
    _compare(benchmark, smoke, case, case.grpo, "LigerFusedLinearGRPOLoss")


@pytest.mark.parametrize("size", SIZES)
def test_liger_dpo(benchmark, device, smoke, size):
    case = Case(device, smoke, size)
    _compare(benchmark, smoke, case, case.dpo, "LigerFusedLinearDPOLoss", reference=True)


@pytest.mark.parametrize("size", SIZES)
def test_liger_jsd(benchmark, device, smoke, size):
    case = Case(device, smoke, size)
    _compare(benchmark, smoke, case, case.jsd, "LigerFusedLinearJSDLoss", reference=True)
