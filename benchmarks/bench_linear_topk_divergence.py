"""linear_topk_divergence: against its four bare products, and plain torch on all logits, with the teacher's 64 best."""

import torch
from head_shape import check_gradient, operands
from measure import Provider, compare

from fuserl.kernels.linear_topk_divergence import linear_topk_divergence

KIND, LISTED = "forward_kl", 64


def eager(hidden, weight, ids, teacher, _kind):
    """All logits, log_softmax, and a bucket for the rest of both."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    listed = (hidden @ weight.T).to(dtype).log_softmax(-1).gather(-1, ids)
    rest = [torch.log1p(-x.exp().sum(-1, keepdim=True)) for x in (listed, teacher)]
    log_p, log_q = torch.cat([listed, rest[0]], -1), torch.cat([teacher, rest[1]], -1)
    return (torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1),)


compiled = torch.compile(eager)


class Case:
    """States, a head, and the lists of a teacher not far from them, in the benchmark's shape."""

    def __init__(self, device, smoke):
        hidden, weight = operands(device, smoke)
        near = (hidden + 0.1 * torch.randn_like(hidden)).split(512)
        lists = [(x @ weight.T).float().log_softmax(-1).topk(LISTED) for x in near]
        self.teacher, self.ids = (torch.cat(x) for x in zip(*lists, strict=True))
        self.leaves = hidden.requires_grad_(), weight.requires_grad_()
        few = [x.detach().double() for x in (hidden[:4], weight)]
        value = eager(few[0].requires_grad_(), few[1], self.ids[:4], self.teacher[:4].double(), KIND)[0]
        (self.truth,) = torch.autograd.grad(value.sum(), few[0])

    @torch.no_grad()
    def products(self):
        """The bare library products: the logits twice, and the two of the gradient."""
        hidden, weight = self.leaves
        for _ in range(2):
            logits = hidden @ weight.T
        return logits @ weight, logits.T @ hidden

    def gradient(self, function=linear_topk_divergence, **options):
        """Forward and backward; the states' gradient."""
        value = function(*self.leaves, self.ids, self.teacher, KIND, **options)[0]
        return torch.autograd.grad(value.sum(), self.leaves)[0]

    def right(self, gradient):
        """Compare the gradient of a few rows with float64."""
        check_gradient(gradient[:4], self.truth)


def test_linear_topk_divergence_forward_backward(benchmark, device, smoke):
    case = Case(device, smoke)
    compare(
        benchmark,
        Provider("four bare products", case.products),
        Provider("fuserl", case.gradient, case.right),
        Provider("fuserl, 128 rows a chunk", lambda: case.gradient(chunk=128), case.right),
        Provider("torch eager", lambda: case.gradient(eager), case.right),
        Provider("torch.compile", lambda: case.gradient(compiled), case.right),
        rounds=3,
        smoke=smoke,
    )
