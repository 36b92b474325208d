"""A small vocabulary head and a clipped policy loss on it, and linear_policy_loss held against float64 autograd."""

import torch
from tolerance import check, check_rows

from fuserl.kernels.linear_policy_loss import linear_policy_loss


class Case:
    """A small head with peaky distributions, and a clipped-ratio loss with an entropy bonus on it."""

    def __init__(self, rows=45, width=24, vocabulary=301, dtype=torch.float32, device="cpu", zero_half=False):
        self.hidden = (torch.randn(rows, width) * 2).to(dtype).to(device)
        self.weight = torch.randn(vocabulary, width).to(dtype).to(device)
        self.ids = torch.randint(vocabulary, (rows,)).to(device)
        self.advantages = torch.randn(rows).to(device)
        if zero_half:
            self.advantages[torch.rand(rows) < 0.5] = 0.0
        z = self.hidden.double() @ self.weight.double().T
        drift = 0.3 * torch.randn(rows).to(device)
        self.old = z.log_softmax(-1).gather(1, self.ids[:, None]).squeeze(1).detach() + drift
        self.rows, self.bias, self.d_bias = rows, (3 * torch.randn(vocabulary)).to(dtype).to(device), None

    def clipped(self, out, rows):
        ratio = (out.logprob - self.old[rows].to(out.logprob.dtype)).exp()
        a = self.advantages[rows].to(ratio.dtype)
        loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) / self.rows
        return loss, {"ratio": ratio}

    def run(self, loss=None, dtype=None, bias=False, **options):
        """(loss, d_hidden, d_weight, out, stats) of one call."""
        hidden = self.hidden.to(dtype or self.hidden.dtype).clone().requires_grad_()
        weight = self.weight.to(dtype or self.weight.dtype).clone().requires_grad_()
        bias = self.bias.to(weight.dtype).clone().requires_grad_() if bias else None
        value, out, stats = linear_policy_loss(hidden, weight, self.ids, loss or self.clipped, bias=bias, **options)
        value.backward()
        self.d_bias = None if bias is None else bias.grad[None]
        return value.detach(), hidden.grad, weight.grad, out, stats


def compare(case, loss=None, backend="cpu", **options):
    truth, true = case.run(loss, torch.float64, backend="reference", **options), case.d_bias
    plain, plainly = case.run(loss, torch.float32, backend="reference", **options), case.d_bias
    got = case.run(loss, backend=backend, **options)
    accumulator = torch.float64 if case.hidden.dtype == torch.float64 else torch.float32
    check("loss", got[0][None], truth[0][None], plain[0][None], accumulator)
    check_rows("d_hidden", got[1], truth[1], plain[1], case.hidden.dtype, accumulator)
    check_rows("d_weight", got[2], truth[2], plain[2], case.weight.dtype, accumulator)
    if case.d_bias is not None:
        check_rows("d_bias", case.d_bias, true, plainly, case.bias.dtype, accumulator)
    for name, value in vars(truth[3]).items():
        check(name, getattr(got[3], name), value, getattr(plain[3], name), accumulator)
    for name, value in truth[4].items():
        check(name, got[4][name], value, plain[4][name], accumulator)


def same(whole, part):
    """Loss and gradients of two float32 runs that differ in the order of their sums; the loss's terms add up to 1."""
    for name, a, b in zip(("loss", "d_hidden", "d_weight"), whole, part, strict=False):
        assert torch.allclose(a, b, rtol=1e-5, atol=2e-6 * float(a.abs().max() if a.dim() else 1)), name
