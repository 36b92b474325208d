"""divergence: against one read of both logits (forward), and against torch, eager and compiled (with backward)."""

import head_shape
import pytest
import torch
from measure import Provider, compare

from fuserl.kernels.divergence import divergence


def inputs(device, smoke):
    """Peaky logits of a student, which require a gradient, and a teacher's not far from them."""
    student = head_shape.logits(device, smoke)
    teacher = student + 0.3 * torch.randn_like(student)
    return student.requires_grad_(), teacher


def eager(student, teacher, kind):
    """The divergence and the entropy as trainers write them."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    log_p, log_q = student.to(dtype).log_softmax(-1), teacher.to(dtype).log_softmax(-1)
    kl = torch.nn.functional.kl_div
    if kind == "forward_kl":
        value = kl(log_p, log_q, reduction="none", log_target=True)
    elif kind == "reverse_kl":
        value = kl(log_q, log_p, reduction="none", log_target=True)
    else:
        mixture = torch.logsumexp(torch.stack([log_p, log_q]), 0) - torch.log(torch.tensor(2.0, dtype=dtype))
        value = sum(0.5 * kl(mixture, x, reduction="none", log_target=True) for x in (log_p, log_q))
    return value.sum(-1), -(log_p.exp() * log_p).sum(-1)


compiled = torch.compile(eager)


def forward(function, student, teacher, kind):
    """Values alone."""

    def run():
        with torch.no_grad():
            return function(student, teacher, kind)

    return run


def with_backward(function, student, teacher, kind):
    """One forward and backward of the summed divergence."""

    def run():
        value, _ = function(student, teacher, kind)
        return value.detach(), torch.autograd.grad(value.sum(), student)[0]

    return run


def gate(truth):
    """Compare the first rows with float64."""

    def right(results):
        for got, expected in zip(results, truth, strict=True):
            torch.testing.assert_close(got[:8].double(), expected, rtol=2e-2 if got.dim() > 1 else 1e-3, atol=2e-5)

    return right


def floor(student, teacher):
    """Both logits, read."""
    return Provider("read both logits: x.sum()", lambda: (student.detach().sum(), teacher.sum()))


def test_divergence_forward(benchmark, device, smoke):
    student, teacher = inputs(device, smoke)
    right = gate(forward(eager, student[:8].detach().double(), teacher[:8].double(), "reverse_kl")())
    compare(
        benchmark,
        floor(student, teacher),
        Provider("fuserl", forward(divergence, student, teacher, "reverse_kl"), right),
        Provider("torch eager", forward(eager, student, teacher, "reverse_kl"), right),
        Provider("torch.compile", forward(compiled, student, teacher, "reverse_kl"), right),
        smoke=smoke,
    )


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_divergence_forward_backward(benchmark, device, smoke, kind):
    student, teacher = inputs(device, smoke)
    doubles = student[:8].detach().double().requires_grad_(), teacher[:8].double()
    right = gate(with_backward(eager, *doubles, kind)())
    compare(
        benchmark,
        floor(student, teacher),
        Provider("fuserl", with_backward(divergence, student, teacher, kind), right),
        Provider("torch eager", with_backward(eager, student, teacher, kind), right),
        Provider("torch.compile", with_backward(compiled, student, teacher, kind), right),
        smoke=smoke,
        rounds=5,
    )
