"""Liger's distillation losses over `linear_policy_loss` with the teacher as its second head.

Where they differ from liger-kernel 0.8.5: logits and divergence are float32 (the chunked loss of Liger takes its
softmax in the logits' dtype); ignored tokens are not projected, and a frozen head is not differentiated; soft and hard
loss are returned detached (Liger's have a graph through which no gradient comes). A teacher with more tokens than the
student raises: Liger gives each of them the student's logit 0, a share of the probability that belongs to the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fuserl.kernels.head_outputs import requirer
from fuserl.kernels.linear_policy_loss import linear_policy_loss
from fuserl.kernels.second_head import Reference
from fuserl.kernels.softmax_rows import accumulator


class _Distillation:
    """The two terms of a distillation loss: divergence from a teacher, and likelihood of the labels.

    Args:
        student, teacher: (hidden, weight, bias).
        labels: the tokens, ignore_index at those that are left out; None to take every row.
        beta: 0 for the KL from the teacher, 1 for that of the student, between them the generalised Jensen-Shannon.
    """

    def __init__(self, op, student, teacher, labels, *, ignore_index, beta, temperature):
        require, self.beta, self.temperature = requirer(op), beta, temperature
        self.student, self.teacher = ((x[0].flatten(0, -2), *x[1:]) for x in (student, teacher))
        count = len(self.student[0])
        labels = torch.zeros(count, dtype=torch.int64, device=student[0].device) if labels is None else labels.flatten()
        require(
            len(labels) == count, f"labels must be ({count},)", tuple(labels.shape), "Pass one per row of the states."
        )
        rows = len(self.student[1]), len(self.teacher[1])
        require(
            rows[0] == rows[1], "teacher_weight must have as many rows as student_weight", f"{rows[1]} and {rows[0]}",
            f"Where both share the first {min(rows)} tokens, pass weight[:{min(rows)}].",
        )  # fmt: skip
        require(0 <= beta <= 1, "beta must be in [0, 1]", beta, "0 and 1 are the two KLs.")
        require(temperature > 0, "temperature must be positive", temperature, "1 leaves the logits.")
        self.valid = labels != ignore_index
        self.labels, self.live = labels.masked_fill(~self.valid, 0), self.valid.cpu()
        self.kind = {0: "forward_kl", 1: "reverse_kl"}.get(beta, "jensen_shannon")
        self.count = self.valid.sum().clamp(min=1)

    def loss(self, hard: float, soft: float, both: bool) -> tuple[Tensor, Tensor, Tensor]:
        """hard * likelihood + soft * divergence, and the two terms themselves, detached; `both` though weighted 0."""
        with_hard, with_soft = hard != 0 or both or soft == 0, soft != 0 or both
        # The labels' term is at temperature 1.
        if with_hard and with_soft and self.temperature == 1:
            return self._run(hard, soft)
        zero = self.student[0].new_zeros((), dtype=accumulator(self.student[0].dtype))
        terms = [zero, zero, zero]
        for wanted, weights, temperature in (
            (with_soft, (None, soft), self.temperature), (with_hard, (hard, None), 1.0),
        ):  # fmt: skip
            if wanted:
                terms = [a + b for a, b in zip(terms, self._run(*weights, temperature), strict=True)]
        return tuple(terms)

    def _run(self, hard: float | None, soft: float | None, temperature: float = 1.0):
        outputs = (("logprob",) if hard is not None else ()) + ((self.kind,) if soft is not None else ())

        def token_loss(out, rows):
            zero = torch.zeros_like(rows, dtype=count.dtype)
            nll = -out.logprob / count if hard is not None else zero
            divergence = getattr(out, self.kind) / count if soft is not None else zero
            return (hard or 0.0) * nll + (soft or 0.0) * divergence, {"soft": divergence, "hard": nll}

        (hidden, weight, bias), count = self.student, self.count.to(accumulator(self.student[0].dtype))
        second = {} if soft is None else {"reference": Reference(*self.teacher, beta=self.beta)}
        loss, _, found = linear_policy_loss(
            hidden, weight, self.labels, token_loss, outputs=outputs, live=self.live, bias=bias,
            temperature=temperature, **second,
        )  # fmt: skip
        sums = [found[name].where(self.valid, 0.0).sum() if found else loss.new_zeros(()) for name in ("soft", "hard")]
        return loss, *sums


class LigerFusedLinearJSDLoss(torch.nn.Module):
    """Generalised Jensen-Shannon divergence from a teacher and cross entropy of labels, of `liger_kernel.chunked_loss`.

        loss = weight_hard_loss mean(nll at temperature 1) + weight_soft_loss mean(divergence at temperature)
        divergence = beta KL(teacher | m) + (1 - beta) KL(student | m),  m = beta teacher + (1 - beta) student

    Args:
        weight_hard_loss, weight_soft_loss: of the two terms.
        beta: in [0, 1]; 0 is KL(teacher | student), 1 is KL(student | teacher).
        ignore_index: label of rows that are left out.
        temperature: of the divergence; another than 1 costs a pass of its own where both terms are wanted.
        compiled, chunk_size: how Liger runs; taken, and without effect.
        return_soft_hard_loss: return (loss, soft, hard).

    Raises:
        ValueError: on an option that cannot be honoured, when called.
    """

    def __init__(
        self, weight_hard_loss: float = 0.5, weight_soft_loss: float = 0.5, beta: float = 0.5,
        ignore_index: int = -100, temperature: float = 1.0, compiled: bool = True, chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.weight_hard_loss, self.weight_soft_loss, self.beta = weight_hard_loss, weight_soft_loss, beta
        self.ignore_index, self.temperature, self.compiled = ignore_index, temperature, compiled
        self.chunk_size, self.return_soft_hard_loss = chunk_size, return_soft_hard_loss

    def forward(
        self, student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor,
        true_labels: Tensor, student_bias: Tensor | None = None, teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The loss, differentiable in the student's states, weight and bias.

        Args:
            student_input, student_weight, student_bias: (N, D), (V, D) and (V,).
            teacher_input, teacher_weight, teacher_bias: (N, D_t), (V, D_t) and (V,), as data.
            true_labels: (N,) int64.

        Returns:
            The loss, a scalar whose backward may run once, or (loss, soft, hard), the last two detached.

        Memory: two chunks of float32 logits. Sibling: `fuserl.linear_divergence`.
        """
        student, teacher = (student_input, student_weight, student_bias), (teacher_input, teacher_weight, teacher_bias)
        options = {"ignore_index": self.ignore_index, "beta": self.beta, "temperature": self.temperature}
        terms = _Distillation("LigerFusedLinearJSDLoss", student, teacher, true_labels, **options)
        found = terms.loss(self.weight_hard_loss, self.weight_soft_loss, self.return_soft_hard_loss)
        return found if self.return_soft_hard_loss else found[0]


class LigerFusedLinearJSD(torch.nn.Module):
    """Generalised Jensen-Shannon divergence from a teacher, of `liger_kernel.transformers`.

    Args:
        jsd_beta: in [0, 1], as `beta` of `LigerFusedLinearJSDLoss`.
        ignore_index: label of rows that are left out.
        temperature: of both distributions.
        accum_dtype: gradients are accumulated in float32 (float64 from float64); a finer dtype raises.
    """

    def __init__(
        self, jsd_beta: float = 0.5, ignore_index: int = -100, temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        self.jsd_beta, self.ignore_index = jsd_beta, ignore_index
        self.temperature, self.accum_dtype = temperature, accum_dtype

    def forward(
        self, student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Mean divergence of the rows whose label is not ignore_index, differentiable in the student's.

        Args:
            student_input, student_weight, teacher_input, teacher_weight: (N, D), (V, D), (N, D_t) and (V, D_t).
            shift_labels: (N,) int64; None to take every row.
        """
        dtype = accumulator(student_input.dtype)
        requirer("LigerFusedLinearJSD")(
            self.accum_dtype is None or torch.finfo(self.accum_dtype).eps >= torch.finfo(dtype).eps,
            f"accum_dtype must be no finer than {dtype}, in which gradients are accumulated", self.accum_dtype,
            "Leave it out.",
        )  # fmt: skip
        student, teacher = (student_input, student_weight, None), (teacher_input, teacher_weight, None)
        options = {"ignore_index": self.ignore_index, "beta": self.jsd_beta, "temperature": self.temperature}
        return _Distillation("LigerFusedLinearJSD", student, teacher, shift_labels, **options).loss(0.0, 1.0, False)[0]
