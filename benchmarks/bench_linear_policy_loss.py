"""linear_policy_loss: against the three bare products of its shapes, all rows, half of them dead, a frozen head."""

import torch
from measure import Provider, compare

from fuserl.kernels.linear_policy_loss import linear_policy_loss


class Case:
    """A clipped-ratio loss with an entropy bonus over a head of the benchmark's shape."""

    def __init__(self, device, smoke):
        self.rows, self.width, self.vocabulary = (2048, 576, 49152) if device == "cpu" else (16384, 4096, 128256)
        if smoke:
            self.rows, self.width, self.vocabulary = 64, 16, 500
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.hidden = torch.randn(self.rows, self.width, device=device).to(dtype).requires_grad_()
        self.weight = (torch.randn(self.vocabulary, self.width, device=device) * 0.1).to(dtype).requires_grad_()
        self.ids = torch.randint(self.vocabulary, (self.rows,), device=device)
        self.advantages = torch.randn(self.rows, device=device)
        self.live = torch.arange(self.rows) % 2 == 0
        self.d_logits = None

    def loss(self, out, rows):
        """-A exp(logprob - stop(logprob)) - 0.01 entropy, over the rows."""
        ratio = (out.logprob - out.logprob.detach()).exp()
        return (-ratio * self.advantages[rows] - 0.01 * out.entropy) / self.rows

    def ours(self, weight=None, **options):
        """Forward and backward of the op; returns the hidden states' gradient."""
        weight = self.weight if weight is None else weight
        wanted = [self.hidden] + ([weight] if weight.requires_grad else [])
        loss, *_ = linear_policy_loss(
            self.hidden, weight, self.ids, self.loss, outputs=("logprob", "entropy"), **options
        )
        return torch.autograd.grad(loss, wanted)[0]

    def eager(self):
        """The same through all logits."""
        logp = (self.hidden @ self.weight.T).float().log_softmax(-1)
        logprob = logp.gather(1, self.ids[:, None]).squeeze(1)
        ratio, entropy = (logprob - logprob.detach()).exp(), -(logp.exp() * logp).sum(-1)
        loss = ((-ratio * self.advantages - 0.01 * entropy) / self.rows).sum()
        return torch.autograd.grad(loss, [self.hidden, self.weight])[0]

    def products(self):
        """logits, d_hidden and d_weight as bare library products of the same shapes."""
        with torch.no_grad():
            logits = self.hidden @ self.weight.T
            return logits @ self.weight, logits.T @ self.hidden

    def right(self, gradient):
        """Compare the gradient of a few rows with float64."""
        head, rows = self.weight.detach().double(), torch.arange(4, device=self.ids.device)
        hidden = self.hidden.detach()[:4].double().requires_grad_()
        logp = (hidden @ head.T).log_softmax(-1)
        logprob = logp.gather(1, self.ids[rows, None]).squeeze(1)
        value = -logprob * self.advantages[rows].double() + 0.01 * (logp.exp() * logp).sum(-1)
        (truth,) = torch.autograd.grad(value.sum() / self.rows, hidden)
        error = (gradient[:4].double() - truth).norm() / truth.norm()
        assert error < (1e-2 if gradient.dtype == torch.bfloat16 else 1e-4), f"relative error {error:.1e}"


def test_linear_policy_loss(benchmark, device, smoke):
    case = Case(device, smoke)
    compare(
        benchmark,
        Provider("three bare products", case.products),
        Provider("fuserl", case.ours, case.right),
        Provider("fuserl, half the rows dead", lambda: case.ours(live=case.live)),
        Provider("fuserl, frozen head", lambda: case.ours(weight=case.weight.detach()), case.right),
        Provider("fuserl, soft cap and bias", lambda: case.ours(softcap=30.0, bias=case.weight.detach()[:, 0])),
        Provider("fuserl, scope batch", lambda: case.ours(scope="batch"), case.right),
        Provider("fuserl, 256 rows a chunk", lambda: case.ours(chunk=256), case.right),
        Provider("torch eager", case.eager, case.right),
        rounds=5,
        smoke=smoke,
    )
