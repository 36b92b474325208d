"""topk_divergence with its gradient: against one read of the logits and against torch, eager and compiled."""

import head_shape
import torch
from measure import Provider, compare

from fuserl.kernels.topk_divergence import topk_divergence


def inputs(device, smoke):
    """Peaky logits of a student, which require a gradient, and the 64 best tokens of a teacher not far from it."""
    student = head_shape.logits(device, smoke)
    teacher = (student.float() + 0.3 * torch.randn_like(student, dtype=torch.float32)).log_softmax(-1)
    logprobs, ids = teacher.topk(64)
    return student.requires_grad_(), ids, logprobs


def eager(student, ids, teacher, kind):
    """KL(teacher || student) over the listed tokens and one bucket for the rest, as a trainer writes it."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    log_p, log_q = student.to(dtype).log_softmax(-1).gather(-1, ids), teacher.to(dtype)
    log_p, log_q = (torch.cat([x, torch.log1p(-x.exp().sum(-1, keepdim=True))], -1) for x in (log_p, log_q))
    return (log_q.exp() * (log_q - log_p)).sum(-1), None


compiled = torch.compile(eager)


def with_backward(function, student, ids, teacher):
    """One forward and backward of the summed divergence."""

    def run():
        value, _ = function(student, ids, teacher, "forward_kl")
        return value.detach(), torch.autograd.grad(value.sum(), student)[0]

    return run


def test_topk_divergence_forward_backward(benchmark, device, smoke):
    student, ids, teacher = inputs(device, smoke)
    truth = with_backward(eager, student[:8].detach().double().requires_grad_(), ids[:8], teacher[:8].double())()

    def right(results):
        for got, expected in zip(results, truth, strict=True):
            torch.testing.assert_close(got[:8].double(), expected, rtol=2e-2 if got.dim() > 1 else 1e-3, atol=2e-5)

    compare(
        benchmark,
        Provider("read the logits: x.sum()", lambda: student.detach().sum()),
        Provider("fuserl", with_backward(topk_divergence, student, ids, teacher), right),
        Provider("torch eager", with_backward(eager, student, ids, teacher), right),
        Provider("torch.compile", with_backward(compiled, student, ids, teacher), right),
        smoke=smoke,
    )
