"""linear_divergence against its bare products: without gradient, and with backward to a student alone."""

import torch
from head_shape import check_gradient, operands
from measure import Provider, compare

from fuserl.kernels.linear_divergence import linear_divergence
from fuserl.kernels.linear_policy_loss import linear_policy_loss

KIND = "reverse_kl"


def eager(hidden_p, weight_p, hidden_q, weight_q, _kind):
    """All logits of both, and the divergence and the entropy as trainers write them."""
    dtype = torch.float64 if hidden_p.dtype == torch.float64 else torch.float32
    log_p, log_q = ((h @ w.T).to(dtype).log_softmax(-1) for h, w in ((hidden_p, weight_p), (hidden_q, weight_q)))
    value = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return value, -(log_p.exp() * log_p).sum(-1)


compiled = torch.compile(eager)


class Case:
    """States and heads of a student and of a teacher not far from it, in the benchmark's shape."""

    def __init__(self, device, smoke):
        hidden, weight = operands(device, smoke)
        self.operands = [
            hidden, weight, hidden + 0.1 * torch.randn_like(hidden), weight + 0.01 * torch.randn_like(weight)
        ]  # fmt: skip
        self.half = torch.arange(len(hidden)) % 2 == 0
        self.ids = torch.zeros(len(hidden), dtype=torch.int64, device=device)
        few = [x[:4].double() if i % 2 == 0 else x.double() for i, x in enumerate(self.operands)]
        self.truth = eager(*few, KIND)
        leaves = few[0].requires_grad_()
        (self.gradient_truth,) = torch.autograd.grad(eager(*few, KIND)[0].sum(), leaves)

    def trained(self):
        """The same with leaves that want a gradient."""
        for leaf in self.operands[:2]:
            leaf.requires_grad_()
        return self

    @torch.no_grad()
    def products(self, backward=False):
        """The bare library products: two without gradient; the same again and two of the gradient with it."""
        hidden_p, weight_p, hidden_q, weight_q = self.operands
        for _ in range(1 + backward):
            logits, _ = hidden_p @ weight_p.T, hidden_q @ weight_q.T
        return (logits @ weight_p, logits.T @ hidden_p) if backward else logits

    @torch.no_grad()
    def measured(self, function=linear_divergence, **options):
        """Divergences and entropies."""
        return function(*self.operands, KIND, **options)

    def gradient(self, function=linear_divergence, **options):
        """Forward and backward; the student's states' gradient."""
        value, _ = function(*self.operands, KIND, **options)
        return torch.autograd.grad(value.sum(), self.operands[:2])[0]

    def one_pass(self):
        """The same by the op that knows the loss beforehand."""
        hidden, weight, *reference = self.operands
        loss, *_ = linear_policy_loss(
            hidden, weight, self.ids, lambda out, rows: out.reverse_kl, outputs=(KIND,), reference=reference
        )
        return torch.autograd.grad(loss, (hidden, weight))[0]

    def right(self, found):
        """Compare a few rows with float64."""
        loose = self.operands[0].dtype == torch.bfloat16
        for got, expected in zip(found, self.truth, strict=True):
            torch.testing.assert_close(got[:4].double(), expected, rtol=1e-2 if loose else 1e-3, atol=1e-4)

    def right_gradient(self, gradient):
        """Compare the gradient of a few rows with float64."""
        check_gradient(gradient[:4], self.gradient_truth)


def test_linear_divergence(benchmark, device, smoke):
    case = Case(device, smoke)
    compare(
        benchmark,
        Provider("two bare products", case.products),
        Provider("fuserl", case.measured, case.right),
        Provider("fuserl, half the rows masked", lambda: case.measured(mask=case.half)),
        Provider("torch eager", lambda: case.measured(eager), case.right),
        Provider("torch.compile", lambda: case.measured(compiled), case.right),
        rounds=5,
        smoke=smoke,
    )


def test_linear_divergence_forward_backward(benchmark, device, smoke):
    case = Case(device, smoke).trained()
    compare(
        benchmark,
        Provider("six bare products", lambda: case.products(backward=True)),
        Provider("fuserl", case.gradient, case.right_gradient),
        Provider("fuserl, half the rows masked", lambda: case.gradient(mask=case.half)),
        Provider("fuserl, 128 rows a chunk", lambda: case.gradient(chunk=128), case.right_gradient),
        Provider("fuserl, linear_policy_loss", case.one_pass, case.right_gradient),
        Provider("torch eager", lambda: case.gradient(eager), case.right_gradient),
        Provider("torch.compile", lambda: case.gradient(compiled), case.right_gradient),
        rounds=3,
        smoke=smoke,
    )
