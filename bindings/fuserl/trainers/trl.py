"""TRL's trainers on our ops: one line before they train, the same numbers, and no logits in memory.

    import fuserl.trainers.trl
    fuserl.trainers.trl.patch()              # until unpatch(); or: with fuserl.trainers.trl.patch(): trainer.train()
    print(fuserl.trainers.trl.report())

GRPOTrainer, RLOOTrainer, DPOTrainer, KTOTrainer, SFTTrainer and the distillation trainers take their log-probs,
entropies and divergences from what is replaced here; trainers that exist already take part, but for their models'
linear layers, which those made from now on have from `fuserl.layers`, for good. Two things differ:
log-probs of bfloat16 and float16 logits are float32 on every device, which TRL's CPU path rounds to the logits' dtype,
and a tie for the largest logit, which TRL gives to the first token, counts as top 1 for each.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from fuserl import layers
from fuserl.kernels.linear_divergence import linear_divergence
from fuserl.kernels.linear_logprob import linear_logprob
from fuserl.kernels.token_logprob import token_logprob
from fuserl.trainers.heads import weight_like, whole
from fuserl.trainers.logits import entropy_from_logits
from fuserl.trainers.patching import Host, Report

__all__ = ["patch", "report", "unpatch"]

_OPTIONAL = {"entropy": "entropy", "log_sum_sq_probs": "sum_sq_prob", "mean_logits": "mean_logit", "is_top1": "is_top1"}
_HEAD = "trl.trainer.utils:add_fused_lm_head"
_SELECTIVE = "trl.trainer.utils:selective_log_softmax"


class ChunkedLogProb:
    """TRL's ChunkedLogProbFunction by linear_logprob."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = tuple(_OPTIONAL),
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """(log-probs, entropy, log sum p^2, mean logit, top 1) of the targets, float32; None where not in `outputs`.

        Args:
            hidden, weight, bias, targets: (N, D), (V, D), (V,) or None, (N,) int64.
            temperature, final_logit_softcapping, logit_scale: as `linear_logprob` has them.
            chunk_size: TRL's columns at a time; rows stream here, and no result depends on it.
            outputs: which of the optional ones, and "log_probs", which always is.

        Returns:
            (N,) each; gradient flows through the first two.

        Raises:
            ValueError: another name in `outputs`, an option out of its range, or a head that is in parts.
        """
        unknown = sorted(set(outputs) - {"log_probs", *_OPTIONAL})
        if unknown:
            raise ValueError(
                f"add_fused_lm_head: outputs must be among log_probs, {', '.join(_OPTIONAL)}; got {unknown}. Correct "
                "the name."
            )
        weight, bias = whole(weight, bias)  # which TRL has gathered
        found = linear_logprob(
            hidden, weight_like(weight, hidden), targets.long(), bias=bias, temperature=temperature,
            outputs=("logprob", *(ours for theirs, ours in _OPTIONAL.items() if theirs in outputs)),
            softcap=final_logit_softcapping, logit_scale=logit_scale,
        )  # fmt: skip
        log_probs, entropy, sum_sq, mean, top = (vars(found).get(name) for name in ("logprob", *_OPTIONAL.values()))
        return (
            log_probs.float(),
            None if entropy is None else entropy.float(),
            None if sum_sq is None else sum_sq.detach().log().float(),
            None if mean is None else mean.detach().float(),
            None if top is None else top != 0,
        )


class ChunkedDivergence:
    """TRL's ChunkedDivergenceFunction by linear_divergence."""

    @staticmethod
    def apply(
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(divergence, entropy of the student) per token, float32; the divergence has gradient to the student.

        Args:
            student_hidden, student_weight, student_bias: (N, D), (V, D), (V,) or None.
            teacher_hidden, teacher_weight, teacher_bias: the same of another width D.
            beta: 0 is KL(teacher || student), 1 KL(student || teacher), between them the generalised Jensen-Shannon.
            temperature, student_logit_scale, teacher_logit_scale: positive.
            student_final_logit_softcapping, teacher_final_logit_softcapping: positive or None.

        Returns:
            (N,) each.

        Raises:
            ValueError: an option out of its range, or a head that is in parts.
        """
        from trl.trainer.utils import maybe_gather_lm_head_ctx as gathered

        kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(float(beta), "jensen_shannon")
        with gathered(student_weight, student_bias), gathered(teacher_weight, teacher_bias):
            weight, student_bias = whole(student_weight, student_bias)
            student = student_hidden, weight_like(weight, student_hidden)
            weight, teacher_bias = whole(teacher_weight, teacher_bias)
            teacher = teacher_hidden, weight_like(weight, teacher_hidden)
            found, entropy = linear_divergence(
                *student, *teacher, kind, beta=beta, bias_p=student_bias, bias_q=teacher_bias,
                softcap_p=student_final_logit_softcapping, softcap_q=teacher_final_logit_softcapping,
                logit_scale_p=student_logit_scale, logit_scale_q=teacher_logit_scale, temperature=temperature,
            )  # fmt: skip
        return found.float(), entropy.detach().float()


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probability of the chosen token by token_logprob; of several per row, (..., K), by TRL itself.

        log_softmax(logits / temperature)[index], 0 where row_mask is 0

    Args:
        logits: (..., V) of a floating dtype.
        index: (...) of an integer dtype; ignored where row_mask is 0.
        temperature: positive.
        row_mask: (...), nonzero where a row counts.

    Returns:
        index's shape, float32 (float64 from float64).

    Raises:
        ValueError: as `token_logprob`.
    """
    if index.shape != logits.shape[:-1]:
        return _HOST.original(_SELECTIVE)(logits, index, temperature, row_mask)
    return _masked(logits, index, temperature, row_mask)[0]


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of the chosen token and entropy by token_logprob, arguments as `selective_log_softmax` has them.

    Args:
        logits, index, temperature, row_mask: as there; index is (...).
        entropy_requires_grad: whether the entropy has gradient.

    Returns:
        (log-prob, entropy), each of index's shape, float32 (float64 from float64).

    Raises:
        ValueError: as `token_logprob`.
    """
    logprob, entropy = _masked(logits, index, temperature, row_mask)
    return logprob, entropy if entropy_requires_grad else entropy.detach()


def add_fused_lm_head(model: nn.Module, *arguments, **keywords) -> None:
    """TRL's function, for a model whose linear layers are those of `fuserl.layers` from then on.

    Args:
        as of TRL's, which every trainer calls with its models when it is made.
    """
    _HOST.original(_HEAD)(layers.attach(model), *arguments, **keywords)


def compacts(device: torch.device) -> bool:
    """Whether the rows that have labels are taken out before the head: wherever shapes may change from call to call."""
    return device.type in ("cpu", "cuda", "xpu")


_HOST = Host(
    "trl",
    since="1.16",
    below="1.17",
    replacements={
        "trl.kernels.chunked_logprob:ChunkedLogProbFunction": ChunkedLogProb,
        "trl.kernels.chunked_divergence:ChunkedDivergenceFunction": ChunkedDivergence,
        _HEAD: add_fused_lm_head,
        _SELECTIVE: selective_log_softmax,
        "trl.trainer.utils:selective_log_softmax_and_entropy": selective_log_softmax_and_entropy,
        "trl.trainer.utils:entropy_from_logits": entropy_from_logits,
        "trl.trainer.utils:_use_triton": compacts,
        "trl.trainer.distillation_trainer:_use_triton": compacts,
    },
    left={
        "selective_log_softmax of several ids per row": "no trainer's hot path; TRL's own code runs",
        "the losses of log-probs, advantages": "(batch, length) numbers beside (batch, length, vocabulary) logits",
        "trl.experimental losses of whole logits (GOLD, SDPO, SDFT, async and server distillation)": "they hold them",
        "Liger's layers, vLLM, generation": "not of the loss",
    },
)


def patch() -> ExitStack:
    """Replace TRL's log-probs, entropies and divergences by ours, wherever its modules bind them.

    Returns:
        A context; where it is entered, its end takes them out. Else they stay until `unpatch`.

    Raises:
        RuntimeError: TRL has another version than 1.16.
    """
    return _HOST.patch()


def unpatch() -> None:
    """Restore TRL's own functions."""
    _HOST.unpatch()


def report() -> Report:
    """What is replaced now, at which places, and what is left and why."""
    return _HOST.report()


def _masked(logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both outputs of token_logprob, 0 in the rows that do not count, whatever their index is."""
    if row_mask is None:
        return token_logprob(logits, index.long(), temperature=temperature)
    dead = row_mask == 0
    found = token_logprob(logits, index.long().masked_fill(dead, 0), temperature=temperature)
    return tuple(x.masked_fill(dead, 0.0) for x in found)
