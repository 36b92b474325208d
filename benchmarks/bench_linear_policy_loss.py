"""linear_policy_loss: against the three bare products of its shapes, other libraries, and rows that cost it less."""

import head_rivals
import torch
from head_shape import check_gradient, operands
from measure import Provider, compare

from fuserl.kernels.linear_policy_loss import linear_policy_loss

LOW, HIGH, LENGTH = 0.8, 1.2, 64


class Case:
    """A clipped loss with an entropy bonus over a head of the benchmark's shape; rollouts of 64 tokens."""

    def __init__(self, device, smoke):
        self.hidden, self.weight = (x.requires_grad_() for x in operands(device, smoke))
        self.rows, vocabulary = len(self.hidden), len(self.weight)
        self.ids = torch.randint(vocabulary, (self.rows,), device=device)
        self.advantages = torch.randn(self.rows // LENGTH, device=device).repeat_interleave(LENGTH)
        self.live = torch.arange(self.rows) % 2 == 0
        head = self.weight.detach().double()
        self.few = torch.randint(vocabulary, (8,), device=device)
        known = [self._known(rows, head) for rows in torch.arange(self.rows, device=device).split(256)]
        logprob, self.entropy, self.few_logp = (torch.cat(column) for column in zip(*known, strict=True))
        self.logprob = logprob
        # half a step of ratio off, so that none is clipped; with `half`, odd rows are, in their advantage's direction
        self.old = (logprob - 0.1 * torch.rand(self.rows, device=device)).float()
        clipped = torch.where(self.live.to(device), 0.0, 0.5 * self.advantages.sign())
        self.half = torch.where(clipped == 0, self.old, (logprob - clipped).float())

    def _known(self, rows, head):
        """In float64, log-prob and entropy of some rows, and the log-probs of a few tokens."""
        logp = (self.hidden.detach()[rows].double() @ head.T).log_softmax(-1)
        return logp.gather(1, self.ids[rows, None]).squeeze(1), -(logp.exp() * logp).sum(-1), logp[:, self.few]

    def token_loss(self, logprob, entropy, rows, *, old, coef):
        """-min(ratio A, clip(ratio) A) - coef entropy, over the rows."""
        advantages, ratio = self.advantages[rows], (logprob - old[rows]).exp()
        loss = -torch.minimum(ratio * advantages, ratio.clamp(LOW, HIGH) * advantages)
        return (loss - coef * entropy if coef else loss) / self.rows

    def ours(self, weight=None, half=False, coef=0.01, **options):
        """Forward and backward of the op; returns the gradients."""
        weight, old = self.weight if weight is None else weight, self.half if half else self.old

        def token_loss(out, rows):
            return self.token_loss(out.logprob, out.entropy if coef else None, rows, old=old, coef=coef)

        outputs = ("logprob", "entropy") if coef else ("logprob",)
        loss, *_ = linear_policy_loss(self.hidden, weight, self.ids, token_loss, outputs=outputs, **options)
        return torch.autograd.grad(loss, [self.hidden] + ([weight] if weight.requires_grad else []))

    def through(self, scorer, coef=0.01):
        """The same loss of what another function makes of hidden states."""
        logprob, entropy = scorer(self.hidden, self.weight, self.ids)
        rows = torch.arange(self.rows, device=self.ids.device)
        loss = self.token_loss(logprob.float(), entropy, rows, old=self.old, coef=coef).sum()
        return torch.autograd.grad(loss, [self.hidden, self.weight])

    def liger_grpo(self):
        """The same loss, without its entropy bonus."""
        loss = head_rivals.liger_grpo(self.hidden, self.weight, self.ids, self.advantages, self.old, LENGTH)
        return torch.autograd.grad(loss, [self.hidden, self.weight])

    def products(self):
        """logits, d_hidden and d_weight as bare library products of the same shapes."""
        with torch.no_grad():
            logits = self.hidden @ self.weight.T
            return logits @ self.weight, logits.T @ self.hidden

    def right(self, *, coef=0.01, half=False):
        """A gate: d_hidden of four rows and d_weight of eight tokens, from float64."""
        old = (self.half if half else self.old).double()

        def gate(gradients):
            for name, got, truth in zip(("d_hidden", "d_weight"), gradients, self._truth(old, coef), strict=False):
                check_gradient(got[:4] if name == "d_hidden" else got[self.few], truth, of=name)

        return gate

    def _truth(self, old, coef):
        hidden, head = self.hidden.detach()[:4].double().requires_grad_(), self.weight.detach().double()
        logp, rows = (hidden @ head.T).log_softmax(-1), torch.arange(4, device=self.ids.device)
        logprob = logp.gather(1, self.ids[:4, None]).squeeze(1)
        loss = self.token_loss(logprob, -(logp.exp() * logp).sum(-1), rows, old=old, coef=coef).sum()
        (d_hidden,) = torch.autograd.grad(loss, hidden)
        logprob = self.logprob.clone().requires_grad_()
        rows = torch.arange(self.rows, device=self.ids.device)
        (g,) = torch.autograd.grad(self.token_loss(logprob, self.entropy, rows, old=old, coef=coef).sum(), logprob)
        chosen = (self.ids[:, None] == self.few).double()
        p = self.few_logp.exp()
        d_logits = g[:, None] * (chosen - p) + coef / self.rows * p * (self.few_logp + self.entropy[:, None])
        return d_hidden, d_logits.T @ self.hidden.detach().double()


def test_linear_policy_loss(benchmark, device, smoke):
    case = Case(device, smoke)
    compare(
        benchmark,
        Provider("three bare products", case.products),
        Provider("fuserl", case.ours, case.right()),
        Provider("fuserl, no entropy", lambda: case.ours(coef=0.0), case.right(coef=0.0)),
        Provider(
            "fuserl, no entropy, half the rows clipped", lambda: case.ours(coef=0.0, half=True),
            case.right(coef=0.0, half=True),
        ),
        Provider("fuserl, half the rows dead", lambda: case.ours(live=case.live)),
        Provider("fuserl, frozen head", lambda: case.ours(weight=case.weight.detach()), case.right()),
        Provider("fuserl, soft cap and bias", lambda: case.ours(softcap=30.0, bias=case.weight.detach()[:, 0])),
        Provider("fuserl, scope batch", lambda: case.ours(scope="batch"), case.right()),
        Provider("fuserl, 256 rows a chunk", lambda: case.ours(chunk=256), case.right()),
        Provider("fuserl, 96 rows a chunk", lambda: case.ours(chunk=96), case.right()),
        Provider("torch eager", lambda: case.through(head_rivals.eager), case.right()),
        *(
            Provider(name, lambda f=f, c=0.01 * entropy: case.through(f, c), case.right(coef=0.01 * entropy))
            for name, (f, entropy) in head_rivals.scorers().items()
        ),
        Provider(head_rivals.GRPO, case.liger_grpo, case.right(coef=0.0)),
        rounds=5,
        smoke=smoke,
    )  # fmt: skip
