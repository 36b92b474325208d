"""What the divergence ops are tried on for the numerics page, and how a trainer writes them."""

from __future__ import annotations

from collections.abc import Callable

import subjects
import torch
from subjects import Subject
from torch import Tensor

from fuserl.kernels import (
    divergence,
    linear_divergence,
    linear_topk_divergence,
    sampled_divergence,
    topk_divergence,
)

LISTED = 64


def students(kind: str, rows: int, vocabulary: int) -> tuple[Tensor, ...]:
    """Logits of a student and of a teacher, and the gradients that come from above."""
    student = 4 * torch.randn(rows, vocabulary)
    teacher = student + (1e-3 if kind == "near" else 1.0) * torch.randn(rows, vocabulary)
    moved = torch.where(student > 4, 1e4, 0.0) if kind == "large" else 0.0
    return student + moved, teacher + moved, 0.5 + torch.rand(rows)


def listed(kind: str, rows: int, vocabulary: int) -> tuple[Tensor, ...]:
    """Logits of a student, a teacher's best tokens and their log-probs, and the gradients that come from above."""
    student, teacher, g = students(kind, rows, vocabulary)
    logprobs, ids = teacher.log_softmax(-1).topk(LISTED)
    return student, ids, logprobs, g


def pairs(kind: str, rows: int, vocabulary: int, width: int) -> tuple[Tensor, ...]:
    """States and heads of a student and of a teacher, and the gradients that come from above."""
    hidden, weight = torch.randn(rows, width), torch.randn(vocabulary, width) * 4 / width**0.5
    apart = 1e-3 if kind == "near" else 0.25
    other = hidden + apart * torch.randn_like(hidden), weight
    return hidden, weight, *other, 0.5 + torch.rand(rows)


def listed_pairs(kind: str, rows: int, vocabulary: int, width: int) -> tuple[Tensor, ...]:
    """States and a head of a student, a teacher's best tokens and their log-probs, and the gradients from above."""
    hidden, weight, states, head, g = pairs(kind, rows, vocabulary, width)
    logprobs, ids = (states @ head.T).log_softmax(-1).topk(LISTED)
    return hidden, weight, ids, logprobs, g


def samples(kind: str, rows: int) -> tuple[Tensor, ...]:
    """Log-probs of the policy and of the reference."""
    old = -3 * torch.rand(rows)
    return old + {"usual": 0.1, "near": 1e-4, "far": 3.0}[kind] * torch.randn(rows), old


def divergence_run(backend: str, student: Tensor, teacher: Tensor, g: Tensor) -> dict[str, Tensor]:
    """The op for three kinds, and autograd through it."""
    kinds = ("forward_kl", "reverse_kl", "jensen_shannon")
    return _each(kinds, student, g, lambda leaf, kind: divergence.divergence(leaf, teacher, kind, backend=backend)[0])


def divergence_eager(student: Tensor, teacher: Tensor, g: Tensor) -> dict[str, Tensor]:
    """log_softmax and kl_div in the logits' dtype."""
    kinds = ("forward_kl", "reverse_kl", "jensen_shannon")
    return _each(kinds, student, g, lambda leaf, kind: _plain(leaf, teacher, kind))


def topk_run(backend: str, student: Tensor, ids: Tensor, teacher: Tensor, g: Tensor) -> dict[str, Tensor]:
    """The op for both KLs, and autograd through it."""

    def ours(leaf, kind):
        return topk_divergence.topk_divergence(leaf, ids, teacher, kind, backend=backend)[0]

    return _each(("forward_kl", "reverse_kl"), student, g, ours)


def topk_eager(student: Tensor, ids: Tensor, teacher: Tensor, g: Tensor) -> dict[str, Tensor]:
    """log_softmax in the logits' dtype, and a bucket for the rest of both in the teacher's."""
    return _each(("forward_kl", "reverse_kl"), student, g, lambda leaf, kind: _plain_buckets(leaf, ids, teacher, kind))


def linear_run(backend: str, hidden: Tensor, weight: Tensor, states: Tensor, head: Tensor, g) -> dict[str, Tensor]:
    """The op for three kinds, and autograd through it."""

    def ours(hidden, weight, kind):
        return linear_divergence.linear_divergence(hidden, weight, states, head, kind, backend=backend)[0]

    return _each_of_states(("forward_kl", "reverse_kl", "jensen_shannon"), hidden, weight, g, ours)


def linear_eager(hidden: Tensor, weight: Tensor, states: Tensor, head: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Logits by a product in the dtype, log_softmax and kl_div in the dtype."""

    def plain(hidden, weight, kind):
        return _plain(hidden @ weight.T, states @ head.T, kind)

    return _each_of_states(("forward_kl", "reverse_kl", "jensen_shannon"), hidden, weight, g, plain)


def linear_topk_run(backend: str, hidden: Tensor, weight: Tensor, ids: Tensor, teacher, g) -> dict[str, Tensor]:
    """The op for both KLs, and autograd through it."""

    def ours(hidden, weight, kind):
        return linear_topk_divergence.linear_topk_divergence(hidden, weight, ids, teacher, kind, backend=backend)[0]

    return _each_of_states(("forward_kl", "reverse_kl"), hidden, weight, g, ours)


def linear_topk_eager(hidden: Tensor, weight: Tensor, ids: Tensor, teacher: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Logits by a product in the dtype, then as from logits."""

    def plain(hidden, weight, kind):
        return _plain_buckets(hidden @ weight.T, ids, teacher, kind)

    return _each_of_states(("forward_kl", "reverse_kl"), hidden, weight, g, plain)


def sampled_run(backend: str, logprobs: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """The op for three kinds, and autograd through it."""

    def ours(leaf, kind):
        return sampled_divergence.sampled_divergence(leaf, reference, kind, backend=backend)

    return _each(("k3", "forward_kl", "jensen_shannon"), logprobs, None, ours)


def sampled_eager(logprobs: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """The estimates as they are read."""

    def plain(leaf, kind):
        d = leaf - reference
        if kind == "jensen_shannon":
            mixture = torch.log(0.5 * (1 + d.exp()))
            return 0.5 * (d.exp() * (d - mixture) - mixture)
        return (-d).exp() - 1 + d if kind == "k3" else d.exp() - 1 - d

    return _each(("k3", "forward_kl", "jensen_shannon"), logprobs, None, plain)


def _each(kinds: tuple[str, ...], logits: Tensor, g: Tensor | None, function: Callable) -> dict[str, Tensor]:
    """Values and gradients by kind."""
    found = {}
    for kind in kinds:
        leaf = logits.detach().clone().requires_grad_()
        value = function(leaf, kind)
        found[kind] = value.detach()
        (found[f"d_{kind}"],) = torch.autograd.grad(value, leaf, torch.ones_like(value) if g is None else g.to(value))
    return found


def _each_of_states(kinds: tuple[str, ...], hidden: Tensor, weight: Tensor, g: Tensor, function: Callable) -> dict:
    """Values by kind, and the gradients of reverse_kl: sums of several cancel, which says nothing of an op."""
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    found = {kind: function(*leaves, kind) for kind in kinds}
    value = found["reverse_kl"]
    d_hidden, d_weight = torch.autograd.grad(value, leaves, g.to(value))
    return {**{kind: x.detach() for kind, x in found.items()}, "d_hidden": d_hidden, "d_weight": d_weight}


def _plain(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    if kind == "jensen_shannon":
        mixture = torch.logsumexp(torch.stack([log_p, log_q]), 0) - 0.6931471805599453
        return 0.5 * (_kl(mixture, log_p) + _kl(mixture, log_q))
    return _kl(log_p, log_q) if kind == "forward_kl" else _kl(log_q, log_p)


def _plain_buckets(student: Tensor, ids: Tensor, teacher: Tensor, kind: str) -> Tensor:
    buckets = [student.log_softmax(-1).gather(-1, ids).to(teacher.dtype), teacher]
    rest = [torch.log((1 - x.exp().sum(-1, keepdim=True)).clamp_min(1e-7)) for x in buckets]
    log_p, log_q = (torch.cat(pair, -1) for pair in zip(buckets, rest, strict=True))
    return _kl(log_p, log_q) if kind == "forward_kl" else _kl(log_q, log_p)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) as torch names it."""
    return torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


_NEAR = {
    "usual": "logits of standard deviation 4, of a student and a teacher at a distance of 1",
    "near": "the same at a distance of 0.001",
    "large": "the same at a distance of 1, where the student's is above 4 both moved up by 1e4",
}  # fmt: skip
SUBJECTS = {
    "divergence": Subject(
        lambda kind, rows: students(kind, rows, subjects.VOCABULARY), divergence_run,
        divergence_eager, divergence.IMPLS, _NEAR,
    ),
    "topk_divergence": Subject(
        lambda kind, rows: listed(kind, rows, subjects.VOCABULARY), topk_run,
        topk_eager, topk_divergence.IMPLS, {"usual": f"{_NEAR['usual']}, whose 64 best tokens are known"},
    ),
    "linear_divergence": Subject(
        lambda kind, rows: pairs(kind, rows, subjects.VOCABULARY, subjects.WIDTH), linear_run,
        linear_eager, linear_divergence.IMPLS,
        {"usual": f"{_NEAR['usual']}, from their states", "near": "the same at a distance of 0.004"},
    ),
    "linear_topk_divergence": Subject(
        lambda kind, rows: listed_pairs(kind, rows, subjects.VOCABULARY, subjects.WIDTH), linear_topk_run,
        linear_topk_eager, linear_topk_divergence.IMPLS,
        {"usual": f"{_NEAR['usual']}, from the student's states and the teacher's 64 best tokens"},
    ),
    "sampled_divergence": Subject(
        samples, sampled_run, sampled_eager, sampled_divergence.IMPLS,
        {"usual": "log-ratios of standard deviation 0.1", "near": "of 1e-4", "far": "of 3"}, (torch.float32,),
    ),
}  # fmt: skip
