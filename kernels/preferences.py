"""Published losses of preferences, as numbers of one: what the score of a rollout is, and how a margin becomes a loss.

    score  = sum over a rollout's tokens of (logprob - ref), over its tokens where the form normalises by length
    margin = scale (score of chosen - score of rejected) - shift - margins

    logistic  positive softplus(-margin) + negative softplus(margin)
    hinge     positive max(1 - margin, 0)
    square    positive margin^2
    sigmoid   weight sigmoid(-margin)
    odds      positive softplus(odds of rejected - odds of chosen), odds = score - log(1 - exp(score))

and to each is added nll (-mean logprob of chosen) + centre (score of chosen + score of rejected)^2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["CPO", "DPO", "IPO", "KTO", "ORPO", "STATISTICS", "BradleyTerry", "Hinge", "SimPO", "merged", "named"]

STATISTICS = ("items", "margin", "right", "chosen", "rejected", "chosen_reward", "rejected_reward", "nll")
LOGISTIC, HINGE, SQUARE, SIGMOID, ODDS = range(5)


class Rule(NamedTuple):
    """The numbers of a call; `link` is one of the five above."""

    link: int
    mean: bool = False
    scale: float = 1.0
    shift: float = 0.0
    positive: float = 1.0
    negative: float = 0.0
    nll: float = 0.0
    centre: float = 0.0


class BradleyTerry(NamedTuple):
    """Likelihood of pairs under a reward model's scores (arXiv:2203.02155, eq. 1), which `centre` keeps around 0.

    loss = -log sigmoid(chosen - rejected) + centre (chosen + rejected)^2
    """

    centre: float = 0.0
    reference = False

    def rule(self) -> Rule:
        """Its numbers."""
        _require(self, "centre", _weight(self.centre))
        return Rule(LOGISTIC, centre=self.centre)


class DPO(NamedTuple):
    """Direct preference optimisation (arXiv:2305.18290, eq. 7); smoothed it is conservative DPO, `robust` 2403.00409.

        loss = -(1 - label_smoothing) log sigmoid(margin) - label_smoothing log sigmoid(-margin)
        margin = beta (sum over chosen of (logprob - ref) - sum over rejected of (logprob - ref))

    `robust` turns the second sign and divides by 1 - 2 label_smoothing: right on average where that share of labels is
    wrong. `nll` weighs the mean negative log-prob of the chosen one's tokens (arXiv:2404.19733).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    robust: bool = False
    nll: float = 0.0
    reference = True

    def rule(self) -> Rule:
        """Its numbers."""
        _require(self, "beta", _positive(self.beta))
        _require(self, "label_smoothing", _smoothing(self.label_smoothing, self.robust))
        _require(self, "nll", _weight(self.nll))
        turned = self.label_smoothing
        scale = 1 / (1 - 2 * turned) if self.robust else 1.0
        negative = -turned * scale if self.robust else turned
        return Rule(LOGISTIC, scale=self.beta, positive=(1 - turned) * scale, negative=negative, nll=self.nll)


class Hinge(NamedTuple):
    """Sequence likelihood calibration (arXiv:2305.10425; with a reference 2309.06657): max(1 - margin, 0).

    margin = beta (score of chosen - score of rejected), of log-probs or of their difference to a reference.
    """

    beta: float = 0.1
    nll: float = 0.0
    reference = None

    def rule(self) -> Rule:
        """Its numbers."""
        _require(self, "beta", _positive(self.beta))
        _require(self, "nll", _weight(self.nll))
        return Rule(HINGE, scale=self.beta, nll=self.nll)


class IPO(NamedTuple):
    """Identity preference optimisation (arXiv:2310.12036, eq. 17), of means over tokens, as its authors ran it.

    loss = (mean over chosen of (logprob - ref) - mean over rejected of (logprob - ref) - 1 / (2 beta))^2
    """

    beta: float = 0.1
    reference = True

    def rule(self) -> Rule:
        """Its numbers."""
        _require(self, "beta", _positive(self.beta))
        return Rule(SQUARE, mean=True, scale=self.beta, shift=0.5, positive=self.beta**-2)


class SimPO(NamedTuple):
    """Simple preference optimisation (arXiv:2405.14734, eq. 6), without a reference.

    loss = -log sigmoid(beta (mean logprob of chosen - mean logprob of rejected) - gamma), labels smoothed as in DPO
    """

    beta: float = 2.0
    gamma: float = 1.0
    label_smoothing: float = 0.0
    nll: float = 0.0
    reference = False

    def rule(self) -> Rule:
        """Its numbers."""
        _require(self, "beta", _positive(self.beta))
        _require(self, "gamma", (math.isfinite(self.gamma), "a finite number"))
        _require(self, "label_smoothing", _smoothing(self.label_smoothing))
        _require(self, "nll", _weight(self.nll))
        turned = self.label_smoothing
        return Rule(LOGISTIC, True, self.beta, self.gamma, 1 - turned, turned, self.nll)


class CPO(NamedTuple):
    """Contrastive preference optimisation (arXiv:2401.08417, eq. 6), without a reference.

    loss = -log sigmoid(beta (sum logprob of chosen - sum logprob of rejected)) - nll (mean logprob of chosen)
    """

    beta: float = 0.1
    nll: float = 1.0
    label_smoothing: float = 0.0
    reference = False

    def rule(self) -> Rule:
        """Its numbers."""
        return DPO(self.beta, self.label_smoothing, nll=self.nll).rule()


class ORPO(NamedTuple):
    """Odds-ratio preference optimisation (arXiv:2403.07691, eq. 6 and 7), without a reference.

    loss = -nll (mean logprob of chosen) - lam log sigmoid(odds of chosen - odds of rejected)
    odds = s - log(1 - exp(s)), s = mean logprob
    """

    lam: float = 0.1
    nll: float = 1.0
    reference = False

    def rule(self) -> Rule:
        """Its numbers."""
        _require(self, "lam", _positive(self.lam))
        _require(self, "nll", _weight(self.nll))
        return Rule(ODDS, mean=True, scale=self.lam, positive=self.lam, nll=self.nll)


class KTO(NamedTuple):
    """Kahneman-Tversky optimisation (arXiv:2402.01306, eq. 7 and 8), of rollouts without a pair.

    loss = desirable   sigmoid(beta (baseline - score))    where the rollout is desirable
           undesirable sigmoid(beta (score - baseline))    where it is not
    """

    beta: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0
    reference = True

    def rule(self) -> Rule:
        """Its numbers."""
        _require(self, "beta", _positive(self.beta))
        _require(self, "desirable", _weight(self.desirable))
        _require(self, "undesirable", _weight(self.undesirable))
        return Rule(SIGMOID, scale=self.beta, positive=self.desirable, negative=self.undesirable)


Form = BradleyTerry | DPO | Hinge | IPO | SimPO | CPO | ORPO | KTO


def merged(statistics: Tensor) -> Tensor:
    """Statistics of all pairs out of those of C parts, (C, 8) as `preference_loss` returned them: their sum, (8,)."""
    return statistics.sum(0)


def named(statistics: Tensor) -> dict[str, Tensor]:
    """What a trainer logs, by name: means over pairs.

    Args:
        statistics: (8,) as `preference_loss` or `merged` returned them, on any device, which is not waited for.

    Returns:
        margin, accuracy (share of margins above 0), chosen_reward, rejected_reward and nll as scalar tensors; 0 where
        there is no pair. The margin is that of the rewards; of rollouts without a pair, to the baseline.
    """
    items, margin, right, chosen, rejected, chosen_reward, rejected_reward, nll = statistics.unbind()
    means = {
        "margin": (margin, items), "accuracy": (right, items), "chosen_reward": (chosen_reward, chosen),
        "rejected_reward": (rejected_reward, rejected), "nll": (nll, items),
    }  # fmt: skip
    return {name: torch.where(count > 0, total / count, 0.0) for name, (total, count) in means.items()}


def _require(form: NamedTuple, name: str, contract: tuple[bool, str]) -> None:
    good, wanted = contract
    if not good:
        raise ValueError(
            f"preference_loss: {name} of {type(form).__name__} must be {wanted}; got {getattr(form, name)}. "
            "Correct the number."
        )


def _positive(value: float) -> tuple[bool, str]:
    return 0 < value < math.inf, "a finite number > 0"


def _weight(value: float) -> tuple[bool, str]:
    return 0 <= value < math.inf, "a finite number >= 0"


def _smoothing(value: float, robust: bool = False) -> tuple[bool, str]:
    if robust:
        return 0 <= value < 0.5, "in [0, 0.5)"
    return 0 <= value <= 0.5, "in [0, 0.5]"
