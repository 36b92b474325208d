"""Liger's preference losses over `linear_policy_loss`: DPO, CPO, SimPO, ORPO and KTO by its names.

Where they differ from liger-kernel 0.8.5: logits are float32; a completion without tokens has log-probability 0 (Liger
divides by its length, and a batch of none by theirs: NaN); label_smoothing with loss_type "sigmoid" is cDPO's (Liger
drops it); KTO's kl of shape (B,) is per completion (Liger takes all B in every chunk). What Liger drops or mistakes in
silence raises: label_smoothing with the other losses of DPO, a reference with use_ref_model=False, an odd batch, labels
that are not bool.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fuserl.kernels.head_outputs import requirer
from fuserl.trainers.liger.completions import Completions, sums_of_logits


def _share(x):
    """sigmoid(x), whose gradient y (1 - y) keeps its precision where y is near 1, too."""
    return torch.where(x > 0, 1 - torch.sigmoid(-x), torch.sigmoid(x))


def _sigmoid(c, r, beta, smoothing):
    return -(1 - smoothing) * F.logsigmoid(beta * (c - r)) - smoothing * F.logsigmoid(-beta * (c - r))


def _robust(c, r, beta, smoothing):
    flipped = smoothing * F.logsigmoid(-beta * (c - r))
    return (flipped - (1 - smoothing) * F.logsigmoid(beta * (c - r))) / (1 - 2 * smoothing)


def _exo_pair(c, r, beta, smoothing):
    margin, smoothing = beta * (c - r), torch.as_tensor(smoothing, dtype=c.dtype, device=c.device)
    kept = torch.sigmoid(margin) * (F.logsigmoid(margin) - torch.log1p(-smoothing))
    return kept + torch.sigmoid(-margin) * (F.logsigmoid(-margin) - smoothing.log())


def _nca_pair(c, r, beta, _):
    return -F.logsigmoid(beta * c) - 0.5 * F.logsigmoid(-beta * c) - 0.5 * F.logsigmoid(-beta * r)


def _discopop(c, r, beta, tau):
    margin = beta * (c - r)
    share = torch.sigmoid(margin / tau)
    return -F.logsigmoid(margin) * (1 - share) + torch.exp(-margin) * share


# Loss of a pair from the log-ratios of chosen c and rejected r, beta, and the label smoothing (discopop: tau).
_PAIRS = {
    "sigmoid": _sigmoid,
    "hinge": lambda c, r, beta, _: torch.relu(1 - beta * (c - r)),
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": lambda c, r, beta, _: -F.logsigmoid(beta * c) - F.logsigmoid(-beta * r),
    "sppo_hard": lambda c, r, beta, _: (c - 0.5 / beta).square() + (r + 0.5 / beta).square(),
    "apo_zero": lambda c, r, beta, _: _share(-beta * c) + _share(beta * r),
    "apo_down": lambda c, r, beta, _: _share(beta * c) + _share(-beta * (c - r)),
    "discopop": _discopop,
}
_SMOOTHED = ("sigmoid", "exo_pair", "robust")


def _reference(op: str, use: bool, hidden, weight, bias) -> tuple | None:
    """The reference's (hidden, weight, bias), or None; raises where use_ref_model says otherwise."""
    require = requirer(op)
    require(
        use or (hidden is None and weight is None), "use_ref_model must be True where ref_input is given", use,
        "Or leave the reference out.",
    )  # fmt: skip
    require(
        not use or (hidden is not None and weight is not None),
        "ref_input and ref_weight must be given with use_ref_model", "neither, or one", "Pass both.",
    )  # fmt: skip
    return (hidden, weight, bias) if use else None


def _paired(
    op: str, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None,
    losses: Callable[[Tensor, Tensor], Tensor], *, beta: float, nll: float | None, ignore_index: int, average: bool,
    reference: tuple | None = None, nll_target: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:  # fmt: skip
    """(loss, Liger's outputs, (2, P) log-ratios) of pairs; `losses` is of two (P,), nll None for no such term."""
    with_nll = {} if nll is None else {"nll_target": nll_target}
    pairs = Completions(op, hidden, target, ignore_index=ignore_index, members=2, average=average, **with_nll)
    known = 0.0 if reference is None else pairs.reference(*reference)

    def group_losses(logps):
        return losses(*(logps - known).unbind(1)) / max(1, pairs.groups)

    loss, logps, likelihood = pairs.loss(weight, bias, group_losses, nll or 0.0)
    of = torch.arange(len(target), device=target.device) < pairs.groups
    positions = max(1, pairs.groups * target.shape[1] * weight.shape[0])
    means = (sums_of_logits(hidden, weight, bias, of) / positions).unbind()
    likelihood, ratios = likelihood if nll is not None else torch.zeros_like(likelihood), (logps - known).unbind(1)
    return loss, (*logps.unbind(1), *means, likelihood, *(beta * x for x in ratios)), torch.stack(ratios)


class LigerFusedLinearDPOLoss(torch.nn.Module):
    """Direct preference optimisation and its kin from hidden states, as liger-kernel 0.8.5 has them.

    Args:
        ignore_index: target that is no token.
        beta: weight of the log-ratios.
        alpha: weight of the likelihood of the chosen, where compute_nll_loss.
        compiled, chunk_size: how Liger runs; taken, and without effect.
        use_ref_model: whether there is a reference; without one the ratios are the log-probs.
        average_log_prob: mean over a completion's tokens instead of the sum.
        loss_type: sigmoid, hinge, exo_pair, nca_pair, robust, bco_pair, sppo_hard, apo_zero, apo_down or discopop.
        label_smoothing: share of flipped labels in sigmoid (cDPO) and robust, epsilon of exo_pair; 0 elsewhere.
        discopop_tau: temperature of discopop.

    Raises:
        ValueError: on an option that cannot be honoured.
    """

    def __init__(
        self, ignore_index: int = -100, beta: float = 0.1, alpha: float = 1.0, compute_nll_loss: bool = False,
        compiled: bool = True, use_ref_model: bool = True, average_log_prob: bool = False, chunk_size: int = 1,
        loss_type: str = "sigmoid", label_smoothing: float = 0.0, discopop_tau: float = 0.05,
    ):  # fmt: skip
        super().__init__()
        self.ignore_index, self.beta, self.alpha, self.compute_nll_loss = ignore_index, beta, alpha, compute_nll_loss
        self.compiled, self.use_ref_model, self.average_log_prob = compiled, use_ref_model, average_log_prob
        self.chunk_size, self.loss_type, self.label_smoothing = chunk_size, loss_type, label_smoothing
        self.discopop_tau = discopop_tau
        self._check()

    def _check(self):
        require, kind, smoothing = requirer("LigerFusedLinearDPOLoss"), self.loss_type, self.label_smoothing
        require(kind in _PAIRS, f"loss_type must be one of {', '.join(_PAIRS)}", repr(kind), "Correct the name.")
        require(
            kind in _SMOOTHED or smoothing == 0, f"label_smoothing must be 0 with {kind}", smoothing,
            f"It is for {', '.join(_SMOOTHED)}.",
        )  # fmt: skip
        require(
            kind != "exo_pair" or smoothing > 0, "label_smoothing must be > 0 with exo_pair", smoothing, "Use 1e-3."
        )
        require(
            0 <= smoothing < 0.5 or kind != "robust", "label_smoothing must be in [0, 0.5)", smoothing, "Correct it."
        )

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None,
        ref_input: Tensor | None = None, ref_weight: Tensor | None = None, ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """The loss, differentiable in lin_weight, _input and bias, and Liger's seven outputs.

        Args:
            lin_weight, bias: (V, D) and (V,), the head, of the states' dtype; the head comes first.
            _input: (2 P, T, D), the states of P chosen completions, then of the P rejected.
            target: (2 P, T) int64, the tokens that they predict.
            ref_input, ref_weight, ref_bias: the reference's, (2 P, T, D_r), (V, D_r), (V,).

        Returns:
            (loss, (chosen logps (P,), rejected logps, mean chosen logit, mean rejected logit, likelihood term, chosen
            rewards (P,), rejected rewards)), all detached but the loss, whose backward may run once. The means are over
            all positions, padding included, as Liger's.

        Raises:
            ValueError: on a wrong shape or option.

        Memory: one chunk of float32 logits, and a copy of the states in the order of the pairs.
        """
        self._check()
        reference = _reference("LigerFusedLinearDPOLoss", self.use_ref_model, ref_input, ref_weight, ref_bias)
        pair, extra = _PAIRS[self.loss_type], self.label_smoothing
        extra = self.discopop_tau if self.loss_type == "discopop" else extra
        return _paired(
            "LigerFusedLinearDPOLoss", _input, lin_weight, target, bias, lambda c, r: pair(c, r, self.beta, extra),
            beta=self.beta, nll=self.alpha if self.compute_nll_loss else None, ignore_index=self.ignore_index,
            average=self.average_log_prob, reference=reference,
        )[:2]  # fmt: skip


class LigerFusedLinearCPOLoss(torch.nn.Module):
    """Contrastive preference optimisation: `LigerFusedLinearDPOLoss` without a reference, and with the likelihood.

    Args:
        label_smoothing: share of flipped labels.
        ignore_index, beta, alpha, compute_nll_loss, compiled, average_log_prob, chunk_size: as there.
    """

    def __init__(
        self, ignore_index: int = -100, beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0,
        compute_nll_loss: bool = True, compiled: bool = True, average_log_prob: bool = False, chunk_size: int = 1,
    ):  # fmt: skip
        super().__init__()
        self.ignore_index, self.beta, self.alpha, self.label_smoothing = ignore_index, beta, alpha, label_smoothing
        self.compute_nll_loss, self.compiled = compute_nll_loss, compiled
        self.average_log_prob, self.chunk_size = average_log_prob, chunk_size

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and the seven outputs, as `LigerFusedLinearDPOLoss.forward` of the same arguments."""
        return _paired(
            "LigerFusedLinearCPOLoss", _input, lin_weight, target, bias,
            lambda c, r: _sigmoid(c, r, self.beta, self.label_smoothing), beta=self.beta,
            nll=self.alpha if self.compute_nll_loss else None, ignore_index=self.ignore_index,
            average=self.average_log_prob,
        )[:2]  # fmt: skip


class LigerFusedLinearSimPOLoss(torch.nn.Module):
    """SimPO: mean log-probs against each other, with a margin.

    Args:
        gamma: the margin.
        ignore_index, beta, alpha, label_smoothing, compute_nll_loss, compiled, chunk_size: as in
            `LigerFusedLinearCPOLoss`.
    """

    def __init__(
        self, ignore_index: int = -100, beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0,
        compute_nll_loss: bool = True, compiled: bool = True, gamma: float = 0.5, chunk_size: int = 1,
    ):  # fmt: skip
        super().__init__()
        self.ignore_index, self.beta, self.alpha, self.label_smoothing = ignore_index, beta, alpha, label_smoothing
        self.compute_nll_loss, self.compiled, self.gamma, self.chunk_size = (
            compute_nll_loss,
            compiled,
            gamma,
            chunk_size,
        )

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss and the seven outputs, as `LigerFusedLinearDPOLoss.forward` of the same arguments."""
        return _paired(
            "LigerFusedLinearSimPOLoss", _input, lin_weight, target, bias,
            lambda c, r: _sigmoid(self.beta * (c - r) - self.gamma, 0.0, 1.0, self.label_smoothing), beta=self.beta,
            nll=self.alpha if self.compute_nll_loss else None, ignore_index=self.ignore_index, average=True,
        )[:2]  # fmt: skip


def _log_odds(c: Tensor, r: Tensor) -> Tensor:
    return c - r - (torch.log(-torch.expm1(c)) - torch.log(-torch.expm1(r)))


class LigerFusedLinearORPOLoss(torch.nn.Module):
    """Odds-ratio preference optimisation, with the likelihood of the chosen.

        loss = nll - beta logsigmoid(log odds of chosen - log odds of rejected),  odds = p / (1 - p),  p = e^(mean logp)

    Args:
        ignore_index, beta, compute_nll_loss, compiled, chunk_size: as in `LigerFusedLinearCPOLoss`.
    """

    def __init__(
        self, ignore_index: int = -100, beta: float = 0.1, compute_nll_loss: bool = True, compiled: bool = True,
        chunk_size: int = 1,
    ):  # fmt: skip
        super().__init__()
        self.ignore_index, self.beta, self.compute_nll_loss = ignore_index, beta, compute_nll_loss
        self.compiled, self.chunk_size = compiled, chunk_size

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """The loss and nine outputs: the seven of `LigerFusedLinearDPOLoss.forward`, log-sigmoid and log of the odds.

        Args:
            nll_target: (2 P, T) int64, targets of the likelihood term, as with the prompt; None for `target`.
        """
        loss, outputs, (chosen, rejected) = _paired(
            "LigerFusedLinearORPOLoss", _input, lin_weight, target, bias,
            lambda c, r: -self.beta * F.logsigmoid(_log_odds(c, r)), beta=self.beta,
            nll=1.0 if self.compute_nll_loss else None, ignore_index=self.ignore_index, average=True,
            nll_target=nll_target,
        )  # fmt: skip
        odds = _log_odds(chosen, rejected)
        return loss, (*outputs, F.logsigmoid(odds).mean(), odds.mean())


class LigerFusedLinearKTOLoss(torch.nn.Module):
    """Kahneman-Tversky optimisation of completions that stand alone.

        loss = mean of 1 - sigmoid(s beta (logp - reference's - kl)),  s = 1 for a desirable completion, else -1

    Args:
        ignore_index, beta, compiled, use_ref_model, average_log_prob, chunk_size: as in `LigerFusedLinearDPOLoss`.
    """

    def __init__(
        self, ignore_index: int = -100, beta: float = 0.1, compiled: bool = True, use_ref_model: bool = False,
        average_log_prob: bool = False, chunk_size: int = 1,
    ):  # fmt: skip
        super().__init__()
        self.ignore_index, self.beta, self.compiled = ignore_index, beta, compiled
        self.use_ref_model, self.average_log_prob, self.chunk_size = use_ref_model, average_log_prob, chunk_size

    def forward(
        self, _input: Tensor, lin_weight: Tensor, target: Tensor, bias: Tensor | None = None,
        preference_labels: Tensor | None = None, ref_input: Tensor | None = None, ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None, kl: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """The loss, differentiable in _input, lin_weight and bias, and Liger's six outputs.

        Args:
            _input: (B, T, D), target (B, T) int64, lin_weight (V, D), bias (V,).
            preference_labels: (B,) bool, True where desirable.
            ref_input, ref_weight, ref_bias: the reference's.
            kl: (), (1,) or (B,), what the log-ratios are measured against; None for 0.

        Returns:
            (loss, sums over the desirable, the undesirable: of logps, of logits, of rewards), detached but the loss.

        Raises:
            ValueError: on a wrong shape or option.
        """
        op, labels = "LigerFusedLinearKTOLoss", preference_labels
        require = requirer(op)
        require(
            labels is not None and labels.dtype == torch.bool and labels.shape == target.shape[:1],
            f"preference_labels must be ({len(target)},) bool",
            None if labels is None else f"{tuple(labels.shape)} {labels.dtype}", "True where desirable.",
        )  # fmt: skip
        require(
            kl is None or kl.shape in ((), (1,), labels.shape), f"kl must be (), (1,) or ({len(target)},)",
            None if kl is None else tuple(kl.shape), "One number, or one per completion.",
        )  # fmt: skip
        reference = _reference(op, self.use_ref_model, ref_input, ref_weight, ref_bias)
        alone = Completions(
            op, _input, target, ignore_index=self.ignore_index, members=1, average=self.average_log_prob
        )
        known = 0.0 if reference is None else alone.reference(*reference)
        sign, shift = torch.where(labels, 1.0, -1.0).to(alone.dtype), 0.0 if kl is None else kl.detach().to(alone.dtype)

        def losses(logps):
            return _share(-self.beta * sign * ((logps - known).squeeze(1) - shift)) / max(1, len(target))

        loss, logps, _ = alone.loss(lin_weight, bias, losses, 0.0)
        rewards, logps = self.beta * (logps - known).squeeze(1), logps.squeeze(1)
        each = [x.where(of, 0.0).sum() for x in (logps, rewards) for of in (labels, ~labels)]
        logits = sums_of_logits(_input, lin_weight, bias, labels).unbind()
        return loss, (*each[:2], *logits, *each[2:])
