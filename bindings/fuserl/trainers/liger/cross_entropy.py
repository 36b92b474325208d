"""Liger's cross entropies over `linear_logprob` and `linear_policy_loss`: its names, arguments and returns.

Where they differ from liger-kernel 0.8.5: logits are float32, and so is the entropy (Liger's has hidden's dtype); all
runs on a CPU; gradients are accumulated in float32 whatever accum_dtype; a batch without a token gives 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fuserl.kernels.head_outputs import as_autocast, requirer
from fuserl.kernels.linear_logprob import linear_logprob
from fuserl.kernels.linear_policy_loss import linear_policy_loss
from fuserl.kernels.softmax_rows import accumulator


class LigerFusedLinearScaledCrossEntropyFunction:
    """Negative log-probability of each target, entropy, and log-probabilities of tokens chosen for all rows."""

    @staticmethod
    def apply(
        _input: Tensor, weight: Tensor, target: Tensor, temperature: float = 1.0, ignore_index: int = -100,
        m_tiles_per_cluster: int = 1, return_entropy: bool = False, selected_token_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
        """Per-token cross entropy of softmax(_input @ weight.T / temperature), differentiable in _input and weight.

        Args:
            _input, weight: (M, H) and (V, H), of one floating dtype.
            target: (M,) int64; rows of ignore_index give 0 and cost nothing.
            m_tiles_per_cluster: how Liger launches its kernel; taken, and without effect.
            return_entropy: return the entropy, too.
            selected_token_ids: (K,) int64, return their log-probabilities in every row, too.

        Returns:
            nll (M,), or a tuple of it, the entropy (M,) and the selected log-probabilities (M, K), as far as asked for;
            float32 (float64 from float64), 0 in ignored rows.

        Raises:
            ValueError: on a wrong shape, dtype, token or number.

        Memory: one chunk of float32 logits; with selected_token_ids also hidden in float32 and, backward, another
        gradient of weight. Sibling: `fuserl.linear_logprob`.
        """
        require = requirer("LigerFusedLinearScaledCrossEntropyFunction")
        for name, value, kind in (
            ("m_tiles_per_cluster", m_tiles_per_cluster, int), ("return_entropy", return_entropy, bool),
        ):  # fmt: skip
            require(type(value) is kind, f"{name} must be {kind.__name__}", repr(value), "Correct the argument.")
        valid, outputs, first = target != ignore_index, ["logprob"], {}
        if return_entropy:
            outputs.append("entropy")
        selecting = selected_token_ids is not None
        if selecting:
            require(
                selected_token_ids.dim() == 1 and selected_token_ids.dtype == torch.int64, "selected_token_ids must be "
                "(K,) int64", f"{tuple(selected_token_ids.shape)} {selected_token_ids.dtype}", "The same for all rows.",
            )  # fmt: skip
            selecting = len(selected_token_ids) > 0
        if selecting:
            first = {"extra_ids": selected_token_ids[0].expand(target.shape).contiguous()}
            outputs.append("extra_logprob")
        out = linear_logprob(
            _input, weight, target.masked_fill(~valid, 0), outputs=outputs, temperature=temperature, mask=valid, **first
        )
        found = [-out.logprob] + ([out.entropy] if return_entropy else [])
        if selecting:
            found.append(_selected(_input, weight, selected_token_ids, out.extra_logprob, valid, temperature))
        elif selected_token_ids is not None:
            found.append(out.logprob.new_zeros(len(target), 0))
        return found[0] if len(found) == 1 else tuple(found)


def _selected(hidden, weight, ids, first, valid, temperature) -> Tensor:
    """(M, K) log-probs of tokens: logits of these alone, on the level of the first one's log-prob (M,)."""
    hidden = as_autocast(hidden)
    rows = as_autocast(weight.index_select(0, ids)).to(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        z = hidden.to(first.dtype) @ rows.to(first.dtype).T / temperature
    return (z - z[:, :1] + first[:, None]).masked_fill(~valid[:, None], 0.0)


class LigerFusedLinearScaledCrossEntropyTPFunction:
    """`LigerFusedLinearScaledCrossEntropyFunction` of a vocabulary cut over the ranks of a group."""

    @staticmethod
    def apply(
        _input: Tensor, weight: Tensor, target: Tensor, tp_group: torch.distributed.ProcessGroup | None,
        temperature: float = 1.0, ignore_index: int = -100, tiles_per_reduce: int = 1, return_entropy: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """As the function of the whole vocabulary; every rank gives the same _input and target.

        Args:
            weight: (V_r, H), this rank's rows of the head; ranks may have different numbers of them.
            target: (M,) int64, tokens of the whole vocabulary.
            tp_group: the group, None for all ranks.
            tiles_per_reduce: how Liger communicates; taken, and without effect.

        Returns:
            nll (M,), or (nll, entropy). The gradient of _input is summed over ranks, that of weight is this rank's.

        Raises:
            ValueError: on a wrong shape, dtype or number. RuntimeError: there is no process group.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise RuntimeError(
                "LigerFusedLinearScaledCrossEntropyTPFunction: a process group must exist; got none. Call "
                "torch.distributed.init_process_group first."
            )
        valid, outputs = target != ignore_index, ("logprob", "entropy") if return_entropy else ("logprob",)
        out = linear_logprob(
            _input, weight, target.masked_fill(~valid, 0), outputs=outputs, temperature=temperature, mask=valid,
            group=torch.distributed.group.WORLD if tp_group is None else tp_group,
        )  # fmt: skip
        return (-out.logprob, out.entropy) if return_entropy else -out.logprob


@dataclass
class CrossEntropyOutput:
    """What the loss returns beside itself where asked: all detached but the loss."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


class LigerFusedLinearCrossEntropyFunction:
    """Cross entropy of a head, with what supervised fine-tuning adds to it."""

    @staticmethod
    def apply(
        _input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, ce_weight: Tensor | None = None,
        ignore_index: int = -100, lse_square_scale: float = 0.0, label_smoothing: float = 0.0, reduction: str = "mean",
        softcap: float | None = None, return_z_loss: bool = False, accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False, return_token_accuracy: bool = False, return_predicted_tokens: bool = False,
        ce_impl: str | None = None, ce_mode: str | None = None, chunk_mem_const: int = 1,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None]:  # fmt: skip
        """(loss, z_loss, token_accuracy, None) of `LigerFusedLinearCrossEntropyLoss`, which has the arguments."""
        require = requirer("LigerFusedLinearCrossEntropyLoss")
        reductions = ("mean", "sum", "none")
        require(reduction in reductions, f"reduction must be one of {reductions}", repr(reduction), "Correct the name.")
        require(0 <= label_smoothing <= 1, "label_smoothing must be in [0, 1]", label_smoothing, "Correct the number.")
        require(
            not return_predicted_tokens, "return_predicted_tokens must be False, as no id of a largest logit is kept",
            True, "return_token_accuracy is at hand; or keep Liger's class for this one.",
        )  # fmt: skip
        require(
            ce_weight is None or label_smoothing == 0, "ce_weight must be left out with label_smoothing", "both",
            "The smoothed classes would need a weighted mean over the vocabulary.",
        )  # fmt: skip
        require(
            ce_impl is None and ce_mode is None, "ce_impl and ce_mode must be None, as they name kernels of Liger",
            (ce_impl, ce_mode), "Set FUSERL_BACKEND to choose ours.",
        )  # fmt: skip
        dtype = accumulator(_input.dtype)
        require(
            accum_dtype is None or torch.finfo(accum_dtype).eps >= torch.finfo(dtype).eps,
            f"accum_dtype must be no finer than {dtype}, in which gradients are accumulated", accum_dtype,
            "Leave it out.",
        )  # fmt: skip
        valid = target != ignore_index
        rows = _CrossEntropy(valid, target.masked_fill(~valid, 0), dtype, ce_weight, reduction=reduction)
        rows.smoothing, rows.z_scale, rows.scaled = label_smoothing, lse_square_scale, use_token_scaling
        rows.with_accuracy = return_token_accuracy
        loss, z_loss, accuracy = rows.loss(_input, weight, bias=bias, softcap=softcap)
        return loss, z_loss if return_z_loss else None, accuracy, None


@dataclass
class _CrossEntropy:
    """The loss of rows from their outputs, and its reduction."""

    valid: Tensor
    target: Tensor
    dtype: torch.dtype
    class_weight: Tensor | None
    reduction: str
    smoothing: float = 0.0
    z_scale: float = 0.0
    scaled: bool = False
    with_accuracy: bool = False

    def __post_init__(self):
        count = self.valid.sum().clamp(min=1)
        self.weights = torch.ones_like(self.target, dtype=self.dtype)
        if self.class_weight is not None:
            self.weights = self.class_weight.detach().to(self.dtype)[self.target]
        self.z_weights = torch.ones_like(self.weights)
        if self.reduction == "mean":
            # Of the smallest normal number, so that weights that are all 0 give 0.
            total = (self.weights * self.valid).sum().clamp(min=torch.finfo(self.dtype).tiny)
            self.weights, self.z_weights = self.weights / total, self.z_weights / count

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the head must give."""
        found = ("logprob", *(("mean_logprob",) if self.smoothing or self.z_scale else ()))
        found += ("mean_logit",) if self.z_scale else ()
        return (*found, "is_top1") if self.with_accuracy else found

    def rows(self, out, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (n,), and the z-loss and accuracy of rows."""
        losses = -out.logprob * self.weights[rows]
        if self.smoothing:
            losses = (1 - self.smoothing) * losses - self.smoothing * out.mean_logprob * self.weights[rows]
        z_loss = torch.zeros_like(losses)
        if self.z_scale:
            z_loss = self.z_scale * (out.mean_logit - out.mean_logprob).square() * self.z_weights[rows]
        factor = out.logprob.detach().exp() if self.scaled else 1.0
        losses, found = (losses + z_loss) * factor, {"z_loss": z_loss * factor}
        return losses, found | ({"accuracy": out.is_top1} if self.with_accuracy else {})

    def loss(self, hidden, weight, **terms) -> tuple[Tensor, Tensor, Tensor | None]:
        """Reduced loss, z-loss and accuracy; the last two detached."""
        if self.reduction == "none":
            out = linear_logprob(hidden, weight, self.target, outputs=self.outputs, mask=self.valid, **terms)
            losses, found = self.rows(out, torch.arange(len(self.target), device=hidden.device))
            found = {name: (x * self.valid).detach() for name, x in found.items()}
            return losses * self.valid, found["z_loss"], found.get("accuracy")
        loss, _, found = linear_policy_loss(
            hidden, weight, self.target, self.rows, outputs=self.outputs, live=self.valid.cpu(), **terms
        )
        sums = {name: x.where(self.valid, 0.0).sum() for name, x in found.items()}
        accuracy = sums.get("accuracy", loss.new_zeros(())) / self.valid.sum() if self.with_accuracy else None
        return loss, sums.get("z_loss", loss.new_zeros(())), accuracy


class LigerFusedLinearCrossEntropyLoss(torch.nn.Module):
    """Cross entropy straight from hidden states, as liger-kernel 0.8.5 has it, in three matrix products.

        loss = (1 - label_smoothing) nll + label_smoothing mean_v(-logp) + lse_square_scale lse^2

    Args:
        ce_weight: (V,), weights of the classes; not with label_smoothing.
        ignore_index: target of rows that are left out.
        lse_square_scale: weight of the square of the log of the normaliser (z-loss).
        label_smoothing: in [0, 1].
        reduction: "mean", over the targets (over their ce_weight), "sum" or "none", which takes a fourth product.
        softcap: c of c tanh(logits / c), None for none.
        return_z_loss, return_token_accuracy: return a `CrossEntropyOutput` with these, detached.
        accum_dtype: gradients are accumulated in float32 (float64 from float64); a finer dtype raises.
        use_token_scaling: multiply each row by its target's probability, which carries no gradient.
        return_predicted_tokens: must be False.

    Raises:
        ValueError: on an option that cannot be honoured, when called.
    """

    def __init__(
        self, ce_weight: Tensor | None = None, ignore_index: int = -100, lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0, reduction: str = "mean", softcap: float | None = None,
        return_z_loss: bool = False, accum_dtype: torch.dtype | None = None, use_token_scaling: bool = False,
        return_token_accuracy: bool = False, return_predicted_tokens: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.ce_weight, self.ignore_index, self.lse_square_scale = ce_weight, ignore_index, lse_square_scale
        self.label_smoothing, self.reduction, self.softcap = label_smoothing, reduction, softcap
        self.return_z_loss, self.accum_dtype, self.use_token_scaling = return_z_loss, accum_dtype, use_token_scaling
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """The loss of states (M, H), a head (V, H) and (V,), and targets (M,) int64; the head comes first."""
        return liger_fused_linear_cross_entropy(
            _input, lin_weight, target, bias, self.ce_weight, self.ignore_index, self.lse_square_scale,
            self.label_smoothing, self.reduction, self.softcap, self.return_z_loss, self.accum_dtype,
            self.use_token_scaling, self.return_token_accuracy, self.return_predicted_tokens,
        )  # fmt: skip


def liger_fused_linear_cross_entropy(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, ce_weight: Tensor | None = None,
    ignore_index: int = -100, lse_square_scale: float = 0.0, label_smoothing: float = 0.0, reduction: str = "mean",
    softcap: float | None = None, return_z_loss: bool = False, accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False, return_token_accuracy: bool = False, return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
) -> Tensor | CrossEntropyOutput:  # fmt: skip
    """`LigerFusedLinearCrossEntropyLoss` in one call; chunk_mem_const is taken, and without effect."""
    found = LigerFusedLinearCrossEntropyFunction.apply(
        input, weight, target, bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap,
        return_z_loss, accum_dtype, use_token_scaling, return_token_accuracy, return_predicted_tokens,
    )  # fmt: skip
    if not (return_z_loss or return_token_accuracy):
        return found[0]
    return CrossEntropyOutput(*found)


def liger_fused_linear_scaled_cross_entropy_tp(
    input: Tensor, weight: Tensor, target: Tensor, tp_group: torch.distributed.ProcessGroup | None,
    temperature: float = 1.0, ignore_index: int = -100, tiles_per_reduce: int = 1, return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`LigerFusedLinearScaledCrossEntropyTPFunction.apply` by its other name."""
    return LigerFusedLinearScaledCrossEntropyTPFunction.apply(
        input, weight, target, tp_group, temperature, ignore_index, tiles_per_reduce, return_entropy
    )
