"""linear_logprob: against the bare product (without gradient), and against its four products (with backward)."""

import head_rivals
import torch
from head_shape import check_gradient, operands
from measure import Provider, compare

from fuserl.kernels.linear_logprob import linear_logprob, reference
from fuserl.kernels.linear_policy_loss import linear_policy_loss

OUTPUTS = ("logprob", "entropy")


class Case:
    """Hidden states and a head of the benchmark's shape, and a loss of log-probs and entropies."""

    def __init__(self, device, smoke):
        self.hidden, self.weight = operands(device, smoke)
        rows, vocabulary = len(self.hidden), len(self.weight)
        self.ids = torch.randint(vocabulary, (rows,), device=device)
        self.half = torch.arange(rows) % 2 == 0
        self.logits = 4 * rows * vocabulary  # bytes
        few = reference(self.hidden[:4].double(), self.weight.double(), self.ids[:4], outputs=OUTPUTS)
        self.truth = torch.stack([few.logprob, few.entropy])

    def trained(self):
        """The same with leaves that want a gradient."""
        self.hidden.requires_grad_()
        self.weight.requires_grad_()
        return self

    def product(self):
        """The bare library product; chunks of its result are not written over."""
        with torch.no_grad():
            return self.hidden @ self.weight.T

    def four(self):
        """The product twice, and those that give d_hidden and d_weight."""
        self.product()
        with torch.no_grad():
            logits = self.product()
            return logits @ self.weight, logits.T @ self.hidden

    @torch.no_grad()
    def scored(self, function=linear_logprob, **options):
        """Log-probs and entropies, (2, N)."""
        out = function(self.hidden, self.weight, self.ids, outputs=OUTPUTS, **options)
        return torch.stack([out.logprob, out.entropy])

    def gradient(self, function=linear_logprob, **options):
        """Forward and backward; the gradients."""
        out = function(self.hidden, self.weight, self.ids, outputs=OUTPUTS, **options)
        return torch.autograd.grad((out.logprob - 0.01 * out.entropy).sum(), (self.hidden, self.weight))

    @torch.no_grad()
    def scored_by(self, scorer):
        """Log-probs and entropies of another function, or log-probs alone."""
        logprob, entropy = scorer(self.hidden, self.weight, self.ids)
        return torch.stack([logprob] if entropy is None else [logprob, entropy])

    def gradient_by(self, scorer):
        """The same loss of another function, without the entropy where it has none."""
        logprob, entropy = scorer(self.hidden, self.weight, self.ids)
        loss = logprob if entropy is None else logprob - 0.01 * entropy
        return torch.autograd.grad(loss.sum(), (self.hidden, self.weight))

    def one_pass(self):
        """The same loss by the op that knows it beforehand."""
        loss, *_ = linear_policy_loss(
            self.hidden, self.weight, self.ids, lambda out, rows: out.logprob - 0.01 * out.entropy, outputs=OUTPUTS
        )
        return torch.autograd.grad(loss, (self.hidden, self.weight))

    def right(self, scored):
        """Compare a few rows with float64."""
        torch.testing.assert_close(scored[:, :4].double(), self.truth[: len(scored)], rtol=1e-4, atol=1e-4)

    def right_gradient(self, gradients, coef=0.01):
        """Compare the hidden states' gradient of a few rows with float64."""
        gradient, hidden = gradients[0], self.hidden.detach()[:4].double().requires_grad_()
        out = reference(hidden, self.weight.detach().double(), self.ids[:4], outputs=OUTPUTS)
        (truth,) = torch.autograd.grad((out.logprob - coef * out.entropy).sum(), hidden)
        check_gradient(gradient[:4], truth, coarse=1e-2)


def test_linear_logprob(benchmark, device, smoke):
    case = Case(device, smoke)
    compare(
        benchmark,
        Provider("the bare product", case.product),
        Provider("fuserl", case.scored, case.right),
        Provider("fuserl, half the rows masked", lambda: case.scored(mask=case.half)),
        Provider("fuserl, soft cap", lambda: case.scored(softcap=30.0)),
        Provider("fuserl, 256 rows a chunk", lambda: case.scored(chunk=256), case.right),
        Provider("torch eager", lambda: case.scored(reference), case.right),
        *(
            Provider(name, lambda f=scorer: case.scored_by(f), case.right)
            for name, (scorer, _) in head_rivals.scorers().items()
        ),
        rounds=7,
        smoke=smoke,
    )


def test_linear_logprob_forward_backward(benchmark, device, smoke):
    case = Case(device, smoke).trained()
    compare(
        benchmark,
        Provider("four bare products", case.four),
        Provider("fuserl", case.gradient, case.right_gradient),
        Provider("fuserl, half the rows masked", lambda: case.gradient(mask=case.half)),
        Provider("fuserl, half the logits kept", lambda: case.gradient(memory=case.logits // 2), case.right_gradient),
        Provider("fuserl, all logits kept", lambda: case.gradient(memory=case.logits), case.right_gradient),
        Provider("fuserl, linear_policy_loss", case.one_pass, case.right_gradient),
        Provider("torch eager", lambda: case.gradient(reference), case.right_gradient),
        *(
            Provider(name, lambda f=f: case.gradient_by(f), lambda g, c=0.01 * e: case.right_gradient(g, c))
            for name, (f, e) in head_rivals.scorers().items()
        ),
        rounds=5,
        smoke=smoke,
    )
